"""Training on rollouts: make one, pass over it in micro-batches, make the next."""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from rlkd_trl.data.streams import RowStream, known_rows
from rlkd_trl.evaluation.directions import base_metric
from rlkd_trl.evaluation.evaluate import evaluate_student
from rlkd_trl.models.generation import Completions
from rlkd_trl.models.sharding import is_sharded, whole
from rlkd_trl.ops.average_reward import average_reward
from rlkd_trl.prompts import ChatFormat
from rlkd_trl.rewards import RewardModel
from rlkd_trl.students import Policy
from rlkd_trl.trainers.budget import BudgetMeter
from rlkd_trl.trainers.checks import (
    check_best_metric,
    check_evaluated,
    check_held_out,
    check_prompts,
    check_sharding,
)
from rlkd_trl.trainers.config import RolloutConfig
from rlkd_trl.trainers.distillation_trainer import DistillationTrainer
from rlkd_trl.trainers.dropping import UsableSamples
from rlkd_trl.trainers.finite import PROMPTS_SHOWN, MicroBatch
from rlkd_trl.trainers.guards import Guards, answer_sketches, repetition_and_distinct
from rlkd_trl.trainers.preparation import prepare_student, teachers_of
from rlkd_trl.trainers.prompt_sampler import rollout_loader
from rlkd_trl.trainers.rollout import Rollout
from rlkd_trl.trainers.rollout_metrics import PhaseTimer, RunningMeans, print_samples
from rlkd_trl.trainers.rollout_sampling import RolloutSampling
from rlkd_trl.trainers.run_record import reward_record, student_record
from rlkd_trl.trainers.run_state import RolloutState
from rlkd_trl.trainers.signatures import whole_signature
from rlkd_trl.trainers.tracker_tables import TrackerTables

logger = logging.get_logger(__name__)


class RolloutTrainer(DistillationTrainer):
    """Base of the trainers that learn from completions; a method says where these come from, and what the loss is.

    The trained model is a `Policy`. `evaluate` measures with `reward_model`, whose teachers are kept on the device.
    With `peft_config` (a `peft.LoraConfig`, for instance) new adapters are trained and saved in place of the student's
    weights, as in TRL; a critic's weights are trained and saved too.

    Training data that does not fit is a `RowStream`, with which `max_steps` must be given.

    The column `prompt` holds texts or conversations, as in TRL. They go through the chat template of the student's
    tokenizer, if it has one, unless `chat` says otherwise (see `PromptWriter`); a teacher has a `chat` of its own.

    Raises:
        InputError: Tokenizers differ, a loaded student without its tokenizer, training or evaluation data without
            `prompt`, fewer prompts than a rollout takes, T5 with fp16, `peft_config` for a student with adapters; or
            as `PromptWriter`.
    """

    clock_class = BudgetMeter
    critic_kind = "none"

    def __init__(
        self,
        model: PreTrainedModel | str,
        reward_model: RewardModel,
        args: RolloutConfig,
        train_dataset: Dataset | RowStream,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        peft_config: PeftConfig | None = None,
        chat: ChatFormat | None = None,
        **kwargs,
    ):
        check_prompts(train_dataset, args)
        check_held_out(eval_dataset)
        check_evaluated(args, eval_dataset)
        check_best_metric(args, eval_dataset, has_teacher=any(panel.can_score for panel in reward_model.panels))
        check_sharding(args)
        model, writer = prepare_student(
            model, processing_class, peft_config, reward_model, args, known_rows(train_dataset), eval_dataset, chat
        )
        processing_class = writer.processing_class
        self.reward_model = reward_model
        self.rollout_state = RolloutState()
        self.sample_table: list[dict[str, object]] = []
        self.teacher_answers: Completions | None = None  # to the held-out rows, where they have been measured
        self.token_samples: Callable[[], list] = list  # records of the last rollout; see `evaluation.token_details`
        self._metrics = RunningMeans()  # since the last log
        self._window_metrics: dict[str, float] = defaultdict(float)
        self._timer = PhaseTimer()
        self._guards = Guards()
        self._entropy: dict[str, float] = {}  # of the last optimizer step
        self._rollout_average: dict[str, float] = {}  # the last rollout's reward per token, where that is learnt
        super().__init__(
            model=Policy(
                model, processing_class, temperature=args.temperature, critic=self.critic_kind, writer=writer
            ),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=list,
            **kwargs,
        )
        for teacher in teachers_of(reward_model):
            teacher.to(self.accelerator.device)
        self.tracker_tables = TrackerTables(self.callback_handler.callbacks)
        self.add_callback(self.tracker_tables)
        self.sampling = RolloutSampling(args, processing_class, self.accelerator)
        self.run_record |= {
            "student": student_record(model, writer),
            "reward": reward_record(reward_model, known_rows(train_dataset)),
        }

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.__signature__ = whole_signature(cls, without=("reward_model", "data_collator"))

    @property
    def policy(self) -> Policy:
        """The student as it is now, out of its distributed wrapper."""
        return self.accelerator.unwrap_model(self.model_wrapped)

    @property
    def spent(self) -> RolloutState:
        """The state in which the run's seconds are added up."""
        return self.rollout_state

    @contextmanager
    def whole_student(self) -> Iterator[None]:
        """For sampling and evaluation: where ZeRO-3 has sharded the student, every process holds all of it within.

        Otherwise each sampled token would gather every weight anew.
        """
        with whole(self.model_wrapped) if is_sharded(self.model) else nullcontext():
            yield

    @property
    def _micro_steps_per_rollout(self) -> int:
        return self.args.steps_per_generation * self.args.num_iterations

    @property
    def _rollout_number(self) -> int:
        return self.rollout_state.micro_step // self._micro_steps_per_rollout

    # What each method defines

    def make_rollout(self, rows: list[dict]) -> Rollout:
        """Completions for this device's prompts, with everything that the updates read.

        rows: the data rows of the prompts, each with a column `prompt`.
        """
        raise NotImplementedError

    def advantages(self, rollout: Rollout) -> Rollout:
        """The rollout with the advantages of its kept completions; unchanged for a method without advantages."""
        return rollout

    def micro_batch_loss(
        self, model, batch: Rollout, *, tokens: Tensor, sequences: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch, a scalar, and its metrics, as shares of the optimizer step's.

        tokens, sequences: how many the optimizer step has per process; the loss is divided by one of them.
        """
        raise NotImplementedError

    # For `make_rollout`

    def _dropping(
        self,
        rollout: Rollout,
        rows: list[dict],
        is_usable_B: dict[str, Tensor],
        *,
        readable_B: Tensor | None = None,
    ) -> Rollout:
        """The rollout without the completions that have a number which is not finite, or that a teacher cannot read.

        The dropped completions are counted, and the prompts of a few are logged. If no process keeps a completion, the
        rollout is lost, and its optimizer steps are skipped. is_usable_B: for each kind of number, by name, which
        completions have only finite ones, `[B]`. readable_B: which of them have tokens in all teachers' vocabularies,
        `[B]`; None if these are the student's.
        """
        samples = UsableSamples.of(is_usable_B, readable_B, rollout.completion_mask_BT.device)
        if readable_B is not None:
            unreadable, count = self._sum_over_ranks(torch.stack([~readable_B, readable_B | True]).sum(dim=1))
            self._metrics.record({"completions/unreadable": unreadable / count})
        kept_B = samples.kept_B
        dropped, kept = self._sum_over_ranks(torch.stack([(~kept_B).sum(), kept_B.sum()]).float()).tolist()
        if not dropped:
            return rollout
        self._dropped_since_log += dropped
        for b in (~kept_B).nonzero()[:PROMPTS_SHOWN, 0].tolist():
            prompt = str(rows[int(rollout.prompt_index_B[b])]["prompt"])
            self.warn_of_prompts(f"A sample is dropped, {samples.what_is_wrong_with(b)}", [prompt])
        if not kept:
            self.rollout_state.lost = f"all {dropped:.0f} samples dropped, {samples.what_is_wrong()}"
        remaining = rollout.dropping(kept_B)
        # The trainer counts the tokens of `remaining`, where stand-ins replace the completions that were generated.
        tokens = rollout.completion_mask_BT.sum() - remaining.completion_mask_BT.sum()
        self.rollout_state.generated_tokens += int(self._sum_over_ranks(tokens))
        return remaining

    def _guard(self, rollout: Rollout, metrics: dict[str, float]) -> None:
        """Records the share of distinct completions, and warns if they get worse while the reward rises, or collapse.

        metrics: of the rollout's rewards; see `Guards` for what is compared.
        """
        repetition, distinct = repetition_and_distinct(rollout, self.args.num_generations, self._sum_over_ranks)
        self._metrics.record({"completions/distinct": distinct})
        if not self.args.guards:
            return
        measured = {**metrics, **self._entropy, **self._rollout_average, "repetition": repetition}
        measured["completions/distinct"] = distinct
        sketches = answer_sketches(
            rollout.prompt_ids_PS,
            rollout.prompt_mask_PS,
            rollout.completion_ids_BT,
            rollout.counted_BT,
            num_generations=self.args.num_generations,
        )
        warnings = self._guards.warnings(measured, gather_object(sketches.tolist()))
        if warnings:
            self._metrics.record({"guards_raised": len(warnings)})
        if self.is_world_process_zero():
            for warning in warnings:
                logger.warning(f"Step {self.state.global_step}: {warning}.")

    def _average_reward(self, rewards_BT: Tensor, rollout: Rollout) -> Tensor:
        """ρ, the average reward per token, `[B]`, over what `args.average_reward` names; 0 for "none".

        rewards_BT: all rewards. Those that a completion earns once, as a whole, are subtracted here before the average
        is taken (see `ops.average_reward`).
        """
        args, mask_BT = self.args, rollout.counted_BT
        if args.average_reward == "none":
            return torch.zeros_like(rewards_BT[:, 0])
        if rollout.completion_rewards_BT is not None:
            rewards_BT = rewards_BT - rollout.completion_rewards_BT
        of_rollout_B = average_reward(rewards_BT, mask_BT, sum_over_ranks=self._sum_over_ranks)
        self._rollout_average = {"average_reward": float(of_rollout_B[0])}
        self._metrics.record(self._rollout_average)
        if args.average_reward == "rollout":
            return of_rollout_B
        return average_reward(rewards_BT, mask_BT, num_generations=args.num_generations)

    # Updates

    def compute_loss(self, model, inputs: Rollout, return_outputs=False, num_items_in_batch=None):
        """The micro-batch's share of the loss of the optimizer step's whole batch, over all processes.

        The sum of these shares has the gradient of one large batch, however it was divided into micro-batches.
        """
        accumulation = self.current_gradient_accumulation_steps  # Trainer divides the loss by this number
        tokens, sequences = self._window_counts()
        loss, metrics = self.micro_batch_loss(model, inputs, tokens=tokens, sequences=sequences)
        if not self.contributes:
            metrics = {name: torch.zeros_like(share) for name, share in metrics.items()}
        for name, share in self._mean_over_ranks(metrics).items():
            self._window_metrics[name] += share
        return self.checked_loss(loss * accumulation)

    def _window_counts(self) -> tuple[Tensor, Tensor]:
        """The numbers of tokens and of sequences by which the losses of the current optimizer step are divided.

        They are the global numbers over the number of processes, since gradients are averaged over processes.
        """
        state, args = self.rollout_state, self.args
        window = (state.micro_step % args.steps_per_generation) // args.gradient_accumulation_steps
        world = self.accelerator.num_processes
        return state.window_tokens[window] / world, state.window_sequences[window] / world

    # Samples that are not finite

    def sample_loss(self, model, micro_batch: MicroBatch, b: int) -> Tensor:
        tokens, sequences = self._window_counts()
        return self.micro_batch_loss(model, micro_batch[0].micro_batch(b, 1), tokens=tokens, sequences=sequences)[0]

    def prompt_of(self, micro_batch: MicroBatch, b: int) -> str:
        batch = micro_batch[0]
        p = batch.prompt_index_B[b]
        ids = batch.prompt_ids_PS[p][batch.prompt_mask_PS[p].bool()]
        return self.processing_class.decode(ids, skip_special_tokens=True)

    def samples_in(self, micro_batch: MicroBatch) -> Tensor:
        return micro_batch[0].counted_B

    def keeping(self, micro_batches: list[MicroBatch], kept: list[Tensor]) -> list[MicroBatch]:
        """As in `FiniteTrainer`. The samples are dropped from the rollout, so that later passes leave them out, too.

        If this is the rollout's first optimizer step, the advantages are computed anew; in a later step they stay what
        they were in the steps before.
        """
        state, size = self.rollout_state, self.args.per_device_train_batch_size
        last = state.micro_step % self.args.steps_per_generation
        numbers = range(last + 1 - len(micro_batches), last + 1)
        kept_B = state.rollout.counted_B.clone()
        kept_B[numbers.start * size : numbers.stop * size] = torch.cat(kept)
        state.rollout = state.rollout.dropping(kept_B)
        if state.micro_step % self._micro_steps_per_rollout == last and numbers.start == 0:
            recorded = copy.deepcopy(self._metrics)
            with torch.no_grad():
                state.rollout = self.advantages(state.rollout)
            self._metrics = recorded
        self._count_windows()
        counts = [count for _, count in micro_batches]
        return [(state.rollout.micro_batch(i, size), count) for i, count in zip(numbers, counts, strict=True)]

    def forget_step(self) -> None:
        self._window_metrics.clear()

    def training_step(self, model, inputs: list[dict], num_items_in_batch=None) -> Tensor:
        """Trains on the next micro-batch of the rollout; after its last pass a new rollout is made first.

        inputs: the data rows of the prompts of a new rollout.
        """
        state, args = self.rollout_state, self.args
        if state.rollout is None or state.micro_step % self._micro_steps_per_rollout == 0:
            state.lost = ""
            state.rollout = self.make_rollout(inputs)  # 1 sample, 2 score, 3 reward, 4 advantage
            state.stopped = bool(state.lost)
            self._count_windows()
            state.generated_tokens += int(self._sum_over_ranks(state.rollout.completion_mask_BT.sum()))
        if state.stopped:
            # Without gradients the optimizer does not change the weights. All processes come here together.
            loss = torch.zeros((), device=args.device)
            if state.lost and (state.micro_step + 1) % args.gradient_accumulation_steps == 0:
                self.skip_step(state.lost)
        else:
            batch = state.rollout.micro_batch(
                state.micro_step % args.steps_per_generation, args.per_device_train_batch_size
            )
            with self._timer.phase("update"):
                loss = super().training_step(model, batch, num_items_in_batch)  # 5 update
        state.micro_step += 1
        if state.micro_step % args.gradient_accumulation_steps == 0 and self._window_metrics:
            self._close_window()
        if state.micro_step % self._micro_steps_per_rollout == 0:
            self._metrics.record(self._timer.reset(tokens=int(state.rollout.completion_mask_BT.sum())))
        return loss

    def _close_window(self) -> None:
        """Records the metrics of an optimizer step, unless the step was skipped."""
        if not self.step_is_skipped:
            self._metrics.record(self._window_metrics)
            self._entropy = {name: value for name, value in self._window_metrics.items() if name == "entropy"}
        self._window_metrics.clear()

    def _prepare_inputs(self, inputs):
        return inputs  # rows of text; the rollout's tensors are made on the device

    def _count_windows(self) -> None:
        """Counts what is in the loss of each of the rollout's optimizer steps."""
        args = self.args
        steps = args.steps_per_generation // args.gradient_accumulation_steps
        self.rollout_state.count_windows(steps, self._sum_over_ranks)

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """The prompts of each rollout, repeated for each micro-batch of it; a group of samples stays on one device."""
        loader = rollout_loader(
            self.train_dataset,
            self.args,
            repeats=self._micro_steps_per_rollout,
            num_processes=self.accelerator.num_processes,
        )
        return self.accelerator.prepare(loader)

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as Trainer does, with the means of the metrics recorded since the last log of training."""
        is_training_log = "loss" in logs
        if is_training_log:
            logs = {**logs, **self._metrics.take()}
            if self.args.log_completions:
                self.tracker_tables.add("completions", self.sample_table)
        super().log(logs, start_time)
        if self.args.log_completions and is_training_log and self.is_world_process_zero():
            print_samples(self.sample_table, self.state.global_step)

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    def _mean_over_ranks(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        means = self.accelerator.reduce(torch.stack(list(metrics.values())), reduction="mean")
        return dict(zip(metrics, means.tolist(), strict=True))

    # Evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """As in `DistillationTrainer`. Raises `InputError` also for evaluation data without a column `prompt`."""
        check_held_out(self.eval_dataset if eval_dataset is None else eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def measured(self, dataset: Dataset) -> dict[str, float]:
        """Greedy outputs on the rows' prompts: text metrics; of teachers that can score them, NLL and reward.

        Where texts are unreadable, that of these by which the best checkpoint is chosen is NaN, never the best: the
        mean over the others would prefer a student of whose texts few can be read.
        """
        with self.whole_student():
            result = evaluate_student(
                self.policy,
                self.processing_class,
                list(dataset),
                self.reward_model if all(panel.can_score for panel in self.reward_model.panels) else None,
                max_prompt_length=self.args.max_prompt_length,
                max_completion_length=self.args.max_completion_length,
                batch_size=self.args.per_device_eval_batch_size,
                progress=None if self.args.disable_tqdm else "Evaluating the student",
                after_batch=self.stop_if_asked,
            )
        best = self.args.metric_for_best_model and base_metric(self.args.metric_for_best_model)
        if result.metrics.get("unreadable") and best in (
            "reward",
            "teacher_nll_per_token",
            "teacher_nll_per_sequence",
        ):
            result.metrics[best] = math.nan
        return result.metrics

    # Checkpoints

    def run_state(self) -> dict[str, object]:
        """Adds the current rollout, the place in it, metrics that are not logged yet, and the cost of the run."""
        return {
            **super().run_state(),
            "rollout_state": self.rollout_state.saved(),
            "unlogged_metrics": dict(self._metrics.sums),
            "unlogged_seconds": dict(self._timer.seconds),
            "sample_table": self.sample_table,
            "guards": self._guards.history,
            "entropy_of_last_step": self._entropy,
        }

    def load_run_state(self, state: dict[str, object]) -> None:
        super().load_run_state(state)
        self.rollout_state = RolloutState.of_saved(state["rollout_state"], self.accelerator.device)
        self._metrics.sums = state["unlogged_metrics"]
        self._timer.seconds = defaultdict(float, state["unlogged_seconds"])
        self.sample_table = state["sample_table"]
        self._guards.history = state["guards"]
        self._entropy = state["entropy_of_last_step"]

    def is_finished(self) -> bool:
        return super().is_finished() or self._clock.is_spent()
