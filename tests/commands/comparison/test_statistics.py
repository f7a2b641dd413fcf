"""Intervals, paired differences and tables, on numbers worked by hand and against loops over texts."""

import csv
import math
import random
import statistics

import pytest
import torch

from rlkd_trl.commands.comparison.outcome import Outcome
from rlkd_trl.commands.comparison.statistics import (
    Entry,
    input_statistics,
    mean_interval,
    paired_difference,
    resample_weights,
    score_of_sums,
    student_t_critical,
    summarise,
    system_scores,
)
from rlkd_trl.commands.comparison.tables import (
    budget_section,
    csv_text,
    failure_section,
    learning_rate_section,
    more_seeds,
)
from rlkd_trl.evaluation.metrics import bleu, rouge
from tests.evaluation.test_metrics import BLEU_BY_HAND, OUTPUTS, REFERENCES


def outcome(outputs, references=None, nll=None, tokens=None, **greedy) -> Outcome:
    """Of these greedy texts; by default a token per word, and as many nats."""
    tokens = tokens or [len(text.split()) for text in outputs]
    nll = nll or [float(n) for n in tokens]
    inputs = [
        {
            "prompt": f"p{i}",
            "references": [] if references is None else references[i],
            "greedy": text,
            "samples": [text, text],
            "tokens": tokens[i],
            "ended": 1.0,
            "reward": -nll[i],
            "teacher_nll": nll[i],
        }
        for i, text in enumerate(outputs)
    ]
    return Outcome(greedy, {"self_bleu": 100.0}, inputs)


@pytest.mark.parametrize(
    ("degrees", "level", "critical"),
    # Any printed table of Student's t, two-sided.
    [
        (1, 0.95, 12.706),
        (2, 0.95, 4.303),
        (3, 0.95, 3.182),
        (4, 0.95, 2.776),
        (5, 0.95, 2.571),
        (9, 0.95, 2.262),
        (30, 0.95, 2.042),
        (120, 0.95, 1.980),
        (1, 0.99, 63.657),
        (2, 0.99, 9.925),
        (7, 0.90, 1.895),
    ],
)
def test_student_t_of_the_printed_table(degrees, level, critical):
    assert student_t_critical(degrees, level) == pytest.approx(critical, abs=5e-4)


def test_mean_interval_by_hand():
    # mean 2, s = 1, t_2 = 4.3027: 4.3027 / √3 = 2.4841
    assert mean_interval([1, 2, 3]) == pytest.approx((2, 2.4841), abs=1e-4)
    # mean 1, s = √2, t_1 = 12.706: 12.706 · √2 / √2
    assert mean_interval([0, 2]) == pytest.approx((1, 12.7062), abs=1e-4)


def test_one_seed_has_no_interval():
    assert mean_interval([7.0]) == (7.0, None)
    assert mean_interval([4.0, 4.0]) == (4.0, 0.0), "two equal ones do"


def test_a_seed_that_is_not_finite_is_not_averaged_away():
    for values in ([1.0, math.nan], [math.inf, 1.0], [math.nan]):
        mean, half_width = mean_interval(values)
        assert math.isnan(mean) and half_width is None


def test_sums_over_inputs_give_the_metrics_by_hand():
    found = input_statistics(outcome(OUTPUTS, REFERENCES, nll=[3.0, 5.0], tokens=[6, 10]).inputs)
    # The counts of tests/test_metrics.py: 1- to 4-grams correct, all, and both lengths.
    assert found["bleu"].tolist() == [[5, 4, 3, 2, 5, 4, 3, 2, 5, 5], [2, 1, 0, 0, 4, 3, 2, 1, 4, 4]]
    score = {name: float(score_of_sums(name, values.sum(dim=0, keepdim=True))) for name, values in found.items()}
    assert score["bleu"] == pytest.approx(BLEU_BY_HAND)
    assert score["teacher_nll_per_sequence"] == pytest.approx(4.0)
    # 8 nats over 16 tokens, not the mean of 3/6 and 5/10 where they differ
    assert score["teacher_nll_per_token"] == pytest.approx(0.5)
    assert score["reward"] == pytest.approx(-4.0)
    assert score["length_words"] == pytest.approx(4.5)
    assert score["rougeL"] == pytest.approx(rouge(OUTPUTS, REFERENCES)["rougeL"])


def test_nll_per_token_is_of_all_tokens():
    found = input_statistics(outcome(["a", "b"], nll=[1.0, 9.0], tokens=[1, 3]).inputs)["teacher_nll_per_token"]
    assert float(score_of_sums("teacher_nll_per_token", found.sum(dim=0, keepdim=True))) == pytest.approx(10 / 4)


def test_coverage_is_of_all_the_teachers_tokens():
    inputs = outcome(["a", "b"]).inputs
    assert "nll_of_teacher_samples_per_token" not in input_statistics(inputs)
    inputs = [
        {**row, "nll_of_teacher": nll, "teacher_tokens": tokens}
        for row, nll, tokens in zip(inputs, (2.0, 9.0), (1.0, 4.0), strict=True)
    ]
    found = input_statistics(inputs)["nll_of_teacher_samples_per_token"]
    # (2 + 9) / (1 + 4)
    assert float(score_of_sums("nll_of_teacher_samples_per_token", found.sum(dim=0, keepdim=True))) == pytest.approx(
        2.2
    )


def test_without_references_there_is_no_bleu():
    assert not {"bleu", "rougeL"} & input_statistics(outcome(["a b", "c"]).inputs).keys()
    one_missing = outcome(["a b", "c"], [["a"], []])
    assert not {"bleu", "rougeL"} & input_statistics(one_missing.inputs).keys()


def test_resamples_draw_as_many_inputs_with_replacement():
    weights_BN = resample_weights(20, 500)
    assert weights_BN.shape == (501, 20)
    assert (weights_BN[0] == 1).all(), "the data as they are"
    assert (weights_BN.sum(dim=1) == 20).all()
    # An input is left out of a resample with probability (1 − 1/20)^20 = 0.358; ± 0.02 is 4 standard errors.
    assert float((weights_BN[1:] == 0).double().mean()) == pytest.approx(0.358, abs=0.02)
    assert torch.equal(weights_BN, resample_weights(20, 500))
    assert not torch.equal(weights_BN, resample_weights(20, 500, seed=1))


def random_texts(seed: int, count: int = 12) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices("abcd", k=rng.randint(4, 9))) for _ in range(count)]


def test_scores_of_resamples_match_corpora_of_texts():
    """The drawn texts written out, corpus BLEU of each seed, and the mean over seeds."""
    references = [[a, b] for a, b in zip(random_texts(1), random_texts(2), strict=True)]
    seeds = [random_texts(3), random_texts(4), random_texts(5)]
    weights_BN = resample_weights(12, 5)
    found = system_scores([outcome(texts, references) for texts in seeds], weights_BN)
    for b, weights_N in enumerate(weights_BN.tolist()):
        drawn = [i for i, weight in enumerate(weights_N) for _ in range(int(weight))]
        drawn_references = [references[i] for i in drawn]
        scores = [bleu([texts[i] for i in drawn], drawn_references) for texts in seeds]
        assert float(found["bleu"][b]) == pytest.approx(statistics.mean(scores))
        words = [statistics.mean(len(texts[i].split()) for i in drawn) for texts in seeds]
        assert float(found["length_words"][b]) == pytest.approx(statistics.mean(words))


def test_ends_of_the_interval_by_hand():
    # Differences 0, 1, ..., 200 in some order, and 42 on the data as they are: 2.5 % of 200 is 5, 97.5 % is 195.
    differences = [42.0, *random.Random(0).sample(range(201), 201)]
    baseline_B = torch.full((202,), 10.0, dtype=torch.float64)
    found = paired_difference(torch.tensor(differences, dtype=torch.float64) + 10, baseline_B)
    assert found == pytest.approx((42, 5, 195))


def test_the_difference_is_paired():
    """A system that costs one nat more on every input: no doubt about it, however much the inputs differ."""
    nll = [float(3**i) for i in range(8)]
    weights_BN = resample_weights(8, 200)
    worse = system_scores([outcome(["a"] * 8, nll=[x + 1 for x in nll])], weights_BN)["teacher_nll_per_sequence"]
    better = system_scores([outcome(["a"] * 8, nll=nll)], weights_BN)["teacher_nll_per_sequence"]
    assert paired_difference(worse, better) == pytest.approx((1, 1, 1))
    # Other inputs for the baseline would give an interval far wider than 1.
    unpaired = paired_difference(worse, better.flip(0))
    assert unpaired.high - unpaired.low > 100


def test_the_interval_is_that_of_a_mean_of_independent_inputs():
    """Of 400 differences with standard deviation s: ± 1.96 s / 20. The bootstrap's own noise is about 5 %."""
    rng = random.Random(0)
    nll = [rng.gauss(10, 3) for _ in range(400)]
    changed = [x + rng.gauss(0.5, 2) for x in nll]
    weights_BN = resample_weights(400, 1000)
    system, baseline = (
        system_scores([outcome(["a"] * 400, nll=values)], weights_BN)["teacher_nll_per_sequence"]
        for values in (changed, nll)
    )
    found = paired_difference(system, baseline)
    differences = [a - b for a, b in zip(changed, nll, strict=True)]
    half = 1.96 * statistics.stdev(differences) / 20
    assert found.difference == pytest.approx(statistics.mean(differences))
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)


COST = {"optimizer_steps": 400, "generated_tokens": 1e6, "cpu_seconds": 100.0, "wall_seconds": 60.0}


def entries() -> list[Entry]:
    """Lengths in words: baseline 1 and 3 (two seeds), better 4, none of the third method's runs finished."""
    teacher = Entry("teacher", [outcome(["a b c d"] * 4, bleu=50.0, rougeL=80.0)])
    baseline = [outcome(["a"] * 4, bleu=20.0, rougeL=40.0), outcome(["a b c"] * 4, bleu=30.0, rougeL=40.0)]
    longer = [outcome(["a b c d"] * 4, bleu=60.0, rougeL=40.0)]
    return [
        teacher,
        Entry("base", baseline, 1e-3, seeds=[0, 1], costs=[COST, {**COST, "cpu_seconds": 102.0}]),
        Entry("longer", longer, 5e-4, seeds=[0], costs=[COST], failed_seeds=[1]),
        Entry("broken", [], None, failed_seeds=[0, 1]),
    ]


@pytest.fixture
def rows() -> list[dict]:
    made = entries()
    return summarise(made, teacher=made[0].outcomes[0], baseline="base", num_resamples=100)


def test_summary_by_hand(rows):
    teacher, base, longer, broken = rows
    assert [row["model"] for row in rows] == ["teacher", "base", "longer", "broken"]
    # 25 ± 12.706 · 7.0711 / √2, of 50: 50 %
    bleu_of_base = base["greedy"]["bleu"]
    assert (bleu_of_base["mean"], bleu_of_base["half_width"]) == pytest.approx((25, 63.531), abs=1e-3)
    assert bleu_of_base["values"] == [20, 30]
    assert base["retention"]["bleu"]["mean"] == pytest.approx(50)
    assert base["retention"]["bleu"]["values"] == pytest.approx([40, 60])
    assert base["retention"]["rougeL"]["values"] == pytest.approx([50, 50])
    assert base["cost"]["cpu_seconds"]["mean"] == 101 and base["cost"]["optimizer_steps"]["mean"] == 400
    assert longer["greedy"]["bleu"] == {"mean": 60, "half_width": None, "values": [60]}
    # 4 words against the baseline's mean of 1 and 3, on every input alike
    assert longer["difference"]["length_words"] == pytest.approx({"difference": 2, "low": 2, "high": 2})
    assert teacher["difference"]["length_words"]["difference"] == pytest.approx(2)
    assert base["difference"] == {}
    assert broken["greedy"] == broken["difference"] == broken["cost"] == {} and broken["failed_seeds"] == [0, 1]


def test_a_baseline_without_a_finished_run(rows):
    made = entries()
    found = summarise(made, teacher=made[0].outcomes[0], baseline="broken", num_resamples=100)
    assert [row["difference"] for row in found] == [{}] * 4
    assert found[1]["greedy"] == rows[1]["greedy"]


def test_a_teacher_that_scores_nothing_retains_nothing():
    made = entries()
    nothing = outcome(["a"] * 4, bleu=0.0, rougeL=80.0)
    found = summarise(made, teacher=nothing, baseline="base", num_resamples=100)
    assert found[1]["retention"].keys() == {"rougeL"}


def test_markdown(rows):
    text = budget_section("max_steps_400", rows, baseline="base", num_samples=2)
    assert text.startswith("## max_steps_400\n")
    lines = {line.split(" | ")[0][2:]: line for line in text.split("### Difference")[0].splitlines() if "| " in line}
    assert lines["base"] == "| base | 0.001 | 25.0 ± 63.5 | 40.0 ± 0.0 | 50.0 ± 127.1 | 50.0 ± 0.0 |"
    assert lines["longer (FAILED: seed 1)"].startswith("| longer (FAILED: seed 1) | 0.0005 | 60.0 | 40.0 | 120.0 |")
    assert lines["broken (FAILED: seed 0, 1)"] == "| broken (FAILED: seed 0, 1) | – | – | – | – | – |"
    assert lines["teacher"].startswith("| teacher | – | 50.0 | 80.0 | 100.0 |")
    differences = text.split("### Difference from base")[1].split("###")[0]
    assert "**+2.0 [+2.0, +2.0]**" in differences and "| base |" not in differences
    cost = text.split("### Cost")[1]
    # 101 ± 12.706 · √2 / √2
    assert "| base | 400 ± 0 | 1,000,000 ± 0 | 101 ± 13 | 60 ± 0 |" in cost and "teacher" not in cost


def test_what_is_not_run_yet_and_not_bracketed_shows(rows):
    rows[1] |= {"missing_seeds": [2, 3], "at_the_edge": True}
    text = budget_section("b", rows, baseline="base", num_samples=2)
    assert "| base (not run yet: seed 2, 3) | 0.001 (edge) | 25.0" in text
    rows[2] |= {"missing_seeds": [5]}
    assert "| longer (FAILED: seed 1; not run yet: seed 5) | 0.0005 |" in budget_section(
        "b", rows, baseline="base", num_samples=2
    )


def test_only_a_difference_whose_interval_leaves_out_0_is_bold(rows):
    longer = rows[2]
    for low, high, bold in ((-1, 2, False), (0.5, 2, True), (-2, -0.5, True), (0, 2, False)):
        longer["difference"] = {"bleu": {"difference": 1.0, "low": low, "high": high}}
        text = budget_section("b", rows, baseline="base", num_samples=2)
        assert (f"**+1.0 [{low:+.1f}, {high:+.1f}]**" in text) == bold
        assert f"+1.0 [{low:+.1f}, {high:+.1f}]" in text


def test_learning_rates_in_markdown():
    search = {
        "budget": "max_steps_150",
        "seed": 3,
        "select_on": "bleu",
        "lower_is_better": False,
        "scores": {"ppo": {1e-3: 2.0, 5e-4: 12.0}, "kd": {5e-4: None, 1e-3: None}},
        "chosen": {"ppo": 5e-4, "kd": None},
    }
    text = learning_rate_section(search)
    assert "bleu on the validation inputs (higher is better), seed 3, max_steps_150." in text
    assert "| method | 0.0005 | 0.001 |" in text
    assert "| ppo | **12** | 2 |" in text and "| kd | – | – |" in text
    assert "Not bracketed by the grid: ppo at the lowest rate." in text
    assert "Not all rates have a finished run: kd (0 of 2)." in text


def test_a_grid_that_brackets_its_choice_says_so():
    scores = {1e-4: 1.0, 5e-4: 3.0, 1e-3: 2.0}
    search = {"budget": "b", "seed": 0, "select_on": "bleu", "lower_is_better": False}
    text = learning_rate_section({**search, "scores": {"ppo": scores}, "chosen": {"ppo": 5e-4}})
    assert "The grid brackets every choice." in text and "Not " not in text


def test_failures_in_markdown():
    text = failure_section({"runs/ppo": "it broke\n```\nhere"})
    assert "runs/ppo:" in text and "it broke\n```\nhere" in text


def test_csv(rows):
    table = list(
        csv.DictReader(csv_text({"test": {"max_steps_400": rows}, "other": {"max_steps_400": rows[:1]}}).splitlines())
    )
    found = {(row["model"], row["kind"], row["metric"]): row for row in table}
    base = found["base", "greedy", "bleu"]
    assert base["test"] == "test" and found["teacher", "greedy", "bleu"]["test"] == "other", "the last of two"
    assert (base["budget"], base["learning_rate"], base["values"]) == ("max_steps_400", "0.001", "20.0 30.0")
    assert float(base["low"]) == pytest.approx(25 - 63.531, abs=1e-3)
    assert float(base["high"]) == pytest.approx(25 + 63.531, abs=1e-3)
    assert found["longer", "greedy", "bleu"]["low"] == ""
    difference = found["longer", "difference", "length_words"]
    assert [float(difference[key]) for key in ("mean", "low", "high")] == pytest.approx([2, 2, 2])
    assert ("base", "cost", "cpu_seconds") in found and ("base", "sampled", "self_bleu") in found


def row_of(model: str, values: list[float], seeds: list[int] | None = None) -> dict:
    seeds = list(range(len(values))) if seeds is None else seeds
    return {"model": model, "seeds": seeds, "greedy": {"bleu": {"values": values}}}


def test_more_seeds_are_advised_where_intervals_are_wider_than_differences():
    """Paired by seed: what moves both alike, here by 20 BLEU, is no part of the interval."""
    # Differences d − 1, d, d + 1, so h = t(2) / √3 = 4.3027 / 1.7321 = 2.484. Wanted: t(N−1) / √N ≤ |d|.
    # d = 1: t(5) / √6 = 2.5706 / 2.4495 = 1.049, t(6) / √7 = 2.4469 / 2.6458 = 0.925.
    # d = 0.3: t(44) / √45 = 2.0154 / 6.7082 = 0.3004, t(45) / √46 = 2.0141 / 6.7823 = 0.2970. 10 ± 2.5 is clear.
    rows = [row_of("base", [30.0, 50.0, 70.0]), row_of("near", [30.0, 51.0, 72.0])]
    rows += [row_of("nearer", [28.7, 49.7, 70.7]), row_of("far", [39.0, 60.0, 81.0])]
    rows.append(row_of("nearest", [29.1, 50.1, 71.1]))
    assert more_seeds(rows, baseline="base") == [
        "Not told apart from base by these seeds, paired by seed (`--seeds` takes more):\n\n"
        "- near, BLEU: +1.0 ± 2.5; about 7 seeds would tell.\n"
        "- nearer, BLEU: -0.3 ± 2.5; about 46 seeds would tell.\n"
        "- nearest, BLEU: +0.1 ± 2.5; more than 100 seeds would tell."
    ]
    assert (
        more_seeds([rows[0], rows[3], row_of("one seed", [51.0]), row_of("teacher", [50.0], [])], baseline="base")
        == []
    )


def test_more_seeds_than_of_a_baseline_without_seeds():
    """As the warm start is one: 1 ± 4.3027 / √3."""
    rows = [row_of("warm_start", [50.0], []), row_of("a", [50.0, 51.0, 52.0])]
    assert more_seeds(rows, baseline="warm_start")[0].endswith("- a, BLEU: +1.0 ± 2.5; about 7 seeds would tell.")


def test_more_seeds_are_of_those_that_both_have():
    """Seeds 1 and 2, with differences 2 and 4: 3 ± t(1) · √2 / √2; t(3) / √4 = 1.59 is less than 3 / √2, 2.48 not."""
    rows = [row_of("base", [0.0, 50.0, 60.0]), row_of("a", [52.0, 64.0, 99.0], seeds=[1, 2, 3])]
    assert more_seeds(rows, baseline="base")[0].endswith("- a, BLEU: +3.0 ± 12.7; about 4 seeds would tell.")
