"""Guards against a reward that rises while the completions get worse."""

import logging
from types import SimpleNamespace

import pytest
import torch

from rlkd_trl.trainers import rollout_trainer
from rlkd_trl.trainers.guards import (
    GUARDED,
    Guards,
    answer_sketches,
    distinct_answers,
    left_range,
    repetition_and_distinct,
    repetition_counts,
    spoilt,
)
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


def sketches_of(answers: list[list[int]], prompts: list[int] | None = None) -> list[list[int]]:
    """Of answers of one length each to the prompts, which are single tokens; without them to other ones each."""
    ids_PT = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in answers], batch_first=True)
    mask_PT = torch.nn.utils.rnn.pad_sequence([torch.ones(len(ids)) for ids in answers], batch_first=True).bool()
    prompt_P1 = torch.tensor(list(range(len(answers))) if prompts is None else prompts)[:, None]
    return answer_sketches(prompt_P1, torch.ones_like(prompt_P1), ids_PT, mask_PT, num_generations=1).tolist()


def test_sketches_agree_as_often_as_answers_share_ngrams():
    """Against the share of trigrams of either that are in both, over 400 pairs whose second halves differ."""
    generator = torch.Generator().manual_seed(0)
    agreed, shared = 0, 0.0
    for _ in range(400):
        first = torch.randint(0, 9, (12,), generator=generator).tolist()
        second = first[:6] + torch.randint(0, 9, (6,), generator=generator).tolist()
        (_, _, *ours), (_, _, *theirs) = sketches_of([first, second])
        agreed += sum(a == b for a, b in zip(ours, theirs, strict=True)) / 4
        grams = [set(zip(ids, ids[1:], ids[2:], strict=False)) for ids in (first, second)]
        shared += len(grams[0] & grams[1]) / len(grams[0] | grams[1])
    assert agreed / 400 == pytest.approx(shared / 400, abs=0.04) and 0.2 < shared / 400 < 0.5


def test_sketches_are_of_the_first_samples_and_of_real_tokens():
    ids_BT = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9], [5, 6, 1, 1], [5, 6, 2, 2]])
    mask_BT = torch.tensor([[1] * 4] * 4 + [[1, 1, 0, 0]] * 2).bool()
    prompts_PS, real_PS = torch.tensor([[3, 4], [3, 0], [3, 4]]), torch.tensor([[1, 1], [1, 0], [1, 1]])
    (a, *x), (b, *y), (c, *z) = answer_sketches(prompts_PS, real_PS, ids_BT, mask_BT, num_generations=2).tolist()
    assert a == c != b and x == y and z != x
    padded_PS, real_PS = torch.tensor([[0, 3, 4]]), torch.tensor([[0, 1, 1]])
    [(d, *w)] = answer_sketches(padded_PS, real_PS, ids_BT[4:5], mask_BT[4:5], num_generations=1).tolist()
    assert d == a and w == z, "whatever stands in the padding"
    [(_, *none)] = answer_sketches(padded_PS, real_PS, ids_BT[:1], mask_BT[:1] & False, num_generations=1).tolist()
    assert set(none) == {-1}


def test_distinct_answers():
    alike = sketches_of([[5, 6, 7]] * 4)
    assert distinct_answers(alike) == (0.25, 0.25) and distinct_answers([]) == (0.0, 0.0)
    assert distinct_answers(sketches_of([[5, 6], [6, 5], [7], [5, 6]])) == (0.75, 0.75)
    assert distinct_answers(sketches_of([[10 + i, 1] for i in range(64)])) == (1.0, 1.0), (
        "short ones are compared whole"
    )
    again = sketches_of([[1, 2, 3], [7, 7, 7], [7, 7, 7]], prompts=[0, 0, 1])
    assert distinct_answers(again) == (0.5, 0.5), "a prompt's last answer"
    nearly = sketches_of([[5, 6, 7, 8, 9, 10, 11, 12, 13, i] for i in range(20, 40)])
    assert distinct_answers(nearly)[0] == 1.0 and distinct_answers(nearly)[1] < 0.4
    assert distinct_answers([*alike, [9, *[-1] * 5]]) == (0.25, 0.25), "an answer without tokens is none"


COLLAPSES = {
    "one prompt a rollout": (1, lambda n, random: [7, 8, 9, 10]),
    "two": (2, lambda n, random: [7, 8, 9, 10]),
    "many": (16, lambda n, random: [7, 8, 9, 10]),
    "nearly": (16, lambda n, random: [7, 8, 9, 10, 11, 12, 13, 14, random[0]]),
}


@pytest.mark.parametrize("reward", [-5.0, -15.0])
@pytest.mark.parametrize("good", [8, 5])
@pytest.mark.parametrize("case", COLLAPSES)
def test_a_collapse_is_seen_whatever_the_reward_does(case, good, reward):
    """However few prompts a rollout has, and among the first rollouts too."""
    prompts, collapsed = COLLAPSES[case]
    generator, guards, said = torch.Generator().manual_seed(0), Guards(), []
    for n in range(40):
        random = torch.randint(20, 900, (prompts, 8), generator=generator).tolist()
        answers = random if n < good else [collapsed(n, words) for words in random]
        sketches = sketches_of(answers, list(range(n * prompts, (n + 1) * prompts)))
        said += guards.warnings({**START, "reward": reward}, sketches)
    assert len(said) == 1 and said[0].startswith("distinct outputs is ")
    assert "the student says nearly the same to many prompts" in said[0]


def test_answers_of_all_processes_are_compared(tmp_path, monkeypatch):
    trainer, seen = build("rloo-token", tmp_path), []
    monkeypatch.setattr(rollout_trainer, "gather_object", lambda ours: [*ours, "theirs"])
    monkeypatch.setattr(trainer._guards, "warnings", lambda metrics, sketches: seen.append(sketches) or [])
    trainer.make_rollout([trainer.train_dataset[i] for i in range(4)])
    [[*ours, theirs]] = seen
    assert theirs == "theirs" and [len(sketch) for sketch in ours] == [6] * 4


@pytest.mark.parametrize("case", ["an earlier version's checkpoint", "no answers"])
def test_what_cannot_be_compared_is_no_collapse(case):
    guards = Guards()
    for n in range(40):
        alike = [[7, 7, 7]] * 8 if case.startswith("an") or n < 8 else []
        sketches = sketches_of(alike or [[1]], [8 * n + i for i in range(len(alike) or 1)])
        if not alike:
            sketches = [[number, *[-1] * 5] for number, *_ in sketches]
        if n == 4 and case.startswith("an"):
            del guards.history["answers"]
        assert not guards.warnings(START, sketches)


def test_few_answers_from_the_start_are_no_collapse():
    """As where a task has two labels, and a rollout eight prompts."""
    generator, guards = torch.Generator().manual_seed(0), Guards()
    for n in range(40):
        labels = torch.randint(5, 7, (8, 1), generator=generator).tolist()
        assert not guards.warnings(START, sketches_of(labels, list(range(8 * n, 8 * n + 8))))


def test_surer_answers_to_the_same_prompts_are_no_collapse():
    """Eight prompts again and again: at first their samples differ, later each has its one answer."""
    generator, guards = torch.Generator().manual_seed(0), Guards()
    for n in range(40):
        random = torch.randint(20, 900, (8, 6), generator=generator).tolist()
        answers = random if n < 8 else [[p, p + 1, p + 2] for p in range(8)]
        assert not guards.warnings(START, sketches_of(answers, list(range(8))))


@pytest.mark.parametrize(
    "method", ["rloo-token", *(pytest.param(method, marks=pytest.mark.slow(0.5)) for method in ("all-actions", "kd"))]
)
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

    def going_wrong(metrics, sketches):
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
