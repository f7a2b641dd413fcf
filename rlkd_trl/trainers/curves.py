"""Where TensorBoard's curves go."""

from collections.abc import Iterable
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import default_logdir


def keep_curves_in(output_dir: str, callbacks: Iterable[TrainerCallback]) -> None:
    """All of a run's TensorBoard curves in one directory, `output_dir/runs/DATE_HOST`.

    By itself the callback chooses it when training begins, and what is logged before, an evaluation, goes to `./runs`.
    The environment variable TENSORBOARD_LOGGING_DIR names another directory.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(Path(output_dir) / default_logdir())
