"""Encoder distillation: each loss and gradient is that of plain transformers and a loop, however the batch is cut."""

import dataclasses
import math
import random

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    BertForPreTraining,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedModel,
    TrainerCallback,
)

from rlkd_trl import EncoderKDConfig, EncoderKDTrainer
from rlkd_trl.errors import InputError, TrainingError
from rlkd_trl.ops.classification import IGNORED
from rlkd_trl.students.from_teacher import smaller_student
from rlkd_trl.trainers.base_config import BaseConfig
from rlkd_trl.trainers.encoder_data import ROW, TextCollator, masked_tokens
from rlkd_trl.trainers.encoder_losses import count_units
from rlkd_trl.trainers.encoder_objective import INGREDIENTS, parse_losses
from tests.models.encoders import CLS, FIRST_WORD, MASK, PAD, SEP, VOCAB, bert_config, encoder_tokenizer, make
from tests.trainers.tiny_runs import assert_same_weights, largest_difference, snapshot

LAYERS, TEACHERS = 2, 4  # uniform: 1 by 2, 2 by 4
CLOSE = {"rtol": 2e-4, "atol": 2e-6}


def texts(count: int = 8, seed: int = 0) -> Dataset:
    """Texts of 1 to 8 words, each with a class of three, a number, and a following text that may be one."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [f"w{rng.randint(FIRST_WORD, VOCAB - 1)}" for _ in range(rng.randint(1, 8))]
        row = {"text": " ".join(words), "label": rng.randint(0, 2), "next_sentence_label": rng.randint(0, 1)}
        rows.append({**row, "text_pair": "w5 w6"})
    return Dataset.from_list(rows)


def build(
    losses: str,
    output_dir,
    *,
    stage: str = "general",
    student: PreTrainedModel | None = None,
    teacher: PreTrainedModel | None = None,
    data: Dataset | None = None,
    held_out: Dataset | None = None,
    data_collator=None,
    peft_config=None,
    several=None,
    **settings,
) -> EncoderKDTrainer:
    """All eight texts in one step of plain gradient descent, unless `settings` say otherwise.

    several: more arguments of the trainer, for several teachers or students.
    """
    head = "classes" if stage == "task" else "tokens"
    classes = {"num_labels": 3} if stage == "task" else {}
    data = texts() if data is None else data
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
        "max_length": 32,
        "mlm_probability": 0.0,
        **settings,
    }
    return EncoderKDTrainer(
        student or make(layers=LAYERS, head=head, seed=1, **classes),
        teacher or make(layers=TEACHERS, head=head, seed=2, **classes),
        EncoderKDConfig(str(output_dir), stages=[stage], losses=[losses], **settings),
        data.remove_columns([name for name in ("text_pair",) if "nsp_ce" not in losses and name in data.column_names]),
        held_out,
        encoder_tokenizer(),
        data_collator=data_collator,
        peft_config=peft_config,
        **(several or {}),
    )


class GradientRecorder(TrainerCallback):
    """The gradients that the optimizer was given last."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


# ---- losses written anew: every text alone and unpadded, of what plain transformers returns


def read(model: PreTrainedModel, text: str) -> dict[str, Tensor]:
    ids = torch.tensor([[CLS, *(int(word[1:]) for word in text.split()), SEP]])
    model.set_attn_implementation("eager")
    outputs = model(input_ids=ids, output_hidden_states=True, output_attentions=True)
    model.set_attn_implementation("sdpa")
    return {"ids": ids, "logits": outputs.get("logits"), "states": outputs.hidden_states, "maps": outputs.attentions}


def heads(model: PreTrainedModel, states, layer: int, name: str) -> Tensor:
    """Queries, keys or values of a layer, counted from 1, `[H, S, d]`."""
    projection = getattr(model.base_model.encoder.layer[layer - 1].attention.self, name)
    return projection(states[layer - 1])[0].unflatten(-1, (model.config.num_attention_heads, -1)).transpose(0, 1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Over the last dimension, of distributions."""
    return (p * (p.log() - q.log())).sum(dim=-1)


def scores(model, states, layer: int) -> Tensor:
    queries, keys = (heads(model, states, layer, name) for name in ("query", "key"))
    return queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5


def relation(model, states, layer: int, name: str, relation_heads: int) -> Tensor:
    vectors = heads(model, states, layer, name).transpose(0, 1).flatten(1)  # [S, D]
    parts = vectors.unflatten(-1, (relation_heads, -1)).transpose(0, 1)
    return (parts @ parts.transpose(-1, -2) / parts.shape[-1] ** 0.5).softmax(dim=-1)


def slow_loss(
    name: str, student: PreTrainedModel, teacher: PreTrainedModel, rows, *, T: float = 1.0, A: int = 2
) -> Tensor:
    """Mean over all tokens of all texts, over texts, or over labels; summed over the pairs 1-2 and 2-4 of layers."""
    terms = []  # of a text: its tokens' losses, or one of its own
    for row in rows:
        s, t = read(student, row["text"]), {k: v for k, v in read(teacher, row["text"]).items()}
        pairs = [(1, 2), (2, 4)]
        if name == "embedding_mse":
            terms.append((s["states"][0] - t["states"][0])[0].square().mean(dim=-1))
        elif name == "hidden_mse":
            terms.append(sum((s["states"][m] - t["states"][n])[0].square().mean(dim=-1) for m, n in pairs))
        elif name == "cosine":
            terms.append(1 - torch.cosine_similarity(s["states"][-1][0], t["states"][-1][0], dim=-1))
        elif name == "cls_mse":
            first = [(s["states"][m][0, 0], t["states"][n][0, 0]) for m, n in pairs]
            terms.append(sum((a / a.norm() - b / b.norm()).square().sum() for a, b in first)[None])
        elif name == "attention_kl":
            terms.append(sum(kl(t["maps"][n - 1][0], s["maps"][m - 1][0]).mean(dim=0) for m, n in pairs))
        elif name == "attention_mse":
            both = [(scores(student, s["states"], m), scores(teacher, t["states"], n)) for m, n in pairs]
            terms.append(sum((a - b).square().mean(dim=(0, 2)) for a, b in both))
        elif name.endswith("relation_kl"):
            which = name.removesuffix("_relation_kl")
            both = [
                (relation(teacher, t["states"], n, which, A), relation(student, s["states"], m, which, A))
                for m, n in pairs
            ]
            terms.append(sum(kl(p, q).mean(dim=0) for p, q in both))
        elif name == "logits_kl":
            terms.append(T**2 * kl((t["logits"][0] / T).softmax(-1), (s["logits"][0] / T).softmax(-1)))
        elif name == "hard_ce":
            terms.append(-s["logits"][0].log_softmax(-1)[row["label"]][None])
    return torch.cat([term.reshape(-1) for term in terms]).mean()


LOSSES = [name for name in INGREDIENTS if name not in ("mlm_ce", "nsp_ce")]
OF_TASKS = ("logits_kl", "hard_ce")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("batch_size", [8, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loss_and_its_gradient_are_those_of_the_slow_loop(name, batch_size, tmp_path):
    stage = "task" if name in OF_TASKS else "general"
    cut = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 8 // batch_size}
    trainer = build(name, tmp_path, stage=stage, temperature=[2.0], relation_heads=4, **cut)
    student, teacher = trainer.student.model, trainer.teacher
    student.eval()
    expected = slow_loss(name, student, teacher, texts(), T=2.0, A=4)
    parameters = {n: p for n, p in student.named_parameters()}
    gradients = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True)
    recorder = GradientRecorder()
    trainer.add_callback(recorder)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(float(expected.detach()), rel=1e-4)
    assert logged[f"losses/{name}"] == pytest.approx(float(expected.detach()), rel=1e-4)
    norm = float(torch.cat([g.flatten() for g in gradients if g is not None]).norm())
    assert norm > 1e-3
    for parameter, gradient in zip(parameters, gradients, strict=True):
        found = recorder.gradients[f"model.{parameter}"]
        if gradient is None:
            assert found is None or not found.any(), parameter
        else:
            torch.testing.assert_close(
                found, gradient, rtol=1e-3, atol=1e-5 * norm, msg=lambda m, n=parameter: f"{n}: {m}"
            )


def test_the_logits_of_a_general_stage_are_those_of_all_real_tokens(tmp_path):
    trainer = build("logits_kl", tmp_path, temperature=[3.0])
    trainer.student.model.eval()
    expected = slow_loss("logits_kl", trainer.student.model, trainer.teacher, texts(), T=3.0)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected.detach()), rel=1e-4)


def test_weights_and_ingredients_add_up(tmp_path):
    trainer = build("2*hidden_mse + 0.5*attention_kl + cosine", tmp_path)
    trainer.train()
    logged = trainer.state.log_history[0]
    parts = [logged[f"losses/{name}"] for name in ("hidden_mse", "attention_kl", "cosine")]
    assert logged["loss"] == pytest.approx(2 * parts[0] + 0.5 * parts[1] + parts[2], rel=1e-5)
    assert min(parts) > 1e-3


@pytest.mark.parametrize("name", [name for name in INGREDIENTS if INGREDIENTS[name].needs_teacher])
def test_a_student_that_is_its_teacher_learns_nothing(name, tmp_path):
    stage = "task" if name == "logits_kl" else "general"
    head, classes = ("classes", {"num_labels": 3}) if stage == "task" else ("tokens", {})
    one, same = (make(layers=3, head=head, seed=4, **classes) for _ in range(2))
    recorder = GradientRecorder()
    trainer = build(name, tmp_path, stage=stage, student=one, teacher=same, temperature=[2.0])
    trainer.add_callback(recorder)
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"]) < 1e-6
    found = [float(g.abs().max()) for g in recorder.gradients.values() if g is not None]
    assert found and max(found) < 1e-5


ALL_GENERAL = "+".join(name for name in INGREDIENTS if "general" in INGREDIENTS[name].stages and name != "nsp_ce")
ALL_TASK = "+".join(name for name in INGREDIENTS if "task" in INGREDIENTS[name].stages)


@pytest.mark.parametrize(("stage", "losses"), [("general", ALL_GENERAL), ("task", ALL_TASK)])
def test_the_update_is_the_same_however_the_batch_is_cut(stage, losses, tmp_path):
    """With masked tokens too, which are drawn for each row."""
    found = {}
    for size in (8, 4, 1):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 3}
        trainer = build(
            losses, tmp_path, stage=stage, mlm_probability=0.3, optim="adamw_torch", learning_rate=1e-2, **settings
        )
        trainer.train()
        found[size] = snapshot(trainer.student), [entry["loss"] for entry in trainer.state.log_history[:-1]]
    start = snapshot(build(losses, tmp_path, stage=stage, mlm_probability=0.3).student)
    assert largest_difference(found[8][0], start) > 1e-2
    for size in (4, 1):
        assert found[size][1] == pytest.approx(found[8][1], rel=1e-3)
        # Adam turns rounding into steps of its rate where a gradient is nothing else: biases of keys, that softmax
        # takes no notice of.
        weights = {name for name in start if not name.endswith("key.bias")}
        pairs = [{name: run[0][name] for name in weights} for run in (found[size], found[8])]
        assert_same_weights(*pairs, rtol=1e-2, atol=1e-3)


def test_widths_are_bridged_by_projections_that_are_learnt_and_saved_apart(tmp_path):
    student = make(layers=2, head=None, width=8)
    trainer = build("embedding_mse+hidden_mse", tmp_path, student=student, max_steps=2)
    before = snapshot(trainer.student)
    assert {name for name in before if "projections" in name} == {
        "projections.encoder_embedding_mse.weight",
        "projections.encoder_hidden_mse.weight",
    }
    trainer.train()
    after = snapshot(trainer.student)
    assert all(
        largest_difference({name: after[name]}, {name: before[name]}) > 1e-4 for name in after if "projections" in name
    )
    trainer.save_model()
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"model.safetensors", "projections.safetensors"}
    reloaded, info = type(student).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_weights(
        snapshot(reloaded), {n.removeprefix("model."): w for n, w in after.items() if n.startswith("model.")}
    )
    same = build("embedding_mse+hidden_mse", tmp_path, student=make(layers=2, head=None, width=8, seed=9))
    same.student.load_pretrained(tmp_path)
    assert_same_weights(snapshot(same.student), after)
    plain = build("hidden_mse", tmp_path, student=make(layers=2, head=None))
    plain.save_model()
    assert not (tmp_path / "projections.safetensors").exists(), "another student's are removed"
    with pytest.raises(InputError, match=r"has no projections.safetensors: it is not of a student with projections"):
        same.student.load_pretrained(tmp_path)


def test_projections_depend_on_the_seed_alone(tmp_path):
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed + 5)
        trainer = build("hidden_mse", tmp_path, student=make(layers=2, head=None, width=8), seed=seed)
        found.append(snapshot(trainer.student.projections))
    assert_same_weights(found[0], found[1])
    assert largest_difference(found[0], found[2]) > 0.1


# ---- masked tokens


def masked(epoch: int = 0, seed: int = 0, probability: float = 0.4, rows=None) -> tuple[Tensor, Tensor, Tensor]:
    rows = rows or [{"text": text, ROW: i} for i, text in enumerate(texts(20)["text"])]
    batch = TextCollator(encoder_tokenizer(), 32)(rows)
    return batch["input_ids"], *masked_tokens(
        batch, encoder_tokenizer(), probability=probability, seed=seed, epoch=epoch
    )


def test_masked_tokens_are_chosen_as_in_bert():
    text = " ".join(f"w{FIRST_WORD + i % (VOCAB - FIRST_WORD)}" for i in range(25))
    rows = [{"text": text, ROW: i} for i in range(400)]
    ids, inputs, labels = masked(rows=rows, probability=0.15)
    chosen = labels != IGNORED
    assert (labels[chosen] == ids[chosen]).all() and (inputs[~chosen] == ids[~chosen]).all()
    assert not chosen[:, 0].any() and not chosen[:, -1].any(), "[CLS] and [SEP] are never chosen"
    # 10,000 words: three standard errors are 1.1 % of them, and of the 1,500 chosen 3 %
    assert float(chosen[:, 1:-1].float().mean()) == pytest.approx(0.15, abs=0.011)
    assert float((inputs[chosen] == MASK).float().mean()) == pytest.approx(0.8, abs=0.031)
    kept = float((inputs[chosen] == ids[chosen]).float().mean())
    assert kept == pytest.approx(0.1 + 0.1 / VOCAB, abs=0.025)
    assert chosen.any(dim=1).all(), "at least one in every text"


def test_padding_is_never_masked():
    _, inputs, labels = masked()
    is_pad = (inputs == PAD) & (labels == IGNORED)
    assert is_pad.any() and not ((inputs == PAD) & (labels != IGNORED) & (labels == PAD)).any()


def test_masked_tokens_depend_on_seed_epoch_and_row_alone():
    _, inputs, labels = masked()
    again = masked()
    assert torch.equal(again[1], inputs) and torch.equal(again[2], labels)
    for other in (masked(epoch=1), masked(seed=1)):
        assert not torch.equal(other[2], labels)
    rows = [{"text": text, ROW: i} for i, text in enumerate(texts(20)["text"])]
    one = masked(rows=rows[7:8])
    length = one[1].shape[1]
    assert torch.equal(one[1][0], inputs[7][:length]) and torch.equal(one[2][0], labels[7][:length])


def test_teacher_and_student_read_the_masked_text(tmp_path):
    trainer = build("mlm_ce+hidden_mse", tmp_path, mlm_probability=0.5)
    seen = {"student": [], "teacher": []}
    for name, model in (("student", trainer.student.model), ("teacher", trainer.teacher)):
        embeddings = model.get_input_embeddings()
        embeddings.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].clone()))
    trainer.train()
    assert torch.equal(seen["student"][0], seen["teacher"][0]) and (seen["student"][0] == MASK).any()


def test_the_masked_language_modelling_loss(tmp_path):
    """Mean of −log p over the masked tokens of all texts."""
    trainer = build("mlm_ce", tmp_path, mlm_probability=0.4)
    rows = [{"text": text, ROW: i} for i, text in enumerate(texts()["text"])]
    batch = TextCollator(encoder_tokenizer(), 32)(rows)
    inputs, labels = masked_tokens(batch, encoder_tokenizer(), probability=0.4, seed=trainer.args.seed, epoch=0)
    trainer.student.model.eval()
    with torch.no_grad():
        logits = trainer.student.model(inputs, attention_mask=batch["attention_mask"]).logits.double().log_softmax(-1)
    places = (labels != IGNORED).nonzero().tolist()
    expected = -sum(float(logits[b, i, labels[b, i]]) for b, i in places) / len(places)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_next_sentences(tmp_path):
    torch.manual_seed(3)
    student = BertForPreTraining(bert_config(layers=2))
    trainer = build("nsp_ce+mlm_ce", tmp_path, student=student, mlm_probability=0.3)
    trainer.train()
    batch = TextCollator(encoder_tokenizer(), 32)(list(texts()))
    fresh = BertForPreTraining(bert_config(layers=2))
    torch.manual_seed(3)
    fresh = BertForPreTraining(bert_config(layers=2)).eval()
    masked_ids = masked_tokens(
        {**batch, ROW: torch.arange(8)}, encoder_tokenizer(), probability=0.3, seed=trainer.args.seed, epoch=0
    )[0]
    with torch.no_grad():
        logits = fresh(masked_ids, attention_mask=batch["attention_mask"], token_type_ids=batch["token_type_ids"])
    logps = logits.seq_relationship_logits.log_softmax(-1)
    expected = -float(logps[torch.arange(8), batch["next_sentence_label"]].mean())
    assert trainer.state.log_history[0]["losses/nsp_ce"] == pytest.approx(expected, rel=1e-4)


# ---- data


def test_batches_by_hand():
    collate = TextCollator(encoder_tokenizer(), 6)
    rows = [{"text": "w5 w6 w7 w8 w9 w10", "label": 2}, {"text": "w5", "label": 0}]
    batch = {name: tensor.tolist() for name, tensor in collate(rows).items()}
    assert batch == {
        "input_ids": [[CLS, 5, 6, 7, 8, SEP], [CLS, 5, SEP, PAD, PAD, PAD]],
        "token_type_ids": [[0] * 6, [0] * 6],
        "attention_mask": [[1] * 6, [1, 1, 1, 0, 0, 0]],
        "labels": [2, 0],
    }
    pair = collate([{"text": "w5", "text_pair": "w6 w7"}])
    assert pair["input_ids"].tolist() == [[CLS, 5, SEP, 6, 7, SEP]]
    assert pair["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1]]


def test_labels_are_counted_and_numbers_to_predict_whatever_they_are():
    """-100 says only among classes that there is no label; it may be a temperature."""
    batch = {"input_ids": torch.ones(3, 2), "attention_mask": torch.ones(3, 2)}
    for labels, count in (([-100, 2, 1], 2), ([-100.0, 3.5, -100.0], 3)):
        assert count_units({**batch, "labels": torch.tensor(labels)}, ("encoder",))["labels"] == count


def test_an_encoder_decoders_batch_by_hand():
    """The target behind the start token, without its last token; nothing is predicted behind a target's end."""
    rows = [{"text": "w5 w6", "text_pair": "w7"}, {"text": "w8", "text_pair": "w9 w10"}]
    batch = TextCollator(encoder_tokenizer(), 6, start_id=PAD, of_task=False)(rows)
    assert batch["input_ids"].tolist() == [[CLS, 5, 6, SEP], [CLS, 8, SEP, PAD]]
    assert batch["decoder_input_ids"].tolist() == [[PAD, CLS, 7, SEP], [PAD, CLS, 9, 10]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_an_encoder_decoders_batch_of_a_task_by_hand():
    """The decoder reads the text, too."""
    batch = TextCollator(encoder_tokenizer(), 9, start_id=PAD)([{"text": "w5 w6"}, {"text": "w8"}])
    assert batch["input_ids"].tolist() == [[CLS, 5, 6, SEP], [CLS, 8, SEP, PAD]]
    assert batch["decoder_input_ids"].tolist() == [[PAD, CLS, 5, 6], [PAD, CLS, 8, SEP]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def tokenised(data: Dataset, *names: str) -> Dataset:
    tokenizer = encoder_tokenizer()
    rows = [{**tokenizer(row["text"]), **{name: row[name] for name in names}} for row in data]
    return Dataset.from_list(rows)


def test_tokenised_rows_are_read_as_texts_are(tmp_path):
    found = []
    for data in (texts(), tokenised(texts())):
        trainer = build("hidden_mse+mlm_ce", tmp_path, data=data, mlm_probability=0.3)
        trainer.train()
        found.append(snapshot(trainer.student))
    assert_same_weights(*found)


def test_transformers_own_collators(tmp_path):
    tokenizer = encoder_tokenizer()
    masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    trainer = build(
        "mlm_ce+hidden_mse", tmp_path, data=tokenised(texts()), data_collator=masking, mlm_probability=0.15
    )
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["losses/mlm_ce"])
    padding = DataCollatorWithPadding(tokenizer)
    padded = build(
        "logits_kl+hard_ce", tmp_path, stage="task", data=tokenised(texts(), "label"), data_collator=padding
    )
    padded.train()
    own = build("logits_kl+hard_ce", tmp_path, stage="task")
    own.train()
    assert_same_weights(snapshot(padded.student), snapshot(own.student))


# ---- other students, teachers, precisions


@pytest.mark.parametrize(
    "kind",
    [
        "distilbert",
        "modernbert",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("roberta", "electra", "albert", "deberta", "deberta-v2")),
    ],
)
def test_every_architecture_trains(kind, tmp_path):
    """Its loss falls: by two thirds and more in these steps."""
    student, teacher = make(kind, layers=2), make(kind, layers=4, seed=1)
    losses = "hidden_mse+attention_mse+attention_kl+value_relation_kl+query_relation_kl+key_relation_kl+cosine"
    trainer = build(
        losses, tmp_path, student=student, teacher=teacher, max_steps=30, optim="adamw_torch", learning_rate=1e-2
    )
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1] < 0.6 * history[0]


def test_a_student_with_adapters(tmp_path):
    config = LoraConfig(r=2, target_modules=["query", "value"])
    trainer = build("hidden_mse+value_relation_kl", tmp_path, peft_config=config, max_steps=2, learning_rate=1.0)
    before = snapshot(trainer.student)
    trainer.train()
    after = snapshot(trainer.student)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and all("lora_" in name for name in changed)
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "model.safetensors").exists()


def test_a_teacher_with_adapters(tmp_path):
    """Is read with them: as the model with the adapters merged into it."""
    found = []
    for merged in (False, True):
        teacher = make(layers=TEACHERS, head="classes", seed=2, num_labels=3)
        torch.manual_seed(0)
        teacher = get_peft_model(teacher, LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False))
        teacher = teacher.merge_and_unload() if merged else teacher
        trainer = build("hidden_mse+attention_kl+logits_kl", tmp_path, stage="task", teacher=teacher)
        trainer.train()
        found.append(snapshot(trainer.student))
    assert_same_weights(*found, rtol=1e-3, atol=1e-5)
    plain = build("hidden_mse+attention_kl+logits_kl", tmp_path, stage="task")
    plain.train()
    assert largest_difference(snapshot(plain.student), found[0]) > 1e-3


def test_bfloat16(tmp_path):
    """Losses within the rounding of bfloat16, and weights stay in float32."""
    losses = "hidden_mse+attention_mse+attention_kl+value_relation_kl+logits_kl+hard_ce"
    found = []
    for bf16 in (False, True):
        trainer = build(losses, tmp_path, stage="task", bf16=bf16)
        trainer.train()
        found.append(trainer.state.log_history[0])
        assert all(p.dtype == torch.float32 for p in trainer.student.parameters())
    for name in parse_losses(losses):
        key = f"losses/{name}"
        assert found[1][key] == pytest.approx(found[0][key], rel=0.1) and found[1][key] != found[0][key]


def test_models_by_name(tmp_path):
    student, teacher = make(layers=2, head=None), make(layers=4, head="classes", num_labels=3)
    for name, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(tmp_path / name)
        encoder_tokenizer().save_pretrained(tmp_path / name)
    args = EncoderKDConfig(str(tmp_path / "out"), losses="logits_kl", max_steps=1, disable_tqdm=True, max_length=32)
    trainer = EncoderKDTrainer(
        str(tmp_path / "student"), str(tmp_path / "teacher"), args, texts().remove_columns("text_pair")
    )
    assert type(trainer.student.model).__name__ == "BertForSequenceClassification"


# ---- evaluation


def test_metrics_of_a_task(tmp_path):
    """Of what the two models predict, and nothing else."""
    data = texts(20, seed=3).remove_columns("text_pair")
    trainer = build("logits_kl+hard_ce", tmp_path, stage="task", held_out=data, per_device_eval_batch_size=6)
    models = [trainer.student.model.eval(), trainer.teacher]
    with torch.no_grad():
        predicted = [[int(read(model, row["text"])["logits"].argmax()) for row in data] for model in models]
    metrics = trainer.evaluate()
    right = [sum(p == y for p, y in zip(of_model, data["label"], strict=True)) / 20 for of_model in predicted]
    assert metrics["eval_accuracy"] == pytest.approx(100 * right[0])
    assert trainer.evaluate_teacher()["accuracy"] == pytest.approx(100 * right[1])
    assert metrics["eval_agreement"] == pytest.approx(5.0 * sum(a == b for a, b in zip(*predicted, strict=True)))
    for name in ("logits_kl", "hard_ce"):
        expected = slow_loss(name, models[0], models[1], data)
        assert metrics[f"eval_losses/{name}"] == pytest.approx(float(expected.detach()), rel=1e-4)
    assert metrics["eval_parameters"] == sum(p.numel() for p in models[0].parameters())
    shown = trainer.sample_table
    assert shown[0]["text"] == data["text"][0] and shown[0]["student"] == f"LABEL_{predicted[0][0]}"


def test_metrics_of_a_general_stage(tmp_path):
    data = texts(12, seed=3).select_columns("text")
    trainer = build("hidden_mse", tmp_path, held_out=data, per_device_eval_batch_size=5, mlm_probability=0.5)
    models = [trainer.student.model.eval(), trainer.teacher]
    with torch.no_grad():
        states = [[read(model, row["text"])["states"][-1][0] for row in data] for model in models]
    metrics = trainer.evaluate()
    cosines = torch.cat([torch.cosine_similarity(s, t, dim=-1) for s, t in zip(*states, strict=True)])
    assert metrics["eval_hidden_cosine"] == pytest.approx(float(cosines.mean()), rel=1e-4)
    similarities = []
    for of_model in states:
        means = [state.mean(dim=0) for state in of_model]
        similarities.append(
            [float(torch.cosine_similarity(means[i], means[j], dim=0)) for i in range(12) for j in range(i + 1, 12)]
        )
    ranks = [[sorted(values).index(value) for value in values] for values in similarities]
    means = [sum(r) / len(r) for r in ranks]
    products = [
        sum((a - means[i]) * (b - means[j]) for a, b in zip(ranks[i], ranks[j], strict=True))
        for i, j in ((0, 1), (0, 0), (1, 1))
    ]
    assert metrics["eval_similarity_spearman"] == pytest.approx(
        products[0] / math.sqrt(products[1] * products[2]), rel=1e-4
    )


def test_an_evaluation_leaves_training_as_it_is(tmp_path):
    """Dropout goes on, and no random number is drawn."""
    found = []
    for evaluates in (False, True):
        student = make(layers=2, head="classes", seed=1, num_labels=3, hidden_dropout_prob=0.3)
        settings = {"eval_strategy": "steps", "eval_steps": 1} if evaluates else {}
        trainer = build(
            "logits_kl+hard_ce",
            tmp_path,
            stage="task",
            student=student,
            max_steps=3,
            held_out=texts(4).remove_columns("text_pair"),
            **settings,
        )
        trainer.train()
        found.append(snapshot(trainer.student))
        assert trainer.student.training
    assert_same_weights(*found)


def test_the_best_checkpoint_is_kept(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    data = texts(30, seed=5).remove_columns("text_pair")
    trainer = build(
        "hard_ce",
        tmp_path,
        stage="task",
        held_out=data,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        learning_rate=1.0,
        **settings,
    )
    trainer.train()
    accuracies = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(set(accuracies)) > 1
    assert trainer.evaluate()["eval_accuracy"] == max(accuracies)


# ---- settings

# Setting of this trainer alone: losses that it is a setting of, one value and another.
CHANGES_WHAT_IS_LEARNT = {
    "losses": ("hidden_mse", ["hidden_mse"], ["2*hidden_mse"]),
    "layer_map": ("hidden_mse", ["uniform"], ["top"]),
    "temperature": ("logits_kl", [1.0], [3.0]),
    "relation_heads": ("key_relation_kl", 2, 4),
    "mlm_probability": ("mlm_ce+hidden_mse", 0.2, 0.5),
    "max_length": ("hidden_mse", 32, 4),
}


@pytest.mark.parametrize("name", CHANGES_WHAT_IS_LEARNT)
def test_a_setting_changes_what_is_learnt(name, tmp_path):
    losses, *values = CHANGES_WHAT_IS_LEARNT[name]
    found = []
    for value in values:
        text, settings = (value[0], {}) if name == "losses" else (losses, {name: value})
        trainer = build(text, tmp_path, **settings)
        trainer.train()
        found.append(snapshot(trainer.student))
    assert largest_difference(*found) > 1e-5


def test_every_setting_is_tested():
    """Those of stages are what `of_stage` hands on, below."""
    inherited = {option.name for option in dataclasses.fields(BaseConfig)}
    own = {option.name for option in dataclasses.fields(EncoderKDConfig)} - inherited
    assert own == {*CHANGES_WHAT_IS_LEARNT, "stages", "stage_max_steps", "stage_epochs", "stage_learning_rates"}


# ---- what goes wrong


def test_a_text_that_spoils_a_loss_is_dropped(tmp_path, caplog):
    """The others are learnt from as if it had not been there, in value and in count."""
    data, bad = texts(), 3

    def poisoned(teacher: PreTrainedModel) -> PreTrainedModel:
        """NaN where the text has the word w29 as its first."""
        embeddings = teacher.get_input_embeddings()
        embeddings.register_forward_hook(
            lambda _, args, output: torch.where((args[0][:, 1] == 29)[:, None, None], math.nan, output)
        )
        return teacher

    rows = [dict(row) for row in data]
    rows = [{**row, "text": row["text"].replace("w29", "w28")} for row in rows]
    rows[bad]["text"] = "w29 w5 w6"
    found = []
    for listed in (rows, [row for i, row in enumerate(rows) if i != bad]):
        teacher = poisoned(make(layers=TEACHERS, head="classes", seed=2, num_labels=3))
        trainer = build(
            "hidden_mse+logits_kl+hard_ce", tmp_path, stage="task", teacher=teacher, data=Dataset.from_list(listed)
        )
        trainer.train()
        found.append((snapshot(trainer.student), trainer.state.log_history[0]))
    assert found[0][1]["samples_dropped"] == 1 and "samples_dropped" not in found[1][1]
    assert found[0][1]["loss"] == pytest.approx(found[1][1]["loss"], rel=1e-5)
    assert_same_weights(found[0][0], found[1][0], rtol=1e-4, atol=1e-6)
    assert largest_difference(found[0][0], snapshot(build("hard_ce", tmp_path, stage="task").student)) > 1e-3


def test_a_step_that_is_not_finite_is_skipped(tmp_path):
    """All texts are bad."""
    teacher = make(layers=TEACHERS, head="classes", seed=2, num_labels=3)
    teacher.get_input_embeddings().register_forward_hook(lambda _, args, output: output * math.nan)
    trainer = build("hidden_mse+hard_ce", tmp_path, stage="task", teacher=teacher, max_skipped_steps=2)
    before = snapshot(trainer.student)
    with pytest.raises(TrainingError, match="all 1 steps were skipped"):
        trainer.train()
    assert_same_weights(snapshot(trainer.student), before)


@pytest.mark.parametrize(
    ("losses", "stage", "change", "message"),
    [
        ("hard_ce", "task", lambda data: data.remove_columns("label"), "the training data has no column `label`"),
        (
            "hidden_mse",
            "general",
            lambda data: data.rename_column("text", "words"),
            "no column `text`; its columns are: wo",
        ),
        (
            "nsp_ce",
            "general",
            lambda data: data.remove_columns("next_sentence_label"),
            "no column `next_sentence_label`",
        ),
        (
            "hard_ce",
            "task",
            lambda data: data.remove_columns("label").add_column("label", ["x"] * 8),
            "the label 'x' is not",
        ),
    ],
)
def test_data_that_lack_something(losses, stage, change, message, tmp_path):
    with pytest.raises(InputError, match=message):
        build(losses, tmp_path, stage=stage, data=change(texts()))


def test_two_stages_are_two_trainers(tmp_path):
    args = EncoderKDConfig(str(tmp_path), stages=["general", "task"], losses=["hidden_mse", "logits_kl"])
    with pytest.raises(InputError, match=r"args has 2 stages, and a trainer is for one: give args.of_stage\(0\)"):
        EncoderKDTrainer(make(), make(layers=4), args, texts(), processing_class=encoder_tokenizer())
    assert args.of_stage(0).losses == ["hidden_mse"] and args.of_stage(0).output_dir == str(
        tmp_path / "stage1-general"
    )
    assert args.of_stage(1).losses == ["logits_kl"] and args.of_stage(1).output_dir == str(tmp_path)


def test_what_a_stage_has_of_its_own(tmp_path):
    args = EncoderKDConfig(
        str(tmp_path),
        stages=["general", "task"],
        losses=["hidden_mse", "logits_kl"],
        layer_map=["top", "uniform"],
        temperature=[3.0],
        stage_max_steps=[5, 7],
        stage_learning_rates=[1e-3],
        stage_epochs=[1.0, 2.0],
    )
    first, second = args.of_stage(0), args.of_stage(1)
    assert (first.max_steps, first.learning_rate, first.num_train_epochs) == (5, 1e-3, 1.0)
    assert (second.max_steps, second.learning_rate, second.num_train_epochs) == (7, 1e-3, 2.0)
    assert (first.objective(0).layer_map, second.objective(0).temperature) == ("top", 3.0)


def test_smaller_students():
    teacher = make(layers=4, head="classes", num_labels=3)
    student = smaller_student(teacher, {"num_layers": 2}, init="top")
    assert student.config.num_hidden_layers == 2 and student.config.num_labels == 3
    for m, n in ((0, 2), (1, 3)):
        of_student, of_teacher = (snapshot(model.bert.encoder.layer[i]) for model, i in ((student, m), (teacher, n)))
        assert_same_weights(of_student, of_teacher)
    assert_same_weights(snapshot(student.classifier), snapshot(teacher.classifier))
    modern = smaller_student(make("modernbert", layers=4), {"num_layers": 3}, init="bottom")
    assert modern.config.layer_types == make("modernbert", layers=4).config.layer_types[:3]
    t5 = smaller_student(make("t5", layers=4), {"num_layers": 2}, init="bottom")
    assert (t5.config.num_layers, t5.config.num_decoder_layers) == (2, 2)
    with pytest.raises(InputError, match=r"init = uniform: layers of the teacher fit a student of its sizes only"):
        smaller_student(teacher, {"hidden_size": 8}, init="uniform")


def test_a_smaller_student_of_a_teacher_with_adapters_has_their_changes():
    torch.manual_seed(0)
    settings = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    teacher = get_peft_model(make(layers=4, seed=2), settings)
    student = smaller_student(teacher, {"num_layers": 2}, init="top")
    merged = teacher.merge_and_unload()
    for m, n in ((0, 2), (1, 3)):
        assert_same_weights(*(snapshot(model.encoder.layer[i]) for model, i in ((student, m), (merged, n))))
    assert largest_difference(snapshot(merged), snapshot(make(layers=4, seed=2))) > 0.1
