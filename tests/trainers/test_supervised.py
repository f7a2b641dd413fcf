"""Supervised training: the cross-entropy of target tokens, whatever pads them and however the batch is cut."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, TrainerCallback

from rlkd_trl.errors import InputError
from rlkd_trl.trainers.supervised import PairCollator, SupervisedTrainer
from rlkd_trl.trainers.supervised_config import SupervisedConfig
from tests.models.reference import FAMILIES, own_logits
from tests.tiny_models import EOS, MODELS, PAD, PADDED_VOCAB, word_tokenizer
from tests.trainers.tiny_runs import assert_same_weights, largest_difference, snapshot

# Prompts of 1 to 6 words and targets of 0 to 5: every row has its own length, and one is answered by EOS alone.
PAIRS = [
    ("w3 w4 w5 w6 w7 w8", "w9"),
    ("w10", "w11 w12 w13 w14 w15"),
    ("w16 w17", ""),
    ("w18 w19 w20", "w21 w22"),
    ("w23 w24 w25 w26", "w3 w5 w7"),
    ("w9 w8 w7", "w6 w5 w4 w3"),
    ("w4 w4", "w20 w20"),
    ("w13 w11", "w26"),
]
DATA = Dataset.from_list([{"prompt": prompt, "target": target} for prompt, target in PAIRS])


def word_ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def slow_loss(model, pairs=PAIRS) -> torch.Tensor:
    """Mean over all target tokens of −log p, each pair alone and unpadded, in float64; differentiable."""
    total, tokens = 0.0, 0
    for prompt, target in pairs:
        ids = [*word_ids(target), EOS]
        logps_TV = own_logits(model, [*word_ids(prompt), EOS], ids).double().log_softmax(-1)
        for t, token in enumerate(ids):
            total, tokens = total - logps_TV[t, token], tokens + 1
    return total / tokens


def build(model, output_dir, data=DATA, peft_config=None, **settings) -> SupervisedTrainer:
    """All eight pairs in one step of plain gradient descent, unless `settings` say otherwise."""
    settings = {
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **settings,
    }
    args = SupervisedConfig(str(output_dir), **settings)
    return SupervisedTrainer(model, args, data, word_tokenizer(), peft_config=peft_config)


class GradientRecorder(TrainerCallback):
    """The gradients that the optimizer was given last."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("batch_size", "accumulation"),
    [pytest.param(8, 1, marks=pytest.mark.slow), (2, 4), pytest.param(1, 8, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    "name", [name if name in MODELS else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_loss_and_gradient_are_those_of_the_slow_loop(name, batch_size, accumulation, tmp_path):
    """The mean is over the target tokens of all accumulated micro-batches, not a mean of their means."""
    model = FAMILIES[name]()
    loss = slow_loss(model)
    mean_of_means = sum(float(slow_loss(model, [pair]).detach()) for pair in PAIRS) / len(PAIRS)
    assert mean_of_means != pytest.approx(float(loss.detach()), rel=5e-4), "one must tell them apart"
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)

    recorder = GradientRecorder()
    trainer = build(model, tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
    trainer.add_callback(recorder)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    norm = float(torch.cat([g.flatten() for g in expected if g is not None]).norm())
    assert norm > 0.1
    assert entry["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for parameter, gradient in zip(parameters, expected, strict=True):
        actual = recorder.gradients[parameter]
        if gradient is None:
            assert actual is None or (actual == 0).all(), parameter
        else:
            torch.testing.assert_close(
                actual, gradient, rtol=1e-3, atol=1e-5 * norm, msg=lambda m, name=parameter: f"{name}: {m}"
            )


@pytest.mark.parametrize("name", ["t5-untied", "llama"])
def test_a_model_that_knows_nothing_has_the_loss_of_a_uniform_guess(name, tmp_path):
    model = MODELS[name]()
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    trainer = build(model, tmp_path)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(PADDED_VOCAB), rel=1e-6)


# ---- what the model is given


def collate(rows, *, is_encoder_decoder, append_eos=True, max_prompt_length=512, max_completion_length=64):
    collator = PairCollator(
        word_tokenizer(append_eos=append_eos),
        start_ids=[PAD] if is_encoder_decoder else None,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
    )
    batch = collator([{"prompt": prompt, "target": target} for prompt, target in rows])
    return {name: tensor.tolist() for name, tensor in batch.items()}


def test_an_encoder_decoder_batch_by_hand():
    assert collate([("w5 w6", "w7"), ("w8", "w9 w10")], is_encoder_decoder=True) == {
        "input_ids": [[5, 6, 1], [8, 1, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "decoder_input_ids": [[0, 7, 0], [0, 9, 10]],  # the start token, then the target without its last
        "labels": [[7, 1, -100], [9, 10, 1]],
    }


def test_a_decoder_only_batch_by_hand():
    """The prompt, whatever the tokenizer ends it with, has no label; EOS is the target's last one."""
    assert collate([("w5 w6", "w7"), ("w8", "w9 w10")], is_encoder_decoder=False, append_eos=False) == {
        "input_ids": [[5, 6, 7, 1], [8, 9, 10, 1]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 1]],
        "labels": [[-100, -100, 7, 1], [-100, 9, 10, 1]],
    }
    assert collate([("w5 w6", "w7"), ("w8", "")], is_encoder_decoder=False) == {
        "input_ids": [[5, 6, 1, 7, 1], [8, 1, 1, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
        "labels": [[-100, -100, -100, 7, 1], [-100, -100, 1, -100, -100]],
    }


@pytest.mark.parametrize("append_eos", [True, False])
def test_targets_end_with_exactly_one_eos(append_eos):
    """Whether or not the tokenizer appends one."""
    batch = collate([("w5", "w7 w8")], is_encoder_decoder=True, append_eos=append_eos)
    assert batch["labels"] == [[7, 8, 1]]


def test_long_texts_are_cut():
    """A prompt keeps the tokenizer's EOS; a target loses its own, like a completion cut at the cap when sampling."""
    rows = [("w3 w4 w5 w6", "w7 w8 w9"), ("w3", "w7 w8")]
    batch = collate(rows, is_encoder_decoder=True, max_prompt_length=3, max_completion_length=3)
    assert batch["input_ids"] == [[3, 4, 1], [3, 1, 0]]
    assert batch["labels"] == [[7, 8, 9], [7, 8, 1]]
    assert batch["decoder_input_ids"] == [[0, 7, 8], [0, 7, 8]]
    batch = collate(rows, is_encoder_decoder=False, max_prompt_length=3, max_completion_length=3)
    assert batch["input_ids"] == [[3, 4, 1, 7, 8, 9], [3, 1, 7, 8, 1, 0]]


@pytest.mark.parametrize("name", ["t5-tied", "llama"])
def test_what_stands_in_the_padding_changes_nothing(name, tmp_path):
    """Another pad token, which is an ordinary word: same loss and same weights after a step."""
    results = []
    for pad_token in ("<pad>", "w26"):
        trainer = build(MODELS[name](), tmp_path)
        trainer.data_collator.tokenizer.pad_token = pad_token
        ids = trainer.data_collator(list(DATA))["input_ids"]
        assert (ids == (PAD if pad_token == "<pad>" else 26)).sum() > 8
        trainer.train()
        results.append((trainer.state.log_history[0]["loss"], snapshot(trainer.model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert_same_weights(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)


# ---- a whole run


@pytest.mark.parametrize("name", [pytest.param("t5-tied", marks=pytest.mark.slow), "t5-untied", "llama"])
def test_a_few_steps_lower_the_loss_and_plain_transformers_loads_the_model(name, tmp_path):
    model = MODELS[name]()
    before = float(slow_loss(model).detach())
    trainer = build(model, tmp_path, max_steps=40, optim="adamw_torch", learning_rate=3e-2, max_grad_norm=1.0)
    trainer.train()
    after = float(slow_loss(trainer.model.eval()).detach())
    # Over three seeds each: from 3.5 .. 4.3 nats a token down to 0.0 .. 0.3.
    assert before > 3.4 and after < 0.6

    trainer.save_model()
    auto_class = AutoModelForSeq2SeqLM if name.startswith("t5") else AutoModelForCausalLM
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert all(not keys for keys in info.values()), f"unexpected loading info: {info}"
    assert float(slow_loss(loaded.eval()).detach()) == pytest.approx(after, rel=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == word_tokenizer().get_vocab()


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    settings = {"max_steps": 6, "per_device_train_batch_size": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
    whole = build(MODELS["t5-tied"](), tmp_path / "whole", save_strategy="steps", save_steps=3, **settings)
    whole.train()
    resumed = build(MODELS["t5-tied"](), tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same_weights(snapshot(resumed.model), snapshot(whole.model), rtol=1e-5, atol=1e-6)
    assert largest_difference(snapshot(whole.model), snapshot(MODELS["t5-tied"]())) > 1e-2


@pytest.mark.parametrize("missing", ["prompt", "target"])
def test_a_missing_column_is_named(missing, tmp_path):
    data = DATA.rename_column(missing, "text")
    with pytest.raises(InputError, match=rf"no column `{missing}`; its columns are: .*text"):
        build(MODELS["t5-tied"](), tmp_path, data=data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "does not evaluate"),
        ({"max_prompt_length": 0}, "max_prompt_length = 0"),
        ({"max_completion_length": -1}, "max_completion_length = -1"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        SupervisedConfig(str(tmp_path), **settings)


def test_targets_as_long_as_the_positions(tmp_path):
    """BART's 32 positions, less the start token's: 30 words and EOS, whatever the tokenizer adds to a text."""

    def rows(words: int) -> Dataset:
        return Dataset.from_list([{"prompt": "w3", "target": " ".join(["w4"] * words)}] * 8)

    build(FAMILIES["bart"](), tmp_path, rows(30)).train()
    with pytest.raises(InputError, match="positions for completions of 31 tokens, and max_completion_length is 32"):
        build(FAMILIES["bart"](), tmp_path, rows(31))


def test_empty_targets_are_counted(tmp_path, caplog):
    rows = [{"prompt": "w3", "target": target} for target in ["w4", "", "w5", " \n", "w6", "", "w7", "w8", "w9"]]
    build(MODELS["t5-tied"](), tmp_path, Dataset.from_list(rows))
    assert "3 of 9 targets are empty, the first in row 2" in caplog.text
    caplog.clear()
    build(MODELS["t5-tied"](), tmp_path, Dataset.from_list([row for row in rows if row["target"].strip()]))
    assert "empty" not in caplog.text


@pytest.mark.parametrize(
    ("targets", "message"),
    [(["", " ", ""], "All 3 targets are empty"), (["w3", None, "w4"], "Row 2 .* the target None is not a text")],
)
def test_targets_from_which_nothing_can_be_learnt(targets, message, tmp_path):
    rows = Dataset.from_list([{"prompt": "w3", "target": target} for target in targets])
    with pytest.raises(InputError, match=message):
        build(MODELS["t5-tied"](), tmp_path, rows)
