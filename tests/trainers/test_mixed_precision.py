"""Copies of the student are read in the precision in which Accelerate puts the student's own forward pass."""

import pytest

from tests.trainers.tiny_runs import run


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
