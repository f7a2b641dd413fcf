"""What must be right before any run of a comparison begins."""

import pkgutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.commands.arguments import (
    DataArguments,
    HeldOutArguments,
    PromptArguments,
    RunArguments,
    StudentArguments,
    TeacherArguments,
)
from rlkd_trl.commands.checks import check_checkpoints
from rlkd_trl.commands.comparison.arguments import BUDGETS, ComparisonArguments, ComparisonSettings, as_flags
from rlkd_trl.commands.comparison.cells import Method, find_method, shipped_presets
from rlkd_trl.commands.comparison.grid import Grid, part_name
from rlkd_trl.commands.data import load_prompts
from rlkd_trl.commands.demo import DemoRequest, name_smoke_demo
from rlkd_trl.commands.distillation import check, check_data, within_lengths
from rlkd_trl.commands.parser import RecipeParser
from rlkd_trl.commands.prompt_lengths import fit_rows
from rlkd_trl.commands.settings import DistillationSettings, RewardedSettings, groups_of
from rlkd_trl.data import input_key
from rlkd_trl.errors import InputError
from rlkd_trl.prompts import PromptTemplates, is_conversation
from rlkd_trl.settings.files import adapted_model

if TYPE_CHECKING:
    from datasets import Dataset

# Flags of a run, beside those on data, prompts and models, that are not a method's own.
SET_HERE = (
    *("config", "output_dir", "resume_from_checkpoint", "seed", "learning_rate"),
    *("max_prompt_length", "max_completion_length", *BUDGETS),
)
# Its students write nothing that could be compared with what others write.
ENCODERS = "encoder_kd"
# These a preset may set nevertheless: teachers kept in different ways are methods to compare.
OF_THE_TEACHERS_WEIGHTS = {"teacher_dtype", "teacher_quantization"}


class TrainerConfigs(Mapping):
    """Recipe to the class of its trainer's settings, which is imported when it is asked for: that takes seconds."""

    def __init__(self, **paths: str):
        self._paths = paths

    def __getitem__(self, recipe: str) -> type:
        return pkgutil.resolve_name(self._paths[recipe])

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


# The recipes that can be compared, and be a hop of a chain, with their trainers' settings.
CONFIGS = TrainerConfigs(
    ppo_kd="rlkd_trl.trainers.config:PPOKDConfig",
    rloo_kd="rlkd_trl.trainers.config:RLOOKDConfig",
    reinforce_kd="rlkd_trl.trainers.config:ReinforceKDConfig",
    kd="rlkd_trl.trainers.full_vocabulary_config:KDConfig",
    all_actions_kd="rlkd_trl.trainers.full_vocabulary_config:AllActionsKDConfig",
)


def check_named(settings: ComparisonSettings) -> None:
    """Raises `InputError` if a flag is missing that must be given, or flags are given that cannot go together."""
    data, compare, test = settings.data, settings.compare, settings.measurement
    named = {"--dataset": data.dataset, "--test_dataset": test.test_dataset}
    named |= {"--teacher": settings.teacher.teacher, "--student": settings.student.student}
    budgets = [f"--{name}" for name in BUDGETS if getattr(compare, name) is not None]
    if compare.smoke:
        if named_too := [flag for flag, value in named.items() if value is not None]:
            raise InputError(f"--smoke brings its own data and models: leave out {' and '.join(named_too)}.")
    elif missing := [flag for flag, value in named.items() if value is None]:
        raise InputError(f"{' and '.join(missing)} missing. To try this on the embedded demo: --smoke.")
    if len(budgets) != 1:
        kinds = ", ".join(f"--{name}" for name in BUDGETS)
        number_given = f"there are {' and '.join(budgets)}" if budgets else "there is none"
        raise InputError(f"One kind of budget is needed, and {number_given}: give one of {kinds}.")
    if len(compare.learning_rates) > 1 and test.validation_dataset is None and not compare.smoke:
        raise InputError("Several --learning_rates need a --validation_dataset to choose on.")
    if compare.top is not None and test.validation_dataset is None and not compare.smoke:
        raise InputError("--top needs a --validation_dataset to choose on.")
    if compare.select_on in ("bleu", "rougeL") and not (test.eval_target_column or data.target_column):
        raise InputError(f"--select_on {compare.select_on} needs references: give --eval_target_column.")


def find_methods(compare: ComparisonArguments, recipes: Path) -> list[Method]:
    """The methods named, or all.

    Raises:
        InputError: One is not there, or twice, or the baseline is not among them; a budget cannot be shared by
            methods that follow one another.
    """
    comparable = [str(preset) for preset in shipped_presets(recipes) if preset.parent.name != ENCODERS]
    methods = [find_method(name, recipes) for name in compare.methods or comparable]
    names = [method.name for method in methods]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--methods: {twice[0]} is there twice; give the files different names.")
    if reserved := {"teacher", "warm_start"}.intersection(names):
        raise InputError(f"--methods: {reserved.pop()} is the name of another line of the table; rename the file.")
    for method in methods:
        too_small = [budget for budget in compare.budgets().values() if budget.value < len(method.parts)]
        if too_small and too_small[0].kind != "max_cpu_seconds":
            budget = f"--{too_small[0].kind} {too_small[0].value}"
            raise InputError(
                f"{budget} is less than one for each of the {len(method.parts)} methods of {method.name}."
            )
    if compare.baseline not in (None, "warm_start", *names):
        raise InputError(f"--baseline {compare.baseline}: choose warm_start or one of --methods: {', '.join(names)}.")
    return methods


def check_flags(
    methods: Sequence[Method], common: Sequence[str], configs: Mapping[str, type], teacher: TeacherArguments
) -> None:
    """Presets and `--common` set nothing that is set here for all methods alike.

    common: as name=value. configs: recipe to the class of its settings. teacher: as given to compare.py, whose tests
    ask it; a preset may only choose the weights' dtype or quantisation where that does not.

    Raises:
        InputError: As above, or a recipe is not in `configs`.
    """
    groups = [DataArguments, HeldOutArguments, PromptArguments, TeacherArguments, StudentArguments, RunArguments]
    set_here = {option.name for group in groups for option in fields(group)}.union(SET_HERE)
    given_flags = {flag.removeprefix("--") for flag in as_flags(teacher)}
    set_here -= OF_THE_TEACHERS_WEIGHTS - given_flags
    parts = [part for method in methods for part in method.parts]
    for part in parts:
        if part.recipe.stem not in configs:
            raise InputError(
                f"{part.preset}: {part.recipe.stem} is none of the recipes to compare: {', '.join(configs)}."
            )
    refuse_set_here(parts, common, set_here, "compare.py sets for all methods alike")


def refuse_set_here(
    methods: Sequence[Method],
    common: Sequence[str],
    set_here: Collection[str],
    whose: str,
    *,
    may_push: bool = False,
) -> None:
    """Raises `InputError` if a preset or `--common` sets a key, or what the command sets for its runs itself.

    common: as name=value; a flag's name may be written with hyphens. whose: the end of the message. may_push: whether
    `--common` may send a student to the Hub.
    """
    given = {"--common": [flag.partition("=")[0].replace("-", "_") for flag in common]}
    given |= {f"The preset {method.preset}": list(method.settings()) for method in methods}
    for source, names in given.items():
        if "hub_token" in names:
            raise InputError(
                f"{source} sets hub_token, which would stand in every run's record: log in with `hf auth login`."
            )
        if "push_to_hub" in names and not (may_push and source == "--common"):
            instead = "give --common push_to_hub=True, which sends the last student alone"
            by_hand = "send the one that you choose: hf upload OWNER/NAME DIRECTORY_OF_ITS_RUN"
            raise InputError(
                f"{source} sets push_to_hub, which would send the student of every run: leave it out, and "
                f"{instead if may_push else by_hand}"
            )
        if clash := sorted(set(set_here).intersection(names)):
            raise InputError(f"{source} sets {clash[0]}, which {whose}.")


def first_runs(grid: Grid, configs: Mapping[str, type]) -> dict[str, DistillationSettings]:
    """The settings of the first run of each method's parts, parsed as the recipe will parse them, by the part's name.

    Where another part will make the student, a model of the same kind stands for it.

    Raises:
        InputError: The recipe would refuse a flag or a value, or adapters would be handed on.
    """
    runs, budget = {}, next(iter(grid.budgets))
    for method in grid.methods:
        for number, part in enumerate(method.parts, start=1):
            name = part_name(method, part)
            config = configs[part.recipe.stem]
            has_rewards = any(option.name == "reward_weights" for option in fields(config))
            kind = RewardedSettings if has_rewards else DistillationSettings
            groups = groups_of(kind, config)
            parser = RecipeParser(*groups.values(), description="", recipe=part.recipe.stem)
            cell = grid.cell(budget, method, grid.seeds[0], [grid.learning_rates[0]] * number)
            with _naming(name):
                parsed = parser.parse(cell.words(goes_on=False))
                run = kind(**dict(zip(groups, parsed, strict=True)))
                if part is not method and run.adapters.use_peft and not run.adapters.merge_adapters:
                    raise InputError(
                        "the next method would begin with adapters and put others on them: add merge_adapters=True to "
                        "--common."
                    )
            runs[name] = run
            if number > 1:
                run.student = _left_by(runs[part_name(method, method.parts[number - 2])])
    return runs


def _left_by(run: DistillationSettings) -> StudentArguments:
    """A stand-in for the student that a run will leave: its own, or what its adapters will be merged into."""
    merged_into = adapted_model(run.student.student) if run.adapters.merge_adapters else None
    return run.student if merged_into is None else replace(run.student, student=merged_into, student_revision=None)


def check_runs(runs: Mapping[str, DistillationSettings]) -> None:
    """All that each run's recipe checks before it loads a model; of the data, which are the same for all, once.

    Raises:
        InputError: One of the recipes would; the message names the method.
    """
    data = check_data(next(iter(runs.values())), held_out_flag="--validation_dataset")
    for name, run in runs.items():
        with _naming(name):
            inputs = check(run, data)
    within_lengths(run, inputs)


@contextmanager
def _naming(method: str) -> Iterator[None]:
    """Puts the method's name before the message of an `InputError`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"Method {method}: {error}") from error


def load_test_rows(settings: ComparisonSettings, templates: PromptTemplates | None) -> dict[str, "Dataset"]:
    """The rows of each test set by its name, once all data sets are found to be good.

    Raises:
        InputError: One of them is not, or test inputs are among those of training or validation.
    """
    data, prompts, test = settings.data, settings.prompts, settings.measurement
    seen = {"--dataset": load_prompts(data, prompts, templates)}
    if test.validation_dataset is not None:
        held_out = HeldOutArguments(test.validation_dataset, test.validation_split, test.eval_target_column)
        seen["--validation_dataset"] = load_prompts(data, prompts, templates, held_out)
    tests = {}
    for name, dataset in test.tests().items():
        held_out = HeldOutArguments(dataset, test.test_split, test.eval_target_column)
        tests[name] = load_prompts(data, prompts, templates, held_out)
        for flag, rows_seen in seen.items():
            if common := _inputs(tests[name]) & _inputs(rows_seen):
                raise InputError(
                    f"{len(common)} inputs of --test_dataset {dataset} are in {flag} too, e.g. {min(common)!r}: test "
                    "on inputs that nothing was trained or chosen on."
                )
    return tests


def _inputs(rows: "Dataset") -> set[str]:
    """What tells the rows apart: source texts, or whole conversations."""
    pairs = zip(rows["source"], rows["prompt"], strict=True)
    return {input_key(prompt) if is_conversation(prompt) else source for source, prompt in pairs}


def checked_rows(settings: ComparisonSettings, templates: PromptTemplates | None) -> dict[str, list[dict]]:
    """The rows of each test set by its name, with prompts that fit, once data and checkpoints are found to be good.

    Raises `InputError`.
    """
    tests = load_test_rows(settings, templates)
    check_checkpoints(settings.teacher, settings.student)
    lengths = {name: getattr(settings.measurement, name) for name in ("max_prompt_length", "max_completion_length")}
    of_prompts = (settings.prompts, templates, settings.student, settings.teacher)
    return {name: list(fit_rows(rows, f"Test data {name}", *of_prompts, **lengths)) for name, rows in tests.items()}


def name_demo(settings: ComparisonSettings) -> DemoRequest:
    """Fills in the demo's data, a teacher and a warm start, in `--output_dir`/demo; returns what is to be trained."""
    request, files = name_smoke_demo(settings, settings.compare.output_dir)
    settings.data.dataset = files["train"]
    settings.measurement.validation_dataset = files["validation"]
    settings.measurement.test_dataset = [files["test"]]
    return request
