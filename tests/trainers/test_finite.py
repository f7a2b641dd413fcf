"""NaN and infinity in a loss or a gradient: the step is skipped whole, many in a row stop the run, nothing is lost."""

import copy
import logging
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from rlkd_trl.errors import InputError, TrainingError
from rlkd_trl.evaluation.not_finite import check_finite
from rlkd_trl.trainers.supervised import SupervisedTrainer
from rlkd_trl.trainers.supervised_config import SupervisedConfig
from tests.tiny_models import MODELS, word_tokenizer
from tests.trainers.tiny_runs import FULL_VOCABULARY_METHODS, METHODS, assert_same_weights, build, pairs, snapshot

ALL = [*METHODS, *FULL_VOCABULARY_METHODS, "sft"]


def build_any(method: str, output_dir, **settings):
    if method != "sft":
        return build(method, output_dir, **settings)
    rows = [{"prompt": row["prompt"], "target": row["references"][0]} for row in pairs(32)]
    accumulation = settings.pop("gradient_accumulation_steps", 1)
    data = pairs(1).from_list(rows)
    args = SupervisedConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        disable_tqdm=True,
        **{"max_steps": 2, "logging_steps": 1, "save_strategy": "no", **settings},
    )
    return SupervisedTrainer(MODELS["t5-tied"](), args, data, word_tokenizer())


class Spoiler(TrainerCallback):
    """Makes a loss, or one entry of one gradient, NaN or infinite in some steps; keeps weights and states."""

    def __init__(self, trainer, steps: set[int], where: str, value: float):
        self.trainer, self.steps, self.value = trainer, steps, value
        self.weights, self.states = [snapshot(trainer.model)], []
        if where == "loss":
            compute_loss = trainer.compute_loss
            trainer.compute_loss = lambda *args, **kwargs: compute_loss(*args, **kwargs) + self.added()
        else:
            parameter = next(trainer.model.parameters())
            parameter.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), self.added() + 1e-3))
        trainer.add_callback(self)

    def added(self) -> float:
        return self.value if self.trainer.state.global_step + 1 in self.steps else 0.0

    def on_step_end(self, args, state, control, **kwargs):
        self.weights.append(snapshot(self.trainer.model))
        self.states.append(copy.deepcopy(self.trainer.optimizer.state_dict()["state"]))


def assert_same_state(one: dict, other: dict) -> None:
    assert one.keys() == other.keys() and one
    for key, tensors in one.items():
        assert all(torch.equal(tensor, other[key][name]) for name, tensor in tensors.items())


def is_whole(weights: dict[str, torch.Tensor]) -> bool:
    return all(tensor.isfinite().all() for tensor in weights.values() if tensor.is_floating_point())


@pytest.mark.parametrize(
    "where, value",
    [
        ("loss", math.nan),
        pytest.param("gradient", math.nan, marks=pytest.mark.slow(0.2)),
        pytest.param("gradient", math.inf, marks=pytest.mark.slow(0.2)),
    ],
)
@pytest.mark.parametrize("method", ALL)
def test_a_step_that_is_not_finite_is_skipped_whole(method, where, value, tmp_path):
    trainer = build_any(method, tmp_path, max_steps=3, weight_decay=0.1)
    spoiler = Spoiler(trainer, {2}, where, value)
    trainer.train()
    _, first, second, third = spoiler.weights
    assert_same_weights(second, first)
    assert_same_state(spoiler.states[1], spoiler.states[0])
    assert any(not torch.equal(third[name], first[name]) for name in first) and is_whole(third)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("steps_skipped") for entry in logs] == [None, 1.0, None]
    assert trainer.steps_skipped == 1
    assert [math.isfinite(entry["loss"]) for entry in logs] == [True, False, True], "a loss of nothing is not 0"


def test_the_logged_loss_is_the_mean_of_the_steps_taken(tmp_path):
    single = build_any("rloo-token", tmp_path, max_steps=3)
    Spoiler(single, {2}, "gradient", math.nan)
    single.train()
    first, _, third = (entry["loss"] for entry in single.state.log_history if "loss" in entry)
    trainer = build_any("rloo-token", tmp_path, max_steps=3, logging_steps=3)
    Spoiler(trainer, {2}, "gradient", math.nan)
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log["loss"] == pytest.approx((first + third) / 2, rel=1e-5) and log["steps_skipped"] == 1


@pytest.mark.parametrize("method", ["rloo-token", "sft"])
def test_a_resumed_run_remembers_the_steps_it_skipped(method, tmp_path):
    """Cut between the two skipped steps, before either is logged: the same logs as the run that was not cut."""
    settings = {"max_steps": 6, "logging_steps": 5, "save_strategy": "steps", "save_steps": 3}
    whole = build_any(method, tmp_path / "whole", **settings)
    Spoiler(whole, {2, 4}, "gradient", math.nan)
    losses, training_step = [], whole.training_step
    whole.training_step = lambda *args, **kwargs: losses.append(training_step(*args, **kwargs)) or losses[-1]
    output = whole.train()
    resumed = build_any(method, tmp_path / "resumed", **settings)
    Spoiler(resumed, {2, 4}, "gradient", math.nan)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.steps_skipped == 2
    assert_same_weights(snapshot(resumed.model), snapshot(whole.model))
    (log,), (resumed_log,) = ([e for e in t.state.log_history if "loss" in e] for t in (whole, resumed))
    assert log["steps_skipped"] == 2 and "steps_skipped" in resumed_log
    assert (resumed_log["loss"], resumed_log["steps_skipped"]) == (log["loss"], log["steps_skipped"])
    last, resumed_last = whole.state.log_history[-1], resumed.state.log_history[-1]
    taken = [float(losses[i]) for i in (0, 2, 4, 5)]
    assert last["train_loss"] == pytest.approx(sum(taken) / 4, rel=1e-5)
    assert last["train_loss"] == resumed_last["train_loss"] == output.training_loss


def test_one_micro_batch_spoils_the_whole_step(tmp_path):
    trainer = build_any("rloo-token", tmp_path, gradient_accumulation_steps=2, max_steps=3)
    losses = []
    compute_loss = trainer.compute_loss

    def spoiled(*args, **kwargs):
        losses.append(compute_loss(*args, **kwargs))
        return losses[-1] * (math.nan if len(losses) == 3 else 1.0)  # the first of the second step's two

    trainer.compute_loss = spoiled
    weights = [snapshot(trainer.model)]

    class Keep(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            weights.append(snapshot(trainer.model))

    trainer.add_callback(Keep())
    trainer.train()
    assert_same_weights(weights[2], weights[1])
    assert is_whole(weights[3]) and trainer.steps_skipped == 1


@pytest.mark.parametrize("method", ["ppo", "sft"])
def test_a_short_run_of_skipped_steps_only_is_no_success(method, tmp_path):
    """Fewer than stop a run; but the student has learnt nothing."""
    trainer = build_any(method, tmp_path, max_steps=2)
    Spoiler(trainer, {1, 2}, "gradient", math.nan)
    with pytest.raises(TrainingError, match=r"Nothing was learnt: all 2 steps were skipped, .* first in step 1 \("):
        trainer.train()


@pytest.mark.slow(0.6)
@pytest.mark.parametrize("method", ALL)
def test_many_in_a_row_stop_the_run_with_its_last_good_state(method, tmp_path):
    trainer = build_any(method, tmp_path, max_steps=20, max_skipped_steps=2)
    spoiler = Spoiler(trainer, {2, 4, 5, 6}, "gradient", math.nan)
    with pytest.raises(TrainingError) as stopped:
        trainer.train()
    name = next(name for name, _ in trainer.model.named_parameters())
    assert "stopped at step 5: the last 2 steps were skipped" in str(stopped.value)
    assert f"first in step 4 (gradients of {name} not finite)" in str(stopped.value)
    assert str(tmp_path / "checkpoint-5") in str(stopped.value)
    assert trainer.state.global_step == 5
    saved = load_file(tmp_path / "checkpoint-5" / "model.safetensors")
    prefix = "" if method == "sft" else "model."
    good = {key.removeprefix(prefix): value for key, value in spoiler.weights[3].items()}
    assert saved and all(torch.equal(tensor, good[key]) for key, tensor in saved.items())


@pytest.mark.parametrize("method", ["ppo", "sft"])
def test_weights_that_are_not_finite_are_not_saved(method, tmp_path):
    trainer = build_any(method, tmp_path)
    trainer.train()
    with torch.no_grad():
        next(trainer.model.parameters())[0] = math.inf
    with pytest.raises(TrainingError, match=r"weights are not finite after step 2 .* No checkpoint was saved before"):
        trainer.save_model()
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("method", ALL)
def test_a_student_with_a_bad_weight_is_refused(method, tmp_path):
    model = MODELS["t5-tied"]()
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 2] = math.nan
    if method == "sft":
        args = SupervisedConfig(output_dir=str(tmp_path))
        data = pairs(1).from_list([{"prompt": "w3", "target": "w4"}])
        with pytest.raises(InputError, match=r"NaN or infinite, in .*shared"):
            SupervisedTrainer(model, args, data, word_tokenizer())
    else:
        with pytest.raises(InputError, match=r"NaN or infinite, in .*shared"):
            build(method, tmp_path, model=model)


def test_a_loss_of_nan_is_never_filtered(tmp_path):
    with pytest.raises(InputError, match="logging_nan_inf_filter must stay False"):
        SupervisedConfig(output_dir=str(tmp_path), logging_nan_inf_filter=True)


def test_an_evaluation_of_nan_shows_it(tmp_path):
    """A student of NaN writes nothing, for which a reward that is a sum of negative numbers is at its best."""
    trainer = build("ppo", tmp_path, eval_data=pairs(3))
    sound = trainer.evaluate()
    assert math.isfinite(sound["eval_reward"]) and sound["eval_samples_not_finite"] == 0
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(math.nan)
    metrics = trainer.evaluate()
    assert metrics["eval_samples_not_finite"] == 3
    assert math.isnan(metrics["eval_reward"]) and math.isnan(metrics["eval_teacher_nll_per_token"])


def test_an_evaluation_counts_rewards_that_are_not_finite(tmp_path, caplog):
    """Of seven prompts in batches of two, the ones with w5 and w9: the mean of the others would be 1."""

    def mine(prompts, **columns) -> list[float]:
        return [{"w5": math.nan, "w9": -math.inf}.get(prompt, 1.0) for prompt in prompts]

    data = pairs(1).from_list([{"prompt": f"w{3 + i}"} for i in range(7)])
    trainer = build("ppo", tmp_path, reward=[mine], eval_data=data, per_device_eval_batch_size=2)
    logging.getLogger("rlkd_trl").propagate = True
    with caplog.at_level(logging.WARNING, logger="rlkd_trl"):
        metrics = trainer.evaluate()
    assert metrics["eval_samples_not_finite"] == 2 and math.isnan(metrics["eval_reward"])
    assert "the reward not finite for 2 of 7 prompts, the first of them 'w5'" in caplog.text
    with pytest.raises(TrainingError, match=r"2 samples of 'after'.* Saved"):
        check_finite({"before": {"samples_not_finite": 0}, "after": {"samples_not_finite": 2}}, "Saved.")
    check_finite({"teacher": {}, "before": {"samples_not_finite": 0}})
