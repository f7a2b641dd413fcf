"""From a recipe's first line to training: the rooms of the package that its reader enters, in order."""

import ast
import sys
from itertools import groupby
from pathlib import Path
from types import CodeType, FrameType

import pytest

import rlkd_trl
from rlkd_trl.commands.distillation import distil
from rlkd_trl.trainers.rollout_trainer import RolloutTrainer
from tests.recipes.command_lines import COLUMNS, ROOT, SAMPLING, TWO_STEPS, main_of

PACKAGE = Path(rlkd_trl.__file__).parent
RECIPES = ["ppo_kd", "rloo_kd", "reinforce_kd", "kd", "all_actions_kd"]
# Types of flags (ranges, files) and errors are words of every room, not rooms that one enters.
WORDS = ("settings", "errors.py")

# The rooms that each step of `distil` enters, for a run with a teacher, a student and a file of data.
CHECKS = {
    "check_data": ["data", "prompts"],
    "connect_processes": ["trainers"],
    "__enter__": ["trainers"],  # of `held_alone`
    "settings": ["trainers"],
    "check": ["rewards", "trainers", "teachers", "models"],
    "within_lengths": ["models"],
    "command_record": ["data"],
}
REST = {
    "build": ["teachers", "rewards", "models", "trainers"],
    "evaluate_teacher_of": ["rewards", "evaluation"],
    "evaluate": ["trainers"],
    "check_finite": ["evaluation"],
    "clear_results": ["trainers"],
}
WITHOUT_REWARDS = {"check": ["trainers", "teachers", "models"], "build": ["teachers", "models", "trainers"]}


class _Trains(BaseException):
    """Ends a recipe where training would begin."""


def room_of(code: CodeType) -> str | None:
    """commands, data, ...: the room of the package that holds a function; None for other code."""
    return code.co_filename.removeprefix(f"{PACKAGE}/").split("/")[0] if str(PACKAGE) in code.co_filename else None


def calls_within(end: CodeType, frame: FrameType | None) -> list[CodeType]:
    """A call, its caller, and so on up to what the function `end` calls; [] outside of that function."""
    calls: list[CodeType] = []
    while frame is not None and frame.f_code is not end:
        calls.append(frame.f_code)
        frame = frame.f_back
    return [] if frame is None else calls


def walk(recipe: str, flags: str) -> tuple[list[str], list[tuple[str, str]]]:
    """What a recipe's main calls in the package, and each step of `distil` with a room that it enters from commands.

    Entered is a room that a function of `commands` calls, itself or through another library.
    """
    main, called_by_main, entered = main_of(recipe), [], []

    def note(frame: FrameType, event: str, _) -> None:
        room = room_of(frame.f_code) if event == "call" else None
        if room is None:
            return
        if frame.f_back is not None and frame.f_back.f_code is main.__code__:
            called_by_main.append(frame.f_code.co_name)
            return
        calls = calls_within(distil.__code__, frame)
        if not calls or any(code.co_name == "<module>" for code in calls):  # an import is no step
            return
        caller = next(filter(None, map(room_of, calls[1:])), "commands")
        if caller == "commands" and room not in ("commands", *WORDS):
            entered.append((calls[-1].co_name, room))

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
    return called_by_main, entered


@pytest.mark.slow(0.4)
@pytest.mark.parametrize("recipe", RECIPES)
def test_each_step_until_training_enters_a_room_once(recipe, checkpoints, train_csv, tmp_path):
    pair = checkpoints["t5-tied"]
    flags = f"--teacher {pair.teacher} --student {pair.student} --dataset {train_csv} {COLUMNS} {TWO_STEPS} {SAMPLING}"
    called_by_main, entered = walk(recipe, f"{flags} --output_dir {tmp_path}")
    assert called_by_main == ["distil"]
    stretches = [step_and_room for step_and_room, _ in groupby(entered)]
    steps = {step: [room for _, room in of_step] for step, of_step in groupby(stretches, key=lambda pair: pair[0])}
    expected = CHECKS | REST
    if recipe in ("kd", "all_actions_kd"):
        expected |= WITHOUT_REWARDS
    assert list(steps.items()) == list(expected.items())
    assert all(len(rooms) == len(set(rooms)) for rooms in steps.values()), "a room is left and entered again"
    assert len(steps) == len({step for step, _ in stretches}), "a step is taken twice"


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipes_of_one_body_need_nothing_but_it(recipe):
    tree = ast.parse((ROOT / "recipes" / f"{recipe}.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {name for name in imported if name.startswith("rlkd_trl")}
    assert {"rlkd_trl.commands.distillation", "rlkd_trl.errors"} <= ours
    assert ours <= {"rlkd_trl.commands.distillation", "rlkd_trl.commands.settings", "rlkd_trl.errors"}
