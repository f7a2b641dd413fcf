"""Tables of completions in TensorBoard, Weights & Biases and Trackio, beside the curves that Trainer logs there."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from rlkd_trl.evaluation.tables import markdown_table

_TRACKERS = (TensorBoardCallback, WandbCallback, TrackioCallback)


class TrackerTables(TrainerCallback):
    """Sends tables to those of the three trackers that `report_to` names; TensorBoard, which has none, gets Markdown.

    A table goes with the next log, since trackers are closed when training ends and opened by the log after it. For
    the same reason it must be added after the trackers' own callbacks.

    callbacks: of the trainer.
    """

    def __init__(self, callbacks: Iterable[TrainerCallback]):
        self._trackers = [callback for callback in callbacks if isinstance(callback, _TRACKERS)]
        self._waiting: list[tuple[str, list[Mapping[str, object]]]] = []

    def add(self, name: str, rows: Sequence[Mapping[str, object]]) -> None:
        """A table, with a column for each key of the first row. What is neither number nor text is written as text."""
        if self._trackers and rows:
            self._waiting.append((name, list(rows)))

    def on_log(self, args, state, control, **kwargs):
        waiting, self._waiting = self._waiting, []
        if not state.is_world_process_zero:
            return
        for name, rows in waiting:
            columns = list(rows[0])
            data = [[_cell(row.get(column)) for column in columns] for row in rows]
            for tracker in self._trackers:
                _send(tracker, name, columns, data, state.global_step)


def _send(tracker: TrainerCallback, name: str, columns: list[str], data: list[list[object]], step: int) -> None:
    if isinstance(tracker, TensorBoardCallback):
        texts = [["" if cell is None else str(cell) for cell in row] for row in data]
        tracker.tb_writer.add_text(name, markdown_table(columns, texts), step)
        tracker.tb_writer.flush()  # its own callback has done so before, and after the last log nothing else does
    elif isinstance(tracker, WandbCallback):
        import wandb

        wandb.log({name: wandb.Table(columns=columns, data=data), "train/global_step": step})
    else:
        import trackio

        trackio.log({name: trackio.Table(columns=columns, data=data), "train/global_step": step})


def _cell(value: object) -> object:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    return value if value is None or isinstance(value, str | Real) else str(value)
