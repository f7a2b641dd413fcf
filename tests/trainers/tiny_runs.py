"""A few training steps of tiny models, and what they leave behind."""

import functools
import random
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from rlkd_trl import (
    AllActionsKDConfig,
    AllActionsKDTrainer,
    ChatFormat,
    KDConfig,
    KDTrainer,
    PPOKDConfig,
    PPOKDTrainer,
    ReinforceKDConfig,
    ReinforceKDTrainer,
    RLOOKDConfig,
    RLOOKDTrainer,
    TeacherForcingReward,
)
from rlkd_trl.models.generation import Completions
from rlkd_trl.trainers.rollout import Rollout
from tests.tiny_models import EOS, MODELS, PAD, word_tokenizer

# The ways to train on rewards, as (trainer, config, arguments of the config).
METHODS = {
    "ppo": (PPOKDTrainer, PPOKDConfig, {}),
    "rloo-sequence": (RLOOKDTrainer, RLOOKDConfig, {"level": "sequence"}),
    "rloo-token": (RLOOKDTrainer, RLOOKDConfig, {"level": "token"}),
    "reinforce": (ReinforceKDTrainer, ReinforceKDConfig, {"baseline": "none"}),
}
# Those that read the teacher's whole distribution, on samples of the student unless a test says otherwise.
FULL_VOCABULARY_METHODS = {
    "kd": (KDTrainer, KDConfig, {"divergence": "jsd", "lmbda": 1.0}),
    "all-actions": (AllActionsKDTrainer, AllActionsKDConfig, {}),
}


@functools.cache
def prompts(count: int, seed: int = 0) -> Dataset:
    """Rows with prompts of one to six words."""
    generator = random.Random(seed)
    texts = [" ".join(f"w{generator.randint(3, 26)}" for _ in range(generator.randint(1, 6))) for _ in range(count)]
    return Dataset.from_list([{"prompt": text} for text in texts])


@functools.cache
def pairs(count: int, seed: int = 0) -> Dataset:
    """`prompts` with one to three references each, of one to eight words, every tenth of them unknown."""
    generator = random.Random(seed + 1)

    def word() -> str:
        return "unheard" if generator.random() < 0.1 else f"w{generator.randint(3, 26)}"

    def text() -> str:
        return " ".join(word() for _ in range(generator.randint(1, 8)))

    references = [[text() for _ in range(generator.randint(1, 3))] for _ in range(count)]
    return prompts(count, seed).add_column("references", references)


def teacher_reward(family: str = "t5-tied", **kwargs) -> TeacherForcingReward:
    """A different model of the same family."""
    return TeacherForcingReward(MODELS[family](seed=5), word_tokenizer(), **kwargs)


_cached_reward = functools.cache(teacher_reward)


def shared_reward(family: str = "t5-tied", **kwargs) -> TeacherForcingReward:
    """`teacher_reward`, made once, for tests that change nothing of it."""
    reward = _cached_reward(family, **kwargs)
    torch.manual_seed(5)  # whether it was made just now or before, what follows draws the same
    return reward


@dataclass
class Recorder(TrainerCallback):
    """Per optimizer step: the gradients the optimizer was given, the weights after it, and the rollout in use."""

    trainer: object = None
    gradients: list[dict[str, Tensor | None]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradients.append(
            {n: None if p.grad is None else p.grad.clone() for n, p in self.trainer.model.named_parameters()}
        )
        self.rollouts.append(self.trainer.rollout_state.rollout)

    def on_step_end(self, args, state, control, **kwargs):
        self.weights.append(snapshot(self.trainer.model))

    @property
    def logs(self) -> list[dict[str, float]]:
        """One entry per logged optimizer step."""
        return [entry for entry in self.trainer.state.log_history if "loss" in entry]


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def build(
    method: str,
    output_dir,
    *,
    family: str = "t5-tied",
    model: PreTrainedModel | None = None,
    reward=None,
    data: Dataset | None = None,
    eval_data: Dataset | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    peft_config: PeftConfig | None = None,
    chat: ChatFormat | None = None,
    **settings,
):
    """A trainer on tiny models, eight completions of four prompts a step unless `settings` say otherwise.

    The methods without a reward take the teachers of `reward`.
    """
    trainer_class, config_class, arguments = {**METHODS, **FULL_VOCABULARY_METHODS}[method]
    reward = shared_reward(family) if reward is None else reward
    settings = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "num_generations": 2,
        "max_completion_length": 6,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **arguments,
        **settings,
    }
    trainer = trainer_class(
        MODELS[family]() if model is None else model,
        reward.panel if method in FULL_VOCABULARY_METHODS else reward,
        config_class(**settings),
        prompts(32) if data is None else data,
        eval_dataset=eval_data,
        processing_class=tokenizer or word_tokenizer(),
        peft_config=peft_config,
        chat=chat,
    )
    return trainer


def samples_instead(trainer, *completions: list[int]) -> None:
    """Makes the student "sample" these completions, in every rollout."""
    width = max(map(len, completions))
    ids_BT = torch.tensor([ids + [PAD] * (width - len(ids)) for ids in completions])
    mask_BT = torch.tensor([[t < len(ids) for t in range(width)] for ids in completions])
    ended_B = torch.tensor([ids[-1] == EOS for ids in completions])
    trainer.model.sample = lambda *args, **kwargs: Completions(ids_BT, mask_BT, ended_B)


def run(method: str, output_dir, **kwargs) -> Recorder:
    """Trains; returns what was recorded, with the trainer in it."""
    trainer = build(method, output_dir, **kwargs)
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    return recorder


def assert_same_weights(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda m, name=name: f"{name}: {m}"
        )


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in other)
