"""The private parts of transformers' Trainer that the package's trainers use.

Trainer has no public way to change the end of a step, to write the parts of a checkpoint, or to set the sums with
which a resumed run goes on. `OVERRIDDEN` lists the methods that are overridden; for each method that is called there
is a function here, and other modules call none. `tests/trainers/test_trainer_internals.py` names the versions of
transformers that have all of them, and says what another version lacks.
"""

import time
from pathlib import Path
from typing import TypedDict

from torch import Tensor
from transformers import Trainer

# Overridden methods whose name, or a parameter's, begins with an underscore -> their parameters in transformers.
OVERRIDDEN = {
    "_load_best_model": (),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_maybe_log_save_evaluate": (
        "tr_loss",
        "grad_norm",
        "model",
        "trial",
        "epoch",
        "ignore_keys_for_eval",
        "start_time",
        "learning_rate",
    ),
    "_prepare_inputs": ("inputs",),
    "_run_epoch": (
        "model",
        "epoch",
        "train_dataloader",
        "steps_in_epoch",
        "num_update_steps_per_epoch",
        "trial",
        "ignore_keys_for_eval",
        "start_time",
        "resume_from_checkpoint",
        "epochs_trained",
        "steps_trained_in_current_epoch",
    ),
    "_save": ("output_dir", "state_dict"),
    "_save_checkpoint": ("model", "trial"),
    "save_model": ("output_dir", "_internal_call"),
}


class LossSums(TypedDict):
    """The sums of losses from which Trainer logs means."""

    loss_since_log: Tensor
    loss_until_log: float
    last_logged_step: int


def loss_sums(trainer: Trainer) -> LossSums:
    """The current sums; `train` begins by setting them to 0."""
    return {
        "loss_since_log": trainer._tr_loss,
        "loss_until_log": trainer._total_loss_scalar,
        "last_logged_step": trainer._globalstep_last_logged,
    }


def set_loss_sums(trainer: Trainer, sums: LossSums) -> None:
    """Sets the sums to those that `loss_sums` returned; other entries are ignored."""
    trainer._tr_loss = sums["loss_since_log"].to(trainer.args.device)
    trainer._total_loss_scalar = sums["loss_until_log"]
    trainer._globalstep_last_logged = sums["last_logged_step"]


def end_step(trainer: Trainer, *, grad_norm: float | None, learning_rate: float | None) -> None:
    """Logs, evaluates and saves, as Trainer does at the end of each step, if `trainer.control` says so."""
    trainer._maybe_log_save_evaluate(
        trainer._tr_loss,
        grad_norm,
        model=trainer.model_wrapped,
        trial=None,
        epoch=int(trainer.state.epoch),
        ignore_keys_for_eval=None,
        start_time=time.time(),
        learning_rate=learning_rate,
    )


def save_training_state(trainer: Trainer, directory: Path) -> None:
    """Writes this process's states of optimizer, learning-rate schedule, gradient scaler and random numbers."""
    trainer._save_optimizer_and_scheduler(str(directory))
    trainer._save_scaler(str(directory))
    trainer._save_rng_state(str(directory))


def save_without_push(trainer: Trainer, directory: Path) -> None:
    """As `save_model`, without its push to the Hub."""
    trainer.save_model(str(directory), _internal_call=True)


def finish_pushes(trainer: Trainer) -> None:
    """Waits for checkpoints that are being sent in the background."""
    if trainer.args.push_to_hub and trainer.is_world_process_zero():
        trainer._finish_current_push()


def push_checkpoint(trainer: Trainer, checkpoint: Path) -> None:
    """Sends a checkpoint to the Hub, in the background, as `hub_strategy` says."""
    trainer._push_from_checkpoint(str(checkpoint))
