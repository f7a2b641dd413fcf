"""A LoRA student: only the adapters are trained, saved, and resumed."""

import peft
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from tests.conftest import MODELS
from tests.students.plain_forward import plain_forward
from tests.trainers.tiny_runs import assert_same_weights, build, snapshot

TARGETS = {"t5-tied": ["q", "v"], "llama": ["q_proj", "v_proj"], "glm": ["q_proj", "lm_head"]}


def lora_student(family: str) -> peft.PeftModel:
    base = MODELS[family]()
    base.name_or_path = ""
    torch.manual_seed(0)
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=TARGETS[family]))


def adapters(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights.items() if "lora_" in name}


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("ppo", "t5-tied"),
        ("rloo-token", "llama"),
        ("reinforce", "llama"),
        ("kd", "glm"),
        pytest.param("all-actions", "t5-tied", marks=pytest.mark.slow),
        pytest.param("all-actions", "glm", marks=pytest.mark.slow),
    ],
)
def test_only_the_adapters_learn_and_a_resumed_run_ends_where_a_whole_one_does(method, family, tmp_path):
    settings = {"family": family, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    if method == "reinforce":  # with a lagging copy of the adapters
        settings["behaviour_sync_steps"] = 3
    whole = build(method, tmp_path / "whole", model=lora_student(family), **settings)
    before = snapshot(whole.model.model)
    whole.train()
    after = snapshot(whole.model.model)
    frozen = before.keys() - adapters(before).keys()
    assert_same_weights({name: after[name] for name in frozen}, {name: before[name] for name in frozen})
    for part in {name.split(".lora_")[0].split(".")[-1] for name in adapters(before)}:
        moved = [(after[n] - before[n]).abs().max() for n in adapters(before) if f".{part}.lora_" in n]
        assert max(moved) > 1e-3, f"the adapters of {part} do not learn"

    resumed = build(method, tmp_path / "resumed", model=lora_student(family), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_weights(snapshot(resumed.model), snapshot(whole.model), rtol=1e-4, atol=1e-5)


def test_the_saved_adapters_on_the_base_model_are_the_trained_student(tmp_path):
    trainer = build("ppo", tmp_path, model=lora_student("t5-tied"))
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    assert not list((tmp_path / "student").glob("model*.safetensors")), "the base model is not saved again"
    MODELS["t5-tied"]().save_pretrained(tmp_path / "base")
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "student").eval()
    prompt, completion = [5, 9, 13, 1], [4, 8, 1]
    theirs = plain_forward(loaded.get_base_model(), prompt, completion)[0]
    ours = plain_forward(trainer.model.model.get_base_model(), prompt, completion)[0]
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)  # rounding: ours has fused norms
