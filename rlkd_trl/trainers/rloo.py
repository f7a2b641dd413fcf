"""RLOO on the teacher's rewards, for whole sequences or token by token."""

from functools import partial

from torch import Tensor

from rlkd_trl.ops.advantages import token_leave_one_out
from rlkd_trl.ops.average_reward import differential_advantages
from rlkd_trl.ops.losses import clipped_policy_loss, clipped_sequence_policy_loss
from rlkd_trl.ops.rewards import bootstrap_truncated, potential_shaping
from rlkd_trl.students import PolicyOutput
from rlkd_trl.trainers.config import RLOOKDConfig
from rlkd_trl.trainers.on_policy import OnPolicyTrainer
from rlkd_trl.trainers.rollout import Rollout


class RLOOKDTrainer(OnPolicyTrainer):
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, "Back to Basics").

    level="sequence" is the paper's method and TRL's: the (discounted) sum of a completion's rewards minus the mean
    over the other completions of its prompt, with one clipped ratio per completion. level="token" gives each token its
    return-to-go, shaped by the teacher's V_t, minus the mean over the other completions at that position.

    To the rewards of a truncated completion is added the teacher's V of the state in which it was cut off. Completions
    that are left out of the loss (`mask_truncated_completions`) still count in the others' baselines. With
    `average_reward`, rewards are shaped and differential at both levels. The constant of `baseline` is subtracted from
    the leave-one-out advantages.
    """

    args: RLOOKDConfig

    def advantages(self, rollout: Rollout) -> Rollout:
        args, mask_BT = self.args, rollout.completion_mask_BT
        whole = args.level == "sequence"
        # Shaping changes a completion's sum by V_1 only, which is the same for all completions of a prompt and
        # cancels. With an average per token it does not cancel.
        shaped = args.average_reward != "none" if whole else args.teacher_baseline
        rewards_BT = (potential_shaping if shaped else bootstrap_truncated)(
            rollout.rewards_BT, rollout.potentials_BT1, mask_BT, rollout.ended_B, gamma=args.gamma
        )
        leave_one_out = partial(
            token_leave_one_out,
            mask_BT=mask_BT,
            num_generations=args.num_generations,
            gamma=args.gamma,
            kept_B=rollout.kept_B,
        )
        average_reward_B = self._average_reward(rewards_BT, rollout)
        advantages_BT = differential_advantages(leave_one_out, rewards_BT, mask_BT, average_reward_B)
        if whole:
            advantages_B = advantages_BT[:, 0]
            if args.normalize_advantages:
                advantages_B = self._whitened(advantages_B, rollout.loss_mask_BT.any(dim=1))
            return rollout.with_(advantages_BT=self._minus_baseline(rollout, advantages_B[:, None] * mask_BT))
        advantages_BT = self._minus_baseline(rollout, advantages_BT)
        if args.normalize_advantages:
            advantages_BT = self._whitened(advantages_BT, rollout.loss_mask_BT)
        return rollout.with_(advantages_BT=advantages_BT)

    def policy_loss(
        self, batch: Rollout, output: PolicyOutput, *, tokens: Tensor, sequences: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.args.level == "token":
            return clipped_policy_loss(
                output.logps_BT,
                batch.old_logps_BT,
                batch.advantages_BT,
                batch.loss_mask_BT,
                epsilon=self.args.epsilon,
                denominator=tokens,
            )
        return clipped_sequence_policy_loss(
            output.logps_BT,
            batch.old_logps_BT,
            batch.advantages_BT[:, 0],
            batch.loss_mask_BT,
            epsilon=self.args.epsilon,
            denominator=sequences,
        )
