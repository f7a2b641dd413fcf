"""Two processes and one, on the same global batch: the same losses, gradient norms and weights."""

import pytest

from tests.distributed import worker
from tests.distributed.launching import launch
from tests.trainers.tiny_runs import assert_same_weights, largest_difference

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    return launch("worker", tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> dict:
    return launch("worker", tmp_path_factory.mktemp("one"), 1)[0]


@pytest.mark.parametrize("name", worker.CASES)
def test_two_ranks_train_as_one(name, two_ranks, one_rank):
    """By hand: with denominators, counts or moments of one rank alone, every case here fails."""
    first, second, single = two_ranks[0][name], two_ranks[1][name], one_rank[name]
    assert_same_weights(second["weights"], first["weights"])

    tokens = list(zip(first["tokens"], second["tokens"], strict=True))
    assert [sum(pair) for pair in tokens] == single["tokens"], "the ranks sampled something else"
    assert any(one != other for one, other in tokens), "the test needs ranks with different numbers of tokens"

    assert len(first["logs"]) == len(single["logs"]) >= 3
    for step, (two, one) in enumerate(zip(first["logs"], single["logs"], strict=True)):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5), f"step {step}"
    assert_same_weights(first["weights"], single["weights"], rtol=1e-4, atol=1e-5)
    assert largest_difference(single["weights"], single["first_weights"]) > 1e-3, "nothing was learnt"
    assert max(entry["grad_norm"] for entry in single["logs"]) > worker.COMMON["max_grad_norm"], "clipping must be on"
