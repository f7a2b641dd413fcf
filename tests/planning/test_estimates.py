"""Estimates for one placement or sharding against another's."""

import logging

import peft
import pytest
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rlkd_trl.planning import estimates
from rlkd_trl.planning.activations import Workload
from rlkd_trl.planning.adapters import Adapters
from rlkd_trl.planning.estimates import (
    Cluster,
    TeacherBytes,
    Training,
    peak_bytes,
    student_estimates,
    teacher_estimates,
)
from rlkd_trl.planning.skeletons import Checkpoint
from tests.planning.measured import weight_bytes
from tests.planning.models import MODELS, T5_BASE, checkpoint_of, llama, write_config

# Few and very wide layers, which are quick to build: t5-base's fields, D = 16384, F = 32768, A = 64, V = 100, tied.
# Embeddings VD, an encoder layer 4DA + 2DF + 2D, a decoder layer 8DA + 2DF + 3D, relative positions 2 · 32, norms 2D:
# 1,638,400 + (4,194,304 + 1,073,741,824 + 32,768) + (8,388,608 + 1,073,741,824 + 49,152) + 64 + 32,768
WIDE = {**T5_BASE, "d_model": 16384, "d_ff": 32768, "num_layers": 1, "num_heads": 1, "vocab_size": 100}
PARAMETERS = 1_638_400 + 1_077_968_896 + 1_082_179_584 + 64 + 32_768
# The same with D = A = 64 and F = 96, two matrices in each feed-forward layer:
# VD = 6,400 (twice if untied), 12DA + 4DF + 5D = 74,048 in layers, 64 relative positions, norms 2D = 128
SMALL = {**WIDE, "d_model": 64, "d_ff": 96}
OF_LAYERS, HEAD = 74_048 + 64 + 128, 6_400
NO_TEACHER = TeacherBytes("replicated", "float32", "none", weights=0, gathered=0, scoring=0, host=0)


@pytest.mark.parametrize(("critic", "copies", "bf16", "itemsize"), [("shared", 1, False, 4), ("separate", 2, True, 2)])
@pytest.mark.slow(0.5)
def test_a_student_in_shards_is_whole_while_it_samples(critic, copies, bf16, itemsize, tmp_path, monkeypatch):
    """Of more parameters than may be live in an update; a separate critic is in the same engine, and gathered too."""
    assert PARAMETERS > 2 * 10**9
    for name in ("update_bytes", "log_prob_bytes"):  # seconds, and not of interest
        monkeypatch.setattr(estimates, name, lambda *args, **settings: 0)
    checkpoint = Checkpoint.of("--student", str(write_config(tmp_path, WIDE)))
    assert checkpoint.num_parameters == PARAMETERS
    workload, cluster = Workload(8, 4, 2, 4, 1, 64), Cluster(gpus=4, nodes=1, gpu_memory=80 * 2**30, reserve=0.0)
    ddp, zero1, zero2, zero3 = student_estimates(checkpoint, workload, cluster, Training(bf16=bf16, critic=critic))
    assert ddp.sampling == zero1.sampling == zero2.sampling
    elsewhere = copies * PARAMETERS * itemsize * 3 // 4
    assert zero3.sampling == ddp.sampling + elsewhere
    assert zero3.gathered == 10**9 * itemsize * 3 // 4, "in an update"
    assert peak_bytes(NO_TEACHER, zero3) >= zero3.always_held + elsewhere


def test_a_teachers_shares_on_two_nodes(tmp_path, monkeypatch):
    """Of 4 ranks, 2 on each node: a quarter of the weights on each GPU, or half of them in each node's CPU memory."""
    monkeypatch.setattr(estimates, "scoring_bytes", lambda *args, **settings: 7)
    config = write_config(tmp_path, {**SMALL, "tie_word_embeddings": True})
    cluster = Cluster(gpus=2, nodes=2, gpu_memory=2**30, reserve=0.0)
    of_all = teacher_estimates(Checkpoint.of("--teacher", str(config)), Workload(8, 4, 2, 4, 1, 64), cluster)
    plain = {(t.placement, t.dtype): t for t in of_all if t.quantization == "none"}
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        nbytes = itemsize * (OF_LAYERS + HEAD)
        replicated, zero3, offload = (plain[name, dtype] for name in ("replicated", "zero3", "offload"))
        assert (replicated.weights, replicated.gathered, replicated.host) == (nbytes, 0, 0)
        assert (zero3.weights, zero3.gathered, zero3.host) == (nbytes // 4, nbytes - nbytes // 4, 0)
        assert (offload.weights, offload.gathered, offload.host) == (0, nbytes, nbytes // 4 * 2)


@pytest.mark.parametrize(
    ("architecture", "most", "gathers"), [("llama", 0.25, 1.75), ("llama", 2, 1), ("t5", 0.25, 1)]
)
def test_a_decoder_only_teacher_beyond_deepspeeds_limit_is_gathered_twice(
    architecture, most, gathers, tmp_path, monkeypatch
):
    """For the prompts and for the completions, but for what stays; of an encoder-decoder each part reads once.

    most: the limit, in shares of the teacher's parameters.
    """
    monkeypatch.setattr(estimates, "scoring_bytes", lambda *args, **settings: 7)
    checkpoint = checkpoint_of(MODELS[{"llama": "llama", "t5": "t5-tied"}[architecture]](), tmp_path)
    monkeypatch.setattr(estimates, "MAX_LIVE_PARAMETERS", most * checkpoint.num_parameters)
    cluster = Cluster(gpus=2, nodes=1, gpu_memory=2**30, reserve=0.0)
    found = teacher_estimates(checkpoint, Workload(8, 4, 2, 4, 1, 64), cluster)
    assert {round(teacher.gathers, 9) for teacher in found} == {gathers}


@pytest.mark.parametrize("tied", [True, False])
def test_a_separate_critics_own_head_is_frozen(tied, tmp_path, monkeypatch):
    """Which is a matrix of its own only where the head is not tied: no gradient, no moments."""
    for name, found in (("update_bytes", 0), ("log_prob_bytes", 0), ("sampling_bytes", (0, 0))):
        monkeypatch.setattr(
            estimates, name, lambda *args, found=found, **settings: found
        )  # seconds, and not of interest
    checkpoint = Checkpoint.of("--student", str(write_config(tmp_path, {**SMALL, "tie_word_embeddings": tied})))
    workload, cluster = Workload(8, 4, 2, 4, 1, 64), Cluster(gpus=1, nodes=1, gpu_memory=2**30, reserve=0.0)
    (both,) = student_estimates(checkpoint, workload, cluster, Training(critic="separate", beta=0.1))
    parameters = OF_LAYERS + (HEAD if tied else 2 * HEAD)
    trained = 2 * parameters - (0 if tied else HEAD)
    assert (both.weights, both.gradients, both.optimizer) == (8 * parameters, 4 * trained, 8 * trained)
    assert both.reference == 4 * parameters, "the student's alone"
    assert both.value_head == 4 * 4 * 65, "weights and bias, gradients and two moments"
    (shared,) = student_estimates(checkpoint, workload, cluster, Training())
    assert (shared.weights, shared.gradients, shared.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
    assert shared.reference == 0


LORA = Adapters(lora_r=2, lora_target_modules=["q", "v"])
# Queries and values of three attentions, each 64 × 64: A and B have 2 · 64 weights each.
OF_LORA = 3 * 2 * 2 * (2 * 64)


@pytest.fixture
def small(tmp_path, monkeypatch) -> Checkpoint:
    """Without activations, which take seconds to count, and are not of interest."""
    for name, found in (("update_bytes", 0), ("log_prob_bytes", 0), ("sampling_bytes", (0, 0))):
        monkeypatch.setattr(estimates, name, lambda *args, found=found, **settings: found)
    return Checkpoint.of("--student", str(write_config(tmp_path, SMALL)))


def cluster(gpus: int) -> Cluster:
    return Cluster(gpus=gpus, nodes=1, gpu_memory=2**30, reserve=0.0)


@pytest.mark.parametrize(("critic", "copies"), [("shared", 1), ("separate", 2)])
def test_adapters_alone_have_gradients_and_moments(critic, copies, small):
    """A separate critic has adapters of its own on the same frozen weights; the reference has them off."""
    workload, training = Workload(8, 4, 2, 4, 1, 64), Training(critic=critic, beta=0.1, adapters=LORA)
    (found,) = student_estimates(small, workload, cluster(1), training)
    trained = copies * OF_LORA
    assert (found.weights, found.gradients, found.optimizer) == (
        4 * (OF_LAYERS + HEAD + trained),
        4 * trained,
        8 * trained,
    )
    assert found.reference == 0
    (half,) = student_estimates(
        small, workload, cluster(1), Training("bfloat16", critic=critic, beta=0.1, adapters=LORA)
    )
    assert half.weights == 2 * (OF_LAYERS + HEAD) + 4 * trained, "adapters are in float32"


def test_adapters_in_shards(small):
    """Of four ranks; with ZeRO-3 a separate critic has frozen weights of its own, too."""
    workload = Workload(8, 4, 2, 4, 1, 64)
    ddp, _, zero2, zero3 = student_estimates(small, workload, cluster(4), Training(critic="separate", adapters=LORA))
    whole = 4 * (OF_LAYERS + HEAD + 2 * OF_LORA)
    assert ddp.weights == zero2.weights == whole
    assert zero3.weights == (whole + 4 * (OF_LAYERS + HEAD)) // 4
    assert zero2.optimizer == zero3.optimizer == 3 * 4 * 2 * OF_LORA // 4


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_weights_of_adapters_on_quantised_ones(quantization, tmp_path, monkeypatch):
    """Those of a loaded model, which is not split by ZeRO-3."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name, found in (("update_bytes", 0), ("log_prob_bytes", 0), ("sampling_bytes", (0, 0))):
        monkeypatch.setattr(estimates, name, lambda *args, found=found, **settings: found)
    llama().save_pretrained(tmp_path)
    is_int8 = quantization == "int8"
    settings = BitsAndBytesConfig(load_in_8bit=is_int8, load_in_4bit=not is_int8, bnb_4bit_quant_type="nf4")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    measured = weight_bytes(peft.get_peft_model(loaded, peft.LoraConfig(r=4, target_modules="all-linear")))
    training = Training(quantization=quantization, adapters=Adapters(4, ["all-linear"]))
    found = student_estimates(
        Checkpoint.of("--student", str(tmp_path)), Workload(8, 4, 2, 4, 1, 64), cluster(2), training
    )
    assert [student.sharding for student in found] == ["ddp", "zero1", "zero2"]
    assert found[0].weights == pytest.approx(measured, rel=0.05)
    assert found[0].update == 64 * 160 * 4, "the largest matrix, as it was"


def test_a_rollout_is_all_accumulated_micro_batches():
    """24 completions of 6 prompts; each prompt is 4 · (10 + 6) = 64 padded tokens to the teacher."""
    one = Workload(10, 6, 4, micro_batch=8, micro_batches=3, teacher_batch_tokens=200)
    assert (one.sampled_completions, one.forwarded_completions) == (24, 24)
    assert (one.scored_prompts, one.scoring_batches) == (3, 2), "3 · 64 = 192 of 200"
    limited = Workload(10, 6, 4, 8, 3, teacher_batch_tokens=10_000, sampling_batch=19, forward_batch=7)
    assert (limited.sampled_completions, limited.forwarded_completions) == (16, 7), "whole prompts are sampled"
    assert (limited.scored_prompts, limited.scoring_batches) == (6, 1)
