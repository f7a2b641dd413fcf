"""Recommends one of the estimated configurations, as flags, with the reasons in words."""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from rlkd_trl.planning.activations import Workload
from rlkd_trl.planning.durations import Timing
from rlkd_trl.planning.estimates import Cluster, StudentBytes, TeacherBytes, peak_bytes
from rlkd_trl.planning.tables import duration, gib

# The file in accelerate_configs/ for each sharding of the student.
ACCELERATE_CONFIGS = {"ddp": "multi_gpu", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3"}
ONE_GPU_CONFIG = "single_gpu"
SEVERAL_NODES_CONFIG = "zero3_multi_node"

# In order of preference. A teacher that is exact and communicates nothing comes first, nf4, the least exact, last.
_PREFERENCES = (
    ("replicated", "bfloat16"),
    ("replicated", "int8"),
    ("zero3", "bfloat16"),
    ("offload", "bfloat16"),
    ("replicated", "nf4"),
)
# ‖logits − float32's‖ / ‖float32's‖ for a two-layer T5 with random weights; tests/planning/test_advice.py measures it.
LOGIT_ERRORS = {"bfloat16": 0.009, "int8": 0.02, "nf4": 0.18}


_EVEN = 0.05  # what the estimate of a time does not tell apart
# int8's products are planned to be as fast as bfloat16's, which their kernels may not be, and it changes the rewards:
# it comes before an unquantised teacher only where that takes more than twice as long.
_INT8_FACTOR = 2.0

T = TypeVar("T")
Seconds = Callable[[TeacherBytes, StudentBytes], float]


@dataclass(frozen=True)
class Choice:
    """A way to hold the teacher and a way to shard the student that fit together, and the flags that select them."""

    teacher: TeacherBytes
    student: StudentBytes
    cluster: Cluster

    @property
    def config_file(self) -> str:
        if self.cluster.ranks == 1:
            return ONE_GPU_CONFIG
        if self.cluster.nodes > 1 and self.student.sharding == "zero3":
            return SEVERAL_NODES_CONFIG
        return ACCELERATE_CONFIGS[self.student.sharding]

    @property
    def flags(self) -> str:
        teacher = self.teacher
        quantization = "" if teacher.quantization == "none" else f" --teacher_quantization {teacher.quantization}"
        return f"--teacher_placement {teacher.placement} --teacher_dtype {teacher.dtype}{quantization}"

    @property
    def command(self) -> str:
        return (
            f"rlkd-trl --config_file {self.config_file} --num_processes {self.cluster.ranks} ppo_kd \\\n"
            f"        {self.flags} ..."
        )


def fitting_choices(
    teachers: Sequence[TeacherBytes],
    students: Sequence[StudentBytes],
    cluster: Cluster,
    seconds: Seconds | None = None,
) -> list[Choice]:
    """Each preferred way to hold the teacher, best first, with a student that fits beside it.

    The order is `_PREFERENCES`, with the least sharded student. seconds: of a step; what is slower than the fastest by
    more than `_EVEN` comes later then, int8 counting `_INT8_FACTOR` times, but before nf4.
    """
    choices = []
    for placement, precision in _PREFERENCES:
        for teacher in teachers:
            if (teacher.placement, teacher.precision) == (placement, precision):
                fitting = [student for student in students if peak_bytes(teacher, student) <= cluster.usable]
                if seconds is not None:
                    fitting = _fast_first(fitting, partial(seconds, teacher))
                choices += [Choice(teacher, student, cluster) for student in fitting[:1]]
    if seconds is None:
        return choices
    exact = [choice for choice in choices if choice.teacher.precision != "nf4"]
    inexact = [choice for choice in choices if choice.teacher.precision == "nf4"]

    def counted(choice: Choice) -> float:
        factor = _INT8_FACTOR if choice.teacher.quantization == "int8" else 1.0
        return factor * seconds(choice.teacher, choice.student)

    return _fast_first(exact, counted) + inexact


def _fast_first(candidates: list[T], seconds: Callable[[T], float]) -> list[T]:
    """Those about as fast as the fastest, in the order in which they are given; then the others by their time."""
    limit = (1 + _EVEN) * min(map(seconds, candidates), default=0.0)
    slower = [candidate for candidate in candidates if seconds(candidate) > limit]
    return [candidate for candidate in candidates if seconds(candidate) <= limit] + sorted(slower, key=seconds)


def advice(
    teachers: Sequence[TeacherBytes],
    students: Sequence[StudentBytes],
    cluster: Cluster,
    workload: Workload,
    timing: Timing | None = None,
) -> str:
    """The recommended command and its reasons, or what to lower where nothing fits.

    timing: what fits is recommended by the time of a step then.
    """
    choices = fitting_choices(teachers, students, cluster, timing and timing.total)
    if not choices:
        return _nothing_fits(teachers, students, cluster)
    best_choice, *other_choices = choices
    whole_teacher = _whole_in_bfloat16(teachers)
    reasons = _reasons(best_choice, other_choices, teachers, whole_teacher, cluster, workload, timing)
    if timing is not None:
        reasons.insert(1, _duration(best_choice, timing))
    bullets = [textwrap.fill(reason, 118, initial_indent="- ", subsequent_indent="  ") for reason in reasons]
    return "\n".join([f"Recommended:\n    {best_choice.command}", *bullets])


def _reasons(
    best_choice: Choice,
    other_choices: Sequence[Choice],
    teachers: Sequence[TeacherBytes],
    whole_teacher: TeacherBytes,
    cluster: Cluster,
    workload: Workload,
    timing: Timing | None,
) -> list[str]:
    teacher, student = best_choice.teacher, best_choice.student
    others = {choice.teacher.placement for choice in other_choices if choice.teacher.precision != "nf4"}
    total, usable = gib(peak_bytes(teacher, student)), gib(cluster.usable)
    reasons = [f"{total} of the {usable} GiB that may be used on each GPU."]
    gathered = int(whole_teacher.gathers * (whole_teacher.weights - whole_teacher.weights // cluster.ranks))
    traffic = f"{gib(gathered)} GiB for each of the {workload.scoring_batches} scoring batches of a rollout"
    if teacher.placement == "replicated" and cluster.ranks > 1:
        reasons.append(
            "A frozen teacher that is whole on every GPU scores without communication. Split by ZeRO-3 in bfloat16, "
            f"every rank would gather at least {traffic}."
        )
    elif teacher.placement == "zero3":
        reason = "A whole teacher fits too, and is slower" if "replicated" in others else "No whole teacher fits"
        reason = _planned_faster(best_choice, other_choices, timing) or reason
        reasons.append(f"{reason}: each rank holds a share and gathers at least {traffic}.")
    elif teacher.placement == "offload":
        reason = "Faster than what else fits" if others else "Not even a share of the teacher fits"
        fetched = gib(int(whole_teacher.gathers * whole_teacher.weights))
        reason = _planned_faster(best_choice, other_choices, timing) or reason
        reasons.append(
            f"{reason}: the teacher stays in CPU memory, {gib(teacher.host)} GiB on each node, "
            f"and {fetched} GiB pass over the bus for each of the {workload.scoring_batches} "
            "scoring batches of a rollout. Expect scoring to wait for it; a larger --teacher_batch_tokens "
            "makes fewer batches."
        )
    reasons += _costs(best_choice, other_choices, teachers, cluster)
    if student.sharding != "ddp":
        why = (
            "of the fastest with which this fits" if timing is not None else "the least sharding with which this fits"
        )
        reasons.append(f"The student is sharded by {student.sharding}, {why}.")
    if cluster.nodes > 1:
        reasons.append(
            f"Over {cluster.nodes} nodes: on each of them, give --num_machines, --machine_rank, --main_process_ip "
            "and --main_process_port too, before ppo_kd."
        )
    return reasons


def _planned_faster(best_choice: Choice, other_choices: Sequence[Choice], timing: Timing | None) -> str:
    """What speaks against an int8 teacher whose step is planned to be faster than the best one's; "" without one."""
    if timing is None:
        return ""
    of_int8 = [timing.total(c.teacher, c.student) for c in other_choices if c.teacher.precision == "int8"]
    if min(of_int8, default=math.inf) >= timing.total(best_choice.teacher, best_choice.student):
        return ""
    return (
        f"A whole teacher in int8 fits too and is planned to be faster, {duration(min(of_int8))} a step, but it "
        f"changes the rewards, and its kernels may take {_INT8_FACTOR:g} times as long"
    )


def _duration(best_choice: Choice, timing: Timing) -> str:
    seconds = timing.step(best_choice.teacher, best_choice.student)
    phases = {
        "sampling": seconds.sampling,
        "log-probabilities": seconds.log_probs,
        "scoring": seconds.scoring,
        "fetching the teacher's weights": seconds.fetching,
        "update": seconds.update,
        "exchange between GPUs": seconds.exchange,
    }
    parts = ", ".join(f"{name} {duration(value)}" for name, value in phases.items() if value)
    passes = timing.workload.num_iterations
    of_rollout = "" if passes == 1 else f", a rollout for every {passes} steps"
    hours = timing.gpu_hours(seconds.total)
    return (
        f"By the ratings of {timing.name}, not measured: {duration(seconds.total)} a step at full lengths{of_rollout} "
        f"({parts}); {timing.steps:,} steps take {f'{hours:,.1f}' if hours >= 1 else f'{hours:.2g}'} GPU-hours."
    )


def _costs(
    best_choice: Choice, other_choices: Sequence[Choice], teachers: Sequence[TeacherBytes], cluster: Cluster
) -> list[str]:
    """Sentences on what the teacher's precision does to the rewards, and on what else could be run."""
    teacher, student = best_choice.teacher, best_choice.student
    error = LOGIT_ERRORS[teacher.precision]
    if teacher.quantization == "none":
        exact = next(t for t in teachers if (t.placement, t.dtype) == (teacher.placement, "float32"))
        fits = peak_bytes(exact, student) <= cluster.usable
        alternative = "float32 fits too (--teacher_dtype float32), slower" if fits else "float32 does not fit"
        return [f"bfloat16 moves logits by about {error:.1%} (a random small T5); {alternative}."]
    unquantised = [choice for choice in other_choices if choice.teacher.quantization == "none"]
    reasons = [
        f"{teacher.quantization} CHANGES THE REWARDS: logits move by about {error:.0%} (a random small T5; bfloat16: "
        f"{LOGIT_ERRORS['bfloat16']:.1%}). Its kernels can be slower than bfloat16's. Compare rewards and speed on "
        "your data before a long run."
    ]
    if unquantised:
        alternative = unquantised[0]
        reasons.append(f"Without quantisation: {alternative.config_file} with {alternative.flags}.")
    else:
        reasons.append("Without quantisation, nothing fits.")
    return reasons


def _nothing_fits(teachers: Sequence[TeacherBytes], students: Sequence[StudentBytes], cluster: Cluster) -> str:
    smallest = min(
        ((teacher, student) for teacher in teachers for student in students), key=lambda pair: peak_bytes(*pair)
    )
    teacher, student = smallest
    remedies = {  # by the bytes that each may lower
        "lower --teacher_batch_tokens": teacher.scoring,
        "lower --per_device_train_batch_size (and raise --gradient_accumulation_steps), or recompute layers if you "
        "do not yet (--gradient_checkpointing)": student.update,
        "lower --local_rollout_forward_batch_size": student.log_probs,
        "lower --sampling_batch_size": student.cache,
        "take more GPUs, a smaller student or, if you do not yet, adapters (--use_peft) or --student_dtype bfloat16": (
            student.always_held
        ),
        "take more GPUs or a smaller teacher": teacher.weights + teacher.gathered,
    }
    remedy = max(remedies, key=remedies.get)
    return textwrap.fill(
        f"Nothing fits: the least is {gib(peak_bytes(*smallest))} GiB of {gib(cluster.usable)} usable ones (teacher "
        f"{teacher.placement} {teacher.precision}, student {student.sharding}). What would help most: {remedy}.",
        118,
    )


def _whole_in_bfloat16(teachers: Sequence[TeacherBytes]) -> TeacherBytes:
    return next(t for t in teachers if (t.placement, t.precision) == ("replicated", "bfloat16"))
