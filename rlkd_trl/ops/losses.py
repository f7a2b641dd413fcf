"""Policy and value losses. Each returns `(loss, metrics)`: a scalar to minimise and detached scalars to log.

`denominator` is what the sums over the batch, of losses and metrics alike, are divided by. A trainer passes the count
over all ranks and all accumulated micro-batches, which makes the gradient independent of how the batch was cut and
the metrics additive; by default it is the count in the tensors given. Only log-probabilities, values and entropies
get gradients; everything else is a constant.
"""

import math

import torch
from torch import Tensor

from rlkd_trl.ops.masking import masked, masked_sum


def clipped_policy_loss(
    logps_BT: Tensor,
    old_logps_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    epsilon: float,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate per token (Schulman et al. 2017, eq. 7):

    −Σ_t min( ρ_t A_t, clip(ρ_t, 1−ε, 1+ε) A_t ) / denominator,  ρ_t = π(y_t|s_t) / π_old(y_t|s_t).
    """
    # Masked before exp: a difference of garbage could overflow, and 0 · inf is NaN in the gradient.
    log_ratio_BT = masked(logps_BT - old_logps_BT.detach(), mask_BT)
    objective_BT, clipped_BT, ratio_BT = _clipped_objective(log_ratio_BT, advantages_BT.detach(), epsilon)
    denominator = mask_BT.sum().clamp(min=1) if denominator is None else denominator
    loss = -masked_sum(objective_BT, mask_BT) / denominator
    return loss, _ratio_metrics(ratio_BT, clipped_BT, mask_BT, denominator)


def clipped_sequence_policy_loss(
    logps_BT: Tensor,
    old_logps_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    epsilon: float,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate with one ratio per sequence, as in TRL's RLOO:

    −Σ_i min( ρ_i A_i, clip(ρ_i, 1−ε, 1+ε) A_i ) / denominator,  ρ_i = π(y_i|x_i) / π_old(y_i|x_i).

    A row without any real token (a masked completion) counts for nothing.
    """
    log_ratio_B = masked_sum(logps_BT - old_logps_BT.detach(), mask_BT, dim=1)
    row_mask_B = mask_BT.any(dim=1)
    objective_B, clipped_B, ratio_B = _clipped_objective(log_ratio_B, advantages_B.detach(), epsilon)
    denominator = row_mask_B.sum().clamp(min=1) if denominator is None else denominator
    loss = -masked_sum(objective_B, row_mask_B) / denominator
    return loss, _ratio_metrics(ratio_B, clipped_B, row_mask_B, denominator)


def _clipped_objective(log_ratio: Tensor, advantages: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon) * advantages
    return torch.minimum(unclipped, clipped), clipped < unclipped, ratio


def _ratio_metrics(ratio: Tensor, clipped: Tensor, mask: Tensor, denominator) -> dict[str, Tensor]:
    return {
        "ratio": masked_sum(ratio.detach(), mask) / denominator,
        "clip_fraction": masked_sum(clipped.to(ratio.dtype), mask) / denominator,
    }


def policy_gradient_loss(
    logps_BT: Tensor,
    behaviour_logps_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    ratio_cap: float | None = None,
    weight_clip: float | None = None,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """REINFORCE on samples of a behaviour policy b (Williams 1992; off-policy: Degris, White & Sutton 2012, eq. 5):

    −Σ_t w_t log π(y_t|s_t) / denominator,  w_t = clip( min(ρ_t, ratio_cap) A_t, ±weight_clip ),  ρ_t = π / b.

    w_t is a constant, including the ratio in it, as in the first commit of Hao, Liu & Mou 2022's code (not in later
    ones). Since ρ ∇log π = ∇ρ, the gradient is still that of −Σ ρ_t A_t wherever w_t is not cut. Where it is cut, the
    gradient keeps the cut weight, while PPO's clipped ratio has none. The ratio is per token, as in that code: it does
    not correct for b visiting other states than π would.

    The loss is the expression itself, which is no measure of progress. `clip_fraction` is the share of tokens whose
    w_t was cut.
    """
    log_ratio_BT = masked((logps_BT - behaviour_logps_BT).detach(), mask_BT)
    ratio_BT = log_ratio_BT.exp()
    uncut_BT = ratio_BT * advantages_BT.detach()
    weights_BT = ratio_BT.clamp(max=ratio_cap or math.inf) * advantages_BT.detach()
    if weight_clip is not None:
        weights_BT = weights_BT.clamp(-weight_clip, weight_clip)
    denominator = mask_BT.sum().clamp(min=1) if denominator is None else denominator
    loss = -masked_sum(masked(weights_BT, mask_BT) * logps_BT, mask_BT)
    return loss / denominator, _ratio_metrics(ratio_BT, weights_BT != uncut_BT, mask_BT, denominator)


@torch.no_grad()
def approximate_kl(
    logps_BT: Tensor, old_logps_BT: Tensor, mask_BT: Tensor, *, denominator: Tensor | float | None = None
) -> Tensor:
    """Σ_t ( (ρ_t − 1) − log ρ_t ) / denominator, an estimate of KL(π_old ‖ π) in nats per token, never negative.

    ρ_t = π(y_t|s_t) / π_old(y_t|s_t) with y sampled from π_old: Schulman 2020, "Approximating KL divergence", k3.
    """
    log_ratio_BT = masked(logps_BT - old_logps_BT, mask_BT)
    denominator = mask_BT.sum().clamp(min=1) if denominator is None else denominator
    return masked_sum(log_ratio_BT.exp() - 1 - log_ratio_BT, mask_BT) / denominator


def clipped_value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    *,
    cliprange_value: float | None,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """½ Σ_t max( (V_t − G_t)², (clip(V_t, V_old ± c) − G_t)² ) / denominator.

    This is the value clipping of PPO's reference code (OpenAI Baselines, `ppo2`). `cliprange_value`, c, is in the
    values' units; with None nothing is clipped. `old_values_BT` are the values at sampling time, `returns_BT` the
    targets G = A + V_old.
    """
    denominator = mask_BT.sum().clamp(min=1) if denominator is None else denominator
    values_BT, old_values_BT, returns_BT = (
        masked(tensor, mask_BT) for tensor in (values_BT, old_values_BT.detach(), returns_BT.detach())
    )
    error_BT = (values_BT - returns_BT) ** 2
    clip_fraction = torch.zeros((), device=values_BT.device)
    if cliprange_value is not None:
        near_old_BT = values_BT.clamp(old_values_BT - cliprange_value, old_values_BT + cliprange_value)
        clipped_error_BT = (near_old_BT - returns_BT) ** 2
        clip_fraction = masked_sum((clipped_error_BT > error_BT).to(values_BT.dtype), mask_BT) / denominator
        error_BT = torch.maximum(error_BT, clipped_error_BT)
    loss = 0.5 * masked_sum(error_BT, mask_BT) / denominator
    return loss, {"value_loss": loss.detach(), "value_clip_fraction": clip_fraction.detach()}


def entropy_bonus(
    entropy_BT: Tensor, mask_BT: Tensor, *, denominator: Tensor | float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """−Σ_t H(π(·|s_t)) / denominator: the loss whose minimisation raises the entropy."""
    denominator = mask_BT.sum().clamp(min=1) if denominator is None else denominator
    loss = -masked_sum(entropy_BT, mask_BT) / denominator
    return loss, {"entropy": -loss.detach()}
