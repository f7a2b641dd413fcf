"""The steps of recipes/compare.py: its flags, what must be right before anything runs, and the tests at the end."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from rlkd_trl.commands.arguments import (
    DataArguments,
    HeldOutArguments,
    PromptArguments,
    RewardArguments,
    RunArguments,
    StudentArguments,
    TeacherArguments,
)
from rlkd_trl.commands.comparison.cells import Method, find_method, shipped_presets
from rlkd_trl.commands.comparison.outcome import Outcome, kept_outcome, measure
from rlkd_trl.commands.comparison.statistics import SELECTION
from rlkd_trl.commands.data import load_prompts
from rlkd_trl.commands.demo import DemoRequest, make_demo_models, write_demo_files
from rlkd_trl.commands.files_read import FileDigests
from rlkd_trl.commands.loading import load_reward_model, load_student
from rlkd_trl.commands.parser import RecipeParser
from rlkd_trl.errors import InputError
from rlkd_trl.prompts import PromptTemplates
from rlkd_trl.settings.ranges import LARGEST_COUNT, AtLeastTwo, Count, Length, Positive, Range, Seed, check_ranges
from rlkd_trl.trainers.config import OnPolicyConfig, RolloutConfig

if TYPE_CHECKING:
    from datasets import Dataset

BUDGETS = ("max_steps", "max_generated_tokens", "max_cpu_seconds")
# For every run, unless `--common` says otherwise.
QUIET = ("--save_strategy=no", "--disable_tqdm=True")
# Flags of a run, beside those on data, prompts and models, that are not a method's own.
SET_HERE = ("config", "output_dir", "seed", "learning_rate", "max_prompt_length", "max_completion_length", *BUDGETS)
# These a preset may set nevertheless: teachers kept in different ways are methods to compare.
OF_THE_TEACHERS_WEIGHTS = {"teacher_dtype", "teacher_quantization"}
# With a budget of tokens or time: the trainer stops when it is spent, and cannot know beforehand at which step.
UNTIL_SPENT = ("--max_steps=1000000", "--lr_scheduler_type=constant_with_warmup")
SMOKE_STEPS = {"teacher_steps": 120, "student_steps": 80}


@dataclass
class ComparisonArguments:
    """Comparison"""

    READS: ClassVar[dict[str, str]] = {"methods": "preset"}

    smoke: bool = field(default=False, metadata={"help": "All of it on the embedded demo, in minutes."})
    methods: list[str] | None = field(
        default=None, metadata={"help": "Names in recipes/configs/methods/, or YAML files. Default: all of them."}
    )
    baseline: str | None = field(
        default=None, metadata={"help": "Method to compare with, or warm_start. Default: the first of --methods."}
    )
    seeds: list[Seed] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of every method."})
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
    output_dir: str = field(default="runs/compare", metadata={"help": "Where the runs and the results go."})

    def __post_init__(self):
        check_ranges(self)
        for name in ("seeds", "learning_rates", *BUDGETS):
            values = getattr(self, name) or []
            if len(set(values)) < len(values):
                raise InputError(f"--{name} {' '.join(map(str, values))}: one is given twice.")
        if self.select_on not in SELECTION:
            raise InputError(f"--select_on {self.select_on}: choose one of {', '.join(SELECTION)}.")
        if odd := [flag for flag in self.common or [] if not flag.partition("=")[2]]:
            raise InputError(f"--common {odd[0]} is not of the form name=value, e.g. logging_steps=50.")

    def budgets(self) -> dict[str, str]:
        """Name to flag, the smallest first: {"max_steps_150": "--max_steps=150"}."""
        (name,) = [name for name in BUDGETS if getattr(self, name) is not None]
        return {f"{name}_{value:.15g}": f"--{name}={value:.15g}" for value in sorted(getattr(self, name))}

    def common_flags(self) -> list[str]:
        """The same for every run."""
        until_spent = UNTIL_SPENT if self.max_steps is None else ()
        return [*QUIET, *until_spent, *(f"--{flag}" for flag in self.common or [])]


@dataclass
class MeasurementArguments:
    """Validation and test"""

    READS: ClassVar[dict[str, str]] = {"validation_dataset": "data", "test_dataset": "data"}

    validation_dataset: str | None = field(
        default=None, metadata={"help": "For learning rates. Default with only one: a tenth of --dataset."}
    )
    validation_split: str = field(default="train", metadata={"help": "Split of --validation_dataset."})
    test_dataset: str | None = field(default=None, metadata={"help": "For the tables."})
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

    def run_flags(self) -> list[str]:
        """What of this concerns the training runs."""
        flags = [f"--max_prompt_length={self.max_prompt_length}"]
        flags.append(f"--max_completion_length={self.max_completion_length}")
        if self.validation_dataset is not None:
            flags += [f"--eval_dataset={self.validation_dataset}", f"--eval_split={self.validation_split}"]
            if self.eval_target_column is not None:
                flags.append(f"--eval_target_column={self.eval_target_column}")
        return flags


def as_flags(*groups: object) -> list[str]:
    """What differs from the defaults, as a command line."""
    flags = []
    for group in groups:
        for option in dataclasses.fields(group):
            value = getattr(group, option.name)
            if value != option.default:
                flags += [f"--{option.name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def check_named(
    data: DataArguments,
    teacher: TeacherArguments,
    student: StudentArguments,
    compare: ComparisonArguments,
    test: MeasurementArguments,
) -> None:
    """What must be named, and what cannot go together. Raises `InputError`."""
    named = {"--dataset": data.dataset, "--test_dataset": test.test_dataset}
    named |= {"--teacher": teacher.teacher, "--student": student.student}
    budgets = [f"--{name}" for name in BUDGETS if getattr(compare, name) is not None]
    if compare.smoke:
        if given := [flag for flag, value in named.items() if value is not None]:
            raise InputError(f"--smoke brings its own data and models: leave out {' and '.join(given)}.")
    elif missing := [flag for flag, value in named.items() if value is None]:
        raise InputError(f"{' and '.join(missing)} missing. To try this on the embedded demo: --smoke.")
    if len(budgets) != 1:
        kinds = ", ".join(f"--{name}" for name in BUDGETS)
        found = f"there are {' and '.join(budgets)}" if budgets else "there is none"
        raise InputError(f"One kind of budget is needed, and {found}: give one of {kinds}.")
    if len(compare.learning_rates) > 1 and test.validation_dataset is None and not compare.smoke:
        raise InputError("Several --learning_rates need a --validation_dataset to choose on.")
    if compare.select_on in ("bleu", "rougeL") and not (test.eval_target_column or data.target_column):
        raise InputError(f"--select_on {compare.select_on} needs references: give --eval_target_column.")


def find_methods(compare: ComparisonArguments, recipes: Path) -> list[Method]:
    """The methods named, or all.

    Raises:
        InputError: One is not there, or twice, or the baseline is not among them.
    """
    methods = [find_method(name, recipes) for name in compare.methods or map(str, shipped_presets(recipes))]
    names = [method.name for method in methods]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--methods: {twice[0]} is there twice; give the files different names.")
    if reserved := {"teacher", "warm_start"}.intersection(names):
        raise InputError(f"--methods: {reserved.pop()} is the name of another line of the table; rename the file.")
    if compare.baseline not in (None, "warm_start", *names):
        raise InputError(f"--baseline {compare.baseline}: choose warm_start or one of --methods: {', '.join(names)}.")
    return methods


def check_flags(
    methods: Sequence[Method],
    common: Sequence[str],
    configs: Mapping[str, type[RolloutConfig]],
    teacher: TeacherArguments,
) -> None:
    """Presets and `--common` are flags that the recipes know, and none that is set here.

    common: as name=value. configs: recipe to the class of its settings. teacher: as given to compare.py, whose tests
    ask it; a preset may only choose the weights' dtype or quantisation where that does not.

    Raises:
        InputError: As above, a value is refused, or a recipe is not in `configs`.
    """
    groups = [DataArguments, HeldOutArguments, PromptArguments, TeacherArguments, StudentArguments]
    set_here = {option.name for group in groups for option in dataclasses.fields(group)}.union(SET_HERE)
    given = {flag.removeprefix("--") for flag in as_flags(teacher)}
    set_here -= OF_THE_TEACHERS_WEIGHTS - given
    for method in methods:
        recipe = method.recipe.stem
        if recipe not in configs:
            raise InputError(f"{method.preset}: {recipe} is none of the recipes to compare: {', '.join(configs)}.")
        for where, names in (
            (f"The preset {method.preset}", method.settings()),
            ("--common", [flag.partition("=")[0] for flag in common]),
        ):
            if clash := sorted(set_here.intersection(names)):
                raise InputError(f"{where} sets {clash[0]}, which compare.py sets for all methods alike.")
        with_reward = [RewardArguments] if issubclass(configs[recipe], OnPolicyConfig) else []
        parser = RecipeParser(*groups, *with_reward, RunArguments, configs[recipe], description="")
        parser.parse(["--config", str(method.preset), *(f"--{flag}" for flag in common)])


def load_test_rows(
    data: DataArguments,
    prompts: PromptArguments,
    templates: PromptTemplates | None,
    test: MeasurementArguments,
) -> "Dataset":
    """The test rows, once all data sets are found to be good.

    Raises:
        InputError: One of them is not, or test inputs are among those of training or validation.
    """
    seen = {"--dataset": load_prompts(data, prompts, templates)}
    if test.validation_dataset is not None:
        held_out = HeldOutArguments(test.validation_dataset, test.validation_split, test.eval_target_column)
        seen["--validation_dataset"] = load_prompts(data, prompts, templates, held_out)
    held_out = HeldOutArguments(test.test_dataset, test.test_split, test.eval_target_column)
    rows = load_prompts(data, prompts, templates, held_out)
    for flag, others in seen.items():
        if common := set(rows["source"]).intersection(others["source"]):
            raise InputError(
                f"{len(common)} test inputs are in {flag} too, e.g. {min(common)!r}: test on inputs that nothing was "
                "trained or chosen on."
            )
    return rows


def use_demo(
    data: DataArguments,
    teacher: TeacherArguments,
    student: StudentArguments,
    test: MeasurementArguments,
    prompts: PromptArguments,
    directory: Path,
) -> None:
    """Fills in the demo's data, and a teacher and a warm start of little training; makes them in `directory`."""
    files = write_demo_files(directory)
    data.dataset, test.validation_dataset, test.test_dataset = files["train"], files["validation"], files["test"]
    request = DemoRequest(str(directory), asdict(prompts), seed=0, **SMOKE_STEPS)
    teacher.teacher, student.student = [request.teacher], request.student
    if not Path(student.student, "config.json").is_file():
        make_demo_models(request)


class Examiner:
    """Tests models on the test rows, in the eyes of the teacher; what was tested before is read from disk.

    The reward is the same for all: teacher-forcing, V = max, γ = 1, whatever a method was trained on.
    """

    def __init__(
        self,
        rows: list[dict],
        prompts: PromptArguments,
        teacher: TeacherArguments,
        student: StudentArguments,
        test: MeasurementArguments,
        templates: PromptTemplates | None,
        digests: FileDigests,
    ):
        self.rows, self.student = rows, student
        self.num_samples = test.num_samples
        self.lengths = {"max_completion_length": test.max_completion_length, "batch_size": test.batch_size}
        self.max_prompt_length = test.max_prompt_length
        self.reward_model = load_reward_model(RewardArguments(), teacher, templates, gamma=1.0, weights=None)
        self.digests = digests
        self.settings = {
            "rows": hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest(),
            "asked": as_flags(prompts, teacher, student),
            "files": digests.of_flags(
                {"--teacher": teacher.teacher, "--templates": [prompts.templates] if prompts.templates else []}
            ),
            "max_prompt_length": test.max_prompt_length,
            "max_completion_length": test.max_completion_length,
            "num_samples": test.num_samples,
        }

    def test_warm_start(self, directory: Path) -> Outcome:
        """The outcome of the student before training, kept in `directory`."""
        return self._test_student(directory, self.student)

    def test_trained(self, checkpoint: Path) -> Outcome:
        """The outcome of a training run's student, kept beside it."""
        trained = dataclasses.replace(self.student, student=str(checkpoint), student_revision=None)
        return self._test_student(checkpoint, trained)

    def test_teacher(self, directory: Path) -> Outcome:
        """The outcome of the first teacher, asked through its first template; kept in `directory`."""
        return kept_outcome(directory, self.settings, self._measure_teacher)

    def _test_student(self, directory: Path, student: StudentArguments) -> Outcome:
        tested = self.digests.of_flags({"--student": [student.student]})
        settings = {**self.settings, "files": {**self.settings["files"], **tested}}
        return kept_outcome(directory, settings, lambda: self._measure_student(student))

    def _measure_student(self, student: StudentArguments) -> Outcome:
        from rlkd_trl.evaluation.evaluate import evaluate_student
        from rlkd_trl.models.loading import default_device
        from rlkd_trl.students import Policy

        print(f"Testing {student.student}", flush=True)
        model, tokenizer = load_student(student)
        policy = Policy(model.to(default_device()), tokenizer)
        lengths = {**self.lengths, "max_prompt_length": self.max_prompt_length}
        return measure(
            lambda seed: evaluate_student(policy, tokenizer, self.rows, self.reward_model, seed=seed, **lengths),
            self.rows,
            self.num_samples,
        )

    def _measure_teacher(self) -> Outcome:
        from rlkd_trl.evaluation.evaluate import evaluate_teacher

        print("Testing the teacher", flush=True)
        tokenizer = self.reward_model.panels[0].scorers[0].teacher.processing_class
        return measure(
            lambda seed: evaluate_teacher(tokenizer, self.rows, self.reward_model, seed=seed, **self.lengths),
            self.rows,
            self.num_samples,
        )
