r"""Writes one report of several runs, from what they have logged, and their curves as PNG files for papers.

    python -m rlkd_trl.report runs/a runs/b
    python -m rlkd_trl.report runs/a runs/b --output comparison.html --png figures

Each run is the --output_dir of a command that trains; one that has not finished is read from its newest checkpoint.
Nothing is loaded or computed anew.
"""

import argparse
from pathlib import Path

from rlkd_trl.errors import InputError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(message)


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    flags = _Parser(
        prog="rlkd-trl report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s RUN [RUN ...] [flags]",
        allow_abbrev=False,
    )
    flags.add_argument("runs", nargs="+", metavar="RUN", help="Output directory of a run.")
    flags.add_argument("--output", default="report.html", metavar="FILE", help="Where to write it [report.html].")
    flags.add_argument("--title", metavar="TEXT", help="Its title; default: the runs' names.")
    flags.add_argument("--png", metavar="DIR", help="Also write each curve as a PNG file (needs matplotlib).")
    flags.add_argument("--overwrite", action="store_true", help="Write over a file that is there.")
    flags.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return flags


def main(argv: list[str] | None = None) -> None:
    """Writes the report. Raises `InputError`: a run has no log, or the report is there already."""
    flags = parser().parse_args(argv)
    output = Path(flags.output)
    if output.is_dir():
        raise InputError(f"--output {output} is a directory: name a file, such as {output / 'report.html'}.")
    if output.exists() and not flags.overwrite:
        raise InputError(f"--output {output} exists: name another file, or write over it with --overwrite.")
    if flags.png is not None:
        check_matplotlib()

    from rlkd_trl.evaluation.report import write_report
    from rlkd_trl.evaluation.run_log import RunLog

    logs = {name: RunLog.load(run) for name, run in zip(_short_names(flags.runs), flags.runs, strict=True)}
    try:
        write_report(output, logs, title=flags.title or ", ".join(logs))
    except OSError as error:
        raise InputError(f"--output {output} cannot be written ({error.strerror}): name another place.") from error
    print(f"The report of {len(logs)} run{'s' * (len(logs) > 1)} is in {output}.")
    if flags.png is not None:
        from rlkd_trl.evaluation.figures import write_curves

        files = write_curves(Path(flags.png), {name: log.history for name, log in logs.items()})
        print(f"{len(files)} curves are in {flags.png}.")


def check_matplotlib() -> None:
    """Raises `InputError` where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError('--png needs matplotlib: pip install "rlkd_trl[figures]", or leave it out.') from error


def _short_names(runs: list[str]) -> list[str]:
    """The directories' names, with as many of the directories above them as it takes to tell them apart.

    Raises:
        InputError: A run is named twice.
    """
    parts = [Path(run).resolve().parts for run in runs]
    if len(set(parts)) < len(parts):
        raise InputError(f"A run is named twice: {' '.join(runs)}.")
    length = 1
    while len({path[-length:] for path in parts}) < len(parts):
        length += 1
    return ["/".join(path[-length:]) for path in parts]
