"""recipes/benchmarks/by_slots.py: its table of a comparison written by hand."""

import json
import sys

import pytest

from tests.recipes.command_lines import main_of, write_csv

SHORT, LONG = "name[N], food[F]", ", ".join(f"s{i}[v]" for i in range(8))


def write_outputs(directory, short: str, long: str, gain: float = 0.0) -> None:
    (directory / "tests").mkdir(parents=True)
    metrics = {"before": {"bleu": 50.0}, "after": {"bleu": 50.0 + gain}}
    (directory / "metrics.json").write_text(json.dumps(metrics))
    rows = [
        {"prompt": SHORT, "references": ["N serves F food ."], "greedy": short},
        {"prompt": LONG, "references": ["a b c d e f g h", "a b c d e f g"], "greedy": long},
    ]
    (directory / "tests" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_table_of_a_comparison(tmp_path, monkeypatch):
    results = tmp_path / "results"
    write_outputs(results / "warm_start", "N serves F food .", "a b c d e f g h")
    for seed, long in ((0, "a b c d e f g h"), (2, "a b c d e f")):
        write_outputs(results / "max_steps_5" / "ppo" / f"seed{seed}-lr0.0005", "N serves F food .", long, gain=seed)
    for name, inputs in {"train": [SHORT, LONG, LONG, "x[1]", "y[2]"], "validation": [LONG], "test": [SHORT]}.items():
        write_csv(tmp_path / f"{name}.csv", [{"mr": source, "ref": "r"} for source in inputs])
    budgets = {
        "max_steps_5": [
            {"model": "warm_start", "learning_rate": None, "seeds": []},
            {"model": "ppo", "learning_rate": 5e-4, "seeds": [0, 2]},
        ]
    }
    (results / "comparison.json").write_text(json.dumps({"tests": {"test": budgets}}))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["by_slots.py", "--results", str(results), "--results_dir", str(tmp_path)])
        main_of("benchmarks/by_slots")()
    text = (tmp_path / "by_slots.md").read_text()
    # distinct: 1 of SHORT, LONG, x, y
    shares = "25% of the 4 train inputs, 100% of the 1 validation inputs, 0% of the 1 test inputs"
    assert text.startswith(f"8 slots have {shares}.\n\n## test, max_steps_5\n")
    table = {line.split(" | ")[0].lstrip("| "): line.strip("| ").split(" | ")[1:] for line in text.splitlines()}
    assert table["warm_start"] == ["–", "100.0", "1.00", "5.0", "100.0", "1.00", "8.0"]
    # Seed 2: all n-grams match, 6 words against 7 of the nearest reference: exp(1 − 7/6) = 0.846; with 1, 0.923
    assert table["ppo"] == ["+1.0", "100.0", "1.00", "5.0", "92.3", "0.92", "7.0"]


def test_without_results(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["by_slots.py", "--results", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=r"comparison\.json"):
        main_of("benchmarks/by_slots")()
