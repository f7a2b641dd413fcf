"""recipes/benchmarks/gradient_variance.py: its numbers worked by hand, and what a tiny run writes."""

import json

import pytest
import torch

from tests.recipes.command_lines import main_of, run

BENCHMARK = "benchmarks/gradient_variance"


def test_the_columns_worked_by_hand():
    columns_of = main_of(BENCHMARK).__globals__["columns_of"]
    # mean (2, 1); squared distances 1 + 1, 1 + 1, so variance (2 + 2) / 1 = 4; signal 4 + 1 − 4 / 2 = 3
    assert columns_of(torch.tensor([[1.0, 0.0], [3.0, 2.0]])) == pytest.approx(
        {"variance": 4.0, "signal": 3.0, "noise_to_signal": 4 / 3}
    )


@pytest.mark.slow
def test_a_tiny_run(checkpoints, train_csv, tmp_path):
    pair = checkpoints["t5-tied"]
    models = f"--teacher {pair.teacher} --student {pair.student} --dataset {train_csv} --source_column mr"
    sizes = "--num_rollouts 3 --num_prompts 2 --num_generations 2 --max_completion_length 4"
    places = f"--output_dir {tmp_path / 'run'} --results_dir {tmp_path / 'results'}"
    assert run(f"{BENCHMARK} {models} {sizes} {places}") == 0
    found = json.loads((tmp_path / "results" / "gradient_variance.json").read_text())
    assert len(found) == 16 and all(columns["variance"] > 0 for columns in found.values())
    # One token for itself varies less than with its future, in any sample of rollouts as in expectation.
    assert found["all actions, w = 0 (on-policy reverse KL)"]["variance"] < found["all actions, w = 1"]["variance"]
    table = (tmp_path / "results" / "gradient_variance.md").read_text()
    assert all(name in table for name in found)


def test_too_few_inputs_are_named(checkpoints, train_csv, tmp_path, capsys):
    pair = checkpoints["t5-tied"]
    models = f"--teacher {pair.teacher} --student {pair.student} --dataset {train_csv} --source_column mr"
    assert run(f"{BENCHMARK} {models} --num_prompts 31 --output_dir {tmp_path}") == 2
    assert "--num_prompts 31, but the data has 30 distinct inputs" in capsys.readouterr().err
