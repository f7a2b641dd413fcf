"""A chain of distillations from a teacher through assistants to a student: its flags, its runs, its results."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from rlkd_trl.commands.arguments import (
    AbsentTeacherArguments,
    CodeArguments,
    DataArguments,
    HeldOutArguments,
    PromptArguments,
    RunArguments,
    StudentArguments,
    TeacherArguments,
)
from rlkd_trl.commands.comparison.arguments import as_flags
from rlkd_trl.commands.comparison.cells import Cell, Method, find_method
from rlkd_trl.commands.comparison.checks import refuse_set_here
from rlkd_trl.commands.demo import DemoRequest, name_smoke_demo
from rlkd_trl.commands.distillation import check, check_data, within_lengths
from rlkd_trl.commands.files_read import FileDigests
from rlkd_trl.commands.loading import student_writer
from rlkd_trl.commands.parser import RecipeParser
from rlkd_trl.commands.settings import DistillationSettings, RewardedSettings, groups_of
from rlkd_trl.errors import InputError
from rlkd_trl.evaluation.tables import markdown_table
from rlkd_trl.settings.files import CheckpointPath, OutputPath, PresetPath
from rlkd_trl.settings.ranges import Count, Range, Seed, check_ranges

_QUIET = ("--disable_tqdm=True",)
# Flags beside those of the groups that the chain sets itself: who teaches whom, on what, and where the models go.
_SET_HERE = ("config", "output_dir", "resume_from_checkpoint", "seed", "learning_rate", "max_steps")
_GROUPS_SET_HERE = (
    *(DataArguments, HeldOutArguments, PromptArguments, TeacherArguments, AbsentTeacherArguments),
    *(StudentArguments, CodeArguments, RunArguments),
)
# How a model is asked, by flags of teacher and student alike; and flags that only suit the first teacher.
_CHAT = ("chat_template", "system_prompt", "chat_template_kwargs")
_OF_THE_FIRST_TEACHER = ("teacher_quantization", "teacher_max_prompt_length")
_SHOWN = ("bleu", "rougeL", "teacher_nll_per_token", "tokens")


@dataclass
class ChainArguments:
    """Chain"""

    smoke: bool = field(default=False, metadata={"help": "All of it on the embedded demo, in minutes."})
    methods: list[PresetPath] = field(
        default_factory=lambda: ["word_kd"],
        metadata={"help": "Preset of each hop, or one for all: names in recipes/configs/methods/, or YAML files."},
    )
    num_assistants: Annotated[int, Range(1, 20)] = field(
        default=1, metadata={"help": "New models between teacher and student, in geometric sizes (see rlkd-trl plan)."}
    )
    assistants: list[CheckpointPath] | None = field(
        default=None, metadata={"help": "Instead: checkpoints that the assistants begin as, the largest first."}
    )
    dense: bool = field(
        default=False, metadata={"help": "Every earlier model teaches each later one (DGKD), not only the last one."}
    )
    max_steps: list[Count] = field(
        default_factory=lambda: [400], metadata={"help": "Optimizer steps of each hop, or one number for all."}
    )
    learning_rates: list[Annotated[float, Range(1e-12, 10)]] = field(
        default_factory=lambda: [5e-4], metadata={"help": "Of each hop, or one for all."}
    )
    seed: Seed = field(default=0, metadata={"help": "Of new assistants and of all hops."})
    common: list[str] | None = field(
        default=None, metadata={"help": "More flags for every hop, as per_device_train_batch_size=64."}
    )
    output_dir: OutputPath = field(default="runs/assistants", metadata={"help": "Where the models and results go."})

    def __post_init__(self):
        check_ranges(self)
        hops = self.num_hops
        for name in ("methods", "max_steps", "learning_rates"):
            values = getattr(self, name)
            if len(values) not in (1, hops):
                raise InputError(f"--{name} has {len(values)} values for {hops} hops: give one for each, or one.")
        if self.assistants is not None and self.num_assistants != 1:
            raise InputError(
                "--num_assistants makes new assistants, and --assistants names them: give one of the two."
            )
        if odd := [flag for flag in self.common or [] if not flag.partition("=")[2]]:
            raise InputError(f"--common {odd[0]} is not of the form name=value, e.g. logging_steps=50.")

    @property
    def num_hops(self) -> int:
        return (self.num_assistants if self.assistants is None else len(self.assistants)) + 1


@dataclass
class ChainSettings:
    """All flags of assistant_kd.py."""

    data: DataArguments
    held_out: HeldOutArguments
    prompts: PromptArguments
    teacher: TeacherArguments
    student: StudentArguments
    code: CodeArguments
    chain: ChainArguments


def use_demo(settings: ChainSettings) -> DemoRequest:
    """Names the demo's data, teacher and warm start, in `--output_dir`/demo; returns what is to be trained."""
    request, files = name_smoke_demo(settings, settings.chain.output_dir)
    settings.data.dataset, settings.held_out.eval_dataset = files["train"], files["test"]
    return request


def check_named(settings: ChainSettings) -> None:
    """Raises `InputError` if a flag is missing, or flags are given that cannot go together."""
    chain, teacher, student = settings.chain, settings.teacher, settings.student
    named = {
        "--dataset": settings.data.dataset,
        "--teacher": teacher.teacher,
        "--student": settings.student.student,
    }
    if chain.smoke:
        if named_too := [flag for flag, value in named.items() if value is not None]:
            raise InputError(f"--smoke brings its own data and models: leave out {' and '.join(named_too)}.")
        return
    if missing := [flag for flag, value in named.items() if value is None]:
        raise InputError(f"{' and '.join(missing)} missing. To try this on the embedded demo: --smoke.")
    if len(teacher.teacher) > 1:
        raise InputError(f"{len(teacher.teacher)} teachers: a chain begins with one.")
    differing = [name for name in ("templates", "template") if getattr(settings.prompts, name) is not None]
    differing += [name for name in ("teacher_revision", *_OF_THE_FIRST_TEACHER) if not _is_default(teacher, name)]
    differing += [
        f"teacher_{name}" for name in _CHAT if _of("teacher", teacher, name) != _of("student", student, name)
    ]
    if chain.dense and differing:
        raise InputError(
            f"--dense with --{differing[0]}: it would hold for the assistants too, which are asked and kept as the "
            "student is. Distil a teacher that is asked as the student is, or leave --dense out."
        )


def _is_default(group: object, name: str) -> bool:
    return getattr(group, name) == next(option.default for option in dataclasses.fields(group) if option.name == name)


def _of(role: str, group: object, name: str) -> object:
    return getattr(group, f"{role}_{name}")


@dataclass(frozen=True)
class Chain:
    """The models from the teacher to the student, and the run that makes each.

    methods: of each hop. begins: what the assistants and the student begin as.
    """

    settings: ChainSettings
    methods: Sequence[Method]
    begins: Sequence[str]
    digests: FileDigests

    @classmethod
    def of(cls, settings: ChainSettings, recipes: Path) -> "Chain":
        """Raises `InputError` as `find_method` and `refuse_set_here`, and for a hop with several methods."""
        chain = settings.chain
        methods = [find_method(name, recipes) for name in chain.methods]
        if several := [method.name for method in methods if method.before is not None]:
            raise InputError(f"--methods {several[0]}: a hop has one method.")
        set_here = {option.name for group in _GROUPS_SET_HERE for option in dataclasses.fields(group)}.union(_SET_HERE)
        whose = "the chain sets for each hop: give assistant_kd.py's own flag, if it has one, or leave it out"
        refuse_set_here(methods, chain.common or [], set_here, whose, may_push=True)
        new = [str(Path(chain.output_dir) / f"begin{n}") for n in range(1, chain.num_hops)]
        begins = [*(chain.assistants or new), settings.student.student]
        return cls(settings, _for_each(methods, chain.num_hops), begins, FileDigests())

    @property
    def names(self) -> list[str]:
        """The names of the models after the teacher."""
        return [*(f"assistant{number}" for number in range(1, len(self.begins))), "student"]

    def teachers(self, hop: int) -> list[str]:
        """Checkpoints of the models that teach in this hop, counted from 0."""
        output_dir, (first,) = Path(self.settings.chain.output_dir), self.settings.teacher.teacher
        earlier = [first, *(str(output_dir / name) for name in self.names[:hop])]
        return earlier if self.settings.chain.dense else earlier[-1:]

    def flags(self, hop: int) -> list[str]:
        """The flags of a hop's run. Assistants are asked what the student is asked, not as the first teacher is."""
        settings, chain = self.settings, self.settings.chain
        prompts = settings.prompts
        teacher = dataclasses.replace(settings.teacher, teacher=self.teachers(hop))
        student = dataclasses.replace(settings.student, student=self.begins[hop])
        if hop > 0:
            prompts = PromptArguments(student_template=prompts.student_template)
            as_the_student = {f"teacher_{name}": _of("student", student, name) for name in _CHAT}
            defaults = {name: getattr(TeacherArguments, name) for name in ("teacher_revision", *_OF_THE_FIRST_TEACHER)}
            teacher = dataclasses.replace(teacher, **as_the_student, **defaults)
        if hop < len(self.begins) - 1:
            student = dataclasses.replace(student, student_revision=None)
        groups = (settings.data, settings.held_out, prompts, teacher, student, settings.code)
        steps, rates = (_for_each(values, chain.num_hops) for values in (chain.max_steps, chain.learning_rates))
        own = [f"--max_steps={steps[hop]}", f"--learning_rate={rates[hop]}", f"--seed={chain.seed}"]
        if "save_steps" not in self.methods[hop].settings():
            own.append(f"--save_steps={min(500, max(1, steps[hop] // 4))}")
        common = [f"--{flag}" for flag in chain.common or []]
        if len(self.teachers(hop)) == 1 and chain.dense:  # weights by losses begin with the second teacher
            common = [flag for flag in common if not flag.startswith("--teacher_weighting=")]
        if hop < len(self.begins) - 1:  # the student alone goes to the Hub
            common = [flag for flag in common if not flag.replace("-", "_").startswith(("__push_to_hub", "__hub_"))]
        return [*as_flags(*groups), *_QUIET, *own, *common]

    def cell(self, hop: int) -> Cell:
        """The run of a hop."""
        directory = Path(self.settings.chain.output_dir) / self.names[hop]
        return Cell(self.methods[hop], directory, tuple(self.flags(hop)), self.digests)

    def check(self, configs: Mapping[str, type]) -> None:
        """All that can be checked before a model is made or loaded.

        configs: recipe to the class of its trainer's settings.

        Raises:
            InputError: A recipe would refuse a flag; or data, checkpoints or sizes do not fit each other.
        """
        settings = self.settings
        runs = [self._parsed(hop, configs) for hop in range(len(self.begins))]
        for hop, run in enumerate(runs):
            run.teacher, run.student = self._stand_ins(hop, run)
        data = check_data(runs[0])
        for hop, run in enumerate(runs):
            with _naming(hop, self.methods[hop]):
                within_lengths(run, check(run, data if hop == 0 else dataclasses.replace(data, templates=None)))
        if settings.chain.assistants is None:
            self.assistant_configs()

    def _stand_ins(self, hop: int, run: DistillationSettings) -> tuple[TeacherArguments, StudentArguments]:
        """The hop's teachers and student, for those that are not made yet others with their tokenizers.

        A new assistant has the student's, one that is named its own.
        """
        settings, chain = self.settings, self.settings.chain
        made = [*(chain.assistants or [settings.student.student] * chain.num_assistants), settings.student.student]
        (first,) = settings.teacher.teacher
        teachers = [first, *made[:hop]] if chain.dense else [first, *made][hop : hop + 1]
        revision = settings.student.student_revision if chain.assistants is None else None
        return (
            dataclasses.replace(
                run.teacher,
                teacher=teachers,
                teacher_revision=revision if hop > 0 and not chain.dense else run.teacher.teacher_revision,
            ),
            dataclasses.replace(
                run.student,
                student=made[hop],
                student_revision=run.student.student_revision if hop == chain.num_hops - 1 else revision,
            ),
        )

    def _parsed(self, hop: int, configs: Mapping[str, type]) -> DistillationSettings:
        method = self.methods[hop]
        recipe = method.recipe.stem
        if recipe not in configs:
            raise InputError(f"{method.preset}: {recipe} is none of the recipes of a hop: {', '.join(configs)}.")
        config = configs[recipe]
        has_rewards = any(option.name == "reward_weights" for option in dataclasses.fields(config))
        kind = RewardedSettings if has_rewards else DistillationSettings
        groups = groups_of(kind, config)
        parser = RecipeParser(*groups.values(), description="", recipe=recipe)
        with _naming(hop, method):
            return kind(**dict(zip(groups, parser.parse(self.cell(hop).words(goes_on=False)), strict=True)))

    def assistant_configs(self) -> list:
        """Configs of new assistants. Raises `InputError` as `planning.assistants.assistant_configs`."""
        from rlkd_trl.models.loading import load_config
        from rlkd_trl.planning.assistants import assistant_configs

        teacher, student = self.settings.teacher, self.settings.student
        ends = (
            load_config(teacher.teacher[0], revision=teacher.teacher_revision),
            load_config(student.student, revision=student.student_revision),
        )
        return assistant_configs(*ends, self.settings.chain.num_assistants)

    def make_begins(self) -> None:
        """Writes random weights for the new assistants whose hop is not done."""
        if self.settings.chain.assistants is not None:
            return
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        tokenizer = student_writer(self.settings.student).processing_class
        for hop, config in enumerate(self.assistant_configs()):
            if self.cell(hop).is_done:
                continue
            torch.manual_seed(self.settings.chain.seed + hop)
            auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            auto_class.from_config(config).save_pretrained(self.begins[hop])
            tokenizer.save_pretrained(self.begins[hop])


def write_results(chain: Chain) -> str:
    """chain.json and chain.md, which is returned: what each hop has made, on the held-out rows."""
    from rlkd_trl.evaluation.report import write_metrics

    settings, hops = chain.settings, []
    for hop, name in enumerate(chain.names):
        cell = chain.cell(hop)
        metrics = cell.read("metrics.json")
        hops.append(
            {
                "model": name,
                "method": chain.methods[hop].name,
                "teachers": chain.teachers(hop),
                "metrics": metrics["after"],
                "teacher_metrics": metrics["teacher"],
                "cost": cell.read("cost.json"),
            }
        )
    shown = [name for name in _SHOWN if name in hops[-1]["metrics"]]
    rows = [["teacher", "", "", *(_number(hops[0]["teacher_metrics"].get(name)) for name in shown)]]
    rows += [
        [
            hop["model"],
            hop["method"],
            str(hop["cost"]["optimizer_steps"]),
            *(_number(hop["metrics"].get(name)) for name in shown),
        ]
        for hop in hops
    ]
    table = markdown_table(["model", "method", "steps", *shown], rows)
    text = f"# From {settings.teacher.teacher[0]} to {settings.student.student}\n\n{table}\n\nEach NLL is in the eyes "
    text += "of the models that taught in that hop, so hops cannot be compared by it.\n"
    output_dir = Path(settings.chain.output_dir)
    write_metrics(output_dir / "chain.json", {"hops": hops})
    (output_dir / "chain.md").write_text(text, encoding="utf-8")
    return text


@contextmanager
def _naming(hop: int, method: Method) -> Iterator[None]:
    """Puts the hop before the message of an `InputError`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"Hop {hop + 1} ({method.name}): {error}") from error


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _for_each(values: Sequence, count: int) -> list:
    return list(values) * count if len(values) == 1 else list(values)
