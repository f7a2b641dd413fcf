"""A trainer whose optimizer steps do not spread NaN or infinity to the weights.

Samples that are not finite are left out of a step. A step that is not finite without them is skipped, and too many
skipped steps in a row stop the run.
"""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from rlkd_trl.errors import TrainingError
from rlkd_trl.models.finite import listed, not_finite, weights_of
from rlkd_trl.trainers.checkpoint_files import newest_whole
from rlkd_trl.trainers.gradient_scaler import tolerating_empty_steps

logger = logging.get_logger(__name__)
# The attributes in which a `FiniteTrainer` counts: plain values, which are saved in checkpoints.
COUNTERS = (
    "steps_skipped",
    "_skipped_in_a_row",
    "_skipped_since_log",
    "_steps_since_log",
    "_dropped_since_log",
    "_first_seen",
)
PROMPTS_SHOWN = 3  # so many prompts of samples that are dropped together are logged
_PROMPT_WIDTH = 200
# The arguments of a training step: the samples, in a type of the method's own, and the number that Trainer divides the
# loss by, if any.
MicroBatch = tuple[object, Tensor | int | None]


class FiniteTrainer(Trainer):
    """`transformers.Trainer` that updates with those samples only whose loss and gradients are finite.

    If the loss or a gradient of an optimizer step is NaN or infinite, each sample is tried alone. Samples that are not
    finite are counted and logged with their prompts, and the step is done again without them, on all processes. If no
    single sample is the cause, or none is left, the whole step is skipped: weights and optimizer state stay as they
    are, while the step and the learning rate's schedule are counted on. After `args.max_skipped_steps` skipped steps
    in a row `train` saves a checkpoint and raises `TrainingError`; it also raises it after a shorter run that has
    skipped all its steps. A gradient whose square overflows float32 counts as infinite.

    With `fp16` the gradient scaler handles gradients that overflow: it skips the step and lowers its scale. Such a
    step counts as skipped here only when the scale is 1 or less. DeepSpeed updates within the backward pass, so that
    losses are checked before it, one micro-batch at a time; what earlier micro-batches of the same step have added to
    the gradients stays. There the run stops before the update at a loss that is not finite although no sample's own
    is, and after the update at gradients that are not finite.

    Weights that are not finite are never saved.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps_skipped = 0
        self._skipped_in_a_row = 0
        self._steps_since_log = self._skipped_since_log = self._dropped_since_log = 0
        self._first_seen = ""
        self._losses_are_finite = torch.ones((), device=self.args.device)
        self._loss_of_step = torch.zeros((), device=self.args.device)
        self._micro_batches: list[MicroBatch] = []  # of the current optimizer step
        self.contributes = True
        self._step_is_bad = False
        self._stop_reason = ""
        self.add_callback(_SkippedSteps(self))

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = tolerating_empty_steps(self.accelerator.scaler, self.args.device)

    # What a method defines

    def sample_loss(self, model: nn.Module, micro_batch: MicroBatch, b: int) -> Tensor:
        """The share of sample b in the step's loss, a scalar. All processes call it together, equally often."""
        raise NotImplementedError

    def prompt_of(self, micro_batch: MicroBatch, b: int) -> str:
        """The prompt of sample b."""
        raise NotImplementedError

    def samples_in(self, micro_batch: MicroBatch) -> Tensor:
        """Which of the micro-batch's samples are in the update, `[B]`, bool."""
        raise NotImplementedError

    def keeping(self, micro_batches: list[MicroBatch], kept: list[Tensor]) -> list[MicroBatch]:
        """The micro-batches of the current step without some samples; losses are divided by the numbers that remain.

        kept: for each micro-batch, `[B]`, False for the samples to leave out. All processes call it together.
        """
        raise NotImplementedError

    # Training

    def train(self, *args, **kwargs):
        """Trains as Trainer does. Raises `TrainingError` if too many steps in a row, or all, were not finite."""
        self._stop_reason = ""
        output = super().train(*args, **kwargs)
        if not self._stop_reason and self.steps_skipped and self.steps_skipped == self.state.global_step:
            self._stop_reason = (
                f"Nothing was learnt: all {self.steps_skipped} steps were skipped, since their loss or gradients were "
                f"not finite, first in {self._first_seen}. Look at the data, the reward, and the models' weights."
            )
        if self._stop_reason:
            raise TrainingError(self._stop_reason)
        return output._replace(training_loss=output.metrics["train_loss"])  # which leaves out skipped steps

    def mean_loss(self, total: float) -> float:
        """The sum of all steps' losses, divided by the number of steps that were not skipped; NaN if all were."""
        taken = self.state.global_step - self.steps_skipped
        return total / taken if taken else math.nan

    def training_step(self, model: nn.Module, inputs, num_items_in_batch=None) -> Tensor:
        """As Trainer's, but losses of a skipped step are returned as 0, since a NaN would stay in Trainer's sum."""
        if self.is_deepspeed_enabled:
            return self._engine_step(model, inputs, num_items_in_batch)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._micro_batches.append((inputs, num_items_in_batch))
        is_finite = torch.isfinite(loss)
        self._losses_are_finite *= is_finite.float()
        counted = torch.where(is_finite, loss, 0)
        before = self._loss_of_step
        self._loss_of_step = before + counted
        if self.accelerator.sync_gradients:
            self._finish_step(model)
            counted = self._loss_of_step - before
            self._loss_of_step = torch.zeros_like(counted)
        return counted

    @property
    def step_is_skipped(self) -> bool:
        """Whether the current optimizer step has turned out not finite."""
        return self._step_is_bad

    def forget_step(self) -> None:
        """Deletes what was recorded of the current step's micro-batches, before the step is done again."""

    def checked_loss(self, loss: Tensor) -> Tensor:
        """The loss for the backward pass; a zero without gradients if this process has no sample left in the step.

        Raises:
            _LossNotFiniteError: With DeepSpeed, a process's loss is not finite.
        """
        if self.is_deepspeed_enabled and not self.on_all_ranks(torch.isfinite(loss.detach()).float()):
            raise _LossNotFiniteError(float(loss))
        return loss if self.contributes else torch.zeros_like(loss).requires_grad_()

    def _finish_step(self, model: nn.Module) -> None:
        """Checks the step after its last backward pass; one that is not finite is done again with fewer samples.

        If it is still not finite, it is skipped.
        """
        micro_batches, self._micro_batches = self._micro_batches, []
        reason = self._why_not_finite()
        if reason is None:
            return
        kept = self._samples_to_keep(model, micro_batches)
        if kept is not None:
            self._do_again(model, self.keeping(micro_batches, kept), kept)
            reason = self._why_not_finite()
        if reason is not None:
            self._loss_of_step = torch.zeros_like(self._loss_of_step)
            self.skip_step(reason)

    def _why_not_finite(self) -> str | None:
        """Which of the step's losses and gradients are not finite, in words; None if all are, on all processes."""
        scaler = self.accelerator.scaler
        is_scaled = scaler is not None and scaler.is_enabled()
        finite = own_losses = self._losses_are_finite
        if not is_scaled:  # the gradient scaler checks scaled gradients itself
            finite = finite * self._gradients_are_finite().to(finite.device)
        self._losses_are_finite = torch.ones_like(finite)
        if self.on_all_ranks(finite):
            return None
        names = not_finite((n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None)
        return _reason(names, losses_are_finite=bool(own_losses), norm_is_finite=bool(finite))

    def _gradients_are_finite(self) -> Tensor:
        """1 if the norm of all gradients is finite, else 0."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not gradients:
            return torch.ones(())
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return torch.isfinite(norm).float()

    def _samples_to_keep(self, model: nn.Module, micro_batches: list[MicroBatch]) -> list[Tensor] | None:
        """For each micro-batch the samples whose own loss and gradients are finite, `[B]`, each tried alone.

        The others are counted, and a few of their prompts logged. Returns None if all samples are finite, or none on
        any process.
        """
        kept, bad_prompts = [], []
        for micro_batch in micro_batches:
            in_update_B = self.samples_in(micro_batch)
            usable_B = torch.tensor(
                [self._is_usable(model, micro_batch, b) for b in range(len(in_update_B))], device=in_update_B.device
            )
            kept.append(in_update_B & usable_B)
            bad_prompts += [(micro_batch, b) for b in (in_update_B & ~usable_B).nonzero()[:, 0].tolist()]
        self.model.zero_grad(set_to_none=True)
        counts = torch.tensor([len(bad_prompts), sum(int(kept_B.sum()) for kept_B in kept)], device=self.args.device)
        dropped, left = self.accelerator.reduce(counts.float(), reduction="sum").tolist()
        goes_on = dropped > 0 and left > 0
        if dropped:
            what = f"A sample {'is dropped from the update' if goes_on else 'spoils the step'}, its loss or gradients"
        else:
            what = "The loss of a step or its gradients, but no sample's own, are"
            bad_prompts = [(micro_batches[0], b) for b in range(len(kept[0]))]
        self.warn_of_prompts(f"{what} not finite", [self.prompt_of(*bad) for bad in bad_prompts[:PROMPTS_SHOWN]])
        self._dropped_since_log += dropped if goes_on else 0
        return kept if goes_on else None

    def _is_usable(self, model: nn.Module, micro_batch: MicroBatch, b: int) -> bool:
        """Whether the loss of a sample alone, and its gradients, are finite on this process."""
        if self.is_deepspeed_enabled:  # its backward pass would update the weights
            with torch.no_grad():
                return bool(torch.isfinite(self.sample_loss(model, micro_batch, b)))
        self.model.zero_grad(set_to_none=True)
        with self.accelerator.no_sync(model), self.compute_loss_context_manager():
            loss = self.sample_loss(model, micro_batch, b)
            if loss.requires_grad:
                loss.backward()
        return bool(torch.isfinite(loss)) and bool(self._gradients_are_finite())

    def _do_again(self, model: nn.Module, micro_batches: list[MicroBatch], kept: list[Tensor]) -> None:
        """Computes the step's gradients and loss again. A process without a sample adds nothing to them."""
        self.forget_step()
        self._loss_of_step = torch.zeros_like(self._loss_of_step)
        for (inputs, num_items_in_batch), kept_B in zip(micro_batches, kept, strict=True):
            self.contributes = bool(kept_B.any())
            with self.accelerator.no_sync(model):
                loss = super().training_step(model, inputs, num_items_in_batch)
            self._losses_are_finite *= torch.isfinite(loss).float()
            self._loss_of_step += loss
        self.contributes = True
        self._average_gradients()

    def _average_gradients(self) -> None:
        """Averages gradients over the processes; one that has no gradient of a weight counts as 0."""
        if self.accelerator.num_processes == 1:
            return
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        has_any = torch.tensor([weight.grad is not None for weight in weights], device=self.args.device).float()
        for weight, count in zip(weights, self.accelerator.reduce(has_any, reduction="sum").tolist(), strict=True):
            if count:
                own = torch.zeros_like(weight) if weight.grad is None else weight.grad
                weight.grad = self.accelerator.reduce(own, reduction="mean")

    def warn_of_prompts(self, what: str, prompts: Sequence[str]) -> None:
        """Logs one line for each prompt: `what` happened, and the beginning of the prompt."""
        for prompt in prompts:
            logger.warning(f"{what}, of the prompt: {textwrap.shorten(prompt, _PROMPT_WIDTH)!r}")

    def skip_step(self, reason: str) -> None:
        """Leaves out the current optimizer step and logs the reason. All processes call it together."""
        self.model.zero_grad(set_to_none=True)
        self._note_skipped(reason)

    def _engine_step(self, model: nn.Module, inputs, num_items_in_batch) -> Tensor:
        """A training step with DeepSpeed, without the samples whose losses are not finite. Raises `TrainingError`."""
        try:
            try:
                loss = super().training_step(model, inputs, num_items_in_batch)
            except _LossNotFiniteError:  # before the backward pass, on all processes
                micro_batch = (inputs, num_items_in_batch)
                kept = self._samples_to_keep(model, [micro_batch])
                if kept is None:
                    raise
                [(inputs, num_items_in_batch)] = self.keeping([micro_batch], kept)
                loss = super().training_step(model, inputs, num_items_in_batch)
        except _LossNotFiniteError as error:
            raise TrainingError(
                f"Training stopped in step {self.state.global_step + 1}, before its update: the loss is {error.loss}. "
                f"{self._last_checkpoint()}"
            ) from None
        self._check_engine()
        return loss

    def _check_engine(self) -> None:
        """Raises `TrainingError` if DeepSpeed has updated with gradients that are not finite; with fp16 it skips."""
        norm = self.model_wrapped.get_global_grad_norm()
        if norm is not None and not math.isfinite(norm) and not self.args.fp16:
            raise TrainingError(
                f"Training stopped: the gradients of step {self.state.global_step + 1} are not finite (norm {norm}), "
                f"and DeepSpeed has taken the step. {self._last_checkpoint()}"
            )

    def on_all_ranks(self, finite: Tensor) -> bool:
        """Whether `finite`, a scalar of 1 or 0, is 1 on every process."""
        return float(self.accelerator.reduce(finite.clone(), reduction="sum")) == self.accelerator.num_processes

    def _note_skipped(self, reason: str) -> None:
        step = self.state.global_step + 1
        if not self._skipped_in_a_row:
            self._first_seen = f"step {step} ({reason})"
        self._step_is_bad = True
        if self.is_world_process_zero():
            logger.warning(f"Step {step} is skipped: {reason}.")

    def _end_of_step(self) -> bool:
        """Counts a finished step as taken or skipped, and returns whether the run is to stop."""
        scaler = self.accelerator.scaler
        has_overflowed = getattr(scaler, "has_overflowed", self.accelerator.optimizer_step_was_skipped)
        if has_overflowed and scaler is not None and scaler.get_scale() <= 1:
            self._note_skipped("gradients that overflow float16 at a scale of 1")
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if self._step_is_bad else 0
        self.steps_skipped += self._step_is_bad
        self._skipped_since_log += self._step_is_bad
        self._steps_since_log += 1
        self._step_is_bad = False
        if self._skipped_in_a_row < self.args.max_skipped_steps:
            return False
        step = self.state.global_step
        self._stop_reason = (
            f"Training stopped at step {step}: the last {self._skipped_in_a_row} steps were skipped, since their loss "
            f"or gradients were not finite, first in {self._first_seen}. The weights of before them are in "
            f"{Path(self.args.output_dir) / f'checkpoint-{step}'}."
        )
        return True

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Logs as Trainer does, with `loss` as the mean over the steps that were not skipped, NaN if all were.

        `steps_skipped` and `samples_dropped`, the numbers since the last log, are added if they are not 0.
        """
        if "loss" in logs:
            steps, skipped = self._steps_since_log, self._skipped_since_log
            if skipped:
                taken = steps - skipped
                loss = logs["loss"] * steps / taken if taken else math.nan
                logs = {**logs, "loss": loss, "steps_skipped": float(skipped)}
            if self._dropped_since_log:
                logs = {**logs, "samples_dropped": logs.get("samples_dropped", 0.0) + self._dropped_since_log}
            self._steps_since_log = self._skipped_since_log = self._dropped_since_log = 0
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's. Raises `TrainingError`, on all processes, rather than write weights that are not finite."""
        bad = not_finite(weights_of(self.model))
        finite = torch.tensor(float(not bad), device=self.args.device)
        # DeepSpeed's processes may hold different weights, and all call this; otherwise a single one may do so.
        is_whole = self.on_all_ranks(finite) if self.is_deepspeed_enabled else not bad
        if not is_whole:
            raise TrainingError(
                f"The student's weights are not finite after step {self.state.global_step} ({listed(bad)}) and were "
                f"not saved. {self._last_checkpoint()}"
            )
        super().save_model(output_dir, _internal_call)

    def _last_checkpoint(self) -> str:
        checkpoint, _ = newest_whole(self.args.output_dir)
        return (
            f"The last good weights are in {checkpoint}."
            if checkpoint
            else "No checkpoint was saved before (--save_steps)."
        )


class _LossNotFiniteError(Exception):
    """With DeepSpeed, raised on all processes before the backward pass, each with its own `loss`."""

    def __init__(self, loss: float):
        super().__init__(loss)
        self.loss = loss


def _reason(gradients: list[str], *, losses_are_finite: bool, norm_is_finite: bool) -> str:
    """What was not finite in a step, in words. gradients: the weights, by name, whose gradients were not finite."""
    what_was_bad = [] if losses_are_finite else ["the loss"]
    if gradients:
        what_was_bad.append(f"gradients of {listed(gradients)}")
    elif losses_are_finite:
        what_was_bad.append("the loss of another process" if norm_is_finite else "the gradients' norm")
    return f"{' and '.join(what_was_bad)} not finite"


class _SkippedSteps(TrainerCallback):
    """After each step asks the trainer whether the run has to stop, and if so has it save a checkpoint first."""

    def __init__(self, trainer: FiniteTrainer):
        self._trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if self._trainer._end_of_step():
            control.should_training_stop = control.should_save = control.should_log = True
