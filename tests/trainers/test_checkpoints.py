import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from tests.students.plain_forward import plain_forward
from tests.tiny_models import MODELS
from tests.trainers.tiny_runs import assert_same_weights, build, largest_difference, prompts, run, snapshot


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("ppo", "t5-tied"),
        ("rloo-token", "t5-untied"),
        ("rloo-sequence", "llama"),
        pytest.param("ppo", "llama", marks=pytest.mark.slow),
    ],
)
def test_plain_transformers_loads_a_trained_student(method, family, tmp_path):
    trainer = build(method, tmp_path, family=family)
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    auto_class = AutoModelForSeq2SeqLM if family.startswith("t5") else AutoModelForCausalLM
    loaded, info = auto_class.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert all(not keys for keys in info.values()), f"unexpected loading info: {info}"
    prompt, completion = [5, 9, 13, 1], [4, 8, 1]
    theirs = plain_forward(loaded.eval(), prompt, completion)[0]
    torch.testing.assert_close(loaded.state_dict(), trainer.model.model.state_dict(), rtol=0, atol=0)
    ours = plain_forward(trainer.model.model, prompt, completion)[0]
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)  # our GELU is fused, and rounds in its own way
    initial = plain_forward(MODELS[family](), prompt, completion)[0]
    assert (theirs - initial).abs().max() > 1e-3, "what is saved must be the trained student"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert tokenizer.get_vocab() == trainer.processing_class.get_vocab()
    assert (tmp_path / "student" / "generation_config.json").is_file()


def test_the_saved_tokenizer_cuts_nothing(tmp_path):
    """A call with `truncation` leaves it in a fast tokenizer, and `save_pretrained` writes what it finds there."""
    trainer = build("rloo-token", tmp_path)
    trainer.processing_class(["w3 w4 w5 w6", "w3"], truncation=True, max_length=3, padding="max_length")
    trainer.save_model(str(tmp_path / "student"))
    plain = Tokenizer.from_file(str(tmp_path / "student" / "tokenizer.json"))
    assert plain.encode("w3 w4 w5 w6").ids == [3, 4, 5, 6, 1]
    assert plain.encode("w3").ids == [3, 1]


RESUMED = {
    "ppo": ("ppo", "t5-tied", {}),
    "separate critic": ("ppo", "llama", {"critic": "separate"}),
    "adaptive KL": ("rloo-token", "t5-tied", {"beta": 0.2, "kl_target": 1.0, "kl_horizon": 50.0}),
    "accumulated": ("rloo-sequence", "llama", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
    "at the end of an epoch": ("rloo-token", "t5-tied", {"data": prompts(8)}),
    "within the second epoch": ("rloo-token", "t5-tied", {"data": prompts(12), "save_steps": 4}),
}
QUICK = ("within the second epoch",)


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in RESUMED]
)
def test_resumed_run_ends_where_an_uninterrupted_one_does(case, tmp_path):
    method, family, settings = RESUMED[case]
    settings = {
        "family": family,
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "linear",
        **settings,
    }
    whole = build(method, tmp_path / "whole", **settings)
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{settings['save_steps']}"
    resumed = build(method, tmp_path / "resumed", **{**settings, "save_strategy": "no"})
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.log_history[0] == whole.state.log_history[0], "what was logged before comes back"
    assert resumed.state.global_step == 5
    entries = [
        [e for e in trainer.state.log_history if e.get("step") == 5 and "loss" in e] for trainer in (whole, resumed)
    ]
    for name in ("loss", "reward", "grad_norm", *(["kl", "beta"] if "beta" in settings else [])):
        assert entries[1][0][name] == pytest.approx(entries[0][0][name], rel=1e-4, abs=1e-5), name
    assert_same_weights(snapshot(resumed.model), snapshot(whole.model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["ppo", "rloo-sequence"])
def test_best_model_is_loaded_at_the_end(method, tmp_path):
    """The one of the shortest greedy outputs, and of several the first: here never the last of the four."""
    recorder = run(
        method,
        tmp_path,
        max_steps=4,
        learning_rate=0.1,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        eval_data=prompts(4, seed=3),
        seed=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_tokens",
        greater_is_better=False,
    )
    trainer = recorder.trainer
    lengths = [entry["eval_tokens"] for entry in trainer.state.log_history if "eval_tokens" in entry]
    best = lengths.index(min(lengths)) + 1
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert len(lengths) == len(recorder.weights) == 4 and best < 4
    assert_same_weights(snapshot(trainer.model), recorder.weights[best - 1])
    assert largest_difference(recorder.weights[3], recorder.weights[best - 1]) > 1e-2
    saved = AutoModelForSeq2SeqLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert_same_weights(snapshot(trainer.model.model), snapshot(saved))


@pytest.mark.slow
def test_two_runs_with_one_seed_are_the_same_and_other_seeds_are_not(tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trainer = build("ppo", tmp_path / name, seed=seed)
        trainer.train()
        weights.append(snapshot(trainer.model))
    assert_same_weights(weights[0], weights[1])
    assert largest_difference(weights[0], weights[2]) > 1e-3


@pytest.mark.parametrize("later", ["rloo-token", "kd"])
def test_a_critic_of_an_earlier_run_does_not_stay(later, tmp_path):
    build("ppo", tmp_path).save_model()
    assert (tmp_path / "value_head.safetensors").is_file()
    (tmp_path / "adapter_config.json").write_text("{}")  # transformers would look for adapters
    build(later, tmp_path).save_model()
    assert not {"value_head.safetensors", "adapter_config.json"} & {path.name for path in tmp_path.iterdir()}
    AutoModelForSeq2SeqLM.from_pretrained(tmp_path)


def test_a_push_from_python_brings_a_card_unless_there_is_one(tmp_path):
    trainer, card = build("kd", tmp_path), tmp_path / "README.md"
    trainer.create_model_card(model_name="tiny")
    assert "tiny" in card.read_text()
    card.write_text("of a recipe")
    trainer.create_model_card(model_name="tiny")
    assert card.read_text() == "of a recipe"
