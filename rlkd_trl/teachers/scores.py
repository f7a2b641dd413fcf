"""What a teacher says about a completion: a few scalars per token, never the logits."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class TeacherScores:
    """Statistics of the teacher's raw logits z_t at each state s_t of each completion, float32.

    chosen: z_t[y_t], `[B, T]`. All others are `[B, T+1]`, as the reward of a truncated completion's last token needs
    the state after it: mean, max and logsumexp (at temperature 1) over the vocabulary; and, None unless requested,
    expected = Σ_v softmax(z)_v z_v, soft = τ logsumexp(z/τ), and allowed_logsumexp, which is over the ids that a
    student may sample. Positions where no state exists are 0.
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
    """Each statistic's weighted mean over scorers (teachers and templates); None where a scorer lacks it."""
    means = {}
    for field in fields(TeacherScores):
        values = [getattr(scores_of_one, field.name) for scores_of_one in scores]
        all_have_it = all(value is not None for value in values)
        means[field.name] = sum(w * v for w, v in zip(weights, values, strict=True)) if all_have_it else None
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
