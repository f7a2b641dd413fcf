"""recipes/benchmarks/return_variance.py: its numbers against loops, and what a tiny run writes."""

import json
import math
import statistics

import pytest
import torch

from rlkd_trl.rewards import RewardInputs
from tests.recipes.command_lines import main_of, run, write_templates

BENCHMARK = "benchmarks/return_variance"


class Term:
    """Stands for a teacher's reward: these rewards, this value after the last token."""

    def __init__(self, rewards_BT, potentials_BT1):
        self.rewards_BT, self.potentials_BT1 = rewards_BT, potentials_BT1

    def mean_over_scorers(self, scores, inputs):
        return self.rewards_BT

    def mean_potentials(self, scores):
        return self.potentials_BT1


def test_the_columns_match_the_loop():
    """Two prompts of three completions; sums and variances over lists of Python floats."""
    K, T, lengths, ended = 3, 4, [4, 2, 3, 1, 4, 4], [False, True, True, True, True, False]
    generator = torch.Generator().manual_seed(0)
    mask_BT = torch.tensor([[t < n for t in range(T)] for n in lengths])
    rewards_BT = torch.where(mask_BT, torch.randn(6, T, generator=generator) + 1, 0.0)
    potentials_BT1 = torch.randn(6, T + 1, generator=generator)
    logps_BT = -torch.rand(6, T, generator=generator)
    inputs = RewardInputs(
        [{}, {}],
        torch.arange(2).repeat_interleave(K),
        mask_BT.long(),
        mask_BT,
        torch.tensor(ended),
        student_logps_BT=logps_BT,
    )
    columns_of = main_of(BENCHMARK).__globals__["columns_of"]
    found = columns_of(Term(rewards_BT, potentials_BT1), [], inputs, K)

    returns = []
    for i, n in enumerate(lengths):
        rewards = rewards_BT[i, :n].tolist()
        if not ended[i]:
            rewards[-1] += potentials_BT1[i, n].item()
        returns.append([math.fsum(rewards[t:]) for t in range(n)])
    groups = [[returns[i][t] for i in range(first, first + K) if t < lengths[i]] for first in (0, K) for t in range(T)]
    groups = [group for group in groups if len(group) > 1]
    n = sum(map(len, groups))
    token = sum(len(group) * statistics.variance(group) for group in groups) / n
    square = sum(len(group) * statistics.mean(group) ** 2 for group in groups) / n
    weights = [(1 - math.exp(logps_BT[i, t].item())) for i in range(6) for t in range(lengths[i])]
    flat = [g for row in returns for g in row]
    b = sum(w**2 * g for w, g in zip(weights, flat, strict=True)) / sum(w**2 for w in weights)
    expected = {
        "mean_return": statistics.mean(row[0] for row in returns),
        "first_token_variance": statistics.mean(
            statistics.variance(returns[i][0] for i in range(first, first + K)) for first in (0, K)
        ),
        "token_variance": token,
        "relative_token_variance": token / square,
        "gradient_variance": statistics.pvariance(w * (g - b) for w, g in zip(weights, flat, strict=True)),
    }
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", ["t5-tied", "llama"])
def test_a_tiny_run(family, checkpoints, train_csv, tmp_path):
    templates = write_templates(tmp_path / "templates.yaml", one="w9 {{ mr }}", two="{{ mr }} w4")
    models = f"--teacher {checkpoints[family].teacher} --student {checkpoints[family].student}"
    sizes = "--num_prompts 5 --num_generations 4 --max_completion_length 6 --batch_size 2 --steps 1 3 6 7"
    data = f"--dataset {train_csv} --source_column mr --templates {templates}"
    assert run(f"{BENCHMARK} {models} {data} {sizes} --results_dir {tmp_path / 'results'}") == 0
    per_k = json.loads((tmp_path / "results" / "return_variance.json").read_text())
    assert list(per_k) == ["1", "3", "6", "7"]
    for columns in per_k.values():
        assert all(math.isfinite(value) and value > 0 for name, value in columns.items() if "variance" in name)
    # No completion is longer than 6 tokens: more steps than that are the same one step to the end.
    assert per_k["7"] == per_k["6"] and per_k["6"] != per_k["3"] != per_k["1"]
    means = [columns["mean_return"] for columns in per_k.values()]
    assert means[0] < means[1] < means[2], "fewer maxima are subtracted"
    text = (tmp_path / "results" / "return_variance.md").read_text()
    assert text.count("\n| ") == 6 and "5 prompts × 4 completions, V = max" in text and "(100%)" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_generations 1", "--num_generations of 2 or more"),
        ("--steps 2 0", "--steps of 1 or more"),
        ("--num_prompts 0", "--num_prompts 0 is out of range"),
        ("--k 2", "give --steps, no --reward, no --k"),
        ("--reward log_ratio", "give --steps, no --reward, no --k"),
        ("--value mean", "--value mean: choose one of max, expected, soft"),
        ("--teacher nowhere", "--dataset and --student missing"),
    ],
)
def test_bad_input(flags, message, capsys):
    assert run(f"{BENCHMARK} {flags}") == 2
    assert message in capsys.readouterr().err
