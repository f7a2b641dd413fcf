"""The policy gradient with the expectation over actions taken exactly, given a teacher that scores every action.

The student π earns, in state s_t = (x, y_<t), the signal g(s_t, y_t) for the token y_t, and its objective is
J = E_{y~π} Σ_t g(s_t, y_t). With F_t = Σ_{i>t} g(s_i, y_i), the policy gradient theorem (Sutton et al. 2000) reads

    ∇J = E Σ_t Σ_a ∇π(a|s_t) ( g(s_t, a) + E[F_t | s_t, a] ).

A teacher's one forward pass gives g(s_t, a) for all a, so the first part needs no sampled action at all ("all-action"
policy gradient; Sutton, Singh & McAllester 2001, "Comparing Policy-Gradient Algorithms"; Ciosek & Whiteson 2018,
"Expected Policy Gradients"). Only the second is estimated from the sample, by the score function, from which a
baseline that does not depend on y_t may be subtracted:

    ∇J = E Σ_t [ ∇ Σ_a π(a|s_t) g(s_t, a)  +  (F_t − b_t) ∇ log π(y_t|s_t) ],

b_t the mean F_t of the other samples of the prompt. Where g holds −log π(a|s), its own gradient adds
−Σ_a π ∇log π = 0 to the first part and nothing to the second (F_t is a constant there, for the same reason).

For g = log p − log π the first part is the on-policy reverse KL, token by token, which is what GKD minimises with
JSD's β = 1 on student samples, and all of it is the reverse KL of whole sequences. MiniLLM (Gu et al. 2024,
single-step decomposition) splits the gradient of the latter in the same way; there F_t is divided by the number of
tokens that it sums over, has no baseline, and samples come from a mixture with the teacher. Between the two ends
stands a weight w on the second part, w = 0 being the per-token divergence and w = 1 the gradient of J; or a discount γ
inside of F_t; or that length normalisation. Only w = 1 with γ = 1 and without normalisation is unbiased for J,
as a sum over sequences; dividing it by the sampled number of tokens, as the trainer does, gives the bias of a ratio.

For the average reward J = E[Σ g] / E[T] (`ops.average_reward`) g becomes g − ρ: the first part stays as it is, since
Σ_a ∇π(a|s) ρ = 0, and F_t is the sum of g − ρ.

The future can use the whole vocabulary too. With ḡ(s) = Σ_a π(a|s) g(s, a), at the states that the sample visits,

    E[ Σ_{i>t} γ^{i−t} g(s_i, y_i) | s_t, y_t ] = E[ Σ_{i>t} γ^{i−t} ḡ(s_i) | s_t, y_t ],

since y_i is drawn from π(·|s_i) once s_i is given. So F̄_t = Σ_{i>t} γ^{i−t} ḡ(s_i) may stand for F_t at every w and γ:
the same expected gradient, without the noise of what y_i earned in its state (as expected SARSA has it for values; van
Seijen et al. 2009, "A Theoretical and Empirical Analysis of Expected Sarsa"). With one step left the variance is lower
by this argument; with more it was lower wherever we measured it (docs/results.md). Neither holds with length
normalisation, whose divisor depends on y_i, nor for samples of a mixture with the teacher.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from rlkd_trl.ops.advantages import leave_one_out, return_to_go
from rlkd_trl.ops.divergences import (
    TeacherStates,
    cut_with_states,
    log_probs,
    mean_of_probabilities,
    of_slice,
    teacher_logits,
)
from rlkd_trl.ops.lm_head import MAX_SLICE_ELEMENTS, map_head_slices
from rlkd_trl.ops.masking import masked
from rlkd_trl.ops.rewards import VALUES
from rlkd_trl.ops.sliced_loss import LossAndMetrics, weighted_sliced_loss


def future_returns(
    signals_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0, length_normalization: bool = False
) -> Tensor:
    """F_t = Σ_{i>t} γ^{i−t} g_i, `[B, T]`, 0 at and behind the last token.

    With `length_normalization` it is divided by the number of tokens after t (Gu et al. 2024, "MiniLLM",
    R^Norm_{t+1}): signals are mostly negative, and their sum would favour short completions.
    """
    returns_BT = return_to_go(signals_BT, mask_BT, gamma=gamma)
    future_BT = gamma * torch.nn.functional.pad(returns_BT[:, 1:], (0, 1))
    if length_normalization:
        tokens_after_BT = return_to_go(torch.ones_like(signals_BT), mask_BT) - 1
        future_BT = future_BT / tokens_after_BT.clamp(min=1)
    return masked(future_BT, mask_BT)


def future_advantages(
    futures_BT: Tensor, mask_BT: Tensor, *, num_generations: int, kept_B: Tensor | None = None
) -> Tensor:
    """F_t minus the mean F_t of the prompt's other samples at the same t, `[B, T]`, 0 behind the mask.

    A sample that has ended before t counts with F_t = 0. `kept_B` as in `ops.advantages.leave_one_out`.
    """
    advantages_BT = leave_one_out(masked(futures_BT, mask_BT), num_generations, kept_B=kept_B)
    return masked(advantages_BT, mask_BT)


def mixture_importance(
    student_logps_BT: Tensor, teacher_logps_BT: Tensor, mask_BT: Tensor, *, weight: float
) -> Tensor:
    """w_t = π(y_t|s_t) / p̃(y_t|s_t), p̃ = α p + (1−α) π with α = `weight`, `[B, T]`, 0 behind the mask.

    For completions sampled from p̃ (Gu et al. 2024, "MiniLLM", teacher-mixed sampling). As there, the ratio is per
    token: that earlier tokens came from p̃ too is not corrected for. At most 1 / (1−α).
    """
    student_logps_BT, teacher_logps_BT = (
        masked(logps_BT, mask_BT) for logps_BT in (student_logps_BT, teacher_logps_BT)
    )
    mixed_logps_BT = torch.logaddexp(teacher_logps_BT + math.log(weight), student_logps_BT + math.log1p(-weight))
    return masked((student_logps_BT - mixed_logps_BT).exp(), mask_BT)


def log_ratio_signal(
    teacher_logits_KNV: Sequence[Tensor],
    weights_K: Sequence[float | Tensor],
    *,
    ensemble: Callable[..., Tensor] = mean_of_probabilities,
    forbidden_V: Tensor | None = None,
) -> Tensor:
    """The teacher's part of g = log p − log π, `[N, V]`: log p over the ids that the student may sample.

    V is the smallest of the teachers' vocabularies and `len(forbidden_V)`: ids beyond it are padding rows of the
    larger LM heads.
    """
    sizes = [logits_NV.shape[-1] for logits_NV in teacher_logits_KNV]
    V = min(sizes if forbidden_V is None else [*sizes, len(forbidden_V)])
    logits_KNV = [logits_NV[:, :V] for logits_NV in teacher_logits_KNV]
    return ensemble(logits_KNV, weights_K, forbidden_V=None if forbidden_V is None else forbidden_V[:V])


def teacher_forcing_signal(
    teacher_logits_KNV: Sequence[Tensor], weights_K: Sequence[float | Tensor], *, value: str = "max"
) -> Tensor:
    """The teacher-forcing advantage g = f − V, `[N, V]`, its mean over K teachers (Hao, Liu & Mou 2022; LLMR).

    f are the centred logits, V their "max", their "expected" value under softmax(f), or "soft" = logsumexp f, for
    which g = log p. Its sum over a completion is that of r_t = q_t − V_{t+1} minus V_1, a constant of the prompt.

    Raises:
        ValueError: Unknown `value`.
    """
    if value not in VALUES:
        raise ValueError(f"value must be one of {VALUES}; got {value!r}")
    V = min(logits_NV.shape[-1] for logits_NV in teacher_logits_KNV)
    total, signal_NV = sum(weights_K), 0.0
    for logits_NV, weight in zip(teacher_logits_KNV, weights_K, strict=True):
        z_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        z_NV = z_NV - z_NV.amax(dim=-1, keepdim=True)  # a common offset cancels, but for rounding
        if value == "max":
            value_N1 = torch.zeros_like(z_NV[:, :1])
        elif value == "expected":
            value_N1 = (z_NV.softmax(dim=-1) * z_NV).sum(dim=-1, keepdim=True)
        else:
            value_N1 = z_NV.logsumexp(dim=-1, keepdim=True)
        share = weight / total
        share = share[:, None] if isinstance(share, Tensor) else share
        signal_NV = signal_NV + share * (z_NV - value_N1)[:, :V]
    return signal_NV


def all_actions_loss(
    student_logits_NV: Tensor,
    teacher_signal_NV: Tensor,
    weights_N: Tensor,
    chosen_N: Tensor,
    futures_N: Tensor,
    old_logps_N: Tensor,
    *,
    subtract_log_pi: bool,
    epsilon: float | None = None,
    temperature: float = 1.0,
    forbidden_V: Tensor | None = None,
) -> LossAndMetrics:
    """Σ_n w_n [ −Σ_a π(a|s) g(s, a) − A_n log π(y|s) ]; the module's docstring derives the gradient of both parts.

    π = softmax(z / temperature) over the ids that are not forbidden: the distribution that is sampled from.

    Args:
        teacher_signal_NV: g, or with `subtract_log_pi` the teacher's part of it, to which −log π is added.
        weights_N: The weight w_n of each position, e.g. mask / number of tokens, times an importance weight.
        futures_N: A = w (F_t − b_t), a constant.
        old_logps_N: log π(y|s) of the policy that the rollout was made with. A log π is taken as the ratio
            ρ = π / π_old times A, whose gradient is the same at π = π_old; with `epsilon` PPO's clipped surrogate
            min(ρ A, clip(ρ, 1−ε, 1+ε) A) (Schulman et al. 2017, eq. 7), for further passes over one rollout.

    Returns:
        The loss and three metrics, each a sum Σ_n w_n (…): `immediate` of −Σ_a π g, `entropy` of π's entropy, and
        `approx_kl` of (ρ − 1) − log ρ.
    """
    expected_N, entropy_N, logps_NV = _expected_signal(
        student_logits_NV,
        teacher_signal_NV,
        subtract_log_pi=subtract_log_pi,
        temperature=temperature,
        forbidden_V=forbidden_V,
    )
    immediate_N = -expected_N
    log_ratio_N = logps_NV.gather(-1, chosen_N[:, None]).squeeze(-1) - old_logps_N
    ratio_N = log_ratio_N.exp()
    future_N = ratio_N * futures_N
    if epsilon is not None:
        future_N = torch.minimum(future_N, ratio_N.clamp(1 - epsilon, 1 + epsilon) * futures_N)
    metrics = {"immediate": immediate_N, "entropy": entropy_N, "approx_kl": ratio_N - 1 - log_ratio_N}
    loss = (weights_N * (immediate_N - future_N)).sum()
    return loss, {name: (weights_N * value_N).sum().detach() for name, value_N in metrics.items()}


def _expected_signal(
    student_logits_NV: Tensor,
    teacher_signal_NV: Tensor,
    *,
    subtract_log_pi: bool,
    temperature: float,
    forbidden_V: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """ḡ(s) = Σ_a π(a|s) g(s, a) and π's entropy, `[N]`, and log π, `[N, V]`, 0 on forbidden ids."""
    V = min(student_logits_NV.shape[-1], teacher_signal_NV.shape[-1])
    signal_NV, forbidden_V = teacher_signal_NV[:, :V], None if forbidden_V is None else forbidden_V[:V]
    logps_NV = log_probs(student_logits_NV[:, :V], temperature=temperature, forbidden_V=forbidden_V)
    probabilities_NV = logps_NV.exp()
    if forbidden_V is not None:  # 0 · log 0 = 0, and nothing that could overflow
        logps_NV, signal_NV = (tensor.masked_fill(forbidden_V, 0.0) for tensor in (logps_NV, signal_NV))
    entropy_N = -(probabilities_NV * logps_NV).sum(dim=-1)
    expected_N = (probabilities_NV * signal_NV).sum(dim=-1)
    return expected_N + entropy_N if subtract_log_pi else expected_N, entropy_N, logps_NV


def sliced_all_actions_loss(
    hidden_ND: Tensor,
    head: Callable[[Tensor], Tensor],
    head_parameters: Iterable[Tensor],
    teachers: Sequence[TeacherStates],
    weights_N: Tensor,
    chosen_N: Tensor,
    futures_N: Tensor,
    old_logps_N: Tensor,
    *,
    teacher_signal: Callable[[Sequence[Tensor], Sequence[float | Tensor]], Tensor],
    vocab_size: int,
    max_elements: int = MAX_SLICE_ELEMENTS,
    **settings,
) -> LossAndMetrics:
    """`all_actions_loss` of student and teacher states, slice by slice: no model's whole `[N, V]` is ever in memory.

    `teacher_signal` takes the teachers' logits and weights and returns the signal; `settings` go to
    `all_actions_loss`. The other arguments are those of `ops.divergences.sliced_divergence`.
    """

    def per_slice(student_logits_nV, weights_n, chosen_n, futures_n, old_logps_n, *of_teachers):
        signal_nV = _signal_of_states(teachers, of_teachers, teacher_signal)
        return all_actions_loss(student_logits_nV, signal_nV, weights_n, chosen_n, futures_n, old_logps_n, **settings)

    return weighted_sliced_loss(
        head,
        head_parameters,
        hidden_ND,
        per_slice,
        weights_N,
        chosen_N,
        futures_N,
        old_logps_N,
        *cut_with_states(teachers),
        vocab_size=vocab_size,
        max_elements=max_elements,
    )


@torch.no_grad()
def _signal_of_states(
    teachers: Sequence[TeacherStates],
    cut: Sequence[Tensor],
    teacher_signal: Callable[[Sequence[Tensor], Sequence[float | Tensor]], Tensor],
) -> Tensor:
    """The teachers' signal in a slice of positions; cut: see `of_slice`."""
    hidden_KnD, weights_K = of_slice(teachers, cut)
    return teacher_signal(teacher_logits(teachers, hidden_KnD), weights_K)


@torch.no_grad()
def expected_signals(
    hidden_ND: Tensor,
    head: Callable[[Tensor], Tensor],
    teachers: Sequence[TeacherStates],
    *,
    teacher_signal: Callable[[Sequence[Tensor], Sequence[float | Tensor]], Tensor],
    vocab_size: int,
    subtract_log_pi: bool,
    temperature: float = 1.0,
    forbidden_V: Tensor | None = None,
    max_elements: int = MAX_SLICE_ELEMENTS,
) -> Tensor:
    """ḡ(s) = Σ_a π(a|s) g(s, a) in N states, `[N]` float32, in slices of positions.

    The arguments are those of `sliced_all_actions_loss` and `all_actions_loss`.
    """

    def per_slice(student_logits_nV: Tensor, *of_teachers: Tensor) -> tuple[Tensor]:
        expected_n, _, _ = _expected_signal(
            student_logits_nV,
            _signal_of_states(teachers, of_teachers, teacher_signal),
            subtract_log_pi=subtract_log_pi,
            temperature=temperature,
            forbidden_V=forbidden_V,
        )
        return (expected_n,)

    (expected_N,) = map_head_slices(
        head,
        hidden_ND,
        per_slice,
        *cut_with_states(teachers),
        vocab_size=vocab_size,
        max_elements=max_elements,
    )
    return expected_N


def chosen_signals(
    teachers: Sequence[TeacherStates],
    chosen_N: Tensor,
    *,
    teacher_signal: Callable[[Sequence[Tensor], Sequence[float | Tensor]], Tensor],
    vocab_size: int,
    max_elements: int = MAX_SLICE_ELEMENTS,
) -> Tensor:
    """The teacher's part of g at the sampled tokens, `[N]` float32, in slices of positions."""

    def per_slice(logits_nV: Tensor, chosen_n: Tensor, *of_teachers: Tensor) -> tuple[Tensor]:
        hidden_KnD, weights_K = of_slice(teachers, of_teachers)
        others = [teacher.head(hidden) for teacher, hidden in zip(teachers[1:], hidden_KnD[1:], strict=True)]
        signal_nV = teacher_signal([logits_nV, *others], weights_K)
        return (signal_nV.gather(-1, chosen_n[:, None]).squeeze(-1),)

    (signals_N,) = map_head_slices(
        teachers[0].head,
        teachers[0].hidden_ND,
        per_slice,
        chosen_N,
        *cut_with_states(teachers),
        vocab_size=vocab_size,
        max_elements=max_elements,
    )
    return signals_N
