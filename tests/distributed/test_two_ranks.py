"""Two processes and one, on the same global batch: the same losses, gradient norms and weights."""

import pytest

from tests.distributed import worker
from tests.distributed.launching import launch
from tests.trainers.tiny_runs import assert_same_weights, largest_difference

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    return launch("tests.distributed.worker", tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> dict:
    return launch("tests.distributed.worker", tmp_path_factory.mktemp("one"), 1)[0]


@pytest.mark.parametrize("name", worker.CASES)
def test_two_ranks_train_as_one(name, two_ranks, one_rank):
    """By hand: with denominators, counts or moments of one rank alone, every case here fails."""
    first, second, single = two_ranks[0][name], two_ranks[1][name], one_rank[name]
    assert_same_weights(second["weights"], first["weights"])

    tokens = list(zip(first["tokens"], second["tokens"], strict=True))
    assert [sum(pair) for pair in tokens] == single["tokens"], "the ranks sampled something else"
    assert any(one != other for one, other in tokens), "the test needs ranks with different numbers of tokens"

    assert (
        first["cost"]["generated_tokens"] == second["cost"]["generated_tokens"] == single["cost"]["generated_tokens"]
    )
    assert first["cost"]["cpu_seconds"] == second["cost"]["cpu_seconds"], "of both"

    assert len(first["logs"]) == len(single["logs"]) >= 3
    for step, (two, one) in enumerate(zip(first["logs"], single["logs"], strict=True)):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5), f"step {step}"
    assert_same_weights(first["weights"], single["weights"], rtol=1e-4, atol=1e-5)
    assert largest_difference(single["weights"], single["first_weights"]) > 1e-3, "nothing was learnt"
    clipped_at = dict(worker.CASES[name].settings).get("max_grad_norm", worker.COMMON["max_grad_norm"])
    assert max(entry["grad_norm"] for entry in single["logs"]) > clipped_at, "clipping must be on"


def test_adaptive_beta_moves(one_rank):
    """Or the case above shows nothing: by its own rank's KL, each process would go on with another beta.

    An error of more than a fifth of the target counts as a fifth, on which the ranks could agree.
    """
    logs = one_rank["rloo-token-adaptive-kl"]["logs"]
    assert len({entry["beta"] for entry in logs}) == 3
    assert abs(logs[1]["kl"] / worker.KL_TARGET - 1) < 0.2


def test_the_cpu_seconds_of_all_processes_are_the_budget(two_ranks, one_rank):
    """A step costs 2 + 1 on two processes, 2 on one; the wall's clock, with 9 a step, counts for nothing."""
    for results, per_step, steps in ((two_ranks[0], 3.0, (1, 2, 5)), (two_ranks[1], 3.0, (1, 2, 5)),
                                     (one_rank, 2.0, (2, 2, 5))):  # fmt: skip
        for budget, expected in zip(worker.BUDGETS, steps, strict=True):
            cost = results["cost by budget"][budget]
            assert cost["optimizer_steps"] == expected
            assert cost["cpu_seconds"] == pytest.approx(per_step * expected)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_of_nan_on_one_process_is_skipped_by_both(accumulation, two_ranks):
    first, second = (results["not finite"][accumulation] for results in two_ranks)
    for name, skipped in (("skipped", 1), ("stopped", 2)):
        assert first[name]["steps_skipped"] == second[name]["steps_skipped"] == skipped
        for one, other in zip(first[name]["weights"], second[name]["weights"], strict=True):
            assert_same_weights(one, other)
        assert_same_weights(first[name]["weights"][1], first[name]["weights"][0])
        assert all(weight.isfinite().all() for weight in first[name]["weights"][-1].values())
    assert largest_difference(first["skipped"]["weights"][2], first["skipped"]["weights"][1]) > 0
    for found, reason in ((first, "the loss of another process not finite"), (second, "the loss not finite")):
        assert "stopped at step 3: the last 2 steps were skipped" in found["error"] and reason in found["error"]


def test_samples_are_dropped_on_both(two_ranks):
    """Or the cases above show nothing."""
    for name in ("ppo-dropped", "rloo-token-dropped", "rloo-sequence-misread", "kd-misread"):
        assert any(entry.get("samples_dropped", 0) > 1 for entry in two_ranks[0][name]["logs"])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", ["rloo-sequence", "kd"])
def test_a_process_without_any_sample_leaves_the_step_to_the_other(method, accumulation, two_ranks, one_rank):
    first, second = (results["without half"][method, accumulation] for results in two_ranks)
    single = one_rank["without half"][method, 1]
    assert [log["samples_dropped"] for log in first["logs"]] == [None, 4.0, None]
    for two, one in zip(first["logs"], single["logs"], strict=True):
        assert {k: v for k, v in two.items() if v is not None} == pytest.approx(
            {k: v for k, v in one.items() if v is not None}, rel=1e-4, abs=1e-5
        )
    for step in range(3):
        assert_same_weights(second["weights"][step], first["weights"][step])
        assert_same_weights(first["weights"][step], single["weights"][step], rtol=1e-4, atol=1e-5)


def test_only_the_first_process_is_asked(two_ranks, one_rank):
    for results in (*two_ranks, one_rank):
        assert results["asked"]["found"] == ("found", {"by": 0})
    assert [results["asked"]["calls"] for results in (*two_ranks, one_rank)] == [[1, 2], [], [1, 2]]
