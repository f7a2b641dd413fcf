"""Each use of what other libraries do not promise to keep, on its own, and that there are no others."""

import ast
from functools import cache
from importlib.metadata import version
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

import rlkd_trl
from rlkd_trl.models import private_apis
from tests.tiny_models import tiny_llama, tiny_t5

SEEN = {
    "transformers": "5.23.0 and 5.24.0",
    "accelerate": "1.15.0",
    "deepspeed": "0.19.8",
    "bitsandbytes": "0.50.2",
}
PACKAGE = Path(rlkd_trl.__file__).parent


def gone(library: str, what: str) -> str:
    """The message for whoever moves a library's version."""
    return (
        f"{library} {version(library)} does not have {what} any more, or does something else with it. See "
        f"rlkd_trl/models/private_apis.py, written with {library} {SEEN[library]}."
    )


def test_attention_can_be_named_and_exchanged():
    model, message = tiny_llama(), gone("transformers", "`config._attn_implementation`")
    assert getattr(model.config, "_attn_implementation", None) == "sdpa", message
    called = []

    def own(module, query, key, value, *args, **kwargs):
        called.append(module)
        return query.transpose(1, 2), None

    transformers.AttentionInterface.register("own", own)
    ids = torch.tensor([[3, 4]])
    with private_apis.with_attention(model, "own"):
        assert private_apis.attention_name(model) == "own"
        model(input_ids=ids)
    assert len(called) == model.config.num_hidden_layers, message
    model(input_ids=ids)
    assert len(called) == model.config.num_hidden_layers, message


def test_deepspeed_settings_are_unknown_for_a_while_and_then_known_again():
    pytest.importorskip("deepspeed")
    message = gone("transformers", "`integrations.deepspeed._hf_deepspeed_config_weak_ref`")
    assert hasattr(transformers.integrations.deepspeed, "_hf_deepspeed_config_weak_ref"), message
    settings = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        assert is_deepspeed_zero3_enabled(), message
        with private_apis.without_deepspeed_settings():
            assert not is_deepspeed_zero3_enabled(), message
        assert is_deepspeed_zero3_enabled(), message
    finally:
        transformers.integrations.unset_hf_deepspeed_config()
    del settings


def test_loading_ties_weights_by_the_method_of_the_class(tmp_path):
    tiny_t5(tied=True).save_pretrained(tmp_path)
    tied, before = [], PreTrainedModel.tie_weights

    def around(tie_weights):
        def tie(model, *args, **kwargs):
            tied.append((type(model).__name__, dict(model.all_tied_weights_keys)))
            tie_weights(model, *args, **kwargs)

        return tie

    with private_apis.tying_weights_by(around):
        transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    message = gone("transformers", "`tie_weights` that `from_pretrained` calls, or `all_tied_weights_keys`")
    assert any(name == "T5ForConditionalGeneration" and "lm_head.weight" in keys for name, keys in tied), message
    assert PreTrainedModel.tie_weights is before


def test_a_file_that_is_not_there_is_none_and_no_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    message = gone("transformers", "`_raise_exceptions_...` of `cached_file`")
    assert private_apis.checkpoint_file(str(tmp_path), "config.json", None) == str(tmp_path / "config.json"), message
    assert private_apis.checkpoint_file(str(tmp_path), "model.safetensors", None) is None, message


def test_t5_says_what_stays_in_float32():
    assert private_apis.modules_kept_in_float32(tiny_t5(tied=True)) == {"wo"}, gone(
        "transformers", "`_keep_in_fp32_modules`"
    )
    assert private_apis.modules_kept_in_float32(tiny_llama()) == set()


def test_parked_weights_have_a_device_to_be_brought_to():
    assert private_apis.execution_device(tiny_llama()) is None
    parked = accelerate.cpu_offload(tiny_llama(), execution_device=torch.device("cpu"))
    assert private_apis.execution_device(parked) == torch.device("cpu"), gone("accelerate", "`_hf_hook` on modules")


def test_zero3_names_its_parameters_shapes_and_shards():
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero import partition_parameters

    source, message = Path(partition_parameters.__file__).read_text(), gone("deepspeed", "`ds_id`, `ds_shape`, ...")
    assert all(f"param.{name} = " in source for name in ("ds_id", "ds_shape", "ds_tensor")), message
    plain = torch.nn.Parameter(torch.zeros(2, 3))
    assert not private_apis.is_zero3_parameter(plain)
    assert private_apis.whole_shape(plain) == (2, 3) and private_apis.own_shard(plain) is None


def test_deepspeed_has_the_op_that_is_not_compiled():
    deepspeed = pytest.importorskip("deepspeed")
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__, gone("deepspeed", "`ops.__compatible_ops__`")


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_layers_have_scales(kind):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    if kind == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    else:
        layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")
        assert hasattr(layer, "support_avx512bf16_for_cpu"), gone("bitsandbytes", "`support_avx512bf16_for_cpu`")
        layer.support_avx512bf16_for_cpu = True
        private_apis.compute_in_the_dtype_asked_for(torch.nn.Sequential(layer))
        assert layer.support_avx512bf16_for_cpu is False
    layer.to("cpu")  # where it quantises
    message = gone("bitsandbytes", "`SCB`, `quant_state`")
    scales = list(private_apis.quantisation_scales(layer.weight))
    # A scale per row; or one for each block of 64 of the 64 · 64 weights, with the table of the format's 16 numbers
    # and the scales' mean: scales are quantised too, to 8 bits, with one scale of their own and a table of 256.
    assert [scale.numel() for scale in scales] == ([64] if kind == "int8" else [64, 16, 1, 1, 256]), message
    if kind == "int8":
        layer(torch.randn(2, 64))
        assert [scale.numel() for scale in private_apis.scales_of_layers(layer)] == [64], message


ROOMS = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())
# Where what is private of others is used, each with a test; what is internal to Trainer has a test of its own too.
MODULES = ("private_apis.py", "trainer_internals.py", "argparse_internals.py")
# Documented, or of the standard library, in spite of the underscore.
ALLOWED = {"_asdict", "_exit", "_replace", "_fail_with_undefined_error"}


@cache
def names_of_the_package() -> set[str]:
    names = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):  # a field
                names.add(node.target.id)
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__slots__":
                names |= set(ast.literal_eval(node.value))
            is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if is_set and ast.unparse(node.value) == "self":
                names.add(node.attr)
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_private_of_others_outside_of_these_modules(room):
    known = names_of_the_package() | ALLOWED
    found = []
    for path in (PACKAGE / room).rglob("*.py"):
        if path.name in MODULES:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else ""
            is_operator = isinstance(node, ast.Attribute) and "aten" in ast.unparse(node)  # torch's, by its full name
            if name.startswith("_") and not name.startswith("__") and name not in known and not is_operator:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {ast.unparse(node)}")
    assert found == [], "move these to models/private_apis.py, with a test"
