"""Returns, advantages and baselines. Shapes: rewards, masks, advantages `[B, T]`; values `[B, T+1]`."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlkd_trl.ops.masking import masked, masked_moments, masked_sum
from rlkd_trl.ops.rewards import zero_terminal_value


def return_to_go(rewards_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0) -> Tensor:
    """G_t = r_t + γ G_{t+1}, 0 behind the mask."""
    rewards_BT = masked(rewards_BT, mask_BT)
    returns_BT = torch.zeros_like(rewards_BT)
    future_B = rewards_BT.new_zeros(len(rewards_BT))
    for t in reversed(range(rewards_BT.shape[1])):
        future_B = rewards_BT[:, t] + gamma * future_B
        returns_BT[:, t] = future_B
    return returns_BT


def gae(
    rewards_BT: Tensor, values_BT1: Tensor, mask_BT: Tensor, ended_B: Tensor, *, gamma: float, lam: float
) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16).

    A_t = δ_t + γλ A_{t+1},  δ_t = r_t + γ V_{t+1} − V_t. After EOS, V = 0; a truncated completion is bootstrapped
    from V_{n+1}, since it stopped for want of room, not because the episode was over (Pardo et al. 2018, "Time Limits
    in Reinforcement Learning"). Returns `[B, T]`, 0 behind the mask.
    """
    values_BT1 = zero_terminal_value(values_BT1, mask_BT, ended_B)
    advantages_BT = torch.zeros_like(rewards_BT)
    future_B = rewards_BT.new_zeros(len(rewards_BT))
    for t in reversed(range(rewards_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * values_BT1[:, t + 1] - values_BT1[:, t]
        future_B = masked(delta_B + gamma * lam * future_B, mask_BT[:, t])
        advantages_BT[:, t] = future_B
    return advantages_BT


def leave_one_out(scores: Tensor, num_generations: int, *, kept_B: Tensor | None = None) -> Tensor:
    """R_i − mean_{j≠i} R_j among the K samples of each prompt (Ahmadian et al. 2024, "Back to Basics", RLOO).

    `scores` is `[B]` (sequence rewards) or `[B, T]` (position by position), B = P · K with the K samples of a prompt
    next to each other. Samples where `kept_B` is False are left out of every mean and get 0, as does a sample all of
    whose others are left out. Returns the shape of `scores`.

    Raises:
        ValueError: K < 2, or B is not a multiple of K.
    """
    if num_generations < 2 or scores.shape[0] % num_generations:
        raise ValueError(
            f"leave-one-out needs at least 2 samples per prompt and whole groups; got {scores.shape[0]} samples in "
            f"groups of {num_generations}"
        )
    grouped = scores.unflatten(0, (-1, num_generations))
    if kept_B is None:
        others_mean = (grouped.sum(dim=1, keepdim=True) - grouped) / (num_generations - 1)
        return (grouped - others_mean).flatten(0, 1)
    kept_PK = kept_B.view(-1, num_generations, *[1] * (scores.dim() - 1))
    grouped = masked(grouped, kept_PK)
    num_others = kept_PK.sum(dim=1, keepdim=True) - 1
    others_mean = (grouped.sum(dim=1, keepdim=True) - grouped) / num_others.clamp(min=1)
    return masked(grouped - others_mean, kept_PK & (num_others > 0)).flatten(0, 1)


def token_leave_one_out(
    rewards_BT: Tensor,
    mask_BT: Tensor,
    *,
    num_generations: int,
    gamma: float = 1.0,
    kept_B: Tensor | None = None,
) -> Tensor:
    """RLOO at token level: A_{t,i} = G_{t,i} − mean_{j≠i} G_{t,j}, with G the return-to-go.

    Meant for rewards after `potential_shaping` with the teacher's V_t, which makes the returns of different samples
    comparable at the same t. A sample that has already ended contributes 0, the return of a finished episode. The
    baseline does not depend on sample i's own actions, so the gradient stays unbiased, if the other samples' rewards
    do not either: for those less an average reward see `average_reward`. `kept_B` as in `leave_one_out`.
    Returns `[B, T]`, 0 behind the mask.
    """
    returns_BT = return_to_go(rewards_BT, mask_BT, gamma=gamma)
    advantages_BT = leave_one_out(returns_BT, num_generations, kept_B=kept_B)
    return masked(advantages_BT, mask_BT)


def mean_baseline(
    returns_BT: Tensor, mask_BT: Tensor, *, sum_over_ranks: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """b = mean of G_t over the real tokens of the rollout, a scalar (Williams 1992, "reinforcement baseline").

    Each token's own return is in the mean, which shrinks its gradient by a factor of about 1 − 1/N, N tokens.
    """
    return masked_moments(returns_BT, mask_BT, sum_over_ranks=sum_over_ranks)[0]


def min_variance_baseline(
    returns_BT: Tensor,
    logps_BT: Tensor,
    mask_BT: Tensor,
    *,
    ratios_BT: Tensor | None = None,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """b = E[ρ_t² ‖∇ log π(y_t|s_t)‖² G_t] / E[ρ_t² ‖∇ log π(y_t|s_t)‖²], a scalar: the optimal constant baseline.

    Greensmith, Bartlett & Baxter 2004, §4; Peters & Schaal 2008, "Reinforcement Learning of Motor Skills with Policy
    Gradients", §3.1.1, there for each component of the gradient. A token's term of the gradient is
    ρ ∇log π (G − b); its expectation does not depend on b, so its variance is least where E[ρ² ‖∇log π‖² (G − b)²]
    is least, which is at this b. Terms of different tokens are taken as uncorrelated. `ratios_BT` are
    ρ = π / behaviour, 1 by default.

    The norm is that of the gradient in the logits z, since the one in the parameters would take a backward pass per
    token: ‖∂ log π(y) / ∂z‖² = (1 − π(y))² + Σ_{v≠y} π(v)². The sum lies between 0 and (1 − π(y))², so (1 − π(y))²,
    which is used here, is the norm up to a factor between 1 and 2 (exactly 2 with two actions, where it cancels).
    A token that the policy was certain of (π = 1) has no gradient, and so no weight. Expectations are over the real
    tokens of the rollout; the baseline is 0 if no token has any weight.
    """
    logps_BT = masked(logps_BT, mask_BT)
    weights_BT = torch.expm1(logps_BT) ** 2
    if ratios_BT is not None:
        weights_BT = weights_BT * masked(ratios_BT, mask_BT) ** 2
    total = sum_over_ranks or (lambda tensor: tensor)
    weight = total(masked_sum(weights_BT, mask_BT))
    weighted = total(masked_sum(weights_BT * masked(returns_BT, mask_BT), mask_BT))
    return masked(weighted / weight, weight > 0)


def explained_variance(
    predictions_BT: Tensor,
    targets_BT: Tensor,
    mask_BT: Tensor,
    *,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """1 − Var[target − prediction] / Var[target] over real tokens: 1 is a perfect critic, 0 a constant one.

    0 where the targets do not vary and there is nothing to explain.
    """
    _, residual = masked_moments(targets_BT - predictions_BT, mask_BT, sum_over_ranks=sum_over_ranks)
    _, total = masked_moments(targets_BT, mask_BT, sum_over_ranks=sum_over_ranks)
    return masked(1.0 - residual / total, total > 0)


_SMALLEST_STD = 1e-4  # where all returns are alike


def normalize(values: Tensor, mean: float, variance: float) -> Tensor:
    """(v − mean) / std, with std at least 1e-4. `denormalize` takes it back."""
    return (values - mean) / max(variance**0.5, _SMALLEST_STD)


def denormalize(values: Tensor, mean: float, variance: float) -> Tensor:
    """mean + std · v, the inverse of `normalize`."""
    return mean + max(variance**0.5, _SMALLEST_STD) * values


def running_moments(
    mean: float, variance: float, batch_mean: float, batch_variance: float, *, decay: float
) -> tuple[float, float]:
    """Exponential moving mean and variance, by moving averages of the first and second moment.

    Normalising a critic's targets with them makes its loss and learning rate independent of the rewards' scale
    (van Hasselt et al. 2016, "Learning values across many orders of magnitude"; Yu et al. 2022, MAPPO).
    """
    new_mean = decay * mean + (1 - decay) * batch_mean
    second_moment = decay * (variance + mean**2) + (1 - decay) * (batch_variance + batch_mean**2)
    return new_mean, max(second_moment - new_mean**2, 0.0)
