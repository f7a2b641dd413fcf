"""How long a step takes on each GPU, phase by phase, for a way to hold the teacher and a way to shard the student.

A step is an optimizer step. Each takes a rollout of its own; with several passes over a rollout (`num_iterations`)
they share its cost. Phases come one after another. What ranks send each other, or fetch from CPU memory, is added:
none of it is assumed to be hidden behind computation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlkd_trl.planning.activations import Workload
from rlkd_trl.planning.estimates import Cluster, StudentBytes, TeacherBytes
from rlkd_trl.planning.machines import Machine
from rlkd_trl.planning.operations import Operation

_FLOAT32 = 4


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of each phase. fetching: the teacher's weights, to score; exchange: what training's ranks send."""

    sampling: float
    log_probs: float
    scoring: float
    fetching: float
    update: float
    exchange: float

    @property
    def total(self) -> float:
        return self.sampling + self.log_probs + self.scoring + self.fetching + self.update + self.exchange


def step_seconds(
    teacher: TeacherBytes, student: StudentBytes, workload: Workload, cluster: Cluster, machine: Machine
) -> StepSeconds:
    """Of a step on each rank, where every prompt and completion has its greatest length."""
    scoring, fetching = _scoring_seconds(teacher, workload, cluster, machine)
    completions = workload.micro_batch * workload.micro_batches
    reading = _in_batches(student.operations.log_probs, completions, workload.forwarded_completions, machine)
    return StepSeconds(
        sampling=_sampling_seconds(student, workload, machine) / workload.num_iterations,
        log_probs=(student.reads_samples + student.has_reference) * reading / workload.num_iterations,
        scoring=scoring / workload.num_iterations,
        fetching=fetching / workload.num_iterations,
        update=workload.micro_batches * machine.seconds(student.operations.update)
        + _optimizer_bytes(student, cluster) / machine.bandwidth,
        exchange=_exchanged_bytes(student, workload, cluster) / _link(cluster, machine),
    )


@dataclass(frozen=True)
class Timing:
    """Times a workload on one kind of GPU, of which `MACHINES` has the name. steps: optimizer steps of a run."""

    name: str
    machine: Machine
    workload: Workload
    cluster: Cluster
    steps: int

    def step(self, teacher: TeacherBytes, student: StudentBytes) -> StepSeconds:
        return step_seconds(teacher, student, self.workload, self.cluster, self.machine)

    def total(self, teacher: TeacherBytes, student: StudentBytes) -> float:
        """Seconds of a step."""
        return self.step(teacher, student).total

    def gpu_hours(self, seconds: float) -> float:
        """Of a run whose steps take so many seconds, on all GPUs together."""
        return seconds * self.steps * self.cluster.ranks / 3600


def _scoring_seconds(
    teacher: TeacherBytes, workload: Workload, cluster: Cluster, machine: Machine
) -> tuple[float, float]:
    """Of all scoring batches of a rollout: computing, and fetching weights.

    nf4 matrices are multiplied in 16 bits: in each batch they are read, and written as 16 bits, first. int8 ones are
    multiplied as they are; that is taken to be as fast as bfloat16.
    """
    prompts = workload.micro_batch * workload.micro_batches // workload.num_generations
    computing = _in_batches(teacher.operations, prompts, workload.scored_prompts, machine)
    if teacher.quantization == "nf4":
        computing += workload.scoring_batches * (teacher.weights + teacher.unquantised) / machine.bandwidth
    fetched = 0.0
    if teacher.placement != "replicated":
        share = teacher.unquantised / cluster.ranks
        fetched = (teacher.unquantised - share) / _link(cluster, machine)
        if teacher.placement == "offload":
            fetched += share / machine.bus
        fetched *= teacher.gathers
    return computing, workload.scoring_batches * fetched


def _in_batches(operations: Sequence[Operation], count: int, at_a_time: int, machine: Machine) -> float:
    """Seconds of whole batches and a last one, whose arithmetic and bytes are its share of a whole one's."""
    whole, rest = divmod(count, at_a_time)
    last = machine.seconds(operations, share=rest / at_a_time) if rest else 0.0
    return whole * machine.seconds(operations) + last


def _sampling_seconds(student: StudentBytes, workload: Workload, machine: Machine) -> float:
    """A token takes longer the more tokens are in the cache: from the second to the last, evenly so. The first one's
    state comes with the prompts.

    A last batch that is smaller counts whole: for a token weights are read, and kernels launched, for however many.
    """
    work = student.operations
    of_token = (machine.seconds(work.second_token) + machine.seconds(work.last_token)) / 2
    batches = math.ceil(workload.micro_batch * workload.micro_batches / workload.sampled_completions)
    return batches * (machine.seconds(work.prompts) + of_token * (workload.completion_tokens - 1))


def _optimizer_bytes(student: StudentBytes, cluster: Cluster) -> float:
    """AdamW reads weights, gradients and two moments, and writes all but the gradients.

    Under DDP they are all of the weights' kind; DeepSpeed has them in float32.
    """
    if student.sharding == "ddp":
        return 7 * student.gradient_itemsize * student.num_trained
    return 7 * _FLOAT32 * student.num_trained / cluster.ranks


def _exchanged_bytes(student: StudentBytes, workload: Workload, cluster: Cluster) -> float:
    """What a rank sends in a step, in rings of `cluster.ranks`.

    DDP and ZeRO-1: gradients, to whoever sums them, and back what has become of them. ZeRO-2: the same, but gradients
    after each micro-batch. ZeRO-3 too, and all weights for each forward and each backward pass, and for each rollout
    for what is read of samples (by the student in 16 bits; by a reference that is the student without its adapters),
    and once for sampling.
    """
    others = (cluster.ranks - 1) / cluster.ranks
    gradients = student.num_trained * student.gradient_itemsize
    if student.sharding in ("ddp", "zero1"):
        return 2 * others * gradients
    if student.sharding == "zero2":
        return (workload.micro_batches + 1) * others * gradients
    weights = student.weights * cluster.ranks
    completions = workload.micro_batch * workload.micro_batches
    reading = math.ceil(completions / workload.forwarded_completions)
    readings = reading * (student.reads_samples + student.is_own_reference)
    learning = (3 if student.recomputes else 2) * workload.micro_batches
    gathered = learning + (readings + 1) / workload.num_iterations
    return others * (gathered * weights + workload.micro_batches * gradients)


def _link(cluster: Cluster, machine: Machine) -> float:
    """Bytes per second in a ring of all ranks: that of its slowest part, which between nodes is their network."""
    return machine.link if cluster.nodes == 1 else min(machine.link, cluster.node_link)
