"""ZeRO-3 teachers and students on two processes, against whole models and one process."""

import os
import time
from pathlib import Path

import peft
import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from safetensors.torch import load_file
from torch.utils.cpp_extension import get_default_build_root
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from rlkd_trl.teachers import placement
from tests.distributed import dying_worker, files_worker, sharded_worker
from tests.distributed.forked_launchers import launched
from tests.distributed.launching import ENVIRONMENT, launch, without_launcher
from tests.distributed.sharded_worker import save_checkpoints
from tests.tiny_models import MODELS
from tests.trainers.tiny_runs import assert_same_weights, largest_difference

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    return launch("tests.distributed.sharded_worker", tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> dict:
    return launch("tests.distributed.sharded_worker", tmp_path_factory.mktemp("one"), 1)[0]


@pytest.mark.parametrize("family", sharded_worker.TEACHERS)
def test_a_sharded_teacher_is_the_whole_one_to_the_last_bit(family, two_ranks):
    for rank, results in enumerate(two_ranks):
        teacher = results["teachers"][family]
        assert teacher["found"].keys() == teacher["expected"].keys()
        for name, value in teacher["expected"].items():
            assert torch.equal(teacher["found"][name], value), f"{name} on rank {rank}"
    first, second = (results["teachers"][family]["found"]["chosen0"] for results in two_ranks)
    assert first.shape != second.shape, "the test needs ranks with different batches"


@pytest.mark.parametrize("family", sharded_worker.TEACHERS)
def test_no_process_ever_holds_the_whole_teacher(family, two_ranks):
    for results in two_ranks:
        teacher = results["teachers"][family]
        at_start, *after_use = teacher["held"]
        assert 0 < at_start <= 0.55 * teacher["whole"]
        assert set(after_use) == {at_start} and set(teacher["gathered"]) == {0}, "nothing stays gathered between calls"
        # While loading, besides its shards: one layer's weights, or the embeddings that may be tied.
        assert 0 < teacher["gathered at load"] < 0.25 * teacher["whole"]
        assert f"sharded (zero3), float32, not quantised, {at_start:,} bytes" in teacher["said"]


RUNS = [(name, mode) for name, case in sharded_worker.CASES.items() for mode in case.modes]


@pytest.mark.parametrize(("name", "mode"), RUNS)
def test_every_parallelism_trains_as_one_process_does(name, mode, two_ranks, one_rank):
    """Metrics to a relative 1e-4 (seen: 8e-6), weights to 1e-6 (seen: 1.2e-7, float32's rounding at 1)."""
    runs, single = [results["runs"][name, mode] for results in two_ranks], one_rank["runs"][name, "one"]
    assert runs[0]["kind"] == {"ddp": "MULTI_CPU"}.get(mode, "DEEPSPEED"), "another parallelism than was asked for"
    assert runs[0]["lengths"] + runs[1]["lengths"] == single["lengths"], "the ranks sampled something else"
    assert sum(runs[0]["lengths"]) != sum(runs[1]["lengths"]), "the test needs ranks with different numbers of tokens"
    assert len(single["logs"]) == 3
    for run in runs:
        for step, (found, expected) in enumerate(zip(run["logs"], single["logs"], strict=True)):
            assert metrics(found) == pytest.approx(metrics(expected), rel=1e-4, abs=1e-5), f"step {step}"
        assert metrics(run["evaluation"]) == pytest.approx(metrics(single["evaluation"]), rel=1e-4, abs=1e-5)
    case = sharded_worker.CASES[name]
    found, expected = saved_weights(runs[0]["saved"], case), saved_weights(single["saved"], case)
    assert_same_weights(found, expected, rtol=1e-5, atol=1e-6)
    if case.method == "ppo":
        heads = [load_file(Path(saved["saved"]) / "value_head.safetensors") for saved in (runs[0], single)]
        assert_same_weights(*heads, rtol=1e-5, atol=1e-6)


def metrics(entry: dict) -> dict[str, float]:
    """Without what depends on the clock."""
    return {key: value for key, value in entry.items() if not key.startswith(("seconds/", "tokens_per_second"))}


def saved_weights(directory: str, case: sharded_worker.Case) -> dict[str, torch.Tensor]:
    """What plain transformers loads, or PEFT for adapters."""
    if case.lora:
        return peft.load_peft_weights(directory)
    auto_class = AutoModelForCausalLM if case.family == "llama" else AutoModelForSeq2SeqLM
    return auto_class.from_pretrained(directory).state_dict()


@pytest.mark.parametrize("name", [name for name, mode in RUNS if mode == "zero3"])
def test_a_student_under_zero3_is_in_pieces_after_every_phase(name, two_ranks, one_rank):
    whole = one_rank["runs"][name, "one"]["held"]
    for results in two_ranks:
        assert results["runs"][name, "zero3"]["held"] <= 0.55 * whole


def test_the_uneven_case_is_uneven(two_ranks):
    """One rank's completions are all one token long: it would call the decoder once, the other one twice."""
    lengths = [max(results["runs"]["rloo-uneven", "zero3"]["lengths"]) for results in two_ranks]
    assert lengths[0] == 1 < lengths[1]


@pytest.mark.parametrize("name", sharded_worker.RESUMED)
def test_a_resumed_run_under_zero3_ends_where_a_whole_one_does(name, two_ranks):
    whole, resumed = two_ranks[0]["resumed"][name]
    case = sharded_worker.CASES[name]
    assert_same_weights(saved_weights(resumed, case), saved_weights(whole, case))
    start = MODELS[case.family]().state_dict()
    assert largest_difference(saved_weights(whole, case), start) > 1e-3, "nothing was learnt"


def test_the_best_checkpoint_of_a_run_under_zero3_is_loaded_at_its_end(two_ranks):
    case = sharded_worker.CASES["ppo"]
    for results in two_ranks:
        best = results["best"]
        assert best["metric"] == pytest.approx(best["best metric"], rel=1e-6)
        found, expected, last = (saved_weights(best[name], case) for name in ("saved", "best", "last"))
        assert_same_weights(found, expected)
        assert largest_difference(last, expected) > 1e-3, "the test needs a best checkpoint that is not the last"


def test_one_process_alone_parks_its_teacher_in_cpu_memory(tmp_path):
    """Without a launcher; the shard is the whole model."""
    save_checkpoints(tmp_path)
    found = without_launcher("tests.distributed.offload_worker", tmp_path)
    assert set(found) == set(sharded_worker.TEACHERS)
    for family, results in found.items():
        assert results["found"].keys() == results["expected"].keys() and results["expected"]
        for name, value in results["expected"].items():
            assert torch.equal(results["found"][name], value), f"{name} of {family}"
        assert "sharded, parked in CPU memory" in results["said"]


@pytest.mark.parametrize("family", files_worker.WIDE)
def test_a_teacher_in_files_is_the_whole_one_to_the_last_bit(family, tmp_path):
    if not AsyncIOBuilder().is_compatible():
        pytest.skip("DeepSpeed writes shards to files with libaio, which is not installed")
    if not any(Path(get_default_build_root()).glob("*/async_io/async_io.so")):
        pytest.skip("DeepSpeed would compile its async_io for minutes: load `AsyncIOBuilder` once before")
    if not placement._can_lock(2 * 10**9):
        pytest.skip("This process may not lock the 2 GB that DeepSpeed's buffers take (ulimit -l)")
    results = launch("tests.distributed.files_worker", tmp_path, 2, family)
    for rank, result in enumerate(results):
        assert result["found"].keys() == result["expected"].keys()
        for name, value in result["expected"].items():
            assert torch.equal(result["found"][name], value), f"{name} on rank {rank}"
        at_start, after_use = result["held"]
        assert at_start == after_use
        assert result["in files"] + sum(other["held"][0] for other in results) >= result["whole"]
        assert at_start < 0.1 * result["whole"] and result["in files"] > 0.8 * result["whole"]
        assert f"sharded, parked in {tmp_path / 'files'}, float32, not quantised, {at_start:,} bytes" in result["said"]


def test_a_process_that_dies_ends_the_others(tmp_path):
    """As when the machine runs out of memory; the survivor waits for weights of the dead one."""
    command = f"torchrun --standalone --nproc_per_node 2 {dying_worker.__file__} {tmp_path}"
    finished = launched(command, directory=tmp_path, environment=ENVIRONMENT)
    seconds = time.time() - os.path.getmtime(tmp_path / dying_worker.LAST_WORDS)
    assert finished.returncode != 0
    assert seconds < 60
    assert "Signal 9 (SIGKILL) received by PID" in finished.stderr and "rank      : 1" in finished.stderr
    assert (tmp_path / dying_worker.WAITING).is_file() and not (tmp_path / dying_worker.SURVIVED).exists()
