"""The console command, `rlkd-trl [launcher's flags] COMMAND [flags]`: runs any recipe, or a command of the package."""

import ast
import difflib
import importlib.util
import logging
import signal
import subprocess
import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import rlkd_trl
from rlkd_trl import errors
from rlkd_trl.commands.shipped import ACCELERATE_CONFIGS, PACKAGE_SCRIPTS, recipe_scripts
from rlkd_trl.errors import InputError

PROGRAM = "rlkd-trl"
# The exit codes of `errors.run`, which has printed why the process ended.
_EXPLAINED_CODES = (1, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM)
_HELP = """usage: {program} [launcher's flags] COMMAND [flags]

{commands}

    {program} ppo_kd                                      # the embedded demo, no network
    {program} ppo_kd --config llmr_t0_3b_t5_base ...      # a preset that ships, or your own YAML file
    {program} --num_processes 2 ppo_kd ...                # several processes, as `accelerate launch` starts them
    {program} --config_file zero2 ppo_kd ...              # one of accelerate's configurations that ship, or a path

`{program} COMMAND --help` lists a command's flags, `accelerate launch --help` those of the launcher.
Presets, for --config:
{presets}
Accelerate's configurations: {accelerate_configs}"""


def main() -> None:
    """The console command."""
    errors.run(lambda: run_command(sys.argv[1:]))


def run_command(argv: list[str]) -> None:
    """Runs a command line. Raises `InputError` for an unknown command or launcher's flag."""
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
    elif argv[0] == "--version":
        print(rlkd_trl.__version__)
    elif argv[0].startswith("-"):
        launch(argv)
    else:
        script = script_of(argv[0])
        sys.argv = [f"{PROGRAM} {argv[0]}", *argv[1:]]
        _main_of(script)()


def _main_of(script: Path) -> Callable[[], None]:
    """The `main` function of a script."""
    spec = importlib.util.spec_from_file_location(f"rlkd_trl_command_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main


def scripts() -> dict[str, Path]:
    """The script of each command: the recipes, and the package's own."""
    return {**recipe_scripts(), **PACKAGE_SCRIPTS}


def script_of(command: str) -> Path:
    """The script of a command. Raises `InputError` for an unknown one, with those that may be meant."""
    script_of_command = scripts()
    if command not in script_of_command:
        close = difflib.get_close_matches(command, script_of_command, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"choose one of {', '.join(script_of_command)}."
        raise InputError(f"there is no command {command!r}; {hint}")
    return script_of_command[command]


def help_text() -> str:
    """All commands, each with the first sentence of its script."""
    script_of_command = scripts()
    width = max(map(len, script_of_command))
    lines = []
    for name, path in script_of_command.items():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"    {name:{width}}  {textwrap.shorten(docstring.splitlines()[0], 99, placeholder=' …')}")
    return _HELP.format(
        program=PROGRAM,
        commands="\n".join(lines),
        presets="\n".join(_preset_lines()),
        accelerate_configs=", ".join(sorted(path.stem for path in ACCELERATE_CONFIGS.glob("*.yaml"))),
    )


def _preset_lines() -> list[str]:
    """The presets that ship: those that name models and data, for several commands, and each command's methods."""
    from rlkd_trl.commands.presets import shipped_presets

    names: dict[str, list[str]] = {}
    for preset in shipped_presets():
        is_method = preset.parent.parent.name == "methods"
        if not preset.stem.startswith("demo_"):
            names.setdefault(preset.parent.name if is_method else "models and data", []).append(preset.stem)
    width = max(map(len, names))
    lines = []
    for kind, of_kind in names.items():
        first, *more = textwrap.wrap(", ".join(of_kind), 113 - width)
        lines += [f"    {kind:{width}}  {first}", *(f"    {'':{width}}  {line}" for line in more)]
    return lines


def launch(argv: list[str]) -> NoReturn:
    """Runs a command through accelerate's launcher, as TRL's console command does, and exits with its exit code.

    argv: the launcher's flags, the command, and its flags.

    Raises:
        InputError: There is no such flag of the launcher, no such configuration, or no command.
    """
    import torch.distributed.run  # noqa: F401  makes all loggers of the launcher
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parser = launch_command_parser()
    parser.error = _refuse
    arguments = parser.parse_args(argv)
    arguments.training_script = str(script_of(arguments.training_script))
    arguments.config_file = _config_file(arguments)
    for name in [*logging.root.manager.loggerDict]:
        if name.startswith("torch.distributed.elastic"):  # they would print thirty lines where one is enough
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with patch_environment(**{errors.LAUNCHER: PROGRAM}):
            launch_command(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode not in _EXPLAINED_CODES:
            print(f"error: process {rank} {_end_in_words(failure.exitcode)}.", file=sys.stderr, flush=True)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as interruption:  # the processes have received the signal too, and obeyed
        sys.exit(128 + interruption.sigval)
    except subprocess.CalledProcessError as error:  # raised for a single process
        if error.returncode < 0:
            print(f"error: the process {_end_in_words(error.returncode)}.", file=sys.stderr, flush=True)
        sys.exit(error.returncode if error.returncode > 0 else 128 - error.returncode)
    except KeyboardInterrupt as stop:  # raised for a single process
        _end_children()
        sys.exit(128 + getattr(stop, "signum", signal.SIGINT))
    sys.exit(0)


def _end_children() -> None:
    """Sends SIGTERM to the processes that this one has started, which ignore it after a Ctrl-C, and waits for them."""
    import psutil

    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess, KeyboardInterrupt):
            child.terminate()
            child.wait()


def _end_in_words(code: int) -> str:
    """How a process ended that could not print it itself; negative codes are signals."""
    if code > 0:
        return f"ended with code {code}"
    why = ": the machine's memory may not suffice" if -code == signal.SIGKILL else ""
    killed = f"was killed by signal {-code} ({signal.Signals(-code).name}){why}"
    return f"{killed}. To continue: the same command with --resume, if it trains and a checkpoint was saved before"


def _config_file(arguments: Namespace) -> str | None:
    """The launcher's configuration file: a path, or the name of one that ships; for several processes a default."""
    name = arguments.config_file
    if name is None:
        if (arguments.num_processes or 1) == 1:
            return None
        # On a machine without GPUs accelerate would otherwise start a single process, silently.
        import torch

        name = "multi_gpu" if torch.accelerator.is_available() else "cpu_2_processes"
    if Path(name).is_file():
        return name
    shipped = {path.stem: path for path in ACCELERATE_CONFIGS.glob("*.yaml")}
    stem = Path(name).stem if Path(name).suffix == ".yaml" else name
    if stem not in shipped:
        close = difflib.get_close_matches(stem, shipped, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"those that ship are: {', '.join(sorted(shipped))}."
        raise InputError(f"--config_file {name} is neither a file nor the name of a configuration; {hint}")
    return str(shipped[stem])


def _refuse(message: str) -> NoReturn:
    raise InputError(f"{message.replace('training_script', 'COMMAND')}; see {PROGRAM} --help.")
