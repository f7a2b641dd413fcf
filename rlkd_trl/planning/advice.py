"""Recommends one of the estimated configurations, as flags, with the reasons in words."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rlkd_trl.planning.activations import Workload
from rlkd_trl.planning.estimates import Cluster, StudentBytes, TeacherBytes, peak_bytes
from rlkd_trl.planning.tables import gib

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
    teachers: Sequence[TeacherBytes], students: Sequence[StudentBytes], cluster: Cluster
) -> list[Choice]:
    """Each preferred way to hold the teacher, best first, with the least sharded student that fits beside it."""
    choices = []
    for placement, precision in _PREFERENCES:
        for teacher in teachers:
            if (teacher.placement, teacher.precision) == (placement, precision):
                fitting = [student for student in students if peak_bytes(teacher, student) <= cluster.usable]
                choices += [Choice(teacher, student, cluster) for student in fitting[:1]]
    return choices


def advice(
    teachers: Sequence[TeacherBytes], students: Sequence[StudentBytes], cluster: Cluster, workload: Workload
) -> str:
    """The recommended command and its reasons, or what to lower where nothing fits."""
    choices = fitting_choices(teachers, students, cluster)
    if not choices:
        return _nothing_fits(teachers, students, cluster)
    best_choice, *other_choices = choices
    whole_teacher = _whole_in_bfloat16(teachers)
    reasons = _reasons(best_choice, other_choices, teachers, whole_teacher, cluster, workload)
    bullets = [textwrap.fill(reason, 118, initial_indent="- ", subsequent_indent="  ") for reason in reasons]
    return "\n".join([f"Recommended:\n    {best_choice.command}", *bullets])


def _reasons(
    best_choice: Choice,
    other_choices: Sequence[Choice],
    teachers: Sequence[TeacherBytes],
    whole_teacher: TeacherBytes,
    cluster: Cluster,
    workload: Workload,
) -> list[str]:
    teacher, student = best_choice.teacher, best_choice.student
    total, usable = gib(peak_bytes(teacher, student)), gib(cluster.usable)
    reasons = [f"{total} of the {usable} GiB that may be used on each GPU."]
    gathered = whole_teacher.weights - whole_teacher.weights // cluster.ranks
    traffic = f"{gib(gathered)} GiB for each of the {workload.scoring_batches} scoring batches of a rollout"
    if teacher.placement == "replicated" and cluster.ranks > 1:
        reasons.append(
            "A frozen teacher that is whole on every GPU scores without communication. Split by ZeRO-3 in bfloat16, "
            f"every rank would gather at least {traffic}."
        )
    elif teacher.placement == "zero3":
        reasons.append(
            f"No whole teacher fits beside the student, so each rank holds a share and gathers at least {traffic}."
        )
    elif teacher.placement == "offload":
        reasons.append(
            f"Not even a share of the teacher fits: it stays in CPU memory, {gib(teacher.host)} GiB on each node, "
            f"and {gib(whole_teacher.weights)} GiB pass over the bus for each of the {workload.scoring_batches} "
            "scoring batches of a rollout. Expect scoring to wait for it; a larger --teacher_batch_tokens "
            "makes fewer batches."
        )
    reasons += _costs(best_choice, other_choices, teachers, cluster)
    if student.sharding != "ddp":
        reasons.append(f"The student is sharded by {student.sharding}, the least sharding with which this fits.")
    if cluster.nodes > 1:
        reasons.append(
            f"Over {cluster.nodes} nodes: on each of them, give --num_machines, --machine_rank, --main_process_ip "
            "and --main_process_port too, before ppo_kd."
        )
    return reasons


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
        "lower --per_device_train_batch_size (and raise --gradient_accumulation_steps), or recompute layers "
        "(--gradient_checkpointing)": student.update,
        "lower --local_rollout_forward_batch_size": student.log_probs,
        "lower --sampling_batch_size": student.cache,
        "take more GPUs, adapters (--use_peft), --student_dtype bfloat16 or a smaller student": student.always_held,
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
