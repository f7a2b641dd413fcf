"""From a recipe's first line to training: what a reader passes, in order."""

import ast
import sys
from itertools import groupby
from pathlib import Path

import pytest

import rlkd_trl
from rlkd_trl.commands.distillation import distil
from rlkd_trl.trainers.rollout_trainer import RolloutTrainer
from tests.recipes.command_lines import COLUMNS, ROOT, SAMPLING, TWO_STEPS, main_of

PACKAGE = Path(rlkd_trl.__file__).parent


class _Trains(BaseException):
    """Ends a recipe where training would begin."""


def walk(recipe: str, flags: str) -> list[tuple[str, str, str]]:
    """Caller, room and function of each call that a recipe's main, or the body of the recipes, makes itself."""
    main, calls = main_of(recipe), []
    callers = {main.__code__: "main", distil.__code__: "distil"}

    def note(frame, event, _):
        if event != "call" or frame.f_back is None or frame.f_back.f_code not in callers:
            return
        file = Path(frame.f_code.co_filename)
        if PACKAGE in file.parents:
            calls.append((callers[frame.f_back.f_code], file.relative_to(PACKAGE).parts[0], frame.f_code.co_name))

    def stop(*_, **__):
        raise _Trains

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RolloutTrainer, "train", stop)
        patch.setattr(sys, "argv", [f"{recipe}.py", *flags.split()])
        sys.setprofile(note)
        try:
            with pytest.raises(_Trains):
                main()
        finally:
            sys.setprofile(None)
    return calls


@pytest.mark.parametrize("recipe", ["ppo_kd", "kd"])
def test_a_recipe_passes_each_step_once_until_it_trains(recipe, checkpoints, train_csv, tmp_path):
    pair = checkpoints["t5-tied"]
    flags = f"--teacher {pair.teacher} --student {pair.student} --dataset {train_csv} {COLUMNS} {TWO_STEPS} {SAMPLING}"
    calls = walk(recipe, f"{flags} --output_dir {tmp_path}")
    assert [call for call in calls if call[0] == "main"] == [("main", "commands", "distil")]
    steps = [(room, function) for caller, room, function in calls if caller == "distil"]
    names = [function for _, function in steps]
    assert len(names) == len(set(names)), "a step is passed twice"
    assert names[1:3] == ["sketch", "check_data"] and names[-3:] == ["evaluate", "check_finite", "clear_results"]
    assert names.index("connect_processes") < names.index("settings") < names.index("build")
    elsewhere = [room for room, _ in groupby(room for room, _ in steps) if room != "commands"]
    assert elsewhere == ["trainers", "evaluation"], "each other room is entered once, and left"


@pytest.mark.parametrize("recipe", ["ppo_kd", "rloo_kd", "reinforce_kd", "kd", "all_actions_kd"])
def test_the_recipes_of_one_body_need_nothing_but_it(recipe):
    tree = ast.parse((ROOT / "recipes" / f"{recipe}.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {name for name in imported if name.startswith("rlkd_trl")}
    assert {"rlkd_trl.commands.distillation", "rlkd_trl.errors"} <= ours
    assert ours <= {"rlkd_trl.commands.distillation", "rlkd_trl.commands.settings", "rlkd_trl.errors"}
