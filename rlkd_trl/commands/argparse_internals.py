"""What the command line needs of argparse and of TRL's parser and neither offers: their internals are used here only.

TRL's parser adds all flags to one group of `--help`, and argparse cannot move them between groups.
"""

import argparse
from collections.abc import Mapping, Sequence

Group = argparse._ArgumentGroup


def flags_of(parser: argparse.ArgumentParser | Group) -> list[argparse.Action]:
    """The flags of a parser, or those that a group of its help lists."""
    return list(parser._group_actions if isinstance(parser, Group) else parser._actions)


def sort_into_groups(parser: argparse.ArgumentParser, group_of: Mapping[str, Group], order: Sequence[Group]) -> None:
    """Lists flags in other groups of `--help`: `group_of` by field, `order` behind that of all other flags."""
    listed = parser._optionals._group_actions
    for action in list(listed):
        if action.dest in group_of:
            listed.remove(action)
            group_of[action.dest]._group_actions.append(action)
    parser._action_groups = [parser._optionals, *order]


def is_switch(action: argparse.Action) -> bool:
    """A flag that is true or false: one without a value, or one that TRL's own function reads, known by name."""
    return action.nargs == 0 or getattr(action.type, "__name__", "") == "string_to_bool"


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One line for each flag where it fits, with its default."""

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
