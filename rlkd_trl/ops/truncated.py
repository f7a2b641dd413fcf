"""Distillation from a teacher of whom k ids and the mass of all others are known at each position.

Notation as in `ops.divergences`. `top_ids_Nk` are the ids known one by one. A distribution over k + 1 outcomes
is made of them and of "any other id", and a divergence is taken between these:

    D̃(p, q) = D( (p_1, …, p_k, r), (q_1, …, q_k, s) ),   r = 1 − Σ_i p_i,   s = 1 − Σ_i q_i.

For k = V it is D(p, q). For less it is a lower bound, since no divergence here grows when outcomes are merged (the
data-processing inequality of f-divergences, which mixtures obey too). What is missing is how p and q differ among the
other ids; of the forward KL exactly

    D(p, q) − D̃(p, q) = r · KL( p_rest / r ‖ q_rest / s ) ≤ r · ( log min(1, p_k / r) + log s − min_v log q_v ),

p_k the smallest of the known probabilities, v the other ids; of total variation at most min(r, s). So the student is
told how much mass the other ids have, never that it is spread evenly, or 0, as when p is cut at k and renormalised.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from rlkd_trl.ops.divergences import distillation_loss, log_probs
from rlkd_trl.ops.lm_head import MAX_SLICE_ELEMENTS
from rlkd_trl.ops.sliced_loss import LossAndMetrics, weighted_sliced_loss

# In place of the −3e38 of `ops.divergences`, so that a file can hold it: differences to that overflow in a gradient.
LOG_0 = -1e14


def top_ids(logps_NV: Tensor, k: int) -> Tensor:
    """The k most likely ids of each position, `[N, k]`, the most likely first."""
    return logps_NV.topk(k, dim=-1).indices


def merged(logps_NV: Tensor, top_ids_Nk: Tensor) -> Tensor:
    """The log-probabilities of the k ids, and of any other id at the end, `[N, k+1]`; `LOG_0` for none.

    The last is log Σ p of the other ids and not log(1 − Σ p_i), which rounding would spoil where p_1 is almost 1.
    """
    lowest = torch.finfo(logps_NV.dtype).min
    rest_N1 = logps_NV.scatter(-1, top_ids_Nk, lowest).logsumexp(dim=-1, keepdim=True)
    return torch.cat([logps_NV.gather(-1, top_ids_Nk), rest_N1], dim=-1).clamp(min=LOG_0)


def truncated_distillation_loss(
    student_logits_NV: Tensor,
    top_ids_Nk: Tensor,
    teacher_logps_Nk1: Tensor,
    weights_N: Tensor,
    labels_N: Tensor | None = None,
    *,
    divergence: Callable[[Tensor, Tensor], Tensor],
    temperature: float = 1.0,
    alpha: float = 1.0,
    forbidden_V: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`distillation_loss` with D̃ of the module's head in place of D.

    Args:
        teacher_logps_Nk1: `merged` log-probabilities of the teacher, at `temperature` and over the ids that are not
            forbidden; constants.
        The others are those of `distillation_loss`.

    Raises:
        ValueError: As `distillation_loss`.
    """
    loss, metrics = 0.0, {}
    if alpha > 0:
        student_logps_NV = log_probs(student_logits_NV, temperature=temperature, forbidden_V=forbidden_V)
        student_logps_Nk1 = merged(student_logps_NV, top_ids_Nk)
        metrics["divergence"] = (weights_N * divergence(teacher_logps_Nk1, student_logps_Nk1)).sum()
        loss = loss + alpha * temperature**2 * metrics["divergence"]
    if alpha < 1:
        cross_entropy, of_labels = distillation_loss(
            student_logits_NV, [], weights_N, labels_N, divergence=divergence, alpha=0.0, forbidden_V=forbidden_V
        )
        loss, metrics = loss + (1 - alpha) * cross_entropy, metrics | of_labels
    return loss, {name: value.detach() for name, value in metrics.items()}


def sliced_truncated_divergence(
    hidden_ND: Tensor,
    head: Callable[[Tensor], Tensor],
    head_parameters: Iterable[Tensor],
    top_ids_Nk: Tensor,
    teacher_logps_Nk1: Tensor,
    weights_N: Tensor,
    labels_N: Tensor | None = None,
    *,
    divergence: Callable[[Tensor, Tensor], Tensor],
    vocab_size: int,
    temperature: float = 1.0,
    alpha: float = 1.0,
    forbidden_V: Tensor | None = None,
    max_elements: int = MAX_SLICE_ELEMENTS,
) -> LossAndMetrics:
    """`truncated_distillation_loss` of the student's states, slice by slice, as `sliced_divergence`.

    Positions with weight 0 are left out, whatever stands there.
    """
    kept_N = weights_N.nonzero().squeeze(-1)
    labels_n = [] if labels_N is None else [labels_N[kept_N]]

    def per_slice(student_logits_nV, weights_n, top_ids_nk, teacher_logps_nk1, *labels_n):
        return truncated_distillation_loss(
            student_logits_nV,
            top_ids_nk,
            teacher_logps_nk1,
            weights_n,
            *labels_n,
            divergence=divergence,
            temperature=temperature,
            alpha=alpha,
            forbidden_V=forbidden_V,
        )

    return weighted_sliced_loss(
        head,
        head_parameters,
        hidden_ND[kept_N],
        per_slice,
        weights_N[kept_N],
        top_ids_Nk[kept_N],
        teacher_logps_Nk1[kept_N],
        *labels_n,
        vocab_size=vocab_size,
        max_elements=max_elements,
    )
