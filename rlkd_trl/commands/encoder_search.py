"""Which combination of losses is best for an encoder: the sets to try, and their runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Annotated

from rlkd_trl.commands.arguments import (
    CodeArguments,
    EncoderHeldOutArguments,
    EncoderStudentArguments,
    EncoderTeacherArguments,
    GeneralDataArguments,
    RunArguments,
    TaskDataArguments,
)
from rlkd_trl.commands.comparison.arguments import as_flags
from rlkd_trl.commands.comparison.cells import Cell, Method
from rlkd_trl.commands.comparison.checks import refuse_set_here
from rlkd_trl.commands.encoder_demo import EncoderDemoRequest, make_demo_teachers, write_demo_files
from rlkd_trl.commands.encoder_stages import check_data, plan_stages
from rlkd_trl.commands.files_read import FileDigests
from rlkd_trl.commands.parser import RecipeParser
from rlkd_trl.commands.presets import find_preset, read_preset
from rlkd_trl.commands.settings import EncoderSettings, groups_of
from rlkd_trl.errors import InputError
from rlkd_trl.settings.files import OutputPath, PresetPath
from rlkd_trl.settings.ranges import Count, LearningRate, Range, Seed, check_ranges

Losses = dict[str, float]  # ingredient to weight

BASE = "base"
METRICS = ("accuracy", "f1", "pearson", "spearman", "agreement", "similarity_spearman", "hidden_cosine")
SETS = ("leave_one_out", "add_one", "subsets", "questions")
ATTENTION = ("attention_mse", "attention_kl", "query_relation_kl", "key_relation_kl", "value_relation_kl")
_QUIET = ("--save_strategy=no", "--disable_tqdm=True")
_RECIPE = "encoder_kd"
# Flags that a search sets itself for all of its runs, and the names of its data and models.
_SET_HERE = (
    *("config", "output_dir", "resume_from_checkpoint", "seed", "learning_rate", "max_steps", "losses"),
    *("dataset", "task_dataset", "eval_dataset", "task_eval_dataset", "teacher", "task_teacher", "student"),
)


@dataclass
class EncoderSearchArguments:
    """Search"""

    smoke: bool = field(default=False, metadata={"help": "All of it on the embedded demo, in minutes."})
    base: PresetPath = field(
        default="mix", metadata={"help": "Preset of encoder_kd whose losses are varied; all else of it is kept."}
    )
    stage: str = field(default="task", metadata={"help": "Whose losses: those of its 'general' or 'task' stages."})
    sets: list[str] = field(
        default_factory=lambda: ["questions"],
        metadata={
            "help": "leave_one_out and add_one, from the base; subsets, of up to --up_to of --candidates; questions: "
            "with and without attention losses and hard labels, and soft targets alone."
        },
    )
    candidates: list[str] | None = field(
        default=None,
        metadata={"help": "Ingredients for add_one and subsets; default: all that these models can have."},
    )
    up_to: Annotated[int, Range(1, 13)] = field(default=2, metadata={"help": "Most ingredients of a subset."})
    seeds: list[Seed] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of every set."})
    max_steps: Count = field(default=100, metadata={"help": "Budget: optimizer steps of each stage."})
    learning_rate: LearningRate = field(default=5e-5, metadata={"help": "The same for all."})
    metric: str = field(
        default="accuracy", metadata={"help": f"On held-out rows, by which sets are ranked: {', '.join(METRICS)}."}
    )
    common: list[str] | None = field(
        default=None, metadata={"help": "More flags for every run, as per_device_train_batch_size=64."}
    )
    jobs: Annotated[int, Range(1, 1024)] = field(
        default=1, metadata={"help": "Runs at a time; more than one get one thread each."}
    )
    output_dir: OutputPath = field(
        default="runs/encoder_search", metadata={"help": "Where the runs and the results go."}
    )

    def __post_init__(self):
        check_ranges(self)
        for name, values in (("sets", SETS), ("metric", METRICS), ("stage", ("general", "task"))):
            given = getattr(self, name)
            for value in given if isinstance(given, list) else [given]:
                if value not in values:
                    raise InputError(f"--{name} {value}: choose one of {', '.join(values)}.")
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"--seeds {' '.join(map(str, self.seeds))}: one is given twice.")
        if odd := [flag for flag in self.common or [] if not flag.partition("=")[2]]:
            raise InputError(f"--common {odd[0]} is not of the form name=value, e.g. logging_steps=50.")


@dataclass
class EncoderSearchSettings:
    """Settings of a search."""

    data: GeneralDataArguments
    task: TaskDataArguments
    held_out: EncoderHeldOutArguments
    teacher: EncoderTeacherArguments
    student: EncoderStudentArguments
    code: CodeArguments
    search: EncoderSearchArguments

    @property
    def run_flags(self) -> list[str]:
        """What every run gets, but for its losses and seed."""
        groups = (self.data, self.task, self.held_out, self.teacher, self.student, self.code)
        common = [f"--{flag}" for flag in self.search.common or []]
        budget = [f"--max_steps={self.search.max_steps}", f"--learning_rate={self.search.learning_rate}"]
        return [*as_flags(*groups), *_QUIET, *budget, *common]


def use_demo(settings: EncoderSearchSettings) -> None:
    """Fills in the demo's data and teachers, which are made in `--output_dir`/demo.

    Raises:
        InputError: Data or models are named, too.
    """
    groups = (settings.data, settings.task, settings.held_out, settings.teacher, settings.student)
    if named := [flag for flag in as_flags(*groups) if flag.startswith("--")]:
        raise InputError(f"--smoke brings its own data and models: leave out {named[0]}.")
    directory = Path(settings.search.output_dir) / "demo"
    files = write_demo_files(directory)
    settings.data.dataset = settings.task.task_dataset = files["train"]
    settings.held_out.task_eval_dataset = files["validation"]
    if "general" in read_preset(find_preset(settings.search.base)).values_for(_RECIPE).get("stages", []):
        settings.held_out.eval_dataset = files["validation"]
    settings.task.label_column = "label"
    request = EncoderDemoRequest(str(directory), seed=0)
    settings.teacher.teacher, settings.teacher.task_teacher = request.teacher, request.task_teacher
    if not Path(request.task_teacher, "config.json").is_file():
        make_demo_teachers(request)


@dataclass(frozen=True)
class Combination:
    """losses: of every stage that is varied."""

    name: str
    losses: Losses

    @property
    def text(self) -> str:
        """The sum of losses as `--losses` takes it."""
        return " + ".join(name if weight == 1 else f"{weight:.15g}*{name}" for name, weight in self.losses.items())


class Search:
    """The runs of a search: each combination with each seed.

    Raises:
        InputError: The base or a candidate does not fit the models or the data.
    """

    def __init__(self, settings: EncoderSearchSettings, recipes: Path):
        self.settings, self.search = settings, settings.search
        self.preset = find_preset(self.search.base)
        self.method = Method(self.preset.stem, recipes / f"{_RECIPE}.py", self.preset)
        refuse_set_here([self.method], [], (), "")
        refuse_set_here([], self.search.common or [], _SET_HERE, "the search sets for all runs alike")
        self._digests = FileDigests()
        base = self._parsed([])
        if self.search.stage not in base.args.stages:
            raise InputError(
                f"--stage {self.search.stage}: the preset {self.preset.stem} has no such stage; its stages are "
                f"{', '.join(base.args.stages)}."
            )
        self._base_losses = [base.args.objective(number).weights for number in range(len(base.args.stages))]
        self._stages = base.args.stages
        self._rows = check_data(base)
        number = max(i for i, stage in enumerate(self._stages) if stage == self.search.stage)
        self.base = Combination(BASE, dict(self._base_losses[number]))
        self._refuse_unfit(self.base)
        self.combinations = self._combinations()

    def flags(self, combination: Combination) -> list[str]:
        """The losses of all stages, of which those of the varied kind have the combination's."""
        texts = [
            combination.text if stage == self.search.stage else Combination("", dict(weights)).text
            for stage, weights in zip(self._stages, self._base_losses, strict=True)
        ]
        return ["--losses", *texts]

    def cell(self, combination: Combination, seed: int) -> Cell:
        """The run of a combination with a seed."""
        directory = Path(self.search.output_dir) / combination.name.replace(" ", "_") / f"seed{seed}"
        flags = (*self.settings.run_flags, *self.flags(combination), f"--seed={seed}")
        return Cell(self.method, directory, flags, self._digests)

    def cells(self) -> list[Cell]:
        """All of them, by combination and seed."""
        return [self.cell(combination, seed) for combination in self.combinations for seed in self.search.seeds]

    def _parsed(self, losses: Sequence[str]) -> EncoderSettings:
        """The settings of a run, as its recipe reads them."""
        from rlkd_trl.trainers.encoder_config import EncoderKDConfig

        groups = groups_of(EncoderSettings, EncoderKDConfig)
        parser = RecipeParser(*groups.values(), description="", recipe=_RECIPE)
        output = ["--output_dir", str(Path(self.search.output_dir) / BASE)]
        parsed = parser.parse(["--config", str(self.preset), *self.settings.run_flags, *losses, *output])
        settings = EncoderSettings(**dict(zip(groups, parsed, strict=True)))
        settings.run = RunArguments(overwrite_output_dir=True)  # whether its directory is free is asked of each run
        return settings

    def _refuse_unfit(self, combination: Combination) -> None:
        """Raises `InputError` if the models or the data do not allow these losses."""
        plan_stages(self._parsed(self.flags(combination)), self._rows)

    def _candidates(self) -> list[str]:
        """Those named, or all of the stage's ingredients that these models and data allow."""
        from rlkd_trl.trainers.encoder_objective import INGREDIENTS

        named = self.search.candidates
        for name in named or []:
            if name not in INGREDIENTS or self.search.stage not in INGREDIENTS[name].stages:
                of_stage = ", ".join(n for n, one in INGREDIENTS.items() if self.search.stage in one.stages)
                raise InputError(f"--candidates {name}: a {self.search.stage} stage has: {of_stage}.")
        fit = []
        for name, ingredient in INGREDIENTS.items():
            if name not in (named or INGREDIENTS) or self.search.stage not in ingredient.stages:
                continue
            try:
                self._refuse_unfit(Combination(name, {name: 1.0}))
            except InputError as error:
                if named is not None:
                    raise
                print(f"Left out: {name}. {error}", flush=True)
            else:
                fit.append(name)
        return fit

    def _combinations(self) -> list[Combination]:
        """The base first, then what is asked for, each set of ingredients once."""
        base, asked = self.base.losses, self.search.sets
        candidates = self._candidates() if {"add_one", "subsets"} & set(asked) else []
        proposed = [self.base]
        if "questions" in asked:
            proposed += questions(base)
        if "leave_one_out" in asked and len(base) > 1:
            proposed += [Combination(f"without {name}", _without(base, [name])) for name in base]
        if "add_one" in asked:
            proposed += [Combination(f"with {name}", {**base, name: 1.0}) for name in candidates if name not in base]
        if "subsets" in asked:
            for size in range(1, self.search.up_to + 1):
                proposed += [
                    Combination("+".join(names), {name: base.get(name, 1.0) for name in names})
                    for names in combinations(candidates, size)
                ]
        distinct: dict[frozenset, Combination] = {}
        for combination in proposed:
            distinct.setdefault(frozenset(combination.losses), combination)
        for combination in distinct.values():
            self._refuse_unfit(combination)
        return list(distinct.values())


def questions(base: Losses) -> list[Combination]:
    """The base without attention losses, without hard labels, without both; soft and hard targets; soft alone."""
    sets = {
        "without attention": _without(base, ATTENTION),
        "without hard labels": _without(base, ["hard_ce"]),
        "without attention and hard labels": _without(base, [*ATTENTION, "hard_ce"]),
        "soft and hard": {name: base.get(name, 1.0) for name in ("logits_kl", "hard_ce")},
        "soft alone": {"logits_kl": base.get("logits_kl", 1.0)},
    }
    return [Combination(name, losses) for name, losses in sets.items() if losses]


def _without(losses: Losses, names: Sequence[str]) -> Losses:
    return {name: weight for name, weight in losses.items() if name not in names}
