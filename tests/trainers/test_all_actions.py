"""The all-actions policy gradient: its update, what it is at its two ends, its checkpoints, its settings."""

import copy

import pytest
import torch

from rlkd_trl import AllActionsKDConfig, TeacherForcingReward
from rlkd_trl.errors import InputError
from tests.students.plain_forward import ALLOWED
from tests.tiny_models import EOS, MODELS, word_tokenizer
from tests.trainers.plain_distillation import Asked, all_actions_loss, asked_twice, assert_gradients, signals
from tests.trainers.plain_update import samples_of, teacher_rewards
from tests.trainers.tiny_runs import (
    Recorder,
    assert_same_weights,
    build,
    largest_difference,
    prompts,
    run,
    samples_instead,
    snapshot,
)

CASES = {
    "log ratio": ("t5-tied", {"future_weight": 1.0}),
    "log ratio, clipped": ("glm", {"future_weight": 1.0, "epsilon": 0.02, "num_generations": 4}),
    "MiniLLM": (
        "llama",
        {"future_weight": 1.0, "length_normalization": True, "baseline": "none", "epsilon": 0.2, "num_generations": 1},
    ),
    "teacher forcing, max": ("t5-untied", {"signal": "teacher_forcing", "gamma": 0.9}),
    "teacher forcing, expected": ("llama", {"signal": "teacher_forcing", "value": "expected", "baseline": "none"}),
    "teacher forcing, soft": ("t5-tied", {"signal": "teacher_forcing", "value": "soft", "future_weight": 0.5}),
    "expected future": ("t5-untied", {"future_weight": 1.0, "future": "expected", "temperature": 0.8}),
    "expected future, teacher forcing": (
        "llama",
        {"signal": "teacher_forcing", "future": "expected", "value": "soft", "gamma": 0.8},
    ),
    "at a temperature": ("t5-untied", {"temperature": 0.7, "future_weight": 1.0, "epsilon": 0.1}),
    "truncated completions masked": ("t5-tied", {"mask_truncated_completions": True, "future_weight": 1.0}),
    "average reward of the rollout": (
        "t5-tied",
        {"future_weight": 1.0, "average_reward": "rollout", "baseline": "none", "signal": "teacher_forcing"},
    ),
    "average reward of the prompt, expected future": (
        "llama",
        {"future_weight": 0.5, "average_reward": "prompt", "future": "expected", "gamma": 0.9},
    ),
    "ensemble": ("t5-tied", {"future_weight": 1.0}),
    "ensemble of logits": ("llama", {"ensemble": "logits", "temperature": 1.3}),
    "ensemble, teacher forcing": ("llama", {"signal": "teacher_forcing", "value": "expected"}),
}
QUICK = (
    "log ratio",
    "average reward of the prompt, expected future",
    "MiniLLM",
    "expected future",
    "teacher forcing, max",
    "at a temperature",
    "ensemble",
)


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_gradients_are_those_of_the_loops(case, tmp_path):
    """Both passes over a rollout, in two micro-batches: at ratio 1, and at other ratios."""
    family, settings = CASES[case]
    reward, teachers = asked_twice(family) if "ensemble" in case else (None, [Asked(MODELS[family](seed=5))])
    trainer = build(
        "all-actions",
        tmp_path,
        family=family,
        reward=reward,
        num_iterations=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        optim="sgd",
        **{"learning_rate": 0.03, **settings},
    )
    students = [copy.deepcopy(trainer.model.model)]
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    after_one_step = copy.deepcopy(trainer.model)
    after_one_step.load_state_dict(recorder.weights[0])
    students.append(after_one_step.model)

    samples = samples_of(recorder.rollouts[0])
    assert recorder.rollouts[1] is recorder.rollouts[0], "two passes over one rollout"
    assert {s.ended for s in samples} == {True, False} and len({len(s.completion) for s in samples}) > 1
    for step, student in enumerate(students):
        loss = all_actions_loss(trainer.args, samples, teachers, student, at_rollout=students[0])
        assert_gradients(recorder, step, loss, student)
    assert recorder.logs[0]["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert recorder.logs[1]["approx_kl"] > 1e-5, "the second pass must not be at ratio 1 for this test to mean much"


@pytest.mark.parametrize("cut", [(4, 2), pytest.param((1, 8), marks=pytest.mark.slow)])
@pytest.mark.parametrize("signal", ["log_ratio", "teacher_forcing"])
def test_update_does_not_depend_on_how_the_batch_is_cut(signal, cut, tmp_path):
    """Also where the completions of a prompt, and so its baseline, are spread over micro-batches."""
    settings = {"signal": signal, "max_steps": 3, "max_grad_norm": 0.1, "optim": "sgd", "learning_rate": 0.1}
    settings |= {"future_weight": 1.0, "mask_truncated_completions": True}
    whole = run("all-actions", tmp_path / "whole", **settings)
    size, accumulation = cut
    parts = run(
        "all-actions",
        tmp_path / "parts",
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        **settings,
    )
    assert min(entry["grad_norm"] for entry in whole.logs) > 0.1, "gradient clipping must be active"
    lengths = whole.rollouts[0].completion_mask_BT.sum(dim=1)
    assert len(set(lengths.tolist())) > 2, "the test needs ragged completions"
    for ours, theirs in zip(parts.rollouts, whole.rollouts, strict=True):
        assert torch.equal(ours.completion_ids_BT, theirs.completion_ids_BT)
    for ours, theirs in zip(parts.logs, whole.logs, strict=True):
        for name in ("loss", "grad_norm", "reward", "immediate", "entropy", "completions/mean_length"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    assert_same_weights(parts.weights[-1], whole.weights[-1], rtol=1e-4, atol=1e-5)
    assert largest_difference(whole.weights[-1], whole.weights[0]) > 1e-3


def test_without_the_future_it_is_on_policy_reverse_kl(tmp_path):
    settings = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "num_generations": 2}
    divergence = run("kd", tmp_path / "kd", divergence="reverse_kl", **settings)
    ours = run("all-actions", tmp_path / "all_actions", future_weight=0.0, **settings)
    assert [entry["loss"] for entry in ours.logs] == pytest.approx([e["loss"] for e in divergence.logs], rel=1e-4)
    assert_same_weights(ours.weights[-1], divergence.weights[-1], rtol=1e-4, atol=1e-5)
    with_future = run("all-actions", tmp_path / "future", future_weight=1.0, **settings)
    assert largest_difference(with_future.weights[-1], divergence.weights[-1]) > 1e-3


@pytest.mark.parametrize("family", ["t5-tied", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(family, tmp_path):
    reward = TeacherForcingReward(MODELS[family](), word_tokenizer())
    entry = run("all-actions", tmp_path, family=family, reward=reward, future_weight=1.0, max_steps=1).logs[0]
    for name in ("loss", "reward", "immediate"):
        assert entry[name] == pytest.approx(0, abs=1e-5), name
    assert entry["grad_norm"] < 1e-4 and entry["entropy"] > 0.1
    other = run("all-actions", tmp_path, family=family, future_weight=1.0, max_steps=1).logs[0]
    assert other["immediate"] > 1e-2 and other["grad_norm"] > 1e-2 and other["reward"] < -1e-2


def test_numbers_of_a_rollout(tmp_path):
    """One prompt with a completion that ended and one that did not: signals, futures and what is logged."""
    trainer = build(
        "all-actions",
        tmp_path,
        data=prompts(1),
        per_device_train_batch_size=2,
        signal="teacher_forcing",
        gamma=0.5,
        future_weight=0.25,
        max_steps=1,
    )
    samples_instead(trainer, [5, 9, EOS], [4, 4, 7, 20])
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    rollout, teacher = recorder.rollouts[0], Asked(MODELS["t5-tied"](seed=5))
    earned = []
    for sample in samples_of(rollout):
        # g = f − V: the shaped reward, r_t + V_{t+1} − V_t, whose V after the end does not count
        rewards, values = teacher_rewards(teacher.model, sample, gamma=1.0)
        earned.append([r + values[t + 1] - values[t] for t, r in enumerate(rewards)])
        of_loop = signals(trainer.args, [teacher], sample)
        of_tokens = [float(of_loop[t, ALLOWED.index(y)]) for t, y in enumerate(sample.completion)]
        assert of_tokens == pytest.approx(earned[-1])
    (a1, a2, a3), (b1, b2, b3, b4) = earned
    torch.testing.assert_close(
        rollout.rewards_BT, torch.tensor([[a1, a2, a3, 0.0], [b1, b2, b3, b4]]), rtol=1e-4, atol=1e-5
    )
    # F of each: ½ g_2 + ¼ g_3 + …; minus the other's; times w = ¼. At t = 3 the first has nothing to come.
    first, second = [a2 / 2 + a3 / 4, a3 / 2, 0.0], [b2 / 2 + b3 / 4 + b4 / 8, b3 / 2 + b4 / 4, b4 / 2, 0.0]
    expected = [
        [(first[0] - second[0]) / 4, (first[1] - second[1]) / 4, (first[2] - second[2]) / 4, 0.0],
        [(second[0] - first[0]) / 4, (second[1] - first[1]) / 4, (second[2] - first[2]) / 4, 0.0],
    ]
    torch.testing.assert_close(rollout.advantages_BT, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    entry = recorder.logs[0]
    assert entry["reward"] == pytest.approx((sum(earned[0]) + sum(earned[1])) / 2, rel=1e-4)
    assert entry["completions/mean_length"] == 3.5 and entry["completions/eos_rate"] == 0.5
    assert [row["reward"] for row in trainer.sample_table] == pytest.approx([sum(row) for row in earned], rel=1e-4)


@pytest.mark.parametrize("family", ["t5-tied", pytest.param("llama", marks=pytest.mark.slow)])
def test_resumed_run_ends_where_an_uninterrupted_one_does(family, tmp_path):
    settings = {"family": family, "max_steps": 5, "save_strategy": "steps", "save_steps": 2, "future_weight": 1.0}
    whole = build("all-actions", tmp_path / "whole", **settings)
    whole.train()
    resumed = build("all-actions", tmp_path / "resumed", model=MODELS[family](seed=3), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    last = [[e for e in t.state.log_history if "loss" in e][-1] for t in (whole, resumed)]
    for name in ("loss", "reward", "immediate", "grad_norm"):
        assert last[1][name] == pytest.approx(last[0][name], rel=1e-4, abs=1e-5), name
    assert_same_weights(snapshot(resumed.model), snapshot(whole.model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["t5-tied", pytest.param("llama", marks=pytest.mark.slow)])
def test_bf16_is_close_and_on_policy(family, tmp_path):
    """The gradient of this one prompt is small between its two completions, so that rounding shows."""
    settings = {"family": family, "optim": "sgd", "max_steps": 1, "data": prompts(1), "per_device_train_batch_size": 2}
    found = {}
    for bf16 in (False, True):
        trainer = build("all-actions", tmp_path, bf16=bf16, **settings)
        samples_instead(trainer, [5, 9, EOS], [4, 4, 7, 20])
        trainer.train()
        found[bf16] = trainer.state.log_history[0]
    for name, tolerance in {
        "loss": 0.05,
        "reward": 0.05,
        "immediate": 0.05,
        "entropy": 0.01,
        "grad_norm": 0.2,
    }.items():
        assert found[True][name] == pytest.approx(found[False][name], rel=tolerance)
        assert found[True][name] != found[False][name]
    assert found[True]["approx_kl"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"signal": "kindness"}, "signal = 'kindness': choose one of log_ratio, teacher_forcing"),
        ({"value": "mean"}, "value = 'mean': choose one of max, expected, soft"),
        ({"baseline": "mean"}, "baseline = 'mean': choose one of leave_one_out, none"),
        ({"ensemble": "median"}, "ensemble = 'median': choose one of probabilities, logits"),
        ({"future": "certain"}, "future = 'certain': choose one of sampled, expected"),
        ({"value": "soft"}, "value = 'soft' has no effect with signal 'log_ratio': leave it out"),
        ({"signal": "teacher_forcing", "ensemble": "logits"}, "ensemble = 'logits' has no effect with signal"),
        ({"future_weight": 0.0, "gamma": 0.5}, "gamma = 0.5 has no effect with future_weight = 0"),
        ({"future_weight": 0.0, "epsilon": 0.2}, "epsilon = 0.2 has no effect with future_weight = 0"),
        (
            {"future": "expected", "length_normalization": True},
            "future = 'expected' with length_normalization would be",
        ),
        (
            {"future": "expected", "teacher_mix": 0.2},
            "future = 'expected' with teacher_mix = 0.2 would be the gradient",
        ),
        ({"average_reward": "batch"}, "average_reward = 'batch': choose one of none, prompt, rollout"),
        (
            {"average_reward": "prompt", "num_generations": 1, "baseline": "none"},
            "average_reward = 'prompt' with num_generations = 1",
        ),
        (
            {"average_reward": "rollout", "future_weight": 0.0},
            "average_reward = 'rollout' has no effect with future_w",
        ),
        ({"average_reward": "rollout", "length_normalization": True}, "and length_normalization both take"),
        ({"average_reward": "prompt", "teacher_mix": 0.2}, "does not go with teacher_mix = 0.2"),
        ({"future_weight": -0.1}, "future_weight = -0.1 is out of range"),
        ({"gamma": 1.1}, "gamma = 1.1 is out of range"),
        ({"gamma": -0.1}, "gamma = -0.1 is out of range"),
        ({"epsilon": 0.0}, "epsilon = 0.0 is out of range"),
        ({"num_generations": 1}, "num_generations = 1: leave-one-out compares"),
        ({"top_k": 5}, "top_k=5"),
        ({"top_p": 0.9}, "top_p=0.9"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, message, tmp_path):
    with pytest.raises(InputError) as refused:
        AllActionsKDConfig(output_dir=str(tmp_path), **settings)
    assert message in str(refused.value)


def test_the_ends_of_the_ranges_are_allowed(tmp_path):
    for settings in ({"num_generations": 1, "baseline": "none"}, {"gamma": 0.0}, {"future_weight": 0.0}):
        AllActionsKDConfig(output_dir=str(tmp_path), **settings)
