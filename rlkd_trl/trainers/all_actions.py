"""The all-actions policy gradient: exact over the next token, sampled over the rest."""

from functools import partial

import torch
from torch import Tensor

from rlkd_trl.models.answers import decode
from rlkd_trl.ops.all_actions import (
    chosen_signals,
    future_advantages,
    future_returns,
    log_ratio_signal,
    sliced_all_actions_loss,
    teacher_forcing_signal,
)
from rlkd_trl.ops.divergences import ENSEMBLES
from rlkd_trl.ops.rewards import sequence_sum
from rlkd_trl.trainers.full_vocabulary import FullVocabularyTrainer
from rlkd_trl.trainers.full_vocabulary_config import AllActionsKDConfig
from rlkd_trl.trainers.rollout import Rollout
from rlkd_trl.trainers.rollout_metrics import completion_metrics, sample_table


class AllActionsKDTrainer(FullVocabularyTrainer):
    """On-policy distillation whose gradient is exact in the next token and sampled in what follows it.

    Per state, the expected signal of the next token is taken over the whole vocabulary, which the teacher scores
    anyway; the effect of that token on later ones comes from the sample, minus the mean of the prompt's other samples,
    with the weight `future_weight`. The derivation, and what it has to do with GKD and MiniLLM, is in
    `ops.all_actions`. A truncated completion's future ends at the cap.

    Raises:
        InputError: As `FullVocabularyTrainer`.
    """

    args: AllActionsKDConfig

    @torch.no_grad()
    def make_rollout(self, rows: list[dict]) -> Rollout:
        """Samples of the student, the teachers' states along them, and the future's advantages."""
        args, timer = self.args, self._timer
        prompt_PS = self._tokenized(self.policy, [row["prompt"] for row in rows], args.max_prompt_length)
        with timer.phase("sample"), self.compute_loss_context_manager():
            completions = self._sample(self.policy, *prompt_PS)
            rollout = self._rollout_of(prompt_PS, completions)
            rollout = rollout.with_(old_logps_BT=self._log_probs(self.policy, rollout))
        with timer.phase("score"):
            rollout = self._with_teacher_states(rollout, rows)
            rollout = rollout.with_(rewards_BT=self._signals(rollout))
        rollout = rollout.with_(advantages_BT=self._future_advantages(rollout))
        reward_B = sequence_sum(rollout.rewards_BT, rollout.completion_mask_BT)
        mean = self._sum_over_ranks(reward_B.mean()) / self.accelerator.num_processes
        self._record({"reward": mean, **completion_metrics(rollout, self._sum_over_ranks)})
        self.sample_table = sample_table(
            rows, decode(completions, self.processing_class), rollout, args.num_completions_to_print, reward_B=reward_B
        )
        return rollout

    @property
    def _teacher_signal(self):
        if self.args.signal == "teacher_forcing":
            return partial(teacher_forcing_signal, value=self.args.value)
        return partial(log_ratio_signal, ensemble=ENSEMBLES[self.args.ensemble], forbidden_V=self.policy.forbidden_V)

    def _signals(self, rollout: Rollout) -> Tensor:
        """g(s_t, y_t) of the sampled tokens, `[B, T]`."""
        mask_BT = rollout.completion_mask_BT
        signals_N = chosen_signals(
            self._teachers_at(rollout),
            rollout.completion_ids_BT[mask_BT],
            teacher_signal=self._teacher_signal,
            vocab_size=self.panel.scorers[0].teacher.backbone.vocab_size,
        )
        signals_BT = torch.zeros_like(rollout.old_logps_BT).masked_scatter(mask_BT, signals_N)
        return signals_BT - rollout.old_logps_BT if self.args.signal == "log_ratio" else signals_BT

    def _future_advantages(self, rollout: Rollout) -> Tensor:
        args, mask_BT = self.args, rollout.completion_mask_BT
        futures_BT = future_returns(
            rollout.rewards_BT, mask_BT, gamma=args.gamma, length_normalization=args.length_normalization
        )
        if args.baseline == "leave_one_out":
            futures_BT = future_advantages(futures_BT, mask_BT, num_generations=args.num_generations)
        return args.future_weight * futures_BT

    def micro_batch_loss(
        self, model, batch: Rollout, *, tokens: Tensor, sequences: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        mask_BT = batch.completion_mask_BT
        loss_of_states = partial(
            sliced_all_actions_loss,
            teachers=self._teachers_at(batch),
            weights_N=batch.loss_mask_BT[mask_BT].float() / tokens,
            chosen_N=batch.completion_ids_BT[mask_BT],
            futures_N=batch.advantages_BT[mask_BT],
            old_logps_N=batch.old_logps_BT[mask_BT],
            teacher_signal=self._teacher_signal,
            vocab_size=self.policy.backbone.vocab_size,
            subtract_log_pi=self.args.signal == "log_ratio",
            epsilon=self.args.epsilon,
            temperature=self.args.temperature,
            forbidden_V=self.policy.forbidden_V,
        )
        return model(**batch.policy_inputs(), loss_of_states=loss_of_states)
