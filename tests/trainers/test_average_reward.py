"""`average_reward` in the trainers: what it leaves alone, what it counts, and what is logged."""

import pytest
import torch

from rlkd_trl.ops.masking import last_token
from rlkd_trl.rewards import LogLikelihoodReward, RewardInputs
from tests.tiny_models import EOS
from tests.trainers.tiny_runs import (
    FULL_VOCABULARY_METHODS,
    METHODS,
    build,
    prompts,
    run,
    samples_instead,
    teacher_reward,
)

AVERAGES = ("prompt", "rollout")
# Without whitening or normalised values of the critic, whose rounding differs.
ONE_STEP = {"max_steps": 1, "normalize_advantages": False, "optim": "sgd"}


def constant(inputs: RewardInputs) -> torch.Tensor:
    """One for every token."""
    return inputs.completion_mask_BT.float()


def one_per_completion(inputs: RewardInputs) -> torch.Tensor:
    return torch.arange(len(inputs.ended_B)).float()


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("method", METHODS)
def test_a_constant_added_to_every_tokens_reward_changes_nothing(method, average, tmp_path):
    settings = {"average_reward": average, "max_completion_length": 5, **ONE_STEP}
    advantages = {
        weight: run(method, tmp_path, reward=[teacher_reward(), constant], reward_weights=[1.0, weight], **settings)
        .rollouts[0]
        .advantages_BT
        for weight in (0.0, 8.0)
    }
    torch.testing.assert_close(advantages[8.0], advantages[0.0], rtol=1e-4, atol=1e-4)
    assert advantages[0.0].abs().max() > 0.1
    plain = {
        weight: run(
            method,
            tmp_path,
            reward=[teacher_reward(), constant],
            reward_weights=[1.0, weight],
            **{**settings, "average_reward": "none"},
        )
        .rollouts[0]
        .advantages_BT
        for weight in (0.0, 8.0)
    }
    assert (plain[8.0] - plain[0.0]).abs().max() > 1, "without it, a constant pays for length"


@pytest.mark.parametrize("average", ["none", *AVERAGES])
@pytest.mark.parametrize("method", ["ppo", "reinforce"])
def test_completions_that_are_all_alike_teach_nothing(method, average, tmp_path):
    """Their differential rewards sum to 0, so the first token, whose return is that sum, has nothing to learn.

    RLOO compares each with the others, and learns nothing of them with any average.
    """
    trainer = build(
        method,
        tmp_path,
        reward=LogLikelihoodReward(teacher_reward().panel),
        data=prompts(1),
        per_device_train_batch_size=4,
        num_generations=4,
        average_reward=average,
        **({"lam": 1.0} if method == "ppo" else {}),
        **ONE_STEP,
    )
    samples_instead(trainer, *([[5, 9, 7, EOS]] * 4))
    trainer.train()
    rollout = trainer.rollout_state.rollout
    assert rollout.rewards_BT.sum() < -1
    if average == "none":
        assert rollout.advantages_BT[:, 0].abs().min() > 0.5
    else:
        torch.testing.assert_close(rollout.advantages_BT[:, 0], torch.zeros(4), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_completion_earns_once_is_not_in_the_average(method, tmp_path):
    """A reward function's number per completion, and the penalty for a missing EOS, keep their full price."""

    def trained(**settings):
        trainer = build(method, tmp_path, data=prompts(1), per_device_train_batch_size=2, **{**ONE_STEP, **settings})
        samples_instead(trainer, [5, 9, EOS], [4, 4, 7, 20])
        trainer.train()
        (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
        return trainer.rollout_state.rollout, entry

    alone, entry = trained(average_reward="rollout")
    # shaped rewards q_t − V_t of seven tokens, from the rollout's own q_t − V_{t+1}
    shaped_BT = alone.rewards_BT + alone.potentials_BT1[:, 1:] - alone.potentials_BT1[:, :-1]
    shaped_BT[0, 2] -= alone.potentials_BT1[0, 3]  # after EOS, V is 0
    expected = (float(shaped_BT[0, :3].sum()) + float(shaped_BT[1].sum())) / 7
    assert entry["average_reward"] == pytest.approx(expected, rel=1e-4) and expected < -0.1

    both, with_both = trained(
        average_reward="rollout",
        missing_eos_penalty=3.0,
        reward=[teacher_reward(), one_per_completion],
        reward_weights=[1.0, 10.0],
    )
    assert with_both["average_reward"] == pytest.approx(entry["average_reward"], rel=1e-5)
    added_BT = (both.rewards_BT - alone.rewards_BT)[:, :4]
    torch.testing.assert_close(added_BT, 7.0 * last_token(alone.completion_mask_BT) * torch.tensor([[0.0], [1.0]]))
    assert torch.equal(both.completion_rewards_BT, added_BT.round())


@pytest.mark.parametrize("method", [*METHODS, *FULL_VOCABULARY_METHODS])
def test_ppo_and_rloo_have_it_unless_it_is_turned_off(method, tmp_path):
    by_default = {"ppo": "rollout", "rloo-sequence": "rollout", "rloo-token": "rollout"}.get(method, "none")
    entry = run(method, tmp_path, max_steps=1).logs[0]
    assert ("average_reward" in entry) == (by_default != "none")
    if by_default != "none":
        again, off = (run(method, tmp_path, max_steps=1, average_reward=name) for name in (by_default, "none"))
        assert again.logs[0]["average_reward"] == entry["average_reward"] and "average_reward" not in off.logs[0]


@pytest.mark.parametrize("average", AVERAGES)
def test_the_logged_average_is_that_of_the_rollout(average, tmp_path):
    """With log_likelihood, minus the teacher's NLL per token."""
    reward = LogLikelihoodReward(teacher_reward().panel)
    for entry in run("rloo-token", tmp_path, reward=reward, average_reward=average, max_steps=2).logs:
        assert entry["average_reward"] == pytest.approx(-entry["teacher_nll"], rel=1e-5)


def test_the_kl_penalty_is_part_of_every_tokens_reward(tmp_path):
    reward = LogLikelihoodReward(teacher_reward().panel)
    settings = {"average_reward": "rollout", "beta": 0.5, "max_steps": 3, "learning_rate": 3e-2}
    entry = run("rloo-token", tmp_path, reward=reward, **settings).logs[-1]
    kl_per_token = entry["kl"] / entry["completions/mean_length"]
    assert kl_per_token > 1e-2
    assert entry["average_reward"] == pytest.approx(-entry["teacher_nll"] - 0.5 * kl_per_token, rel=1e-4)
