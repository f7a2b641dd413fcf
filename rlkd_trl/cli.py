"""The command line that the recipes share: flags by concern, YAML presets, short errors, exit code 2 on bad input."""

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import TrainingArguments
from trl import TrlParser

from rlkd_trl.errors import InputError

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
    "logging_steps",
    "save_steps",
    "save_strategy",
    "eval_strategy",
    "eval_steps",
    "report_to",
    "push_to_hub",
]


@dataclass
class DataArguments:
    """Data"""

    dataset: str | None = field(
        default=None,
        metadata={"help": "Hub id, a CSV/JSON/JSONL/Parquet file, or a directory. Default: the embedded demo."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train (or, in evaluate.py, test) on."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub dataset."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Held-out data, for the final table."})
    eval_split: str = field(default="train", metadata={"help": "Split of --eval_dataset."})
    source_column: str = field(default="source", metadata={"help": "Column with the student's input text."})
    target_column: str | None = field(
        default=None, metadata={"help": "Column with the reference text or texts, used for metrics only."}
    )
    max_rows: int | None = field(default=None, metadata={"help": "Use only this many distinct inputs."})


@dataclass
class PromptArguments:
    """Prompts"""

    templates: str | None = field(
        default=None,
        metadata={"help": "How the teacher is asked: a promptsource templates.yaml, its directory, or builtin:TASK."},
    )
    template_names: list[str] | None = field(
        default=None, metadata={"help": "Which of them; default: all that are for the original task."}
    )
    rename_columns: list[str] | None = field(
        default=None, metadata={"help": "Data columns under other names for the templates, as column=variable."}
    )
    student_template: str | None = field(
        default=None,
        metadata={"help": "The student's own prompt, as Jinja over the data's columns. Default: the bare source."},
    )


@dataclass
class TeacherArguments:
    """Teacher"""

    teacher: list[str] | None = field(
        default=None, metadata={"help": "Checkpoint directory or Hub id; several are averaged. Default: the demo."}
    )
    teacher_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub teacher."})
    teacher_dtype: str = field(default="float32", metadata={"help": "float32, bfloat16, float16 or auto."})
    teacher_max_prompt_length: int | None = field(
        default=None, metadata={"help": "Teacher prompts are cut at this many tokens; default: not at all."}
    )
    teacher_batch_tokens: int = field(default=16384, metadata={"help": "Padded tokens per scoring batch."})


@dataclass
class StudentArguments:
    """Student"""

    student: str | None = field(
        default=None, metadata={"help": "Checkpoint directory or Hub id to start from. Default: the demo."}
    )
    student_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub student."})
    student_dtype: str = field(default="float32", metadata={"help": "float32, bfloat16, float16 or auto."})


@dataclass
class RewardArguments:
    """Reward"""

    reward: list[str] = field(
        default_factory=lambda: ["teacher_forcing"],
        metadata={"help": "One or several, summed with --reward_weights: a name or path/to/file.py:function."},
    )
    value: str = field(default="max", metadata={"help": "V of the teacher-forcing reward: max, expected or soft."})
    k: int = field(default=1, metadata={"help": "Steps of the K-step return (KETCHUP)."})
    tau: float = field(default=1.0, metadata={"help": "Temperature of --value soft."})


@dataclass
class RunArguments:
    """Run"""

    resume: bool = field(
        default=False, metadata={"help": "Continue from the last checkpoint in --output_dir (see --save_steps)."}
    )


@dataclass
class NewModelArguments:
    """New model (without --student)"""

    architecture: str = field(default="t5", metadata={"help": "t5 (encoder-decoder) or llama (decoder-only)."})
    d_model: int = field(default=128, metadata={"help": "Width D."})
    num_layers: int = field(default=2, metadata={"help": "Layers, in encoder and decoder each."})
    num_heads: int = field(default=4, metadata={"help": "Attention heads."})
    d_ff: int | None = field(default=None, metadata={"help": "Feed-forward width; 2 × d_model by default."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout while training."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Checkpoint whose tokenizer to use; default: train one on the data."}
    )
    vocab_size: int = field(default=4000, metadata={"help": "At most this many tokens in a new tokenizer."})


@dataclass
class PseudoLabelArguments:
    """Pseudo-labels"""

    output: str | None = field(default=None, metadata={"help": "JSON-lines file to write."})
    strategy: str = field(default="greedy", metadata={"help": "greedy, beam or sample."})
    num_beams: int = field(default=4, metadata={"help": "Beams of --strategy beam."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of --strategy sample."})
    max_completion_length: int = field(default=64, metadata={"help": "Cap on generated tokens, EOS included."})
    batch_size: int = field(default=64, metadata={"help": "Prompts at a time."})
    seed: int = field(default=0, metadata={"help": "Seed of --strategy sample."})


@dataclass
class EvaluationArguments:
    """Evaluation"""

    output_dir: str | None = field(default=None, metadata={"help": "Where metrics.json and outputs.jsonl go."})
    max_prompt_length: int | None = field(default=512, metadata={"help": "Student prompts are cut at this."})
    max_completion_length: int = field(default=64, metadata={"help": "Cap on generated tokens, EOS included."})
    batch_size: int = field(default=64, metadata={"help": "Prompts at a time."})
    sample: bool = field(default=False, metadata={"help": "Sample the student's outputs instead of greedy."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of --sample."})
    seed: int = field(default=0, metadata={"help": "Seed of --sample."})
    ibleu: bool = field(default=False, metadata={"help": "Also iBLEU against the source, for paraphrase."})
    gamma: float = field(default=1.0, metadata={"help": "Discount γ of the teacher-forcing reward."})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One weight per reward."})


class RecipeParser(TrlParser):
    """`TrlParser` with grouped help, type-checked YAML, `--config=X`, and errors of one line.

    The command line beats the YAML file, which beats the defaults. Unknown keys in either are errors.
    """

    def __init__(self, *dataclass_types, description: str):
        super().__init__(
            dataclass_types, description=description, formatter_class=_HelpFormatter, usage="%(prog)s [flags]"
        )
        self.add_argument("--config", metavar="FILE.yaml", help="Preset: any of the flags below, as YAML keys.")
        self.add_argument("--help_all", action="store_true", help="Also list every field of TrainingArguments.")
        self._group_by_dataclass(dataclass_types)

    def parse(self, argv: list[str] | None = None, *, demo_preset: Path | None = None) -> tuple:
        """One instance per dataclass.

        `demo_preset` is a YAML file of defaults for a run that names neither `--teacher` nor a preset of its own.

        Raises:
            InputError: Unknown flag or YAML key, a value of the wrong type, an unreadable preset.
        """
        argv = [part for arg in (sys.argv[1:] if argv is None else argv) for part in _split_config(arg)]
        if "--help_all" in argv:
            self._show_everything()
            self.print_help()
            sys.exit(0)
        named = {arg.split("=")[0] for arg in argv}
        if demo_preset is not None and not {"--teacher", "--config", "-h", "--help"} & named:
            argv = ["--config", str(demo_preset), *argv]
        if "--config" in argv:
            position = argv.index("--config")
            if position + 1 == len(argv):
                raise InputError("--config needs the path of a YAML file.")
            self._read_preset(Path(argv[position + 1]))
            del argv[position : position + 2]
        # HfArgumentParser has no way to parse known flags of its own beside the dataclasses'.
        known, unknown = self.parse_known_args(argv)
        if unknown:
            raise InputError(self._unknown("flag", unknown[0].split("=")[0].lstrip("-"), prefix="--"))
        values = vars(known)
        return tuple(
            kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.init and f.name in values})
            for kind in self.dataclass_types
        )

    def error(self, message: str):
        raise InputError(message)

    def _read_preset(self, path: Path) -> None:
        try:
            preset = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise InputError(f"Cannot read the preset {path}: {str(error).splitlines()[0]}") from error
        if not isinstance(preset, dict):
            raise InputError(f"The preset {path} is not a YAML mapping of flags to values.")
        actions = {action.dest: action for action in self._actions}
        for key, value in preset.items():
            if key not in actions or key in ("config", "help", "help_all"):
                raise InputError(f"{path}: " + self._unknown("key", str(key)))
            actions[key].default = _checked(actions[key], key, value, path)
            actions[key].required = False

    def _unknown(self, kind: str, name: str, prefix: str = "") -> str:
        known = [action.dest for action in self._actions]
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {', '.join(prefix + c for c in close)}?" if close else "see --help_all."
        return f"unknown {kind} {prefix}{name}; {hint}"

    def _group_by_dataclass(self, dataclass_types) -> None:
        """Sorts the flags into one help group per dataclass, and those of TrainingArguments into two of their own."""
        common = self.add_argument_group("Training (the usual fields of transformers.TrainingArguments)")
        rest = self.add_argument_group("Training (all other fields of transformers.TrainingArguments)")
        inherited = {f.name for f in dataclasses.fields(TrainingArguments)}
        group_of = dict.fromkeys(inherited, rest) | dict.fromkeys(_COMMON_TRAINING_FIELDS, common)
        own_groups = []
        for kind in dataclass_types:
            group = self.add_argument_group(kind.__doc__.splitlines()[0].rstrip("."))
            group_of |= {f.name: group for f in dataclasses.fields(kind) if f.name not in inherited}
            own_groups.append(group)
        for action in list(self._optionals._group_actions):
            if action.dest in group_of:
                self._optionals._group_actions.remove(action)
                group_of[action.dest]._group_actions.append(action)
        self._hidden_help = {id(action): action.help for action in rest._group_actions}
        for action in rest._group_actions:
            action.help = argparse.SUPPRESS
        # The recipe's own flags first, TrainingArguments last.
        self._action_groups = [self._optionals, *own_groups, common, rest]

    def _show_everything(self) -> None:
        for action in self._actions:
            action.help = self._hidden_help.get(id(action), action.help)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
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


def run(main: Callable[[], None]) -> None:
    """Runs a recipe; input that the user can correct ends in one line on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _split_config(arg: str) -> list[str]:
    return arg.split("=", 1) if arg.startswith("--config=") else [arg]


def _checked(action: argparse.Action, key: str, value, path: Path):
    """A YAML value as the flag's type: argparse itself checks only strings."""
    if value is None or isinstance(value, bool | dict) or action.type is None:
        return value
    several = isinstance(value, list)
    try:
        converted = [action.type(str(item)) for item in (value if several else [value])]
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise InputError(f"{path}: {key} has the value {value!r}: {error}") from error
    return converted if several or action.nargs in ("+", "*") else converted[0]
