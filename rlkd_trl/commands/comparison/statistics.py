"""Which method is better, and by how much: means over seeds with intervals, paired differences over test inputs.

Pure functions. Two kinds of chance are told apart: another seed of the training run (`mean_interval`), and other test
inputs (`paired_difference`).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from sacrebleu.metrics import BLEU
from torch import Tensor

from rlkd_trl.commands.comparison.outcome import Outcome
from rlkd_trl.evaluation.metrics import rouge

LEVEL = 0.95
RETAINED = ("bleu", "rougeL")  # those of which a share of the teacher's value makes sense
COSTS = ("optimizer_steps", "generated_tokens", "cpu_seconds", "wall_seconds")


class Interval(NamedTuple):
    """half_width: of the 95 % interval around the mean; None where there is only one value."""

    mean: float
    half_width: float | None


class Difference(NamedTuple):
    """A system's score minus the baseline's, and the ends of its 95 % interval."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Entry:
    """One line of a comparison: a method at one budget, or a model that was there before (teacher, warm start).

    outcomes and costs: one per seed that finished. failed_seeds, and seeds that are not run yet: the others.
    """

    name: str
    outcomes: list[Outcome]
    learning_rate: float | None = None
    seeds: list[int] = field(default_factory=list)
    costs: list[dict[str, float]] = field(default_factory=list)
    failed_seeds: list[int] = field(default_factory=list)
    missing_seeds: list[int] = field(default_factory=list)
    at_the_edge: bool = False


@cache
def student_t_critical(degrees: int, level: float = LEVEL) -> float:
    """t with P(|T| ≤ t) = level, for Student's t with that many degrees of freedom.

    By bisection over θ = arctan(t / √ν) of the exact finite series, Abramowitz & Stegun 1964, 26.7.3 and 26.7.4:

        A(t|ν) = 2/π (θ + sin θ (cos θ + 2/3 cos³θ + … + 2·4…(ν−3) / 3·5…(ν−2) cos^(ν−2) θ))    ν odd; 2θ/π for ν = 1
        A(t|ν) = sin θ (1 + 1/2 cos²θ + … + 1·3…(ν−3) / 2·4…(ν−2) cos^(ν−2) θ)                   ν even
    """
    odd = degrees % 2
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        theta = (low + high) / 2
        total, term = 0.0, math.cos(theta) if odd else 1.0
        for k in range(1, degrees // 2 + 1):
            total += term
            term *= math.cos(theta) ** 2 * (2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k))
        inside = math.sin(theta) * total
        if odd:
            inside = 2 / math.pi * (theta + inside)
        low, high = (theta, high) if inside < level else (low, theta)
    return math.sqrt(degrees) * math.tan(low)


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean over seeds ± t s / √n (Student 1908), s with n − 1. Not finite values give NaN, and no interval."""
    if not all(map(math.isfinite, values)):
        return Interval(math.nan, None)
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Interval(mean, None)
    return Interval(mean, student_t_critical(n - 1) * statistics.stdev(values) / math.sqrt(n))


def input_statistics(inputs: Sequence[Mapping]) -> dict[str, Tensor]:
    """For each metric that is a function of sums over inputs, what is summed: float64 `[N, D]`.

    For BLEU its n-gram counts and lengths (D = 10), else a numerator and a denominator. BLEU and ROUGE-L only where
    every input has references; the teacher's NLL and the reward where the inputs have them.
    """
    columns: dict[str, list[list[float]]] = {"length_words": [[len(row["greedy"].split()), 1] for row in inputs]}
    if all(row["references"] for row in inputs):
        columns["bleu"] = [_bleu_statistics(row["greedy"], row["references"]) for row in inputs]
        columns["rougeL"] = [[rouge([row["greedy"]], [row["references"]])["rougeL"], 1] for row in inputs]
    if all("teacher_nll" in row for row in inputs):
        columns["teacher_nll_per_sequence"] = [[row["teacher_nll"], 1] for row in inputs]
        columns["teacher_nll_per_token"] = [[row["teacher_nll"], row["tokens"]] for row in inputs]
    if all("reward" in row for row in inputs):
        columns["reward"] = [[row["reward"], 1] for row in inputs]
    if all("nll_of_teacher" in row for row in inputs):
        of_teacher = [[row["nll_of_teacher"], row["teacher_tokens"]] for row in inputs]
        columns["nll_of_teacher_samples_per_token"] = of_teacher
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}


def _bleu_statistics(output: str, references: Sequence[str]) -> list[int]:
    """Correct 1- to 4-grams, all 1- to 4-grams, the output's length, the nearest reference's (Post 2018)."""
    score = BLEU().corpus_score([output], [[reference] for reference in references])
    return [*score.counts, *score.totals, score.sys_len, score.ref_len]


def score_of_sums(metric: str, sums_BD: Tensor) -> Tensor:
    """The metric, `[B]`, of each row of summed `input_statistics`."""
    if metric != "bleu":
        return sums_BD[:, 0] / sums_BD[:, 1]
    rows = [[round(value) for value in row] for row in sums_BD.tolist()]
    scores = [BLEU.compute_bleu(row[:4], row[4:8], row[8], row[9], smooth_method="exp").score for row in rows]
    return torch.tensor(scores, dtype=torch.float64)


def resample_weights(num_inputs: int, num_resamples: int, seed: int = 0) -> Tensor:
    """How often each input is drawn in each resample, float64 `[B, N]`; the first row is the data as they are."""
    generator = torch.Generator().manual_seed(seed)
    drawn_BN = torch.randint(num_inputs, (num_resamples, num_inputs), generator=generator)
    weights_BN = torch.zeros(num_resamples, num_inputs, dtype=torch.float64)
    weights_BN.scatter_add_(1, drawn_BN, torch.ones_like(drawn_BN, dtype=torch.float64))
    return torch.cat([torch.ones(1, num_inputs, dtype=torch.float64), weights_BN])


def system_scores(outcomes: Sequence[Outcome], weights_BN: Tensor) -> dict[str, Tensor]:
    """Each metric, `[B]`, of a system in each resample: the mean over its seeds of the corpus-level score.

    A drawn input brings the outputs of every seed with it, so the mean over seeds is that of the tables.
    """
    per_seed = [input_statistics(outcome.inputs) for outcome in outcomes]
    return {
        metric: torch.stack([score_of_sums(metric, weights_BN @ statistics[metric]) for statistics in per_seed]).mean(
            dim=0
        )
        for metric in per_seed[0]
    }


def paired_difference(system_B: Tensor, baseline_B: Tensor) -> Difference:
    """The paired bootstrap over test inputs (Koehn 2004, "Statistical Significance Tests for Machine Translation").

    Both are scores in the same resamples (`system_scores`): the inputs are drawn with replacement, the same ones for
    system and baseline and for all their seeds. The ends are the 2.5 % and 97.5 % quantiles of the differences. The
    interval is about other test inputs, given these training runs; seeds are not drawn.
    """
    differences_B = system_B - baseline_B
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(differences_B[1:], torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Difference(float(differences_B[0]), low, high)


def summarise(entries: Sequence[Entry], *, teacher: Outcome, baseline: str, num_resamples: int) -> list[dict]:
    """One dict of plain values for each entry, in order, for tables, figures and JSON.

    Keys: `model`, `learning_rate`, `at_the_edge` of the grid or not, `seeds`, `failed_seeds`, `missing_seeds`;
    `greedy`, `sampled`, `retention` (% of the teacher's) and `cost`, each a metric's `mean`, `half_width` and per-seed
    `values`; `difference`, a metric's `difference`, `low` and `high` against the baseline. The last is empty for the
    baseline, and where either has no finished seed.
    """
    weights_BN = resample_weights(len(teacher.inputs), num_resamples)
    scores = {entry.name: system_scores(entry.outcomes, weights_BN) for entry in entries if entry.outcomes}
    of_baseline = scores.get(baseline, {})
    rows = []
    for entry in entries:
        of_entry = {} if entry.name == baseline else scores.get(entry.name, {})
        greedy = [outcome.greedy for outcome in entry.outcomes]
        retained = [
            {name: 100 * metrics[name] / teacher.greedy[name] for name in RETAINED if teacher.greedy.get(name)}
            for metrics in greedy
        ]
        rows.append(
            {
                "model": entry.name,
                "learning_rate": entry.learning_rate,
                "at_the_edge": entry.at_the_edge,
                "seeds": entry.seeds,
                "failed_seeds": entry.failed_seeds,
                "missing_seeds": entry.missing_seeds,
                "greedy": _over_seeds(greedy),
                "sampled": _over_seeds([outcome.sampled for outcome in entry.outcomes]),
                "retention": _over_seeds(retained),
                "cost": _over_seeds([{name: cost[name] for name in COSTS} for cost in entry.costs]),
                "difference": {
                    metric: paired_difference(of_entry[metric], of_baseline[metric])._asdict()
                    for metric in sorted(of_entry.keys() & of_baseline.keys())
                },
            }
        )
    return rows


def _over_seeds(per_seed: Sequence[Mapping[str, float]]) -> dict[str, dict]:
    names = set.intersection(*map(set, per_seed)) if per_seed else set()
    intervals = {}
    for name in sorted(names):
        values = [metrics[name] for metrics in per_seed]
        intervals[name] = {**mean_interval(values)._asdict(), "values": values}
    return intervals
