"""What a teacher says about a completion: a few scalars per token, never the logits."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rlkd_trl.models.alignment import Alignment
from rlkd_trl.ops.rewards import log_likelihood


@dataclass(frozen=True)
class TeacherScores:
    """Statistics of the teacher's raw logits z_t at each state s_t of each completion, float32.

    chosen: z_t[y_t], `[B, T]`. All others are `[B, T+1]`, as the reward of a truncated completion's last token needs
    the state after it: mean, max and logsumexp (at temperature 1) over the vocabulary; and, None unless requested,
    expected = Σ_v softmax(z)_v z_v, soft = τ logsumexp(z/τ), and allowed_logsumexp, which is over the ids that a
    student may sample. Positions where no state exists are 0.

    A teacher that tells log p only has log p in place of z: its logsumexp is 0, and it has no mean.

    weight: the scorer's share of the mean over teachers and templates, one number, or `[B, 1]` where it differs from
    completion to completion.

    alignment: of a teacher with another tokenizer than the student's: all of these are then of its own tokens, U in
    place of T, and the alignment says where in the student's tokens they belong.
    """

    chosen: Tensor
    mean: Tensor | None
    max: Tensor
    logsumexp: Tensor
    expected: Tensor | None = None
    soft: Tensor | None = None
    allowed_logsumexp: Tensor | None = None
    weight: float | Tensor = 1.0
    alignment: Alignment | None = None

    @property
    def centre_BT1(self) -> Tensor:
        """The constant of each state by which logits are centred: their mean; logsumexp where that is not known."""
        return self.logsumexp if self.mean is None else self.mean

    def log_likelihood(self, mask_BT: Tensor) -> Tensor:
        """log p(y_t | s_t) of each of the student's tokens, in nats, `[B, T]`, 0 behind the mask.

        Of a teacher with another tokenizer, that of a common span on the span's last token.
        """
        return self.on_students_tokens(
            log_likelihood(self.chosen, self.logsumexp[:, :-1], self.mask_of_own_tokens(mask_BT))
        )

    def allowed_log_likelihood(self, mask_BT: Tensor) -> Tensor:
        """`log_likelihood` over the ids that may be written, where `allowed_logsumexp` was asked for."""
        whole = self if self.allowed_logsumexp is None else replace(self, logsumexp=self.allowed_logsumexp)
        return whole.log_likelihood(mask_BT)

    def mask_of_own_tokens(self, mask_BT: Tensor) -> Tensor:
        """The completions' mask in the teacher's tokens."""
        return mask_BT if self.alignment is None else self.alignment.mask_BU

    def read_mask(self, mask_BT: Tensor) -> Tensor:
        """The completions' mask without tokens that the teacher has not read; see `Alignment.is_read_BT`."""
        return mask_BT if self.alignment is None else mask_BT & self.alignment.is_read_BT

    def on_students_tokens(self, values: Tensor) -> Tensor:
        """Values of the scores' tokens on the student's tokens, `[B, T]`; see `Alignment.on_students_tokens`."""
        return values if self.alignment is None else self.alignment.on_students_tokens(values)

    def at_students_states(self, values: Tensor) -> Tensor:
        """Values of the scores' states at the student's states, `[B, T+1]`; see `Alignment.at_students_states`."""
        return values if self.alignment is None else self.alignment.at_students_states(values)

    def rows(self, selected: slice) -> "TeacherScores":
        """The scores of the selected completions."""
        return self._each(lambda tensor: tensor[selected])

    def spread(self, rows_b: Tensor, batch_size: int) -> "TeacherScores":
        """The scores of completions `rows_b` among all B, 0 for the others."""
        return self._each(lambda tensor: tensor.new_zeros(batch_size, *tensor.shape[1:]).index_copy(0, rows_b, tensor))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "TeacherScores":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: change(v) if isinstance(v, Tensor) else v for name, v in values.items()}
        if self.alignment is not None:
            changed["alignment"] = self.alignment.each(change)
        return TeacherScores(**changed)


def readable_by_all(scores: Sequence[TeacherScores]) -> Tensor | None:
    """Whether all teachers have tokens for a completion's text, `[B]`; None if they have the student's tokens."""
    readable = [of_scorer.alignment.readable_B for of_scorer in scores if of_scorer.alignment is not None]
    return torch.stack(readable).all(dim=0) if readable else None


def weighted_mean(tensors: Iterable[Tensor], scores: Sequence[TeacherScores]) -> Tensor:
    """The mean over scorers of what was computed from the scores of each, `[B, …]`, by their weights."""
    return sum(of_scorer.weight * tensor for of_scorer, tensor in zip(scores, tensors, strict=True))


def mean_scores(scores: Sequence[TeacherScores]) -> TeacherScores:
    """Each statistic's weighted mean over scorers (teachers and templates); None where a scorer lacks it.

    All scores are of the student's own tokens.
    """
    means = {}
    for name in (field.name for field in fields(TeacherScores) if field.name not in ("weight", "alignment")):
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
