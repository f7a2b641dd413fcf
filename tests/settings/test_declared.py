"""What is read of a dataclass's source is what the class itself has: by the class, on every field and flag."""

import dataclasses
import importlib
import itertools
import subprocess
import sys

import pytest
import transformers

from rlkd_trl.commands.argparse_internals import flags_of
from rlkd_trl.commands.parser import RecipeParser
from rlkd_trl.errors import InputError
from rlkd_trl.settings.declared import UNKNOWN, declared

PATHS = [
    "rlkd_trl.trainers.config.PPOKDConfig",
    "rlkd_trl.trainers.config.RLOOKDConfig",
    "rlkd_trl.trainers.config.ReinforceKDConfig",
    "rlkd_trl.trainers.full_vocabulary_config.KDConfig",
    "rlkd_trl.trainers.full_vocabulary_config.AllActionsKDConfig",
    "rlkd_trl.trainers.supervised_config.SupervisedConfig",
]
# Defaults that transformers computes, in the versions that this package allows.
NUMBERS = itertools.count()
COMPUTED = {"optim"}
COMPUTED_TYPES = {"parallelism_config"}
COMPUTED_CHOICES = {"log_level", "log_level_replica"}


def real(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def flags(kind: type) -> dict[str, tuple]:
    """What argparse knows of each flag."""
    return {
        " ".join(action.option_strings): (
            action.dest,
            action.nargs,
            getattr(action.type, "__name__", None),
            action.choices and [str(choice) for choice in action.choices],
            action.help,
        )
        for action in flags_of(RecipeParser(kind, description=""))
    }


@pytest.mark.parametrize("path", [*PATHS, "rlkd_trl.trainers.encoder_config.EncoderKDConfig"])
def test_it_knows_the_output_directory_that_is_used_where_none_is_named(path):
    assert declared(path)().output_dir == real(path).__dataclass_fields__["output_dir"].default == "trainer_output"


@pytest.mark.parametrize("path", PATHS)
def test_it_has_the_fields_of_the_class_itself(path):
    """If this fails on a new version of transformers, `--help` is only slower: see `declared`."""
    sketch, kind = declared(path), real(path)
    assert sketch is not None, f"not read, with transformers {transformers.__version__}"
    own = {field.name: field for field in dataclasses.fields(kind) if field.init}
    assert [field.name for field in dataclasses.fields(sketch)] == list(own)
    for field in dataclasses.fields(sketch):
        if field.name not in COMPUTED:
            default = own[field.name].default
            assert field.default == getattr(default, "value", default), field.name
        metadata = dict(own[field.name].metadata)
        if field.name in COMPUTED_CHOICES:
            del metadata["choices"]
        assert dict(field.metadata) == metadata, field.name
    found, expected = flags(sketch), flags(kind)
    for name in COMPUTED_CHOICES:
        flag = f"--{name} --{name.replace('_', '-')}"
        assert found.pop(flag)[4] == expected.pop(flag)[4], "the help"
    for name in COMPUTED_TYPES:
        flag = f"--{name} --{name.replace('_', '-')}"
        assert found.pop(flag)[2] == "str" and expected.pop(flag)
    assert found == expected
    assert sketch.__doc__.split() == kind.__doc__.split()
    assert [base.__name__ for base in sketch.__mro__] == [base.__name__ for base in kind.__mro__]


def test_it_imports_nothing_heavy():
    code = (
        "import sys; from rlkd_trl.settings.declared import declared;"
        f"assert all(declared(path) for path in {PATHS});"
        "print(sorted({'torch', 'transformers', 'accelerate', 'peft', 'numpy'} & set(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"


def test_ranges_are_checked():
    kind = declared(PATHS[0])
    kind()
    for name, value in {"gamma": 1.5, "learning_rate": float("nan"), "max_steps": -2, "epsilon": -0.1}.items():
        with pytest.raises(InputError, match=f"{name} = {value} is out of range"):
            kind(**{name: value})


SOURCE = '''
import os
from dataclasses import dataclass, field
from enum import Enum
from .elsewhere import Base as Other, NAMES

class Colour(Enum):
    RED = "red"
    BLUE = "blue"

@dataclass
class Kind(Other):
    """Of a test."""

    computed = "a"
    if os.name == "posix":
        computed = "b"
    colour: Colour | str = field(default="red", metadata={"help": f"One of {', '.join(NAMES)}."})
    size: int = 3
    guessed: str = field(default=computed)
    several: list[int] = field(default_factory=lambda: [1, 2])
    strange: os.PathLike | None = None
'''
ELSEWHERE = """
from dataclasses import dataclass
NAMES = {"x": print, "y": missing_function}

@dataclass
class Base:
    first: float = 0.5
    size: int = 2
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    directory = tmp_path / f"package_of_{next(NUMBERS)}"  # what is read of a package is kept
    directory.mkdir()
    (directory / "__init__.py").write_text("raise RuntimeError('imported')")
    (directory / "kinds.py").write_text(SOURCE)
    (directory / "elsewhere.py").write_text(ELSEWHERE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return directory


def test_what_a_source_may_hold(package):
    kind = declared(f"{package.name}.kinds.Kind")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    assert list(fields) == ["first", "size", "colour", "guessed", "several", "strange"]
    assert (fields["first"].default, fields["size"].default) == (0.5, 3)
    assert fields["colour"].metadata["help"] == "One of x, y."
    assert fields["guessed"].default is UNKNOWN
    assert fields["several"].default_factory() == [1, 2]
    actions = {action.dest: action for action in flags_of(RecipeParser(kind, description=""))}
    assert actions["colour"].choices == ["red", "blue"]
    assert actions["several"].nargs == "+"


@pytest.mark.parametrize(
    "source", ["Kind = make()", "class Kind(make()): pass", "def Kind(): pass", "class Kind(", "", "Kind: int"]
)
def test_what_cannot_be_read_is_not_sketched(source, package):
    (package / "kinds.py").write_text(source)
    assert declared(f"{package.name}.kinds.Kind") is None
    assert declared("no_such_package.Kind") is None
    assert declared(f"{package.name}.no_such_module.Kind") is None
