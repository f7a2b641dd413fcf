"""Encoders with several teachers (MT-BERT), and teachers that are fine-tuned under one head, against loops."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from rlkd_trl.errors import InputError
from rlkd_trl.ops.classification import IGNORED
from tests.models.encoders import make
from tests.trainers.test_encoder import GradientRecorder, build, kl, read, texts
from tests.trainers.tiny_runs import assert_same_weights, largest_difference, snapshot

T = 2.0


def classifier(seed: int, layers: int = 2, **settings):
    return make(layers=layers, head="classes", num_labels=3, seed=seed, **settings)


def rows_with_a_missing_label() -> Dataset:
    rows = list(texts().remove_columns(["text_pair", "next_sentence_label"]))
    return Dataset.from_list([{**row, "label": IGNORED if i == 3 else row["label"]} for i, row in enumerate(rows)])


@pytest.mark.parametrize("weigh", [True, False])
def test_mt_berts_loss_is_that_of_the_loop(weigh, tmp_path):
    """Σ_i T² KL(p_i ‖ p_s) / (1 + CE(y, p_i)) + Σ_i MSE(H_i, W_i H_s) + CE(y, p_s), and its gradient."""
    data = rows_with_a_missing_label()
    trainer = build(
        "logits_kl + hard_ce + hidden_mse",
        tmp_path,
        stage="task",
        data=data,
        student=classifier(1),
        teacher=classifier(2, layers=4),
        layer_map=["single"],
        temperature=[T],
        several={"more_teachers": [classifier(3)], "weigh_teachers": weigh},
    )
    teachers = [classifier(2, layers=4), classifier(3)]
    student = copy.deepcopy(trainer.student).double()
    student.eval()
    names = ["encoder_hidden_mse", "encoder_hidden_mse_2"]
    assert set(student.projections) == set(names), "one for each, though the widths are equal"

    soft, hard, states, tokens, labels = 0.0, 0.0, 0.0, 0, 0
    for row in data:
        s = read(student.model, row["text"])
        for teacher, name in zip(teachers, names, strict=True):
            t = read(teacher.double(), row["text"])
            factor = 1.0
            if weigh and row["label"] != IGNORED:
                factor = 1 / (1 - float(t["logits"][0].log_softmax(-1)[row["label"]]))
            of_row = kl((t["logits"][0] / T).softmax(-1), (s["logits"][0] / T).softmax(-1))
            soft = soft + factor * T**2 * of_row
            projected = student.projections[name](s["states"][-1][0])
            states = states + (projected - t["states"][-1][0]).square().mean(dim=-1).sum()
        tokens += s["ids"].shape[1]
        if row["label"] != IGNORED:
            hard, labels = hard - s["logits"][0].log_softmax(-1)[row["label"]], labels + 1
    expected = {"logits_kl": soft / len(data), "hard_ce": hard / labels, "hidden_mse": states / tokens}
    parameters = dict(student.named_parameters())
    gradients = torch.autograd.grad(sum(expected.values()), list(parameters.values()), allow_unused=True)

    recorder = GradientRecorder()
    trainer.add_callback(recorder)
    trainer.train()
    logged = trainer.state.log_history[0]
    for name, value in expected.items():
        assert logged[f"losses/{name}"] == pytest.approx(float(value.detach()), rel=1e-4), name
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            torch.testing.assert_close(recorder.gradients[name].double(), gradient, rtol=1e-3, atol=1e-5)


def test_the_teachers_line_is_of_their_mean_probability(tmp_path):
    data = texts().remove_columns(["text_pair", "next_sentence_label"])
    teachers = [classifier(2), classifier(3)]
    trainer = build(
        "logits_kl",
        tmp_path,
        stage="task",
        teacher=teachers[0],
        held_out=data,
        several={"more_teachers": teachers[1:]},
    )
    mean = [sum(read(one, row["text"])["logits"][0].softmax(-1) for one in teachers) for row in data]
    right = sum(int(probabilities.argmax()) == row["label"] for probabilities, row in zip(mean, data, strict=True))
    metrics = trainer.evaluate_teacher()
    assert metrics["accuracy"] == pytest.approx(100 * right / len(data))
    assert metrics["parameters"] == 2 * sum(p.numel() for p in teachers[0].parameters())


def joint(output_dir, **settings):
    along = [classifier(6, layers=3)]
    return build(
        "hard_ce", output_dir, stage="task", student=classifier(5), several={"trained_along": along}, **settings
    )


def test_encoders_trained_along_have_one_head_and_the_sum_of_their_losses(tmp_path):
    trainer = joint(tmp_path)
    first, second = (copy.deepcopy(model).double() for model in (trainer.student.model, trainer.student.companions[0]))
    second.classifier, second.bert.pooler = first.classifier, first.bert.pooler
    data = texts()
    loss = sum(
        -read(model, row["text"])["logits"][0].log_softmax(-1)[row["label"]]
        for model in (first, second)
        for row in data
    ) / len(data)
    recorder = GradientRecorder()
    trainer.add_callback(recorder)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    weights = {
        "model.classifier.weight": first.classifier.weight,
        "model.bert.pooler.dense.weight": first.bert.pooler.dense.weight,
        "companions.0.bert.encoder.layer.2.output.dense.weight": second.bert.encoder.layer[2].output.dense.weight,
    }
    gradients = torch.autograd.grad(loss, list(weights.values()))
    for name, gradient in zip(weights, gradients, strict=True):
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(recorder.gradients[name].double(), gradient, rtol=1e-3, atol=1e-6)

    trainer.save_model()
    saved = [AutoModelForSequenceClassification.from_pretrained(tmp_path / place) for place in ("", "encoder2")]
    assert torch.equal(saved[0].classifier.weight, saved[1].classifier.weight)
    assert_same_weights(snapshot(saved[1]), snapshot(trainer.student.companions[0]))
    assert largest_difference(snapshot(saved[1]), snapshot(classifier(6, layers=3))) > 1e-3
    assert (tmp_path / "encoder2" / "tokenizer.json").is_file()


def test_what_is_measured_is_the_encoder_that_is_saved_and_the_mean_of_all_stands_beside_it(tmp_path):
    """On what plain transformers computes; after so small a step the two differ."""
    data = texts().remove_columns(["text_pair", "next_sentence_label"])
    trainer = joint(tmp_path, held_out=data, learning_rate=1e-4)
    trainer.train()
    trainer.save_model()
    places = [tmp_path, tmp_path / "encoder2"]
    saved = [AutoModelForSequenceClassification.from_pretrained(place).eval() for place in places]
    probabilities_KN = [[read(one, row["text"])["logits"][0].softmax(-1) for row in data] for one in saved]
    metrics = trainer.evaluate()
    accuracies = [
        100 * sum(int(p.argmax()) == row["label"] for p, row in zip(of_rows, data, strict=True)) / len(data)
        for of_rows in (probabilities_KN[0], [p + q for p, q in zip(*probabilities_KN, strict=True)])
    ]
    assert accuracies[0] != accuracies[1]
    assert [metrics["eval_accuracy"], metrics["eval_ensemble_accuracy"]] == pytest.approx(accuracies)


def test_encoders_trained_along_are_resumed_exactly(tmp_path):
    settings = {
        "max_steps": 3,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = joint(tmp_path / "whole", **settings)
    whole.train()
    resumed = joint(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_weights(snapshot(resumed.student), snapshot(whole.student), rtol=1e-5, atol=1e-7)


def test_other_heads_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"Encoder 2 cannot have the first one's pooler and head: classifier\.weight"):
        several = {"trained_along": [classifier(6, width=8)]}
        build("hard_ce", tmp_path, stage="task", student=classifier(5), several=several)
    with pytest.raises(InputError, match="trained together on labels alone"):
        several = {"trained_along": [classifier(6)]}
        build("hard_ce + logits_kl", tmp_path, stage="task", student=classifier(5), several=several)
    with pytest.raises(InputError, match="mlm_ce needs no teacher, and there are 2"):
        build(
            "mlm_ce",
            tmp_path,
            mlm_probability=0.15,
            several={"more_teachers": [make(layers=2, head="tokens", seed=9)]},
        )
