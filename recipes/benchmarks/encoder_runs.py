"""What the encoder benchmark runs: methods and their budgets, each run as a call of encoder_kd.py, and their order."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from encoder_material import MAX_LENGTH, TASKS

PRESETS = Path(__file__).resolve().parents[1] / "configs" / "methods" / "encoder_kd"
SIZES = {
    "same width": ["--num_layers", "3"],
    "half width": ["--num_layers", "3", "--hidden_size", "192", "--num_heads", "6"],
}
# What a stage of a preset may have of its own; the others of its settings are for all stages.
PER_STAGE = ("stages", "losses", "layer_map", "temperature")
NOT_THE_PRESETS = ("stage_epochs", "stage_learning_rates", "per_device_train_batch_size", "init")
MEASURED = "measured.json"
SEEDS = (0, 1, 2)
TEACHER_STEPS = 80
TEACHER = "--learning_rate 2e-4 --warmup_steps 10 --per_device_train_batch_size 16".split()
QUIET = f"--max_length {MAX_LENGTH} --save_strategy no --disable_tqdm True --logging_steps 20 --use_cpu True".split()
# CPU seconds of a step and of all else in a run, as measured with one thread of a Xeon with AVX-512; for `--plan`.
SECONDS = {"general": 0.6, "task": 0.3, "teacher": 0.45, "start": 5.0}


@dataclass(frozen=True)
class Budget:
    """Steps of a general stage, of 32 sentences each, and of each task stage, of 16; learning rates; which tasks."""

    general: int
    task: int
    general_rate: str
    task_rate: str
    tasks: tuple[str, ...] = tuple(TASKS)

    @property
    def general_flags(self) -> list[str]:
        return f"--learning_rate {self.general_rate} --warmup_steps 10 --per_device_train_batch_size 32".split()

    @property
    def task_flags(self) -> list[str]:
        return f"--learning_rate {self.task_rate} --warmup_steps 5 --per_device_train_batch_size 16".split()


SHORT = Budget(40, 30, "5e-4", "3e-4")
# Students that begin with random numbers learn one class only in the short one.
LONG = Budget(100, 40, "1e-3", "1e-3", ("food",))
LONGEST = Budget(100, 150, "1e-3", "1e-3", ("food",))  # a narrow student learns slowly, and its steps cost little


@dataclass(frozen=True)
class Method:
    """A way from the teacher to a student of a task.

    preset: of encoder_kd; None: labels alone. init: what the student begins with; None: as the preset says. without:
    losses that are left out.
    """

    preset: str | None
    init: str | None = None
    size: str = "same width"
    layer_map: str | None = None
    without: tuple[str, ...] = ()
    budget: Budget = SHORT

    def settings(self, kind: str) -> dict[str, object]:
        """The preset's stages of one kind, "general" or "task"; {} if there are none."""
        if self.preset is None:
            return {}
        preset = yaml.safe_load((PRESETS / f"{self.preset}.yaml").read_text(encoding="utf-8"))
        found = stages_of(preset, kind)
        if found:
            found["losses"] = [without_terms(losses, self.without) for losses in found["losses"]]
            if self.layer_map is not None:
                found["layer_map"] = [self.layer_map] * len(found["stages"])
        return found


def stages_of(preset: Mapping[str, object], kind: str) -> dict[str, object]:
    """A preset with its stages of one kind alone, and without `NOT_THE_PRESETS`; {} if there are none of the kind."""
    numbers = [i for i, stage in enumerate(preset["stages"]) if stage == kind]
    if not numbers:
        return {}
    found = {name: value for name, value in preset.items() if name not in NOT_THE_PRESETS}
    for name in PER_STAGE:
        values = preset.get(name)
        if values is not None:
            found[name] = [values[i] if len(values) > 1 else values[0] for i in numbers]
    return found


def without_terms(losses: str, names: Sequence[str]) -> str:
    """A sum of losses with some of its terms left out."""
    terms = [term.strip() for term in losses.split("+")]
    return " + ".join(term for term in terms if term.rpartition("*")[2].strip() not in names)


METHODS = {
    "labels alone": Method(None, "uniform"),
    "kd": Method("kd"),
    "soft_only": Method("soft_only"),
    "pkd": Method("pkd"),
    "distilbert": Method("distilbert"),
    "minilm": Method("minilm", "uniform"),
    "minilmv2": Method("minilmv2", "uniform"),
    "tinybert": Method("tinybert", "uniform"),
    "mix": Method("mix", "uniform"),
    "mix_no_attention": Method("mix_no_attention", "uniform"),
}
# TinyBERT's transformer loss is that on attention and hidden states (Jiao et al. 2020, eq. 7–8).
TRANSFORMER = ("attention_mse", "hidden_mse")
ABLATIONS = {
    "tinybert, random": Method("tinybert", "random", budget=LONG),
    "tinybert, random, no transformer loss": Method("tinybert", "random", without=TRANSFORMER, budget=LONG),
    "tinybert, random, top": Method("tinybert", "random", layer_map="top", budget=LONG),
    "tinybert, random, bottom": Method("tinybert", "random", layer_map="bottom", budget=LONG),
    "distilbert, teacher's layers": Method("distilbert", budget=LONG),
    "distilbert, random": Method("distilbert", "random", budget=LONG),
}
HALF_WIDTH = {
    f"{preset}, half width": Method(preset, "random", "half width", budget=LONGEST)
    for preset in ("kd", "minilmv2", "mix_no_attention")
}
GROUPS = (METHODS, ABLATIONS, HALF_WIDTH)  # in the order in which they are run
ALL = {name: method for group in GROUPS for name, method in group.items()}
# (question, one method, the other)
QUESTIONS = [
    ("Soft targets beside labels", "kd", "labels alone"),
    ("Hard labels beside soft targets", "kd", "soft_only"),
    ("A general stage and layers' states beside soft targets", "mix_no_attention", "soft_only"),
    ("Attention losses and hard labels beside these", "mix", "mix_no_attention"),
    ("All of it over soft targets alone", "mix", "soft_only"),
]
# (where it is said, better, worse)
EXPECTED = [
    ("TinyBERT, table 3: without it, it loses most", "tinybert, random", "tinybert, random, no transformer loss"),
    ("TinyBERT, table 4: uniform beats top", "tinybert, random", "tinybert, random, top"),
    ("TinyBERT, table 4: uniform beats bottom", "tinybert, random", "tinybert, random, bottom"),
    (
        "DistilBERT, table 4: random initialisation loses most",
        "distilbert, teacher's layers",
        "distilbert, random",
    ),
]


@dataclass(frozen=True)
class Run:
    """One call of the recipe: `kind` is "teacher", "general" or "task"; `of` is the method, or the teacher's task."""

    kind: str
    of: str
    directory: Path
    settings: dict[str, object]
    flags: list[str]
    steps: int
    task: str | None = None
    seed: int = 0

    @property
    def is_done(self) -> bool:
        """Whether it was run, with these settings."""
        return (self.directory / MEASURED).is_file() and self.measured["run"] == self.record

    @property
    def measured(self) -> dict[str, float]:
        return json.loads((self.directory / MEASURED).read_text(encoding="utf-8"))

    @property
    def record(self) -> dict[str, object]:
        return {"settings": self.settings, "flags": self.flags, "steps": self.steps}

    @property
    def seconds(self) -> float:
        """About how much CPU time it takes."""
        return SECONDS["start"] + SECONDS[self.kind] * self.steps * len(self.settings["stages"])


class Plan:
    """All runs, in the order in which a table is of use earliest: group by group, and seed by seed.

    most_steps: a bound of every run's steps, for a try.
    """

    def __init__(
        self,
        work_dir: Path,
        methods: Sequence[str] = tuple(ALL),
        tasks: Sequence[str] = tuple(TASKS),
        seeds: Sequence[int] = SEEDS,
        most_steps: int | None = None,
    ):
        self.here, self.tasks, self.seeds, self.most_steps = work_dir, tasks, seeds, most_steps
        self.methods = {name: method for name, method in ALL.items() if name in methods}

    def tasks_of(self, name: str) -> list[str]:
        return [task for task in self.tasks if task in self.methods[name].budget.tasks]

    def runs(self) -> list[Run]:
        runs = []
        for group in GROUPS:
            names = [name for name in group if name in self.methods]
            runs += self.general_runs(names)
            for seed in self.seeds:
                runs += self.task_runs(names, seed)
        return list({one.directory: one for one in runs}.values())  # a teacher once, before its first student

    def general_runs(self, names: Sequence[str]) -> list[Run]:
        return [self.general(name) for name in names if self.methods[name].settings("general")]

    def task_runs(self, names: Sequence[str], seed: int) -> list[Run]:
        runs = []
        for task in self.tasks:
            named = [name for name in names if task in self.tasks_of(name)]
            runs += [self.teacher(task), *(self.task(name, task, seed) for name in named)] if named else []
        return runs

    def general(self, name: str) -> Run:
        method, text = self.methods[name], self.here / "general"
        flags = ["--teacher", self.here / "teacher", *_new_student(method)]
        flags += ["--dataset", text / "train.csv", "--source_column", "text", "--eval_dataset", text / "least.csv"]
        flags += [*method.budget.general_flags, *QUIET, "--seed", "0"]
        directory = self.here / "students" / slug(name)
        steps = self._steps(method.budget.general)
        return Run("general", name, directory, method.settings("general"), _words(flags), steps)

    def teacher(self, task: str) -> Run:
        directory = self.here / "task_teachers" / slug(task)
        flags = ["--student", self.here / "encoder", *self.data_of(task), *TEACHER, *QUIET, "--seed", "0"]
        settings = {"stages": ["task"], "losses": ["hard_ce"]}
        return Run("teacher", task, directory, settings, _words(flags), self._steps(TEACHER_STEPS), task)

    def task(self, name: str, task: str, seed: int) -> Run:
        method = self.methods[name]
        settings = method.settings("task") or {"stages": ["task"], "losses": ["hard_ce"]}
        has_general = bool(method.settings("general"))
        flags = []
        if method.settings("task"):
            flags += ["--task_teacher", self.teacher(task).directory]
        elif not has_general:
            flags += ["--teacher", self.here / "encoder"]
        flags += ["--student", self.general(name).directory] if has_general else _new_student(method)
        flags += [*self.data_of(task), *method.budget.task_flags, *QUIET, "--seed", str(seed)]
        directory = self.here / "tasks" / slug(task) / f"{slug(name)}-seed{seed}"
        return Run("task", name, directory, settings, _words(flags), self._steps(method.budget.task), task, seed)

    def _steps(self, steps: int) -> int:
        return steps if self.most_steps is None else min(steps, self.most_steps)

    def data_of(self, task: str) -> list[object]:
        rows = self.here / "tasks" / slug(task)
        columns = ["--task_source_column", "text", "--label_column", "label"]
        return ["--task_dataset", rows / "train.csv", "--task_eval_dataset", rows / "least.csv", *columns]


def _new_student(method: Method) -> list[str]:
    init = method.init or yaml.safe_load((PRESETS / f"{method.preset}.yaml").read_text(encoding="utf-8")).get("init")
    return [*SIZES[method.size], "--init", init or "uniform"]


def _words(flags: Sequence[object]) -> list[str]:
    return [str(flag) for flag in flags]


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower())
