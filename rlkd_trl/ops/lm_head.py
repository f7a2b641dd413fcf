"""Per-token statistics of an LM head's logits, taken in slices of positions.

The methods need a few scalars per token, never the logits. The head is applied to as many positions at a time as fit
`max_elements` logits, so the peak memory of scoring does not grow with T × V. Logits are upcast to float32 before any
statistic, whatever the model's dtype.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import threshold_
from torch.utils.checkpoint import checkpoint

from rlkd_trl.ops.masking import masked

# 2**24 float32 logits: 64 MiB. At V = 32,128 that is 522 positions a slice.
MAX_SLICE_ELEMENTS = 2**24
# On a CPU 8 MiB: such a slice stays in the cache from the head to the statistics. Used without gradients only: with
# them each slice is computed a second time, and many small slices would cost more.
_MAX_SLICE_ELEMENTS_CPU = 2**21
# Where several passes go over the same logits, they take a block of 16 MiB at a time, which bounds the memory for
# intermediate results; on a CPU 2 MiB, which stay in the cache.
BLOCKS_IN_A_SLICE = 4
_BLOCK_ELEMENTS = MAX_SLICE_ELEMENTS // BLOCKS_IN_A_SLICE
_BLOCK_ELEMENTS_CPU = _MAX_SLICE_ELEMENTS_CPU // BLOCKS_IN_A_SLICE
# Stands for −∞: its product with a probability of 0 is 0, not NaN.
_LOWEST = torch.finfo(torch.float32).min / 2
# A probability below e^−75 of the largest may be a subnormal float, which makes a CPU several times slower; in the
# softmax it is set to 0. log π of the chosen id is not affected.
_LEAST_LOG_PROB = -75.0


class LogitStatistics(NamedTuple):
    """Statistics of z ∈ R^V at N positions, each `[N]` float32.

    chosen: z[y]. mean: mean_v z. max: max_v z. logsumexp: log Σ_v exp z. expected: Σ_v softmax(z)_v z_v.
    soft: τ log Σ_v exp(z/τ). The last two are None unless asked for.
    """

    chosen: Tensor
    mean: Tensor
    max: Tensor
    logsumexp: Tensor
    expected: Tensor | None = None
    soft: Tensor | None = None


class TokenLogProbs(NamedTuple):
    """log π(y) and the entropy −Σ_v π_v log π_v, in nats, at N positions: each `[N]` float32.

    The entropy is None where the caller did not want it.
    """

    logps: Tensor
    entropy: Tensor | None


def logit_statistics(
    logits_NV: Tensor, chosen_N: Tensor, *, expected: bool = False, tau: float | None = None
) -> LogitStatistics:
    """The scalars that every reward of the package is made of, from the logits of one slice."""
    z_NV = logits_NV.float()
    mean_N = z_NV.mean(dim=-1)
    expected_N = None
    if expected:
        # Around the mean: softmax sums to 1 only up to rounding, which a large common offset would magnify.
        expected_N = (z_NV.softmax(dim=-1) * (z_NV - mean_N[:, None])).sum(dim=-1) + mean_N
    z_max_N = z_NV.amax(dim=-1)
    # log Σ exp z = max z − log softmax(z)[argmax]: torch's log-softmax is one pass over z, its `logsumexp` four.
    log_softmax_max_N = z_NV.log_softmax(dim=-1).amax(dim=-1)
    return LogitStatistics(
        chosen=z_NV.gather(-1, chosen_N[:, None]).squeeze(-1),
        mean=mean_N,
        max=z_max_N,
        logsumexp=z_max_N - log_softmax_max_N,
        expected=expected_N,
        soft=None if tau is None else tau * (z_NV / tau).logsumexp(dim=-1),
    )


def allowed_logsumexp(logits_NV: Tensor, forbidden_V: Tensor) -> Tensor:
    """log Σ_v exp z_v over the ids that are not forbidden, `[N]` float32; ids beyond `forbidden_V` are padding.

    z_y minus this is log p(y) over the ids that may be sampled, for the teacher what `token_log_probs` is for the
    student.
    """
    V = min(logits_NV.shape[-1], len(forbidden_V))
    z_NV = logits_NV[:, :V].float().masked_fill(forbidden_V[:V], -torch.inf)
    return z_NV.logsumexp(dim=-1)


def token_log_probs(
    logits_NV: Tensor,
    chosen_N: Tensor,
    *,
    temperature: float = 1.0,
    forbidden_V: Tensor | None = None,
    entropy: bool = True,
    overwrite: bool = False,
    precise: bool = False,
    block_elements: int | None = None,
) -> TokenLogProbs:
    """log π(y) and entropy of π = softmax(z / temperature), renormalised over the ids that are not forbidden.

    `forbidden_V` (bool) marks ids that are never sampled, e.g. T5's sentinels and its padded vocabulary rows. A
    forbidden `chosen` id gets a log-probability of about −2e38, not an error.

    With `overwrite`, π and later its gradient are written over float32 logits instead of into new memory. Then nothing
    else may read the logits, not even the backward pass of the operation that made them, and there can be one backward
    pass only.

    With `precise`, which costs another pass over π and is without the entropy, log π(y) near 0 has all its digits, and
    so has its gradient: both come from Σ_{v≠y} π_v, as 1 − π(y) is 0 in float32 where y leads by 17 nats.
    """
    if precise and entropy:
        raise ValueError("precise log-probabilities come without the entropy: set entropy=False")
    settings = (temperature, forbidden_V, entropy, overwrite, precise, block_elements)
    return TokenLogProbs(*_TokenLogProbs.apply(logits_NV, chosen_N, *settings))


class _TokenLogProbs(torch.autograd.Function):
    """`token_log_probs`, which keeps only π for the backward pass; autograd would keep an `[N, V]` for each operation.

    ∂ log π(y) / ∂z_v = (1[v = y] − π_v) / temperature,   ∂H / ∂z_v = −π_v (log π_v + H) / temperature

    Both passes work on a block of positions at a time, so that beside the logits they need memory for one block.
    """

    @staticmethod
    def forward(ctx, logits_NV, chosen_N, temperature, forbidden_V, entropy, overwrite, precise, block_elements):
        z_NV = logits_NV.detach().float()
        if not overwrite and logits_NV.dtype == torch.float32:
            z_NV = z_NV.clone()
        forbidden_ids = None if forbidden_V is None else forbidden_V.nonzero()[:, 0]
        logps_N = z_NV.new_empty(len(z_NV))
        entropy_N = z_NV.new_empty(len(z_NV)) if entropy else None
        for block in _blocks(z_NV, block_elements):
            z_nV = z_NV[block]
            if temperature != 1.0:
                z_nV.div_(temperature)
            if forbidden_ids is not None:
                z_nV.index_fill_(-1, forbidden_ids, _LOWEST)
            # Relative to the largest, so that a large common offset of the logits costs no digits.
            z_nV.sub_(z_nV.amax(dim=-1, keepdim=True))
            z_chosen_n = z_nV.gather(-1, chosen_N[block, None]).squeeze(-1)
            threshold_(z_nV, _LEAST_LOG_PROB, _LOWEST)
            pi_nV = z_nV.softmax(dim=-1)
            log_normalizer_n = -pi_nV.amax(dim=-1).log()  # log Σ_v exp z_v: the largest z is 0
            logps_N[block] = z_chosen_n - log_normalizer_n
            if precise:
                others_n = pi_nV.scatter(-1, chosen_N[block, None], 0.0).sum(dim=-1)
                logps_N[block] = torch.where(others_n < 0.5, torch.log1p(-others_n), logps_N[block])
            if entropy:
                # H = log Σ exp z − Σ π z. A forbidden id's z is finite, so that π z is 0 there.
                entropy_N[block] = log_normalizer_n - z_nV.mul_(pi_nV).sum(dim=-1)
            if ctx.needs_input_grad[0]:
                z_nV.copy_(pi_nV)
        # The log-probability of a forbidden id is a constant, whatever its logit.
        is_free_N = None if forbidden_V is None else ~forbidden_V[chosen_N]
        ctx.save_for_backward(z_NV, chosen_N, entropy_N, is_free_N, logps_N if precise else None)
        ctx.temperature, ctx.dtype, ctx.overwrite = temperature, logits_NV.dtype, overwrite
        ctx.block_elements = block_elements
        ctx.set_materialize_grads(False)
        return logps_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, logps_grad_N, entropy_grad_N):
        pi_NV, chosen_N, entropy_N, is_free_N, precise_logps_N = ctx.saved_tensors
        grad_NV = pi_NV if ctx.overwrite else pi_NV.clone()
        for block in _blocks(grad_NV, ctx.block_elements):
            pi_nV = grad_NV[block]
            if entropy_grad_N is None:
                pi_nV.mul_(-logps_grad_N[block, None])
            else:
                # π log π is 0 where π is.
                grad_nV = torch.xlogy(pi_nV, pi_nV).addcmul_(pi_nV, entropy_N[block, None])
                grad_nV.mul_(-entropy_grad_N[block, None])
                if logps_grad_N is not None:
                    grad_nV.addcmul_(pi_nV, logps_grad_N[block, None], value=-1)
                pi_nV.copy_(grad_nV)
        if logps_grad_N is not None:
            chosen_grad_N = logps_grad_N if is_free_N is None else logps_grad_N * is_free_N
            if precise_logps_N is None:
                grad_NV.scatter_add_(-1, chosen_N[:, None], chosen_grad_N[:, None])
            else:
                grad_NV.scatter_(-1, chosen_N[:, None], (-chosen_grad_N * torch.expm1(precise_logps_N))[:, None])
        if ctx.temperature != 1.0:
            grad_NV.div_(ctx.temperature)
        return grad_NV.to(ctx.dtype), None, None, None, None, None, None, None


def _blocks(rows_NV: Tensor, most: int | None) -> Iterator[slice]:
    """Slices of consecutive rows, each of at most so many logits but at least one row; None: as the device has it."""
    N, V = rows_NV.shape
    if most is None:
        most = _BLOCK_ELEMENTS_CPU if rows_NV.device.type == "cpu" else _BLOCK_ELEMENTS
    size = max(1, most // V)
    return (slice(first, first + size) for first in range(0, N, size))


def support_log_probs(
    logits_NV: Tensor, chosen_N: Tensor, support_Nk: Tensor, *, temperature: float = 1.0
) -> TokenLogProbs:
    """log π_S(y) and entropy of π_S = softmax(z / temperature) restricted to the k ids S of each position.

    For completions that a behaviour policy b sampled from its top k, S = top-k of b in each state. What was sampled
    from is b_S(y) = b(y) / b(S), and the ratio to weight it with is π_S(y) / b_S(y), both over the same S:

        E_{y~b_S}[ π_S(y) / b_S(y) · g(y) ] = Σ_{y∈S} π_S(y) g(y) = E_{y~π_S}[ g(y) ]        for every g,

    which is exact importance sampling, since b_S > 0 wherever π_S > 0, and 1 as long as π = b. With
    g = ∇log π_S(y) · A it is the gradient of the policy π_S, and since Σ_{y∈S} ∇π_S(y) = 0 a baseline in A leaves
    the expectation as it is. Other choices do not have these properties:

    - π(y) / b_S(y) with π over the whole vocabulary (the papers' code) estimates Σ_{y∈S} A ∇π(y), as if all other
      tokens were worth 0. At π = b this ratio is π(S) < 1, and any constant c added to A adds c ∇π(S): where returns
      are negative, as teacher-forcing rewards are, it moves probability out of S to tokens that were never scored.
    - S as the top k of the current π is another set than the one sampled from: tokens of b's S that have left it
      would get probability 0, and tokens that entered it are never sampled (no ratio can make up for that).

    Neither log π_S nor its entropy has a gradient that raises or lowers π(S), the probability of S as a whole.
    """
    z_Nk = logits_NV.float().gather(-1, support_Nk) / temperature
    logps_Nk = z_Nk.log_softmax(dim=-1)
    # Exactly one id of S is the chosen one.
    logps_N = masked(logps_Nk, support_Nk == chosen_N[:, None]).sum(dim=-1)
    return TokenLogProbs(logps_N, -(logps_Nk.exp() * logps_Nk).sum(dim=-1))


def mixture_log_probs(
    student_NV: Tensor, teacher_NU: Tensor, *, weight: float, forbidden_V: Tensor, temperature: float = 1.0
) -> Tensor:
    """log p̃ over the C = min(V, U) ids that both LM heads have, `[N, C]` float32; −inf on forbidden ones.

    p̃(v) = weight · p(v) + (1 − weight) · q(v), with p = softmax(teacher's z / temperature) and q that of the student,
    both over the C ids without the forbidden ones: the teacher-mixed sampling of MiniLLM (Gu et al. 2024, §2.2; weight
    is the paper's α, 0.2). V and U differ between T5 models of one tokenizer, by padding rows behind its last id.
    """
    common = min(student_NV.shape[-1], teacher_NU.shape[-1])
    q_NC, p_NC = (
        (logits[:, :common].float() / temperature).masked_fill(forbidden_V[:common], -torch.inf).softmax(dim=-1)
        for logits in (student_NV, teacher_NU)
    )
    return (weight * p_NC + (1 - weight) * q_NC).log()


def slices_needed(positions: int, vocab_size: int, max_elements: int = MAX_SLICE_ELEMENTS) -> int:
    """The number of slices in which `map_head_slices` takes N positions; at least one."""
    return max(1, math.ceil(positions / max(1, max_elements // vocab_size)))


def map_head_slices(
    head: Callable[[Tensor], Tensor],
    hidden_ND: Tensor,
    per_slice: Callable[..., Sequence[Tensor | None]],
    *per_position: Tensor,
    vocab_size: int,
    max_elements: int | None = None,
    num_slices: int | None = None,
) -> list[Tensor | None]:
    """Applies `per_slice(head(hidden_nD), *per_position_n)` to slices of positions and concatenates each output.

    `head` maps `[n, D]` hidden states to `[n, V]` logits; `per_position` tensors are `[N, ...]`, sliced alongside. At
    most about `max_elements` logits exist at a time (by default `MAX_SLICE_ELEMENTS`, or fewer where that is faster),
    in the backward pass too: with several slices each is recomputed there instead of stored.

    `num_slices`, at least `slices_needed`, is how many times the head is applied, the last times to zero positions if
    there are too few. Processes that share a sharded head must all apply it equally often, with gradients.

    Returns one `[N]` tensor (or None) per output of `per_slice`.
    """
    if max_elements is None:
        in_cache = hidden_ND.device.type == "cpu" and not torch.is_grad_enabled()
        max_elements = _MAX_SLICE_ELEMENTS_CPU if in_cache else MAX_SLICE_ELEMENTS
    rows = max(1, max_elements // vocab_size)

    def one_slice(hidden_nD, *extra):
        return tuple(per_slice(head(hidden_nD), *extra))

    starts = range(0, rows * (num_slices or slices_needed(hidden_ND.shape[0], vocab_size, max_elements)), rows)
    recompute = torch.is_grad_enabled() and len(starts) > 1
    outputs = []
    for start in starts:
        arguments = [tensor[start : start + rows] for tensor in (hidden_ND, *per_position)]
        if recompute:
            outputs.append(checkpoint(one_slice, *arguments, use_reentrant=False))
        else:
            outputs.append(one_slice(*arguments))
    return [None if parts[0] is None else torch.cat(parts) for parts in zip(*outputs, strict=True)]
