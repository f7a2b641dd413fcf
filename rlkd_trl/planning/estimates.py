"""The bytes on each rank: the teacher's for every placement and precision, the student's for every sharding.

With them, the operations that take the time (see `durations.py`), which the same passes show.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from rlkd_trl.models.precision import DTYPES
from rlkd_trl.planning.activations import Workload, log_prob_bytes, sampling_bytes, scoring_bytes, update_bytes
from rlkd_trl.planning.adapters import Adapters, adapted
from rlkd_trl.planning.operations import Operation
from rlkd_trl.planning.skeletons import Checkpoint, Skeleton
from rlkd_trl.planning.weights import (
    MAX_LIVE_PARAMETERS,
    SHARDINGS,
    Shares,
    gathered_bytes,
    live_bytes,
    quantisation_workspace_bytes,
    training_shares,
    weight_bytes,
)
from rlkd_trl.teachers.placement import PLACEMENTS

# (dtype, quantization). Quantised matrices cannot be split, so int8 and nf4 are for replicated teachers only.
PRECISIONS = (("float32", "none"), ("bfloat16", "none"), ("bfloat16", "int8"), ("bfloat16", "nf4"))


@dataclass(frozen=True)
class Cluster:
    """The machines. gpus: on each node. gpu_memory: bytes on each GPU. reserve: the share of it that stays free.

    node_link: bytes per second that a node sends the others.
    """

    gpus: int
    nodes: int
    gpu_memory: int
    reserve: float
    node_link: float = 25e9

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes

    @property
    def usable(self) -> int:
        return int(self.gpu_memory * (1 - self.reserve))


@dataclass(frozen=True)
class Training:
    """The student's settings on which memory depends, with the recipes' names.

    quantization: of the weights beneath adapters. adapters: None if all weights are trained.
    """

    student_dtype: str = "float32"
    bf16: bool = False
    critic: str = "shared"
    beta: float = 0.0
    quantization: str = "none"
    adapters: Adapters | None = None
    gradient_checkpointing: bool = False

    @property
    def reads_samples(self) -> bool:
        in_float32 = self.student_dtype == "float32" and not self.bf16 and self.quantization == "none"
        return not in_float32 or self.critic == "separate"


@dataclass(frozen=True)
class TeacherBytes:
    """The bytes of one way to hold the teacher: on a rank's GPU, or for `host` in a node's CPU memory.

    weights: held throughout. gathered: other ranks' weights while it computes. scoring: activations. unquantised: all
    weights as they are computed with. gathers: how often these are gathered for a scoring batch, where they are in
    shares. operations: of a scoring batch.
    """

    placement: str
    dtype: str
    quantization: str
    weights: int
    gathered: int
    scoring: int
    host: int
    unquantised: int = 0
    gathers: float = 1.0
    operations: Sequence[Operation] = field(default=(), repr=False)

    @property
    def precision(self) -> str:
        return self.dtype if self.quantization == "none" else self.quantization


@dataclass(frozen=True)
class StudentOperations:
    """Of a micro-batch's update, of a pass for log-probabilities, and of a sampling batch: its prompts, a token."""

    update: list[Operation] = field(default_factory=list)
    log_probs: list[Operation] = field(default_factory=list)
    prompts: list[Operation] = field(default_factory=list)
    second_token: list[Operation] = field(default_factory=list)
    last_token: list[Operation] = field(default_factory=list)


@dataclass(frozen=True)
class StudentBytes:
    """The bytes of one way to shard the student, on a rank's GPU.

    weights, gradients, optimizer, value_head, reference: held throughout. gathered: other ranks' weights, while it
    learns or reads completions. update, log_probs, sampling: activations of these phases; sampling includes all
    weights of other ranks, which ZeRO-3 gathers for it. cache: the part of sampling that is its key/value cache at the
    end. num_trained: parameters that are trained. gradient_itemsize: bytes of each one's gradient, as ranks send it.
    is_own_reference: with its adapters off. recomputes: layers, in the backward pass. reads_samples: for their
    log-probabilities, as sampling does not tell them (see `Policy.samples_as_it_reads`).
    """

    sharding: str
    weights: int
    gathered: int
    gradients: int
    optimizer: int
    value_head: int
    reference: int
    update: int
    log_probs: int
    sampling: int
    cache: int
    has_reference: bool = False
    num_trained: int = 0
    gradient_itemsize: int = 4
    is_own_reference: bool = False
    recomputes: bool = False
    reads_samples: bool = False
    operations: StudentOperations = field(default_factory=StudentOperations, repr=False)

    @property
    def always_held(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.value_head + self.reference


def peak_bytes(teacher: TeacherBytes, student: StudentBytes) -> int:
    """What a rank holds throughout plus the largest of the four phases, in bytes."""
    phases = (
        teacher.gathered + teacher.scoring,
        student.gathered + max(student.update, student.log_probs),
        student.sampling,
    )
    return teacher.weights + student.always_held + max(phases)


def teacher_estimates(checkpoint: Checkpoint, workload: Workload, cluster: Cluster) -> list[TeacherBytes]:
    """Every placement with every precision that it supports, sorted by placement; ZeRO-3 only on several ranks."""
    estimates = [
        estimate
        for dtype in ("float32", "bfloat16")
        for estimate in _of_dtype(checkpoint.build(DTYPES[dtype]), dtype, workload, cluster)
    ]
    return sorted(estimates, key=lambda estimate: PLACEMENTS.index(estimate.placement))


def _of_dtype(teacher: Skeleton, dtype: str, workload: Workload, cluster: Cluster) -> Iterator[TeacherBytes]:
    operations: list[Operation] = []
    scoring, all_weights = scoring_bytes(teacher, workload, operations=operations), weight_bytes(teacher)
    # A decoder-only model reads prompts, then completions, for which what is within DeepSpeed's limit stays. Of an
    # encoder-decoder each part reads once.
    stays = min(1.0, MAX_LIVE_PARAMETERS / teacher.num_parameters)
    gathers = 1.0 if teacher.model.config.is_encoder_decoder else 2 - stays
    work = {"unquantised": all_weights, "gathers": gathers, "operations": operations}
    for _, quantization in (precision for precision in PRECISIONS if precision[0] == dtype):
        workspace = quantisation_workspace_bytes(teacher) if quantization != "none" else 0
        yield TeacherBytes(
            placement="replicated",
            dtype=dtype,
            quantization=quantization,
            weights=weight_bytes(teacher, quantization),
            gathered=0,
            scoring=scoring + workspace,
            host=0,
            **work,
        )
    share = all_weights // cluster.ranks
    if cluster.ranks > 1:
        gathered = gathered_bytes(teacher.num_parameters, all_weights, cluster.ranks)
        yield TeacherBytes("zero3", dtype, "none", share, gathered, scoring, host=0, **work)
    # A rank's own share comes to the GPU only when it is gathered, too.
    live = live_bytes(teacher.num_parameters, all_weights)
    yield TeacherBytes("offload", dtype, "none", 0, live, scoring, host=share * cluster.gpus, **work)


def student_estimates(
    checkpoint: Checkpoint, workload: Workload, cluster: Cluster, training: Training
) -> list[StudentBytes]:
    """Every sharding of the student; on one rank only "ddp", which shards nothing; quantised weights without ZeRO-3.

    Raises:
        InputError: The adapters do not fit the student.
    """
    student = checkpoint.build(DTYPES[training.student_dtype])
    head = student.model.get_output_embeddings().weight
    before = weight_bytes(student, training.quantization)  # adapters come on top
    workspace = quantisation_workspace_bytes(student) if training.quantization != "none" else 0
    if training.adapters is not None:
        student = adapted(student, training.adapters)
    settings, operations = {"bf16": training.bf16}, StudentOperations()
    update = update_bytes(
        student,
        workload,
        critic=training.critic,
        gradient_checkpointing=training.gradient_checkpointing,
        operations=operations.update,
        **settings,
    )
    log_probs = log_prob_bytes(student, workload, operations=operations.log_probs, **settings)
    sampling, cache = sampling_bytes(
        student,
        workload,
        prompt_operations=operations.prompts,
        token_operations=operations.last_token,
        **settings,
    )
    of_two_tokens = replace(workload, completion_tokens=min(2, workload.completion_tokens))
    sampling_bytes(student, of_two_tokens, token_operations=operations.second_token, **settings)
    shardings = [
        sharding
        for sharding in (SHARDINGS if cluster.ranks > 1 else SHARDINGS[:1])
        if sharding != "zero3" or training.quantization == "none"
    ]
    shares = {sharding: _shares(student, head.numel(), before, sharding, cluster, training) for sharding in shardings}
    return [
        StudentBytes(
            sharding=sharding,
            weights=share.weights,
            gathered=share.gathered,
            gradients=share.gradients,
            optimizer=share.optimizer,
            # In float32: the linear map, its gradient and two moments.
            value_head=0 if training.critic == "none" else 4 * (head.shape[-1] + 1) * torch.float32.itemsize,
            # Of adapters it is the student with these off.
            reference=before if training.beta > 0 and training.adapters is None else 0,
            update=update + workspace,
            log_probs=log_probs + workspace if training.reads_samples or training.beta > 0 else 0,
            sampling=share.elsewhere + sampling + workspace,
            cache=cache,
            has_reference=training.beta > 0,
            num_trained=_num_trained(student, head.numel(), training),
            gradient_itemsize=2 if training.bf16 and sharding != "ddp" else student.trained_itemsize,
            is_own_reference=training.beta > 0 and training.adapters is not None,
            recomputes=training.gradient_checkpointing,
            reads_samples=training.reads_samples,
            operations=operations,
        )
        for sharding, share in shares.items()
    ]


def _shares(student: Skeleton, head: int, before: int, sharding: str, cluster: Cluster, training: Training) -> Shares:
    """A rank's shares of the student and, where there is one, of a separate critic's copy of what is trained.

    head: the parameters of the LM head. before: the bytes of the weights without adapters.
    """
    copies = 2 if training.critic == "separate" else 1
    trained = _num_trained(student, head, training)
    frozen = student.num_parameters - student.num_trained
    frozen_bytes, itemsize = before, student.trained_itemsize
    if training.adapters is None:
        frozen = copies * student.num_trained - trained
        frozen_bytes = frozen * itemsize
    elif sharding == "zero3":  # where a critic of adapters has frozen weights of its own
        frozen, frozen_bytes = copies * frozen, copies * frozen_bytes
    return training_shares(
        sharding,
        trained=trained,
        frozen=frozen,
        itemsize=itemsize,
        frozen_bytes=frozen_bytes,
        ranks=cluster.ranks,
        bf16=training.bf16,
    )


def _num_trained(student: Skeleton, head: int, training: Training) -> int:
    """Of the student and of a separate critic, whose own LM head of `head` parameters is never used, and frozen."""
    if training.critic != "separate":
        return student.num_trained
    has_frozen_head = training.adapters is None and not student.head_is_tied
    return 2 * student.num_trained - (head if has_frozen_head else 0)
