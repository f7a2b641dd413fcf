"""recipes/benchmarks/quantised_teachers.py: its numbers by hand and against loops, and what tiny runs write."""

import json
import math
import statistics

import pytest
import torch

from tests.recipes.command_lines import COLUMNS, main_of, run
from tests.recipes.forks import fork_recipes

BENCHMARK = "benchmarks/quantised_teachers"
FUNCTIONS = main_of(BENCHMARK).__globals__


def test_rank_correlation_by_hand():
    rank_correlation = FUNCTIONS["rank_correlation"]

    def of(x, y):
        return rank_correlation(torch.tensor(x), torch.tensor(y))

    assert of([1.0, 2.0, 30.0], [-5.0, 0.0, 0.1]) == pytest.approx(1)
    assert of([1.0, 2.0, 3.0], [9.0, 8.0, -7.0]) == pytest.approx(-1)
    # ranks 1 2 3 4 and 1 3 2 4: 1 − 6 (0 + 1 + 1 + 0) / (4 · 15) = 0.8
    assert of([1.0, 2.0, 3.0, 4.0], [10.0, 30.0, 20.0, 40.0]) == pytest.approx(0.8)
    # tied: ranks 1.5 1.5 3 and 1 2 3; deviations (−½, −½, 1), (−1, 0, 1): (½ + 1) / √(1.5 · 2)
    assert of([5.0, 5.0, 6.0], [1.0, 2.0, 3.0]) == pytest.approx(1.5 / math.sqrt(3))
    assert math.isnan(of([1.0, 1.0], [1.0, 2.0]))


def test_the_columns_match_the_loop():
    """Two prompts of three samples, the last row of poison behind the mask."""
    lengths = [4, 2, 3, 1, 4, 2]
    generator = torch.Generator().manual_seed(0)
    mask_BT = torch.tensor([[t < n for t in range(4)] for n in lengths])
    exact_BT = torch.where(mask_BT, torch.randn(6, 4, generator=generator), 1e6)
    rewards_BT = torch.where(mask_BT, exact_BT + 0.3 * torch.randn(6, 4, generator=generator), -1e6)
    found = FUNCTIONS["error_columns"](rewards_BT, exact_BT, mask_BT, 3)

    ours, exact = (
        [row[:n].double().tolist() for row, n in zip(values_BT, lengths, strict=True)]
        for values_BT in (rewards_BT, exact_BT)
    )
    flat_ours, flat_exact = ([value for row in rows for value in row] for rows in (ours, exact))
    sums_ours, sums_exact = [math.fsum(row) for row in ours], [math.fsum(row) for row in exact]

    def error(xs, ys):
        return statistics.mean(abs(x - y) for x, y in zip(xs, ys, strict=True)) / statistics.stdev(ys)

    def rho(xs, ys):
        """1 − 6 Σ d² / (n (n² − 1)), without ties."""
        rank_x, rank_y = ([sorted(values).index(value) for value in values] for values in (xs, ys))
        n = len(xs)
        return 1 - 6 * sum((a - b) ** 2 for a, b in zip(rank_x, rank_y, strict=True)) / (n * (n**2 - 1))

    expected = {
        "token_rank_correlation": rho(flat_ours, flat_exact),
        "token_error": error(flat_ours, flat_exact),
        "sequence_rank_correlation": rho(sums_ours, sums_exact),
        "within_prompt_rank_correlation": (rho(sums_ours[:3], sums_exact[:3]) + rho(sums_ours[3:], sums_exact[3:]))
        / 2,
        "sequence_error": error(sums_ours, sums_exact),
    }
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected["token_rank_correlation"] < 0.99, "the test needs errors that change ranks"


def command(family, checkpoints, train_csv, tmp_path) -> str:
    models = f"--teacher {checkpoints[family].teacher} --student {checkpoints[family].student}"
    sizes = "--num_prompts 5 --num_generations 4 --max_completion_length 6 --batch_size 2"
    places = f"--output_dir {tmp_path / 'students'} --results_dir {tmp_path / 'results'}"
    return f"{BENCHMARK} {models} --dataset {train_csv} {COLUMNS} {sizes} {places}"


@pytest.mark.parametrize("family", ["t5-tied", "llama"])
def test_rewards_of_a_tiny_run(family, checkpoints, train_csv, tmp_path):
    assert run(command(family, checkpoints, train_csv, tmp_path)) == 0
    found = json.loads((tmp_path / "results" / "quantised_teachers.json").read_text())
    assert found["students"] == {}
    rewards = found["rewards"]
    assert list(rewards) == ["float32", "bfloat16", "int8", "nf4"]
    exact = rewards["float32"]
    assert exact["token_error"] == exact["sequence_error"] == 0
    assert exact["token_rank_correlation"] == pytest.approx(1)
    # but for the frequencies of rotary positions, which stay in float32
    assert rewards["bfloat16"]["bytes"] == pytest.approx(exact["bytes"] / 2, rel=0.01)
    for name in ("bfloat16", "int8", "nf4"):
        assert rewards[name]["bytes"] < exact["bytes"]
    # Twice what was seen of T5, the larger: 0.019, 0.044 and 0.57; Llama has half of that.
    for name, most in {"bfloat16": 0.04, "int8": 0.09, "nf4": 1.2}.items():
        assert most / 10 < rewards[name]["token_error"] < most
    lines = (tmp_path / "results" / "quantised_teachers.md").read_text().splitlines()
    assert sum(line.startswith("| ") for line in lines) == 2 + len(rewards)


@pytest.mark.slow(15)
def test_students_of_a_tiny_run(checkpoints, train_csv, test_csv, tmp_path, monkeypatch):
    fork_recipes(monkeypatch)
    students = "--max_steps 2 --seeds 0 --jobs 2 --common per_device_train_batch_size=8 logging_steps=1"
    tests = f"--test_dataset {test_csv} --eval_target_column ref"
    assert run(f"{command('t5-tied', checkpoints, train_csv, tmp_path)} {tests} {students}") == 0
    found = json.loads((tmp_path / "results" / "quantised_teachers.json").read_text())["students"]
    assert list(found) == ["teacher", "warm_start", "float32", "bfloat16", "int8", "nf4"]
    assert math.isfinite(found["int8"]["reward"]["mean"]) and found["int8"]["reward"]["half_width"] is None
    said = (tmp_path / "students" / "max_steps_2" / "nf4" / "seed0" / "stdout.txt").read_text()
    assert "quantised to nf4" in said
    assert "| student of | BLEU |" in (tmp_path / "results" / "quantised_teachers.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--teacher_dtype bfloat16", "--teacher_dtype is what this compares: leave it out"),
        ("--teacher_quantization nf4", "--teacher_quantization is what this compares: leave it out"),
        ("--max_steps 2", "--test_dataset, to test them on, is missing"),
        ("--num_generations 1", "--num_generations 1 is out of range: 2 or more"),
    ],
)
def test_bad_input(flags, message, checkpoints, train_csv, tmp_path, capsys):
    assert run(f"{command('t5-tied', checkpoints, train_csv, tmp_path)} {flags}") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
