"""Average reward: an objective that prefers the best reward per token, whatever the completion's length.

Where rewards are mostly negative (a teacher's log-probabilities; q_t − V_t ≤ 0), every further token costs something,
and their sum is greatest where the text is shortest. The objective here is reward per token instead. With each
completion as one renewal cycle of T tokens, the long-run reward per token is, by the renewal reward theorem,

    J = E[Σ_t r_t] / E[T].

Its gradient is, by the quotient rule and with ρ = J as a constant,

    ∇J = ( ∇E[Σ r] − ρ ∇E[T] ) / E[T] = ∇E[Σ_t (r_t − ρ)] / E[T],

and the policy gradient theorem gives for the last expectation, whose rewards are r_t − ρ,

    ∇J = E[ Σ_t ∇log π(y_t|s_t) Σ_{i≥t} (r_i − ρ) ] / E[T].

So all that changes is r_t → r_t − ρ, the *differential* reward (Sutton & Barto 2018, §10.3; Mahadevan 1996, "Average
Reward Reinforcement Learning"; Naik, Wan, Tomar & Sutton 2024, "Reward Centering", arXiv 2405.09999), and a critic of
differential rewards learns differential values. A constant added to every reward is in ρ too, and changes nothing.
A loss that is divided by the number of tokens has E[T] in its denominator already. With a discount γ < 1 this is
reward centring as in Naik et al.: the discounted objective, less the part that only depends on the length.

What is centred. r_t is the reward of one token after everything that is added to each token: the KL penalty, and the
shaping by the teacher's V. The average is taken of the shaped reward q_t − V_t: the sum of the unshaped
r_t = q_t − V_{t+1} holds V_1, which is earned once, so that its average per token would prefer short texts. What a
completion earns once (a reward function's single number, the penalty for a missing EOS) is in the sum but not in ρ,
and so keeps its price per completion, whatever the length.

A completion that was cut off at the length cap counts with the tokens that it has and what they have earned. Without a
critic this assumes that it would have gone on earning ρ per token (a differential value of 0 where it was cut); a
critic's bootstrap V(s_{T+1}) is a differential value itself, and stays.

ρ is estimated over the rollout, one number for all prompts, E over prompts included; or for every completion over the
other K − 1 of its prompt, which leaves it independent of that completion's actions. The second is the gradient of each
prompt's own J_x, weighted by its expected length, up to the bias of a ratio of K − 1 samples' sums. In the first a
completion is one of the B that ρ is the average of, so that what it earns pays for its own ρ too: a bias of the order
of 1/B, which matters in rollouts of a few completions only (as the 1 − 1/N of `advantages.mean_baseline`). There is no
mean over earlier rollouts: it would lag behind a policy that learns, and be one more state to resume.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rlkd_trl.ops.masking import masked, masked_sum

AVERAGES = ("none", "prompt", "rollout")


def average_reward(
    rewards_BT: Tensor,
    mask_BT: Tensor,
    *,
    num_generations: int | None = None,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """ρ = Σ r / Σ T, reward per real token, for every completion, `[B]`.

    The average is over all completions (of all ranks, with `sum_over_ranks`); or, with `num_generations` K, over the
    K − 1 others of the completion's prompt, which are next to each other. Where none of the others has a token it is
    over the completion itself, whose differential rewards then sum to 0.

    Raises:
        ValueError: K < 2, or B is not a multiple of K.
    """
    reward_B, tokens_B = masked_sum(rewards_BT, mask_BT, dim=1), mask_BT.sum(dim=1).to(rewards_BT.dtype)
    if num_generations is None:
        totals_2 = torch.stack([reward_B.sum(), tokens_B.sum()])
        reward, tokens = totals_2 if sum_over_ranks is None else sum_over_ranks(totals_2)
        return (reward / tokens.clamp(min=1)).expand(len(reward_B))
    if num_generations < 2 or len(reward_B) % num_generations:
        raise ValueError(
            f"the average over a prompt's other samples needs at least 2 per prompt and whole groups; got "
            f"{len(reward_B)} samples in groups of {num_generations}"
        )
    others_reward_B, others_tokens_B = (
        _sum_of_others(numbers_B, num_generations) for numbers_B in (reward_B, tokens_B)
    )
    alone_B = others_tokens_B == 0
    reward_B, tokens_B = (
        torch.where(alone_B, reward_B, others_reward_B),
        torch.where(alone_B, tokens_B, others_tokens_B),
    )
    return reward_B / tokens_B.clamp(min=1)


def _sum_of_others(numbers_B: Tensor, num_generations: int) -> Tensor:
    """Σ_{j≠i} x_j over the samples of a prompt."""
    grouped_PK = numbers_B.unflatten(0, (-1, num_generations))
    return (grouped_PK.sum(dim=1, keepdim=True) - grouped_PK).flatten()


def differential_rewards(rewards_BT: Tensor, mask_BT: Tensor, average_reward_B: Tensor) -> Tensor:
    """r_t − ρ on the real tokens, `[B, T]`, 0 behind the mask."""
    return masked(rewards_BT - average_reward_B[:, None], mask_BT)


def differential_advantages(
    advantages_of: Callable[[Tensor], Tensor], rewards_BT: Tensor, mask_BT: Tensor, average_reward_B: Tensor
) -> Tensor:
    """A(r − ρ_i) = A(r) − ρ_i A(1), `[B, T]`, for advantages A that are linear in the rewards.

    `advantages_of` maps `[B, T]` rewards to `[B, T]` advantages that compare completion i with others. The others'
    rewards are centred by ρ_i too. Centred by their own ρ_j, which with leave-one-out depends on completion i, they
    would depend on i's actions: no baseline any more, and a biased gradient.
    """
    ones_BT = mask_BT.to(rewards_BT.dtype)
    return advantages_of(rewards_BT) - average_reward_B[:, None] * advantages_of(ones_BT)
