"""KL to the initial policy, early stopping, and completions without EOS."""

import copy

import pytest
import torch

from tests.students.plain_forward import chosen_log_probs
from tests.tiny_models import EOS, MODELS
from tests.trainers.plain_update import samples_of
from tests.trainers.tiny_runs import (
    METHODS,
    assert_same_weights,
    build,
    largest_difference,
    prompts,
    run,
    samples_instead,
    snapshot,
)


def test_no_reference_without_beta(tmp_path):
    recorder = run("ppo", tmp_path, max_steps=1)
    assert recorder.trainer.reference is None
    assert "kl" not in recorder.logs[0] and "beta" not in recorder.logs[0]


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("ppo", "llama"),
        pytest.param("rloo-sequence", "t5-tied", marks=pytest.mark.slow),
        pytest.param("rloo-token", "llama", marks=pytest.mark.slow),
    ],
)
def test_kl_penalty_lowers_the_reward_by_beta_per_nat(method, family, tmp_path):
    initial = MODELS[family]()
    plain = run(method, tmp_path, family=family, max_steps=1)  # the same first rollout without a penalty
    recorder = run(method, tmp_path, family=family, beta=0.3, max_steps=3, learning_rate=3e-2)
    trainer = recorder.trainer
    torch.testing.assert_close(recorder.rollouts[0].rewards_BT, plain.rollouts[0].rewards_BT, rtol=1e-4, atol=1e-5)
    assert recorder.logs[0]["kl"] == pytest.approx(0.0, abs=1e-5)

    # At the third rollout the policy has moved; rewards without the penalty come from the reward model itself.
    rollout = recorder.rollouts[2]
    policy = copy.deepcopy(trainer.model)
    policy.load_state_dict(recorder.weights[1])
    kl_B = []
    scorer = trainer.reward_model.teacher_terms[0]
    for b, sample in enumerate(samples_of(rollout)):
        text = trainer.processing_class.decode(sample.prompt, skip_special_tokens=True)
        teacher_T = scorer.score_tokens([text], [sample.completion])[0]
        new = chosen_log_probs(policy.model, sample.prompt, sample.completion)
        old = chosen_log_probs(initial, sample.prompt, sample.completion)
        kl_T = (new - old).detach()
        kl_B.append(float(kl_T.sum()))
        actual = rollout.rewards_BT[b, : len(sample.completion)].double()
        torch.testing.assert_close(actual, teacher_T.double() - 0.3 * kl_T, rtol=1e-3, atol=1e-3)
    assert max(map(abs, kl_B)) > 0.5, "the policy must have moved for this test to mean much"
    assert recorder.logs[2]["kl"] == pytest.approx(sum(kl_B) / len(kl_B), rel=1e-3, abs=1e-3)
    assert recorder.logs[2]["beta"] == 0.3


def test_reference_is_the_initial_student_and_stays_so(tmp_path):
    trainer = build("ppo", tmp_path, beta=0.1, max_steps=3)
    initial = snapshot(MODELS["t5-tied"]())
    trainer.train()
    assert_same_weights(snapshot(trainer.reference.model), initial)
    assert not any(p.requires_grad for p in trainer.reference.parameters())
    assert largest_difference(snapshot(trainer.model.model), initial) > 1e-3
    in_optimizer = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert in_optimizer.isdisjoint(id(p) for p in trainer.reference.parameters())


def test_adaptive_beta_falls_below_the_target_and_rises_above_it(tmp_path):
    # Eight sequences a rollout and a horizon of 80: at most 0.2 · 8 / 80 = 2 % a rollout.
    settings = {"beta": 0.5, "kl_horizon": 80.0, "max_steps": 4, "learning_rate": 3e-2, "seed": 1}
    below = run("rloo-sequence", tmp_path, kl_target=1000.0, **settings)
    assert [entry["beta"] for entry in below.logs] == pytest.approx([0.5, 0.5 * 0.98, 0.5 * 0.98**2, 0.5 * 0.98**3])
    above = run("rloo-sequence", tmp_path, kl_target=0.003, **settings)
    assert min(entry["kl"] for entry in above.logs[1:]) > 0.006
    # The first rollout's KL is 0, below any target.
    expected = [0.5, 0.5 * 0.98, 0.5 * 0.98 * 1.02, 0.5 * 0.98 * 1.02**2]
    assert [entry["beta"] for entry in above.logs] == pytest.approx(expected)


@pytest.mark.parametrize(("method", "accumulation"), [("ppo", 1), ("rloo-sequence", 2), ("rloo-token", 1)])
def test_early_stop_skips_the_rest_of_a_rollout_and_no_more(method, accumulation, tmp_path):
    recorder = run(
        method,
        tmp_path,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        num_iterations=3,
        early_stop_kl=1e-6,
        max_steps=6,
        weight_decay=0.1,  # would move weights even without gradients
    )
    weights = recorder.weights
    # Passes 1 to 3 of the first rollout: the second finds KL > 0, the third is skipped. Passes 4 to 6: the same.
    assert_same_weights(weights[2], weights[1])
    assert_same_weights(weights[5], weights[4])
    assert largest_difference(weights[3], weights[2]) > 1e-4, "a new rollout must start learning again"
    assert recorder.rollouts[2] is recorder.rollouts[0] and recorder.rollouts[3] is not recorder.rollouts[0]


def test_early_stop_never_makes_half_an_update(tmp_path):
    """Where KL is found too high in the first micro-batch of an optimizer step, the step is still made whole."""
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_iterations": 3,
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 0.05,
    }
    stopped = run("rloo-token", tmp_path / "stopped", early_stop_kl=1e-6, **settings)
    whole = run("rloo-token", tmp_path / "whole", **settings)
    # Pass 1 is at KL 0, pass 2 is whole and finds KL > 0, pass 3 is skipped.
    assert_same_weights(stopped.weights[1], whole.weights[1])
    assert_same_weights(stopped.weights[2], stopped.weights[1])
    assert largest_difference(whole.weights[1], whole.weights[0]) > 1e-4
    assert largest_difference(whole.weights[2], whole.weights[1]) > 1e-4
    assert stopped.logs[1]["approx_kl"] == whole.logs[1]["approx_kl"]


def test_early_stop_reads_the_kl_of_the_whole_step(tmp_path):
    """A threshold between a micro-batch's share of the step's KL and the whole: shares alone would not stop."""
    settings = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "num_iterations": 3}
    free = run("rloo-token", tmp_path / "free", max_steps=3, **settings)
    kl = free.logs[1]["approx_kl"]
    stopped = run("rloo-token", tmp_path / "stopped", max_steps=3, early_stop_kl=0.99 * kl, **settings)
    assert_same_weights(stopped.weights[2], stopped.weights[1])
    unstopped = run("rloo-token", tmp_path / "unstopped", max_steps=2, early_stop_kl=1.01 * kl, **settings)
    assert not unstopped.trainer.rollout_state.stopped


@pytest.mark.slow
def test_high_threshold_stops_nothing(tmp_path):
    settings = {"num_iterations": 3, "max_steps": 3}
    limited = run("ppo", tmp_path / "limited", early_stop_kl=1e6, **settings)
    free = run("ppo", tmp_path / "free", **settings)
    assert_same_weights(limited.weights[2], free.weights[2])
    assert largest_difference(free.weights[2], free.weights[1]) > 1e-4


def one_prompt(tmp_path, method="rloo-sequence", *completions, **settings):
    """A trainer whose student always answers the only prompt with these completions."""
    settings = {
        "data": prompts(1),
        "per_device_train_batch_size": len(completions),
        "num_generations": len(completions),
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        **settings,
    }
    trainer = build(method, tmp_path, **settings)
    samples_instead(trainer, *completions)
    return trainer


ENDED, LONGER, TRUNCATED = [5, 9, EOS], [8, EOS], [4, 4, 7, 20]


@pytest.mark.parametrize("method", METHODS)
def test_missing_eos_penalty_is_on_the_last_token_of_truncated_completions_only(method, tmp_path):
    rows = list(prompts(1))
    rewards = [
        one_prompt(tmp_path, method, ENDED, TRUNCATED, LONGER, missing_eos_penalty=penalty)
        .make_rollout(rows)
        .rewards_BT
        for penalty in (None, 2.5)
    ]
    expected = torch.zeros(3, 4)
    expected[1, 3] = -2.5
    torch.testing.assert_close(rewards[1] - rewards[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_masked_truncated_completions_leave_no_trace_in_the_gradient(method, tmp_path):
    """Whatever the truncated tokens are, of all the K; the baseline of RLOO still sees that completion's reward."""

    def constant_reward(prompts, completions, completion_ids, **columns):
        return [1.0 if ids[-1] == EOS else 5.0 for ids in completion_ids]

    results = []
    for truncated in (TRUNCATED, [21, 3, 3, 26]):
        trainer = one_prompt(
            tmp_path,
            method,
            ENDED,
            truncated,
            LONGER,
            reward=constant_reward,
            mask_truncated_completions=True,
        )
        before = snapshot(trainer.model)
        trainer.train()
        assert largest_difference(snapshot(trainer.model), before) > 1e-4
        results.append((snapshot(trainer.model), trainer.state.log_history[0]))
    assert_same_weights(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    # The metrics of the update leave them out too; those of the rollout do not.
    for name in ("loss", "grad_norm", "entropy", "ratio"):
        assert results[0][1][name] == pytest.approx(results[1][1][name], rel=1e-4, abs=1e-6)
    assert results[0][1]["completions/eos_rate"] == pytest.approx(2 / 3)
    assert results[0][1]["completions/mean_length"] == pytest.approx(3.0)  # (3 + 4 + 2) / 3


def test_masked_truncated_completions_are_not_in_the_denominator(tmp_path):
    """Sequence level: −Σ A_i over the two that ended / 2. Rewards 1, 5, 3 give A = 1 − 4 = −3 and 3 − 3 = 0: loss 1.5;
    a denominator of 3 would give 1. Token level: A_1 = −3 on 3 tokens, A_3 = 0 / (3 + 2 tokens): loss 9 / 5."""

    def reward(prompts, completions, completion_ids, **columns):
        return [{3: 1.0, 4: 5.0, 2: 3.0}[len(ids)] for ids in completion_ids]

    arguments = (ENDED, TRUNCATED, LONGER)
    trainer = one_prompt(tmp_path, "rloo-sequence", *arguments, reward=reward, mask_truncated_completions=True)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(1.5, abs=1e-5)

    # Return-to-go: 1 1 1, 5 5 5 5, 3 3 (0 once ended). A_1 = 1 − (5+3)/2 = −3, −3, then 1 − (5+0)/2 = −1.5;
    # A_3 = 3 − (1+5)/2 = 0, 0. Loss: (3 + 3 + 1.5) / 5 tokens = 1.5.
    trainer = one_prompt(tmp_path, "rloo-token", *arguments, reward=reward, mask_truncated_completions=True)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(1.5, abs=1e-5)
    assert trainer.rollout_state.rollout.advantages_BT[2, :2].tolist() == pytest.approx([0.0, 0.0])


@pytest.mark.parametrize("method", METHODS)
def test_advantages_are_whitened_over_what_is_in_the_loss(method, tmp_path):
    """Mean 0 and variance 1 over the tokens (RLOO on sequences: the completions) that are learnt from, no others."""
    settings = {"num_generations": 4, "per_device_train_batch_size": 16, "data": prompts(32, seed=4)}
    masked = {"mask_truncated_completions": True, "normalize_advantages": True, "max_steps": 1}
    rollout = run(method, tmp_path, **settings, **masked).rollouts[0]
    mask_BT = rollout.loss_mask_BT
    assert 1 < int(mask_BT.any(dim=1).sum()) < 16, "some are masked, and some are not"
    kept = (
        rollout.advantages_BT[:, 0][mask_BT.any(dim=1)]
        if method == "rloo-sequence"
        else rollout.advantages_BT[mask_BT]
    )
    assert float(kept.mean()) == pytest.approx(0.0, abs=1e-4)
    assert float(kept.var(unbiased=False)) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_learnt_from_a_rollout_that_is_wholly_masked(method, tmp_path):
    trainer = one_prompt(
        tmp_path,
        method,
        TRUNCATED,
        TRUNCATED[::-1],
        mask_truncated_completions=True,
        normalize_advantages=True,
        entropy_coef=1.0,
    )
    before = snapshot(trainer.model)
    trainer.train()
    assert_same_weights(snapshot(trainer.model), before)
    entry = trainer.state.log_history[0]
    assert entry["loss"] == 0.0 and entry["grad_norm"] == 0.0


def test_truncated_completions_are_bootstrapped_from_the_value_after_their_last_token(tmp_path):
    """γ = λ = 1, zero rewards: A_t = V_{n+1} − V_t for a truncated completion, −V_t for an ended one."""

    def nothing(prompts, completions, completion_ids, **columns):
        return [0.0] * len(completions)

    trainer = one_prompt(tmp_path, "ppo", ENDED, TRUNCATED, reward=nothing, lam=1.0, normalize_advantages=False)
    torch.nn.init.normal_(trainer.model.value_head.weight)
    trainer.rollout_state.return_mean, trainer.rollout_state.return_variance = -1.5, 4.0
    rollout = trainer.make_rollout(list(prompts(1)))
    values = -1.5 + 2.0 * rollout.old_values_BT1  # the critic's output is in standard deviations
    torch.testing.assert_close(rollout.advantages_BT[0, :3], -values[0, :3])
    torch.testing.assert_close(rollout.advantages_BT[1], values[1, 4] - values[1, :4])
    assert values.abs().min() > 1e-3
    assert rollout.advantages_BT[0, 3] == 0
