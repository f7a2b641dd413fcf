"""The only place that uses internals of argparse and of TRL's parser, where they offer no public way.

TRL's parser adds all flags to one group of `--help`, and argparse has no way to move them to other groups.
"""

import argparse
from collections.abc import Mapping, Sequence

Group = argparse._ArgumentGroup


def flags_of(parser: argparse.ArgumentParser | Group) -> list[argparse.Action]:
    """The flags of a parser, or those that a group of its help lists."""
    return list(parser._group_actions if isinstance(parser, Group) else parser._actions)


def sort_into_groups(parser: argparse.ArgumentParser, group_of: Mapping[str, Group], order: Sequence[Group]) -> None:
    """Moves flags to other groups of `--help`. group_of: each field's group. order: all groups after the default."""
    listed = parser._optionals._group_actions
    for action in list(listed):
        if action.dest in group_of:
            listed.remove(action)
            group_of[action.dest]._group_actions.append(action)
    parser._action_groups = [parser._optionals, *order]


def is_switch(action: argparse.Action) -> bool:
    """Whether a flag is true or false: it has no value, or one that TRL's function for such values reads."""
    return action.nargs == 0 or getattr(action.type, "__name__", "") == "string_to_bool"


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help with one line per flag where it fits, and its default."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=119)

    def _get_help_string(self, action):
        text = " ".join((action.help or "").split())
        default = action.default
        if default in (None, argparse.SUPPRESS) or action.nargs == 0:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        return f"{text} [{shown}]".replace("%", "%%")

    def _format_action_invocation(self, action):
        # Both --learning_rate and --learning-rate work; one spelling is enough to read.
        names = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        value = "" if action.nargs == 0 else f" {self._format_args(action, 'X')}"
        return ", ".join(names) + value

    def _format_args(self, action, default_metavar):
        return {"+": "X …", "*": "X …", "?": "[X]"}.get(action.nargs, action.metavar or "X")
