"""A teacher that Accelerate has spread over devices, or parked, trains a student as one that is whole."""

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlkd_trl import TeacherForcingReward
from tests.conftest import MODELS, word_tokenizer
from tests.trainers.tiny_runs import assert_same_weights, largest_difference, run

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
        # Hooks keep a norm's own forward pass, so scores differ by rounding, of which AdamW would make whole steps.
        settings = {"optim": "sgd", "learning_rate": 0.3}
        results.append(run(method, tmp_path / str(number), family="llama", reward=reward, **settings))
    of_whole, of_offloaded = results
    losses = [[log["loss"] for log in recorder.logs] for recorder in results]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert_same_weights(of_offloaded.weights[-1], of_whole.weights[-1], rtol=1e-4, atol=1e-5)
    assert largest_difference(of_whole.weights[-1], of_whole.weights[0]) > 1e-3
