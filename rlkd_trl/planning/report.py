"""The planner's whole output: what was asked for, three tables, the advice."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from rlkd_trl.errors import InputError
from rlkd_trl.evaluation.tables import MISSING
from rlkd_trl.models.limits import check_caps, position_limits_of_config
from rlkd_trl.models.precision import DTYPES
from rlkd_trl.planning.activations import Workload
from rlkd_trl.planning.adapters import adapted
from rlkd_trl.planning.advice import advice
from rlkd_trl.planning.assistants import assistant_configs, assistants_table
from rlkd_trl.planning.durations import Timing
from rlkd_trl.planning.estimates import Cluster, Training, student_estimates, teacher_estimates
from rlkd_trl.planning.skeletons import Checkpoint
from rlkd_trl.planning.tables import gib, peak_table, seconds_table, student_table, teacher_table


@contextmanager
def _explained(flag: str) -> Iterator[None]:
    """Turns the failure of a model on fake tensors into an `InputError`."""
    try:
        yield
    except Exception as error:  # an architecture may do anything that fake tensors, or this package, cannot
        # `Backbone.verify`, which runs the model first, raises an error of its own with the failure as its cause.
        cause = error.__cause__ or error
        if isinstance(cause, InputError):
            raise
        raise InputError(
            f"`{flag}` cannot be planned: its forward pass fails without real tensors, with {type(cause).__name__}: "
            f"{textwrap.shorten(str(cause), 300)}"
        ) from cause


def _how(training: Training) -> str:
    """How the student is trained, in words."""
    words = [training.student_dtype]
    if training.quantization != "none":
        words.append(f"quantised to {training.quantization}")
    if training.bf16:
        words.append("mixed precision")
    if (adapters := training.adapters) is not None:
        words.append(f"{'DoRA' if adapters.use_dora else 'LoRA'} of rank {adapters.lora_r}")
    if training.gradient_checkpointing:
        words.append("layers recomputed")
    return ", ".join(words)


def report(
    teacher: str,
    student: str,
    workload: Workload,
    cluster: Cluster,
    training: Training,
    *,
    assistants: int = 0,
    timing: Timing | None = None,
) -> str:
    """The planner's output for two checkpoints, as text.

    assistants: of how many to propose sizes between them. timing: also how long a step takes.

    Raises:
        InputError: As `Checkpoint.of`, `check_caps` and `adapted`, before anything is computed; or a model cannot be
            run on fake tensors.
    """
    teacher_checkpoint = Checkpoint.of("--teacher", teacher)
    student_checkpoint = Checkpoint.of("--student", student)
    for who, checkpoint, read in (
        ("The teacher", teacher_checkpoint, workload.of_teacher),
        ("The student", student_checkpoint, workload),
    ):
        check_caps(
            who,
            position_limits_of_config(checkpoint.config),
            max_prompt_length=read.prompt_tokens,
            max_completion_length=workload.completion_tokens,
        )
    if training.adapters is not None:  # that they fit takes a second, the estimates half a minute
        adapted(student_checkpoint.build(DTYPES[training.student_dtype]), training.adapters)
    between = []
    if assistants:
        ends = teacher_checkpoint.config, student_checkpoint.config
        between.append(
            "Assistants, of geometric sizes:\n"
            + assistants_table(ends[0], assistant_configs(*ends, assistants), ends[1])
        )
    with _explained(f"--teacher {teacher}"):
        teachers = teacher_estimates(teacher_checkpoint, workload, cluster)
    with _explained(f"--student {student}"):
        students = student_estimates(student_checkpoint, workload, cluster, training)
    durations = []
    if timing is not None:
        heading = f"A step on {timing.name}, by its ratings ({MISSING} does not fit):\n"
        durations.append(heading + seconds_table(teachers, students, cluster, timing))
    sections = [
        f"Teacher: {teacher}, {teacher_checkpoint.num_parameters / 1e6:,.1f} M parameters\n"
        f"Student: {student}, {student_checkpoint.num_parameters / 1e6:,.1f} M parameters, {_how(training)}\n"
        f"GPUs:    {cluster.ranks} × {gib(cluster.gpu_memory)} GiB, of which {cluster.reserve:.0%} stay free\n"
        f"Rollout: {workload.micro_batches} × {workload.micro_batch} completions on each, of "
        f"{workload.completion_tokens} tokens, {workload.num_generations} for each prompt of "
        f"{workload.prompt_tokens};\n"
        f"         the teacher reads {workload.scored_prompts} prompts at a time, of "
        f"{workload.of_teacher.prompt_tokens} tokens",
        "Teacher, GiB on each GPU:\n" + teacher_table(teachers),
        "Student, GiB on each GPU:\n" + student_table(students),
        "Peak, GiB on each GPU (always held, and the largest of the phases; x does not fit):\n"
        + peak_table(teachers, students, cluster),
        *durations,
        advice(teachers, students, cluster, workload, timing),
        *between,
    ]
    return "\n\n".join(sections)
