"""`bf16`: the student and its copies are read in it wherever they are, the teacher and the value head never are."""

from collections import defaultdict

import pytest
import torch

from tests.tiny_models import MODELS, tiny_t5
from tests.trainers.tiny_runs import FULL_VOCABULARY_METHODS, METHODS, build, pairs, prompts, run, teacher_reward

# Beside the ways to train, those whose extra passes over the student could forget the precision.
RUNS = {
    **{name: (name, {}) for name in [*METHODS, *FULL_VOCABULARY_METHODS]},
    "ppo-two-passes": ("ppo", {"num_iterations": 2}),
    "ppo-separate-critic": ("ppo", {"critic": "separate"}),
    "kl": ("rloo-token", {"beta": 0.1}),
    "lagging": ("reinforce", {"behaviour_sync_steps": 2, "baseline": "min_variance"}),
    "all-actions-expected": ("all-actions", {"future": "expected"}),
    "all-actions-mixed": ("all-actions", {"teacher_mix": 0.3}),
    "kd-on-the-teachers": ("kd", {"lmbda": 0.0, "sequences": "teacher"}),
    "kd-on-data": ("kd", {"lmbda": 0.0, "sequences": "data", "data": pairs(32)}),
}


def dtypes_of(module: torch.nn.Module, found: dict, name: str) -> None:
    """Collects the dtypes of the module's outputs, and how many there were."""

    def record(_module, _inputs, output):
        found[name].append(output.dtype)

    module.register_forward_hook(record)


def a_projection(model: torch.nn.Module) -> torch.nn.Linear:
    """The first linear layer of a body: it is in every forward pass."""
    return next(module for module in model.modules() if isinstance(module, torch.nn.Linear))


def watched(trainer) -> dict[str, list[torch.dtype]]:
    """What the layers of the student, its copies, the critic, and the teacher have put out since."""
    found = defaultdict(list)
    policy = trainer.model
    dtypes_of(a_projection(policy.model), found, "student")
    for name in ("reference", "behaviour"):
        if getattr(trainer, name, None) is not None:
            dtypes_of(a_projection(getattr(trainer, name).model), found, name)
    if policy.critic_model is not None:
        dtypes_of(a_projection(policy.critic_model), found, "critic")
    if policy.value_head is not None:
        dtypes_of(policy.value_head, found, "value head")
    teacher = trainer.reward_model.panels[0].scorers[0].teacher.model
    dtypes_of(a_projection(teacher), found, "teacher")
    dtypes_of(teacher.get_output_embeddings(), found, "teacher's head")
    return found


@pytest.mark.parametrize("case", RUNS)
@pytest.mark.parametrize("family", ["t5-tied", pytest.param("llama", marks=pytest.mark.slow)])
def test_who_is_read_in_bfloat16(case, family, tmp_path):
    """In every pass of training and of evaluation."""
    method, settings = RUNS[case]
    settings = {"reward": teacher_reward(family), "eval_data": prompts(3, seed=3), **settings}
    trainer = build(method, tmp_path, family=family, bf16=True, max_steps=1, **settings)
    for stage in (trainer.train, trainer.evaluate):
        found = watched(trainer)
        stage()
        assert set(found["student"]) == {torch.bfloat16}
        assert set(found["teacher"]) == set(found["teacher's head"]) == {torch.float32}, "in its own precision"
        for copy in {"reference", "behaviour", "critic"} & found.keys():
            assert set(found[copy]) == {torch.bfloat16}
        if found["value head"]:
            assert set(found["value head"]) == {torch.float32}


@pytest.mark.parametrize("method", ["rloo-token", "all-actions"])
def test_without_it_nothing_is(method, tmp_path):
    trainer = build(method, tmp_path, reward=teacher_reward(), eval_data=prompts(3, seed=3), bf16=False)
    found = watched(trainer)
    trainer.train()
    trainer.evaluate()
    assert {dtype for dtypes in found.values() for dtype in dtypes} == {torch.float32}


@pytest.mark.parametrize("family", ["t5-tied", "llama"])
def test_a_bfloat16_teacher_and_student_stay_what_they_are(family, tmp_path):
    """Checkpoints in bfloat16, without mixed precision."""
    student = MODELS[family]().to(torch.bfloat16)
    own = {"model": student, "reward": teacher_reward(family)}
    trainer = build("ppo", tmp_path, family=family, **own, eval_data=prompts(3, seed=3))
    found = watched(trainer)
    trainer.train()
    trainer.evaluate()
    assert set(found["student"]) == {torch.bfloat16} and set(found["teacher"]) == {torch.float32}
    assert set(found["value head"]) == {torch.float32}


@pytest.mark.parametrize("method", ["ppo", "kd"])
def test_an_evaluation_in_bfloat16_measures_with_the_teacher_in_float32(method, tmp_path):
    """Of the same outputs, which a hundred times larger head makes sure of, NLL and reward are the same numbers."""
    found = {}
    for bf16 in (False, True):
        student = tiny_t5(tied=False)
        with torch.no_grad():
            student.lm_head.weight *= 100
        trainer = build(method, tmp_path, family="t5-untied", model=student, bf16=bf16, eval_data=prompts(5, seed=3))
        found[bf16] = trainer.evaluate()
    assert found[True]["eval_tokens"] == found[False]["eval_tokens"]
    for name in ("eval_teacher_nll_per_token", "eval_reward"):
        assert found[True][name] == pytest.approx(found[False][name], rel=1e-6), name


@pytest.mark.parametrize("family", ["t5-tied", "llama"])
def test_the_reference_is_read_as_the_student_is(family, tmp_path):
    """Before the first update they are one model: every log-probability, rounded as it is, is the same."""
    recorder = run("rloo-token", tmp_path, family=family, bf16=True, beta=0.1, max_steps=1)
    assert recorder.logs[0]["kl"] == 0.0


def test_the_behaviour_policy_samples_and_is_read_as_the_student_is(tmp_path):
    """A copy that was just made changes nothing: the first step is that of the student as its own behaviour policy."""
    settings = {"bf16": True, "baseline": "min_variance", "max_steps": 1}
    student, copy = (
        run("reinforce", tmp_path, behaviour_sync_steps=sync_steps, **settings).logs[0] for sync_steps in (0, 4)
    )
    for name in ("loss", "reward", "ratio", "approx_kl", "grad_norm"):
        assert copy[name] == student[name], name
