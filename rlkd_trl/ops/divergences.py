"""How far the student's next-token distribution is from the teacher's, and the distillation loss made of it.

Notation: p is the teacher's distribution over the vocabulary at one position, q the student's. A divergence takes
their log-probabilities `[N, V]`, teacher first, and returns `[N]`, in nats (total variation has no unit). It is not
symmetric in general: forward KL makes q cover all of p's mass, reverse KL makes q stay where p has mass.

Ids that are never sampled (`forbidden_V`) have a log-probability of about −3e38 in both: probability 0, difference 0,
and nothing that could turn into NaN. The teacher's log-probabilities are constants for the caller to detach.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlkd_trl.ops.lm_head import MAX_SLICE_ELEMENTS
from rlkd_trl.ops.sliced_loss import LossAndMetrics, weighted_sliced_loss


def log_probs(logits_NV: Tensor, *, temperature: float = 1.0, forbidden_V: Tensor | None = None) -> Tensor:
    """log softmax(z / T) over the ids that are not forbidden (Hinton et al. 2015, eq. 1), `[N, V]`, at least float32.

    A forbidden id gets about −3e38.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0; got {temperature}")
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if temperature != 1:
        logits_NV = logits_NV / temperature
    if forbidden_V is not None:
        logits_NV = logits_NV.masked_fill(forbidden_V, torch.finfo(torch.float32).min)
    return logits_NV.log_softmax(dim=-1)


# ---- divergences


def forward_kl(teacher_logps_NV: Tensor, student_logps_NV: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_v p (log p − log q).

    Word-level knowledge distillation (Kim & Rush 2016, L_WORD-KD), whose cross-entropy −Σ_v p log q differs from it by
    the teacher's entropy, a constant.
    """
    return (teacher_logps_NV.exp() * (teacher_logps_NV - student_logps_NV)).sum(dim=-1)


def reverse_kl(teacher_logps_NV: Tensor, student_logps_NV: Tensor) -> Tensor:
    """KL(q ‖ p) = Σ_v q (log q − log p).

    What MiniLLM minimises over the student's own samples (Gu et al. 2024, eq. 1), here exactly and per token.
    """
    return forward_kl(student_logps_NV, teacher_logps_NV)


def jsd(teacher_logps_NV: Tensor, student_logps_NV: Tensor, *, beta: float = 0.5) -> Tensor:
    """Generalised Jensen–Shannon divergence (Agarwal et al. 2024, "GKD", D_JSD(β)):

    JSD_β = β KL(p ‖ m) + (1−β) KL(q ‖ m),  m = β p + (1−β) q.

    By that equation the divergence is 0 at both ends of β. As in TRL, the ends are what JSD_β / β and JSD_β / (1−β)
    tend to: β = 0 is forward KL, β = 1 reverse KL. So small β is not near β = 0 in scale: JSD_β ≈ β KL(p ‖ q).
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1]; got {beta}")
    if beta == 0:
        return forward_kl(teacher_logps_NV, student_logps_NV)
    if beta == 1:
        return reverse_kl(teacher_logps_NV, student_logps_NV)
    mixture_logps_NV = _log_mixture(teacher_logps_NV, student_logps_NV, beta)
    return beta * forward_kl(teacher_logps_NV, mixture_logps_NV) + (1 - beta) * forward_kl(
        student_logps_NV, mixture_logps_NV
    )


def tvd(teacher_logps_NV: Tensor, student_logps_NV: Tensor) -> Tensor:
    """Total variation distance ½ Σ_v |p − q|, in [0, 1] (Wen et al. 2023, "f-Divergence Minimization", TVD).

    Its gradient does not shrink as q tends to p, only at q = p is it 0. Rounding must not hide that: the same model,
    read in two batches, differs from itself in the last digits, and the sign of such a difference alone would make a
    gradient of full size. So log p and log q count as equal if they are within 256 units in the last place of 1
    (3e-5 in float32).
    """
    rounding = 256 * torch.finfo(student_logps_NV.dtype).eps
    differ_NV = (teacher_logps_NV - student_logps_NV).abs() > rounding
    return 0.5 * (differ_NV * (teacher_logps_NV.exp() - student_logps_NV.exp())).abs().sum(dim=-1)


def skew_kl(teacher_logps_NV: Tensor, student_logps_NV: Tensor, *, skew: float = 0.1) -> Tensor:
    """KL(p ‖ α p + (1−α) q) with α = `skew` (Ko et al. 2024, "DistiLLM", SKL; α = 0.1 there).

    It is at most −log α, even where q is almost 0 and p is not. α = 0 is forward KL.
    """
    _check_skew(skew)
    if skew == 0:
        return forward_kl(teacher_logps_NV, student_logps_NV)
    return forward_kl(teacher_logps_NV, _log_mixture(teacher_logps_NV, student_logps_NV, skew))


def skew_reverse_kl(teacher_logps_NV: Tensor, student_logps_NV: Tensor, *, skew: float = 0.1) -> Tensor:
    """KL(q ‖ (1−α) p + α q) with α = `skew` (Ko et al. 2024, "DistiLLM", SRKL; α = 0.1 there).

    α = 0 is reverse KL.
    """
    _check_skew(skew)
    if skew == 0:
        return reverse_kl(teacher_logps_NV, student_logps_NV)
    return forward_kl(student_logps_NV, _log_mixture(student_logps_NV, teacher_logps_NV, skew))


def _log_mixture(logps_NV: Tensor, other_logps_NV: Tensor, share: float) -> Tensor:
    """log( w p + (1−w) p' ) for a share w in (0, 1) of the first."""
    return torch.logaddexp(logps_NV + math.log(share), other_logps_NV + math.log1p(-share))


def _check_skew(skew: float) -> None:
    if not 0 <= skew < 1:
        raise ValueError(f"skew must lie in [0, 1), at 1 nothing is left to learn; got {skew}")


# Each takes log-probabilities (teacher, student); bind `beta` or `skew` with functools.partial.
DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "tvd": tvd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
}


# ---- several teachers as one


def mean_of_probabilities(
    logits_KNV: Sequence[Tensor],
    weights_K: Sequence[float | Tensor],
    *,
    temperature: float = 1.0,
    forbidden_V: Tensor | None = None,
) -> Tensor:
    """log Σ_k w_k softmax(z_k / T): the arithmetic mean of K teachers (Hinton et al. 2015), `[N, V]`.

    `weights_K` are divided by their sum; each is a number, or `[N]` where it differs from position to position.
    """
    shares_K = _shares(logits_KNV, weights_K)
    return functools.reduce(
        torch.logaddexp,
        (
            log_probs(logits_NV, temperature=temperature, forbidden_V=forbidden_V)
            + (share.log() if isinstance(share, Tensor) else math.log(share))
            for logits_NV, share in zip(logits_KNV, shares_K, strict=True)
        ),
    )


def mean_of_logits(
    logits_KNV: Sequence[Tensor],
    weights_K: Sequence[float | Tensor],
    *,
    temperature: float = 1.0,
    forbidden_V: Tensor | None = None,
) -> Tensor:
    """log softmax(Σ_k w_k z_k / T): the geometric mean of K teachers, renormalised (Hinton et al. 2015), `[N, V]`.

    `weights_K` as in `mean_of_probabilities`.
    """
    shares_K = _shares(logits_KNV, weights_K)
    mean_NV = sum(
        share * logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        for logits_NV, share in zip(logits_KNV, shares_K, strict=True)
    )
    return log_probs(mean_NV, temperature=temperature, forbidden_V=forbidden_V)


def _shares(logits_KNV: Sequence[Tensor], weights_K: Sequence[float | Tensor]) -> list[float | Tensor]:
    """The weights over their sum: numbers, or `[N, 1]` each."""
    numbers = [weight for weight in weights_K if not isinstance(weight, Tensor)]
    if not logits_KNV or len(logits_KNV) != len(weights_K) or min(numbers, default=1) <= 0:
        raise ValueError(
            f"need one weight > 0 for each of at least one teacher; got {weights_K} for {len(logits_KNV)}"
        )
    total = sum(weights_K)
    shares_K = [weight / total for weight in weights_K]
    return [share[:, None] if isinstance(share, Tensor) else share for share in shares_K]


ENSEMBLES: dict[str, Callable[..., Tensor]] = {
    "probabilities": mean_of_probabilities,
    "logits": mean_of_logits,
}


# ---- the loss


def distillation_loss(
    student_logits_NV: Tensor,
    teacher_logits_KNV: Sequence[Tensor],
    weights_N: Tensor,
    labels_N: Tensor | None = None,
    *,
    divergence: Callable[[Tensor, Tensor], Tensor],
    temperature: float = 1.0,
    alpha: float = 1.0,
    teacher_weights_K: Sequence[float | Tensor] | None = None,
    ensemble: Callable[..., Tensor] = mean_of_probabilities,
    forbidden_V: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Soft and hard targets, mixed (Hinton et al. 2015, "soft targets"):

    Σ_n w_n ( α T² D(p_T, q_T) + (1−α) (−log q_1(y_n)) ).

    p_T and q_T are at temperature T, the hard term at 1. Soft gradients of a KL shrink as 1/T², which the factor T²
    takes back, so that α means the same at every T; it is there for every divergence.

    Args:
        teacher_logits_KNV: K tensors `[N, V']`. Head rows beyond the smallest V' or V are padding: they are left out,
            as forbidden ids are, on both sides.
        weights_N: The weight w_n of each position, e.g. mask / number of tokens in the batch; constants. The logits of
            all N positions must be finite, also where the weight is 0: leave such positions out beforehand.
        labels_N: Hard labels, needed for alpha < 1; allowed ids.
        forbidden_V: True on ids that are left out; at least as long as the smallest vocabulary.

    Returns:
        The loss and its parts, Σ_n w_n D (without T²) as `divergence` and Σ_n w_n (−log q_1(y_n)) as
        `cross_entropy`, each only where alpha gives it a share.

    Raises:
        ValueError: alpha outside [0, 1], temperature ≤ 0, weights that do not fit the teachers, missing or forbidden
            labels.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1]; got {alpha}")
    V = min(logits.shape[-1] for logits in (student_logits_NV, *teacher_logits_KNV))
    forbidden_V = None if forbidden_V is None else forbidden_V[:V]
    log_probs_at = functools.partial(log_probs, student_logits_NV[:, :V], forbidden_V=forbidden_V)
    student_logps_NV = log_probs_at(temperature=temperature)
    loss, metrics = 0.0, {}
    if alpha > 0:
        with torch.no_grad():
            teacher_logps_NV = ensemble(
                [logits_NV[:, :V] for logits_NV in teacher_logits_KNV],
                teacher_weights_K or [1.0] * len(teacher_logits_KNV),
                temperature=temperature,
                forbidden_V=forbidden_V,
            )
        metrics["divergence"] = (weights_N * divergence(teacher_logps_NV, student_logps_NV)).sum()
        loss = loss + alpha * temperature**2 * metrics["divergence"]
    if alpha < 1:
        if labels_N is None:
            raise ValueError(f"alpha = {alpha} gives hard labels a share, but there are none")
        if forbidden_V is not None and forbidden_V[labels_N].any():
            raise ValueError(f"labels contain forbidden ids: {labels_N[forbidden_V[labels_N]].unique().tolist()}")
        hard_logps_NV = student_logps_NV if temperature == 1 else log_probs_at()
        logps_N = hard_logps_NV.gather(-1, labels_N[:, None]).squeeze(-1)
        metrics["cross_entropy"] = -(weights_N * logps_N).sum()
        loss = loss + (1 - alpha) * metrics["cross_entropy"]
    return loss, {name: value.detach() for name, value in metrics.items()}


class TeacherStates(NamedTuple):
    """A teacher's hidden states at the student's N positions, `[N, D']`, its LM head, and its share in an ensemble.

    The share is a number, or `[N]` where it differs from position to position.
    """

    hidden_ND: Tensor
    head: Callable[[Tensor], Tensor]
    weight: float | Tensor = 1.0


def cut_with_states(teachers: Sequence[TeacherStates]) -> list[Tensor]:
    """The tensors of N positions that a loss in slices has to cut: all teachers' states, then their `[N]` weights."""
    weights = [teacher.weight for teacher in teachers if isinstance(teacher.weight, Tensor)]
    return [*(teacher.hidden_ND for teacher in teachers), *weights]


def of_slice(teachers: Sequence[TeacherStates], cut: Sequence[Tensor]) -> tuple[list[Tensor], list[float | Tensor]]:
    """K states `[n, D']` and K weights, of a slice of what `cut_with_states` returned."""
    states, weights = list(cut[: len(teachers)]), iter(cut[len(teachers) :])
    return states, [next(weights) if isinstance(t.weight, Tensor) else t.weight for t in teachers]


@torch.no_grad()
def teacher_logits(teachers: Sequence[TeacherStates], hidden_KnD: Sequence[Tensor]) -> list[Tensor]:
    """Each teacher's logits `[n, V']` of n of its states; in its own precision, whatever the student's autocast."""
    with torch.autocast(hidden_KnD[0].device.type, enabled=False):
        return [teacher.head(hidden_nD) for teacher, hidden_nD in zip(teachers, hidden_KnD, strict=True)]


def sliced_divergence(
    hidden_ND: Tensor,
    head: Callable[[Tensor], Tensor],
    head_parameters: Iterable[Tensor],
    teachers: Sequence[TeacherStates],
    weights_N: Tensor,
    labels_N: Tensor | None = None,
    *,
    divergence: Callable[[Tensor, Tensor], Tensor],
    vocab_size: int,
    temperature: float = 1.0,
    alpha: float = 1.0,
    ensemble: Callable[..., Tensor] = mean_of_probabilities,
    forbidden_V: Tensor | None = None,
    max_elements: int = MAX_SLICE_ELEMENTS,
) -> LossAndMetrics:
    """`distillation_loss` of student and teacher states, slice by slice: no model's whole `[N, V]` is ever in memory.

    Positions with weight 0 are left out, whatever stands there (NaN, a label of −100). Gradients reach `hidden_ND`
    and `head_parameters` (see `sliced_loss`), never a teacher.

    Args:
        head: Logits `[n, V]` of hidden states `[n, D]`, a function of its argument and `head_parameters` alone.
        head_parameters: The head's parameters; those that do not require a gradient get none.
        teachers: May be empty for alpha = 0.
        weights_N: ≥ 0, e.g. mask / number of tokens in the batch.
        vocab_size: Columns of the student's logits, for the size of a slice.
        max_elements: Logits in a slice; memory is a few times that.
    """
    kept_N = weights_N.nonzero().squeeze(-1)
    labels_n = [] if labels_N is None else [labels_N[kept_N]]

    def per_slice(student_logits_nV, weights_n, *labels_and_teachers_n):
        cut = labels_and_teachers_n[len(labels_n) :]
        hidden_KnD, teacher_weights_K = of_slice(teachers, cut)
        return distillation_loss(
            student_logits_nV,
            teacher_logits(teachers, hidden_KnD) if teachers else [],
            weights_n,
            *labels_and_teachers_n[: len(labels_n)],
            divergence=divergence,
            temperature=temperature,
            alpha=alpha,
            teacher_weights_K=teacher_weights_K,
            ensemble=ensemble,
            forbidden_V=forbidden_V,
        )

    return weighted_sliced_loss(
        head,
        head_parameters,
        hidden_ND[kept_N],
        per_slice,
        weights_N[kept_N],
        *labels_n,
        *(tensor_N[kept_N.to(tensor_N.device)] for tensor_N in cut_with_states(teachers)),
        vocab_size=vocab_size,
        max_elements=max_elements,
    )
