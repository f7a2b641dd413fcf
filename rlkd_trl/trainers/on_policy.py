"""The on-policy loop under PPO, RLOO and REINFORCE.

    1 sample     K completions per prompt from the student
    2 score      the teacher reads each completion once, in teacher forcing
    3 reward     scores to one number per token; KL penalty and truncation penalty
    4 advantage  each method's own
    5 update     each method's own loss, over micro-batches and `num_iterations` passes

Steps 1 to 4 make a `Rollout`; step 5 reads it and nothing else.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlkd_trl.evaluation.token_details import completion_records, reward_values
from rlkd_trl.models.answers import decode
from rlkd_trl.models.generation import Completions
from rlkd_trl.ops.advantages import mean_baseline, min_variance_baseline
from rlkd_trl.ops.finite import usable_rows
from rlkd_trl.ops.losses import approximate_kl, entropy_bonus
from rlkd_trl.ops.masking import masked, masked_whiten, pad_columns, state_mask
from rlkd_trl.ops.rewards import adaptive_kl_coefficient, kl_penalty, sequence_sum
from rlkd_trl.prompts import source_text
from rlkd_trl.rewards import RewardInputs, RewardModel, RewardResult
from rlkd_trl.students import Policy, PolicyOutput, frozen_copy, start_as_identity
from rlkd_trl.trainers.checks import checked_reward_model
from rlkd_trl.trainers.config import OnPolicyConfig
from rlkd_trl.trainers.rollout import Rollout
from rlkd_trl.trainers.rollout_metrics import rollout_metrics, sample_table
from rlkd_trl.trainers.rollout_trainer import RolloutTrainer
from rlkd_trl.trainers.run_record import model_record


class OnPolicyTrainer(RolloutTrainer):
    """Base of `PPOKDTrainer`, `RLOOKDTrainer` and `ReinforceKDTrainer`; see the module's five steps.

    Args:
        model: The student, loaded, or its directory or Hub id.
        reward_funcs: One reward or several: `TeacherForcingReward(...)`, another `TeacherReward`, a TRL reward
            function, or a function of `RewardInputs`; or a `RewardModel`. Weights are `args.reward_weights`.
        args: The method's config.
        train_dataset: Rows with a column `prompt`: what the student reads, texts or conversations. Other columns
            reach the templates and reward functions.
        eval_dataset: The same, with `references` (lists of strings) for text metrics where the data has them.
        processing_class: The student's tokenizer; loaded with the model when that is a name.
        peft_config: Adapters to train in place of the student's weights, as in TRL. The reference of `beta` is then
            the student without them, and takes no memory.
        chat: How the student is asked (among the keyword arguments); see `RolloutTrainer`.

    Raises:
        InputError: Tokenizers differ, no `prompt` column, fewer prompts than one rollout needs, T5 with fp16, settings
            that contradict the reward's.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        reward_funcs: RewardModel | Callable | Sequence[Callable],
        args: OnPolicyConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        peft_config: PeftConfig | None = None,
        **kwargs,
    ):
        reward_model = checked_reward_model(reward_funcs, args)
        super().__init__(
            model,
            reward_model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        self.rollout_state.beta = args.beta
        self.reference = None
        if args.beta > 0:
            # The reference is the student as it is given here, so a resumed run must be given the same one.
            if peft_config is not None and start_as_identity(peft_config):
                self.reference = self.model  # without its adapters, see `_as_reference`
            else:
                self.reference = frozen_copy(self.model, self.processing_class).to(self.accelerator.device)
            self.run_record["reference"] = model_record(self.reference.model)

    # What each method defines

    def sampling_policy(self) -> Policy:
        """The policy of step 1, whose log-probabilities the rollout keeps: by default the student as it is now."""
        return self.policy

    def advantages(self, rollout: Rollout) -> Rollout:
        """Step 4: the rollout with `advantages_BT` (and `returns_BT`, with a critic)."""
        raise NotImplementedError

    def policy_loss(
        self, batch: Rollout, output: PolicyOutput, *, tokens: Tensor, sequences: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Step 5: the loss of one micro-batch, divided by the optimizer step's count of tokens or sequences."""
        raise NotImplementedError

    # Steps 1 to 4

    @torch.no_grad()
    def make_rollout(self, rows: list[dict]) -> Rollout:
        """Samples, scores, rewards and advantages for this device's prompts."""
        rollout, reference_logps_BT = self._sampled(rows)  # 1 sample
        inputs = self._reward_inputs(rollout, rows)
        with self._timer.phase("score"):
            scores = self.reward_model.score(inputs)  # 2 score
            result = self.reward_model.rewards(inputs, scores, allow_not_finite=True)  # 3 reward
        rollout, kl_B = self._rewarded(rollout, result, reference_logps_BT)
        self.sample_table = sample_table(
            rows,
            inputs.completions,
            rollout,
            self.args.num_completions_to_print,
            reward_B=sequence_sum(result.rewards_BT, rollout.completion_mask_BT),
        )
        rollout = self._dropping(rollout, rows, _usable(rollout, result), readable_B=result.readable_B)
        if self.rollout_state.lost:
            return rollout
        rollout = self.advantages(rollout)  # 4 advantage
        self.token_samples = partial(self._token_samples, inputs, scores, result, rollout)
        metrics = rollout_metrics(rollout, result, kl_B, self._sum_over_ranks)
        self._metrics.record(metrics)
        self._guard(rollout, metrics)
        if kl_B is not None:
            self._metrics.record({"beta": self.rollout_state.beta})
            self._adapt_beta(metrics["kl"], num_samples=len(kl_B) * self.accelerator.num_processes)
        return rollout

    def _sampled(self, rows: list[dict]) -> tuple[Rollout, Tensor | None]:
        """Completions of the rows' prompts with the student's log-probabilities, and the reference's, where needed."""
        policy = self.sampling_policy()
        whole_student = self.whole_student() if policy is self.policy else nullcontext()
        with self._timer.phase("sample"), self.mixed_precision(), whole_student:
            prompt_PS = self.sampling.student_prompts(policy, rows)
            completions = self.sampling.completions(policy, *prompt_PS, self._rollout_number)
            rollout = self.sampling.rollout_of(prompt_PS, completions)
        with self._timer.phase("log_probs"), self.mixed_precision():
            return self._student_log_probs(policy, rollout)

    def _reward_inputs(self, rollout: Rollout, rows: list[dict]) -> RewardInputs:
        return RewardInputs(
            rows=rows,
            prompt_index_B=rollout.prompt_index_B,
            completion_ids_BT=rollout.completion_ids_BT,
            completion_mask_BT=rollout.completion_mask_BT,
            ended_B=rollout.ended_B,
            completions=decode(rollout.completions, self.processing_class),
            student_logps_BT=rollout.old_logps_BT,
            forbidden_V=self.policy.forbidden_V,
            tokenizer=self.processing_class,
        )

    def _token_samples(
        self, inputs: RewardInputs, scores: dict, result: RewardResult, rollout: Rollout
    ) -> list[dict[str, object]]:
        """The first completions, less those that are dropped, with what each token's reward and advantage are of."""
        values = reward_values(self.reward_model, scores, result, inputs.completion_mask_BT)
        values["advantage"] = rollout.advantages_BT
        if rollout.old_logps_BT is not None:
            values["student_logp"] = rollout.old_logps_BT
        records = completion_records(
            [source_text(prompt) for prompt in inputs.column("prompt")[: self.args.num_completions_to_print]],
            Completions(inputs.completion_ids_BT, inputs.completion_mask_BT, inputs.ended_B),
            self.processing_class,
            values,
            kind="rollout",
            by="student",
        )
        kept = rollout.counted_B.tolist()
        return [record for record, is_kept in zip(records, kept, strict=False) if is_kept]

    def _rewarded(
        self, rollout: Rollout, result: RewardResult, reference_logps_BT: Tensor | None
    ) -> tuple[Rollout, Tensor | None]:
        """The rollout with its rewards, less the penalties for KL and truncation; and the KL in nats, `[B]`."""
        rewards_BT, completion_rewards_BT, kl_B = result.rewards_BT, result.completion_rewards_BT, None
        if reference_logps_BT is not None:
            kl_BT = kl_penalty(rollout.old_logps_BT, reference_logps_BT, rollout.completion_mask_BT)
            rewards_BT, kl_B = rewards_BT - self.rollout_state.beta * kl_BT, kl_BT.sum(dim=1)
        if self.args.missing_eos_penalty is not None:
            penalties_BT = self.args.missing_eos_penalty * rollout.truncated_last_token_BT()
            rewards_BT, completion_rewards_BT = rewards_BT - penalties_BT, completion_rewards_BT - penalties_BT
        rollout = rollout.with_(
            rewards_BT=rewards_BT,
            completion_rewards_BT=completion_rewards_BT,
            potentials_BT1=result.potentials_BT1,
        )
        return rollout, kl_B

    def _adapt_beta(self, kl: float, *, num_samples: int) -> None:
        """Moves `beta` towards a KL of `kl_target` nats per completion, where that is set."""
        args, state = self.args, self.rollout_state
        if args.kl_target is not None:
            state.beta = adaptive_kl_coefficient(
                state.beta, kl=kl, target=args.kl_target, horizon=args.kl_horizon, num_samples=num_samples
            )

    def _needs_old_log_probs(self) -> bool:
        """Whether log π_old, or the old values, are needed before the update, or differ from the update's own.

        With one optimizer step per rollout they do not differ: the policy of the update is still the one that sampled.
        """
        args = self.args
        several_steps = args.steps_per_generation * args.num_iterations > args.gradient_accumulation_steps
        by_rewards = self.reference is not None or self.reward_model.reads_student_log_probs
        by_advantages = self.critic_kind != "none" or args.baseline == "min_variance"
        return several_steps or by_rewards or by_advantages

    def _student_log_probs(self, policy: Policy, rollout: Rollout) -> tuple[Rollout, Tensor | None]:
        """The rollout with old log-probabilities and values if they are needed, and the reference's log-probabilities.

        The student's come from sampling; where that does not tell them, from a pass over the completions.
        """
        if not self._needs_old_log_probs():
            return rollout.with_(old_logps_BT=None), None
        if rollout.old_logps_BT is None:
            width = rollout.completion_ids_BT.shape[1]
            old = self.sampling.outputs(policy, rollout)
            rollout = rollout.with_(old_logps_BT=pad_columns([output.logps_BT for output in old], width))
            if old[0].values is not None:
                values_BT1 = pad_columns([output.values for output in old], width + 1)
                rollout = rollout.with_(old_values_BT1=values_BT1)
        if self.reference is None:
            return rollout, None
        with self._as_reference():
            return rollout, self.sampling.log_probs(self.reference, rollout)

    def _as_reference(self) -> AbstractContextManager:
        """Within it `reference` is the initial policy: a copy always is, the student only without its adapters."""
        return self.reference.model.disable_adapter() if self.reference is self.model else nullcontext()

    # Step 5

    def micro_batch_loss(
        self, model, batch: Rollout, *, tokens: Tensor, sequences: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        output, mask_BT = model(**batch.policy_inputs(), with_final_value=False), batch.loss_mask_BT
        if batch.old_logps_BT is None:
            batch = batch.with_(old_logps_BT=output.logps_BT.detach())
        loss, metrics = self.policy_loss(batch, output, tokens=tokens, sequences=sequences)
        metrics["approx_kl"] = approximate_kl(output.logps_BT, batch.old_logps_BT, mask_BT, denominator=tokens)
        entropy_loss, entropy_metrics = entropy_bonus(output.entropy_BT, mask_BT, denominator=tokens)
        if self.args.entropy_coef:
            loss = loss + self.args.entropy_coef * entropy_loss
        return loss, {**metrics, **entropy_metrics}

    def _close_window(self) -> None:
        """As in the base class; also stops this rollout's updates if the policy has moved by more than allowed."""
        kl, limit = self._window_metrics["approx_kl"], self.args.early_stop_kl
        self.rollout_state.stopped = limit is not None and kl > limit
        super()._close_window()

    # For step 4

    def _minus_baseline(self, rollout: Rollout, returns_BT: Tensor) -> Tensor:
        """Returns, or advantages, minus the constant baseline that `args.baseline` names; 0 behind the mask."""
        baseline, mask_BT = 0.0, rollout.loss_mask_BT
        if self.args.baseline == "mean":
            baseline = mean_baseline(returns_BT, mask_BT, sum_over_ranks=self._sum_over_ranks)
        elif self.args.baseline == "min_variance":
            logps_BT, ratios_BT = self._sampled_log_probs(rollout)
            baseline = min_variance_baseline(
                returns_BT, logps_BT, mask_BT, ratios_BT=ratios_BT, sum_over_ranks=self._sum_over_ranks
            )
        return masked(returns_BT - baseline, rollout.completion_mask_BT)

    def _sampled_log_probs(self, rollout: Rollout) -> tuple[Tensor, Tensor | None]:
        """The student's log π(y_t|s_t), `[B, T]`, and its importance ratio if another policy has sampled."""
        return rollout.old_logps_BT, None

    def _whitened(self, advantages: Tensor, mask: Tensor) -> Tensor:
        return masked_whiten(advantages, mask, sum_over_ranks=self._sum_over_ranks)


def _usable(rollout: Rollout, result: RewardResult) -> dict[str, Tensor]:
    """For each kind of number that the update reads, by name: whether all those of a completion are finite, `[B]`."""
    mask_BT = rollout.completion_mask_BT
    states_BT1 = state_mask(mask_BT, rollout.ended_B)
    is_usable_B = {f"the reward {name}": usable_rows(term_BT, mask_BT) for name, term_BT in result.terms.items()}
    is_usable_B["the sum of rewards"] = usable_rows(rollout.rewards_BT, mask_BT)
    is_usable_B["the teacher's V"] = usable_rows(rollout.potentials_BT1, states_BT1)
    if result.scores is not None:
        is_usable_B["the teacher's log-probabilities"] = usable_rows(result.teacher_nll_BT(mask_BT), mask_BT)
    if rollout.old_logps_BT is not None:
        is_usable_B["the student's log-probabilities"] = usable_rows(rollout.old_logps_BT, mask_BT)
    if rollout.old_values_BT1 is not None:
        is_usable_B["the critic's values"] = usable_rows(rollout.old_values_BT1, states_BT1)
    return is_usable_B
