"""rlkd_trl: reinforcement-learning knowledge distillation for encoder-decoder and decoder-only language models."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# The module of each public name, imported when the name is first used: torch and transformers take seconds.
_HOMES = {
    "AllActionsKDConfig": "rlkd_trl.trainers.full_vocabulary_config",
    "AllActionsKDTrainer": "rlkd_trl.trainers.all_actions",
    "ChatFormat": "rlkd_trl.prompts",
    "EncoderKDConfig": "rlkd_trl.trainers.encoder_config",
    "EncoderKDTrainer": "rlkd_trl.trainers.encoder",
    "KDConfig": "rlkd_trl.trainers.full_vocabulary_config",
    "KDTrainer": "rlkd_trl.trainers.kd",
    "PPOKDConfig": "rlkd_trl.trainers.config",
    "PPOKDTrainer": "rlkd_trl.trainers.ppo",
    "PromptTemplates": "rlkd_trl.prompts",
    "RLOOKDConfig": "rlkd_trl.trainers.config",
    "RLOOKDTrainer": "rlkd_trl.trainers.rloo",
    "ReinforceKDConfig": "rlkd_trl.trainers.config",
    "ReinforceKDTrainer": "rlkd_trl.trainers.reinforce",
    "TeacherForcingReward": "rlkd_trl.rewards",
}
__all__ = [
    "AllActionsKDConfig",
    "AllActionsKDTrainer",
    "ChatFormat",
    "EncoderKDConfig",
    "EncoderKDTrainer",
    "KDConfig",
    "KDTrainer",
    "PPOKDConfig",
    "PPOKDTrainer",
    "PromptTemplates",
    "RLOOKDConfig",
    "RLOOKDTrainer",
    "ReinforceKDConfig",
    "ReinforceKDTrainer",
    "TeacherForcingReward",
]

if TYPE_CHECKING:
    from rlkd_trl.prompts import ChatFormat, PromptTemplates
    from rlkd_trl.rewards import TeacherForcingReward
    from rlkd_trl.trainers.all_actions import AllActionsKDTrainer
    from rlkd_trl.trainers.config import PPOKDConfig, ReinforceKDConfig, RLOOKDConfig
    from rlkd_trl.trainers.encoder import EncoderKDTrainer
    from rlkd_trl.trainers.encoder_config import EncoderKDConfig
    from rlkd_trl.trainers.full_vocabulary_config import AllActionsKDConfig, KDConfig
    from rlkd_trl.trainers.kd import KDTrainer
    from rlkd_trl.trainers.ppo import PPOKDTrainer
    from rlkd_trl.trainers.reinforce import ReinforceKDTrainer
    from rlkd_trl.trainers.rloo import RLOOKDTrainer


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
