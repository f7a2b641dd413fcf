"""What the trainers use of transformers' Trainer without its promise to keep it.

Trainer has no public way into the end of a step, a checkpoint's parts, or what a resumed run goes on with. What is
overridden is listed in `OVERRIDDEN`, what is called is one function each; other modules of the package use none of it.
`tests/trainers/test_trainer_internals.py` names the versions that this was seen with, and says what a newer one lacks.
"""

import time
from pathlib import Path
from typing import TypedDict

from torch import Tensor
from transformers import Trainer

# The methods with an underscore, or with a parameter that has one, that trainers of the package override, by their
# parameters in transformers.
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
    """What Trainer adds the losses of steps up in, from which it logs means."""

    loss_since_log: Tensor
    loss_until_log: float
    last_logged_step: int


def loss_sums(trainer: Trainer) -> LossSums:
    """The running sums as they are; `train` begins by setting them to 0."""
    return {
        "loss_since_log": trainer._tr_loss,
        "loss_until_log": trainer._total_loss_scalar,
        "last_logged_step": trainer._globalstep_last_logged,
    }


def set_loss_sums(trainer: Trainer, sums: LossSums) -> None:
    """Puts back what `loss_sums` gave; more entries than it has are ignored."""
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
    """Writes optimizer, learning rate's schedule, scaler and generators of random numbers, of this process."""
    trainer._save_optimizer_and_scheduler(str(directory))
    trainer._save_scaler(str(directory))
    trainer._save_rng_state(str(directory))


def save_without_push(trainer: Trainer, directory: Path) -> None:
    """As `save_model`, which with `push_to_hub` sends what it has written to the Hub at once."""
    trainer.save_model(str(directory), _internal_call=True)


def push_checkpoint(trainer: Trainer, checkpoint: Path) -> None:
    """Sends a checkpoint to the Hub, in the background, as `hub_strategy` says."""
    trainer._push_from_checkpoint(str(checkpoint))
