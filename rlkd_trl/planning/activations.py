"""Peak bytes of activations, counted while the package's own classes run on fake tensors.

There is no formula of layers and heads, which another architecture or a change to these classes would make wrong: what
autograd keeps, a cache copies or an attention mask takes is counted when it is created and released. `Teacher.score`
and `Policy` run as they are. Sampling is the exception, because `sample_completions` loops over tokens in Python,
which takes ten times as long on fake tensors (t5-base and 64 tokens: 99 s instead of 9 s). Here all tokens but the
last are read in one call, which leaves the same cache; a test compares with `sample_completions` on the same fake
tensors.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from rlkd_trl.models.backbone import backbone_of
from rlkd_trl.models.generation import invert_distribution
from rlkd_trl.ops.lm_head import MAX_SLICE_ELEMENTS
from rlkd_trl.planning.operations import Operation, operations_of
from rlkd_trl.planning.skeletons import THE_WORD, CopyingSkeletons, Skeleton, one_word_tokenizer
from rlkd_trl.students import Policy
from rlkd_trl.teachers import Teacher


@dataclass(frozen=True)
class Workload:
    """The sizes of what one rank reads and writes.

    prompt_tokens: S, per prompt; question_tokens: of the teacher's, None: as many. completion_tokens: T, per
    completion. num_generations: K, completions per prompt. micro_batch: completions in a micro-batch of the update.
    micro_batches: micro-batches in a rollout. teacher_batch_tokens: the most padded tokens in a scoring batch (see
    `Teacher`). sampling_batch: completions decoded at a time. forward_batch: completions read without gradients at a
    time. num_iterations: optimizer steps from one rollout, which takes no more memory.
    """

    prompt_tokens: int
    completion_tokens: int
    num_generations: int
    micro_batch: int
    micro_batches: int
    teacher_batch_tokens: int
    sampling_batch: int = 256
    forward_batch: int = 64
    num_iterations: int = 1
    question_tokens: int | None = None

    @property
    def of_teacher(self) -> "Workload":
        """With the teacher's questions as prompts."""
        return self if self.question_tokens is None else replace(self, prompt_tokens=self.question_tokens)

    @property
    def sampled_completions(self) -> int:
        """How many completions are decoded at a time: all those of some prompts, and no more than a rollout has."""
        whole_prompts = max(1, self.sampling_batch // self.num_generations) * self.num_generations
        return min(whole_prompts, self.micro_batch * self.micro_batches)

    @property
    def forwarded_completions(self) -> int:
        """How many completions are read for their log-probabilities at a time."""
        return min(self.forward_batch, self.micro_batch * self.micro_batches)

    @property
    def scored_prompts(self) -> int:
        """Prompts in one scoring batch."""
        in_rollout = self.micro_batch * self.micro_batches // self.num_generations
        tokens = self.num_generations * (self.of_teacher.prompt_tokens + self.completion_tokens)
        return max(1, min(in_rollout, self.teacher_batch_tokens // tokens))

    @property
    def scoring_batches(self) -> int:
        """How many batches the teacher scores in one rollout."""
        return -(-self.micro_batch * self.micro_batches // (self.num_generations * self.scored_prompts))


def scoring_bytes(
    teacher: Skeleton,
    workload: Workload,
    *,
    fused_attention: bool = True,
    max_slice_elements: int | None = MAX_SLICE_ELEMENTS,
    operations: list[Operation] | None = None,
) -> int:
    """Peak of `Teacher.score` on its largest batch, beyond the teacher's weights.

    max_slice_elements: logits in a slice (see `map_head_slices`), by default as many as on a GPU; None: as on a CPU.
    operations: gets those of this batch.
    """
    prompts = workload.scored_prompts
    with teacher.mode:
        batch = _Batch.of(workload.of_teacher, prompts=prompts, completions=prompts * workload.num_generations)
        scorer = Teacher(teacher.model, one_word_tokenizer(), max_batch_tokens=workload.teacher_batch_tokens)
        scorer.backbone.max_slice_elements = max_slice_elements
        truncated_B = torch.zeros(len(batch.completion_ids_BT), dtype=torch.bool)
        completions = (batch.prompt_index_B, batch.completion_ids_BT, batch.completion_mask_BT, truncated_B)
        with counted([*teacher.tensors(), *batch.tensors(), truncated_B], fused_attention, operations) as live:
            scorer.score(batch.texts(), *completions)
    return live.peak


def log_prob_bytes(
    student: Skeleton,
    workload: Workload,
    *,
    bf16: bool = False,
    fused_attention: bool = True,
    max_slice_elements: int | None = MAX_SLICE_ELEMENTS,
    operations: list[Operation] | None = None,
) -> int:
    """Peak of `Policy` without gradients on as many completions as are read at a time, beyond weights.

    max_slice_elements, operations: as for `scoring_bytes`. A separate critic's states come after these, and take less.
    """
    with student.mode:
        policy = Policy(student.model, one_word_tokenizer())
        policy.backbone.max_slice_elements = max_slice_elements
        batch = _Batch.of_completions(workload, workload.forwarded_completions)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        known = [*student.tensors(), *policy.buffers(), *batch.tensors()]
        with counted(known, fused_attention, operations) as live, autocast, torch.no_grad():
            policy(*batch.policy_inputs(), with_entropy=False)
    return live.peak


def update_bytes(
    student: Skeleton,
    workload: Workload,
    *,
    critic: str = "shared",
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    fused_attention: bool = True,
    max_slice_elements: int | None = MAX_SLICE_ELEMENTS,
    operations: list[Operation] | None = None,
) -> int:
    """Peak of forward and backward of `Policy` on one micro-batch, beyond weights and their gradients.

    critic: as `Policy` takes it. bf16: under autocast. gradient_checkpointing: with recomputed layers.
    max_slice_elements, operations: as for `scoring_bytes`.
    """
    with student.mode:
        with CopyingSkeletons():  # a separate critic is a copy
            policy = Policy(student.model, one_word_tokenizer(), critic=critic)
        policy.backbone.max_slice_elements = max_slice_elements
        if gradient_checkpointing:
            policy.activation_checkpointing_enable()
        parameters = list(policy.parameters())
        gradients = [torch.empty_like(parameter) for parameter in parameters if parameter.requires_grad]
        for parameter, gradient in zip((p for p in parameters if p.requires_grad), gradients, strict=True):
            parameter.grad = gradient
        batch = _Batch.of_completions(workload, workload.micro_batch)
        known = [*parameters, *gradients, *policy.buffers(), *batch.tensors()]
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        with counted(known, fused_attention, operations) as live:
            with autocast:
                output = policy(*batch.policy_inputs(), with_final_value=False)
                loss = output.logps_BT.sum() + output.entropy_BT.sum()  # a loss that needs every output's gradient
                if output.values is not None:
                    loss = loss + output.values.square().mean()
            del output  # a trainer does not hold it during the backward pass either
            loss.backward()
        student.model.zero_grad(set_to_none=True)
    return live.peak


def sampling_bytes(
    student: Skeleton,
    workload: Workload,
    *,
    bf16: bool = False,
    fused_attention: bool = True,
    prompt_operations: list[Operation] | None = None,
    token_operations: list[Operation] | None = None,
) -> tuple[int, int]:
    """Peak of `sample_completions` on one batch, beyond weights, and how much of it is the cache at its end.

    prompt_operations: gets those with which the prompts are read. token_operations: those of the last token.
    """
    with student.mode:
        batch = _Batch.of_completions(workload, workload.sampled_completions)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        with counted([*student.tensors(), *batch.tensors()], fused_attention) as live, autocast, torch.no_grad():
            backbone = backbone_of(student.model)
            uniforms_B = torch.zeros(len(batch.completion_ids_BT))

            def draw() -> Tensor:
                logits_BV = backbone.head(prefix.hidden_B1D[:, 0]).float()
                invert_distribution((logits_BV / 1.0).softmax(dim=-1), uniforms_B)
                return logits_BV

            live.operations = prompt_operations
            prefix = backbone.prefill(*batch.prompt).select(batch.prompt_index_B)
            live.operations = None
            # All tokens but the last two are read in one call, of which only the cache is kept: read one by one they
            # peak lower than the last step, so the peak of this call does not count.
            peak = live.peak
            if batch.completion_ids_BT.shape[1] > 2:
                backbone.extend(prefix, batch.completion_ids_BT[:, 2:])
                prefix.hidden_B1D = prefix.hidden_B1D.clone()  # without the other tokens' states
            live.peak = live.now
            logits_BV = draw()
            live.operations = token_operations
            if batch.completion_ids_BT.shape[1] > 1:  # the last token but one; the last is never read
                backbone.extend(prefix, batch.completion_ids_BT[:, :1])  # while the previous logits still exist
            del logits_BV
            cache = live.now
            draw()
    return max(peak, live.peak), cache


@dataclass(frozen=True)
class _Batch:
    """Prompts and completions of full length, except for one padded position, so that models need attention masks."""

    prompt: tuple[Tensor, Tensor]
    prompt_index_B: Tensor
    completion_ids_BT: Tensor
    completion_mask_BT: Tensor

    @classmethod
    def of(cls, workload: Workload, *, prompts: int, completions: int) -> "_Batch":
        ids_PS = torch.ones(prompts, workload.prompt_tokens, dtype=torch.long)
        ids_BT = torch.ones(completions, workload.completion_tokens, dtype=torch.long)
        mask_PS = torch.ones_like(ids_PS)
        if prompts > 1:
            mask_PS[-1, 0] = 0
        index_B = torch.arange(completions) // workload.num_generations
        return cls((ids_PS, mask_PS), index_B, ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))

    @classmethod
    def of_completions(cls, workload: Workload, completions: int) -> "_Batch":
        """Completions with as many prompts as they need."""
        return cls.of(workload, prompts=-(-completions // workload.num_generations), completions=completions)

    def texts(self) -> list[str]:
        """The prompts, for `one_word_tokenizer`."""
        return [" ".join([THE_WORD] * int(count)) for count in self.prompt[1].sum(dim=1)]

    def policy_inputs(self) -> tuple[Tensor, ...]:
        return (*self.prompt, self.prompt_index_B, self.completion_ids_BT, self.completion_mask_BT)

    def tensors(self) -> list[Tensor]:
        return list(self.policy_inputs())


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages created inside it: `now`, those that still exist, and `peak`, the most so far.

    operations: gets what is computed, if it is not None.
    """

    def __init__(self, tensors_before: Iterable[Tensor], operations: list[Operation] | None):
        super().__init__()
        self.now = self.peak = 0
        self.operations = operations
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in tensors_before)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        if self.operations is not None:
            self.operations += operations_of(func, args, kwargs or {}, result)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, nbytes: int) -> None:
        self.now -= nbytes


@contextmanager
def _with_fused_attention() -> Iterator[None]:
    """Within it attention is the memory-efficient kernel, which GPUs also use for T5's masks that need a gradient.

    No `TorchFunctionMode`, as none is in place in a backward pass, where layers may be computed again.
    """

    def attention(*args, **kwargs):
        return (scaled_dot_product_attention if kwargs.get("enable_gqa") else _fused_attention)(*args, **kwargs)

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = scaled_dot_product_attention


def _fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if torch.is_autocast_enabled(query.device.type):  # as autocast casts what goes into `scaled_dot_product_attention`
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:  # the kernel adds its mask to the scores
            attn_mask = torch.where(attn_mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    needs_backward = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    attended, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs_backward, dropout_p, is_causal, scale=scale
    )
    return attended


@contextmanager
def counted(
    tensors_before: list[Tensor], fused_attention: bool, operations: list[Operation] | None = None
) -> Iterator[_LiveBytes]:
    """Counts bytes beyond those of `tensors_before`, see `_LiveBytes`; fused_attention: as on a GPU."""
    with _LiveBytes(tensors_before, operations) as live:
        if fused_attention:
            with _with_fused_attention():
                yield live
        else:
            yield live
