"""What a reward term may read about a batch of completions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlkd_trl.teachers.scores import TeacherScores


@dataclass(frozen=True)
class RewardInputs:
    """B completions, their prompts and the data rows they came from.

    A completion has n ≤ T real tokens, its first EOS included; `completion_mask_BT` is True on them.

    rows: data row of each of the P prompts (`prompt`, and every other column).
    prompt_index_B: completion b answers prompt `prompt_index_B[b]`; see `column`.
    completion_ids_BT: the student's token ids; what stands behind the mask means nothing.
    ended_B: whether the completion ended with EOS; the others were cut off at the length cap.
    completions: decoded texts, B of them.
    student_logps_BT: log π(y_t | s_t) under the distribution that was sampled, without gradient; None where no reward
        reads it (see `TeacherReward`) and it would cost a forward pass.
    forbidden_V: True on ids outside of that distribution.
    scores: what the teacher says of each token, from its raw logits z_t `[V]` in the state s_t in which y_t was
        chosen: `scores.chosen` z_t[y_t] `[B, T]`; `scores.mean`, `scores.max` and `scores.logsumexp` over the
        vocabulary, `[B, T+1]`, the last of them in the state after a completion that was cut off (see
        `TeacherScores`). So log p(y_t) is `scores.chosen - scores.logsumexp[:, :-1]`. Of several teachers or
        templates, each statistic's weighted mean; a reward that is not linear in them is better a `TeacherReward`,
        of which the mean is taken over rewards. None where the rewards have no teacher.
    """

    rows: Sequence[Mapping[str, object]]
    prompt_index_B: Tensor
    completion_ids_BT: Tensor
    completion_mask_BT: Tensor
    ended_B: Tensor
    completions: Sequence[str] | None = None
    student_logps_BT: Tensor | None = None
    forbidden_V: Tensor | None = None
    scores: TeacherScores | None = None

    def of_completion(self, b: int) -> "RewardInputs":
        """The same with one of the completions only."""
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

    def column(self, name: str) -> list[object]:
        """A data column, once per completion."""
        return [self.rows[p][name] for p in self.prompt_index_B.tolist()]

    def token_lists(self) -> list[list[int]]:
        """Each completion's real tokens, first EOS included."""
        rows = zip(self.completion_ids_BT, self.completion_mask_BT, strict=True)
        return [ids[mask].tolist() for ids, mask in rows]
