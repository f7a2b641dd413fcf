"""The on-policy loop and its PPO and RLOO forms."""

from rlkd_trl.trainers.config import OnPolicyConfig, PPOKDConfig, RLOOKDConfig
from rlkd_trl.trainers.on_policy import OnPolicyTrainer
from rlkd_trl.trainers.ppo import PPOKDTrainer
from rlkd_trl.trainers.rloo import RLOOKDTrainer

__all__ = [
    "OnPolicyConfig",
    "OnPolicyTrainer",
    "PPOKDConfig",
    "PPOKDTrainer",
    "RLOOKDConfig",
    "RLOOKDTrainer",
]
