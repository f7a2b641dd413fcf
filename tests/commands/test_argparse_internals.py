"""The internals of argparse and of TRL's parser that are used: if one fails, see which version changed them."""

import argparse
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import trl

from rlkd_trl.commands.argparse_internals import HelpFormatter, flags_of, is_switch, sort_into_groups

ROOT = Path(__file__).parents[2]
VERSIONS = f"with Python {platform.python_version()} and TRL {trl.__version__}"


@dataclass
class Flags:
    """Some of each kind."""

    steps: int = 3
    quiet: bool = False
    loud: bool = True
    names: list[str] | None = None
    title: str = "no"


@pytest.fixture
def parser() -> trl.TrlParser:
    return trl.TrlParser([Flags], prog="program", formatter_class=HelpFormatter)


def test_the_flags_of_a_parser(parser):
    own = [flag.dest for flag in flags_of(parser) if flag.dest in Flags.__dataclass_fields__]
    assert list(dict.fromkeys(own)) == ["steps", "quiet", "loud", "names", "title"], VERSIONS


def test_which_flags_are_switches(parser):
    found = {flag.dest: is_switch(flag) for flag in flags_of(parser) if flag.dest in Flags.__dataclass_fields__}
    assert found == {"steps": False, "quiet": True, "loud": True, "names": False, "title": False}, VERSIONS


def test_flags_move_between_the_groups_of_the_help(parser):
    first, second = parser.add_argument_group("First"), parser.add_argument_group("Second")
    sort_into_groups(parser, {"quiet": second, "steps": first}, [second, first])
    assert [flag.dest for flag in flags_of(first)] == ["steps"], VERSIONS
    sections = parser.format_help().split("\n\n")
    assert [section.split(":")[0] for section in sections[1:]] == ["options", "Second", "First"], VERSIONS
    assert "--names" in sections[1] and "--steps" not in sections[1]
    assert "--quiet" in sections[2] and "--steps" in sections[3], VERSIONS
    assert parser.parse_args(["--steps", "4"]).steps == 4, "they are read as before"


def test_a_line_of_the_help(parser):
    lines = [" ".join(line.split()) for line in parser.format_help().splitlines()]
    assert "--names X …" in lines, VERSIONS
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("--rate", "--learning-rate", default=0.5, help="How  fast.")
    assert "--rate X How fast. [0.5]" in [" ".join(line.split()) for line in parser.format_help().splitlines()], (
        VERSIONS
    )


def test_no_other_module_uses_them():
    files = [path for folder in ("rlkd_trl", "recipes") for path in (ROOT / folder).rglob("*.py")]
    internals = r"\._(actions|optionals|group_actions|action_groups|format_args|get_help_string)\b"
    assert [path.name for path in files if re.search(internals, path.read_text())] == ["argparse_internals.py"]
