import json

import pytest

from rlkd_trl import TeacherForcingReward
from rlkd_trl.commands.results import evaluate_teacher_of
from rlkd_trl.teachers import Teacher, TeacherPanel
from rlkd_trl.teachers.routing import Routing
from rlkd_trl.trainers.sample_log import SampleLog, _is_due
from tests.tiny_models import MODELS, word_tokenizer
from tests.trainers.tiny_runs import build, pairs, snapshot

pytestmark = pytest.mark.slow


def logged(directory):
    return [json.loads(line) for line in (directory / "completions.jsonl").read_bytes().splitlines()]


def run(method, directory, *, with_log=True, resume=None, eval_data=None, **settings):
    trainer = build(method, directory, data=pairs(16), eval_data=eval_data or pairs(7, seed=1), **settings)
    if with_log:
        trainer.add_callback(SampleLog(trainer))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_when_held_out_answers_are_due():
    assert [step for step in range(1, 120) if _is_due(step)] == [10, 15, 23, 35, 53, 80]


@pytest.mark.parametrize("method", ["ppo", "kd"])
def test_the_same_prompts_over_training_and_rollouts_between(method, tmp_path):
    trainer = run(method, tmp_path, max_steps=11, logging_steps=4)
    records = logged(tmp_path)
    held_out = [record for record in records if record["kind"] == "held-out"]
    prompts = [row["prompt"] for row in pairs(7, seed=1)][:5]
    for step, who in ((0, "teacher"), (0, "student"), (10, "student"), (11, "student")):
        of_step = [record for record in held_out if (record["step"], record["by"]) == (step, who)]
        assert [record["prompt"] for record in of_step] == prompts, (step, who)
        assert all(record["references"] and len(record["q"]) == len(record["tokens"]) for record in of_step)
    assert len(held_out) == 4 * len(prompts)
    rollouts = [record for record in records if record["kind"] == "rollout"]
    if method == "kd":
        assert not rollouts
        return
    assert {record["step"] for record in rollouts} == {4, 8}
    assert len(rollouts) == 2 * trainer.args.num_completions_to_print
    for record in rollouts:
        assert len(record["advantage"]) == len(record["reward"]) == len(record["tokens"])
        assert record["total"] == pytest.approx(sum(record["reward"]), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("panel", ["one", "routed"])
def test_a_teacher_that_has_been_measured_does_not_answer_again(panel, tmp_path, monkeypatch):
    """The records are those of a teacher that answers for the log alone, without the generation."""
    from rlkd_trl.trainers import sample_log

    original, by_teachers, logs = sample_log.answer_prompts, [], []
    for is_measured in (False, True):
        place = tmp_path / str(is_measured)
        settings = routed() if panel == "routed" else {"data": pairs(16), "eval_data": pairs(7, seed=1)}
        trainer = build("rloo-token", place, max_steps=1, **settings)
        student = trainer.policy.model

        def counted(model, *args, student=student, **kwargs):
            by_teachers[-1] += model is not student
            return original(model, *args, **kwargs)

        by_teachers.append(0)
        monkeypatch.setattr(sample_log, "answer_prompts", counted)
        trainer.add_callback(SampleLog(trainer))
        if is_measured:
            assert evaluate_teacher_of(trainer)["bleu"] >= 0
        trainer.train()
        logs.append([record for record in logged(place) if record.get("by") == "teacher"])
    assert by_teachers == [3 if panel == "routed" else 1, 0]
    assert len(logs[0]) == 5 and logs[0] == logs[1]


def routed() -> dict:
    """Three teachers, of whom each is asked of some rows."""
    names = ("one", "two", "three")
    teachers = [Teacher(MODELS["t5-tied"](seed=seed), word_tokenizer()) for seed in (5, 6, 7)]
    panel = TeacherPanel(teachers, routing=Routing("expert", None, names))
    train, held_out = (
        rows.add_column("expert", [names[i % 3] for i in range(len(rows))]) for rows in (pairs(16), pairs(7, seed=1))
    )
    return {"data": train, "eval_data": held_out, "reward": TeacherForcingReward(panel)}


def test_the_log_changes_neither_the_run_nor_its_cost(tmp_path):
    with_log, without = (run("ppo", tmp_path / str(flag), with_log=flag, max_steps=10) for flag in (True, False))
    ours, theirs = snapshot(with_log.model), snapshot(without.model)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert with_log.cost().generated_tokens == without.cost().generated_tokens


def test_a_resumed_run_writes_later_steps_anew(tmp_path):
    """Also where a text has a line separator, which ends no line of the file."""
    settings = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6}
    settings["eval_data"] = pairs(7, seed=1).map(lambda row: {"references": ["w1\u2028w2"]})
    run("rloo-token", tmp_path, **settings)
    whole = logged(tmp_path)
    run("rloo-token", tmp_path, **settings, resume=tmp_path / "checkpoint-6")
    assert logged(tmp_path) == whole
