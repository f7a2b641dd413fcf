"""What a reward term may read about a batch of completions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RewardInputs:
    """B completions, their prompts and the data rows they came from.

    rows: data row of each of the P prompts (`prompt`, and every other column). prompt_index_B: completion b answers
    prompt `prompt_index_B[b]`. completions: decoded texts, B of them. student_logps_BT: log π(y_t | s_t) under the
    distribution that was sampled, without gradient; None where no reward reads it (see `TeacherReward`) and it would
    cost a forward pass. forbidden_V: True on ids outside of that distribution.
    """

    rows: Sequence[Mapping[str, object]]
    prompt_index_B: Tensor
    completion_ids_BT: Tensor
    completion_mask_BT: Tensor
    ended_B: Tensor
    completions: Sequence[str] | None = None
    student_logps_BT: Tensor | None = None
    forbidden_V: Tensor | None = None

    def column(self, name: str) -> list[object]:
        """A data column, once per completion."""
        return [self.rows[p][name] for p in self.prompt_index_B.tolist()]

    def token_lists(self) -> list[list[int]]:
        """Each completion's real tokens, first EOS included."""
        rows = zip(self.completion_ids_BT, self.completion_mask_BT, strict=True)
        return [ids[mask].tolist() for ids, mask in rows]
