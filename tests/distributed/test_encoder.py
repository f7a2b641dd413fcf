"""Encoder distillation on two processes, replicated or sharded, trains as one process does."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed import encoder_worker
from tests.distributed.launching import launch
from tests.trainers.tiny_runs import assert_same_weights, largest_difference

pytestmark = pytest.mark.slow

RUNS = [(name, mode) for name, (*_, modes) in encoder_worker.CASES.items() for mode in modes]
TIMES = ("runtime", "per_second", "epoch")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    return launch("tests.distributed.encoder_worker", tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> dict:
    return launch("tests.distributed.encoder_worker", tmp_path_factory.mktemp("one"), 1)[0]


def numbers(entry: dict) -> dict[str, float]:
    return {name: value for name, value in entry.items() if not any(time in name for time in TIMES)}


@pytest.mark.parametrize(("name", "mode"), RUNS)
def test_every_parallelism_trains_as_one_process_does(name, mode, two_ranks, one_rank):
    """The losses of each step, and the weights; with counts of one process alone, every case fails."""
    single = one_rank[name, "one"]
    assert len(single["logs"]) == 3
    for results in two_ranks:
        run = results[name, mode]
        assert run["kind"] == ("MULTI_CPU" if mode in ("ddp", "accumulated") else "DEEPSPEED")
        for step, (found, expected) in enumerate(zip(run["logs"], single["logs"], strict=True)):
            assert numbers(found) == pytest.approx(numbers(expected), rel=2e-4, abs=1e-5), f"step {step}"
        assert numbers(run["evaluation"]) == pytest.approx(numbers(single["evaluation"]), rel=2e-4, abs=1e-5)
    saved = [load_file(Path(run["saved"]) / "model.safetensors") for run in (two_ranks[0][name, mode], single)]
    assert_same_weights(*saved, rtol=1e-4, atol=1e-5)
    learnt = {weight: single["before"][weight] for weight in saved[1]}
    assert largest_difference(saved[1], learnt) > 1e-3, "nothing was learnt"
    if name == "projected":
        projections = [
            load_file(Path(run["saved"]) / "projections.safetensors") for run in (two_ranks[0][name, mode], single)
        ]
        assert_same_weights(*projections, rtol=1e-4, atol=1e-5)
