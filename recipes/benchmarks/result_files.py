"""Where a benchmark's results go, and how they are written."""

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def write_results(directory: str | Path, name: str, results: object, text: str) -> None:
    """Writes `name`.json and `name`.md into the directory, and prints the text."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (directory / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
