"""Flags for the distillation of encoders."""

from dataclasses import dataclass, field
from typing import ClassVar

from rlkd_trl.errors import InputError
from rlkd_trl.settings.files import (
    CheckpointPath,
    DataPath,
)
from rlkd_trl.settings.ranges import (
    Count,
    Length,
    check_ranges,
)

ENCODER_WEIGHTINGS = ("per_example", "fixed")


@dataclass
class GeneralDataArguments:
    """Data of general stages: unlabelled texts"""

    dataset: DataPath | None = field(
        default=None,
        metadata={"help": "Hub id (or ID@REVISION), a CSV/JSON/JSONL/Parquet file, or a directory, of texts."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub dataset."})
    source_column: str = field(default="text", metadata={"help": "Column with the texts."})
    pair_column: str | None = field(
        default=None,
        metadata={"help": "Column with the text that follows, for nsp_ce; an encoder-decoder's target."},
    )
    max_rows: Count | None = field(default=None, metadata={"help": "Use only so many rows."})

    def __post_init__(self):
        check_ranges(self)


@dataclass
class TaskDataArguments:
    """Data of task stages: texts with labels"""

    task_dataset: DataPath | None = field(
        default=None,
        metadata={
            "help": "Hub id (or ID@REVISION), a CSV/JSON/JSONL/Parquet file, or a directory. Default: the demo."
        },
    )
    task_split: str = field(default="train", metadata={"help": "Split to train on."})
    task_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    task_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub dataset."})
    task_source_column: str = field(default="text", metadata={"help": "Column with the texts."})
    task_pair_column: str | None = field(
        default=None, metadata={"help": "Column with a second text, of tasks on pairs of texts."}
    )
    label_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the labels: the teacher's names or numbers of classes, or numbers to predict. "
            "Without it, a task is learnt from the teacher alone."
        },
    )
    task_max_rows: Count | None = field(default=None, metadata={"help": "Use only so many rows."})

    def __post_init__(self):
        check_ranges(self)


@dataclass
class EncoderHeldOutArguments:
    """Held-out data"""

    eval_dataset: DataPath | None = field(
        default=None, metadata={"help": "Texts for the metrics of general stages; default: a tenth of --dataset."}
    )
    eval_split: str = field(default="train", metadata={"help": "Split of --eval_dataset."})
    task_eval_dataset: DataPath | None = field(
        default=None, metadata={"help": "For the metrics of task stages; default: a tenth of --task_dataset."}
    )
    task_eval_split: str = field(default="train", metadata={"help": "Split of --task_eval_dataset."})


@dataclass
class EncoderTeacherArguments:
    """Teacher"""

    teacher: CheckpointPath | None = field(
        default=None, metadata={"help": "Checkpoint directory or Hub id (or ID@REVISION). Default: the demo."}
    )
    task_teacher: CheckpointPath | None = field(
        default=None, metadata={"help": "The teacher of task stages, with a head for the classes; default: --teacher."}
    )
    teacher_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub --teacher."})
    task_teacher_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub --task_teacher."})
    teacher_dtype: str = field(default="float32", metadata={"help": "float32, bfloat16, float16 or auto."})


@dataclass
class EncoderPanelArguments:
    """Several teachers"""

    more_teachers: list[CheckpointPath] | None = field(
        default=None,
        metadata={
            "help": "More teachers, beside --task_teacher of task stages or, where there are none, --teacher: each "
            "loss is summed over all."
        },
    )
    teacher_weighting: str = field(
        default="per_example",
        metadata={"help": "per_example: logits_kl of each over 1 + its own loss on the text (MT-BERT); or fixed."},
    )
    train_along: list[CheckpointPath] | None = field(
        default=None,
        metadata={
            "help": "More encoders, fine-tuned together with --student on labels, with one pooler and head for all: "
            "MT-BERT's co-finetuning of teachers. They are saved in OUTPUT_DIR/encoder2, encoder3 …"
        },
    )

    def __post_init__(self):
        if self.teacher_weighting not in ENCODER_WEIGHTINGS:
            known = ", ".join(ENCODER_WEIGHTINGS)
            raise InputError(f"--teacher_weighting {self.teacher_weighting}: choose one of {known}.")


@dataclass
class EncoderStudentArguments:
    """Student: a checkpoint, or a smaller teacher"""

    # Given on the command line, a flag puts these of a preset out of force.
    REPLACED: ClassVar[dict[str, tuple[str, ...]]] = {
        "student": ("num_layers", "hidden_size", "num_heads", "intermediate_size", "init"),
        **dict.fromkeys(("hidden_size", "num_heads", "intermediate_size"), ("init",)),
    }
    student: CheckpointPath | None = field(
        default=None,
        metadata={"help": "Checkpoint directory or Hub id (or ID@REVISION) to start from; default: a new one."},
    )
    student_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub student."})
    num_layers: Length | None = field(default=None, metadata={"help": "Layers of a new student; default: half."})
    hidden_size: Length | None = field(default=None, metadata={"help": "Its width; default: the teacher's."})
    num_heads: Length | None = field(default=None, metadata={"help": "Its attention heads; default: the teacher's."})
    intermediate_size: Length | None = field(
        default=None, metadata={"help": "Its feed-forward width; default: in the teacher's proportion."}
    )
    init: str | None = field(
        default=None,
        metadata={
            "help": "What it begins with: the teacher's layers by a map (uniform, as DistilBERT; bottom, as PKD; "
            "1:2,2:4 …), or 'random'. Default: uniform where the sizes are the teacher's, else random."
        },
    )

    def __post_init__(self):
        check_ranges(self)
