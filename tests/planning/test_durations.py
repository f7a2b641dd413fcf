"""Seconds of a step, worked by hand on a machine with round numbers, and that advice follows them."""

from dataclasses import replace

import pytest

from rlkd_trl.planning import estimates
from rlkd_trl.planning.activations import Workload
from rlkd_trl.planning.adapters import Adapters
from rlkd_trl.planning.advice import advice, fitting_choices
from rlkd_trl.planning.durations import Timing, step_seconds
from rlkd_trl.planning.estimates import (
    Cluster,
    StudentBytes,
    StudentOperations,
    TeacherBytes,
    Training,
    student_estimates,
)
from rlkd_trl.planning.machines import Machine
from rlkd_trl.planning.operations import Operation
from tests.planning.models import MODELS, checkpoint_of

MACHINE = Machine(
    memory_gib=1.0, float32=1.0, bfloat16=10.0, bandwidth=100.0, link=20.0, bus=10.0, seconds_per_operation=0.0
)
# 16 prompts × 4 completions in 2 micro-batches of 32; read 32 at a time; sampled 64 at a time; 6 scoring batches:
# 400 tokens are 3 prompts of 4 · (20 + 10), and 1 is left.
WORKLOAD = Workload(20, 10, 4, micro_batch=32, micro_batches=2, teacher_batch_tokens=400, forward_batch=32)
ALONE, FOUR = Cluster(1, 1, 2**30, 0.0), Cluster(4, 1, 2**30, 0.0)


def operation(seconds: float) -> list[Operation]:
    """That takes so long in float32."""
    return [Operation(int(seconds), 0, is_16_bit=False)]


TEACHER = TeacherBytes(
    "replicated", "bfloat16", "none", weights=800, gathered=0, scoring=0, host=0,
    unquantised=800, operations=[Operation(30, 0, is_16_bit=True)],
)  # fmt: skip
STUDENT = StudentBytes(
    "ddp", weights=100, gathered=0, gradients=0, optimizer=0, value_head=0, reference=0, update=0, log_probs=0,
    sampling=0, cache=0, num_trained=25, gradient_itemsize=4, reads_samples=True,
    operations=StudentOperations(operation(7), operation(3), operation(5), operation(1), operation(2)),
)  # fmt: skip


def test_one_gpu():
    seconds = step_seconds(TEACHER, STUDENT, WORKLOAD, ALONE, MACHINE)
    assert seconds.sampling == 5 + 9 * (1 + 2) / 2, "the first of ten tokens comes with the prompts"
    assert seconds.log_probs == 2 * 3
    assert seconds.scoring == pytest.approx(16 / 3 * 30 / 10)
    # AdamW: 7 · 4 bytes for each of 25 parameters
    assert seconds.update == 2 * 7 + 7 * 4 * 25 / 100
    assert seconds.fetching == seconds.exchange == 0
    assert seconds.total == pytest.approx(18.5 + 6 + 16 + 21)


def test_several_steps_from_a_rollout_share_its_cost():
    """By hand: 18.5 + 6 + 16 for a rollout, 21 for each update."""
    seconds = step_seconds(TEACHER, STUDENT, replace(WORKLOAD, num_iterations=2), ALONE, MACHINE)
    assert seconds.total == pytest.approx((18.5 + 6 + 16) / 2 + 21)
    assert exchange("zero3", num_iterations=3) == pytest.approx((4 + (2 + 1) / 3 + 2) * 75), "gathered for a rollout"
    text = advice([TEACHER, replace(TEACHER, dtype="float32")], [STUDENT], ALONE, WORKLOAD,
                  replace(timing(ALONE), workload=replace(WORKLOAD, num_iterations=2)))  # fmt: skip
    text = " ".join(text.split())
    # 41.25 seconds a step: 360 of them are 180 rollouts
    assert "41 s a step at full lengths, a rollout for every 2 steps (" in text and "take 4.1 GPU-hours" in text


def test_a_smaller_last_batch_launches_as_much():
    """16 prompts, 3 at a time: five batches, and one of a third, in which an operation of 3 s would take 1."""
    launched = replace(MACHINE, seconds_per_operation=2.0)
    teacher = replace(TEACHER, operations=[*TEACHER.operations, Operation(0, 100, is_16_bit=True)])
    seconds = step_seconds(teacher, STUDENT, WORKLOAD, ALONE, launched)
    assert seconds.scoring == pytest.approx(5 * (3 + 2) + 2 + 2)
    reading = replace(WORKLOAD, forward_batch=48)  # 64 completions: 48, and 16
    assert step_seconds(TEACHER, STUDENT, reading, ALONE, MACHINE).log_probs == pytest.approx(3 + 1)


def test_a_reference_reads_completions_too():
    seconds = step_seconds(TEACHER, replace(STUDENT, has_reference=True), WORKLOAD, ALONE, MACHINE)
    assert seconds.log_probs == 4 * 3


def test_where_sampling_tells_log_probabilities_only_a_reference_reads():
    student = replace(STUDENT, reads_samples=False)
    assert step_seconds(TEACHER, student, WORKLOAD, ALONE, MACHINE).log_probs == 0
    student = replace(student, has_reference=True)
    assert step_seconds(TEACHER, student, WORKLOAD, ALONE, MACHINE).log_probs == 2 * 3
    assert exchange("zero3", reads_samples=False) == pytest.approx((4 + 1 + 2) * 75)
    assert exchange("zero3", reads_samples=False, is_own_reference=True) == pytest.approx((4 + 2 + 1 + 2) * 75)
    in_float32 = Training()
    assert not in_float32.reads_samples
    for change in ({"bf16": True}, {"student_dtype": "bfloat16"}, {"critic": "separate"}, {"quantization": "nf4"}):
        assert replace(in_float32, **change).reads_samples


@pytest.mark.slow
def test_memory_for_log_probabilities_only_where_something_reads_the_samples(tmp_path, monkeypatch):
    """Without the other activations, which take seconds to count, and are not of interest."""
    monkeypatch.setattr(estimates, "update_bytes", lambda *args, **settings: 0)
    monkeypatch.setattr(estimates, "sampling_bytes", lambda *args, **settings: (0, 0))
    checkpoint = checkpoint_of(MODELS["t5-tied"](), tmp_path)

    def planned(**settings) -> int:
        return student_estimates(checkpoint, WORKLOAD, ALONE, Training(**settings))[0].log_probs

    assert planned() == 0
    for change in ({"beta": 0.1}, {"bf16": True}, {"critic": "separate"}, {"quantization": "nf4"}):
        settings = {"adapters": Adapters(lora_r=2)} if "quantization" in change else {}
        assert planned(**change, **settings) > 0, change


def test_nf4_is_unpacked_for_each_batch():
    nf4, int8 = (replace(TEACHER, quantization=name, weights=400) for name in ("nf4", "int8"))
    seconds = step_seconds(nf4, STUDENT, WORKLOAD, ALONE, MACHINE)
    assert seconds.scoring == pytest.approx(16 / 3 * 3 + 6 * (400 + 800) / 100)
    assert step_seconds(int8, STUDENT, WORKLOAD, ALONE, MACHINE).scoring == pytest.approx(16 / 3 * 3)


@pytest.mark.parametrize(
    ("placement", "cluster", "fetching"),
    [
        ("zero3", FOUR, 600 / 20),  # three quarters from other ranks
        ("offload", FOUR, 600 / 20 + 200 / 10),
        ("offload", ALONE, 800 / 10),
        ("zero3", replace(FOUR, gpus=2, nodes=2, node_link=5.0), 600 / 5),
    ],
)
def test_a_teacher_that_is_fetched(placement, cluster, fetching):
    teacher = replace(TEACHER, placement=placement)
    assert step_seconds(teacher, STUDENT, WORKLOAD, cluster, MACHINE).fetching == pytest.approx(6 * fetching)
    twice = replace(teacher, gathers=2)
    assert step_seconds(twice, STUDENT, WORKLOAD, cluster, MACHINE).fetching == pytest.approx(12 * fetching)


def exchange(sharding: str, num_iterations: int = 1, **changes) -> float:
    """In bytes, of a student whose weights and gradients have 100 on four ranks."""
    weights = 25 if sharding == "zero3" else 100
    student = replace(STUDENT, sharding=sharding, weights=weights, **changes)
    workload = replace(WORKLOAD, num_iterations=num_iterations)
    return step_seconds(TEACHER, student, workload, FOUR, MACHINE).exchange * MACHINE.link


def test_what_ranks_of_a_student_send():
    """Three quarters of everything goes to others. Two micro-batches."""
    assert exchange("ddp") == exchange("zero1") == pytest.approx(2 * 75), "gradients out, and what they made back"
    assert exchange("zero2") == pytest.approx(3 * 75), "gradients of each micro-batch"
    # weights: two passes for each micro-batch, two for log-probabilities, one for sampling; gradients of each
    assert exchange("zero3") == pytest.approx((4 + 2 + 1 + 2) * 75)
    assert exchange("zero3", gradient_itemsize=2) == pytest.approx((4 + 2 + 1) * 75 + 2 * 75 / 2)
    assert exchange("zero3", recomputes=True) == pytest.approx((6 + 2 + 1 + 2) * 75)
    assert exchange("zero3", is_own_reference=True) == pytest.approx((4 + 4 + 1 + 2) * 75)
    assert exchange("zero3", has_reference=True) == exchange("zero3"), "a copy, which is whole"


def test_each_rank_steps_its_own_parameters():
    for sharding, ranks in (("ddp", 1), ("zero1", 4), ("zero3", 4)):
        seconds = step_seconds(TEACHER, replace(STUDENT, sharding=sharding), WORKLOAD, FOUR, MACHINE)
        assert seconds.update == 2 * 7 + 7 * 4 * 25 / 100 / ranks


def test_moments_are_of_the_weights_kind_but_deepspeeds():
    of_16_bits = replace(STUDENT, gradient_itemsize=2)
    assert step_seconds(TEACHER, of_16_bits, WORKLOAD, ALONE, MACHINE).update == 2 * 7 + 7 * 2 * 25 / 100
    sharded = replace(of_16_bits, sharding="zero1")
    assert step_seconds(TEACHER, sharded, WORKLOAD, FOUR, MACHINE).update == 2 * 7 + 7 * 4 * 25 / 100 / 4


def timing(cluster: Cluster) -> Timing:
    return Timing("abacus", MACHINE, WORKLOAD, cluster, steps=360)


def test_the_fastest_is_recommended_but_nf4():
    nf4 = replace(TEACHER, quantization="nf4", weights=200, operations=[])
    split, offloaded = (replace(TEACHER, placement=name, weights=200) for name in ("zero3", "offload"))
    seconds = {"replicated": 1.0, "zero3": 3.0, "offload": 2.0}
    teachers = [offloaded, nf4, split]
    by_time = fitting_choices(teachers, [STUDENT], FOUR, lambda teacher, _: seconds[teacher.placement])
    assert [choice.teacher.placement for choice in by_time] == ["offload", "zero3", "replicated"]
    by_fit = fitting_choices(teachers, [STUDENT], FOUR)
    assert [choice.teacher.placement for choice in by_fit] == ["zero3", "offload", "replicated"]


@pytest.mark.parametrize(("seconds", "first"), [(1.9, "none"), (2.2, "int8")])
def test_int8_has_to_be_twice_as_fast(seconds, first):
    """Its kernels may be slower than planned, and it changes the rewards."""
    int8, split = replace(TEACHER, quantization="int8"), replace(TEACHER, placement="zero3")
    times = {"int8": 1.0, "none": seconds}
    best = fitting_choices([int8, split], [STUDENT], FOUR, lambda teacher, _: times[teacher.quantization])[0]
    assert best.teacher.quantization == first


def test_what_is_as_fast_keeps_its_order():
    slower, faster = (replace(STUDENT, sharding=name) for name in ("ddp", "zero2"))
    times = {"ddp": 1.04, "zero2": 1.0}
    best = fitting_choices([TEACHER], [slower, faster], FOUR, lambda _, student: times[student.sharding])[0]
    assert best.student.sharding == "ddp"
    times["ddp"] = 1.06
    best = fitting_choices([TEACHER], [slower, faster], FOUR, lambda _, student: times[student.sharding])[0]
    assert best.student.sharding == "zero2"


def words(teachers: list[TeacherBytes], students: list[StudentBytes], **machine) -> str:
    more = Timing("abacus", replace(MACHINE, **machine), WORKLOAD, FOUR, steps=1)
    exact = [replace(teacher, dtype="float32") for teacher in teachers]
    return " ".join(advice([*teachers, *exact], students, FOUR, WORKLOAD, more).split())


def test_reasons_are_those_of_time():
    """What is recommended is faster than what also fits, and is not said to be all that fits."""
    whole, split = (
        replace(TEACHER, operations=[Operation(9000, 0, is_16_bit=True)]),
        replace(TEACHER, placement="zero3"),
    )
    text = words([whole, split], [STUDENT])
    assert "placement zero3" in text and "A whole teacher fits too, and is slower: each rank" in text
    offloaded = replace(TEACHER, placement="offload")
    slow = replace(split, operations=whole.operations)
    assert "Faster than what else fits: the teacher stays in CPU memory" in words([whole, slow, offloaded], [STUDENT])
    # Shares: 62 s and what is fetched; int8 has less to fetch, and changes the rewards.
    int8 = replace(TEACHER, quantization="int8", weights=400)
    text = words([whole, int8, split], [STUDENT], link=80.0)
    assert "placement zero3" in text and "and is slower" not in text
    assert "in int8 fits too and is planned to be faster, 63 s a step, but it changes the rewards, and its" in text
    assert "kernels may take 2 times as long: each rank holds a share" in text
    many = replace(STUDENT, num_trained=10**6)
    text = words([TEACHER], [many, replace(many, sharding="zero1")], link=1e9)
    assert "sharded by zero1, of the fastest with which this fits" in text


def test_what_is_said_of_time():
    exact = replace(TEACHER, dtype="float32")
    text = " ".join(advice([TEACHER, exact], [STUDENT], ALONE, WORKLOAD, timing(ALONE)).split())
    # 61.5 seconds a step, 360 of them on one GPU
    assert "62 s a step" in text and "(sampling 18 s, log-probabilities 6.00 s, scoring 16 s, update 21 s)" in text
    assert "360 steps take 6.2 GPU-hours" in text
    text = advice([TEACHER, exact], [STUDENT], ALONE, WORKLOAD, replace(timing(ALONE), steps=10))
    assert "10 steps take 0.17 GPU-hours" in " ".join(text.split()), "few hours are not none"
