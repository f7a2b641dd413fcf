"""Texts and labels of encoder distillation, checked before any model is loaded."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlkd_trl.commands.arguments import EncoderHeldOutArguments
from rlkd_trl.commands.data import (
    HELD_OUT_MOST,
    HELD_OUT_SHARE,
    HOLDS_NOTHING_OUT,
    open_stream,
    say_what_is_shared,
)
from rlkd_trl.commands.launched import say
from rlkd_trl.commands.settings import EncoderSettings
from rlkd_trl.data import load_rows, require_columns, require_no_blanks, require_text
from rlkd_trl.data.demo import demo_sentences
from rlkd_trl.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig

    from rlkd_trl.data.streams import RowStream


@dataclass(frozen=True)
class Rows:
    """Training and held-out rows with `text`, optionally `text_pair`, and in a task `label`, as the data have it."""

    train: "Dataset | RowStream"
    test: "Dataset"


@dataclass(frozen=True)
class Columns:
    """The columns of a data set: pairs of the flag that names the column, and its name."""

    source: tuple[str, str]
    pair: tuple[str, str | None]
    label: tuple[str, str | None] = ("label_column", None)


def is_demo(settings: EncoderSettings) -> bool:
    """Whether neither data nor models are named, and the run is the embedded demo."""
    named = (
        settings.data.dataset,
        settings.task.task_dataset,
        settings.teacher.teacher,
        settings.teacher.task_teacher,
    )
    return not any([*named, settings.student.student])


def load_stage_rows(settings: EncoderSettings) -> dict[str, Rows]:
    """The rows of general stages and of task stages, by "general" and "task", for the kinds that the run has.

    Raises:
        InputError: A stage's data is not named; a file, column or split is wrong; a text or a label is missing.
    """
    if settings.streaming.streaming and "general" not in settings.args.stages:
        raise InputError("--streaming is for the texts of a general stage, and there is none: leave it out.")
    data, task, held_out, seed = settings.data, settings.task, settings.held_out, settings.args.seed
    if is_demo(settings) and not settings.streaming.streaming:
        train, test = (demo_sentences(split) for split in ("train", "test"))
        return {"general": Rows(*(rows.select_columns("text") for rows in (train, test))), "task": Rows(train, test)}
    rows_of_stages = {}
    if "general" in settings.args.stages:
        if data.dataset is None:
            raise InputError("A general stage learns from texts: give --dataset, or leave the stage out of --stages.")
        columns = Columns(("source_column", data.source_column), ("pair_column", data.pair_column))
        if settings.streaming.streaming:
            train = open_stream(data, settings.streaming, lambda rows: _checked(rows, columns), seed)
        else:
            rows = load_rows(
                data.dataset, data.dataset_split, revision=data.dataset_revision, config=data.dataset_config
            )
            train = _checked(rows, columns, data.max_rows)
        test = None
        if held_out.eval_dataset is not None:
            rows = load_rows(
                held_out.eval_dataset, held_out.eval_split, revision=data.dataset_revision, config=data.dataset_config
            )
            test = _checked(rows, columns)
        if settings.streaming.streaming and test is None:
            raise InputError(f"{HOLDS_NOTHING_OUT}: give --eval_dataset.")
        rows_of_stages["general"] = _split(train, test, "--eval_dataset", seed)
    if "task" in settings.args.stages:
        if task.task_dataset is None:
            raise InputError("A task stage learns from a task's texts: give --task_dataset.")
        columns = Columns(
            ("task_source_column", task.task_source_column),
            ("task_pair_column", task.task_pair_column),
            ("label_column", task.label_column),
        )
        rows = load_rows(task.task_dataset, task.task_split, revision=task.task_revision, config=task.task_config)
        train = _checked(rows, columns, task.task_max_rows)
        test = None
        if held_out.task_eval_dataset is not None:
            rows = load_rows(
                held_out.task_eval_dataset,
                held_out.task_eval_split,
                revision=task.task_revision,
                config=task.task_config,
            )
            test = _checked(rows, columns)
        rows_of_stages["task"] = _split(train, test, "--task_eval_dataset", seed)
    check_held_out_flags(held_out, settings.args.stages)
    return rows_of_stages


def check_held_out_flags(held_out: EncoderHeldOutArguments, stages: Sequence[str]) -> None:
    """Raises `InputError` for a flag of held-out data that no stage reads."""
    for kind, name, split in (
        ("general", "eval_dataset", "eval_split"),
        ("task", "task_eval_dataset", "task_eval_split"),
    ):
        value, of_split = getattr(held_out, name), getattr(held_out, split)
        if value is not None and kind not in stages:
            raise InputError(f"--{name} {value} is for a {kind} stage, and there is none: leave it out.")
        if value is None and of_split != getattr(EncoderHeldOutArguments, split):
            raise InputError(f"--{split} {of_split} is a split of --{name}: give that too.")


def _checked(rows: "Dataset", columns: Columns, max_rows: int | None = None) -> "Dataset":
    """The rows' texts and labels, as columns `text`, `text_pair` and `label`. Raises `InputError`."""
    from datasets import Dataset

    named = {"text": columns.source, "text_pair": columns.pair, "label": columns.label}
    named = {name: flag_and_column for name, flag_and_column in named.items() if flag_and_column[1] is not None}
    require_columns(rows, **dict(named.values()))
    if max_rows is not None:
        rows = rows.select(range(min(max_rows, len(rows))))
    values = {}
    for name, (flag, column) in named.items():
        values[name] = rows[column][:]
        if name != "text" and [used for _, used in named.values()].count(column) > 1:
            raise InputError(f"`--{flag} {column}` is another column of this data too; name another or leave it out.")
        if name == "label":
            _require_labels(values[name], column)
            continue
        require_no_blanks(values[name], column)
        for i, text in enumerate(values[name]):
            require_text(text, column, i)
    return Dataset.from_dict(values)


def _require_labels(labels: Sequence, column: str) -> None:
    for i, label in enumerate(labels):
        if label is None or (isinstance(label, str) and not label.strip()):
            raise InputError(f"Row {i + 1}: column `{column}` is empty; drop the row or fill it in.")
        if not isinstance(label, str | int | float) or label != label:
            raise InputError(f"Row {i + 1}: column `{column}` holds {label!r}, which is no label: a name or a number.")


def _split(train: "Dataset | RowStream", test: "Dataset | None", flag: str, seed: int) -> Rows:
    """Training and held-out rows; without a test set a share of the training rows is held out.

    Raises:
        InputError: There are too few rows. flag: the flag that names a test set, for the message.
    """
    from datasets import Dataset

    if test is not None:
        if isinstance(train, Dataset):
            say_what_is_shared(_inputs(train), _inputs(test), flag)
        return Rows(train, test)
    count = min(HELD_OUT_MOST, int(HELD_OUT_SHARE * len(train)))
    if count == 0:
        raise InputError(f"{len(train)} rows are too few to hold some out: give {flag}.")
    order = random.Random(seed).sample(range(len(train)), len(train))
    say(f"No {flag}: {count} of {len(train)} rows are held out for evaluation.")
    return Rows(train.select(sorted(order[count:])), train.select(sorted(order[:count])))


def _inputs(rows: "Dataset") -> list[tuple[str, ...]]:
    """Each row's text, or pair of texts."""
    return list(zip(*(rows[name][:] for name in ("text", "text_pair") if name in rows.column_names), strict=True))


def with_next_sentences(rows: "Dataset", seed: int) -> "Dataset":
    """Each pair of texts twice: as it is, with label 0 as in BERT, and with another row's second text, label 1."""
    from datasets import Dataset

    texts, pairs, count = rows["text"][:], rows["text_pair"][:], len(rows)
    rng = random.Random(seed)
    others = [(i + 1 + int(rng.random() * (count - 1))) % count for i in range(count)]
    return Dataset.from_dict(
        {
            "text": texts * 2,
            "text_pair": pairs + [pairs[i] for i in others],
            "next_sentence_label": [0] * count + [1] * count,
        }
    )


@dataclass(frozen=True)
class Classes:
    """The classes of a task. names: by the number of the class; None in regression."""

    names: dict[int, str] | None

    @property
    def num_labels(self) -> int:
        return 1 if self.names is None else len(self.names)


def classes_of(rows: Rows, teacher: "PreTrainedConfig | None") -> Classes:
    """The teacher's classes; without a teacher those of the data's labels, or regression if all labels are floats.

    Raises:
        InputError: A label is a negative number.
    """
    if teacher is not None:
        if teacher.num_labels == 1 or teacher.problem_type == "regression":
            return Classes(None)
        return Classes({int(i): str(name) for i, name in teacher.id2label.items()})
    labels = [label for part in (rows.train, rows.test) for label in part["label"]]
    if all(isinstance(label, float) for label in labels):
        return Classes(None)
    numbers = [int(label) for label in labels if not isinstance(label, str)]
    if len(numbers) == len(labels):
        if min(numbers) < 0:
            raise InputError(f"The label {min(numbers)} is no number of a class: they are counted from 0.")
        return Classes({i: f"LABEL_{i}" for i in range(max(numbers) + 1)})
    return Classes(dict(enumerate(sorted({str(label) for label in labels}))))


def with_numbers(rows: "Dataset", classes: Classes, column: str) -> "Dataset":
    """The rows with labels as numbers of classes, or as floats in regression.

    column: the name of the labels' column in the data, for messages.

    Raises:
        InputError: A label is none of the classes.
    """
    from datasets import Dataset

    columns = {name: rows[name][:] for name in rows.column_names}
    columns["label"] = [_number(label, classes, column) for label in columns["label"]]
    return Dataset.from_dict(columns)


def _number(label: str | float, classes: Classes, column: str) -> int | float:
    if classes.names is None:
        try:
            number = float(label)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise InputError(f"Column `{column}` holds {label!r}, and the task is to predict numbers.")
        return number
    by_name = {name: number for number, name in classes.names.items()}
    if isinstance(label, str) and label in by_name:
        return by_name[label]
    if not isinstance(label, str) and float(label).is_integer() and int(label) in classes.names:
        return int(label)
    names = ", ".join(f"{name!r} ({number})" for number, name in list(classes.names.items())[:8])
    more = f" and {len(classes.names) - 8} more" if len(classes.names) > 8 else ""
    raise InputError(
        f"Column `{column}` holds {label!r}, which is none of the {len(classes.names)} classes: "
        f"{names}{more}. Fine-tune the teacher on this task, or map the labels."
    )
