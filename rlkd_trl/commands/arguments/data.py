"""Flags for data, and for the prompts that are made of it."""

from dataclasses import dataclass, field
from typing import ClassVar

from rlkd_trl.settings.files import (
    DataPath,
    TemplatesPath,
)
from rlkd_trl.settings.ranges import (
    Count,
    CountFromZero,
    check_ranges,
)


@dataclass
class DataArguments:
    """Data"""

    dataset: DataPath | None = field(
        default=None,
        metadata={
            "help": "Hub id (or ID@REVISION), a CSV/JSON/JSONL/Parquet file, or a directory. Default: the embedded "
            "demo."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train (or, in evaluate.py, test) on."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub dataset."})
    source_column: str = field(default="source", metadata={"help": "Column with the student's input text."})
    target_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the reference text or texts: targets of sft, of kd and --interpolate; metrics."
        },
    )
    max_rows: Count | None = field(
        default=None, metadata={"help": "Use only so many distinct inputs (sft.py: so many rows)."}
    )

    def __post_init__(self):
        check_ranges(self)


@dataclass
class StreamingArguments:
    """Streaming, for data that does not fit"""

    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read --dataset while training goes on, again and again, until --max_steps, which it needs."
        },
    )
    shuffle_buffer_size: CountFromZero = field(
        default=10_000,
        metadata={"help": "With --streaming: rows among which the next one is drawn; 0 leaves them in their order."},
    )

    def __post_init__(self):
        check_ranges(self)


@dataclass
class HeldOutArguments:
    """Held-out data"""

    eval_dataset: DataPath | None = field(
        default=None,
        metadata={
            "help": "For the final table; default: a tenth of the inputs. --dataset_config and _revision apply."
        },
    )
    eval_split: str = field(default="train", metadata={"help": "Split of --eval_dataset."})
    eval_target_column: str | None = field(
        default=None, metadata={"help": "References in --eval_dataset; default: --target_column."}
    )


@dataclass
class PromptArguments:
    """Prompts"""

    # A flag on the command line cancels these flags of a preset.
    REPLACED: ClassVar[dict[str, tuple[str, ...]]] = {
        "template": ("templates", "template_names"),
        "templates": ("template",),
    }
    templates: TemplatesPath | None = field(
        default=None,
        metadata={
            "help": "How the teacher is asked: a YAML file (names and Jinja texts, or promptsource's; also of the "
            "Hub), or builtin:TASK."
        },
    )
    template: str | None = field(
        default=None,
        metadata={
            "help": "Instead of --templates, one Jinja text over the data's columns: 'Summarise: {{ source }}'."
        },
    )
    template_names: list[str] | None = field(
        default=None, metadata={"help": "Which of them; default: all that are for the original task."}
    )
    rename_columns: list[str] | None = field(
        default=None, metadata={"help": "Data columns under other names for the templates, as column=variable."}
    )
    student_template: str | None = field(
        default=None,
        metadata={"help": "The student's own prompt, as Jinja over the data's columns. Default: the bare source."},
    )
