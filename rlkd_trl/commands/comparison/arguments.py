"""The flags of compare.py, and what of them the training runs get."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from rlkd_trl.commands.arguments import (
    CodeArguments,
    DataArguments,
    PromptArguments,
    StudentArguments,
    TeacherArguments,
)
from rlkd_trl.errors import InputError
from rlkd_trl.evaluation.directions import HIGHER_IS_BETTER
from rlkd_trl.settings.files import DataPath, OutputPath, PresetPath
from rlkd_trl.settings.ranges import LARGEST_COUNT, AtLeastTwo, Count, Length, Positive, Range, Seed, check_ranges

BUDGETS = ("max_steps", "max_generated_tokens", "max_cpu_seconds")
# What a learning rate can be chosen by -> whether lower is better.
SELECTION = {
    name: not HIGHER_IS_BETTER[name]
    for name in ("teacher_nll_per_sequence", "teacher_nll_per_token", "bleu", "rougeL")
}
# For every run, unless `--common` says otherwise.
_QUIET = ("--save_strategy=no", "--disable_tqdm=True")
# With a budget of tokens or time: the trainer stops when it is spent, and cannot know beforehand at which step.
_UNTIL_SPENT = ("--max_steps=1000000", "--lr_scheduler_type=constant_with_warmup")


@dataclass(frozen=True)
class Budget:
    """kind: one of `BUDGETS`."""

    kind: str
    value: float

    def flag(self, part: int, parts: int) -> str:
        """Of one of so many methods that follow one another, counted from 0, as `--max_steps=75`: an equal share.

        Of what cannot be divided the later ones get more.
        """
        if self.kind == "max_cpu_seconds":
            share = self.value / parts
        else:
            share = self.value * (part + 1) // parts - self.value * part // parts
        return f"--{self.kind}={share:.15g}"


@dataclass
class ComparisonArguments:
    """Comparison"""

    # Given on the command line, a budget puts a preset's (as --smoke's) of another kind out of force.
    REPLACED: ClassVar[dict[str, tuple[str, ...]]] = {
        name: tuple(other for other in BUDGETS if other != name) for name in BUDGETS
    }
    smoke: bool = field(default=False, metadata={"help": "All of it on the embedded demo, in minutes."})
    methods: list[PresetPath] | None = field(
        default=None,
        metadata={
            "help": "Names in recipes/configs/methods/, or YAML files; seq_kd+ppo: half of the budget each, one after "
            "the other. Default: all that there are, none after another."
        },
    )
    baseline: str | None = field(
        default=None, metadata={"help": "Method to compare with, or warm_start. Default: the first of --methods."}
    )
    seeds: list[Seed] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of every method."})
    top: Count | None = field(
        default=None, metadata={"help": "So many methods, the best by --select_on on validation, get --top_seeds too."}
    )
    top_seeds: list[Seed] | None = field(default=None, metadata={"help": "More seeds, of the best --top methods."})
    max_steps: list[Count] | None = field(default=None, metadata={"help": "Budgets in optimizer steps."})
    max_generated_tokens: list[Count] | None = field(default=None, metadata={"help": "Budgets in sampled tokens."})
    max_cpu_seconds: list[Positive] | None = field(default=None, metadata={"help": "Budgets in CPU seconds."})
    learning_rates: list[Annotated[float, Range(1e-12, 10)]] = field(
        default_factory=lambda: [5e-4], metadata={"help": "Several: each method's is chosen on --validation_dataset."}
    )
    select_on: str = field(
        default="teacher_nll_per_sequence",
        metadata={"help": f"What it is chosen by (NLL favours short texts): {', '.join(SELECTION)}."},
    )
    common: list[str] | None = field(
        default=None, metadata={"help": "More flags for every run, as per_device_train_batch_size=64."}
    )
    jobs: Annotated[int, Range(1, 1024)] = field(
        default=1, metadata={"help": "Runs at a time; more than one get one thread each."}
    )
    stop_after_minutes: Positive | None = field(
        default=None,
        metadata={"help": "Begin no run after so long; the tables have what is there, the same command goes on."},
    )
    output_dir: OutputPath = field(default="runs/compare", metadata={"help": "Where the runs and the results go."})

    def __post_init__(self):
        check_ranges(self)
        for name in ("seeds", "learning_rates", *BUDGETS):
            _refuse_twice(name, getattr(self, name) or [])
        if (self.top is None) != (self.top_seeds is None):
            raise InputError("--top and --top_seeds go together: how many methods, and which more seeds they get.")
        _refuse_twice("seeds and --top_seeds", [*self.seeds, *(self.top_seeds or [])])
        if self.select_on not in SELECTION:
            raise InputError(f"--select_on {self.select_on}: choose one of {', '.join(SELECTION)}.")
        if odd := [flag for flag in self.common or [] if not flag.partition("=")[2]]:
            raise InputError(f"--common {odd[0]} is not of the form name=value, e.g. logging_steps=50.")

    def budgets(self) -> dict[str, "Budget"]:
        """The budgets by name, the smallest first."""
        (kind,) = [kind for kind in BUDGETS if getattr(self, kind) is not None]
        return {f"{kind}_{value:.15g}": Budget(kind, value) for value in sorted(getattr(self, kind))}

    def common_flags(self) -> list[str]:
        """The same for every run."""
        until_spent = _UNTIL_SPENT if self.max_steps is None else ()
        return [*_QUIET, *until_spent, *(f"--{flag}" for flag in self.common or [])]


@dataclass
class MeasurementArguments:
    """Validation and test"""

    validation_dataset: DataPath | None = field(
        default=None, metadata={"help": "For learning rates. Default with only one: a tenth of --dataset."}
    )
    validation_split: str = field(default="train", metadata={"help": "Split of --validation_dataset."})
    test_dataset: list[DataPath] | None = field(
        default=None, metadata={"help": "For the tables; of several, each has its own, under its file's name."}
    )
    test_split: str = field(default="train", metadata={"help": "Split of --test_dataset."})
    eval_target_column: str | None = field(
        default=None, metadata={"help": "Their column with references. Default: --target_column."}
    )
    num_samples: AtLeastTwo = field(default=4, metadata={"help": "Sampled outputs for each test input."})
    num_resamples: Annotated[int, Range(100, LARGEST_COUNT)] = field(
        default=1000, metadata={"help": "Resamples of the paired bootstrap."}
    )
    max_prompt_length: Length = field(
        default=512, metadata={"help": "Student prompts are cut at this, in training too."}
    )
    max_completion_length: Length = field(default=64, metadata={"help": "Cap on generated tokens, in training too."})
    batch_size: Count = field(default=64, metadata={"help": "Test prompts at a time."})

    def __post_init__(self):
        check_ranges(self)
        if len(self.tests()) < len(self.test_dataset or []):
            raise InputError(
                f"--test_dataset {' '.join(self.test_dataset)}: two have the same name, which their tables would have."
            )

    def tests(self) -> dict[str, str]:
        """The test sets by the names that their tables have: the files', without ending."""
        return {Path(dataset).stem: dataset for dataset in self.test_dataset or []}

    def run_flags(self) -> list[str]:
        """The flags that the training runs are given."""
        flags = [f"--max_prompt_length={self.max_prompt_length}"]
        flags.append(f"--max_completion_length={self.max_completion_length}")
        if self.validation_dataset is not None:
            flags += [f"--eval_dataset={self.validation_dataset}", f"--eval_split={self.validation_split}"]
            if self.eval_target_column is not None:
                flags.append(f"--eval_target_column={self.eval_target_column}")
        return flags


def _refuse_twice(name: str, values: list) -> None:
    if len(set(values)) < len(values):
        raise InputError(f"--{name} {' '.join(map(str, values))}: one is given twice.")


def as_flags(*groups: object) -> list[str]:
    """What differs from the defaults, as a command line."""
    flags = []
    for group in groups:
        for option in dataclasses.fields(group):
            value = getattr(group, option.name)
            if value != option.default:
                flags += [f"--{option.name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


@dataclass
class ComparisonSettings:
    """All flags of compare.py."""

    data: DataArguments
    prompts: PromptArguments
    teacher: TeacherArguments
    student: StudentArguments
    code: CodeArguments
    compare: ComparisonArguments
    measurement: MeasurementArguments

    def run_flags(self, *, names_student: bool = True) -> list[str]:
        """What every training run gets, beside its method, budget, learning rate and seed."""
        student = self.student
        if not names_student:
            student = dataclasses.replace(student, student=None, student_revision=None)
        named = as_flags(self.data, self.prompts, self.teacher, student, self.code)
        return [*named, *self.measurement.run_flags(), *self.compare.common_flags()]
