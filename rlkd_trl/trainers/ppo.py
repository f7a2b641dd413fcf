"""PPO on the teacher's per-token rewards."""

import torch
from torch import Tensor

from rlkd_trl.ops.advantages import denormalize, explained_variance, gae, normalize, running_moments
from rlkd_trl.ops.average_reward import differential_rewards
from rlkd_trl.ops.losses import clipped_policy_loss, clipped_value_loss
from rlkd_trl.ops.masking import masked_moments
from rlkd_trl.ops.rewards import potential_shaping
from rlkd_trl.students import PolicyOutput
from rlkd_trl.trainers.config import PPOKDConfig
from rlkd_trl.trainers.on_policy import OnPolicyTrainer
from rlkd_trl.trainers.rollout import Rollout

_CRITIC_RATE_FACTOR = 10
_RETURN_MOMENTS_DECAY = 0.9


class PPOKDTrainer(OnPolicyTrainer):
    """Proximal policy optimisation (Schulman et al. 2017) with GAE and a clipped surrogate per token.

    With `teacher_baseline` the rewards are shaped by the teacher's V_t, so that the critic learns only how far the
    student falls short of it: V^π(s) = V_teacher(s) + critic(s).

    The critic predicts returns normalised by their running mean and variance, so that neither its learning rate nor
    `vf_coef` depends on the scale of the teacher's logits.

    K-step returns (Fan, Luo, Bowling & Mou 2026, "KETCHUP"; a reward with k > 1) need λ = 1, as they are defined for
    the sum from t to the end only, and `average_reward="none"`. With `average_reward`, rewards and the critic's values
    are differential. The constant of `baseline` is subtracted from the advantages.
    """

    args: PPOKDConfig

    def __init__(self, model, reward_funcs, args: PPOKDConfig, *positional, **kwargs):
        self.critic_kind = args.critic
        super().__init__(model, reward_funcs, args, *positional, **kwargs)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The critic's parameters in groups of their own, with their own learning rate."""
        optimizer = super().create_optimizer(model)
        critic_ids = {id(parameter) for parameter in self.accelerator.unwrap_model(self.model).critic_parameters()}
        rate = self.args.critic_learning_rate
        rate = _CRITIC_RATE_FACTOR * self.args.learning_rate if rate is None else rate
        for group in list(optimizer.param_groups):
            critic = [parameter for parameter in group["params"] if id(parameter) in critic_ids]
            if critic:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in critic_ids]
                optimizer.add_param_group({**group, "params": critic, "lr": rate})
        return optimizer

    def make_rollout(self, rows: list[dict]) -> Rollout:
        self._moments_before = self._return_moments
        return super().make_rollout(rows)

    def advantages(self, rollout: Rollout) -> Rollout:
        # Not those that this has moved already, if it is done anew.
        self.rollout_state.return_mean, self.rollout_state.return_variance = self._moments_before
        args, mask_BT = self.args, rollout.completion_mask_BT
        rewards_BT = rollout.rewards_BT
        if args.teacher_baseline:
            rewards_BT = potential_shaping(
                rewards_BT, rollout.potentials_BT1, mask_BT, rollout.ended_B, gamma=args.gamma
            )
        rewards_BT = differential_rewards(rewards_BT, mask_BT, self._average_reward(rewards_BT, rollout))
        values_BT1 = rollout.old_values_BT1
        if self.rollout_state.return_variance is not None:  # before the first rollout nothing is normalised
            values_BT1 = denormalize(values_BT1, *self._return_moments)
        advantages_BT = gae(rewards_BT, values_BT1, mask_BT, rollout.ended_B, gamma=args.gamma, lam=args.lam)
        returns_BT = advantages_BT + values_BT1[:, :-1]
        loss_mask_BT = rollout.loss_mask_BT
        explained = explained_variance(
            values_BT1[:, :-1], returns_BT, loss_mask_BT, sum_over_ranks=self._sum_over_ranks
        )
        self._metrics.record({"explained_variance": explained})
        self._track_returns(returns_BT, loss_mask_BT)
        advantages_BT = self._minus_baseline(rollout, advantages_BT)
        if args.normalize_advantages:
            advantages_BT = self._whitened(advantages_BT, loss_mask_BT)
        return rollout.with_(advantages_BT=advantages_BT, returns_BT=normalize(returns_BT, *self._return_moments))

    @property
    def _return_moments(self) -> tuple[float, float | None]:
        return self.rollout_state.return_mean, self.rollout_state.return_variance

    def _track_returns(self, returns_BT: Tensor, mask_BT: Tensor) -> None:
        """Moves the running moments towards those of this rollout, over all processes; the first one sets them."""
        state = self.rollout_state
        moments = masked_moments(returns_BT, mask_BT, sum_over_ranks=self._sum_over_ranks)
        mean, variance = (float(moment) for moment in moments)
        if state.return_variance is None:
            state.return_mean, state.return_variance = mean, variance
        else:
            state.return_mean, state.return_variance = running_moments(
                state.return_mean, state.return_variance, mean, variance, decay=_RETURN_MOMENTS_DECAY
            )

    def policy_loss(
        self, batch: Rollout, output: PolicyOutput, *, tokens: Tensor, sequences: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        policy_loss, policy_metrics = clipped_policy_loss(
            output.logps_BT,
            batch.old_logps_BT,
            batch.advantages_BT,
            batch.loss_mask_BT,
            epsilon=self.args.epsilon,
            denominator=tokens,
        )
        value_loss, value_metrics = clipped_value_loss(
            output.values,
            batch.old_values_BT1[:, :-1],
            batch.returns_BT,
            batch.loss_mask_BT,
            cliprange_value=self.args.cliprange_value,
            denominator=tokens,
        )
        return policy_loss + self.args.vf_coef * value_loss, {**policy_metrics, **value_metrics}
