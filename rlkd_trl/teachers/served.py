"""A decoder-only teacher behind a server that tells the log-probabilities of texts."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlkd_trl.errors import InputError
from rlkd_trl.models.alignment import TokenAligner
from rlkd_trl.models.limits import PositionLimits
from rlkd_trl.models.prompts import prompt_token_ids
from rlkd_trl.models.vocabulary import are_same_tokens, check_special_tokens, forbidden_ids, require_eos
from rlkd_trl.prompts import ChatFormat, Message
from rlkd_trl.teachers.absent import AbsentTeacher
from rlkd_trl.teachers.completions_api import CompletionsClient
from rlkd_trl.teachers.scores import TeacherScores

_GENERATED = 1  # tokens of each request
_TRIED = 48  # tokens by which the server's tokenizer is compared with the one that is given


class ServedTeacher(AbsentTeacher):
    """Scores completions as `Teacher` does, with what a server tells: log p of each token, and of the best one.

    So its scores are of log p in place of logits: `logsumexp` is 0, and `mean`, which only the logits have, None. A
    teacher-forcing reward that is shaped by the teacher's V is the same as with the model, since the constant of a
    state, for which the mean is there, cancels. What needs the whole distribution is refused: V = "expected", V =
    "soft" at another temperature than 1. `log_ratio` compares with the teacher's whole distribution, and not with that
    over the ids which a student may write.

    Args:
        client: Connected when this is made.
        processing_class: The tokenizer of the model behind the server.
        max_prompt_length, chat: As of `Teacher`.
        allowed_special_tokens: Special tokens that the teacher may write, for the student to write them too.

    Raises:
        InputError: As `CompletionsClient.connect` and `AbsentTeacher`; or the tokenizer has no EOS.
    """

    can_score = True

    def __init__(
        self,
        client: CompletionsClient,
        processing_class: PreTrainedTokenizerBase,
        *,
        max_prompt_length: int | None = None,
        allowed_special_tokens: Sequence[str] = (),
        chat: ChatFormat | None = None,
    ):
        require_eos(processing_class)
        check_special_tokens(processing_class, allowed_special_tokens)
        self.client = client
        client.connect(_sample_ids(processing_class))
        room = None if client.max_length is None else client.max_length - _GENERATED
        limits = PositionLimits(room, room, is_shared=True)
        super().__init__(processing_class, chat=chat, limits=limits, content_tokens=allowed_special_tokens)
        self.max_prompt_length = max_prompt_length

    def describe(self) -> str:
        return f"{self.client.model}, behind a server"

    def record(self) -> dict[str, object]:
        probe = [round(logp, 3) if math.isfinite(logp) else None for logp in self.client.probe]
        return {"served": self.client.model, "chat": self.writer.record(), "probe": probe}

    def aligner(self, student: PreTrainedTokenizerBase) -> TokenAligner | None:
        """As `Teacher.aligner`."""
        if student is self.processing_class or are_same_tokens(student, self.processing_class):
            return None
        tokenizer, room = self.processing_class, self.limits.completion
        if room is not None and self.max_prompt_length is None:
            raise InputError(
                f"The teacher's server takes {room} tokens, and how many of them a completion of another tokenizer "
                "needs is not known: set the teacher's max_prompt_length, which leaves the rest."
            )
        eos_ids = [tokenizer.eos_token_id]
        return TokenAligner(
            student,
            tokenizer,
            forbidden_V=forbidden_ids(tokenizer, len(tokenizer), eos_ids, self.content_tokens),
            eos_ids=eos_ids,
            max_length=None if room is None else room - self.max_prompt_length,
        )

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
        """As `Teacher.score`; `forbidden_V` is ignored.

        Raises:
            InputError: `expected` or a `tau` other than 1, which need the whole distribution; a prompt has no tokens.
            ServerError: As `CompletionsClient.read`.
        """
        check_wanted(expected=expected, tau=tau)
        texts = self.writer.texts(prompts)
        prompt_ids_P = prompt_token_ids(self.processing_class, texts, max_length=self.max_prompt_length)
        completions = [ids[mask].tolist() for ids, mask in zip(completion_ids_BT, completion_mask_BT, strict=True)]
        prompt_ids_B = [prompt_ids_P[p] for p in prompt_index_B.tolist()]
        answers = self.client.read([[*prompt, *ids] for prompt, ids in zip(prompt_ids_B, completions, strict=True)])
        B, T = completion_ids_BT.shape
        chosen_BT, max_BT1 = torch.zeros(B, T), torch.zeros(B, T + 1)
        for b, (answer, prompt, ids) in enumerate(zip(answers, prompt_ids_B, completions, strict=True)):
            first = len(prompt) - 1  # the state from which the completion's first token was chosen
            chosen_BT[b, : len(ids)] = torch.tensor(answer.chosen[first:])
            after = [] if ended_B[b] or answer.best[-1] is None else [answer.best[-1]]
            best = torch.tensor([*answer.best[first:-1], *after])
            max_BT1[b, : len(best)] = best
        device = completion_ids_BT.device
        zeros_BT1 = torch.zeros_like(max_BT1, device=device)
        return TeacherScores(
            chosen=chosen_BT.to(device),
            mean=None,
            max=max_BT1.to(device),
            logsumexp=zeros_BT1,
            soft=None if tau is None else zeros_BT1,
        )


def _sample_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids from all over the vocabulary between two EOS, without the other special tokens."""
    ids = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    spread = ids[:: -(-len(ids) // _TRIED)]
    return [tokenizer.eos_token_id, *spread, tokenizer.eos_token_id]


def check_wanted(*, expected: bool, tau: float | None) -> None:
    """Raises `InputError` for statistics that log p of the chosen and of the best token do not tell."""
    if expected:
        raise InputError(
            "V = 'expected' is a mean over the teacher's whole distribution, and a server tells log p of the written "
            "and of the best token only: choose value 'max' or 'soft', or give the teacher itself."
        )
    if tau not in (None, 1.0):
        raise InputError(
            f"V = 'soft' at tau = {tau} needs the teacher's whole distribution, and a server tells log p of the "
            "written and of the best token only: set tau to 1, or give the teacher itself."
        )
