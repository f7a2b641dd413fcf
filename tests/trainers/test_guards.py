"""Guards against a reward that rises while the completions get worse."""

import logging
from types import SimpleNamespace

import pytest
import torch

from rlkd_trl.trainers.guards import GUARDED, Guards, left_range, repetition_and_distinct, repetition_counts, spoilt
from rlkd_trl.trainers.rollout_sampling import RolloutSampling
from tests.trainers.tiny_runs import build, run

START = {"reward": -10.0, **dict.fromkeys(GUARDED.values(), 0.5)}


def test_left_range():
    # from 8 to 12, widened by 4: 4 to 16
    assert left_range([8.0, 12.0, 10.0], [16.5]) == "above"
    assert left_range([8.0, 12.0, 10.0], [15.9, 16.0]) is None
    assert left_range([8.0, 12.0, 10.0], [3.9]) == "below"
    # all alike: widened by a fifth of 10
    assert left_range([10.0, 10.0], [12.1]) == "above" and left_range([10.0, 10.0], [8.1]) is None


def test_repetition_counts():
    ids_BT = torch.tensor([[5, 5, 5, 5, 5], [6, 7, 8, 6, 7], [6, 7, 8, 9, 9], [4, 9, 9, 9, 9]])
    mask_BT = torch.tensor([[1] * 5, [1] * 5, [1] * 5, [0] * 5]).bool()
    # trigrams: 555 three times (two repeat), 678 786 867, 678 789 899: 9 in all; the last completion is left out
    assert repetition_counts(ids_BT, mask_BT, num_generations=1) == (2.0, 9.0, 3.0, 3.0)


def test_outputs_are_distinct_over_prompts():
    """Of three prompts with two samples each, the first samples are alike twice; a prompt's others do not count."""
    ids_BT = torch.tensor([[5, 6], [5, 7], [5, 6], [8, 8], [9, 9], [9, 9]])
    assert repetition_counts(ids_BT, torch.ones(6, 2).bool(), num_generations=2)[2:] == (2.0, 3.0)
    ids_BT[2] = torch.tensor([4, 4])
    assert repetition_counts(ids_BT, torch.ones(6, 2).bool(), num_generations=2)[2:] == (3.0, 3.0)


def test_shares_are_of_all_processes():
    """Here 2 of 9 trigrams are repeats, and 3 of 3 texts differ; in the other process 2 of 9, and 2 of 3."""
    ids_BT = torch.tensor([[5, 5, 5, 5, 5], [6, 7, 8, 6, 7], [6, 7, 8, 9, 9]])
    rollout = SimpleNamespace(completion_ids_BT=ids_BT, counted_BT=torch.ones(3, 5).bool())
    other = torch.tensor([2.0, 9.0, 2.0, 3.0])
    assert repetition_and_distinct(rollout, 1, lambda counts: counts + other) == pytest.approx((4 / 18, 5 / 6))
    empty = SimpleNamespace(completion_ids_BT=ids_BT, counted_BT=torch.zeros(3, 5).bool())
    assert repetition_and_distinct(empty, 1, lambda counts: counts) == (0.0, 0.0)


@pytest.mark.parametrize("word, name", GUARDED.items())
@pytest.mark.parametrize("reward, warned", [(-5.0, True), (-15.0, False)])
def test_each_guard_speaks_while_the_reward_rises(word, name, reward, warned):
    guards = Guards()
    assert not any(guards.warnings(START) for _ in range(8))
    said = [guards.warnings({**START, "reward": reward, name: 0.2}) for _ in range(40)]
    found = [line for lines in said for line in lines]
    assert len(found) == (1 if warned else 0), "not again for a while"
    if warned:
        assert found[0].startswith(f"{word} is 0.2, below the start's range (0.5 to 0.5), while the reward rises")
        assert not any(said[:7]), "as many rollouts as are compared with"


def test_the_range_of_the_start_is_as_wide_as_its_values_scatter():
    """From 8 to 12, so down to 4: a mean of 5 is inside, whatever single rollouts do."""
    guards = Guards()
    for length in (8.0, 12.0, 9.0, 11.0, 8.0, 12.0, 10.0, 10.0):
        guards.warnings({**START, "completions/mean_length": length})
    for length in (3.0, 7.0) * 6:
        assert not guards.warnings({**START, "reward": 0.0, "completions/mean_length": length})
    said = [
        line for _ in range(8) for line in guards.warnings({**START, "reward": 0.0, "completions/mean_length": 3.0})
    ]
    assert len(said) == 1 and "below the start's range (8 to 12)" in said[0]


@pytest.mark.parametrize("reward", [22.0, 24.0])
def test_reward_per_token_may_be_what_rises(reward):
    """The one that is learnt: of completions that hold V_1, here 23, it is neither their sum nor their mean."""
    guards = Guards()
    start = {**START, "reward": 23.0, "average_reward": -0.6, "completions/mean_length": 10.0}
    for _ in range(8):
        guards.warnings(start)
    longer = {**start, "reward": reward, "average_reward": -0.5, "completions/mean_length": 30.0}
    said = [line for _ in range(10) for line in guards.warnings(longer)]
    rising = "reward" if reward > 23 else "reward per token"
    assert len(said) == 1 and said[0].startswith("length is 30, above the start's range (10 to 10)")
    assert f"while the {rising} rises" in said[0]
    falling = Guards()
    for _ in range(8):
        falling.warnings(start)
    shorter = {**start, "reward": 22.0, "average_reward": -0.7, "completions/mean_length": 5.0}  # 4.4 a token
    assert not any(falling.warnings(shorter) for _ in range(20))


@pytest.mark.parametrize("reward", [-5.0, -15.0])
@pytest.mark.parametrize("start", [[0.9] * 8, [0.9, 0.9, 0.6, 0.3, 0.1, 0.1, 0.1, 0.1]])
def test_a_collapse_is_seen_whatever_the_reward_does(start, reward):
    """Among the first rollouts too."""
    guards = Guards()
    for distinct in start:
        assert not guards.warnings({**START, "completions/distinct": distinct})
    said = [
        line for _ in range(40) for line in guards.warnings({**START, "reward": reward, "completions/distinct": 0.1})
    ]
    assert len(said) == 1 and said[0].startswith("distinct outputs is 0.1, 0.9 at the start: the student says nearly")


def test_few_answers_from_the_start_are_no_collapse():
    """As where a task has two labels, and a rollout eight prompts."""
    guards = Guards()
    for distinct in [0.25, 0.125, 0.375, 0.25] * 10:
        assert not guards.warnings({**START, "completions/distinct": distinct})


@pytest.mark.parametrize("method", ["rloo-token", "all-actions"])
def test_a_student_that_says_one_thing_to_all_prompts_is_warned_of(method, tmp_path, caplog, monkeypatch):
    """It begins to in the ninth rollout."""
    trainer = build(method, tmp_path, max_steps=17)
    original = RolloutSampling.completions

    def one_text(sampling, *arguments):
        found = original(sampling, *arguments)
        return found if trainer.state.global_step < 8 else found.rows([0] * len(found.ids_BT))

    monkeypatch.setattr(RolloutSampling, "completions", one_text)
    logging.getLogger("rlkd_trl").propagate = True
    with caplog.at_level(logging.WARNING, logger="rlkd_trl"):
        trainer.train()
    assert "the student says nearly the same to many prompts" in caplog.text


def test_they_speak_again_after_a_while():
    guards = Guards()
    for _ in range(8):
        guards.warnings(START)
    said = [bool(guards.warnings({**START, "reward": 0.0, "entropy": 2.0})) for _ in range(120)]
    assert [i for i, spoke in enumerate(said) if spoke] == [7, 57, 107]


@pytest.mark.parametrize("method", ["ppo", "all-actions"])
def test_a_run_that_goes_wrong_is_warned_of(method, tmp_path, caplog, monkeypatch):
    """Its length jumps from the ninth rollout on, while the reward rises."""
    trainer = build(method, tmp_path, max_steps=17)
    watched = trainer._guards.warnings

    def going_wrong(metrics):
        assert {"reward", *GUARDED.values()} - {"entropy"} <= set(metrics)
        late = trainer.state.global_step >= 8
        return watched({**metrics, "reward": 5.0 if late else 0.0, "completions/mean_length": 40.0 if late else 5.0})

    monkeypatch.setattr(trainer._guards, "warnings", going_wrong)
    logging.getLogger("rlkd_trl").propagate = True
    with caplog.at_level(logging.WARNING, logger="rlkd_trl"):
        trainer.train()
    assert "length is 40, above the start's range (5 to 5)" in caplog.text
    assert any("guards_raised" in entry for entry in trainer.state.log_history)


def test_they_can_be_switched_off(tmp_path):
    recorder = run("ppo", tmp_path, guards=False)
    assert not recorder.trainer._guards.history["reference"]


@pytest.mark.parametrize(
    "losses, after, warned",
    [
        ([2.0, 1.0], {"teacher_nll_per_token": 0.56, "bleu": 50.0}, ["teacher_nll_per_token"]),
        ([2.0, 1.0], {"teacher_nll_per_token": 0.54, "bleu": 44.0}, ["bleu"]),  # a tenth: above 0.55, below 45
        ([2.0, 1.0], {"teacher_nll_per_token": 0.3, "bleu": 60.0}, []),
        ([2.0, 1.0], {"bleu": 10.0}, ["bleu"]),  # a cache has no teacher
        ([1.0, 2.0], {"teacher_nll_per_token": 4.0, "bleu": 10.0}, []),
        ([2.0], {"bleu": 10.0}, []),
        ([3.0, 1.0, 9.0, 0.0, 2.0], {"bleu": 10.0}, ["bleu"]),  # halves: 2 and 1, the one between in neither
        ([1.0, 2.0, 2.0, 0.9], {"bleu": 10.0}, ["bleu"]),
        ([2.0, 0.9, 1.0, 2.0], {"bleu": 10.0}, []),
    ],
)
def test_outputs_that_are_spoilt_while_the_loss_falls(losses, after, warned):
    before = {"teacher_nll_per_token": 0.5, "bleu": 50.0, "tokens": 9.0}
    said = spoilt(losses, before, {**after, "tokens": 1.0}, ["less", "more"])
    assert [line.split()[0] for line in said] == warned
    assert all("the loss fell from " in line and line.endswith("Compare less, more") for line in said)


def test_a_fraction_of_a_bleu_point_is_no_difference():
    assert spoilt([2.0, 1.0], {"bleu": 1.5}, {"bleu": 0.6}, []) == []
    assert "the loss fell from 2 to 1" in spoilt([2.0, 1.0], {"bleu": 1.5}, {"bleu": 0.4}, [])[0]
