"""The progress bar of training."""

from tqdm.auto import tqdm
from transformers import Trainer
from transformers.trainer_callback import ProgressCallback

# What the bar shows -> the logged metric that it is, the first of them that there is.
SHOWN = {
    "reward": ("reward",),
    "KL": ("kl", "approx_kl"),
    "length": ("completions/mean_length",),
    "loss": ("loss",),
}


class RunProgress(ProgressCallback):
    """Trainer's bar, with steps and time left, and the last logged reward, KL and length of completions.

    The KL is that to the initial policy or, without `beta`, that of the last updates. Where standard error is no
    terminal there is no bar; the logs are printed all the same.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=None)
        self.current_step = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(shown_metrics(logs))


def shown_metrics(logs: dict[str, float]) -> dict[str, str]:
    """The numbers of a training log that the bar shows."""
    values = {label: next((logs[name] for name in names if name in logs), None) for label, names in SHOWN.items()}
    return {label: f"{value:.3g}" for label, value in values.items() if value is not None}


def show_run_progress(trainer: Trainer) -> None:
    """Puts `RunProgress` in the place of Trainer's bar, if there is one: not in notebooks, nor with `disable_tqdm`."""
    if any(type(callback) is ProgressCallback for callback in trainer.callback_handler.callbacks):
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(RunProgress())
