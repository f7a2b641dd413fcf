r"""Where a comparison on E2E is won and lost: BLEU and length by the number of facts (slots) in the input.

    python recipes/benchmarks/by_slots.py --results runs/e2e_comparison/results

Reads the test outputs that `e2e_comparison.py` left in its work_dir. For every budget and method, at the learning
rate that was chosen, means over seeds of corpus BLEU, its brevity penalty and the number of words, for inputs of up to
7 slots and of 8, which most training inputs do not have. Writes `by_slots.md` to `--results_dir`.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

from sacrebleu.metrics import BLEU

RESULTS = Path(__file__).resolve().parent / "results"
GROUPS = {"up to 7 slots": range(1, 8), "8 slots": range(8, 9)}


def outputs_of(directory: Path, slots: range) -> list[dict]:
    with (directory / "test.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row for row in rows if len(row["prompt"].split(",")) in slots]


def measures(rows: list[dict]) -> tuple[float, float, float]:
    """BLEU, its brevity penalty, and words per output."""
    most = max(len(row["references"]) for row in rows)
    streams = [[row["references"][k] if k < len(row["references"]) else None for row in rows] for k in range(most)]
    found = BLEU().corpus_score([row["greedy"] for row in rows], streams)
    return found.score, found.bp, mean(len(row["greedy"].split()) for row in rows)


def line(name: str, directories: list[Path]) -> str:
    cells = [name]
    for slots in GROUPS.values():
        of_seeds = [measures(outputs_of(directory, slots)) for directory in directories]
        bleu, brevity, words = (mean(values) for values in zip(*of_seeds, strict=True))
        cells += [f"{bleu:.1f}", f"{brevity:.2f}", f"{words:.1f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("runs/e2e_comparison/results"))
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    args = parser.parse_args()

    found = json.loads((args.results / "comparison.json").read_text(encoding="utf-8"))
    heads = [f"{measure}, {group}" for group in GROUPS for measure in ("BLEU", "brevity penalty", "words")]
    lines = []
    for budget, rows in found["budgets"].items():
        lines += [f"## {budget}", "", f"| model | {' | '.join(heads)} |", "| --- |" + " --: |" * len(heads)]
        for row in rows:
            if row["learning_rate"] is None:  # teacher and warm start
                directories = [args.results / row["model"]]
            else:
                of_method = args.results / budget / row["model"]
                directories = [of_method / f"seed{seed}-lr{row['learning_rate']:g}" for seed in row["seeds"]]
            lines.append(line(row["model"], directories))
        lines.append("")
    sizes = [len(outputs_of(args.results / "warm_start", slots)) for slots in GROUPS.values()]
    text = f"Test inputs: {', '.join(f'{n} of {group}' for n, group in zip(sizes, GROUPS, strict=True))}.\n\n"
    text += "\n".join(lines)
    (args.results_dir / "by_slots.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
