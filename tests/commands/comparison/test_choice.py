"""The best rate and the best methods, where scores are as good as each other, or not finite."""

import math

from rlkd_trl.commands.comparison.choice import best, choose_learning_rate


def test_choice_of_the_learning_rate():
    scores = {1e-4: 3.0, 5e-4: 1.0, 1e-3: 2.0}
    assert choose_learning_rate(scores, lower_is_better=True) == 5e-4
    assert choose_learning_rate(scores, lower_is_better=False) == 1e-4
    # What failed or diverged is never chosen; of two as good, the smaller rate.
    assert choose_learning_rate({1e-4: None, 5e-4: math.nan, 1e-3: 9.0}, lower_is_better=True) == 1e-3
    assert choose_learning_rate({1e-4: -math.inf, 1e-3: 9.0}, lower_is_better=True) == 1e-3
    for lower in (True, False):
        assert choose_learning_rate({1e-3: 2.0, 1e-4: 2.0}, lower_is_better=lower) == 1e-4
    assert choose_learning_rate({1e-4: None}, lower_is_better=True) is None


def test_the_best_methods():
    scores = {"a": 2.0, "b": 3.0, "c": math.nan, "d": 1.0, "e": 3.0}
    assert best(scores, 3, lower_is_better=False) == ["b", "e", "a"]
    assert best(scores, 2, lower_is_better=True) == ["d", "a"]
    assert best(scores, 9, lower_is_better=True) == ["d", "a", "b", "e"], "no more than have a score"
