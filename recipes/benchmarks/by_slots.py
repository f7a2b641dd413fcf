r"""Where a comparison on E2E is won and lost: BLEU and length by the number of facts (slots) in the input.

    python recipes/benchmarks/by_slots.py --results runs/e2e_comparison/middling

Reads what `e2e_comparison.py` left in its work_dir. For every test set, budget and method, at the learning rate that
was chosen, means over seeds of corpus BLEU, its brevity penalty and the number of words, for test inputs of up to 7
slots and of 8, which most training inputs do not have; and what BLEU gained on the validation inputs. Writes
`by_slots.md` to `--results_dir`.
"""

import argparse
import csv
import json
import math
from pathlib import Path
from statistics import mean

from result_files import RESULTS
from sacrebleu.metrics import BLEU

from rlkd_trl.evaluation.tables import markdown_table, number

GROUPS = {"up to 7 slots": range(1, 8), "8 slots": range(8, 9)}


def number_of_slots(source: str) -> int:
    return len(source.split(","))


def share_of_8(data: Path) -> str:
    """A phrase on the share of inputs with 8 slots among the distinct inputs of a CSV file."""
    with data.open(newline="", encoding="utf-8") as file:
        inputs = {row["mr"] for row in csv.DictReader(file)}
    return f"{mean(number_of_slots(source) == 8 for source in inputs):.0%} of the {len(inputs)} {data.stem} inputs"


def validation_gain(directories: list[Path]) -> float:
    """How much BLEU rose on the validation inputs in training, as the mean over seeds."""
    per_seed = [json.loads((directory / "metrics.json").read_text(encoding="utf-8")) for directory in directories]
    return mean(metrics["after"]["bleu"] - metrics["before"]["bleu"] for metrics in per_seed)


def outputs_of(directory: Path, test: str, slots: range) -> list[dict]:
    with (directory / "tests" / f"{test}.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row for row in rows if number_of_slots(row["prompt"]) in slots]


def measures(rows: list[dict]) -> tuple[float, float, float]:
    """BLEU, its brevity penalty, and words per output; NaN where there are no inputs."""
    if not rows:
        return math.nan, math.nan, math.nan
    most = max(len(row["references"]) for row in rows)
    streams = [[row["references"][k] if k < len(row["references"]) else None for row in rows] for k in range(most)]
    score = BLEU().corpus_score([row["greedy"] for row in rows], streams)
    return score.score, score.bp, mean(len(row["greedy"].split()) for row in rows)


def cells_of(name: str, directories: list[Path], test: str, *, trained: bool) -> list[str]:
    cells = [name, f"{validation_gain(directories):+.1f}" if trained else "–"]
    for slots in GROUPS.values():
        of_seeds = [measures(outputs_of(directory, test, slots)) for directory in directories]
        bleu, brevity, words = (mean(values) for values in zip(*of_seeds, strict=True))
        cells += [number(bleu, ".1f"), number(brevity, ".2f"), number(words, ".1f")]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("runs/e2e_comparison/middling"))
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    args = parser.parse_args()

    comparison = json.loads((args.results / "comparison.json").read_text(encoding="utf-8"))
    heads = ["BLEU gained, validation"]
    heads += [f"{measure}, {group}" for group in GROUPS for measure in ("BLEU", "brevity penalty", "words")]
    sections = []
    for test, budgets in comparison["tests"].items():
        for budget, rows in budgets.items():
            table = []
            for row in rows:
                trained = row["learning_rate"] is not None
                if not trained:  # teacher and warm start
                    directories = [args.results / row["model"]]
                else:
                    of_method = args.results / budget / row["model"]
                    directories = [of_method / f"seed{seed}-lr{row['learning_rate']:g}" for seed in row["seeds"]]
                if all((directory / "tests" / f"{test}.jsonl").is_file() for directory in directories):
                    table.append(cells_of(row["model"], directories, test, trained=trained))
            sections.append(f"## {test}, {budget}\n\n{markdown_table(['model', *heads], table)}\n")
    shares = [
        share_of_8(args.results.parent / f"{name}.csv") for name in ("train", "validation", *comparison["tests"])
    ]
    text = f"8 slots have {', '.join(shares)}.\n\n"
    text += "\n".join(sections)
    (args.results_dir / "by_slots.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
