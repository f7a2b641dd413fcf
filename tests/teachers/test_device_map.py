"""A teacher that Accelerate has spread over devices, or parked, trains a student as one that is whole."""

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlkd_trl import TeacherForcingReward
from tests.conftest import MODELS, word_tokenizer
from tests.trainers.tiny_runs import run

MAPS = {
    "cpu": {"": "cpu"},
    "a layer on disk": {
        **dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu"),
        "model.layers.1": "disk",
    },
}


@pytest.mark.parametrize("method", ["ppo", "kd"])
@pytest.mark.parametrize("where", [*MAPS, "parked"])
def test_an_offloaded_teacher_trains_as_a_whole_one(where, method, tmp_path):
    whole = MODELS["llama"](seed=5)
    whole.save_pretrained(tmp_path / "teacher")
    if where == "parked":
        offloaded = accelerate.cpu_offload(MODELS["llama"](seed=5), execution_device=torch.device("cpu"))
        assert offloaded.device.type == "meta"
    else:
        offloaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "teacher", device_map=MAPS[where], offload_folder=tmp_path / "offload", dtype=torch.float32
        )
    results = []
    for number, model in enumerate([whole, offloaded]):
        reward = TeacherForcingReward(model, word_tokenizer())
        recorder = run(method, tmp_path / str(number), family="llama", reward=reward)
        results.append([entry["loss"] for entry in recorder.logs])
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-4)
    # Hooks keep a norm's own forward pass: Adam's first step makes a whole one of a gradient that is rounding.
    assert results[1][1] == pytest.approx(results[0][1], rel=2e-2) and len(results[0]) == 2
