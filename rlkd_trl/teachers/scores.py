"""What a teacher says about a completion: a few scalars per token, never the logits."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rlkd_trl.ops.rewards import log_likelihood


@dataclass(frozen=True)
class TeacherScores:
    """Statistics of the teacher's raw logits z_t at each state s_t of each completion, float32.

    chosen: z_t[y_t], `[B, T]`. All others are `[B, T+1]`, as the reward of a truncated completion's last token needs
    the state after it: mean, max and logsumexp (at temperature 1) over the vocabulary; and, None unless requested,
    expected = Σ_v softmax(z)_v z_v, soft = τ logsumexp(z/τ), and allowed_logsumexp, which is over the ids that a
    student may sample. Positions where no state exists are 0.

    weight: the scorer's share of the mean over teachers and templates, one number, or `[B, 1]` where it differs from
    completion to completion.
    """

    chosen: Tensor
    mean: Tensor
    max: Tensor
    logsumexp: Tensor
    expected: Tensor | None = None
    soft: Tensor | None = None
    allowed_logsumexp: Tensor | None = None
    weight: float | Tensor = 1.0

    def log_likelihood(self, mask_BT: Tensor) -> Tensor:
        """log p(y_t | s_t) of each token, in nats, `[B, T]`, 0 behind the mask."""
        return log_likelihood(self.chosen, self.logsumexp[:, :-1], mask_BT)

    def rows(self, selected: slice) -> "TeacherScores":
        """The scores of the selected completions."""
        return self._each(lambda tensor: tensor[selected])

    def spread(self, rows_b: Tensor, batch_size: int) -> "TeacherScores":
        """The scores of completions `rows_b` among all B, 0 for the others."""
        return self._each(lambda tensor: tensor.new_zeros(batch_size, *tensor.shape[1:]).index_copy(0, rows_b, tensor))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "TeacherScores":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return TeacherScores(**{name: change(v) if isinstance(v, Tensor) else v for name, v in values.items()})


def weighted_mean(tensors: Iterable[Tensor], scores: Sequence[TeacherScores]) -> Tensor:
    """The mean over scorers of what was computed from the scores of each, `[B, …]`, by their weights."""
    return sum(of_scorer.weight * tensor for of_scorer, tensor in zip(scores, tensors, strict=True))


def mean_scores(scores: Sequence[TeacherScores]) -> TeacherScores:
    """Each statistic's weighted mean over scorers (teachers and templates); None where a scorer lacks it."""
    means = {}
    for name in (field.name for field in fields(TeacherScores) if field.name != "weight"):
        values = [getattr(scores_of_one, name) for scores_of_one in scores]
        means[name] = None if any(value is None for value in values) else weighted_mean(values, scores)
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
