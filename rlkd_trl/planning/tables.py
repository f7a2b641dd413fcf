"""The estimates as text."""

from collections.abc import Sequence

from rlkd_trl.evaluation.tables import MISSING, plain_table
from rlkd_trl.planning.durations import Timing
from rlkd_trl.planning.estimates import Cluster, StudentBytes, TeacherBytes, peak_bytes

_GIB = 2**30


def teacher_table(teachers: Sequence[TeacherBytes]) -> str:
    """A line for each placement and precision; "CPU" is memory of a node, everything else of a GPU."""
    rows = [
        [t.placement, t.precision, *map(gib, (t.weights, t.gathered, t.scoring)), gib(t.host) if t.host else ""]
        for t in teachers
    ]
    return plain_table(["placement", "precision", "weights", "gathered", "scoring", "CPU"], rows, labels=2, rule=False)


def student_table(students: Sequence[StudentBytes]) -> str:
    """One line for each sharding."""
    held = ("weights", "gathered", "gradients", "optimizer", "value_head", "reference")
    heads = (*held, "update", "log_probs", "sampling", "cache")
    rows = [[s.sharding, *(gib(getattr(s, head)) for head in heads)] for s in students]
    return plain_table(["sharding", *(head.replace("_", " ") for head in heads)], rows, rule=False)


def peak_table(teachers: Sequence[TeacherBytes], students: Sequence[StudentBytes], cluster: Cluster) -> str:
    """The peak for every teacher with every student, marked with "x" where it does not fit."""
    rows = []
    for teacher in teachers:
        peaks = [peak_bytes(teacher, student) for student in students]
        cells = [gib(peak) + ("  " if peak <= cluster.usable else " x") for peak in peaks]
        rows.append([teacher.placement, teacher.precision, *cells])
    return plain_table(
        ["placement", "precision", *(student.sharding + "  " for student in students)], rows, labels=2, rule=False
    )


def seconds_table(
    teachers: Sequence[TeacherBytes], students: Sequence[StudentBytes], cluster: Cluster, timing: Timing
) -> str:
    """Seconds of a step for every teacher with every student; `MISSING` where they do not fit."""
    rows = [
        [
            teacher.placement,
            teacher.precision,
            *(
                duration(timing.total(teacher, student)) if peak_bytes(teacher, student) <= cluster.usable else MISSING
                for student in students
            ),
        ]
        for teacher in teachers
    ]
    heads = ["placement", "precision", *(student.sharding for student in students)]
    return plain_table(heads, rows, labels=2, rule=False)


def duration(seconds: float) -> str:
    """With two or three significant digits; less than 0.01 s is "<0.01 s"."""
    if seconds < 0.01:
        return "0 s" if seconds == 0 else "<0.01 s"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:,.0f} s"


def gib(nbytes: int) -> str:
    """Bytes in GiB, with two or three significant digits; less than 0.01 GiB is "<0.01"."""
    value = nbytes / _GIB
    return "0" if nbytes == 0 else "<0.01" if value < 0.01 else f"{value:.2f}" if value < 1 else f"{value:.1f}"
