"""The directory of TensorBoard's curves."""

from collections.abc import Iterable
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import default_logdir


def keep_curves_in(output_dir: str, callbacks: Iterable[TrainerCallback]) -> None:
    """Puts all of a run's TensorBoard curves into one directory, `output_dir/runs/DATE_HOST`.

    Otherwise the callback would choose the directory when training begins, and the evaluation before that would be
    logged to `./runs`. The environment variable TENSORBOARD_LOGGING_DIR still names another directory.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(Path(output_dir) / default_logdir())
