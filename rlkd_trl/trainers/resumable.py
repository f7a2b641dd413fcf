"""Training that can be stopped at any moment and continued as if it had not been stopped."""

import json
import shutil
import time
from pathlib import Path
from pickle import UnpicklingError

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy

from rlkd_trl.data.streams import RowStream
from rlkd_trl.errors import CheckpointError, InputError, Interrupted
from rlkd_trl.models.prompts import forget_last_call
from rlkd_trl.trainers.checkpoint_files import (
    STAGING,
    defect_of,
    keep_newest,
    make_empty,
    newest_whole,
    publish,
    seal,
    state_of,
)
from rlkd_trl.trainers.finite import COUNTERS, FiniteTrainer
from rlkd_trl.trainers.interruption import StopAsked, StopRequest
from rlkd_trl.trainers.processes import from_first_process, register_process
from rlkd_trl.trainers.run_record import RUN_RECORD, check_same_run, rows_digest, settings_of
from rlkd_trl.trainers.trainer_internals import (
    end_step,
    loss_sums,
    push_checkpoint,
    save_training_state,
    save_without_push,
    set_loss_sums,
)

_SAVE_ATTEMPTS = 3
_SECONDS_BETWEEN_ATTEMPTS = 2.0


class ResumableTrainer(FiniteTrainer):
    """`transformers.Trainer` with complete checkpoints: a resumed run computes exactly what it would have computed.

    A checkpoint holds weights, optimizer, scheduler and random generators; also every process's `run_state`, on which
    its next update and log depend; and the `run_record`, by which the checkpoint of another run is recognised and
    refused. After a signal to stop (Ctrl-C, SIGTERM), `train` saves a checkpoint at the end of the step and raises
    `errors.Interrupted`.

    `train` raises:
        InputError: The checkpoint to resume from is incomplete, of another run, or holds a pickle of other things than
            tensors; or there is no space for one.
        CheckpointError: A checkpoint could not be written; the older ones are as they were.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._check_is_a_batch()
        if isinstance(self.train_dataset, RowStream):  # each process reads it, and keeps its share
            self.accelerator.dataloader_config.dispatch_batches = False
        register_process()
        self.run_record: dict[str, object] = {
            "trainer": type(self).__name__,
            "processes": self.args.world_size,
            "settings": settings_of(self.args),
            "data": rows_digest(self.train_dataset),
        }
        self._stop_request = StopRequest()
        self._is_stopping = False
        self._resumed_state: dict = {}
        # A checkpoint may be written before the step has been logged and evaluated; these say what is left to do.
        self._last_step = {"grad_norm": None, "learning_rate": None}
        self._evaluation_is_due = False
        self._epoch_has_ended = False
        self.add_callback(_Continuation(self))

    # What subclasses extend

    def run_state(self) -> dict[str, object]:
        """This process's state beyond weights, optimizer and generators: tensors and plain values only."""
        return {
            **self._last_step,
            "evaluation_is_due": self._evaluation_is_due,
            "end_of_epoch_is_due": not self._epoch_has_ended
            and (float(self.state.epoch).is_integer() or self.control.should_training_stop),
            **loss_sums(self),
            "skipped": {name: getattr(self, name) for name in COUNTERS},
        }

    def load_run_state(self, state: dict[str, object]) -> None:
        """Restores what `run_state` returned; `_continue` restores the part that Trainer sets to 0 after this."""
        self._resumed_state = state
        for name, count in state["skipped"].items():
            setattr(self, name, count)

    def write_checkpoint(self, directory: Path) -> None:
        """Writes this process's files of a checkpoint into an empty directory."""
        save_without_push(self, directory)
        if not self._saves_model_only:
            save_training_state(self, directory)
            torch.save(self.run_state(), directory / self._run_state_file)
        if self.args.should_save:
            self._export_callbacks()
            self.state.save_to_json(str(directory / TRAINER_STATE_NAME))
            (directory / RUN_RECORD).write_text(json.dumps(self.run_record, indent=1) + "\n", encoding="utf-8")

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As `Trainer.train`; without an argument, `args.resume_from_checkpoint` is used.

        If the run has had all its steps, there is no further one.
        """
        checkpoint = self._checked_checkpoint(resume_from_checkpoint or self.args.resume_from_checkpoint)
        self._check_space()
        with self._stop_request.listening():
            try:
                output = super().train(checkpoint, *args, **kwargs)
                signum = self._stop_request.on_any_process(self.accelerator)
            except StopAsked as stop:  # in an evaluation before the first step
                what = f"Stopped before step {self.state.global_step + 1}."
                raise Interrupted(stop.signum, what, is_saved=checkpoint is not None) from None
            except UnpicklingError as error:  # of torch, which reads tensors and plain values only
                if checkpoint is None:
                    raise
                raise InputError(
                    f"A run cannot be resumed from {checkpoint}: a file of it is a pickle that holds more than "
                    "tensors, and could run code. It was not read."
                ) from error
            if signum:
                self._stop_after_training(signum)
        return output

    def _stop_after_training(self, signum: int) -> None:
        """Raises `Interrupted`, with a checkpoint of the last step."""
        checkpoint = self._checkpoint_now
        if not gather_object([checkpoint.is_dir()])[0] and not self.args.load_best_model_at_end:
            self._is_stopping = True
            self._save_whole_checkpoint()
        what = f"Stopped after step {self.state.global_step}, the last; {checkpoint} holds all of it."
        raise Interrupted(signum, what)

    def stop_if_asked(self) -> None:
        """For evaluations, after each batch: raises `StopAsked` on all processes if training is to stop."""
        if self._stop_request.is_listening and (signum := self._stop_request.on_any_process(self.accelerator)):
            raise StopAsked(signum)

    @property
    def _checkpoint_now(self) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    @property
    def _saves_model_only(self) -> bool:
        """A run that is stopped saves what it takes to go on, whatever it saves otherwise."""
        return self.args.save_only_model and not self._is_stopping

    def is_finished(self) -> bool:
        """Whether all steps are done."""
        return self.state.global_step >= self.state.max_steps

    def _run_epoch(self, *args, **kwargs):
        """Does nothing if all steps are done, which Trainer would notice only after one more step."""
        if self.is_finished():
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, learning_rate=None, **kwargs):
        """Trainer calls this at the end of each step and epoch; here a signal to stop is obeyed."""
        grad_norm = grad_norm.item() if isinstance(grad_norm, torch.Tensor) else grad_norm
        self._last_step = {"grad_norm": grad_norm, "learning_rate": learning_rate}

        def end_of_step():
            inherited(tr_loss, grad_norm, *args, learning_rate=learning_rate, **kwargs)

        inherited = super()._maybe_log_save_evaluate
        signum = self._stop_request.on_any_process(self.accelerator)
        if not signum:
            try:
                return end_of_step()
            except StopAsked as stop:
                signum = stop.signum
        # An evaluation would delay the stop, so the resumed run begins with it.
        self._evaluation_is_due = self.control.should_evaluate
        self.control.should_save, self.control.should_evaluate = True, False
        self._is_stopping = True
        end_of_step()
        raise Interrupted(
            signum, f"Stopped after step {self.state.global_step}; {self._checkpoint_now} holds all of it."
        )

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "train_loss" in logs:  # Trainer's is of the part since the last resume; this is of the whole run
            logs["train_loss"] = self.mean_loss(loss_sums(self)["loss_until_log"])
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`. Raises `CheckpointError` if the model cannot be written."""
        if self.processing_class is not None:
            forget_last_call(self.processing_class)
        try:
            super().save_model(output_dir, _internal_call)
        except Exception as error:
            if not _is_of_the_disk(error):
                raise
            raise CheckpointError(
                f"The model cannot be saved in {output_dir or self.args.output_dir} ({error}). Checkpoints are as "
                "they were: make room, and continue with --resume."
            ) from error

    def _check_is_a_batch(self) -> None:
        """Raises `InputError` if each epoch would be empty: Trainer ends such a run as one that has succeeded."""
        is_endless = self.train_dataset is None or isinstance(self.train_dataset, RowStream)
        args, rows = self.args, None if is_endless else len(self.train_dataset)
        batch = args.per_device_train_batch_size * args.world_size
        if args.dataloader_drop_last and rows is not None and rows < batch:
            raise InputError(
                f"dataloader_drop_last leaves out batches that are not full, and {rows} rows of training data fill "
                f"none of {batch}: leave it out, or lower per_device_train_batch_size."
            )

    def _check_space(self) -> None:
        """Raises `InputError` if there is no space for one checkpoint: the weights, and Adam's two moments of them."""
        trained = sum(w.numel() * w.element_size() for w in self.model.parameters() if w.requires_grad)
        has_adapters = any(isinstance(module, PeftModel) for module in self.model.modules())  # only they are saved
        weights = sum(weight.numel() * weight.element_size() for weight in self.model.parameters())
        weights, moments = trained if has_adapters else weights, 2 * trained
        needed = weights if self.args.save_strategy == SaveStrategy.NO else weights + moments
        place = Path(self.args.output_dir).absolute()
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if free < needed:
            raise InputError(
                f"output_dir {self.args.output_dir}: a checkpoint takes about {needed / 2**30:.2f} GiB, and "
                f"{free / 2**30:.2f} GiB are free there: make room, or name another directory."
            )

    # Loading

    def _checked_checkpoint(self, resume_from: str | bool | None) -> str | None:
        """The path of the checkpoint, after checks; True stands for the newest complete one. Raises `InputError`."""
        if not resume_from:
            return None
        # Digests of a large checkpoint are taken once, not by every process.
        if resume_from is True:
            checkpoint, defects = from_first_process(lambda: newest_whole(self.args.output_dir))
            if self.is_world_process_zero():
                for path, defect in defects.items():
                    print(f"Skipping {path}: {defect}.", flush=True)
            if checkpoint is None:
                raise InputError(f"There is no whole checkpoint in {self.args.output_dir} to resume from.")
        else:
            checkpoint, defect = Path(resume_from), from_first_process(lambda: defect_of(resume_from))
            if defect is not None:
                raise InputError(f"A run cannot be resumed from {resume_from}: {defect}.")
        check_same_run(checkpoint, self.run_record)
        if checkpoint.parent.name == STAGING:  # it is complete, and lacks only its name
            staged, checkpoint = checkpoint, checkpoint.parent.parent / checkpoint.name
            self.accelerator.wait_for_everyone()
            failure = self._failure(lambda: publish(staged, checkpoint), self.args.should_save)
            if failure is not None:
                raise CheckpointError(f"{staged} cannot be renamed to {checkpoint} ({failure}).")
        return str(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Also loads the run state: here, as Trainer does not call `_load_from_checkpoint` with DeepSpeed."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            file = Path(checkpoint) / self._run_state_file
            self.load_run_state(torch.load(file, map_location="cpu", weights_only=True))

    @property
    def _run_state_file(self) -> str:
        return "run_state.pth" if self.args.world_size == 1 else f"run_state_{self.args.process_index}.pth"

    def _continue(self) -> None:
        """Restores what Trainer has just set to 0, and finishes the step after which the checkpoint was written."""
        state, self._resumed_state = self._resumed_state, {}
        if not state:
            return
        set_loss_sums(self, state)

        def end_of_step() -> None:
            end_step(self, grad_norm=state["grad_norm"], learning_rate=state["learning_rate"])

        if state["evaluation_is_due"]:
            self.control.should_evaluate = True
            end_of_step()
        if state["end_of_epoch_is_due"]:
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            end_of_step()
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False

    # Saving

    def _save_checkpoint(self, model, trial) -> None:
        self._save_whole_checkpoint()

    def _save_whole_checkpoint(self) -> None:
        """Writes a checkpoint from all processes, with a few attempts if the disk fails."""
        output_dir = Path(self.args.output_dir)
        final = self._checkpoint_now
        self.store_flos()
        best = output_dir / f"checkpoint-{self.state.best_global_step}"
        if best == final or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        for attempt in range(1, _SAVE_ATTEMPTS + 1):
            failure = self._failure_to_save(final)
            if failure is None:
                break
            if attempt == _SAVE_ATTEMPTS:
                raise CheckpointError(f"{final} cannot be saved ({failure}). {state_of(output_dir)}")
            if self.is_world_process_zero():
                print(f"Saving {final} failed ({failure}); trying again.", flush=True)
            time.sleep(_SECONDS_BETWEEN_ATTEMPTS)
        if self.args.push_to_hub:
            push_checkpoint(self, final)
        if self.args.should_save:
            keep_newest(final, self.args.save_total_limit, best=self.state.best_model_checkpoint)

    def _failure_to_save(self, final: Path) -> str | None:
        """Saves on all processes; returns, in words, why that failed on one of them, or None."""
        staged = final.parent / STAGING / final.name
        waits_inside = self.is_deepspeed_enabled or self.is_fsdp_enabled
        return (
            self._failure(lambda: make_empty(staged), self.args.should_save)
            or self._failure(lambda: self.write_checkpoint(staged), True, waits_inside=waits_inside)
            or self._failure(lambda: seal(staged, resumable=not self._saves_model_only), self.args.should_save)
            or self._failure(lambda: publish(staged, final), self.args.should_save)
        )

    def _failure(self, work, is_my_part: bool, *, waits_inside: bool = False) -> str | None:
        """Calls `work()` if it is this process's part; returns, on every process, why it failed on any, or None.

        waits_inside: the processes wait for each other in `work`.

        Raises:
            CheckpointError: `work` failed here with `waits_inside`, so that the others cannot be told.
        """
        failure = None
        if is_my_part:
            try:
                work()
            except (OSError, RuntimeError, SafetensorError) as error:  # torch raises the second, safetensors the third
                cause = error.__cause__ if isinstance(error, CheckpointError) else error  # the first is `save_model`'s
                failure = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
                if waits_inside:
                    raise CheckpointError(
                        f"A checkpoint cannot be saved ({failure}). {state_of(self.args.output_dir)}"
                    ) from error
        return next((reason for reason in gather_object([failure]) if reason is not None), None)

    def _export_callbacks(self) -> None:
        """Puts the state of callbacks into Trainer's state, as Trainer does before it saves that."""
        states: dict[str, list] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks = {
            name: states_of_kind if len(states_of_kind) > 1 else states_of_kind[0]
            for name, states_of_kind in states.items()
        }


def _is_of_the_disk(error: Exception) -> bool:
    """Whether a file could not be written. Libraries in Rust have errors of their own for that, tokenizers none."""
    return isinstance(error, OSError | SafetensorError) or "(os error " in str(error)


class _Continuation(TrainerCallback):
    """Calls `_continue` when Trainer has prepared a resumed run, and keeps track of steps and epochs."""

    def __init__(self, trainer: ResumableTrainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer._continue()

    def on_step_end(self, args, state, control, **kwargs):
        self._trainer._epoch_has_ended = self._trainer._evaluation_is_due = False

    def on_epoch_end(self, args, state, control, **kwargs):
        self._trainer._epoch_has_ended = True
