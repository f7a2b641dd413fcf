"""float16's scaler of losses, which needs no accelerator: steps that have no gradients, and ones that overflow."""

import math

import pytest
import torch
from transformers import Trainer

from rlkd_trl.errors import TrainingError
from rlkd_trl.trainers.gradient_scaler import tolerating_empty_steps
from tests.trainers.test_finite import Spoiler, assert_same_state, build_any
from tests.trainers.tiny_runs import Recorder, assert_same_weights, build, shared_reward, snapshot

# One rollout to a step, two steps to a rollout, and steps of several micro-batches.
CUTS = [
    {"per_device_train_batch_size": 8},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4},
]


# In which rounding stays rounding.
LINEAR = {"optim": "sgd", "learning_rate": 0.1}


@pytest.fixture
def scaled(monkeypatch):
    """Trainers are given torch's scaler, as with `fp16` on an accelerator; the models stay in float32."""
    create = Trainer.create_accelerator_and_postprocess

    def with_scaler(trainer):
        create(trainer)
        accelerator = trainer.accelerator
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)

        def unscale_gradients(optimizer=None):  # as Accelerate does before it clips, with fp16
            for one in accelerator._optimizers:
                accelerator.scaler.unscale_(one.optimizer)

        monkeypatch.setattr(accelerator, "unscale_gradients", unscale_gradients)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", with_scaler)
    return monkeypatch


def losing(rollouts: set[int]):
    """A reward that is NaN for all of a rollout's samples."""
    calls = []

    def mine(prompts, **columns) -> list[float]:
        calls.append(prompts)
        return [math.nan if len(calls) in rollouts else 0.0] * len(prompts)

    return [shared_reward(), mine]


def trained(method: str, output_dir, **settings) -> Recorder:
    trainer = build(method, output_dir, **settings)
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    return recorder


@pytest.mark.slow(0.3)
@pytest.mark.parametrize(
    ("method", "lost", "cut"),
    [  # with and without a critic by turns
        ("ppo", {1}, CUTS[0]),
        ("rloo-token", {2}, CUTS[0]),
        ("ppo", {1, 3}, CUTS[0]),
        ("rloo-token", {1}, CUTS[1]),
        ("ppo", {2}, CUTS[1]),
        ("rloo-token", {1, 3}, CUTS[1]),
    ],
)
def test_lost_rollouts(method, lost, cut, scaled, tmp_path):
    """The run is the one without a scale, wherever the lost rollouts are."""
    settings = {"max_steps": 6, "lr_scheduler_type": "linear", **LINEAR, **cut}
    with_scale = trained(method, tmp_path / "scaled", reward=losing(lost), **settings)
    scaled.undo()
    without = trained(method, tmp_path / "plain", reward=losing(lost), **settings)
    assert with_scale.trainer.steps_skipped == without.trainer.steps_skipped > 0
    for one, other in zip(with_scale.weights, without.weights, strict=True):
        assert_same_weights(one, other, rtol=1e-4, atol=1e-6)
    assert [log["learning_rate"] for log in with_scale.logs] == [log["learning_rate"] for log in without.logs]
    # Doubled after two steps that have gradients.
    taken = 6 - with_scale.trainer.steps_skipped
    assert with_scale.trainer.accelerator.scaler.get_scale() == 2.0 ** (10 + taken // 2)


def test_updates_that_stop_early(scaled, tmp_path):
    """The later steps of a rollout have no gradients, and are steps none the less."""
    settings = {**CUTS[1], **LINEAR, "num_iterations": 2, "max_steps": 8, "early_stop_kl": 1e-6}
    with_scale = trained("ppo", tmp_path / "scaled", **settings)
    scaled.undo()
    without = trained("ppo", tmp_path / "plain", **settings)
    assert any(all(g is None for g in step.values()) for step in without.gradients), "nothing was stopped early"
    for one, other in zip(with_scale.weights, without.weights, strict=True):
        assert_same_weights(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["ppo", "rloo-sequence", "kd", "sft"])
def test_a_loss_that_is_not_finite(method, scaled, tmp_path):
    """The step is skipped whole, though its gradients are finite, and counted; the scale has nothing to do with it."""
    trainer = build_any(method, tmp_path, max_steps=3, weight_decay=0.1)
    spoiler = Spoiler(trainer, {2}, "loss", math.inf)
    trainer.train()
    _, first, second, third = spoiler.weights
    assert_same_weights(second, first)
    assert_same_state(spoiler.states[1], spoiler.states[0])
    assert any(not torch.equal(third[name], first[name]) for name in first)
    assert trainer.steps_skipped == 1 and trainer.accelerator.scaler.get_scale() == 2.0**11


def test_gradients_that_overflow_lower_the_scale(scaled, tmp_path):
    trainer = build_any("rloo-token", tmp_path, max_steps=3)
    spoiler = Spoiler(trainer, {2}, "gradient", math.inf)
    trainer.train()
    assert_same_weights(spoiler.weights[2], spoiler.weights[1])
    assert trainer.steps_skipped == 0 and trainer.accelerator.scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_a_lost_step_after_one_that_overflowed(optim, scaled, tmp_path):
    """It is no second overflow: the weights stay, and the schedule of learning rates goes on."""
    settings = {"max_steps": 4, "lr_scheduler_type": "linear", "optim": optim, "weight_decay": 0.1}
    trainer = build("rloo-token", tmp_path, reward=losing({3}), **settings)
    spoiler = Spoiler(trainer, {2}, "gradient", math.inf)
    trainer.train()
    assert_same_weights(spoiler.weights[3], spoiler.weights[1])
    assert any(not torch.equal(spoiler.weights[4][name], weight) for name, weight in spoiler.weights[3].items())
    rates = [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
    # Accelerate sees an overflow of the second, for which Trainer's schedule waits; a fused one keeps it to itself.
    expected = [0.01, 0.0075, 0.0075, 0.005] if optim == "adamw_torch" else [0.01, 0.0075, 0.005, 0.0025]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_gradients_that_always_overflow_stop_the_run(optim, scaled, tmp_path):
    """Ten steps take the scale from 1,024 to 1; of the steps at 1 and below two are too many."""
    trainer = build("rloo-token", tmp_path, max_steps=30, max_skipped_steps=2, optim=optim)
    Spoiler(trainer, set(range(1, 31)), "gradient", math.inf)
    with pytest.raises(TrainingError, match=r"stopped at step 11: .* overflow float16 at a scale of 1"):
        trainer.train()


def test_a_resumed_run_has_the_scale(scaled, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = build("rloo-token", tmp_path, reward=losing({2}), **settings)
    whole.train()
    resumed = build("rloo-token", tmp_path, reward=losing(set()), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(snapshot(resumed.model), snapshot(whole.model))
    assert resumed.accelerator.scaler.state_dict() == whole.accelerator.scaler.state_dict()


def test_other_scalers_are_left_alone():
    class Sharded(torch.amp.GradScaler):
        pass

    other = Sharded("cpu")
    assert tolerating_empty_steps(other, torch.device("cpu")) is other
    assert tolerating_empty_steps(None, torch.device("cpu")) is None
