"""Per-token rewards from the teacher's scalars, and what is added to them.

Notation: z_t ∈ R^V are the teacher's logits in state s_t = (x, y_<t), t = 1 .. T+1; f_t = z_t − mean_v z_t are the
centred logits (a softmax policy fixes logits only up to a constant per state; centring picks it);
q_t = f_t[y_t] `[B, T]`; V_t is a value of state s_t `[B, T+1]`. A completion of n tokens that ended with EOS has
V_{n+1} = 0; a truncated one is bootstrapped from V_{n+1}.
"""

import torch
from torch import Tensor

from rlkd_trl.ops.masking import after_last_token, last_token, masked, masked_sum

# What V of the teacher-forcing reward may be, of the centred logits f: max f, Σ softmax(f) f, or τ logsumexp(f/τ).
VALUES = ("max", "expected", "soft")


def centre(statistic: Tensor, mean: Tensor) -> Tensor:
    """f = z − mean_v z, for any statistic of z that shifts with z (a logit, max, expected value, logsumexp)."""
    return statistic - mean


def zero_terminal_value(values_BT1: Tensor, mask_BT: Tensor, ended_B: Tensor) -> Tensor:
    """V with V_{n+1} = 0 where the completion ended with EOS, and 0 wherever no state exists."""
    exists_BT1 = torch.cat([torch.ones_like(mask_BT[:, :1]), mask_BT], dim=1)
    terminal_BT1 = after_last_token(mask_BT) & ended_B[:, None]
    return masked(values_BT1, exists_BT1 & ~terminal_BT1)


def teacher_forcing_reward(
    q_BT: Tensor, values_BT1: Tensor, mask_BT: Tensor, ended_B: Tensor, *, gamma: float = 1.0
) -> Tensor:
    """r_t = q_t − γ V_{t+1}: the reward that a language model trained by teacher forcing implies.

    Hao, Liu & Mou 2022, "Teacher Forcing Recovers Reward Functions for Text Generation", from the inverse
    Bellman equation with q := the (centred) logits and V = max_v f; Li, Hao & Mou 2024, "LLMR", with other V.

    V_{t+1} is taken from position t+1 itself: the last position of a truncated completion reads V_{T+1}, never the
    first one's (what `torch.roll` would give). Returns `[B, T]`, 0 behind the mask.
    """
    next_values_BT = zero_terminal_value(values_BT1, mask_BT, ended_B)[:, 1:]
    return masked(q_BT - gamma * next_values_BT, mask_BT)


def k_step_return(
    q_BT: Tensor, values_BT1: Tensor, mask_BT: Tensor, ended_B: Tensor, *, k: int, gamma: float = 1.0
) -> Tensor:
    """G_t = Σ_j γ^{jk} ( q_{t+jk} − γ^k V_{t+(j+1)k} ), Fan, Luo, Bowling & Mou 2026, "KETCHUP".

    The K-step Bellman optimality equation replaces the k one-step rewards from t by q_t − γ^k V_{t+k}, which has
    fewer terms and so a lower variance. A last segment of m < k tokens is q_t − γ^m V_{n+1}. For k = 1 this is the
    return-to-go of `teacher_forcing_reward`. Returns `[B, T]`, 0 behind the mask.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    values_BT1 = zero_terminal_value(values_BT1, mask_BT, ended_B)
    length_B = mask_BT.sum(dim=1)
    returns_BT1 = torch.zeros_like(values_BT1)
    for t in reversed(range(mask_BT.shape[1])):
        next_B1 = torch.clamp(length_B, max=t + k).clamp(min=t)[:, None]  # segment end: t + m, at most n
        discount_B = gamma ** (next_B1[:, 0] - t).to(q_BT.dtype)
        future_B = (returns_BT1 - values_BT1).gather(1, next_B1)[:, 0]
        returns_BT1[:, t] = masked(q_BT[:, t] + discount_B * future_B, mask_BT[:, t])
    return returns_BT1[:, :-1]


def rewards_from_returns(returns_BT: Tensor, *, gamma: float = 1.0) -> Tensor:
    """r_t = G_t − γ G_{t+1}: the per-token rewards whose return-to-go is `returns_BT`.

    `returns_BT` must be 0 behind the mask. This lets any return estimate, such as `k_step_return`, stand where rewards
    are summed from t to the end. Only those sums mean something: a single difference of K-step returns looks ahead,
    so what cuts or discounts the sum in another way (GAE with λ < 1) must not be given it.
    """
    next_returns_BT = torch.cat([returns_BT[:, 1:], torch.zeros_like(returns_BT[:, :1])], dim=1)
    return returns_BT - gamma * next_returns_BT


def log_likelihood(chosen_BT: Tensor, logsumexp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log p_teacher(y_t | s_t) = z_t[y_t] − logsumexp(z_t), in nats; 0 behind the mask."""
    return masked(chosen_BT - logsumexp_BT, mask_BT)


def log_ratio(teacher_logps_BT: Tensor, student_logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log p_teacher(y_t | s_t) − log p_student(y_t | s_t), 0 behind the mask.

    Its expectation over the student's samples is minus the reverse KL (Gu et al. 2024, "MiniLLM").
    """
    return masked(teacher_logps_BT - student_logps_BT, mask_BT)


def kl_penalty(logps_BT: Tensor, reference_logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log π(y_t | s_t) − log π_ref(y_t | s_t): the one-sample estimate of the per-token KL to the initial policy.

    Subtracted from the reward with coefficient beta (Ziegler et al. 2019, eq. 2; TRL's RLOO); 0 behind the mask.
    """
    return masked(logps_BT - reference_logps_BT, mask_BT)


def potential_shaping(
    rewards_BT: Tensor, potentials_BT1: Tensor, mask_BT: Tensor, ended_B: Tensor, *, gamma: float = 1.0
) -> Tensor:
    """r_t + γ Φ_{t+1} − Φ_t, which has the same optimal policy (Ng, Harada & Russell 1999, theorem 1).

    With Φ the teacher's V_t, the teacher-forcing reward becomes the advantage q_t − V_t ≤ 0 (value="max"), so that a
    critic or a baseline need not learn the scale of the logits. Φ is 0 after EOS and kept where a completion was
    truncated. Returns `[B, T]`, 0 behind the mask.
    """
    potentials_BT1 = zero_terminal_value(potentials_BT1, mask_BT, ended_B)
    shaped_BT = rewards_BT + gamma * potentials_BT1[:, 1:] - potentials_BT1[:, :-1]
    return masked(shaped_BT, mask_BT)


def bootstrap_truncated(
    rewards_BT: Tensor, potentials_BT1: Tensor, mask_BT: Tensor, ended_B: Tensor, *, gamma: float = 1.0
) -> Tensor:
    """r_n + γ Φ_{n+1} at the last token of a truncated completion, r_t elsewhere.

    The value of the state in which a completion was cut off stands for the rewards that it would still have had
    (Pardo et al. 2018, "Time Limits in Reinforcement Learning"). For sums of rewards without a critic; shaping by
    `potential_shaping` does the same. Returns `[B, T]`, 0 behind the mask.
    """
    cut_off_BT = last_token(mask_BT) & ~ended_B[:, None]
    future_BT = masked(gamma * potentials_BT1[:, 1:], cut_off_BT)
    return masked(rewards_BT + future_BT, mask_BT)


def adaptive_kl_coefficient(beta: float, *, kl: float, target: float, horizon: float, num_samples: int) -> float:
    """beta ← beta · (1 + clip(kl / target − 1, −0.2, 0.2) · num_samples / horizon), Ziegler et al. 2019, §2.2.

    `kl` and `target` in nats per sequence; `horizon` in sequences, at least `num_samples`, or beta may fall to 0.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return beta * (1.0 + error * num_samples / horizon)


def on_last_token(score_B: Tensor, mask_BT: Tensor) -> Tensor:
    """A sequence-level score as a per-token reward: all of it on the last real token. Returns `[B, T]`."""
    return masked(score_B[:, None], last_token(mask_BT))


def sequence_sum(rewards_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Σ_t r_t of each completion, `[B]`: the sequence-level reward."""
    return masked_sum(rewards_BT, mask_BT, dim=1)
