"""Optimizer steps that NaN and infinity cannot spread by.

Samples that are not finite are left out of them, a step that is not finite even so is skipped, many stop the run.
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
# What a `FiniteTrainer` has counted, by attribute; plain values, for a checkpoint to hold.
COUNTERS = (
    "steps_skipped",
    "_skipped_in_a_row",
    "_skipped_since_log",
    "_steps_since_log",
    "_dropped_since_log",
    "_first_seen",
)
PROMPTS_SHOWN = 3  # of the samples dropped at one time
_PROMPT_WIDTH = 200
# What a training step is given: a method's own kind of samples, and the count that Trainer divides losses by, if any.
MicroBatch = tuple[object, Tensor | int | None]


class FiniteTrainer(Trainer):
    """`transformers.Trainer` whose updates are those of the samples whose loss and gradients are finite.

    If the loss or a gradient of an optimizer step is NaN or infinite, each of its samples is tried alone, the bad ones
    are counted and logged with their prompts, and the step is done again as if they had never been there, on all
    processes. If no sample is to blame, or none is left, the step is skipped whole: weights and optimizer state are
    left alone; the step still counts, and the learning rate's schedule goes on with the count. After
    `args.max_skipped_steps` of these in a row `train` saves a checkpoint and raises `TrainingError`. A gradient whose
    square overflows float32 counts as infinite.

    With `fp16`, gradients that overflow are the scaler's business: it skips the step and lowers the scale, which
    counts here only when the scale is down to 1. With DeepSpeed, which updates within the backward pass, losses are
    looked at before it, one micro-batch at a time: what earlier ones of the same step have added stays as it was. The
    run stops at the first loss that no bad sample explains, before the update, and at the first gradient that is not
    finite, after it.

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
        self._micro_batches: list[MicroBatch] = []  # of the step in work
        self.contributes = True
        self._step_is_bad = False
        self._stop_reason = ""
        self.add_callback(_SkippedSteps(self))

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = tolerating_empty_steps(self.accelerator.scaler, self.args.device)

    # What a method defines

    def sample_loss(self, model: nn.Module, micro_batch: MicroBatch, b: int) -> Tensor:
        """What sample b adds to the step's loss. All processes call it together, equally often."""
        raise NotImplementedError

    def prompt_of(self, micro_batch: MicroBatch, b: int) -> str:
        """The prompt of sample b."""
        raise NotImplementedError

    def samples_in(self, micro_batch: MicroBatch) -> Tensor:
        """`[B]`: which of the micro-batch's samples are in the update."""
        raise NotImplementedError

    def keeping(self, micro_batches: list[MicroBatch], kept: list[Tensor]) -> list[MicroBatch]:
        """The current step's micro-batches without the samples where `kept`, `[B]` of each, is False.

        Counts that losses are divided by are those without them too. All processes call it together.
        """
        raise NotImplementedError

    # Training

    def train(self, *args, **kwargs):
        """As Trainer's. Raises `TrainingError` if too many steps in a row were not finite."""
        self._stop_reason = ""
        output = super().train(*args, **kwargs)
        if self._stop_reason:
            raise TrainingError(self._stop_reason)
        return output._replace(training_loss=output.metrics["train_loss"])  # as it is logged

    def mean_loss(self, total: float) -> float:
        """The sum of all steps' losses over the steps that were taken, NaN if there is none."""
        taken = self.state.global_step - self.steps_skipped
        return total / taken if taken else math.nan

    def training_step(self, model: nn.Module, inputs, num_items_in_batch=None) -> Tensor:
        """As Trainer's, but the losses of a skipped step add up to 0: in Trainer's running sum a NaN would stay."""
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
        """Takes back what the step in work has recorded of its micro-batches: it is done again."""

    def checked_loss(self, loss: Tensor) -> Tensor:
        """The loss as the backward pass is given it; with DeepSpeed it is finite on all processes.

        In a step that is done again, a micro-batch without any sample gets one without gradients.
        """
        if self.is_deepspeed_enabled and not self.on_all_ranks(torch.isfinite(loss.detach()).float()):
            raise _LossNotFiniteError(float(loss))
        return loss if self.contributes else torch.zeros_like(loss).requires_grad_()

    def _finish_step(self, model: nn.Module) -> None:
        """Of the step whose last gradients are there: it is finite, or made so without some samples, or skipped."""
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
        """Why the step can do harm, in words; None if its losses and gradients are finite on all processes."""
        scaler = self.accelerator.scaler
        is_scaled = scaler is not None and scaler.is_enabled()
        finite = own_losses = self._losses_are_finite
        if not is_scaled:  # scaled ones are the scaler's business
            finite = finite * self._gradients_are_finite().to(finite.device)
        self._losses_are_finite = torch.ones_like(finite)
        if self.on_all_ranks(finite):
            return None
        names = not_finite((n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None)
        return _reason(names, losses_are_finite=bool(own_losses), norm_is_finite=bool(finite))

    def _gradients_are_finite(self) -> Tensor:
        """1 or 0, by the norm of all gradients."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not gradients:
            return torch.ones(())
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return torch.isfinite(norm).float()

    def _samples_to_keep(self, model: nn.Module, micro_batches: list[MicroBatch]) -> list[Tensor] | None:
        """`[B]` of each micro-batch: the samples whose own loss and gradients are finite, each tried alone.

        The others are counted, and logged with their prompts. None if there are no others, or nothing is left of the
        micro-batches on any process.
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
        if self.is_deepspeed_enabled:  # whose backward pass updates
            with torch.no_grad():
                return bool(torch.isfinite(self.sample_loss(model, micro_batch, b)))
        self.model.zero_grad(set_to_none=True)
        with self.accelerator.no_sync(model), self.compute_loss_context_manager():
            loss = self.sample_loss(model, micro_batch, b)
            if loss.requires_grad:
                loss.backward()
        return bool(torch.isfinite(loss)) and bool(self._gradients_are_finite())

    def _do_again(self, model: nn.Module, micro_batches: list[MicroBatch], kept: list[Tensor]) -> None:
        """The step's gradients and loss anew. A process without any sample adds nothing to them."""
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
        """Over the processes, of which some may have none: their share is 0."""
        if self.accelerator.num_processes == 1:
            return
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        has_any = torch.tensor([weight.grad is not None for weight in weights], device=self.args.device).float()
        for weight, count in zip(weights, self.accelerator.reduce(has_any, reduction="sum").tolist(), strict=True):
            if count:
                own = torch.zeros_like(weight) if weight.grad is None else weight.grad
                weight.grad = self.accelerator.reduce(own, reduction="mean")

    def warn_of_prompts(self, what: str, prompts: Sequence[str]) -> None:
        """One line of the log for each of a few prompts."""
        for prompt in prompts:
            logger.warning(f"{what}, of the prompt: {textwrap.shorten(prompt, _PROMPT_WIDTH)!r}")

    def skip_step(self, reason: str) -> None:
        """The optimizer step in work is left out, for a reason that the log gives; all processes call it together."""
        self.model.zero_grad(set_to_none=True)
        self._note_skipped(reason)

    def _engine_step(self, model: nn.Module, inputs, num_items_in_batch) -> Tensor:
        """With DeepSpeed: a micro-batch, without the samples whose losses are not finite."""
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
        """Raises `TrainingError` if DeepSpeed has updated by gradients that are not finite; with fp16 it does not."""
        norm = self.model_wrapped.get_global_grad_norm()
        if norm is not None and not math.isfinite(norm) and not self.args.fp16:
            raise TrainingError(
                f"Training stopped: the gradients of step {self.state.global_step + 1} are not finite (norm {norm}), "
                f"and DeepSpeed has taken the step. {self._last_checkpoint()}"
            )

    def on_all_ranks(self, finite: Tensor) -> bool:
        """Whether `finite`, 1 or 0, is 1 on every process."""
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
        """`loss` is the mean over the steps taken, NaN if there is none; adds how many were skipped, if any.

        And how many samples were dropped from updates.
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
        # Only DeepSpeed's processes may hold different parts; of others a single one may call this.
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
    """With DeepSpeed: a loss that must not come to the backward pass; on all processes, each with its own."""

    def __init__(self, loss: float):
        super().__init__(loss)
        self.loss = loss


def _reason(gradients: list[str], *, losses_are_finite: bool, norm_is_finite: bool) -> str:
    """What was not finite in a step, in words. gradients: the names of the weights whose gradients were not."""
    what_was_bad = [] if losses_are_finite else ["the loss"]
    if gradients:
        what_was_bad.append(f"gradients of {listed(gradients)}")
    elif losses_are_finite:
        what_was_bad.append("the loss of another process" if norm_is_finite else "the gradients' norm")
    return f"{' and '.join(what_was_bad)} not finite"


class _SkippedSteps(TrainerCallback):
    """Asks the trainer after each step whether the run is to stop, and has it save first."""

    def __init__(self, trainer: FiniteTrainer):
        self._trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if self._trainer._end_of_step():
            control.should_training_stop = control.should_save = control.should_log = True
