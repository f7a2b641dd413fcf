"""A frozen teacher: reads prompts and completions in teacher forcing, returns `TeacherScores`."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlkd_trl.errors import InputError
from rlkd_trl.models.adapters import merged, tied_weights
from rlkd_trl.models.alignment import TokenAligner
from rlkd_trl.models.backbone import backbone_of
from rlkd_trl.models.chat import PromptWriter
from rlkd_trl.models.finite import check_weights
from rlkd_trl.models.limits import PositionLimits, check_embedding_rows, check_read, position_limits
from rlkd_trl.models.loading import default_device, load_model, load_tokenizer
from rlkd_trl.models.prompts import pad_prompts, prompt_token_ids
from rlkd_trl.models.sharding import largest_of_all
from rlkd_trl.models.verification import verify
from rlkd_trl.models.vocabulary import (
    allow_special_tokens,
    are_same_tokens,
    eos_token_ids,
    forbidden_ids_of,
    padding_id,
)
from rlkd_trl.ops.lm_head import allowed_logsumexp, logit_statistics, map_head_slices
from rlkd_trl.ops.masking import state_mask
from rlkd_trl.prompts import ChatFormat, Message
from rlkd_trl.teachers.placement import Placement, ShardedModel, start_process_group
from rlkd_trl.teachers.scores import TeacherScores, empty_scores

_BATCH_TOKENS = 16384
# On a CPU larger batches are no faster, and their activations leave the cache.
_CPU_BATCH_TOKENS = 4096


class Teacher:
    """Scores completions token by token.

    The encoder (or a decoder-only model's prompt) is computed once per prompt and shared by the prompt's completions,
    cross-attention keys and values included. Prompts are sorted by length and put into batches of at most
    `max_batch_tokens` padded tokens. The LM head is applied to real positions only, in slices.

    With a sharded model (see `from_pretrained`), `score` and `states` are collective operations: all processes call
    them together, each with completions of its own, of any number and length.

    Args:
        model: An encoder-decoder or decoder-only model. It is put in eval mode and its parameters are frozen.
        processing_class: Its tokenizer. It may lack a pad token, as padding is always masked.
        max_prompt_length: Longer prompts are cut to this many tokens: a template's prompts inside their documents (see
            `prompts.shortened`), others at their end. None leaves them whole.
        max_batch_tokens: The most tokens in one scoring batch, padding included. A prompt counts once for each of its
            completions, because with a decoder-only model (or eager attention) each completion needs a copy of its
            prompt's keys and values. The completions of one prompt are never split. Default: 16,384 tokens, or 4,096
            if the model is on a CPU.
        allowed_special_tokens: Special tokens that the teacher may write besides those that its generation config
            allows (see `models.vocabulary`).
        placement: How `model` was loaded; `from_pretrained` sets it.
        chat: Whether it is asked through a chat template; by default, if its tokenizer has one (see `PromptWriter`).

    Raises:
        InputError: The architecture is not supported (see `models.verification`), the tokenizer has ids without rows
            in the embeddings, a weight is NaN or infinite, or one of `allowed_special_tokens` cannot be content; or as
            `PromptWriter`.
    """

    can_score = can_answer = True  # as not every `AbsentTeacher` can

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        *,
        max_prompt_length: int | None = None,
        max_batch_tokens: int | None = None,
        allowed_special_tokens: Sequence[str] = (),
        placement: Placement | None = None,
        chat: ChatFormat | None = None,
    ):
        check_embedding_rows("The teacher", processing_class, model.config)
        self.model = model.eval().requires_grad_(False)
        self.placement = placement or Placement()
        self._shards = ShardedModel(self.model, placement) if self.placement.is_sharded else None
        self.writer = PromptWriter(processing_class, chat)
        self.processing_class = self.writer.processing_class
        self.max_prompt_length = max_prompt_length
        if placement is None:  # otherwise `load_model` has checked them
            check_weights(model, "The teacher")
        self.backbone = backbone_of(model)
        self._max_batch_tokens = max_batch_tokens
        verify(self.backbone)
        allow_special_tokens(model, self.processing_class, allowed_special_tokens)
        # Kept with their tokenizers, whose ids are then no others'.
        self._aligners: dict[int, tuple[PreTrainedTokenizerBase, TokenAligner | None]] = {}

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        quantization: str = "none",
        placement: str = "replicated",
        offload_path: str | None = None,
        device: torch.device | str | None = None,
        **kwargs,
    ) -> "Teacher":
        """Loads a teacher from a directory or the Hub, onto the accelerator where there is one.

        Adapters are merged into their model, except into quantised weights, which would round them, and tied ones.

        `quantization` is "none", "int8" or "nf4" (see `load_model`), `placement` "replicated", "zero3" or "offload"
        (see `Placement`, also for `offload_path`). `kwargs` go to the constructor.

        Raises:
            InputError: As `Placement`, `load_tokenizer` and `load_model`.
        """
        place = Placement(placement, quantization, offload_path, dtype=dtype)
        tokenizer = load_tokenizer(name_or_path, revision=revision)
        if place.is_sharded:
            start_process_group()
            model = load_model(name_or_path, revision=revision, dtype=dtype, zero3=place.deepspeed_config)
        else:
            model = load_model(name_or_path, revision=revision, dtype=dtype, quantization=quantization)
            if isinstance(model, PeftModel) and quantization == "none" and not tied_weights(model):
                model = merged(model)
            model.to(default_device() if device is None else device)
        return cls(model, tokenizer, placement=place, **kwargs)

    @property
    def max_batch_tokens(self) -> int:
        """The limit given to the constructor, or the default for the device on which the model is now."""
        by_device = _CPU_BATCH_TOKENS if self.backbone.device.type == "cpu" else _BATCH_TOKENS
        return by_device if self._max_batch_tokens is None else self._max_batch_tokens

    @property
    def limits(self) -> PositionLimits:
        """How many tokens the model has positions for."""
        return position_limits(self.model)

    def to(self, device: torch.device) -> None:
        """Moves the model, unless its weights are shards, or Accelerate has distributed or offloaded them."""
        is_offloaded = any(parameter.is_meta for parameter in self.model.parameters())
        if self._shards is None and not is_offloaded and not getattr(self.model, "hf_device_map", None):
            self.model.to(device)

    def describe(self) -> str:
        """How the weights are kept, and how many bytes of them this process holds, in one line."""
        return self.placement.describe(self.model)

    def aligner(self, student: PreTrainedTokenizerBase) -> TokenAligner | None:
        """What writes texts of this tokenizer's tokens in the teacher's; None if both have the same tokens.

        Raises:
            InputError: As `TokenAligner`; or prompt and completion share a table of positions, and there is no
                `max_prompt_length`, which says how much room it leaves for a completion.
        """
        if id(student) not in self._aligners:
            has_same = student is self.processing_class or are_same_tokens(student, self.processing_class)
            self._aligners[id(student)] = student, None if has_same else self._new_aligner(student)
        return self._aligners[id(student)][1]

    def _new_aligner(self, student: PreTrainedTokenizerBase) -> TokenAligner:
        limits = position_limits(self.model)
        max_length = limits.completion
        if limits.is_shared and limits.completion is not None:
            if self.max_prompt_length is None:
                raise InputError(
                    f"The teacher has positions for {limits.completion} tokens, and how many of them a completion of "
                    "another tokenizer needs is not known: set the teacher's max_prompt_length, which leaves the rest."
                )
            max_length = limits.completion - self.max_prompt_length
        return TokenAligner(
            student,
            self.processing_class,
            forbidden_V=forbidden_ids_of(self.model, self.processing_class),
            eos_ids=eos_token_ids(self.model, self.processing_class),
            max_length=max_length,
        )

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[str | list[Message]],
        prompt_index_B: Tensor,
        completion_ids_BT: Tensor,
        completion_mask_BT: Tensor,
        ended_B: Tensor,
        *,
        expected: bool = False,
        tau: float | None = None,
        forbidden_V: Tensor | None = None,
    ) -> TeacherScores:
        """Scores completion b as an answer to `prompts[prompt_index_B[b]]`, a text or a conversation.

        `expected`, `tau` and `forbidden_V` (True on ids that are never sampled) request `TeacherScores.expected`,
        `.soft` and `.allowed_logsumexp`. The result is on the completions' device.

        Raises:
            InputError: A prompt has no tokens; it is named. Or there are too few positions for one and its completion.
        """
        scores = empty_scores(
            *completion_ids_BT.shape,
            expected=expected,
            soft=tau is not None,
            allowed=forbidden_V is not None,
            device=completion_ids_BT.device,
        )

        def write(rows_b: Tensor, states_bT1D: Tensor) -> None:
            T = states_bT1D.shape[1] - 1
            self._score_batch(
                states_bT1D,
                completion_ids_BT[rows_b, :T],
                completion_mask_BT[rows_b, :T],
                ended_B[rows_b],
                into=scores,
                rows_b=rows_b,
                tau=tau,
                forbidden_V=None if forbidden_V is None else forbidden_V.to(self.backbone.device),
            )

        self._read(prompts, prompt_index_B, completion_ids_BT, completion_mask_BT, write, with_head=True)
        return scores

    @torch.no_grad()
    def states(
        self,
        prompts: Sequence[str | list[Message]],
        prompt_index_B: Tensor,
        completion_ids_BT: Tensor,
        completion_mask_BT: Tensor,
    ) -> Tensor:
        """The hidden states that predict each completion's tokens, `[B, T, D]`, on the model's device in its dtype.

        `backbone.head` turns them into logits, which a loss over the whole vocabulary does in slices. What stands
        behind a completion's mask is meaningless: 0, or the state of a padding token.

        Raises:
            InputError: A prompt has no tokens; it is named.
        """
        B, T = completion_ids_BT.shape
        states_BTD = torch.zeros(B, T, self.backbone.hidden_size, dtype=self.model.dtype, device=self.backbone.device)

        def write(rows_b: Tensor, states_btD: Tensor) -> None:
            states_BTD[rows_b.to(states_BTD.device), : states_btD.shape[1]] = states_btD.to(states_BTD.dtype)

        self._read(prompts, prompt_index_B, completion_ids_BT, completion_mask_BT, write, with_head=False)
        return states_BTD

    def _read(
        self,
        prompts: Sequence[str | list[Message]],
        prompt_index_B: Tensor,
        completion_ids_BT: Tensor,
        completion_mask_BT: Tensor,
        write: Callable[[Tensor, Tensor], None],
        *,
        with_head: bool,
    ) -> None:
        """Calls `write(rows_b, states)` for each batch, with the states up to the end of its longest completion.

        with_head: `write` applies the LM head, and also needs the state after the last token.
        """
        batches = [
            (rows_b, (prompt_PS, completion_ids_BT[rows_b, :longest], index_b))
            for rows_b, prompt_PS, longest, index_b in self._inputs(prompts, prompt_index_B, completion_mask_BT)
        ]

        def read_one(rows_b: Tensor | None, inputs: tuple) -> None:
            prompt_PS, ids_bt, index_b = inputs
            states = self.backbone.completion_states(
                *prompt_PS, ids_bt.to(prompt_PS[0].device), index_b, with_final_state=with_head
            )

            def use() -> None:
                if rows_b is not None:
                    write(rows_b, states)

            if with_head:
                self.backbone.with_whole_head(use)
            else:
                use()

        device = self.backbone.device
        rounds = len(batches) if self._shards is None else largest_of_all(len(batches), device)
        # A process with fewer batches than others reads a single token instead, and `write` is not called.
        token_11 = torch.zeros(1, 1, dtype=torch.long, device=device)
        idle = None, ((token_11, torch.ones_like(token_11)), token_11, token_11[0])
        # The teacher computes in its own dtype also inside the student's autocast, so that its scores do not depend on
        # the student's precision.
        with torch.autocast(device.type, enabled=False):
            for batch in itertools.islice(itertools.chain(batches, itertools.repeat(idle)), rounds):
                self._begin_pass()
                read_one(*batch)
        if self._shards is not None:
            self._shards.drop_gathered()

    def _begin_pass(self) -> None:
        if self._shards is not None:
            self._shards.begin_pass()

    def _inputs(
        self, prompts: Sequence[str | list[Message]], prompt_index_B: Tensor, completion_mask_BT: Tensor
    ) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor], int, Tensor]]:
        """For each batch: its rows among the B completions, its prompts' ids and mask, its longest completion's
        length, and for each of its rows the index of the prompt in the batch."""
        device = self.backbone.device
        texts = self.writer.texts(prompts)
        prompt_ids = prompt_token_ids(self.processing_class, texts, max_length=self.max_prompt_length)
        lengths_B = completion_mask_BT.sum(dim=1)
        members = [torch.nonzero(prompt_index_B == p)[:, 0] for p in range(len(prompts))]
        longest_of = [int(lengths_B[rows].max()) if len(rows) else 0 for rows in members]
        check_read("The teacher", self.limits, zip(map(len, prompt_ids), longest_of, strict=True))
        for batch in self._batches(prompt_ids, members, lengths_B):
            rows_b = torch.cat([members[p] for p in batch])
            index_b = torch.repeat_interleave(
                torch.arange(len(batch), device=rows_b.device),
                torch.tensor([len(members[p]) for p in batch], device=rows_b.device),
            )
            prompt_ids_PS, prompt_mask_PS = pad_prompts(
                [prompt_ids[p] for p in batch],
                padding_side=self.backbone.padding_side,
                pad_id=padding_id(self.processing_class),
            )
            longest = max(1, int(lengths_B[rows_b].max()))
            yield rows_b, (prompt_ids_PS.to(device), prompt_mask_PS.to(device)), longest, index_b.to(device)

    def _batches(self, prompt_ids: list[list[int]], members: list[Tensor], lengths_B: Tensor) -> Iterator[list[int]]:
        """Batches of prompt indices, sorted by length, with at most `max_batch_tokens` padded tokens in each."""
        completion_tokens = [int(lengths_B[rows].max()) if len(rows) else 0 for rows in members]
        prompts = [p for p in range(len(prompt_ids)) if len(members[p])]
        batch: list[int] = []
        for p in sorted(prompts, key=lambda p: (len(prompt_ids[p]), completion_tokens[p])):
            candidate = [*batch, p]
            source = max(len(prompt_ids[q]) for q in candidate)
            target = max(completion_tokens[q] for q in candidate)
            samples = sum(len(members[q]) for q in candidate)
            if batch and samples * (source + target) > self.max_batch_tokens:
                yield batch
                candidate = [p]
            batch = candidate
        if batch:
            yield batch

    def _score_batch(self, states_bT1D, ids_bT, mask_bT, ended_b, *, into, rows_b, tau, forbidden_V) -> None:
        """Writes the statistics of a batch's states into `into`, a `TeacherScores` of all B completions."""
        device, longest = self.backbone.device, ids_bT.shape[1]
        exists_bT1 = state_mask(mask_bT, ended_b)
        # No token was chosen in the state after a truncated completion, so any id will do there.
        chosen_bT1 = torch.cat([ids_bT, torch.zeros_like(ids_bT[:, :1])], dim=1)

        def of_slice(logits_nV: Tensor, chosen_n: Tensor) -> tuple[Tensor | None, ...]:
            statistics = logit_statistics(logits_nV, chosen_n, expected=into.expected is not None, tau=tau)
            return *statistics, None if forbidden_V is None else allowed_logsumexp(logits_nV, forbidden_V)

        statistics = map_head_slices(
            self.backbone.head,
            states_bT1D[exists_bT1.to(device)],
            of_slice,
            chosen_bT1[exists_bT1].to(device),
            vocab_size=self.backbone.vocab_size,
            max_elements=self.backbone.max_slice_elements,
        )
        row_n, position_n = exists_bT1.nonzero(as_tuple=True)
        names = ("chosen", "mean", "max", "logsumexp", "expected", "soft", "allowed_logsumexp")
        for name, value_n in zip(names, statistics, strict=True):
            if value_n is None:
                continue
            value_n = value_n.to(rows_b.device)
            if name == "chosen":
                is_token = position_n < longest
                is_token &= mask_bT[row_n, position_n.clamp(max=longest - 1)]
                into.chosen[rows_b[row_n[is_token]], position_n[is_token]] = value_n[is_token]
            else:
                getattr(into, name)[rows_b[row_n], position_n] = value_n
