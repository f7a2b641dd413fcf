"""Two tokenisations of one text: their smallest common spans, and sums of token values over them.

A token's end is the number of characters that have been read after it. A common span begins and ends where a token of
either side ends, and no smaller one within it does. Shapes: T tokens of the student, U of the teacher.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rlkd_trl.ops.masking import masked

_ROUNDING = -1e-6  # a teacher's log-probability above it is one of float32's rounding
NO_SPAN = -1  # as the last token of a token's span: it is in none
INSIDE = -1  # as a token's end: it ends within a character, or where the text read so far is not the text's beginning


def common_ends(first_ends: Sequence[int], second_ends: Sequence[int]) -> list[tuple[int, int]]:
    """Numbers of tokens (i, j) after which both sides have read the same text: the ends of the common spans.

    Both sequences do not decrease, but for tokens that are `INSIDE`, and their last ends are the same. A token without
    characters of its own belongs to the span of the token before it, and one at the very beginning to the first span.
    Each span has a token of either side; if one side has no token at all, there is no span.
    """
    firsts = {end: number for number, end in enumerate(first_ends, start=1) if end != INSIDE}
    seconds = {end: number for number, end in enumerate(second_ends, start=1) if end != INSIDE}
    pairs, i, j = [], 0, 0
    for end, next_i in firsts.items():
        next_j = seconds.get(end, 0)
        if next_i > i and next_j > j:
            pairs.append((next_i, next_j))
            i, j = next_i, next_j
    return pairs


def receivers(spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """For each token of the first and of the second side, the index of the last token of its span on the first side.

    A reward of the second side that is put there is earned when its text is complete: every token of the span has it
    in its return, and no later one.
    """
    firsts, seconds = [], []
    for (i, j), (next_i, next_j) in itertools.pairwise([(0, 0), *spans]):
        firsts += [next_i - 1] * (next_i - i)
        seconds += [next_i - 1] * (next_j - j)
    return firsts, seconds


def states_before(spans: Sequence[tuple[int, int]], length: int) -> list[int]:
    """For each of `length + 1` states of the first side, the second side's state at the beginning of its span.

    State t is the one after t tokens. Behind the last span it is the state after all tokens.
    """
    states: Iterator[int] = itertools.chain.from_iterable(
        [j] * (next_i - i) for (i, j), (next_i, _) in itertools.pairwise([(0, 0), *spans])
    )
    final = spans[-1][1] if spans else 0
    return [*itertools.islice(itertools.chain(states, itertools.repeat(final)), length + 1)]


def summed_at(values_BU: Tensor, receiver_BU: Tensor, mask_BU: Tensor, *, length: int) -> Tensor:
    """Σ over the real tokens u with receiver t, `[B, length]`; a completion's sum stays what it is."""
    sums_BT = torch.zeros(len(values_BU), length, dtype=values_BU.dtype, device=values_BU.device)
    return sums_BT.scatter_add(1, receiver_BU, masked(values_BU, mask_BU))


def span_divergences(
    teacher_logps_BT: Tensor,
    student_logps_BT: Tensor,
    last_BT: Tensor,
    mask_BT: Tensor,
    learnt_BT: Tensor,
    *,
    divergence: Callable[[Tensor, Tensor], Tensor],
    temperature: float = 1.0,
) -> Tensor:
    """τ D( (P^(1/τ), 1 − P^(1/τ)) ‖ (Q^(1/τ), 1 − Q^(1/τ)) ) of each common span.

    P and Q are the teacher's and the student's probability of it, τ the temperature.

    Minixhofer, Vulić & Ponti 2025, "Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching"
    ("ALM"): the binarised f-divergence of aligned chunks, τ = 100 there. It is 0 where P = Q and positive elsewhere.

    At τ = 1 it is never larger than a divergence over all tokens, and almost 0 where P and Q are both small, however
    different: on its own samples a student without any idea, whose every Q is small, has hardly a loss. For τ → ∞ the
    forward KL tends to p log(p / q) − p + q with p = −log P and q = −log Q, where small probabilities count as much as
    large ones.

    Args:
        teacher_logps_BT: log P of each span at its last token, as `summed_at` puts it there.
        student_logps_BT: log q of each token of the student, which get the gradient; precise near 0 (see
            `lm_head.token_log_probs`), as the gradient of log(1 − Q) is −Q / (1 − Q).
        last_BT: of each token the last one of its span; `NO_SPAN` for tokens in none, which are left out.
        learnt_BT: True on tokens that may be learnt; a span with others is left out.
        divergence: of two sets of log-probabilities `[n, 2]`, `[n]`.
        temperature: τ > 0.

    Returns:
        `[B, T]`, each span's at its last token, 0 elsewhere.
    """
    T = mask_BT.shape[1]
    mask_BT, last_BT = mask_BT & (last_BT != NO_SPAN), last_BT.clamp(min=0)
    unlearnt_BT = summed_at((~learnt_BT).float(), last_BT, mask_BT, length=T)
    is_last_BT = mask_BT & (last_BT == torch.arange(T, device=last_BT.device)) & (unlearnt_BT == 0)
    spans_BT = summed_at(student_logps_BT, last_BT, mask_BT, length=T)
    # In float64: two powers 1/τ of float32's probabilities differ in its last digits only.
    student_n = spans_BT[is_last_BT].double()
    teacher_n = teacher_logps_BT[is_last_BT].clamp(max=_ROUNDING).double()
    teacher_n = torch.where(_differ_by_rounding(teacher_n, student_n.detach()), student_n.detach(), teacher_n)
    of_two = (in_two_log_probs(logps_n / temperature) for logps_n in (teacher_n, student_n))
    divergences_n = temperature * divergence(*of_two)
    return torch.zeros_like(spans_BT).masked_scatter(is_last_BT, divergences_n.to(spans_BT.dtype))


def _differ_by_rounding(logps_n: Tensor, others_n: Tensor) -> Tensor:
    """Whether two log-probabilities may be one, read twice in float32, of which the gradient is 0 (compare `tvd`)."""
    eps = torch.finfo(torch.float32).eps
    return (logps_n - others_n).abs() <= 2 * eps + 256 * eps * torch.maximum(logps_n.abs(), others_n.abs())


def in_two_log_probs(logps: Tensor) -> Tensor:
    """(log p, log(1 − p)) of log-probabilities, `[..., 2]`: "the text goes on so" and "otherwise".

    p is kept e^−69 below 1, where the gradient of log(1 − p) is not finite.
    """
    logps = logps.clamp(max=-1e-30)
    return torch.stack([logps, torch.log(-torch.expm1(logps))], dim=-1)
