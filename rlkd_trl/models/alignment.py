"""A student's completions in the tokens of a teacher with another tokenizer, and the way back for what it says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlkd_trl.models.vocabulary import check_alignable, padding_id
from rlkd_trl.ops.alignment import INSIDE, NO_SPAN, common_ends, receivers, states_before, summed_at

_NO_CHARACTER = "\ufffd"  # what a tokenizer decodes bytes to that are no character
_MOST_BYTES_OF_A_PART = 3  # of a character of UTF-8 that is not complete


@dataclass(frozen=True)
class Alignment:
    """B completions of T student tokens as U tokens of a teacher.

    ids_BU, mask_BU, ended_B: the same texts in the teacher's tokens, with its EOS where the student wrote its own.
    receiver_BU: the last student token of the common span of each teacher token. last_BT: the same of each student
    token, `NO_SPAN` for those that the teacher reads nothing of: a character that was cut off. state_BT1: the
    teacher's state at the beginning of each student state's span. unread_B: True where the teacher has no tokens for
    the text (see `TokenAligner`).
    """

    ids_BU: Tensor
    mask_BU: Tensor
    ended_B: Tensor
    receiver_BU: Tensor
    last_BT: Tensor
    state_BT1: Tensor
    unread_B: Tensor

    @property
    def readable_B(self) -> Tensor:
        return ~self.unread_B

    @property
    def is_read_BT(self) -> Tensor:
        """False on tokens of a readable text that the teacher says nothing of, True on all other tokens."""
        return (self.last_BT != NO_SPAN) | self.unread_B[:, None]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Alignment":
        """With each tensor changed, for instance to those of other completions."""
        return Alignment(**{field.name: change(getattr(self, field.name)) for field in fields(self)})

    def on_students_tokens(self, values_BU: Tensor) -> Tensor:
        """The teacher's values summed over each common span, at the span's last student token, `[B, T]`.

        NaN for completions that are not readable.
        """
        sums_BT = summed_at(values_BU, self.receiver_BU, self.mask_BU, length=self.last_BT.shape[1])
        return torch.where(self.unread_B[:, None], torch.nan, sums_BT)

    def at_students_states(self, values_BU1: Tensor) -> Tensor:
        """Each student state's value: that of the teacher's state where its common span begins, `[B, T+1]`."""
        return values_BU1.gather(1, self.state_BT1)


class TokenAligner:
    """Writes a student's completions in a teacher's tokens.

    The text of a completion, as the student's tokenizer decodes it, is read by the teacher's tokenizer. A token ends
    where the text of the tokens so far is a beginning of the whole text, and for the teacher's tokens where its
    tokenizer says that they do: so its lower-casing, its normal forms and its treatment of spaces do no harm.

    A text that was cut off within a character is read up to that: its last tokens are no text yet, in no common span,
    and the teacher says nothing of them.

    A completion is not readable if one of the tokenizers has no token for a part of it (the unknown token stands
    there), if the teacher's finds a special token of its own in it that is no content, EOS for instance, or if it
    needs more tokens than the teacher has positions for. The teacher then reads nothing of it.

    Args:
        student, teacher: Their tokenizers.
        forbidden_V: True on ids that the teacher never writes (see `vocabulary.forbidden_ids`).
        eos_ids: All that end a text of the teacher.
        max_length: The most tokens that the teacher has positions for, EOS included; None: no limit.

    Raises:
        InputError: The teacher's tokenizer cannot say where its tokens end (it is not a fast one), or has no EOS.
    """

    def __init__(
        self,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        *,
        forbidden_V: Tensor,
        eos_ids: Sequence[int],
        max_length: int | None = None,
    ):
        check_alignable(teacher)
        self.student, self.teacher = student, teacher
        self.forbidden_V, self.max_length = forbidden_V, max_length
        self._unreadable = {*forbidden_V.nonzero()[:, 0].tolist(), *eos_ids}

    def align(self, ids_BT: Tensor, mask_BT: Tensor, ended_B: Tensor) -> Alignment:
        """The completions in the teacher's tokens, on their device."""
        rows, T, device = [], ids_BT.shape[1], ids_BT.device
        for ids_T, mask_T, ended in zip(ids_BT.cpu(), mask_BT.cpu(), ended_B.tolist(), strict=True):
            ids = ids_T[mask_T].tolist()
            rows.append(self._aligned(ids[:-1] if ended else ids, ended, T))
        U = max(1, *(len(row[0]) for row in rows))

        def padded(number: int, width: int, value: int) -> Tensor:
            filled = [[*row[number], *[value] * (width - len(row[number]))] for row in rows]
            return torch.tensor(filled, device=device)

        lengths_B1 = torch.tensor([[len(row[0])] for row in rows], device=device)
        return Alignment(
            ids_BU=padded(0, U, padding_id(self.teacher)),
            mask_BU=torch.arange(U, device=device) < lengths_B1,
            ended_B=ended_B,
            receiver_BU=padded(1, U, 0),
            last_BT=padded(2, T, NO_SPAN),
            state_BT1=padded(3, T + 1, 0),
            unread_B=torch.tensor([not row[4] for row in rows], device=device),
        )

    def _aligned(self, ids: list[int], ended: bool, T: int) -> tuple[list[int], list[int], list[int], list[int], bool]:
        """The teacher's ids, receivers of both, states, and whether the text is readable, of one completion.

        ids: without EOS.
        """
        text, ends = self.read_by_student(ids, ended=ended)
        teacher_ids, teacher_ends = self.read_by_teacher(text)
        readable = self._are_readable(teacher_ids) and self.student.unk_token_id not in ids
        if ended:
            ends, teacher_ends = [*ends, len(text) + 1], [*teacher_ends, len(text) + 1]
            teacher_ids = [*teacher_ids, self.teacher.eos_token_id]
        spans = common_ends(ends, teacher_ends) if readable else []
        if not spans:  # also of a text that was cut off before its first character: nothing is read and earned
            return [], [], [], [0] * (T + 1), readable
        last, receiver = receivers(spans)
        return teacher_ids, receiver, last, states_before(spans, T), readable

    def _are_readable(self, ids: list[int]) -> bool:
        if self.max_length is not None and len(ids) >= self.max_length:  # with EOS
            return False
        return not any(index in self._unreadable or index >= len(self.forbidden_V) for index in ids)

    def read_by_student(self, ids: Sequence[int], *, ended: bool) -> tuple[str, list[int]]:
        """The text of the student's tokens, and where each of them ends in it.

        Unless it has ended, without a character of which only the first bytes are there.
        """
        if not ids:  # transformers 5.23 decodes no text to one empty text
            return "", []
        beginnings = self.student.batch_decode(
            [ids[:number] for number in range(1, len(ids) + 1)], skip_special_tokens=False
        )
        text = beginnings[-1]
        whole = text.rstrip(_NO_CHARACTER)
        if not ended and len(text) - len(whole) <= _MOST_BYTES_OF_A_PART:  # more are no part of one character
            text = whole
        ends, furthest = [], 0
        for beginning in beginnings:
            is_one = text.startswith(beginning) and len(beginning) >= furthest
            furthest = len(beginning) if is_one else furthest
            ends.append(len(beginning) if is_one else INSIDE)
        return text, ends

    def read_by_teacher(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of the teacher's tokens of the text, without special tokens, and where each of them ends in it."""
        encoded = self.teacher(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets, ends, furthest = encoded["offset_mapping"], [], 0
        for number, (_, end) in enumerate(offsets):
            next_start = offsets[number + 1][0] if number + 1 < len(offsets) else len(text)
            is_boundary = end <= next_start and end >= furthest
            furthest = max(furthest, end)
            ends.append(end if is_boundary else INSIDE)
        if ends:
            ends[-1] = len(text)  # with what it drops at the end, spaces for instance
        return encoded["input_ids"], ends
