"""What a trainer refuses before it starts."""

from collections.abc import Callable, Sequence

from datasets import Dataset

from rlkd_trl.errors import InputError
from rlkd_trl.rewards import RewardModel
from rlkd_trl.trainers.config import OnPolicyConfig


def check_prompts(dataset: Dataset, args: OnPolicyConfig) -> None:
    """Raises `InputError` if there is no column `prompt`, or fewer rows than one rollout takes."""
    if "prompt" not in dataset.column_names:
        raise InputError(
            f"The training data has no column `prompt`; its columns are: {', '.join(dataset.column_names)}."
        )
    needed = args.prompts_per_rollout * args.world_size
    if len(dataset) < needed:
        raise InputError(
            f"A rollout takes {needed} prompts (per_device_train_batch_size {args.per_device_train_batch_size} × "
            f"steps_per_generation {args.steps_per_generation} × {args.world_size} processes / num_generations "
            f"{args.num_generations}), but the data has {len(dataset)}."
        )


def checked_reward_model(
    reward_funcs: RewardModel | Callable | Sequence[Callable], args: OnPolicyConfig
) -> RewardModel:
    """The rewards as one `RewardModel`; raises `InputError` if weights or γ contradict the trainer's."""
    if isinstance(reward_funcs, RewardModel):
        if args.reward_weights is not None:
            raise InputError("reward_weights are given twice: the RewardModel has its own.")
        model = reward_funcs
    else:
        terms = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        model = RewardModel(terms, args.reward_weights)
    for term in model.teacher_terms:
        if getattr(term, "gamma", args.gamma) != args.gamma:
            raise InputError(f"The teacher-forcing reward has gamma {term.gamma}, the trainer {args.gamma}.")
    return model
