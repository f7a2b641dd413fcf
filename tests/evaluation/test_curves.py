import math

import pytest

from rlkd_trl.evaluation.curves import axis, charts
from rlkd_trl.evaluation.metric_guide import QUESTIONS


def test_curves_stand_under_the_question_they_answer():
    names = ["seconds/sample", "approx_kl", "completions/eos_rate", "reward", "eval_bleu", "my_own"]
    history = [{"step": step, **{name: float(step) for name in names}} for step in (1, 2, 3)]
    groups, steady = charts({"run": history})
    assert [group["question"] for group in groups] == list(QUESTIONS)
    found = [[chart["name"] for chart in group["charts"]] for group in groups]
    assert found == [["reward", "eval_bleu"], ["completions/eos_rate"], ["approx_kl"], ["seconds/sample"], ["my_own"]]
    assert not steady


def test_points_are_in_order_of_steps_and_what_is_not_finite_is_a_gap():
    history = [
        {"step": 30, "epoch": 0.3, "loss": 1.0, "note": "text", "flag": True},
        {"step": 10, "loss": 3.0},
        {"step": 20, "loss": math.nan},
        {"step": 25, "loss": None},  # as JSON has it
        {"train_loss": 1.0},
    ]
    [group], steady = charts({"a": history, "b": [{"step": 1, "loss": 2.0}]})
    [chart] = group["charts"]
    assert chart["series"] == {"a": [[10, 3.0], [20, None], [25, None], [30, 1.0]], "b": [[1, 2.0]]}
    assert not steady


def test_what_was_measured_once_or_is_always_the_same_is_no_curve():
    history = [{"step": 1, "lr": 0.5}, {"step": 2, "lr": 0.5, "eval_bleu": 3.0, "bad": math.inf}]
    groups, steady = charts({"run": history})
    assert not groups
    texts = {row["name"]: row["text"] for row in steady}
    assert texts == {
        "lr": "0.5 (always)",
        "eval_bleu": "3 (once, at step 2)",
        "bad": "never finite (once, at step 2)",
    }


def test_a_value_that_stops_being_finite_is_not_called_steady():
    history = [{"step": 10, "loss": 2.3}, {"step": 20, "loss": math.nan}, {"step": 30, "loss": None}]
    groups, [row] = charts({"run": history})
    assert not groups
    assert row["text"] == "2.3 (at 1 of 3 steps; not finite at the others, first at step 20)"
    _, [row] = charts({"run": history[1:]})
    assert row["text"] == "never finite (2 steps)"


def test_evaluations_before_and_after_are_the_tables_and_those_in_between_make_a_curve():
    before_and_after = [{"step": 0, "eval_bleu": 1.0}, {"step": 9, "eval_bleu": 2.0}]
    assert charts({"run": before_and_after}, in_table={"bleu"}) == ([], [])
    [group], _ = charts({"run": [*before_and_after, {"step": 5, "eval_bleu": 3.0}]}, in_table={"bleu"})
    assert [step for step, _ in group["charts"][0]["series"]["run"]] == [0, 5, 9]


def test_what_training_logs_is_no_evaluation_of_the_same_name():
    """The table has the reward of greedy outputs, not that of the samples in training."""
    few = [{"step": 10, "reward": -9.0, "eval_reward": 1.0}, {"step": 20, "reward": 3.0, "eval_reward": 2.0}]
    [group], steady = charts({"run": few}, in_table={"reward"})
    assert [chart["name"] for chart in group["charts"]] == ["reward"]
    assert not steady
    groups, [row] = charts({"run": few[:1]}, in_table={"reward"})
    assert not groups
    assert (row["name"], row["text"]) == ("reward", "-9 (once, at step 10)")


@pytest.mark.parametrize(
    ("least", "greatest", "resolution", "expected"),
    [
        # Rounding errors around 0 of a metric read to 1e-4: ten of these, and the noise is a flat line.
        (-1e-9, 1e-9, 1e-4, [-0.0005, -0.00025, 0.0, 0.00025, 0.0005]),
        (0.0, 1e-9, 1e-4, [0.0, 0.00025, 0.0005, 0.00075, 0.001]),  # never negative
        (1.0, 1.0 + 1e-9, 0.0, [0.995, 0.9975, 1.0, 1.0025, 1.005]),  # one percent of the size
        (28.0, 36.0, 1e-3, [28.0, 30.0, 32.0, 34.0, 36.0]),
        (0.0, 1e-5, 0.0, [0.0, 2.5e-06, 5e-06, 7.5e-06, 1e-05]),  # a learning rate is a signal
    ],
)
def test_axes_do_not_make_rounding_errors_look_like_a_signal(least, greatest, resolution, expected):
    low, high, ticks = axis(least, greatest, resolution=resolution)
    assert ticks == pytest.approx(expected, abs=1e-12)
    assert (low, high) == (ticks[0], ticks[-1])
    assert low <= least and high >= greatest
