"""A teacher that Accelerate has spread over devices, or parked, trains a student as one that is whole."""

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlkd_trl import TeacherForcingReward
from rlkd_trl.errors import InputError
from rlkd_trl.teachers import Teacher
from tests.models.reference import tiny_gpt2
from tests.tiny_models import EOS, MODELS, word_tokenizer
from tests.trainers.tiny_runs import Recorder, assert_same_weights, largest_difference, run

MAPS = {
    "cpu": {"": "cpu"},
    "a layer on disk": {
        **dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu"),
        "model.layers.1": "disk",
    },
}


def trained_by(teacher: PreTrainedModel, method: str, output_dir) -> Recorder:
    # Hooks keep a norm's own forward pass, so scores differ by rounding, of which AdamW would make whole steps.
    settings = {"optim": "sgd", "learning_rate": 0.3}
    return run(method, output_dir, family="llama", reward=TeacherForcingReward(teacher, word_tokenizer()), **settings)


@pytest.fixture(scope="module", params=["ppo", "kd"])
def by_whole(request, tmp_path_factory) -> tuple[str, Recorder]:
    """A method, and what it makes with the whole teacher."""
    return request.param, trained_by(MODELS["llama"](seed=5), request.param, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("where", [*MAPS, "parked"])
def test_an_offloaded_teacher_trains_as_a_whole_one(where, by_whole, tmp_path):
    method, of_whole = by_whole
    if where == "parked":
        offloaded = accelerate.cpu_offload(MODELS["llama"](seed=5), execution_device=torch.device("cpu"))
        assert offloaded.device.type == "meta"
    else:
        MODELS["llama"](seed=5).save_pretrained(tmp_path / "teacher")
        offloaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "teacher", device_map=MAPS[where], offload_folder=tmp_path / "offload", dtype=torch.float32
        )
    of_offloaded = trained_by(offloaded, method, tmp_path / "run")
    losses = [[log["loss"] for log in recorder.logs] for recorder in (of_whole, of_offloaded)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert_same_weights(of_offloaded.weights[-1], of_whole.weights[-1], rtol=1e-4, atol=1e-5)
    assert largest_difference(of_whole.weights[-1], of_whole.weights[0]) > 1e-3


FAMILIES = {**MODELS, "gpt2": tiny_gpt2}
TIED = {  # maps that hold a tied weight in two places
    "t5-tied": {"shared": "cpu", "encoder": "cpu", "decoder": "disk", "lm_head": "cpu"},
    "t5-untied": {"shared": "cpu", "encoder": "disk", "decoder": "cpu", "lm_head": "cpu"},
    "gpt2": {"transformer": "cpu", "lm_head": "disk"},
}


def loaded(family: str, directory, device_map, **kwargs) -> PreTrainedModel:
    model = FAMILIES[family](seed=5)
    model.save_pretrained(directory / "model")
    return type(model).from_pretrained(
        directory / "model", device_map=device_map, offload_folder=directory / "offload", dtype=torch.float32, **kwargs
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_what_accelerate_chooses_to_offload_scores_as_what_is_whole(family, share, tmp_path):
    whole = FAMILIES[family](seed=5)
    size = sum(parameter.nbytes for parameter in whole.parameters())
    model = loaded(family, tmp_path, "auto", max_memory={"cpu": int(share * size)})
    assert "disk" in model.hf_device_map.values()
    completions = ["w3 w4", "w5"], [[6, 7, EOS], [8, 9]]
    found, expected = (
        TeacherForcingReward(each, word_tokenizer()).score_tokens(*completions) for each in (model, whole)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", TIED)
def test_tied_weights_in_two_places_are_refused_by_name(family, tmp_path):
    """Accelerate looks for the weight's second name, and fails with a KeyError in the model's own forward pass."""
    model = loaded(family, tmp_path, TIED[family])
    message = r"forward pass of .* fails: KeyError.* in different places \((?=.*on cpu).*on disk.*\).*: give their"
    with pytest.raises(InputError, match=message):
        Teacher(model, word_tokenizer())
