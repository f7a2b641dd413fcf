"""Every number that can be set has a finite range: each field of each class of settings, with each bad value."""

import dataclasses
import inspect
import math
import types
import typing
from dataclasses import dataclass
from typing import Annotated

import pytest

from rlkd_trl.commands import arguments
from rlkd_trl.commands.comparison.arguments import ComparisonArguments, MeasurementArguments
from rlkd_trl.errors import InputError
from rlkd_trl.planning.command import main as plan
from rlkd_trl.rewards import TeacherForcingReward
from rlkd_trl.settings.ranges import Count, Range, check_ranges
from rlkd_trl.trainers.config import PPOKDConfig, ReinforceKDConfig, RLOOKDConfig
from rlkd_trl.trainers.full_vocabulary_config import AllActionsKDConfig, KDConfig
from rlkd_trl.trainers.supervised_config import SupervisedConfig

CONFIGS = [PPOKDConfig, RLOOKDConfig, ReinforceKDConfig, KDConfig, AllActionsKDConfig, SupervisedConfig]
ARGUMENTS = [
    *(kind for _, kind in inspect.getmembers(arguments, dataclasses.is_dataclass)),
    ComparisonArguments,
    MeasurementArguments,
]
# NaN, infinities, and numbers that no setting can mean.
BAD_FLOATS = [math.nan, math.inf, -math.inf, 1e30, -1e30]
BAD_INTEGERS = [*BAD_FLOATS, 10**30, -(10**30), 1.5]
PLAN = "--teacher T --student S"


def numbers_of(settings: type) -> dict[str, type]:
    """The fields that hold a number, or a list of them, with its type: found without the code under test."""
    found = {}
    for name, hint in typing.get_type_hints(settings).items():
        parts = {hint, *typing.get_args(hint)}
        parts |= {inner for part in typing.get_args(hint) for inner in typing.get_args(part)}
        for kind in (int, float):
            if kind in parts and name in {field.name for field in dataclasses.fields(settings)}:
                found[name] = kind
    return found


def is_list(settings: type, name: str) -> bool:
    hint = typing.get_type_hints(settings)[name]
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return any(typing.get_origin(option) is list for option in options)


def test_a_range():
    assert [value in Range(0, 1) for value in (-0.1, 0, 0.5, 1, 1.1)] == [False, True, True, True, False]
    assert [value in Range(0, 1, above=True) for value in (0, 1e-300, 1)] == [False, True, True]
    assert [value in Range(0, 1, below=True) for value in (0, 1)] == [True, False]
    assert [value in Range(1, 9, also=-1) for value in (-1, 0, 1)] == [True, False, True]
    assert not any(value in Range(-1e300, 1e300) for value in (math.nan, math.inf, -math.inf, True, "1", None))


def test_a_range_in_words():
    assert str(Range(0, 1)) == "0 or more, up to 1"
    assert str(Range(0, 2.5, above=True)) == "above 0, up to 2.5"
    assert str(Range(0, 1, below=True)) == "0 or more, below 1"
    assert str(Range(1, 2**31 - 1, also=-1)) == "1 or more, up to 2147483647; or -1"


@dataclass
class Settings:
    rows: Count = 4
    shares: list[Annotated[float, Range(0, 1)]] | None = None


def test_the_message_names_field_value_and_range():
    with pytest.raises(InputError, match=r"^--rows 0 is out of range: 1 or more, up to 2147483647\.$"):
        check_ranges(Settings(rows=0))
    with pytest.raises(InputError, match=r"^rows = 2\.5 is out of range: a whole number, 1 or more"):
        check_ranges(Settings(rows=2.5), prefix="")
    with pytest.raises(InputError, match=r"^--shares 0\.5 nan is out of range: 0 or more, up to 1\.$"):
        check_ranges(Settings(shares=[0.5, math.nan]))
    with pytest.raises(InputError, match="rows None is out of range"):
        check_ranges(Settings(rows=None))
    check_ranges(Settings(shares=[0, 1]))


@pytest.mark.parametrize("config", CONFIGS)
def test_every_number_of_every_config(config, tmp_path):
    fields = numbers_of(config)
    assert {"learning_rate", "seed", "max_grad_norm", "max_completion_length"} <= set(fields)
    for name, kind in fields.items():
        for bad in BAD_INTEGERS if kind is int else BAD_FLOATS:
            given = [1.0, bad] if is_list(config, name) else bad
            with pytest.raises(InputError, match="is out of range") as refused:
                config(output_dir=str(tmp_path), **{name: given})
            assert str(refused.value).startswith(f"{name} = ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", ARGUMENTS)
def test_every_number_of_every_group_of_flags(settings):
    for name, kind in numbers_of(settings).items():
        for bad in BAD_INTEGERS if kind is int else BAD_FLOATS:
            with pytest.raises(InputError, match=f"--{name} .*is out of range"):
                settings(**{name: [bad] if is_list(settings, name) else bad})


# What the base class takes, or ends on in a traceback.
INHERITED = [
    *[("learning_rate", value) for value in (-1, 11.0)],
    *[("seed", value) for value in (-1, 2**32)],
    *[(name, 0) for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "adam_epsilon")],
    *[(name, 0) for name in ("gradient_accumulation_steps", "logging_steps", "save_steps", "max_steps")],
    *[(name, -1) for name in ("num_train_epochs", "weight_decay", "max_grad_norm", "warmup_steps", "data_seed")],
    *[(name, 1.0) for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor")],
    *[(name, -0.1) for name in ("adam_beta1", "adam_beta2", "eval_delay", "neftune_noise_alpha")],
    ("dataloader_num_workers", -1),
    ("save_total_limit", 0),
]


@pytest.mark.parametrize("name, value", INHERITED)
def test_inherited_numbers(name, value, tmp_path):
    with pytest.raises(InputError, match=f"{name} = {value} is out of range"):
        SupervisedConfig(output_dir=str(tmp_path), **{name: value})


@pytest.mark.parametrize("config", CONFIGS)
def test_usual_values_pass(config, tmp_path):
    usual = {"learning_rate": 0.0, "weight_decay": 0.1, "adam_epsilon": 1e-8, "max_grad_norm": 0, "max_steps": -1}
    args = config(
        output_dir=str(tmp_path), seed=2**32 - 1, warmup_steps=0.1, save_steps=0.5, num_train_epochs=0.1, **usual
    )
    assert args.learning_rate == 0 and args.seed == 4294967295


@pytest.mark.parametrize("name, values", {"tau": BAD_FLOATS, "gamma": BAD_FLOATS, "k": BAD_INTEGERS}.items())
def test_a_reward_of_its_own(name, values):
    for bad in values:
        with pytest.raises(InputError, match=f"{name} = .* is out of range"):
            TeacherForcingReward(None, value="soft", **{name: bad})


@pytest.mark.parametrize("flag", ["gpus", "nodes", "num_generations", "max_prompt_length", "teacher_batch_tokens"])
@pytest.mark.parametrize("bad", [0, -1, 10**30])
def test_counts_of_the_planner(flag, bad):
    with pytest.raises(InputError, match=f"--{flag} {bad} is out of range: 1 or more"):
        plan([*PLAN.split(), f"--{flag}={bad}"])


@pytest.mark.parametrize("flag", ["gpu_memory", "reserve", "beta"])
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "1e30"])
def test_numbers_of_the_planner(flag, bad):
    with pytest.raises(InputError, match=f"--{flag} .* is out of range"):
        plan([*PLAN.split(), f"--{flag}={bad}"])
