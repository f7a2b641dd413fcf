"""What is recommended when, and what is said with it."""

import logging
from dataclasses import replace

import pytest
import torch
from transformers import BitsAndBytesConfig, T5ForConditionalGeneration

from rlkd_trl.planning.activations import Workload
from rlkd_trl.planning.advice import LOGIT_ERRORS, advice, fitting_choices
from rlkd_trl.planning.estimates import Cluster, StudentBytes, TeacherBytes, peak_bytes
from tests.planning.models import t5

GIB = 2**30
# A teacher of 40 GiB in float32 on four ranks, with round numbers.
TEACHERS = [
    TeacherBytes("replicated", "float32", "none", weights=40 * GIB, gathered=0, scoring=4 * GIB, host=0),
    TeacherBytes("replicated", "bfloat16", "none", weights=20 * GIB, gathered=0, scoring=2 * GIB, host=0),
    TeacherBytes("replicated", "bfloat16", "int8", weights=12 * GIB, gathered=0, scoring=2 * GIB, host=0),
    TeacherBytes("replicated", "bfloat16", "nf4", weights=1 * GIB, gathered=0, scoring=2 * GIB, host=0),
    TeacherBytes("zero3", "float32", "none", weights=10 * GIB, gathered=2 * GIB, scoring=4 * GIB, host=0),
    TeacherBytes("zero3", "bfloat16", "none", weights=5 * GIB, gathered=1 * GIB, scoring=2 * GIB, host=0),
    TeacherBytes("offload", "float32", "none", weights=0, gathered=4 * GIB, scoring=4 * GIB, host=40 * GIB),
    TeacherBytes("offload", "bfloat16", "none", weights=0, gathered=2 * GIB, scoring=2 * GIB, host=20 * GIB),
]
DDP = StudentBytes(
    "ddp",
    weights=1 * GIB,
    gathered=0,
    gradients=2 * GIB,
    optimizer=2 * GIB,
    value_head=0,
    reference=0,
    update=3 * GIB,
    log_probs=1 * GIB,
    sampling=1 * GIB,
    cache=GIB // 2,
)
ZERO2 = replace(DDP, sharding="zero2", gradients=1 * GIB, optimizer=1 * GIB)
WORKLOAD = Workload(64, 64, 4, 64, 2, 1024)  # 32 prompts in a rollout, 2 in a scoring batch of 1024 tokens


def cluster(gpu_memory: float, *, gpus: int = 4, nodes: int = 1, reserve: float = 0.0) -> Cluster:
    return Cluster(gpus, nodes, int(gpu_memory * GIB), reserve)


def text(cluster: Cluster, students=(DDP, ZERO2), teachers=TEACHERS) -> str:
    """Without line breaks."""
    return " ".join(advice(teachers, students, cluster, WORKLOAD).split())


def test_the_peak_is_what_is_held_and_the_largest_phase():
    # held 20 + 5; scoring 2, update 3, sampling 1
    assert peak_bytes(TEACHERS[1], DDP) == 28 * GIB
    # held 5 + 5; scoring gathers 1 + 2, as much as the update
    assert peak_bytes(TEACHERS[5], DDP) == 13 * GIB
    # held 0 + 5; scoring gathers 4 + 4
    assert peak_bytes(TEACHERS[6], DDP) == 13 * GIB
    # the student's own gathering counts in its update: held 5, 2 + 3 against 4
    assert peak_bytes(TEACHERS[7], replace(DDP, gathered=2 * GIB)) == 10 * GIB
    assert peak_bytes(TEACHERS[7], replace(DDP, reference=7 * GIB, value_head=GIB)) == 17 * GIB


# (usable GiB, what is recommended). Peaks beside DDP: bfloat16 28, int8 20, zero3 13, offload 9, nf4 9; ZeRO-2 less 2.
@pytest.mark.parametrize(
    ("memory", "placement", "precision", "sharding"),
    [
        (80, "replicated", "bfloat16", "ddp"),
        (28, "replicated", "bfloat16", "ddp"),
        (27, "replicated", "bfloat16", "zero2"),
        (25, "replicated", "int8", "ddp"),
        (18, "replicated", "int8", "zero2"),
        (17, "zero3", "bfloat16", "ddp"),
        (10, "offload", "bfloat16", "ddp"),
    ],
)
def test_the_first_that_fits(memory, placement, precision, sharding):
    best = fitting_choices(TEACHERS, [DDP, ZERO2], cluster(memory))[0]
    assert (best.teacher.placement, best.teacher.precision) == (placement, precision)
    assert best.student.sharding == sharding


def test_nf4_is_the_last_resort():
    without_offload = [teacher for teacher in TEACHERS if teacher.placement != "offload"]
    (only,) = fitting_choices(without_offload, [DDP], cluster(10))
    assert only.flags == "--teacher_placement replicated --teacher_dtype bfloat16 --teacher_quantization nf4"
    assert "Without quantisation, nothing fits" in text(cluster(10), [DDP], without_offload)


def test_the_reserve_stays_free():
    assert fitting_choices(TEACHERS, [DDP], cluster(28, reserve=0.1))[0].teacher.precision == "int8"


def test_a_whole_teacher_in_bfloat16():
    said = text(cluster(80))
    assert "rlkd-trl --config_file multi_gpu --num_processes 4 ppo_kd" in said
    assert "--teacher_placement replicated --teacher_dtype bfloat16 ..." in said
    assert "28.0 of the 80.0 GiB" in said
    # three quarters of 20 GiB; 32 prompts, 2 at a time
    assert "gather at least 15.0 GiB for each of the 16 scoring batches" in said
    assert "float32 fits too (--teacher_dtype float32)" in said
    assert "quantis" not in said
    assert "float32 does not fit" in text(cluster(30))


def test_quantisation_is_never_silent():
    said = text(cluster(25))
    assert "--teacher_quantization int8" in said
    assert "int8 CHANGES THE REWARDS: logits move by about 2%" in said
    assert "Without quantisation: multi_gpu with --teacher_placement zero3 --teacher_dtype bfloat16." in said


def test_a_shared_teacher():
    said = text(cluster(17))
    assert "--teacher_placement zero3 --teacher_dtype bfloat16" in said
    assert "holds a share and gathers at least 15.0 GiB" in said


def test_a_teacher_in_cpu_memory():
    said = text(cluster(10))
    assert "--teacher_placement offload" in said
    assert "20.0 GiB on each node" in said and "20.0 GiB pass over the bus" in said


def test_a_sharded_student():
    said = text(cluster(27))
    assert "--config_file zero2 " in said
    assert "sharded by zero2, the least sharding with which this fits" in said


def test_one_gpu():
    alone = [teacher for teacher in TEACHERS if teacher.placement != "zero3"]
    said = text(cluster(80, gpus=1), [DDP], alone)
    assert "--config_file single_gpu --num_processes 1 " in said
    assert "gather" not in said


def test_several_nodes():
    said = text(cluster(80, nodes=2))
    assert "--config_file multi_gpu --num_processes 8 " in said
    flags = "--num_machines, --machine_rank, --main_process_ip and --main_process_port"
    assert f"Over 2 nodes: on each of them, give {flags} too" in " ".join(said.split())
    zero3 = replace(DDP, sharding="zero3")
    assert "--config_file zero3_multi_node " in text(cluster(80, nodes=2), [zero3])


@pytest.mark.parametrize(
    ("student", "remedy"),
    [
        (replace(DDP, update=50 * GIB), "lower --per_device_train_batch_size"),
        (replace(DDP, log_probs=50 * GIB), "lower --local_rollout_forward_batch_size"),
        (replace(DDP, sampling=50 * GIB, cache=49 * GIB), "lower --sampling_batch_size"),
        (replace(DDP, weights=8 * GIB, sampling=40 * GIB), "a smaller student"),  # gathered weights, mostly
        (replace(DDP, optimizer=50 * GIB), "a smaller student"),
    ],
)
def test_nothing_fits(student, remedy):
    said = text(cluster(20), [student])
    assert said.startswith("Nothing fits: the least is 5")
    assert remedy in said
    assert "rlkd-trl" not in said


def test_nothing_fits_for_the_teachers_sake():
    scoring = [replace(teacher, scoring=50 * GIB) for teacher in TEACHERS]
    assert "lower --teacher_batch_tokens" in text(cluster(20), [DDP], scoring)
    assert "a smaller teacher" in text(cluster(20), [DDP], TEACHERS[:1])


@pytest.mark.slow
def test_the_logit_errors_that_are_quoted(tmp_path):
    """Of the same kind of model: within half and twice what is said."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    torch.manual_seed(0)
    t5(tied=False).save_pretrained(tmp_path)
    quantizers = {
        "float32": None,
        "bfloat16": None,
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    }
    ids = torch.randint(3, 1000, (8, 32))
    logits = {}
    for name, quantizer in quantizers.items():
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        model = T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype, quantization_config=quantizer)
        with torch.no_grad():
            logits[name] = model(input_ids=ids, decoder_input_ids=ids).logits.float()
    for name, quoted in LOGIT_ERRORS.items():
        error = float((logits[name] - logits["float32"]).norm() / logits["float32"].norm())
        assert quoted / 2 < error < 2 * quoted, f"{name}: {error:.4f}"
