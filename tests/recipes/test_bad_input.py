"""What a user gets wrong: one message that says so, exit code 2, and every file as it was."""

import os
import re
import time
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.recipes.bad_absent import ABSENT_CASES, ABSENT_COMMANDS, ABSENT_LOADED_CASES, make_absent_files
from tests.recipes.bad_encoders import ENCODER_CASES, ENCODER_LOADED_CASES, make_encoder_files
from tests.recipes.bad_files import make_files
from tests.recipes.bad_inputs import (
    ALL,
    COMMAND_CASES,
    COMMON_CASES,
    DATA,
    DISTILLED,
    GOOD,
    LOADED_CASES,
    PRESETS,
    REFUSED_AT_ONCE,
    UNLABELLED,
    in_turn,
)
from tests.recipes.command_lines import PROMPTED, RECIPES, SAMPLING, TWO_STEPS, flags_of, main_of, run

MOST_SECONDS = 15


def cases(table: tuple | list) -> list:
    """A test for each recipe whose turn it is; quick are those of every sixth line, with the first of its recipes."""
    return [
        pytest.param(
            recipe,
            flags,
            message,
            marks=() if number % 6 == 0 and recipe == given[0] else pytest.mark.slow(0.05),
            id=f"{recipe} {flags[:80]}",
        )
        for number, (recipes, flags, message) in enumerate(table)
        for given in (in_turn(recipes, number),)
        for recipe in given
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory, checkpoints, encoders) -> Path:
    """The directory in which the commands run."""
    here = tmp_path_factory.mktemp("bad input")
    make_files(here, checkpoints["t5-tied"].teacher, checkpoints["t5-tied"].student)
    make_encoder_files(here, encoders)
    make_absent_files(here)
    return here


@pytest.fixture
def place(files, monkeypatch) -> Path:
    """The current directory."""
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    monkeypatch.chdir(files)
    return files


class ModelMade(BaseException):
    """No recipe catches it."""


@pytest.fixture
def workplace(place, monkeypatch) -> Path:
    """The current directory, where making a model, by loading or from scratch, ends the test.

    Skeletons without memory may be made.
    """
    make = PreTrainedModel.__init__

    def refuse(*args, **kwargs):
        raise ModelMade

    def refuse_memory(model, *args, **kwargs):
        if torch.get_default_device().type != "meta":
            raise ModelMade
        make(model, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "__init__", refuse_memory)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)  # which makes its models without memory, too
    return place


@pytest.mark.parametrize("recipe", GOOD)
def test_the_commands_are_good_without_what_is_wrong(recipe, workplace):
    """They come as far as the first model, so that a case below fails for its own reason."""
    with pytest.raises(ModelMade):
        run(f"{recipe.split()[0]} {GOOD[recipe]}")


def state_of(directory: Path) -> dict[str, tuple[int, ...]]:
    """Of every file and directory, what any writing changes."""
    found, unread = {}, [str(directory)]
    while unread:
        with os.scandir(unread.pop()) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                times = (status.st_mtime_ns, status.st_ctime_ns)
                found[entry.path] = (status.st_mode, status.st_size, status.st_ino, *times)
                if entry.is_dir(follow_symlinks=False):
                    unread.append(entry.path)
    return found


def unknown_flags(command: str, message: str) -> set[str]:
    """The flags in a message that the user can neither have given nor give to this command."""
    recipe = next((word for word in command.split() if word in GOOD), None)
    if recipe is None:  # of the launcher
        return set()
    known = flags_of(recipe) | {"--num_processes", "--config_file", "--cpu"}  # of launchers
    known |= {"--flag", "--upgrade"}  # "every setting is a --flag", pip's
    if method := re.match("error: Method ([a-z_]+): ", message):  # of compare.py: how a recipe would say it
        preset = next(iter([*PRESETS.glob(f"*/{method[1]}.yaml"), *Path().glob(f"*/{method[1]}.yaml")]))
        known |= flags_of(next((r for r in DISTILLED if f"{r}/plain" in command), preset.parent.name))
    named = {flag.replace("-", "_").replace("__", "--", 1) for flag in re.findall(r"(?<![-\w])--[\w-]+", message)}
    return {flag for flag in named - known if flag not in command and f"{flag[2:]}=" not in command}


_STATES: dict[Path, dict] = {}  # of the place as the last test left it, which is as it found it


def check_refusal(command: str, message: str, place: Path, capfd, *, begins: str = "error: ") -> None:
    before = _STATES.pop(place, None) or state_of(place)
    start, cpu = time.monotonic(), time.process_time()
    code = run(command)
    seconds, cpu = time.monotonic() - start, time.process_time() - cpu
    err = capfd.readouterr().err
    assert code == 2, err
    # Bars of progress are no messages.
    lines = [line for line in re.split(r"[\r\n]", err) if line.strip() and not re.search(r"\d+%\|", line)]
    assert len(lines) == 1, err
    assert lines[0].startswith(begins)
    assert message in lines[0]
    assert not unknown_flags(command, lines[0]), "a flag that this command does not have"
    after = state_of(place)
    assert after == before, "nothing is written"
    _STATES[place] = after
    assert cpu < MOST_SECONDS and seconds < 10 * MOST_SECONDS, "the machine may be busy with other things"


@pytest.mark.parametrize("recipe, flags, message", cases([*REFUSED_AT_ONCE, *ENCODER_CASES, *ABSENT_CASES]))
def test_refused_before_a_model_is_loaded(recipe, flags, message, workplace, capfd):
    check_refusal(f"{recipe.split()[0]} {GOOD[recipe]} {flags}", message, workplace, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("recipe, flags, message", cases(COMMON_CASES))
def test_compare_refuses_before_the_first_run_what_a_run_would(recipe, flags, message, workplace, capfd):
    check_refusal(f"{recipe} {GOOD[recipe]} {flags}", message, workplace, capfd)


@pytest.mark.parametrize("recipe, flags, message", cases([*LOADED_CASES, *ENCODER_LOADED_CASES, *ABSENT_LOADED_CASES]))
def test_refused_once_a_model_is_loaded(recipe, flags, message, place, capfd):
    check_refusal(f"{recipe.split()[0]} {GOOD[recipe]} {flags}", message, place, capfd)


@pytest.mark.parametrize("recipe, function", [("rloo_kd", "nan"), ("ppo_kd", "infinite"), ("reinforce_kd", "huge")])
def test_a_reward_that_is_never_a_number(recipe, function, place, capfd):
    """It is the run that goes wrong, which exit code 1 says; but nothing is trained or written."""
    before = state_of(place)
    assert run(f"{recipe} {GOOD[recipe]} --reward bad_rewards.py:{function}") == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("error: The evaluation cannot be relied on: numbers that are not finite in 3 samples")
    assert not any("Traceback" in line for line in lines)
    assert state_of(place) == before


@pytest.mark.parametrize("command, message", [*COMMAND_CASES, *ABSENT_COMMANDS])
def test_a_whole_command(command, message, workplace, capfd):
    check_refusal(command, message, workplace, capfd)


def test_an_earlier_runs_results_outlive_a_reward_that_fails(place, capfd):
    """Even where they may be overwritten: not before the reward has been asked for the first time."""
    check_refusal(
        f"rloo_kd {GOOD['rloo_kd']} --output_dir finished --overwrite_output_dir --reward bad_rewards.py:none",
        "returned None",
        place,
        capfd,
    )


def test_there_are_as_many_inputs_as_were_asked_for():
    rows = [flags for _, flags, _ in (*REFUSED_AT_ONCE, *LOADED_CASES)] + [command for command, _ in COMMAND_CASES]
    assert len(set(rows)) >= 150


@pytest.mark.parametrize(
    "command, message",
    [
        (f"sft --dataset data.csv --source_column mr {TWO_STEPS} --output_dir out", "--target_column is needed"),
        (f"pseudo_label {DATA} --output out", "--teacher is needed"),
        ("pseudo_label --teacher teacher --output out", "--dataset is needed"),
        (f"pseudo_label --teacher teacher {DATA}", "--output is needed"),
        (
            "pseudo_label --teacher teacher --dataset data.csv --source_column mr --output out "
            "--strategy beam --interpolate",
            "--interpolate takes the teacher's beam that is nearest to the references: it needs --strategy beam and",
        ),
        ("cache_teacher --teacher teacher --dataset data.csv --source_column mr --output out", "--target_column is"),
        (f"evaluate {DATA}", "--student is needed"),
        ("evaluate --student student", "--dataset is needed"),
        (f"ppo_kd {DATA} {TWO_STEPS} {SAMPLING}", "--teacher and --student missing"),
        (f"ppo_kd {DATA} --student student {TWO_STEPS} {SAMPLING}", "--teacher missing"),
        (f"rloo_kd {DATA} --teacher teacher {TWO_STEPS} {SAMPLING}", "--student missing"),
        (f"rloo_kd --teacher teacher --student student {TWO_STEPS} {SAMPLING}", "--dataset missing"),
        (f"all_actions_kd {DATA} --student student {TWO_STEPS} {SAMPLING}", "--teacher missing"),
        (f"kd {UNLABELLED}", "Distillation on data needs targets, but row 1 has none: name their column"),
        (f"kd {UNLABELLED} --config {PRESETS}/kd/gkd.yaml", "but row 1 has none: name their column"),
    ],
)
def test_something_is_missing(command, message, workplace, capfd):
    check_refusal(command, message, workplace, capfd)


@pytest.mark.parametrize("recipe", DISTILLED)
def test_launched_with_fsdp(recipe, workplace, monkeypatch, capfd):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_refusal(f"{recipe} {GOOD[recipe]}", "The student cannot be sharded by FSDP", workplace, capfd)


@pytest.mark.parametrize("recipe", [recipe for recipe in GOOD if recipe != "plan"])
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"WORLD_SIZE": "4"},
            "WORLD_SIZE=4 is in the environment, but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT",
        ),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE=many in the environment is no number of processes: unset it"),
        (  # what `accelerate launch --cpu --num_processes 2` leaves to its one process
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            "was asked for several processes and has started one",
        ),
    ],
)
def test_what_a_launcher_has_left(environment, message, recipe, workplace, monkeypatch, capfd):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    flags_of(recipe.split()[0])  # which commands tell in a good environment only, and once
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_refusal(f"{recipe.split()[0]} {GOOD[recipe]}", message, workplace, capfd)


@pytest.mark.parametrize(
    "command",
    [
        *(f"{recipe.split()[0]} {GOOD[recipe]} --dataset nowhere.csv --debug" for recipe in GOOD if recipe != "plan"),
        f"kd --debug {GOOD['kd']} --dataset nowhere.csv",
        f"plan {GOOD['plan']} --gpus 0 --debug",
        f"rlkd-trl kd {GOOD['kd']} --dataset nowhere.csv --debug",
    ],
)
def test_a_traceback_on_request(command, workplace, capfd):
    """Before the message, which stays the last line."""
    assert run(command) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert any("in main" in line for line in lines)
    assert lines[-1].startswith("error: ")
    assert run(command.replace(" --debug", "")) == 2
    assert capfd.readouterr().err.splitlines() == lines[-1:]


def test_the_trainers_own_debugging_goes_by_the_same_flag(workplace):
    with pytest.raises(ModelMade):
        run(f"sft {GOOD['sft']} --debug underflow_overflow")


def test_nothing_was_run_that_a_file_holds(files):
    """The last test of the table's: pickles, a checkpoint's code and YAML tags would each have made this file."""
    assert not (files / "unpickled").exists()


@pytest.mark.parametrize("settings", ["--lmbda 1", "--sequences teacher"])
def test_without_data_sequences_no_targets_are_needed(settings, workplace):
    with pytest.raises(ModelMade):
        run(f"kd {UNLABELLED} {settings}")


def test_every_recipe_is_in_the_table():
    assert {name.split()[0] for name in ALL} == set(PROMPTED)
    assert {name.split()[0] for name in GOOD} == {*RECIPES, "compare", "plan"}
    assert all(callable(main_of(recipe)) for recipe in RECIPES)
