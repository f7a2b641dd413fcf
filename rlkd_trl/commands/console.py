"""`rlkd-trl [launcher's flags] COMMAND [flags]`: every recipe and the planner, wherever the package is installed."""

import ast
import difflib
import importlib.util
import logging
import os
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
from rlkd_trl.commands.shipped import ACCELERATE_CONFIGS, PLANNER, recipe_scripts
from rlkd_trl.errors import InputError

PROGRAM = "rlkd-trl"
_SAID_BY_PROCESS = (1, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of `errors.run`
_HELP = """usage: {program} [launcher's flags] COMMAND [flags]

{commands}

    {program} ppo_kd                                      # the embedded demo, no network
    {program} ppo_kd --config llmr_t0_3b_t5_base ...      # a preset that ships, or your own YAML file
    {program} --num_processes 2 ppo_kd ...                # several processes, as `accelerate launch` starts them
    {program} --config_file zero2 ppo_kd ...              # one of accelerate's configurations that ship, or a path

`{program} COMMAND --help` lists a command's flags, `accelerate launch --help` those of the launcher.
Presets: {presets}
Accelerate's configurations: {accelerate_configs}"""


def main() -> None:
    """The console command."""
    errors.run(lambda: run_command(sys.argv[1:]))


def run_command(argv: list[str]) -> None:
    """Runs a command line. Raises `InputError` for a command or launcher's flag that there is not."""
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
    """Command to the script that it runs: the recipes' names, and `plan`."""
    return {**recipe_scripts(), "plan": PLANNER}


def script_of(command: str) -> Path:
    """The script that a command runs. Raises `InputError` with the commands that may be meant."""
    script_of_command = scripts()
    if command not in script_of_command:
        close = difflib.get_close_matches(command, script_of_command, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"choose one of {', '.join(script_of_command)}."
        raise InputError(f"there is no command {command!r}; {hint}")
    return script_of_command[command]


def help_text() -> str:
    """All commands, each with the first sentence of its script."""
    from rlkd_trl.commands.presets import shipped_presets

    script_of_command = scripts()
    width = max(map(len, script_of_command))
    lines = []
    for name, path in script_of_command.items():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"    {name:{width}}  {textwrap.shorten(docstring.splitlines()[0], 99, placeholder=' …')}")
    names = [preset.stem for preset in shipped_presets() if not preset.stem.startswith("demo_")]
    return _HELP.format(
        program=PROGRAM,
        commands="\n".join(lines),
        presets=", ".join(names),
        accelerate_configs=", ".join(sorted(path.stem for path in ACCELERATE_CONFIGS.glob("*.yaml"))),
    )


def launch(argv: list[str]) -> NoReturn:
    """Runs a command through accelerate's launcher, whose flags stand before it, and exits with its code.

    Raises:
        InputError: A flag that the launcher does not have, no command, or no such configuration.
    """
    # As TRL's own console command does.
    import torch.distributed.run  # noqa: F401  all loggers of the launcher
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
        if name.startswith("torch.distributed.elastic"):  # it would say in thirty lines what is said here in one
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with patch_environment(**{errors.LAUNCHER: PROGRAM}):
            launch_command(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode not in _SAID_BY_PROCESS:
            print(f"error: process {rank} {_end_in_words(failure.exitcode)}.", file=sys.stderr, flush=True)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as interruption:  # which the processes have got too, and obeyed
        sys.exit(128 + interruption.sigval)
    except subprocess.CalledProcessError as error:  # of a single process
        if error.returncode < 0:
            print(f"error: the process {_end_in_words(error.returncode)}.", file=sys.stderr, flush=True)
        sys.exit(error.returncode if error.returncode > 0 else 128 - error.returncode)
    except KeyboardInterrupt:  # a single process has got it too
        with suppress(ChildProcessError, AttributeError, KeyboardInterrupt):  # no os.wait on Windows
            os.wait()
        sys.exit(128 + signal.SIGINT)
    sys.exit(0)


def _end_in_words(code: int) -> str:
    """How a process ended that could not say it itself; negative codes are signals."""
    if code > 0:
        return f"ended with code {code}"
    why = ": the machine's memory may not suffice" if -code == signal.SIGKILL else ""
    killed = f"was killed by signal {-code} ({signal.Signals(-code).name}){why}"
    return f"{killed}. To continue: the same command with --resume, if a checkpoint was saved before"


def _config_file(arguments: Namespace) -> str | None:
    """The launcher's configuration: a path, one that ships, or for several processes the plain one of these."""
    name = arguments.config_file
    if name is None:
        if (arguments.num_processes or 1) == 1:
            return None
        # Without one, accelerate starts a single process on a machine without GPUs, and says nothing.
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
