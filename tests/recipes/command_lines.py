"""Recipes as a user runs them: `run("ppo_kd --teacher T")` is `python recipes/ppo_kd.py --teacher T`."""

import csv
import importlib.util
import json
import pkgutil
import random
import shlex
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from rlkd_trl import errors
from rlkd_trl.commands import console
from rlkd_trl.commands.parser import RecipeParser
from rlkd_trl.commands.settings import CommandLine
from rlkd_trl.commands.shipped import PACKAGE_SCRIPTS
from rlkd_trl.planning import command

ROOT = Path(__file__).parents[2]
# The recipes that read prompts, and all that there are but those that run others.
PROMPTED = (
    *("sft", "pseudo_label", "cache_teacher"),
    *("ppo_kd", "rloo_kd", "reinforce_kd", "kd", "all_actions_kd", "evaluate"),
)
RECIPES = (*PROMPTED, "encoder_kd")

COLUMNS = "--source_column mr --target_column ref"
TWO_STEPS = (
    "--max_steps 2 --per_device_train_batch_size 8 --learning_rate 1e-2 --lr_scheduler_type constant "
    "--logging_steps 1 --disable_tqdm True"
)
SAMPLING = "--num_generations 2 --max_completion_length 6"

# The ways to distil, as the beginning of a command.
METHODS = {
    "ppo": "ppo_kd",
    "rloo-sequence": "rloo_kd --level sequence",
    "rloo-token": "rloo_kd --level token",
    "reinforce": "reinforce_kd",
    "kd": "kd --divergence jsd --lmbda 0.5",
    "all-actions": "all_actions_kd",
}
REWARDED_METHODS = [name for name in METHODS if name not in ("kd", "all-actions")]


def main_of(recipe: str) -> Callable[[], None]:
    if recipe in PACKAGE_SCRIPTS:
        return pkgutil.resolve_name(f"rlkd_trl.{recipe}").main
    if recipe == "rlkd-trl":
        return console.main
    script = ROOT / "recipes" / f"{recipe}.py"
    spec = importlib.util.spec_from_file_location(f"recipe_{recipe}", script)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(script.parent)  # as Python does for a script: it may import files beside it
        spec.loader.exec_module(module)
    return module.main


def run(line: str) -> int:
    """The exit code, in this process: a new one would spend seconds on its imports."""
    recipe, *flags = shlex.split(line)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{recipe}.py", *flags])
        try:
            errors.run(main_of(recipe))
        except SystemExit as exit:
            return exit.code
    return 0


class _Parsed(BaseException):
    """Ends a recipe once its flags are parsed."""


def parsed(line: str) -> dict[str, object]:
    """All settings by name, as the recipe's own parser reads them. Raises what the parser raises."""
    groups = []
    parse = RecipeParser.parse

    def parse_and_stop(*args, **kwargs):
        groups.extend(parse(*args, **kwargs))
        raise _Parsed

    recipe, *flags = shlex.split(line)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CommandLine, "sketch", CommandLine.settings)  # not what is read before the trainer's imports
        patch.setattr(RecipeParser, "parse", parse_and_stop)
        patch.setattr(sys, "argv", [f"{recipe}.py", *flags])
        with pytest.raises(_Parsed):
            main_of(recipe)()
    return {name: value for group in groups for name, value in vars(group).items()}


@cache
def flags_of(recipe: str) -> set[str]:
    """Every flag that the command has."""
    if recipe == "plan":
        return {option for action in command.parser()._actions for option in action.option_strings}
    return {f"--{name}" for name in [*parsed(recipe), "config", "help", "help_all", "debug"]}


def word_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Distinct inputs `mr` of four words that the tests' tokenizer knows, and as `ref` the same words backwards."""
    generator = random.Random(seed)
    inputs: dict[tuple[str, ...], None] = {}  # a set that keeps order
    while len(inputs) < count:
        inputs[tuple(f"w{generator.randint(3, 26)}" for _ in range(4))] = None
    return [{"mr": " ".join(words), "ref": " ".join(reversed(words))} for words in inputs]


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics_of(output_dir: Path) -> dict[str, dict[str, float]]:
    return json.loads((output_dir / "metrics.json").read_text())


def write_templates(path: Path, **jinja: str) -> Path:
    """A promptsource file of these templates, by name."""
    lines = ["templates:"]
    for number, (name, text) in enumerate(jinja.items()):
        lines += [f"  {number}: !Template", f"    name: {name}", f"    jinja: {json.dumps(text)}"]
    path.write_text("\n".join(lines) + "\n")
    return path
