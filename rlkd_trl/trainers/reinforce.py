"""REINFORCE on the teacher's rewards, as LLMR and KETCHUP do it."""

import math
from pathlib import Path

from torch import Tensor

from rlkd_trl.errors import InputError
from rlkd_trl.ops.advantages import return_to_go
from rlkd_trl.ops.average_reward import differential_rewards
from rlkd_trl.ops.losses import policy_gradient_loss
from rlkd_trl.ops.rewards import bootstrap_truncated, potential_shaping
from rlkd_trl.students import Policy, PolicyOutput, frozen_copy
from rlkd_trl.trainers.config import ReinforceKDConfig
from rlkd_trl.trainers.on_policy import OnPolicyTrainer
from rlkd_trl.trainers.rollout import Rollout

_BEHAVIOUR_DIRECTORY = "behaviour"


class ReinforceKDTrainer(OnPolicyTrainer):
    """REINFORCE (Williams 1992) with a lagging behaviour policy, as in Hao, Liu & Mou 2022 and Li, Hao & Mou 2024
    ("LLMR"), on K-step returns (Fan, Luo, Bowling & Mou 2026, "KETCHUP") where the reward has k > 1.

    A token's weight is clip( ρ_t (G_t / return_denom − b), ±reward_clip ): G_t the return-to-go (shaped by the
    teacher's V_t with `teacher_baseline`; of differential rewards with `average_reward`), b a constant baseline,
    ρ_t = π / behaviour the importance ratio, a constant. With `behaviour_sync_steps` N a frozen copy of the student
    samples, which is set to the student after every N optimizer steps. A checkpoint holds the copy in `behaviour/`.

    Where this differs from the papers' code: with `top_k` the ratio is over the k tokens sampled from on both sides
    (see `ops.lm_head.support_log_probs`), at one temperature; the entropy bonus is the entropy, not the mean of −log π
    over the vocabulary; dropout is off; completions that hit the length cap are bootstrapped unless
    `mask_truncated_completions` drops them.
    """

    args: ReinforceKDConfig

    def __init__(self, model, reward_funcs, args: ReinforceKDConfig, *positional, **kwargs):
        super().__init__(model, reward_funcs, args, *positional, **kwargs)
        samplable = int((~self.model.forbidden_V).sum())
        if args.top_k > samplable:
            raise InputError(
                f"top_k = {args.top_k}, but the student has {samplable} tokens that may be sampled: set top_k to 0."
            )
        self.behaviour: Policy | None = None
        if args.samples_from_a_copy:
            self.behaviour = frozen_copy(self.model, self.processing_class).to(self.accelerator.device)

    def sampling_policy(self) -> Policy:
        """The student, or its copy, which every N optimizer steps is set to the student."""
        student = self.policy
        if self.behaviour is None:
            return student
        steps = self.rollout_state.micro_step // self.args.gradient_accumulation_steps
        lag = steps % self.args.behaviour_sync_steps
        if lag == 0:
            with self.whole_student():
                self.behaviour.model.load_state_dict(student.model.state_dict())
        self._metrics.record({"behaviour_lag": lag})
        return self.behaviour

    def _needs_old_log_probs(self) -> bool:
        return self.behaviour is not None or super()._needs_old_log_probs()

    def advantages(self, rollout: Rollout) -> Rollout:
        args, mask_BT = self.args, rollout.completion_mask_BT
        rewards_BT = (potential_shaping if args.teacher_baseline else bootstrap_truncated)(
            rollout.rewards_BT, rollout.potentials_BT1, mask_BT, rollout.ended_B, gamma=args.gamma
        )
        rewards_BT = differential_rewards(rewards_BT, mask_BT, self._average_reward(rewards_BT, rollout))
        returns_BT = return_to_go(rewards_BT, mask_BT, gamma=args.gamma) / args.return_denom
        advantages_BT = self._minus_baseline(rollout, returns_BT)
        if args.normalize_advantages:
            advantages_BT = self._whitened(advantages_BT, rollout.loss_mask_BT)
        return rollout.with_(advantages_BT=advantages_BT)

    def _sampled_log_probs(self, rollout: Rollout) -> tuple[Tensor, Tensor | None]:
        if self.behaviour is None:
            return super()._sampled_log_probs(rollout)
        logps_BT = self.sampling.log_probs(self.policy, rollout)
        return logps_BT, (logps_BT - rollout.old_logps_BT).exp().clamp(max=self.args.ratio_cap or math.inf)

    def policy_loss(
        self, batch: Rollout, output: PolicyOutput, *, tokens: Tensor, sequences: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return policy_gradient_loss(
            output.logps_BT,
            batch.old_logps_BT,
            batch.advantages_BT,
            batch.loss_mask_BT,
            ratio_cap=self.args.ratio_cap,
            weight_clip=self.args.reward_clip,
            denominator=tokens,
        )

    # Checkpoints

    def write_checkpoint(self, directory: Path) -> None:
        super().write_checkpoint(directory)
        if self.behaviour is not None and self.args.should_save:
            self.behaviour.save_pretrained(directory / _BEHAVIOUR_DIRECTORY)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.behaviour is not None and checkpoint is not None:
            self.behaviour.load_pretrained(Path(checkpoint) / _BEHAVIOUR_DIRECTORY)
