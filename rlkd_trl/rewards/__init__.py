"""Rewards: teacher scores (and student log-probabilities) to one number per token."""

from rlkd_trl.rewards.inputs import RewardInputs
from rlkd_trl.rewards.recipes import REWARDS, RewardModel, RewardResult, load_reward
from rlkd_trl.rewards.teacher_rewards import (
    LogLikelihoodReward,
    LogRatioReward,
    TeacherForcingReward,
    TeacherReward,
)

__all__ = [
    "REWARDS",
    "LogLikelihoodReward",
    "LogRatioReward",
    "RewardInputs",
    "RewardModel",
    "RewardResult",
    "TeacherForcingReward",
    "TeacherReward",
    "load_reward",
]
