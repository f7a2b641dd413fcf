import io

import pytest
import torch
from accelerate import PartialState
from transformers import TrainingArguments

from rlkd_trl import AllActionsKDConfig, KDConfig, PPOKDConfig, ReinforceKDConfig, RLOOKDConfig
from rlkd_trl.errors import InputError
from rlkd_trl.trainers.supervised_config import SupervisedConfig

ALL = [PPOKDConfig, RLOOKDConfig, ReinforceKDConfig]
CLIPPED = [PPOKDConfig, RLOOKDConfig]


def config(config_class, tmp_path, **settings):
    settings = {"per_device_train_batch_size": 8, "num_generations": 4, **settings}
    return config_class(output_dir=str(tmp_path), **settings)


@pytest.mark.parametrize("config_class", [*ALL, KDConfig, AllActionsKDConfig, SupervisedConfig])
def test_the_hubs_token_is_not_pickled(config_class, tmp_path):
    settings, file = config_class(output_dir=str(tmp_path), hub_token="hf_secret"), io.BytesIO()
    torch.save(settings, file)
    assert b"hf_secret" not in file.getvalue() and settings.hub_token == "hf_secret"
    file.seek(0)
    assert torch.load(file, weights_only=False).learning_rate == settings.learning_rate


@pytest.mark.parametrize("config_class", ALL)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_device_train_batch_size": 6}, "not divisible by num_generations 4"),
        ({"per_device_train_batch_size": 2}, "not divisible"),
        ({"num_generations": 0}, "num_generations"),
        ({"num_generations": -4}, "num_generations"),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 3}, "not a multiple"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, "not a multiple"),
        ({"steps_per_generation": 0}, "steps_per_generation"),
        ({"top_p": 0.9}, "top_p"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "gradient_checkpointing"),
        ({"max_completion_length": 0}, "max_completion_length"),
        ({"num_iterations": 0}, "num_iterations"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"gamma": 1.01}, "gamma"),
        ({"gamma": -0.1}, "gamma"),
        ({"beta": -0.1}, "beta"),
        ({"beta": 0.1, "kl_target": 1.0, "kl_horizon": 0.0}, "kl_horizon"),
        ({"kl_target": 1.0}, "kl_target"),
        ({"beta": 0.1, "kl_target": 0.0}, "kl_target"),
        ({"beta": 0.1, "kl_target": -1.0}, "kl_target"),
        ({"beta": 0.1, "kl_target": 1.0, "kl_horizon": 7.0}, "shorter than one rollout of 8 completions"),
        ({"entropy_coef": -0.1}, "entropy_coef"),
        ({"average_reward": "batch"}, "average_reward = 'batch': choose one of none, prompt, rollout"),
        ({"average_reward": "rollout", "teacher_baseline": False}, "needs teacher_baseline"),
        ({"baseline": "median"}, "baseline = 'median': choose one of none, mean, min_variance"),
    ],
)
def test_wrong_settings_are_refused_by_name(config_class, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        config(config_class, tmp_path, **settings)


@pytest.mark.parametrize(
    ("config_class", "settings", "message"),
    [
        (PPOKDConfig, {"critic": "none"}, "critic"),
        (PPOKDConfig, {"lam": 1.5}, "lam"),
        (PPOKDConfig, {"lam": -0.5}, "lam"),
        (PPOKDConfig, {"vf_coef": -0.1}, "vf_coef"),
        (PPOKDConfig, {"critic_learning_rate": -1e-3}, "critic_learning_rate"),
        (PPOKDConfig, {"cliprange_value": 0.0}, "cliprange_value"),
        (RLOOKDConfig, {"level": "word"}, "level"),
        (ReinforceKDConfig, {"top_k": 1}, "top_k = 1"),
        (ReinforceKDConfig, {"top_k": -2}, "top_k = -2"),
        (ReinforceKDConfig, {"top_k": 5, "beta": 0.1}, "beta"),
        (ReinforceKDConfig, {"behaviour_sync_steps": 2, "beta": 0.1}, "beta"),
        (ReinforceKDConfig, {"behaviour_sync_steps": -1}, "behaviour_sync_steps"),
        (ReinforceKDConfig, {"behaviour_sync_steps": 5, "num_iterations": 2}, "not a multiple of the 2 optimizer"),
        (PPOKDConfig, {"baseline": "mean"}, "no effect with normalize_advantages"),
        (RLOOKDConfig, {"baseline": "min_variance", "normalize_advantages": True}, "no effect with normalize_adv"),
        (RLOOKDConfig, {"baseline": "mean"}, "not for level 'sequence'.*to 'none' or 'min_variance', or level to"),
        (RLOOKDConfig, {"baseline": "mean", "average_reward": "prompt"}, "not for level 'sequence'"),
        (ReinforceKDConfig, {"return_denom": 0.0}, "return_denom"),
        (ReinforceKDConfig, {"reward_clip": 0.0}, "reward_clip"),
        (ReinforceKDConfig, {"ratio_cap": 0.9}, "ratio_cap"),
        (ReinforceKDConfig, {"normalize_advantages": True, "return_denom": 2.0}, "return_denom"),
        (RLOOKDConfig, {"num_generations": 1}, "at least 2"),
        (PPOKDConfig, {"num_generations": 1, "average_reward": "prompt"}, "set it to 'rollout'"),
        (ReinforceKDConfig, {"behaviour_sync_steps": 3, "average_reward": "rollout"}, "behaviour_sync_steps"),
    ],
)
def test_wrong_settings_of_one_method(tmp_path, config_class, settings, message):
    with pytest.raises(InputError, match=message):
        config(config_class, tmp_path, **settings)


@pytest.mark.parametrize("config_class", CLIPPED)
@pytest.mark.parametrize("settings", [{"top_k": 50}, {"epsilon": 0.0}])
def test_wrong_settings_of_the_methods_that_clip(config_class, tmp_path, settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        config(config_class, tmp_path, **settings)


def test_reinforce_has_no_clip_range_to_ignore(tmp_path):
    with pytest.raises(TypeError, match="epsilon"):
        config(ReinforceKDConfig, tmp_path, epsilon=0.1)


def test_settings_that_are_ignored_are_refused(tmp_path):
    """`remove_unused_columns=True` would drop the columns that templates and rewards read."""
    with pytest.raises(InputError, match="remove_unused_columns"):
        config(PPOKDConfig, tmp_path, remove_unused_columns=True)


@pytest.mark.parametrize("config_class", ALL)
def test_one_rollout_is_one_optimizer_step_by_default(config_class, tmp_path):
    args = config(config_class, tmp_path, gradient_accumulation_steps=3)
    assert args.steps_per_generation == 3
    # 8 completions a micro-batch × 3 micro-batches / 4 completions a prompt
    assert args.prompts_per_rollout == 6


@pytest.mark.parametrize("config_class", ALL)
def test_a_rollout_may_feed_several_optimizer_steps(config_class, tmp_path):
    args = config(config_class, tmp_path, gradient_accumulation_steps=2, steps_per_generation=4)
    assert (args.steps_per_generation, args.prompts_per_rollout) == (4, 8)


def test_ppo_takes_one_completion_per_prompt(tmp_path):
    assert config(PPOKDConfig, tmp_path, num_generations=1).prompts_per_rollout == 8


def test_a_group_may_be_larger_than_a_micro_batch(tmp_path):
    args = config(RLOOKDConfig, tmp_path, per_device_train_batch_size=2, steps_per_generation=2)
    assert args.prompts_per_rollout == 1


def test_the_rest_of_the_range_is_allowed(tmp_path):
    args = config(PPOKDConfig, tmp_path, gamma=0.0, lam=0.0, beta=0.0, critic="separate", epsilon=1.5)
    assert (args.gamma, args.lam, args.beta) == (0.0, 0.0, 0.0)
    assert config(PPOKDConfig, tmp_path, num_generations=1, average_reward="rollout").average_reward == "rollout"
    assert config(PPOKDConfig, tmp_path, gamma=1.0, lam=1.0, beta=0.1, kl_target=6.0).kl_target == 6.0


@pytest.mark.parametrize("config_class", ALL)
def test_cpu_is_chosen_where_there_is_nothing_else(config_class, tmp_path):
    """Otherwise two CPU processes would train unsynchronised."""
    assert config(config_class, tmp_path).use_cpu is (not torch.accelerator.is_available())


@pytest.mark.parametrize("config_class", ALL)
def test_a_config_does_not_connect_processes_before_its_base_class_does(config_class, tmp_path, monkeypatch):
    """transformers' class connects them; whoever wants another timeout on a CPU has to know that it does."""
    states = []
    monkeypatch.setattr(PartialState, "__init__", lambda self, *args, **kwargs: states.append(kwargs))
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: 1 / 0)  # stop there
    with pytest.raises(ZeroDivisionError):
        config(config_class, tmp_path, use_cpu=True)
    assert states == []


def test_a_timeout_that_would_have_no_effect_is_refused(tmp_path, monkeypatch):
    assert config(PPOKDConfig, tmp_path, ddp_timeout=15, use_cpu=True).ddp_timeout == 15  # one process: nothing waits
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"ddp_timeout = 15 would have no effect.*timedelta\(seconds=15\)"):
        config(PPOKDConfig, tmp_path, ddp_timeout=15, use_cpu=True)
    assert not torch.distributed.is_initialized()
