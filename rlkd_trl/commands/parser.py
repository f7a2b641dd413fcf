"""The parser of the recipes' command lines: grouped flags, YAML presets, short errors."""

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from trl import TrlParser

from rlkd_trl.commands.argparse_internals import HelpFormatter, flags_of, is_switch, sort_into_groups
from rlkd_trl.commands.presets import Preset, find_preset, read_preset, shipped_presets
from rlkd_trl.commands.shipped import recipe_scripts
from rlkd_trl.errors import InputError
from rlkd_trl.settings.files import Reads, files_read

_INPUTS = (Reads.DATA, Reads.CHECKPOINT)
_DEBUG = "Show the traceback of an error."
# The fields of TrainingArguments that `--help` lists; `--help_all` lists them all.
_COMMON_TRAINING_FIELDS = [
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "seed",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "fp16",
    "ddp_timeout",
    "logging_steps",
    "save_steps",
    "save_strategy",
    "eval_strategy",
    "eval_steps",
    "report_to",
    "push_to_hub",
]


class RecipeParser(TrlParser):
    """`TrlParser` with grouped help, YAML checked like flags, `--config=X`, and errors of one line.

    The command line beats the YAML file, which beats the defaults. Unknown keys in either are errors.
    """

    def __init__(self, *dataclass_types, description: str, recipe: str | None = None):
        """
        Args:
            dataclass_types: The dataclasses whose fields are the flags.
            description: For `--help`.
            recipe: The recipe's name; a preset's section of that name is read too.
        """
        super().__init__(
            dataclass_types,
            description=description,
            formatter_class=HelpFormatter,
            usage="%(prog)s [flags]",
            allow_abbrev=False,
        )
        self.add_argument(
            "--config",
            metavar="PRESET",
            help="YAML file with any of the flags below, or one that ships.",
        )
        self.add_argument("--help_all", action="store_true", help="Also list every field of TrainingArguments.")
        self._add_debug()
        self._group_by_dataclass(dataclass_types)
        self._recipe = recipe
        self.preset: Path | None = None  # of the command line that was parsed

    def parse(self, argv: list[str] | None = None, *, demo_preset: Path | None = None) -> tuple:
        """Reads a command line; returns one instance of each dataclass.

        `demo_preset` is a YAML file of defaults, used if neither the command line nor a preset names data or models.

        Raises:
            InputError: Unknown flag or YAML key, a value of the wrong type or out of range, an unreadable preset.
        """
        argv = [word for arg in (sys.argv[1:] if argv is None else argv) for word in _split_config(arg)]
        if "--help_all" in argv:
            self._show_everything()
            self.print_help()
            sys.exit(0)
        preset = Preset({}, {})
        if "--config" in argv:
            position = argv.index("--config")
            if position + 1 == len(argv):
                raise InputError("--config needs the path of a YAML file, or the name of a preset that ships.")
            self.preset = find_preset(argv[position + 1])
            preset = read_preset(self.preset)
            del argv[position : position + 2]
            if "--config" in argv:
                raise InputError("--config is given twice; put both presets into one file.")
        named = {arg.split("=")[0] for arg in argv} | {f"--{key}" for key in preset.values_for(self._recipe)}
        if demo_preset is not None and not {*self._names_of_inputs(), "-h", "--help"} & named:
            self._read_defaults(demo_preset, read_preset(demo_preset))
        self._read_defaults(self.preset, preset)
        self._drop_replaced(arg.split("=")[0] for arg in argv)
        # HfArgumentParser would not accept flags that are no field of a dataclass, such as --debug.
        parsed, unknown = self.parse_known_args(argv)
        if unknown and not unknown[0].startswith("-"):
            raise InputError(f"unexpected argument {unknown[0]!r}; every setting is a --flag, see --help.")
        if unknown:
            raise InputError(self._unknown("flag", unknown[0].split("=")[0].lstrip("-"), prefix="--"))
        values = vars(parsed)
        _refuse_recorded_token(values.get("hub_token"), values.get("report_to"))
        try:
            return tuple(
                kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.init and f.name in values})
                for kind in self.dataclass_types
            )
        except (ValueError, ImportError) as error:  # from the checks of transformers' TrainingArguments
            raise InputError(str(error)) from error

    def _names_of_inputs(self) -> list[str]:
        """The flags that name data or models."""
        named = [name for kind in self.dataclass_types for name, reads in files_read(kind).items() if reads in _INPUTS]
        return [f"--{name}" for name in named]

    def error(self, message: str):
        raise InputError(message)

    def _add_debug(self) -> None:
        """Adds `--debug`, which `errors.run` obeys; that of TrainingArguments, if it is there, may have no values."""
        of_trainer = next((action for action in flags_of(self) if action.dest == "debug"), None)
        if of_trainer is None:
            self.add_argument("--debug", action="store_true", help=_DEBUG)
            return
        of_trainer.nargs, of_trainer.help = "*", f"{_DEBUG} With values: {of_trainer.help}"

    def _read_defaults(self, path: Path | None, preset: Preset) -> None:
        """Takes a preset's values as defaults: first those for every recipe, then those of this recipe's section."""
        if path in shipped_presets() and path.parent.name in recipe_scripts() and path.parent.name != self._recipe:
            raise InputError(f"{path.stem} is a preset of {path.parent.name}, not of {self._recipe}.")
        self._set_defaults(str(path), preset.shared)
        self._set_defaults(f"{path}, under {self._recipe}", preset.sections.get(self._recipe, {}))

    def _set_defaults(self, where: str, values: Mapping[str, object]) -> None:
        """Takes values as defaults, each read by argparse as if it had been given on the command line."""
        self._drop_replaced(f"--{key}" for key in values)
        actions = {
            f"--{action.dest}": action for action in flags_of(self) if f"--{action.dest}" in action.option_strings
        }
        for key, value in values.items():
            action = actions.get(f"--{key}")
            if key in ("config", "help", "help_all", "debug"):
                raise InputError(f"{where}: {key} is for the command line only; leave the key out.")
            if action is None:
                raise InputError(f"{where}: {self._unknown('key', key, others=recipe_scripts())}")
            if value is None and action.default is None:
                continue
            try:
                parsed, _ = self.parse_known_args(_as_flag(action, value))
            except InputError as error:
                raise InputError(f"{where}: {key} has the value {value!r}: {error}") from error
            self.set_defaults(**{key: getattr(parsed, key)})

    def _drop_replaced(self, flags: Iterable[str]) -> None:
        """Cancels the values of a preset that these flags replace (see `REPLACED` of the dataclasses)."""
        given_flags = set(flags)
        for kind in self.dataclass_types:
            for name, replaced in getattr(kind, "REPLACED", {}).items():
                if f"--{name}" in given_flags:
                    self.set_defaults(**dict.fromkeys(replaced))

    def _unknown(self, kind: str, name: str, prefix: str = "", others: Iterable[str] = ()) -> str:
        names = [*(action.dest for action in flags_of(self)), *others]
        close = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {', '.join(prefix + c for c in close)}?" if close else "see --help_all."
        return f"unknown {kind} {prefix}{name}; {hint}"

    def _group_by_dataclass(self, dataclass_types) -> None:
        """Sorts the flags into one help group per dataclass, and those of TrainingArguments into two more groups."""
        common_fields = self.add_argument_group("Training (the usual fields of transformers.TrainingArguments)")
        other_fields = self.add_argument_group("Training (all other fields of transformers.TrainingArguments)")
        group_of, recipe_groups = {}, []
        for kind in dataclass_types:
            group = self.add_argument_group(kind.__doc__.splitlines()[0].rstrip("."))
            recipe_groups.append(group)
            inherited = _inherited_training_fields(kind)
            group_of |= dict.fromkeys(inherited, other_fields)
            group_of |= dict.fromkeys(inherited.intersection(_COMMON_TRAINING_FIELDS), common_fields)
            group_of |= {f.name: group for f in dataclasses.fields(kind) if f.name not in inherited}
        group_of.pop("debug", None)  # stays with --help, as every command has it
        # The recipe's own flags come first, those of TrainingArguments last.
        sort_into_groups(self, group_of, [*recipe_groups, common_fields, other_fields])
        self._hidden_help = {id(action): action.help for action in flags_of(other_fields)}
        for action in flags_of(other_fields):
            action.help = argparse.SUPPRESS

    def _show_everything(self) -> None:
        for action in flags_of(self):
            action.help = self._hidden_help.get(id(action), action.help)


def _refuse_recorded_token(token: str | None, report_to: str | list[str] | None) -> None:
    """Raises `InputError` if a token was given and services are reported to: W&B records command lines and files."""
    services = {report_to} if isinstance(report_to, str) else set(report_to or ())
    if token is not None and (services := sorted(services - {"none", "tensorboard"})):
        raise InputError(
            f"--hub_token with report_to = {' '.join(services)}, which may record the command line and its files: set "
            "HF_TOKEN, or log in with `hf auth login`."
        )


def _split_config(arg: str) -> list[str]:
    return arg.split("=", 1) if arg.startswith("--config=") else [arg]


def _as_flag(action: argparse.Action, value) -> list[str]:
    """A YAML value as words of a command line. Raises `InputError` if it cannot be written there."""
    flag = f"--{action.dest}"
    if value is None:
        raise InputError("it is empty; leave the key out.")
    if is_switch(action) and not isinstance(value, bool):
        raise InputError("true or false is wanted.")
    if isinstance(value, bool) and not is_switch(action):
        raise InputError('true or false is not wanted; quote it if text is meant ("no").')
    if action.nargs == 0:
        return [flag] if value else []
    if isinstance(value, list):
        if action.nargs not in ("+", "*"):
            raise InputError("a single value is wanted, not a list.")
        return [flag, *map(str, value)]
    return [f"{flag}={json.dumps(value) if isinstance(value, dict) else value}"]


def _inherited_training_fields(kind: type) -> set[str]:
    """The names of the fields that a config class inherits from `transformers.TrainingArguments`."""
    bases = [base for base in kind.__mro__ if base.__name__ == "TrainingArguments"]
    return {f.name for base in bases for f in dataclasses.fields(base)}
