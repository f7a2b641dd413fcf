"""Where trackers keep a run's curves: one place for training and the evaluations before and after it."""

from collections.abc import Iterable
from pathlib import Path

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback
from transformers.integrations.integration_utils import default_logdir


def keep_curves_together(args: TrainingArguments, callbacks: Iterable[TrainerCallback]) -> None:
    """Puts all of a run's TensorBoard curves into `output_dir/runs/DATE_HOST`, and Trackio's into one run.

    Otherwise TensorBoard's callback would choose the directory when training begins, and the evaluation before that
    would be logged to `./runs`; and Trackio would begin another run, of a random name, when training has ended. The
    environment variable TENSORBOARD_LOGGING_DIR still names another directory, and `run_name` another run.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(Path(args.output_dir) / default_logdir())
        if isinstance(callback, TrackioCallback) and args.run_name is None:
            args.run_name = f"{Path(args.output_dir).name}-{Path(default_logdir()).name}"
