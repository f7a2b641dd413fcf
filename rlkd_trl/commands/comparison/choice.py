"""Which learning rate, and which methods, are the best by their scores on validation inputs."""

import math
from collections.abc import Mapping


def choose_learning_rate(scores: Mapping[float, float | None], *, lower_is_better: bool) -> float | None:
    """The rate with the best score, the smaller of two as good; None where no rate has a finite one."""
    finite = {rate: score for rate, score in scores.items() if score is not None and math.isfinite(score)}
    sign = 1 if lower_is_better else -1
    return min(finite, key=lambda rate: (sign * finite[rate], rate), default=None)


def best(scores: Mapping[str, float], count: int, *, lower_is_better: bool) -> list[str]:
    """The names of the `count` best finite scores, the best first; of two as good, the one that stands first."""
    finite = [name for name, score in scores.items() if math.isfinite(score)]
    return sorted(finite, key=lambda name: scores[name] if lower_is_better else -scores[name])[:count]
