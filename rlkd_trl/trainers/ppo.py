"""PPO on the teacher's per-token rewards."""

from torch import Tensor

from rlkd_trl.ops.advantages import explained_variance, gae
from rlkd_trl.ops.losses import clipped_policy_loss, clipped_value_loss
from rlkd_trl.ops.rewards import potential_shaping
from rlkd_trl.students import PolicyOutput
from rlkd_trl.trainers.config import PPOKDConfig
from rlkd_trl.trainers.on_policy import OnPolicyTrainer
from rlkd_trl.trainers.rollout import Rollout


class PPOKDTrainer(OnPolicyTrainer):
    """Proximal policy optimisation (Schulman et al. 2017) with GAE and a clipped surrogate per token.

    With `teacher_baseline` the rewards are shaped by the teacher's V_t, so that the critic learns only how far the
    student falls short of it: V^π(s) = V_teacher(s) + value_head(s), and the head rightly starts at zero.
    """

    args: PPOKDConfig

    def __init__(self, model, reward_funcs, args: PPOKDConfig, *positional, **kwargs):
        self.critic_kind = args.critic
        super().__init__(model, reward_funcs, args, *positional, **kwargs)

    def advantages(self, rollout: Rollout) -> Rollout:
        args, mask_BT = self.args, rollout.completion_mask_BT
        rewards_BT, values_BT1 = rollout.rewards_BT, rollout.old_values_BT1
        if args.teacher_baseline:
            rewards_BT = potential_shaping(
                rewards_BT, rollout.potentials_BT1, mask_BT, rollout.ended_B, gamma=args.gamma
            )
        advantages_BT = gae(rewards_BT, values_BT1, mask_BT, rollout.ended_B, gamma=args.gamma, lam=args.lam)
        returns_BT = advantages_BT + values_BT1[:, :-1]
        self._record({"explained_variance": explained_variance(values_BT1[:, :-1], returns_BT, mask_BT)})
        return rollout.with_(advantages_BT=advantages_BT, returns_BT=returns_BT)

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
            output.values_BT1[:, :-1],
            batch.old_values_BT1[:, :-1],
            batch.returns_BT,
            batch.loss_mask_BT,
            cliprange_value=self.args.cliprange_value,
            denominator=tokens,
        )
        return policy_loss + self.args.vf_coef * value_loss, {**policy_metrics, **value_metrics}
