"""What a run leaves for its report: settings, results, logged numbers, and completions with their tokens' rewards.

Two files hold it: `completions.jsonl`, which grows while the run goes on, and `run_log.json`, written at its end. A
run that did not end is read from its newest checkpoint instead.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlkd_trl.errors import InputError
from rlkd_trl.evaluation.files import without_nan, write_json, write_text

LOG_FILE = "run_log.json"
COMPLETIONS_FILE = "completions.jsonl"


@dataclass
class RunLog:
    """One run, as a report shows it.

    title: of the report. results: each model's metrics by its name. history: what the trainer logged,
    `{"step": int, name: value, ...}`. samples: rows of a plain table. config: all settings. headline: name, heading
    and number format of the results that come first. completions: see `rlkd_trl.evaluation.token_details`.
    """

    title: str
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    samples_heading: str = "Sample completions"
    config: dict[str, Any] = field(default_factory=dict)
    headline: list[tuple[str, str, str]] = field(default_factory=list)
    completions: list[dict[str, Any]] = field(default_factory=list)

    def save(self, directory: str | Path) -> None:
        """Writes `run_log.json`: all but the completions, which are in their own file already."""
        fields = {name: value for name, value in asdict(self).items() if name != "completions"}
        write_json(Path(directory) / LOG_FILE, json.loads(json.dumps(without_nan(fields), default=str)))

    @classmethod
    def load(cls, directory: str | Path) -> "RunLog":
        """The log of a run in its output directory, also of one that has not ended.

        Raises:
            InputError: There is neither a log nor a checkpoint, or they cannot be read.
        """
        directory = Path(directory)
        if (directory / LOG_FILE).is_file():
            fields = _read_json(directory / LOG_FILE)
            fields["headline"] = [tuple(column) for column in fields.get("headline", [])]
            try:
                log = cls(**fields)
            except TypeError as error:
                raise InputError(f"{directory / LOG_FILE} is not a run's log: {error}.") from error
        else:
            log = cls(f"{directory.name} (not finished)", **_of_checkpoint(directory))
        log.completions = read_completions(directory / COMPLETIONS_FILE)
        return log


def read_completions(path: Path) -> list[dict[str, Any]]:
    """The records of a `completions.jsonl`; none if there is no file. A last line that was cut off is left out."""
    if not path.is_file():
        return []
    records, lines = [], path.read_bytes().split(b"\n")  # `str.splitlines` also splits within texts
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise InputError(f"{path}, line {number}, is not JSON: {error}.") from error
    return records


def append_completions(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Adds records to a `completions.jsonl`, each a line; what is not finite becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.write(_as_lines(records))


def keep_completions_until(path: Path, step: int) -> None:
    """Takes out the records of steps after `step`, which a resumed run writes anew; all of them or none."""
    if path.is_file():
        write_text(path, _as_lines(record for record in read_completions(path) if record["step"] <= step))


def _as_lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(without_nan(dict(record)), ensure_ascii=False) + "\n" for record in records)


def _of_checkpoint(directory: Path) -> dict[str, Any]:
    """The logged numbers of the newest checkpoint, and the results so far."""
    states = sorted(
        directory.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.rpartition("-")[2])
    )
    if not states:
        raise InputError(f"{directory} has no {LOG_FILE} and no checkpoint: name the --output_dir of a run.")
    metrics = directory / "metrics.json"
    return {
        "history": _read_json(states[-1])["log_history"],
        "results": _read_json(metrics) if metrics.is_file() else {},
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
