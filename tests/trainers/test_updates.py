"""The gradient of an update: against loops written from the papers, and however the batch is cut."""

import copy

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5LayerNorm

from rlkd_trl import TeacherForcingReward
from rlkd_trl.rewards import LogLikelihoodReward, LogRatioReward
from rlkd_trl.teachers import Teacher, TeacherPanel
from tests.tiny_models import MODELS, word_tokenizer
from tests.trainers.plain_update import plain_loss, samples_of, targets_of
from tests.trainers.tiny_runs import (
    FULL_VOCABULARY_METHODS,
    METHODS,
    Recorder,
    assert_same_weights,
    build,
    largest_difference,
    run,
    shared_reward,
    snapshot,
    teacher_reward,
)


def with_random_value_head(trainer):
    if trainer.model.value_head is not None:
        torch.manual_seed(11)
        torch.nn.init.normal_(trainer.model.value_head.weight)
        torch.nn.init.normal_(trainer.model.value_head.bias)
    return trainer


CASES = {
    "ppo": ("ppo", "t5-tied", {}),
    "ppo, every option": (
        "ppo",
        "t5-untied",
        {
            "gamma": 0.9,
            "lam": 0.8,
            "temperature": 0.7,
            "entropy_coef": 0.5,
            "cliprange_value": 0.2,
            "vf_coef": 0.7,
            "normalize_advantages": False,
            "missing_eos_penalty": 3.0,
            "epsilon": 0.1,
        },
    ),
    "ppo, separate critic": ("ppo", "llama", {"critic": "separate", "entropy_coef": 0.1}),
    "ppo, no teacher baseline": (
        "ppo",
        "llama",
        {"teacher_baseline": False, "average_reward": "none", "num_generations": 1},
    ),
    "ppo, truncated completions masked": ("ppo", "t5-tied", {"mask_truncated_completions": True}),
    "rloo, sequences": ("rloo-sequence", "t5-tied", {"entropy_coef": 0.1, "missing_eos_penalty": 3.0}),
    "rloo, sequences, truncated completions masked": (
        "rloo-sequence",
        "llama",
        # Both sequences that are left in the loss have ended, which is good: at a higher rate, both are clipped.
        {"num_generations": 4, "mask_truncated_completions": True, "temperature": 1.3, "learning_rate": 1e-4},
    ),
    "rloo, tokens": ("rloo-token", "llama", {"gamma": 0.9, "entropy_coef": 0.1}),
    "rloo, tokens, every option": (
        "rloo-token",
        "t5-untied",
        {
            "num_generations": 4,
            "normalize_advantages": True,
            "mask_truncated_completions": True,
            "epsilon": 0.1,
            # The few tokens left in the loss move far: at ten times this rate, all of them are clipped.
            "learning_rate": 1e-3,
        },
    ),
    "rloo, tokens, no teacher baseline": (
        "rloo-token",
        "t5-tied",
        {"teacher_baseline": False, "average_reward": "none"},
    ),
    "ppo, min-variance baseline": ("ppo", "t5-tied", {"baseline": "min_variance", "normalize_advantages": False}),
    "rloo, sequences, min-variance baseline": ("rloo-sequence", "llama", {"baseline": "min_variance"}),
    "rloo, tokens, mean baseline, truncated completions masked": (
        "rloo-token",
        "t5-tied",
        {"baseline": "mean", "mask_truncated_completions": True, "num_generations": 4},
    ),
    "ppo, average reward of the rollout": (
        "ppo",
        "t5-tied",
        {"average_reward": "rollout", "missing_eos_penalty": 3.0, "normalize_advantages": False},
    ),
    "ppo, average reward of the prompt": ("ppo", "llama", {"average_reward": "prompt", "num_generations": 4}),
    "rloo, sequences, average reward of the rollout": ("rloo-sequence", "llama", {"average_reward": "rollout"}),
    "rloo, sequences, average reward of the prompt": (
        "rloo-sequence",
        "t5-tied",
        {"average_reward": "prompt", "missing_eos_penalty": 3.0, "num_generations": 4},
    ),
    "rloo, tokens, average reward of the rollout": ("rloo-token", "t5-tied", {"average_reward": "rollout"}),
    "rloo, tokens, average reward of the prompt": (
        "rloo-token",
        "llama",
        {"average_reward": "prompt", "num_generations": 4, "gamma": 0.9, "mask_truncated_completions": True},
    ),
    # K-step returns, by the k of the reward
    "ppo, 3 steps": ("ppo", "t5-tied", {"k": 3, "lam": 1.0, "gamma": 0.9, "average_reward": "none"}),
    "rloo, sequences, 2 steps": (
        "rloo-sequence",
        "t5-tied",
        {"k": 2, "learning_rate": 0.01, "average_reward": "none"},
    ),
    "rloo, tokens, 3 steps": ("rloo-token", "llama", {"k": 3, "baseline": "min_variance", "average_reward": "none"}),
}


QUICK = (
    "ppo",
    "rloo, sequences, truncated completions masked",
    "rloo, tokens",
    "ppo, average reward of the rollout",
    "rloo, sequences, average reward of the prompt",
    "rloo, tokens, average reward of the prompt",
)


@pytest.mark.parametrize(
    ("case", "accumulation"),
    [
        *((case, 4) if case in QUICK else pytest.param(case, 4, marks=pytest.mark.slow) for case in CASES),
        *(pytest.param(case, 1, marks=pytest.mark.slow) for case in ("ppo", "rloo, sequences", "rloo, tokens")),
    ],
)
def test_gradients_are_those_of_the_papers_loops(case, accumulation, tmp_path):
    """Both passes over a rollout: at ratio 1, and, after a step large enough to clip some, at other ratios."""
    method, family, settings = CASES[case]
    k = settings.get("k", 1)
    settings = {name: value for name, value in settings.items() if name != "k"}
    trainer = build(
        method,
        tmp_path,
        family=family,
        reward=shared_reward(family, gamma=settings.get("gamma", 1.0), k=k),
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        num_iterations=2,
        max_grad_norm=0.0,  # no clipping of the gradient
        optim="sgd",
        **{"learning_rate": 0.03, **settings},
    )
    with_random_value_head(trainer)
    # As if earlier rollouts had been seen, except in one case: before the first, the critic's output counts as it is.
    moments = (-1.5, 4.0) if method == "ppo" and case != "ppo" else None
    if moments is not None:
        trainer.rollout_state.return_mean, trainer.rollout_state.return_variance = moments
    policies = [copy.deepcopy(trainer.model)]
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    after_one_step = copy.deepcopy(policies[0])
    after_one_step.load_state_dict(recorder.weights[0])
    policies.append(after_one_step)

    samples = samples_of(recorder.rollouts[0])
    assert recorder.rollouts[1] is recorder.rollouts[0], "two passes over one rollout"
    assert {s.ended for s in samples} == {True, False} and len({len(s.completion) for s in samples}) > 1
    teacher = MODELS[family](seed=5)
    old = policies[0]
    old_critic = (old.critic_model or old.model) if old.value_head is not None else None
    targets = targets_of(trainer.args, method, samples, teacher, old.model, old_critic, old.value_head, moments, k)

    for step, policy in enumerate(policies):
        critic = (policy.critic_model or policy.model) if policy.value_head is not None else None
        loss = plain_loss(trainer.args, method, samples, targets, policy.model, critic, policy.value_head)
        assert recorder.logs[step]["loss"] == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-5)
        parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        norm = torch.cat([g.flatten() for g in expected if g is not None]).norm()
        assert norm > 1e-2
        assert recorder.logs[step]["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
        for name, gradient in zip(parameters, expected, strict=True):
            actual = recorder.gradients[step][name]
            if gradient is None:
                assert actual is None or (actual == 0).all(), name
                continue
            torch.testing.assert_close(
                actual, gradient, rtol=1e-3, atol=2e-5 * float(norm), msg=lambda m, name=name: f"{name}: {m}"
            )
    assert recorder.logs[1]["approx_kl"] > 1e-4, "the second pass must not be at ratio 1 for this test to mean much"


@pytest.mark.parametrize("family", ["t5-tied", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_by_its_log_ratio_a_student_that_equals_its_teacher_has_nothing_to_learn(method, family, tmp_path):
    """Without whitening, which would make advantages of full size of their rounding errors."""
    settings = {"family": family, "normalize_advantages": False, "max_steps": 1}
    norms = {}
    for seed in (0, 5):
        reward = LogRatioReward(Teacher(MODELS[family](seed=seed), word_tokenizer()))
        entry = run(method, tmp_path / str(seed), reward=reward, **settings).logs[0]
        assert abs(entry["reward"]) < 1e-4 if seed == 0 else entry["reward"] < -1e-2
        norms[seed] = entry["grad_norm"]
    assert norms[0] < 1e-3 and norms[5] > 0.1, norms


@pytest.mark.parametrize(
    ("family", "accumulation"), [pytest.param("t5-tied", 1, marks=pytest.mark.slow), ("t5-tied", 2), ("llama", 2)]
)
@pytest.mark.parametrize("method", METHODS)
def test_first_pass_is_exactly_on_policy(method, family, accumulation, tmp_path):
    """The first of two over each of two rollouts; with dropout on in the config it would not be."""
    model = MODELS[family]()
    if family == "t5-tied":
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
    recorder = run(
        method,
        tmp_path,
        family=family,
        model=model.train(),
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        temperature=0.8,
        num_iterations=2,
        max_steps=4,
    )
    assert len(recorder.logs) == 4
    for entry in recorder.logs[::2]:
        assert entry["ratio"] == pytest.approx(1.0, abs=1e-5)
        assert entry["approx_kl"] == pytest.approx(0.0, abs=1e-6)
        assert entry["clip_fraction"] == 0.0
    assert largest_difference(recorder.weights[1], recorder.weights[0]) > 1e-3


def forward_passes(policy) -> list[tuple[int, bool]]:
    """For each call of the policy's forward pass: how many completions, and whether gradients were on."""
    calls, forward = [], policy.forward

    def counted(*args, **kwargs):
        calls.append((len(kwargs["completion_ids_BT"]), torch.is_grad_enabled()))
        return forward(*args, **kwargs)

    policy.forward = counted
    return calls


def of_inputs(inputs):
    """A reward that could read the student's log-probabilities."""
    return inputs.completion_mask_BT.float()


@pytest.mark.parametrize(
    ("method", "settings", "reward", "needed"),
    [
        ("rloo-sequence", {}, None, False),
        ("rloo-token", {"mask_truncated_completions": True}, None, False),
        ("reinforce", {}, None, False),
        ("reinforce", {"baseline": "min_variance"}, None, True),
        ("reinforce", {"behaviour_sync_steps": 2}, None, True),
        ("rloo-sequence", {"baseline": "min_variance"}, None, True),
        ("rloo-sequence", {"beta": 0.1}, None, True),
        ("rloo-sequence", {"num_iterations": 2}, None, True),
        ("rloo-sequence", {"gradient_accumulation_steps": 1, "steps_per_generation": 2}, None, True),
        ("rloo-sequence", {}, of_inputs, True),
        ("ppo", {}, None, True),
        ("ppo", {"critic": "separate"}, None, True),
    ],
)
@pytest.mark.parametrize("in_16_bits", [False, pytest.param(True, marks=pytest.mark.slow(0.1))])
def test_old_log_probs_only_where_something_reads_them(method, settings, reward, needed, in_16_bits, tmp_path):
    """They come from sampling, or in 16 bits from a pass of their own; a critic of its own always needs a pass."""
    rewards = shared_reward() if reward is None else [shared_reward(), reward]
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1, **settings}
    trainer = build(method, tmp_path, reward=rewards, bf16=in_16_bits, **settings)
    calls = forward_passes(getattr(trainer, "behaviour", None) or trainer.model)
    trainer.train()
    assert (trainer.rollout_state.rollout.old_logps_BT is not None) == needed
    passes = {count for count, with_gradient in calls if not with_gradient}
    assert passes == ({8} if needed and (in_16_bits or "critic" in settings) else set())


@pytest.mark.parametrize(
    ("size", "sampled_parts", "read_parts"), [(3, [2, 2, 2, 2], [3, 3, 2]), (7, [6, 2], [7, 1]), (64, [8], [8])]
)
def test_sampling_and_reading_without_gradients_in_parts(size, sampled_parts, read_parts, tmp_path):
    """Of two completions for each prompt, which are sampled together. What is learnt stays the same."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2, "beta": 0.1}
    # AdamW would make whole steps of rounding where a gradient is nearly 0.
    settings |= {"optim": "sgd", "learning_rate": 0.1, "critic_learning_rate": 0.1}
    sizes = {"sampling_batch_size": size, "local_rollout_forward_batch_size": size}
    trainer = build("ppo", tmp_path / "parts", **sizes, **settings)
    calls, sampled = forward_passes(trainer.reference), []
    sample = trainer.model.sample

    def counted(*args, **kwargs):
        sampled.append(len(kwargs["uniforms_BT"]))
        return sample(*args, **kwargs)

    trainer.model.sample = counted
    trainer.train()
    assert sampled == 2 * sampled_parts
    assert [count for count, with_gradient in calls if not with_gradient] == 2 * read_parts
    default = run("ppo", tmp_path / "default", **settings)
    assert_same_weights(snapshot(trainer.model), default.weights[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["rloo-sequence", "rloo-token", "reinforce"])
def test_without_old_log_probs_the_update_is_the_same(method, tmp_path):
    """`of_inputs` with weight 0 changes nothing but that they are computed."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 3}
    # Ratios of 1 ± rounding: AdamW would make it whole steps where a gradient is nearly 0.
    settings |= {"optim": "sgd", "learning_rate": 0.3}
    without = run(method, tmp_path / "without", **settings)
    computed = run(
        method, tmp_path / "with", reward=[shared_reward(), of_inputs], reward_weights=[1.0, 0.0], **settings
    )
    assert without.rollouts[0].old_logps_BT is None and computed.rollouts[0].old_logps_BT is not None
    assert largest_difference(without.weights[-1], without.weights[0]) > 1e-2
    assert_same_weights(without.weights[-1], computed.weights[-1], rtol=1e-4, atol=1e-5)
    for one, other in zip(without.logs, computed.logs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", [*METHODS, *FULL_VOCABULARY_METHODS])
def test_every_pass_of_a_step_reads_the_models_fused(method, tmp_path, monkeypatch):
    """Sampling, scoring, old and reference log-probabilities, critic and loss: ratios are not those of two norms."""
    settings = {"critic": "separate", "beta": 0.1} if method == "ppo" else {}
    trainer = build(method, tmp_path, max_steps=1, **settings)

    def plain(*args):
        raise AssertionError("a norm of the model's own")

    monkeypatch.setattr(T5LayerNorm, "forward", plain)
    trainer.train()


@pytest.mark.parametrize("method", [*METHODS, *FULL_VOCABULARY_METHODS])
def test_trainer_does_not_take_the_policy_for_one_that_divides_its_loss(method, tmp_path):
    """As it takes any whose `forward` has `**kwargs`: it would then not divide by the accumulation steps."""
    assert build(method, tmp_path).model_accepts_loss_kwargs is False


def test_several_optimizer_steps_share_a_rollout(tmp_path):
    """steps_per_generation 2 × num_iterations 2: four optimizer steps a rollout, the first at ratio 1."""
    recorder = run(
        "ppo", tmp_path, per_device_train_batch_size=4, steps_per_generation=2, num_iterations=2, max_steps=8
    )
    assert [r is recorder.rollouts[0] for r in recorder.rollouts] == [True] * 4 + [False] * 4
    assert len({id(r) for r in recorder.rollouts[4:]}) == 1
    assert len(recorder.rollouts[0].completion_ids_BT) == 8
    kl = [entry["approx_kl"] for entry in recorder.logs]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[4] == pytest.approx(0, abs=1e-6)
    assert min(kl[1:4] + kl[5:]) > 1e-5


@pytest.mark.parametrize("cut", [(4, 2), pytest.param((1, 8), marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_update_does_not_depend_on_how_the_batch_is_cut(method, cut, tmp_path):
    """Eight completions in one micro-batch, or in several: same weights, losses and gradient norms."""
    settings = {
        "max_steps": 3,
        "max_grad_norm": 0.1,
        "normalize_advantages": True,
        "entropy_coef": 0.1,
        "num_iterations": 1,
        # AdamW would make a whole step out of the value bias's first gradient, which is rounding: the mean of
        # normalised returns.
        "optim": "sgd",
        "learning_rate": 1.0,
    }
    whole = run(method, tmp_path / "whole", per_device_train_batch_size=8, **settings)
    size, accumulation = cut
    parts = run(
        method,
        tmp_path / "parts",
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        **settings,
    )
    assert min(entry["grad_norm"] for entry in whole.logs) > 0.1, "gradient clipping must be active"
    lengths = whole.rollouts[0].completion_mask_BT.sum(dim=1)
    assert len(set(lengths.tolist())) > 2, "the test needs ragged completions"
    for step in range(3):
        ours, theirs = parts.rollouts[step], whole.rollouts[step]
        assert torch.equal(ours.completion_ids_BT, theirs.completion_ids_BT), f"other samples at step {step}"
        for name in ("loss", "grad_norm", "reward"):
            assert parts.logs[step][name] == pytest.approx(whole.logs[step][name], rel=1e-4, abs=1e-6), name
    assert_same_weights(parts.weights[-1], whole.weights[-1], rtol=1e-4, atol=1e-5)
    assert largest_difference(whole.weights[-1], whole.weights[0]) > 1e-2


@pytest.mark.parametrize("mask_truncated", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("method", METHODS)
def test_logged_update_metrics_do_not_depend_on_how_the_batch_is_cut(method, mask_truncated, tmp_path):
    """Means over the optimizer step's tokens, at ratios other than 1, with micro-batches that are wholly masked."""
    settings = {
        "max_steps": 2,
        "num_iterations": 2,
        "learning_rate": 3e-2,
        # AdamW would make a whole step out of the value bias's first gradient, which is rounding: the mean of
        # normalised returns.
        "optim": "sgd",
        "mask_truncated_completions": mask_truncated,
    }
    whole = run(method, tmp_path / "whole", per_device_train_batch_size=8, **settings)
    parts = run(method, tmp_path / "parts", per_device_train_batch_size=1, gradient_accumulation_steps=8, **settings)
    names = {"ratio", "approx_kl", "clip_fraction", "entropy", "value_loss", "explained_variance"}
    for step in range(2):
        theirs = {name: whole.logs[step][name] for name in names & whole.logs[step].keys()}
        ours = {name: parts.logs[step][name] for name in names & parts.logs[step].keys()}
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert whole.logs[1]["approx_kl"] > 1e-4, "the second pass must not be at ratio 1 for this test to mean much"


def test_teacher_is_frozen_and_gets_no_gradient(tmp_path):
    trainer = build("ppo", tmp_path, reward=teacher_reward(), max_steps=3)
    teacher = trainer.reward_model.panels[0].scorers[0].teacher.model
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trainer.train()
    assert_same_weights(teacher.state_dict(), before)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised.isdisjoint(id(p) for p in teacher.parameters())


def test_every_trainable_parameter_moves(tmp_path):
    trainer = build("ppo", tmp_path, max_steps=2, critic="separate")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if "critic_model" in name and "lm_head" in name and not parameter.requires_grad:
            continue
        assert (parameter - before[name]).abs().max() > 1e-4, f"{name} does not learn"


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize(("rate", "expected"), [(None, 0.02), (0.05, 0.05), (0.0, 0.0)])
def test_the_critic_learns_at_ten_times_the_rate_or_at_its_own(critic, rate, expected, tmp_path):
    """Adam's first step moves every weight that has a gradient by the learning rate."""
    trainer = build("ppo", tmp_path, critic=critic, critic_learning_rate=rate, learning_rate=2e-3, max_steps=1)
    policy = with_random_value_head(trainer).model  # from a head of zeros no gradient reaches a separate critic's body
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    of_critic = {id(p) for p in policy.critic_parameters()}
    trainer.train()
    moved = {True: [], False: []}
    for name, parameter in policy.named_parameters():
        moved[id(parameter) in of_critic].append(float((parameter - before[name]).abs().max()))
    assert moved[True] == pytest.approx([expected] * len(moved[True]), rel=0.02)
    assert max(moved[False]) == pytest.approx(2e-3, rel=0.02)


def test_two_teacher_terms_ask_the_teacher_once(tmp_path):
    panel = TeacherPanel([Teacher(MODELS["t5-tied"](seed=5), word_tokenizer())])
    calls = []
    panel.scorers[0].teacher.model.get_encoder().register_forward_hook(lambda *_: calls.append(1))
    terms = [TeacherForcingReward(panel), LogLikelihoodReward(panel)]
    recorder = run("rloo-sequence", tmp_path, reward=terms, reward_weights=[0.5, 2.0], max_steps=2)
    assert len(calls) == 2, "once per rollout"
    for entry in recorder.logs:
        forcing, likelihood = entry["rewards/TeacherForcingReward"], entry["rewards/LogLikelihoodReward"]
        assert entry["reward"] == pytest.approx(0.5 * forcing + 2.0 * likelihood, rel=1e-5)
        # The log-likelihood per token, with the other sign, is the teacher's NLL.
        assert entry["teacher_nll"] == pytest.approx(-likelihood / entry["completions/mean_length"], rel=1e-5)
