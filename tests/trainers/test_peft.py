"""A LoRA student: only the adapters are trained, saved, and resumed."""

import peft
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from rlkd_trl.errors import InputError
from tests.students.plain_forward import plain_forward
from tests.tiny_models import MODELS
from tests.trainers.test_supervised import build as supervised
from tests.trainers.tiny_runs import (
    FULL_VOCABULARY_METHODS,
    METHODS,
    assert_same_weights,
    build,
    largest_difference,
    snapshot,
)

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
        pytest.param("rloo-token", "llama", marks=pytest.mark.slow(0.4)),
        pytest.param("reinforce", "llama", marks=pytest.mark.slow(0.4)),
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


# `peft_config`, as in TRL


def lora_config(family: str, **others) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=TARGETS[family], **others)


@pytest.mark.parametrize("task_type", [None, pytest.param("SEQ_2_SEQ_LM", marks=pytest.mark.slow(0.2))])
@pytest.mark.parametrize("method", [*METHODS, *FULL_VOCABULARY_METHODS])
def test_a_config_is_a_student_with_new_adapters(method, task_type, tmp_path):
    """Which begins as the student, trains adapters (and a critic) only, and saves them."""
    trainer = build(method, tmp_path, peft_config=lora_config("t5-tied", task_type=task_type))
    before = snapshot(trainer.model)
    trainer.train()
    trainer.save_model()
    after = snapshot(trainer.model)
    moved = {name for name in before if largest_difference({name: after[name]}, {name: before[name]}) > 1e-4}
    assert any("lora_" in name for name in moved)
    assert all("lora_" in name or name.startswith("value_head") for name in moved)
    files = {path.name for path in tmp_path.iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    assert ("value_head.safetensors" in files) == (method == "ppo") == any("value_head" in name for name in moved)


def test_supervised_training_takes_a_config(tmp_path):
    trainer = supervised(MODELS["t5-tied"](), tmp_path, peft_config=lora_config("t5-tied"))
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("method", ["ppo", pytest.param("rloo-token", marks=pytest.mark.slow(0.5))])
def test_the_reference_is_the_student_without_its_adapters(method, tmp_path):
    """The run is that of a student that was wrapped before, whose reference is a copy; the KL is not 0."""
    settings = {"beta": 0.1, "max_steps": 4, "seed": 3}
    base = MODELS["t5-tied"]()
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(base, lora_config("t5-tied"))
    copied = build(method, tmp_path / "copied", model=wrapped, **settings)
    shared = build(method, tmp_path / "shared", peft_config=lora_config("t5-tied"), **settings)
    assert shared.reference is shared.model and copied.reference is not copied.model
    assert_same_weights(snapshot(shared.model), snapshot(copied.model))
    for trainer in (copied, shared):
        trainer.train()
    kls = [[entry["kl"] for entry in t.state.log_history if "kl" in entry] for t in (copied, shared)]
    assert kls[0] == pytest.approx(kls[1], rel=1e-4, abs=1e-6) and abs(kls[1][-1]) > 1e-3
    assert_same_weights(snapshot(shared.model), snapshot(copied.model), rtol=1e-4, atol=1e-5)


def test_adapters_that_change_the_student_from_the_start_have_a_copy_as_reference(tmp_path):
    trainer = build("rloo-token", tmp_path, beta=0.1, peft_config=lora_config("t5-tied", init_lora_weights=False))
    assert trainer.reference is not trainer.model


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (MODELS["t5-tied"], {"r": 4}, "peft_config is of the type dict: give a configuration of PEFT"),
        (lambda: lora_student("t5-tied"), lora_config("t5-tied"), "The student has adapters already"),
        (MODELS["t5-tied"], peft.LoraConfig(target_modules=["nowhere"]), "peft_config does not fit .*nowhere"),
        (
            MODELS["t5-tied"],
            peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2),
            "PROMPT_TUNING is not supported",
        ),
    ],
)
def test_configs_that_do_not_go(model, config, message, tmp_path):
    with pytest.raises(InputError, match=message):
        build("rloo-token", tmp_path, model=model(), peft_config=config)
    with pytest.raises(InputError, match=message):
        supervised(model(), tmp_path, peft_config=config)
