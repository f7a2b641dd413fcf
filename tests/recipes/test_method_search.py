"""recipes/benchmarks/method_search.py and method_confirmation.py: the order of candidates, and tables by hand."""

import json

import pytest

from tests.recipes.command_lines import ROOT, main_of

COLUMNS = ("bleu", "teacher_nll_per_token", "student_nll_of_teacher_per_token", "length_words", "distinct_outputs")


def names_of(script: str, monkeypatch) -> dict:
    """The script's global names; it imports its neighbours, as a script does."""
    monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks")
    return main_of(f"benchmarks/{script}").__globals__


def measures(bleu: float, sampled_nll: float) -> dict[str, dict[str, float]]:
    greedy = dict.fromkeys(COLUMNS, 1.0) | {"bleu": bleu}
    return {"greedy": greedy, "sampled": greedy | {"teacher_nll_per_token": sampled_nll}}


def write(directory, found: dict) -> None:
    for kind, values in found.items():
        (directory / kind).mkdir(parents=True)
        (directory / kind / "metrics.json").write_text(json.dumps({"student": values}))


def test_what_loses_greedy_bleu_stands_last(monkeypatch):
    names = names_of("method_search", monkeypatch)
    before = measures(50.0, 1.0)
    rows = [("lost", "1", "0", measures(49.0, 0.1)), ("good", "1", "0", measures(51.0, 0.4))]
    rows += [("best", "1", "0", measures(50.0, 0.3))]
    text = names["table"](rows, before)
    assert [line.split(" | ")[0] for line in text.splitlines()[2:]] == ["| warm start", "| best", "| good", "| lost"]


def test_stages_of_a_candidate_share_its_steps(monkeypatch):
    """All candidates have the same number of steps, so that they can be compared."""
    for stages in names_of("method_search", monkeypatch)["CANDIDATES"].values():
        assert sum(max(1, round(stage.share * 150)) for stage in stages) == 150


def test_the_rate_that_is_confirmed(tmp_path, monkeypatch):
    best_rate = names_of("method_confirmation", monkeypatch)["best_rate"]
    write(tmp_path / "before", measures(50.0, 1.0))
    for rate, found in {"1e-3": (51.0, 0.5), "2e-4": (55.0, 0.6), "4e-3": (40.0, 0.1)}.items():
        write(tmp_path / "gkd_exact" / f"seed0-lr{rate}", measures(*found))
    write(tmp_path / "gkd_exact" / "seed1-lr7", measures(60.0, 0.0))
    assert best_rate(tmp_path, "gkd, exact", "0") == "1e-3"
    with pytest.raises(SystemExit, match="has not tried 'ppo' with seed 0"):
        best_rate(tmp_path, "ppo", "0")


def test_differences_are_paired_by_seed(monkeypatch):
    names = names_of("method_confirmation", monkeypatch)
    found = {
        "ours": [measures(60.0, 0.5), measures(62.0, 0.5)],
        "theirs": [measures(57.0, 0.7), measures(61.0, 0.5)],
    }
    text = names["tables"](found, {"ours": "1e-3", "theirs": "2e-4"}, {"ours": 1234.4, "theirs": 5.0}, measures(50, 1))
    first, second = text.split("\n\n")
    # Student's t with one degree of freedom is 12.706; the standard error of two values is half their distance.
    assert "| `ours` | 1e-3 | 1,234 | 61.0 ± 12.7 |" in first and "| `theirs` | 2e-4 | 5 | 59.0 ± 25.4 |" in first
    assert "| warm start |  |  | 50.0 |" in first
    # 3 and 1: mean 2, half-width 12.7
    assert "| less `theirs` | +2.0 ± 12.7 |" in second and "-0.100 ± 1.271" in second
