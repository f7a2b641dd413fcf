"""What a reward term may read about a batch of completions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlkd_trl.models.alignment import Alignment
from rlkd_trl.teachers.scores import TeacherScores


@dataclass(frozen=True)
class RewardInputs:
    """B completions, their prompts and the data rows they came from.

    A completion has n ≤ T real tokens, its first EOS included; `completion_mask_BT` is True on them.

    rows: the data row of each of the P prompts (`prompt`, and every other column).
    prompt_index_B: completion b answers prompt `prompt_index_B[b]`; see `column`.
    completion_ids_BT: the student's token ids; meaningless behind the mask.
    ended_B: whether the completion ended with EOS; the others were cut off at the length cap.
    completions: the B decoded texts.
    student_logps_BT: log π(y_t | s_t) under the distribution that was sampled from, without gradient; None if no
        reward reads it (see `TeacherReward`), as computing it can take a forward pass.
    forbidden_V: True on ids that are not in that distribution.
    tokenizer: that of the completions, if a teacher may have another one (`align_tokenizers`); None: they are in each
        teacher's tokens. A `TeacherReward` gets its teacher's own tokens as `completion_ids_BT`, and no
        `student_logps_BT`; its rewards are then summed over the text that both tokenizers have read.
    scores: statistics of the teacher's raw logits z_t `[V]` in the state s_t, in which y_t was chosen:
        `scores.chosen`, z_t[y_t], is `[B, T]`; `scores.mean`, `scores.max` and `scores.logsumexp`, over the
        vocabulary, are `[B, T+1]`, where column T+1 is the state after a completion that was cut off (see
        `TeacherScores`). So log p(y_t) is `scores.chosen - scores.logsumexp[:, :-1]`. With several teachers or
        templates, each statistic is a weighted mean over them; a reward that is not linear in the statistics should be
        a `TeacherReward`, whose rewards are averaged instead. None if the rewards have no teacher, or if one of the
        teachers has another tokenizer.
    """

    rows: Sequence[Mapping[str, object]]
    prompt_index_B: Tensor
    completion_ids_BT: Tensor
    completion_mask_BT: Tensor
    ended_B: Tensor
    completions: Sequence[str] | None = None
    student_logps_BT: Tensor | None = None
    forbidden_V: Tensor | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    scores: TeacherScores | None = None

    def of_completion(self, b: int) -> "RewardInputs":
        """The inputs of completion b alone."""
        row = slice(b, b + 1)
        return replace(
            self,
            rows=[self.rows[int(self.prompt_index_B[b])]],
            prompt_index_B=torch.zeros_like(self.prompt_index_B[row]),
            completion_ids_BT=self.completion_ids_BT[row],
            completion_mask_BT=self.completion_mask_BT[row],
            ended_B=self.ended_B[row],
            completions=None if self.completions is None else self.completions[row],
            student_logps_BT=None if self.student_logps_BT is None else self.student_logps_BT[row],
            scores=None if self.scores is None else self.scores.rows(row),
        )

    def of_teacher(self, alignment: Alignment) -> "RewardInputs":
        """The inputs with the completions in a teacher's own tokens, of which the student has no log-probabilities."""
        return replace(
            self,
            completion_ids_BT=alignment.ids_BU,
            completion_mask_BT=alignment.mask_BU,
            ended_B=alignment.ended_B,
            student_logps_BT=None,
            forbidden_V=None,
        )

    def column(self, name: str) -> list[object]:
        """The values of a data column for the B completions, each the value of its prompt's row."""
        return [self.rows[p][name] for p in self.prompt_index_B.tolist()]

    def token_lists(self) -> list[list[int]]:
        """Each completion's real tokens, first EOS included."""
        rows = zip(self.completion_ids_BT, self.completion_mask_BT, strict=True)
        return [ids[mask].tolist() for ids, mask in rows]
