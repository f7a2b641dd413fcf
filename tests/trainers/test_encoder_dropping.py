"""Texts whose loss is not finite leave an update of encoders as if they had never been there."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from rlkd_trl.trainers.encoder import EncoderKDTrainer
from rlkd_trl.trainers.encoder_config import EncoderKDConfig
from tests.models.encoders import bert_config, encoder_tokenizer
from tests.trainers.tiny_runs import Recorder

BAD = "w26"
GOOD = [{"text": f"w{5 + i} w7" + " w8" * (i % 3), "label": i % 2} for i in range(6)]
SPOILED = [{"text": f"{BAD} w{5 + i} w6 w6", "label": 1} for i in range(2)]


def classifier(seed: int, *, is_spoiled: bool):
    """A BERT of two layers; a spoiled one gives NaN along texts with `BAD`."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(bert_config(num_labels=2))

    def spoil(module, args, kwargs, output):
        is_bad_B = (kwargs["input_ids"] == encoder_tokenizer().convert_tokens_to_ids(BAD)).any(dim=1)
        return output.masked_fill(is_bad_B[:, None, None], math.nan)

    if is_spoiled:
        model.bert.embeddings.register_forward_hook(spoil, with_kwargs=True)
    return model


def step(output_dir, rows: list[dict], size: int, spoiled: str = "") -> Recorder:
    args = EncoderKDConfig(
        str(output_dir), losses=["2*logits_kl + hard_ce + hidden_mse + value_relation_kl"], max_steps=1,
        max_grad_norm=0.0, max_length=16,
        per_device_train_batch_size=size, gradient_accumulation_steps=len(rows) // size, logging_steps=1,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = EncoderKDTrainer(
        classifier(0, is_spoiled=spoiled == "student"), classifier(1, is_spoiled=spoiled == "teacher"), args,
        Dataset.from_list(rows), processing_class=encoder_tokenizer(),
    )  # fmt: skip
    recorder = Recorder(trainer)
    recorder.on_pre_optimizer_step = lambda *args, **kwargs: recorder.gradients.append(
        {name: None if p.grad is None else p.grad.clone() for name, p in trainer.model.named_parameters()}
    )
    trainer.add_callback(recorder)
    trainer.train()
    return recorder


@pytest.mark.parametrize(("spoiled", "size"), [("student", 8), ("teacher", 2), ("student", 1)])
def test_an_update_without_texts_that_a_model_cannot_read(spoiled, size, tmp_path):
    rows = [SPOILED[0], *GOOD[:3], SPOILED[1], *GOOD[3:]]
    dirty = step(tmp_path / "dirty", rows, size, spoiled)
    clean = step(tmp_path / "clean", GOOD, len(GOOD))
    for name, expected in clean.gradients[0].items():
        if expected is not None:
            torch.testing.assert_close(dirty.gradients[0][name], expected, rtol=1e-4, atol=1e-6, msg=name)
    (log,), (clean_log,) = dirty.logs, clean.logs
    assert log["samples_dropped"] == 2 and "steps_skipped" not in log
    for name in ("loss", "losses/logits_kl", "losses/hard_ce", "losses/hidden_mse"):
        assert log[name] == pytest.approx(clean_log[name], rel=1e-4), name
