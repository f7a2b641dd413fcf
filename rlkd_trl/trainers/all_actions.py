"""The all-actions policy gradient: exact over the next token, sampled over the rest."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rlkd_trl.models.answers import decode
from rlkd_trl.models.generation import MixedWith
from rlkd_trl.ops.all_actions import (
    chosen_signals,
    expected_signals,
    future_advantages,
    future_returns,
    log_ratio_signal,
    mixture_importance,
    sliced_all_actions_loss,
    teacher_forcing_signal,
)
from rlkd_trl.ops.average_reward import differential_advantages
from rlkd_trl.ops.divergences import ENSEMBLES
from rlkd_trl.ops.finite import usable_rows
from rlkd_trl.ops.masking import masked_moments
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
    `ops.all_actions`. With `teacher_mix`, tokens are sampled from a mixture of student and teacher, and weighted by
    their importance (MiniLLM). A truncated completion's future ends at the cap. With `future="expected"` it sums, for
    each state of the sample, the expected signal over the vocabulary in place of the sampled token's. With
    `average_reward` it sums differential signals; the next token's part is the same, as a constant cancels in it.

    Raises:
        InputError: As `FullVocabularyTrainer`.
    """

    args: AllActionsKDConfig

    @torch.no_grad()
    def make_rollout(self, rows: list[dict]) -> Rollout:
        """Samples of the student, the teachers' states along them, and the future's advantages."""
        args, timer = self.args, self._timer
        prompt_PS = self.sampling.student_prompts(self.policy, rows)
        with timer.phase("sample"), self.mixed_precision():
            with self.whole_student():
                mixed_with = self._mixture(rows) if args.teacher_mix else None
                completions = self.sampling.completions(self.policy, *prompt_PS, self._rollout_number, mixed_with)
            rollout = self.sampling.rollout_of(prompt_PS, completions)
            if rollout.old_logps_BT is None:
                rollout = rollout.with_(old_logps_BT=self.sampling.log_probs(self.policy, rollout))
        with timer.phase("score"):
            rollout = self._with_teacher_states(rollout, rows)
            rollout = rollout.with_(rewards_BT=self._with_teachers_heads(partial(self._signals, rollout)))
            rollout = self._dropping(
                rollout,
                rows,
                {
                    **self._usable_states(rollout),
                    "the student's log-probabilities": usable_rows(rollout.old_logps_BT, rollout.completion_mask_BT),
                    "the signal": usable_rows(rollout.rewards_BT, rollout.completion_mask_BT),
                },
            )
            if self.rollout_state.lost:
                return rollout
            if args.teacher_mix:
                importance_BT = self._with_teachers_heads(partial(self._importance, rollout))
                rollout = rollout.with_(importance_BT=importance_BT)
            rollout = self.advantages(rollout)
        reward_B = sequence_sum(rollout.rewards_BT, rollout.completion_mask_BT)
        mean, _ = masked_moments(reward_B, rollout.counted_B, sum_over_ranks=self._sum_over_ranks)
        metrics = {"reward": float(mean), **completion_metrics(rollout, self._sum_over_ranks)}
        self._metrics.record(metrics)
        self._guard(rollout, metrics)
        self.sample_table = sample_table(
            rows, decode(completions, self.processing_class), rollout, args.num_completions_to_print, reward_B=reward_B
        )
        return rollout

    def advantages(self, rollout: Rollout) -> Rollout:
        """The future's, of the sampled tokens' signals or of the expected ones."""
        futures_BT = rollout.rewards_BT
        if self.args.future == "expected":
            futures_BT = self._with_teachers_heads(partial(self._expected_signals, rollout))
        return rollout.with_(advantages_BT=self._future_advantages(futures_BT, rollout))

    @property
    def _turn(self) -> int:
        """The index of the scorer that is mixed into this rollout's samples; scorers take turns."""
        return self._rollout_number % len(self.panel.scorers)

    def _mixture(self, rows: list[dict]) -> Callable[[slice], MixedWith]:
        """A function from a slice of this device's prompts to the teacher, with its own questions for these."""
        scorer = self.panel.scorers[self._turn]
        backbone = scorer.teacher.backbone
        texts = scorer.prompts([self.panel.questions(row) for row in rows])
        ids_PS, mask_PS = self.sampling.tokenized(
            backbone, texts, scorer.teacher.max_prompt_length, scorer.teacher.processing_class
        )

        def of_prompts(part: slice) -> MixedWith:
            index_B = self.sampling.prompt_index(len(ids_PS[part]))
            return MixedWith(backbone, ids_PS[part], mask_PS[part], index_B, self.args.teacher_mix)

        return of_prompts

    def _importance(self, rollout: Rollout) -> Tensor:
        """The student's probability of the sampled tokens divided by the mixture's, `[B, T]`."""
        teacher_logps_BT = self._at_tokens(
            rollout,
            chosen_signals(
                [self._teachers_at(rollout)[self._turn]],
                rollout.completion_ids_BT[rollout.completion_mask_BT],
                teacher_signal=partial(log_ratio_signal, forbidden_V=self.policy.forbidden_V),
                vocab_size=self.panel.scorers[self._turn].teacher.backbone.vocab_size,
            ),
        )
        return mixture_importance(
            rollout.old_logps_BT, teacher_logps_BT, rollout.completion_mask_BT, weight=self.args.teacher_mix
        )

    def _at_tokens(self, rollout: Rollout, values_N: Tensor) -> Tensor:
        """The values of the N real tokens as `[B, T]`, 0 elsewhere."""
        mask_BT = rollout.completion_mask_BT
        return torch.zeros(mask_BT.shape, device=mask_BT.device).masked_scatter(mask_BT, values_N.to(mask_BT.device))

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
        signals_BT = self._at_tokens(rollout, signals_N)
        return signals_BT - rollout.old_logps_BT if self.args.signal == "log_ratio" else signals_BT

    def _expected_signals(self, rollout: Rollout) -> Tensor:
        """Σ_a π(a|s_t) g(s_t, a) in the states of the sampled tokens, `[B, T]`."""
        size, count = self.args.per_device_train_batch_size, self.args.steps_per_generation
        parts = [self._expected_of_batch(rollout.micro_batch(number, size)) for number in range(count)]
        return self._at_tokens(rollout, torch.cat(parts))

    def _expected_of_batch(self, batch: Rollout) -> Tensor:
        teachers = self._teachers_at(batch)

        def of_states(states_ND: Tensor, head, _parameters) -> Tensor:
            return expected_signals(states_ND, head, teachers, **self._signal_settings)

        return self.policy(**batch.policy_inputs(), function_of_states=of_states)

    @property
    def _signal_settings(self) -> dict:
        """The arguments with which the functions of `ops.all_actions` compute g from the logits."""
        return {
            "teacher_signal": self._teacher_signal,
            "subtract_log_pi": self.args.signal == "log_ratio",
            "vocab_size": self.policy.backbone.vocab_size,
            "temperature": self.args.temperature,
            "forbidden_V": self.policy.forbidden_V,
        }

    def _future_advantages(self, signals_BT: Tensor, rollout: Rollout) -> Tensor:
        """w (F_t − b_t), `[B, T]`; with `average_reward` of differential signals."""
        args, mask_BT = self.args, rollout.completion_mask_BT

        def advantages_of(signals_BT: Tensor) -> Tensor:
            futures_BT = future_returns(
                signals_BT, mask_BT, gamma=args.gamma, length_normalization=args.length_normalization
            )
            if args.baseline == "leave_one_out":
                futures_BT = future_advantages(
                    futures_BT, mask_BT, num_generations=args.num_generations, kept_B=rollout.kept_B
                )
            return args.future_weight * futures_BT

        average_reward_B = self._average_reward(signals_BT, rollout)
        return differential_advantages(advantages_of, signals_BT, mask_BT, average_reward_B)

    def micro_batch_loss(
        self, model, batch: Rollout, *, tokens: Tensor, sequences: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        mask_BT, weights_BT = batch.completion_mask_BT, batch.loss_mask_BT / tokens
        if batch.importance_BT is not None:
            weights_BT = weights_BT * batch.importance_BT
        loss_of_states = partial(
            sliced_all_actions_loss,
            teachers=self._teachers_at(batch),
            weights_N=weights_BT[mask_BT],
            chosen_N=batch.completion_ids_BT[mask_BT],
            futures_N=batch.advantages_BT[mask_BT],
            old_logps_N=batch.old_logps_BT[mask_BT],
            epsilon=self.args.epsilon,
            **self._signal_settings,
        )
        return self._with_teachers_heads(lambda: model(**batch.policy_inputs(), function_of_states=loss_of_states))
