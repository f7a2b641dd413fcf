"""How a teacher is kept: what a quantised one computes, the bytes it takes, what is said about it, what is refused.

Sharded teachers are in tests/distributed/.
"""

import copy
import resource
from pathlib import Path

import bitsandbytes
import pytest
import torch

from rlkd_trl.errors import InputError
from rlkd_trl.models.memory import held_bytes
from rlkd_trl.teachers import Teacher, placement
from rlkd_trl.teachers.placement import Placement
from tests.tiny_models import MODELS, word_tokenizer

PROMPTS = ["w3 w4 w5 w6", "w9"]
IDS_BT = torch.tensor([[4, 5, 6, 1], [7, 1, 0, 0], [8, 9, 10, 11]])
MASK_BT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
COMPLETIONS = (torch.tensor([0, 0, 1]), IDS_BT, MASK_BT, torch.tensor([True, True, False]))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    directories = {}
    for family in ("t5-untied", "llama"):
        directories[family] = str(tmp_path_factory.mktemp(family))
        MODELS[family]().save_pretrained(directories[family])
        word_tokenizer().save_pretrained(directories[family])
    return directories


def scores_of(teacher: Teacher) -> torch.Tensor:
    """Every statistic of every state, in one row."""
    scores = teacher.score(PROMPTS, *COMPLETIONS)
    return torch.cat([value.flatten() for value in (scores.chosen, scores.mean, scores.max, scores.logsumexp)])


def dequantised(teacher: Teacher, whole: torch.nn.Module) -> tuple[torch.nn.Module, int]:
    """`whole` with the quantised teacher's 4-bit weights written out in float32, and how many there were."""
    model, count = copy.deepcopy(whole), 0
    for name, module in teacher.model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            model.get_submodule(name).weight.data = weight.float()
            count += 1
    return model, count


@pytest.mark.parametrize("family", ["t5-untied", "llama"])
def test_nf4_scores_are_those_of_the_rounded_weights(checkpoints, family):
    quantised = Teacher.from_pretrained(checkpoints[family], quantization="nf4")
    model, count = dequantised(quantised, MODELS[family]())
    # T5: 4 attention matrices and 2 gates in each of 2 + 2 layers, cross-attention in 2: 2·6 + 2·10. Llama: 7 in each.
    assert count == {"t5-untied": 32, "llama": 14}[family]
    expected = scores_of(Teacher(model, word_tokenizer()))
    torch.testing.assert_close(scores_of(quantised), expected, rtol=1e-4, atol=1e-4)
    exact = scores_of(Teacher(MODELS[family](), word_tokenizer()))
    assert (expected - exact).norm() > 0.01 * exact.norm(), "the test needs weights that rounding changes"


@pytest.mark.parametrize("family", ["t5-untied", "llama"])
def test_int8_scores_are_near_the_exact_ones(checkpoints, family):
    """The error is 3.7 % (T5) and 0.8 % (Llama) here; nf4's is 36 and 13 %."""
    exact = scores_of(Teacher(MODELS[family](), word_tokenizer()))
    found = scores_of(Teacher.from_pretrained(checkpoints[family], quantization="int8"))
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.06


def test_bytes_of_a_quantised_layer():
    """By hand: a 64 × 32 matrix has 2048 weights."""
    layer = torch.nn.Linear(32, 64, bias=False)
    assert held_bytes(layer) == 4 * 2048
    int8 = bitsandbytes.nn.Linear8bitLt(32, 64, bias=False, has_fp16_weights=False)
    int8.load_state_dict(layer.state_dict())
    int8.to("cpu")
    int8(torch.randn(1, 32))  # quantised at the first use
    assert held_bytes(int8) == 2048 + 4 * 64, "one byte each, and a float32 scale for every row"
    nf4 = bitsandbytes.nn.Linear4bit(32, 64, bias=False, quant_type="nf4", compress_statistics=False)
    nf4.load_state_dict(layer.state_dict())
    nf4.to("cpu")
    # Half a byte each, a float32 scale for every block of 64, and the 16 values that 4 bits stand for.
    assert held_bytes(nf4) == 1024 + 4 * (2048 // 64) + 4 * 16


@pytest.mark.parametrize(
    "quantization, said",
    [("none", "not quantised"), ("int8", "quantised to int8"), ("nf4", "quantised to nf4")],
)
def test_what_was_chosen_is_said(checkpoints, quantization, said):
    teacher = Teacher.from_pretrained(checkpoints["llama"], quantization=quantization)
    assert said in teacher.describe() and "replicated, float32" in teacher.describe()
    assert f"{held_bytes(teacher.model):,} bytes" in teacher.describe()


def test_a_checkpoint_that_was_saved_quantised_is_not_called_whole(checkpoints, tmp_path):
    saved = Teacher.from_pretrained(checkpoints["llama"], quantization="nf4")
    saved.model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    assert "quantised to nf4" in Teacher.from_pretrained(str(tmp_path)).describe()


def test_half_precision_of_what_is_not_quantised(checkpoints):
    teacher = Teacher.from_pretrained(checkpoints["llama"], quantization="nf4", dtype="bfloat16")
    assert teacher.model.lm_head.weight.dtype == torch.bfloat16 and "bfloat16" in teacher.describe()
    assert scores_of(teacher).isfinite().all()


def test_an_unknown_quantisation(checkpoints):
    with pytest.raises(InputError, match="Unknown quantisation 'int4'; choose one of: none, int8, nf4"):
        Teacher.from_pretrained(checkpoints["llama"], quantization="int4")


def test_quantisation_without_its_library(checkpoints, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs bitsandbytes"):
        Teacher.from_pretrained(checkpoints["llama"], quantization="int8")


def test_where_shards_are_parked():
    assert not Placement().is_sharded
    zero3 = Placement("zero3").deepspeed_config["zero_optimization"]
    assert zero3 == {"stage": 3, "stage3_param_persistence_threshold": 0}, "every weight is sharded, none parked"
    offload = Placement("offload").deepspeed_config["zero_optimization"]
    assert offload["stage"] == 3 and offload["offload_param"]["device"] == "cpu"


def test_files_are_one_teachers_own_and_go_with_it(tmp_path, monkeypatch):
    """DeepSpeed deletes what it finds where it is to write: shards of another teacher, or of another process."""
    monkeypatch.setattr(placement, "_can_offload_to_files", lambda: True)
    monkeypatch.setattr(placement, "_can_lock", lambda size: True)
    teachers = [Placement("offload", offload_path=str(tmp_path)) for _ in range(2)]
    settings = [teacher.deepspeed_config["zero_optimization"]["offload_param"] for teacher in (*teachers, teachers[0])]
    assert {setting["device"] for setting in settings} == {"nvme"}
    first, second, again = (Path(setting["nvme_path"]) for setting in settings)
    assert first == again != second and {first, second} == set(tmp_path.iterdir())
    teachers.clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shards_have_the_dtype_that_was_asked_for(dtype):
    """Without a word from us, DeepSpeed makes float32 of everything."""
    config = Placement("zero3", dtype=dtype).deepspeed_config
    assert config["bf16"]["enabled"] == (dtype == "bfloat16") and config["fp16"]["enabled"] == (dtype == "float16")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"placement": "everywhere"}, "Unknown teacher placement 'everywhere'; choose one of: replicated, zero3, off"),
        ({"placement": "zero3", "quantization": "nf4"}, "quantised to nf4 cannot be sharded"),
        ({"placement": "offload", "quantization": "int8"}, "quantised to int8 cannot be sharded"),
        ({"placement": "zero3", "dtype": "auto"}, "dtype has to be named"),
        ({"offload_path": "."}, "An offload path needs the placement 'offload'; it is 'replicated'"),
        ({"placement": "offload", "offload_path": "nowhere"}, "nowhere is not a directory"),
    ],
)
def test_what_does_not_go_together(settings, message):
    with pytest.raises(InputError, match=message):
        Placement(**settings)


def test_files_that_deepspeed_cannot_write(tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "_can_offload_to_files", lambda: False)
    with pytest.raises(InputError, match=r"install libaio.*or offload to CPU memory"):
        Placement("offload", offload_path=str(tmp_path))


@pytest.mark.parametrize(("dtype", "size"), [("float32", "2,000,000,000"), ("bfloat16", "1,000,000,000")])
def test_files_where_memory_may_not_be_locked(dtype, size, tmp_path, monkeypatch):
    """DeepSpeed would abort in C++."""
    monkeypatch.setattr(placement, "_can_offload_to_files", lambda: True)
    monkeypatch.setattr(placement, "_can_lock", lambda size: False)
    with pytest.raises(InputError, match=f"go through {size} bytes of locked memory"):
        Placement("offload", offload_path=str(tmp_path), dtype=dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("limit", "capabilities", "can"),
    [(-1, "0", True), (2000, "0", True), (1999, "0", False), (1999, "4000", True), (1999, "ffffbfff", False)],
)
def test_who_may_lock_memory(limit, capabilities, can, tmp_path, monkeypatch):
    """As much as the limit says (-1: any), or any with CAP_IPC_LOCK, which is bit 14."""
    (tmp_path / "status").write_text(f"Name:\tpython\nCapEff:\t{capabilities}\n")
    monkeypatch.setattr(placement, "Path", lambda name: tmp_path / "status")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limit, limit))
    assert placement._can_lock(2000) == can


def test_shards_without_deepspeed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs DeepSpeed"):
        Placement("zero3")
