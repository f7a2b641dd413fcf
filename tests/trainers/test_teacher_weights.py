"""Distillation on divergences from teachers that are weighed per example, against loops in float64."""

import copy
import json

import pytest
import torch
from datasets import Dataset

from rlkd_trl import TeacherForcingReward
from rlkd_trl.errors import InputError
from rlkd_trl.teachers import Teacher, TeacherPanel
from rlkd_trl.teachers.routing import Routing
from rlkd_trl.trainers.run_record import RUN_RECORD, check_same_run
from tests.students.plain_forward import plain_forward
from tests.tiny_models import EOS, MODELS, word_tokenizer
from tests.trainers.plain_distillation import Asked, assert_gradients, kd_loss
from tests.trainers.plain_update import Sample, samples_of
from tests.trainers.tiny_runs import Recorder, assert_same_weights, build, pairs, run, snapshot

SEEDS = (5, 6, 7)
ROUTING = Routing("expert", None, [f"teacher{seed}" for seed in SEEDS])


def data_of(*, references: bool) -> Dataset:
    rows = [
        {**row, "references": row["references"][:1] if references else [], "expert": f"teacher{SEEDS[i % 3]}"}
        for i, row in enumerate(pairs(32))
    ]
    return Dataset.from_list(rows)


def reward_of(**settings) -> TeacherForcingReward:
    teachers = [Teacher(MODELS["t5-tied"](seed=seed), word_tokenizer()) for seed in SEEDS]
    return TeacherForcingReward(TeacherPanel(teachers, **settings))


def log_probs(model, prompt: list[int], ids: list[int]) -> list[float]:
    logits = plain_forward(model, prompt, ids)[0][:-1].double()
    return [float(torch.log_softmax(z_V, dim=-1)[token]) for z_V, token in zip(logits, ids, strict=True)]


@torch.no_grad()
def losses_of(models, sample: Sample, row: dict, *, from_data: bool) -> list[float]:
    if from_data or row["references"]:
        ids = sample.completion
        if not from_data:
            ids = [*word_tokenizer()(row["references"][0], add_special_tokens=False)["input_ids"], EOS][:6]
        return [-sum(log_probs(model, sample.prompt, ids)) / len(ids) for model in models]
    each = [log_probs(model, sample.prompt, sample.completion) for model in models]
    middle = [sorted(of_token)[1] for of_token in zip(*each, strict=True)]
    return [sum(abs(a - b) for a, b in zip(row, middle, strict=True)) / len(middle) for row in each]


CASES = {
    "references, the sequences": ({"sequences": "data", "lmbda": 0.0}, True),
    "references beside samples": ({}, True),
    "the teachers' agreement": ({"ensemble": "logits"}, False),
    "routing": ({}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_loops_with_weights_per_example(case, tmp_path):
    settings, references = CASES[case]
    panel = {"routing": ROUTING} if case == "routing" else {"weighting": "per_example", "max_reference_length": 6}
    data = data_of(references=references)
    trainer = build(
        "kd",
        tmp_path,
        reward=reward_of(**panel),
        data=data,
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        optim="sgd",
        **settings,
    )
    student, recorder = copy.deepcopy(trainer.model.model), Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()

    models, total, tokens = [MODELS["t5-tied"](seed=seed) for seed in SEEDS], 0.0, 0
    row_of = {tuple(word_tokenizer()(row["prompt"])["input_ids"]): row for row in data}
    from_data, all_shares = settings.get("sequences") == "data", []
    for sample in samples_of(recorder.rollouts[0]):
        row = row_of[tuple(sample.prompt)]
        losses = losses_of(models, sample, row, from_data=from_data)
        factors = [1 / (1 + loss) for loss in losses]
        if case == "routing":
            factors = [float(name == row["expert"]) for name in ROUTING.teachers]
        shares = [factor / sum(factors) for factor in factors]
        asked = [Asked(model, share=share) for model, share in zip(models, shares, strict=True) if share > 0]
        one = kd_loss(trainer.args, [sample], asked, student, from_data=from_data)
        learnt = len(sample.completion) - (sample.completion.count(2) if from_data else 0)
        total, tokens = total + one * learnt, tokens + learnt
        all_shares.append(shares)
    assert max(max(of_one) - min(of_one) for of_one in all_shares) > 0.01, "the test needs weights that differ"
    assert_gradients(recorder, 0, total / tokens, student)


def test_weights_that_were_measured_again_may_differ_by_rounding(tmp_path):
    def record(weight: float, **more) -> dict:
        return {"reward": {"weightings": [{"weights": [weight, 1 - weight], **more}]}}

    (tmp_path / RUN_RECORD).write_text(json.dumps(record(0.25)))
    check_same_run(tmp_path, record(0.25 * (1 + 1e-6)))
    for other in (record(0.2502), record(0.25, weighting="per_example"), {"reward": {"weightings": []}}):
        with pytest.raises(InputError, match="weightings was"):
            check_same_run(tmp_path, other)


def test_a_resumed_run_keeps_the_weights_of_the_rollout(tmp_path):
    """A checkpoint between the two updates on one rollout."""
    settings = {"data": data_of(references=True), "max_steps": 3, "num_iterations": 2, "optim": "sgd"}
    whole = run(
        "kd",
        tmp_path / "whole",
        reward=reward_of(weighting="per_example"),
        save_strategy="steps",
        save_steps=1,
        **settings,
    )
    resumed = build("kd", tmp_path / "resumed", reward=reward_of(weighting="per_example"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert_same_weights(snapshot(resumed.model), whole.weights[-1], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="weightings was"):
        other = build("kd", tmp_path / "other", reward=reward_of(), **settings)
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))


@pytest.mark.parametrize(
    "method, settings", [("kd", {"sequences": "teacher", "lmbda": 0.0}), ("all-actions", {"teacher_mix": 0.2})]
)
def test_teachers_that_take_turns_are_refused_with_routing(method, settings, tmp_path):
    with pytest.raises(InputError, match="take turns"):
        build(method, tmp_path, reward=reward_of(routing=ROUTING), data=data_of(references=False), **settings)


def test_all_actions_with_weights_per_example_learns_from_the_owner(tmp_path):
    """With routing to one teacher for all rows, what it learns is what it learns from that teacher alone."""
    rows = [{**row, "expert": "teacher6"} for row in data_of(references=False)]
    settings = {"data": Dataset.from_list(rows), "max_steps": 2, "future": "expected"}
    routed = run("all-actions", tmp_path / "routed", reward=reward_of(routing=ROUTING), **settings)
    alone = TeacherForcingReward(MODELS["t5-tied"](seed=6), word_tokenizer())
    alone = run("all-actions", tmp_path / "alone", reward=alone, **settings)
    assert_same_weights(routed.weights[-1], alone.weights[-1], rtol=1e-4, atol=1e-5)
