"""What a teacher says about a completion: a few scalars per token, never the logits."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class TeacherScores:
    """Statistics of the teacher's raw logits z_t at each state s_t of each completion, float32.

    chosen: z_t[y_t] `[B, T]`. The others are `[B, T+1]`, since the reward of a truncated completion's last token
    needs the state after it: mean, max, logsumexp (temperature 1), and, only where requested, expected =
    Σ softmax(z)·z, soft = τ logsumexp(z/τ), and allowed_logsumexp, over the ids that a student may sample. Positions
    where no state exists are 0.
    """

    chosen: Tensor
    mean: Tensor
    max: Tensor
    logsumexp: Tensor
    expected: Tensor | None = None
    soft: Tensor | None = None
    allowed_logsumexp: Tensor | None = None

    def rows(self, selected: slice) -> "TeacherScores":
        """The scores of the selected completions."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return TeacherScores(**{name: None if v is None else v[selected] for name, v in values.items()})


def mean_scores(scores: Sequence[TeacherScores], weights: Sequence[float]) -> TeacherScores:
    """Each statistic's weighted mean over scorers (teachers and templates); None where one of them lacks it."""
    means = {}
    for field in fields(TeacherScores):
        values = [getattr(scores_of_one, field.name) for scores_of_one in scores]
        is_there = all(value is not None for value in values)
        means[field.name] = sum(w * v for w, v in zip(weights, values, strict=True)) if is_there else None
    return TeacherScores(**means)


def empty_scores(batch_size: int, length: int, *, expected: bool, soft: bool, allowed: bool, device) -> TeacherScores:
    """Zeros of the right shapes, to be filled batch by batch."""

    def zeros(width: int) -> Tensor:
        return torch.zeros(batch_size, width, device=device)

    return TeacherScores(
        chosen=zeros(length),
        mean=zeros(length + 1),
        max=zeros(length + 1),
        logsumexp=zeros(length + 1),
        expected=zeros(length + 1) if expected else None,
        soft=zeros(length + 1) if soft else None,
        allowed_logsumexp=zeros(length + 1) if allowed else None,
    )
