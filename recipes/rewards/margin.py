r"""A reward of one's own that sees the teacher, as a function and as a class.

    python recipes/rloo_kd.py --reward recipes/rewards/margin.py:margin --teacher ... --student ... --dataset ...
    python recipes/ppo_kd.py --reward recipes/rewards/margin.py:MarginReward length --reward_weights 1 -0.1 ...

The margin of a token is the teacher's logit of it minus the largest logit in that state: 0 where the student wrote
what the teacher would write greedily, negative elsewhere. Every token gets its own reward. A function reads what it
needs from `RewardInputs` (the texts, the data's columns, the student's log-probabilities, the teacher's `scores`) and
returns `[B, T]`, one number per token, or `[B]`, one per completion. A class gets each teacher's and template's scores
by themselves, and the mean of its rewards is taken.
"""

from torch import Tensor

from rlkd_trl.rewards import RewardInputs, TeacherReward
from rlkd_trl.teachers import TeacherScores


def margin(inputs: RewardInputs) -> Tensor:
    """z_t[y_t] − max_v z_t[v], `[B, T]`. The last of the T+1 maxima belongs to the state after the last token."""
    return inputs.scores.chosen - inputs.scores.max[:, :-1]


class MarginReward(TeacherReward):
    """The same, but never below `lowest`, so that one odd token does not outweigh all others."""

    reads_student_log_probs = False  # can save the trainer a forward pass
    lowest = -10.0

    def rewards(self, scores: TeacherScores, inputs: RewardInputs) -> Tensor:
        return (scores.chosen - scores.max[:, :-1]).clamp(min=self.lowest)
