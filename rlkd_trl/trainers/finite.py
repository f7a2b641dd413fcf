"""Optimizer steps that NaN and infinity cannot spread by: a step that is not finite is skipped, many stop the run."""

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from rlkd_trl.errors import TrainingError
from rlkd_trl.models.finite import listed, not_finite, weights_of
from rlkd_trl.trainers.checkpoint_files import newest_whole

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


class FiniteTrainer(Trainer):
    """`transformers.Trainer` that skips an optimizer step whole if its loss or a gradient is NaN or infinite.

    Weights and optimizer state are then left alone; the step still counts, and the learning rate's schedule goes on
    with the count. All processes take the same decision. After `args.max_skipped_steps` of them in a row `train` saves
    a checkpoint and raises `TrainingError`. A gradient whose square overflows float32 counts as infinite.

    With `fp16`, the scaler's own skipping of steps stays: it lowers the scale, and counts here only if the loss was
    not finite, or the scale is down to 1. With DeepSpeed, which updates within the backward pass, the run stops at the
    first loss that is not finite, before the update, and at the first such gradient, after it.

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
        self._step_is_bad = False
        self._stop_reason = ""
        self.add_callback(_SkippedSteps(self))

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

    def training_step(self, model: nn.Module, *args, **kwargs) -> Tensor:
        """As Trainer's, but the losses of a skipped step add up to 0: in Trainer's running sum a NaN would stay."""
        loss = super().training_step(model, *args, **kwargs)
        if self.is_deepspeed_enabled:
            self._check_engine()
            return loss
        is_finite = torch.isfinite(loss)
        self._losses_are_finite *= is_finite.float()
        counted = torch.where(is_finite, loss, 0)
        self._loss_of_step += counted
        if self.accelerator.sync_gradients:
            if self._skip_unless_finite():
                counted = counted - self._loss_of_step
            self._loss_of_step = torch.zeros_like(counted)
        return counted

    @property
    def step_is_skipped(self) -> bool:
        """Whether the current optimizer step has turned out not finite."""
        return self._step_is_bad

    def checked_loss(self, loss: Tensor) -> Tensor:
        """The loss; with DeepSpeed every process raises `TrainingError` if one of them has one that is not finite."""
        if self.is_deepspeed_enabled and not self.on_all_ranks(torch.isfinite(loss.detach()).float()):
            raise TrainingError(
                f"Training stopped in step {self.state.global_step + 1}, before its update: the loss is "
                f"{float(loss)}. {self._last_checkpoint()}"
            )
        return loss

    def drop_from_update(self, bad_B: Tensor, kept_B: Tensor, prompt_of: Callable[[int], str]) -> bool:
        """Of a micro-batch whose loss is not finite on some process: whether the samples that are kept go on alone.

        All processes call it together, each with its own samples. The bad ones are counted, and logged with their
        prompts. Where a process has none to keep, or nothing is bad on any of them, the step will have to be skipped;
        of the latter the log names prompts of the micro-batch.
        """
        counts = torch.stack([bad_B.sum(), (~kept_B.any()).long()]).float()
        dropped, without_any = self.accelerator.reduce(counts, reduction="sum").tolist()
        goes_on = dropped > 0 and not without_any
        if dropped:
            what = f"A sample {'is dropped from the update' if goes_on else 'spoils the step'}, its log-probabilities"
            shown = bad_B.nonzero()[:, 0].tolist()
        else:
            what, shown = "The loss of a micro-batch, but no log-probability, is", range(len(bad_B))
        self.warn_of_prompts(f"{what} not finite", [prompt_of(b) for b in shown[:PROMPTS_SHOWN]])
        self._dropped_since_log += dropped if goes_on else 0
        return goes_on

    def warn_of_prompts(self, what: str, prompts: Sequence[str]) -> None:
        """One line of the log for each of a few prompts."""
        for prompt in prompts:
            logger.warning(f"{what}, of the prompt: {textwrap.shorten(prompt, _PROMPT_WIDTH)!r}")

    def skip_step(self, reason: str) -> None:
        """The optimizer step in work is left out, for a reason that the log gives; all processes call it together."""
        self.model.zero_grad(set_to_none=True)
        self._note_skipped(reason)

    def _skip_unless_finite(self) -> bool:
        """Takes the gradients away, before anything reads them, if they or a loss are not finite."""
        scaler = self.accelerator.scaler
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        is_scaled = scaler is not None and scaler.is_enabled()
        finite = own_losses = self._losses_are_finite
        if gradients and not is_scaled:  # scaled ones are the scaler's business
            norm = torch.nn.utils.get_total_norm(gradients)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            finite = finite * torch.isfinite(norm).float().to(finite.device)
        self._losses_are_finite = torch.ones_like(finite)
        if self.on_all_ranks(finite):
            return False
        if is_scaled:
            self._note_skipped("the loss not finite")
            return True
        names = not_finite((n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None)
        self.skip_step(_reason(names, losses_are_finite=bool(own_losses), norm_is_finite=bool(finite)))
        return True

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
        if self.accelerator.optimizer_step_was_skipped and scaler is not None and scaler.get_scale() <= 1:
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
