"""A sample with a number that is not finite is dropped: the update is the one without it, and nothing hides it."""

import functools
import logging
import math

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from rlkd_trl.errors import TrainingError
from rlkd_trl.ops.advantages import leave_one_out, token_leave_one_out
from rlkd_trl.ops.finite import usable_rows, usable_states
from rlkd_trl.trainers.supervised import SupervisedTrainer
from rlkd_trl.trainers.supervised_config import SupervisedConfig
from tests.tiny_models import EOS, MODELS, word_tokenizer
from tests.trainers.tiny_runs import (
    FULL_VOCABULARY_METHODS,
    METHODS,
    Recorder,
    build,
    samples_instead,
    shared_reward,
    teacher_reward,
)

# Of float32 sums in another order, where gradients reach 13.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
BAD = 26  # a token that only the samples to be dropped have
GOOD = [[5, 6, EOS], [7, 8, 9, 10, 11, 12], [13, EOS], [14, 15, 16, EOS], [17, EOS], [18, 19, 20, 21, EOS], [22, EOS]]
GOOD += [[6, 6, EOS], [9, 9, 9, 9, 9, 9], [8, EOS]]
DROPPED = [[BAD, 4, EOS], [3, BAD, 3, 3, 3, 3], [BAD, EOS], [4, 4, 4, BAD, EOS], [BAD, 3, EOS]]
DATA = Dataset.from_list([{"prompt": f"w{3 + i} w{4 + i}"} for i in range(5)])


def zero(prompts, completion_ids, **columns) -> list[float]:
    return [0.0] * len(prompts)


def spoiled(value: float):
    def spoil(prompts, completion_ids, **columns) -> list[float]:
        return [value if BAD in ids else 0.0 for ids in completion_ids]

    return spoil


def spoil_states(trainer) -> None:
    """The teacher's states along the completions to be dropped are NaN."""
    states = trainer.panel.states

    def of_completions(rows, prompt_index_B, ids_BT, mask_BT):
        found = states(rows, prompt_index_B, ids_BT, mask_BT)
        return [each + _nan_where_bad(ids_BT, each) for each in found]

    trainer.panel.states = of_completions


def spoil_student(trainer) -> None:
    """The student's forward pass gives NaN wherever it reads a completion to be dropped, in the update too."""
    backbone = trainer.model.backbone
    states = backbone.completion_states

    def of_completions(prompt_ids, prompt_mask, completion_ids_BT, prompt_index_B, **kwargs):
        found = states(prompt_ids, prompt_mask, completion_ids_BT, prompt_index_B, **kwargs)
        return found * (1 + _nan_where_bad(completion_ids_BT, found))

    backbone.completion_states = of_completions


def _nan_where_bad(ids_BT, like_BTD):
    is_bad_B = (ids_BT == BAD).any(dim=1)
    return torch.where(is_bad_B, math.nan, 0.0)[:, None, None].to(like_BTD.dtype)


def gradients_of(method: str, output_dir, where: str, *, with_dropped: bool, **settings):
    """Of one step on five prompts: two good completions each, and with `with_dropped` a third to be dropped."""
    reward = [shared_reward(), spoiled(math.inf) if where == "reward" else zero]
    extra = {"num_iterations": 2} if where == "student" and method.startswith("rloo") else {}
    count = 3 if with_dropped else 2
    trainer = build(
        method,
        output_dir,
        reward=teacher_reward() if method in FULL_VOCABULARY_METHODS else reward,
        data=DATA,
        num_generations=count,
        per_device_train_batch_size=5 * count,
        max_steps=1,
        max_grad_norm=0.0,
        **settings,
        **extra,
    )
    pairs = [GOOD[i : i + 2] for i in range(0, 10, 2)]
    order = [[a, bad, b] for (a, b), bad in zip(pairs, DROPPED, strict=True)] if with_dropped else pairs
    samples_instead(trainer, *(ids for group in order for ids in group))
    if with_dropped and where == "teacher":
        spoil_states(trainer)
    if where == "student":
        spoil_student(trainer)
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    return recorder


CASES = [(method, "reward") for method in METHODS]
CASES += [(method, "teacher") for method in FULL_VOCABULARY_METHODS]
CASES += [("ppo", "student"), ("rloo-sequence", "student"), ("all-actions", "student")]


@pytest.mark.parametrize("method, where", CASES)
def test_the_update_is_the_one_without_the_dropped_samples(method, where, tmp_path):
    dirty = gradients_of(method, tmp_path, where, with_dropped=True)
    clean = gradients_of(method, tmp_path, where, with_dropped=False)
    for name, expected in clean.gradients[0].items():
        if expected is not None:
            torch.testing.assert_close(dirty.gradients[0][name], expected, **ROUNDING, msg=name)
    (log,), (clean_log,) = dirty.logs, clean.logs
    assert log["samples_dropped"] == 5 and "samples_dropped" not in clean_log
    for name in ("reward", "reward_std", "teacher_nll", "completions/mean_length", "completions/eos_rate", "entropy"):
        if name in clean_log:
            assert log[name] == pytest.approx(clean_log[name], rel=1e-4), name
    assert dirty.trainer.cost().generated_tokens == sum(map(len, GOOD)) + sum(map(len, DROPPED))


WITH_AVERAGE = {
    "ppo": {},
    "rloo-sequence": {},
    "rloo-token": {},
    "reinforce": {"baseline": "none"},
    "all-actions": {"future_weight": 1.0},
}


class NanGradient(torch.autograd.Function):
    """The identity, with a gradient of NaN in the rows that `is_bad_B` marks."""

    @staticmethod
    def forward(ctx, states, is_bad_B):
        ctx.save_for_backward(is_bad_B)
        return states.clone()

    @staticmethod
    def backward(ctx, gradient):
        (is_bad_B,) = ctx.saved_tensors
        return gradient.masked_fill(is_bad_B.view(-1, *[1] * (gradient.dim() - 1)), math.nan), None


def spoil_gradient(trainer) -> None:
    """What the student reads of a completion to be dropped is finite, and what it learns of it is not."""
    backbone = trainer.model.backbone
    states = backbone.completion_states

    def of_completions(prompt_ids, prompt_mask, completion_ids_BT, prompt_index_B, **kwargs):
        found = states(prompt_ids, prompt_mask, completion_ids_BT, prompt_index_B, **kwargs)
        return NanGradient.apply(found, (completion_ids_BT == BAD).any(dim=1))

    backbone.completion_states = of_completions


# Where the student's log-probabilities are read in the update only, and everywhere a gradient.
LATE = {
    "rloo-sequence": ({"entropy_coef": 0.1}, spoil_student),  # whose sums are over sequences, and over tokens
    "rloo-token": ({"normalize_advantages": True}, spoil_student),
    "reinforce": ({"baseline": "mean"}, spoil_student),
    "kd": ({}, spoil_student),
    "ppo": ({}, spoil_gradient),
    "all-actions": ({"future_weight": 1.0}, spoil_gradient),
}


def late_step(method: str, output_dir, size: int, *, with_dropped: bool) -> Recorder:
    """As `gradients_of`, in micro-batches of `size`; the bad samples are found out in the update."""
    settings, spoil = LATE[method]
    count = 3 if with_dropped else 2
    trainer = build(
        method, output_dir, data=DATA, max_steps=1, max_grad_norm=0.0, num_generations=count, **settings,
        per_device_train_batch_size=size, gradient_accumulation_steps=5 * count // size,
    )  # fmt: skip
    pairs = [GOOD[i : i + 2] for i in range(0, 10, 2)]
    order = [[a, bad, b] for (a, b), bad in zip(pairs, DROPPED, strict=True)] if with_dropped else pairs
    samples_instead(trainer, *(ids for group in order for ids in group))
    spoil(trainer)
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    return recorder


@pytest.fixture(scope="module")
def clean_step(tmp_path_factory):
    """`late_step` of a method without the samples to be dropped, once for all sizes."""
    return functools.cache(lambda method: late_step(method, tmp_path_factory.mktemp("clean"), 10, with_dropped=False))


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("size", [5, 1])
@pytest.mark.parametrize("method", LATE)
def test_an_update_is_done_again_without_samples_that_it_finds_bad(method, size, clean_step, tmp_path, caplog):
    """As if they had never been there, however the step is cut: in loss, counts, baselines and moments."""
    logging.getLogger("rlkd_trl").propagate = True
    clean = clean_step(method)
    with caplog.at_level(logging.WARNING, logger="rlkd_trl"):
        dirty = late_step(method, tmp_path / "dirty", size, with_dropped=True)
    for name, expected in clean.gradients[0].items():
        if expected is not None:
            torch.testing.assert_close(dirty.gradients[0][name], expected, **ROUNDING, msg=name)
    ((log,), (clean_log,)) = dirty.logs, clean.logs
    assert log["samples_dropped"] == 5 and "steps_skipped" not in log and "samples_dropped" not in clean_log
    for name in ("loss", "entropy", "divergence", "value_loss", "ratio", "immediate"):
        if name in clean_log:
            assert log[name] == pytest.approx(clean_log[name], rel=1e-4, abs=1e-6), name
    said = [record.getMessage() for record in caplog.records if "dropped from the update" in record.getMessage()]
    assert len({line.rpartition(": ")[2] for line in said} & {repr(row["prompt"]) for row in DATA}) == len(said) == 3
    if method == "ppo":
        moments = [(r.trainer.rollout_state.return_mean, r.trainer.rollout_state.return_variance)
                   for r in (dirty, clean)]  # fmt: skip
        assert moments[0] == pytest.approx(moments[1], rel=1e-4)


def test_in_a_later_step_advantages_stay_and_later_passes_are_without_the_sample_too(tmp_path):
    """Of two steps of a rollout the second finds a bad sample; both of the next pass are without it from the start."""

    def run_of(output_dir, *, is_spoiled: bool) -> Recorder:
        trainer = build("rloo-token", output_dir, data=DATA, max_steps=4, max_grad_norm=0.0, num_generations=2,
                        num_iterations=2, per_device_train_batch_size=1, gradient_accumulation_steps=5,
                        steps_per_generation=10, epsilon=10.0)  # fmt: skip
        samples_instead(trainer, *GOOD[:7], DROPPED[3], *GOOD[8:])

        class AfterTheFirst(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 1 and is_spoiled:
                    spoil_student(trainer)
                elif state.global_step == 1:  # out of the loss by hand
                    rollout = trainer.rollout_state.rollout
                    loss_mask_BT = rollout.loss_mask_BT & (torch.arange(10) != 7)[:, None]
                    trainer.rollout_state.rollout = rollout.with_(loss_mask_BT=loss_mask_BT)
                    trainer.rollout_state.window_tokens[1] = loss_mask_BT[5:].sum().float()

        recorder = Recorder(trainer)
        trainer.add_callback(recorder)
        trainer.add_callback(AfterTheFirst())
        trainer.train()
        return recorder

    dirty, clean = run_of(tmp_path / "dirty", is_spoiled=True), run_of(tmp_path / "clean", is_spoiled=False)
    for step in range(4):
        for name, expected in clean.gradients[step].items():
            if expected is not None:
                torch.testing.assert_close(dirty.gradients[step][name], expected, **ROUNDING, msg=name)
    assert [log.get("samples_dropped") for log in dirty.logs] == [None, 1.0, None, None], "counted once"


def sft_step(family: str, output_dir, rows: list[dict], size: int | None = None) -> Recorder:
    """One step on all rows, in micro-batches of `size`, of a model that gives NaN where a prompt has the word w26."""
    model = MODELS[family]()

    def spoil(module, args, kwargs, output):
        ids = kwargs["input_ids"]
        is_bad_B = (ids == word_tokenizer().convert_tokens_to_ids("w26")).any(dim=1)
        output.last_hidden_state = output.last_hidden_state * torch.where(is_bad_B, math.nan, 1.0)[:, None, None]
        return output

    (model.encoder if model.config.is_encoder_decoder else model.model).register_forward_hook(spoil, with_kwargs=True)
    size = size or len(rows)
    args = SupervisedConfig(output_dir=str(output_dir), per_device_train_batch_size=size, max_steps=1, seed=1,
                            gradient_accumulation_steps=len(rows) // size, max_grad_norm=0.0, logging_steps=1,
                            save_strategy="no", disable_tqdm=True)  # fmt: skip
    trainer = SupervisedTrainer(model, args, Dataset.from_list(rows), word_tokenizer())
    recorder = Recorder(trainer)
    recorder.on_pre_optimizer_step = lambda *args, **kwargs: recorder.gradients.append(
        {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    )
    trainer.add_callback(recorder)
    trainer.train()
    return recorder


@pytest.mark.parametrize("size", [8, 2, 1])
@pytest.mark.parametrize("family", ["t5-tied", "llama"])
def test_sft_without_pairs_that_the_model_cannot_read(family, size, tmp_path, caplog):
    logging.getLogger("rlkd_trl").propagate = True
    good = [{"prompt": f"w{3 + i} w{4 + i}", "target": f"w{5 + i} w7 w8"[: 3 + 3 * (i % 2)]} for i in range(6)]
    bad = [{"prompt": f"w9 w26 w{3 + i}", "target": "w5 w6 w7 w8"} for i in range(2)]
    with caplog.at_level(logging.WARNING, logger="rlkd_trl"):
        dirty = sft_step(family, tmp_path / "dirty", [bad[0], *good[:2], bad[1], *good[2:]], size)
    clean = sft_step(family, tmp_path / "clean", good)
    for name, expected in clean.gradients[0].items():
        torch.testing.assert_close(dirty.gradients[0][name], expected, **ROUNDING, msg=name)
    (log,) = dirty.logs
    assert log["samples_dropped"] == 2 and "steps_skipped" not in log
    assert log["loss"] == pytest.approx(clean.logs[0]["loss"], rel=1e-4)
    said = [record.getMessage() for record in caplog.records if "dropped from the update" in record.getMessage()]
    assert sorted(line.rpartition(": ")[2] for line in said) == ["'w9 w26 w3'", "'w9 w26 w4'"]


def test_a_batch_of_nothing_but_bad_pairs_names_its_prompts(tmp_path, caplog):
    logging.getLogger("rlkd_trl").propagate = True
    rows = [{"prompt": f"w26 w{3 + i}", "target": "w5"} for i in range(5)]
    with (
        caplog.at_level(logging.WARNING, logger="rlkd_trl"),
        pytest.raises(TrainingError, match="all 1 steps"),
    ):
        sft_step("t5-tied", tmp_path, rows)
    said = [record.getMessage() for record in caplog.records if "spoils the step" in record.getMessage()]
    assert len(said) == 3 and all("of the prompt: 'w26 w" in line for line in said)


@pytest.mark.parametrize("average", ["prompt", "rollout"])
@pytest.mark.parametrize("method", WITH_AVERAGE)
def test_the_average_reward_is_without_them_too(method, average, tmp_path):
    """Neither the logged average nor any gradient of the others changes."""
    where = "teacher" if method == "all-actions" else "reward"
    settings = {"average_reward": average, **WITH_AVERAGE[method]}
    dirty = gradients_of(method, tmp_path, where, with_dropped=True, **settings)
    clean = gradients_of(method, tmp_path, where, with_dropped=False, **settings)
    (log,), (clean_log,) = dirty.logs, clean.logs
    assert log["samples_dropped"] == 5
    assert log["average_reward"] == pytest.approx(clean_log["average_reward"], rel=1e-5)
    for name, expected in clean.gradients[0].items():
        if expected is not None:
            torch.testing.assert_close(dirty.gradients[0][name], expected, **ROUNDING, msg=name)


def test_a_prompt_of_which_nothing_is_left(tmp_path):
    """Of the third prompt's samples both are dropped; the others' update is the same as if it had not been there."""
    trainer = build("rloo-token", tmp_path, reward=[shared_reward(), spoiled(math.nan)], data=DATA, max_steps=1,
                    num_generations=2, per_device_train_batch_size=10)  # fmt: skip
    samples_instead(trainer, *GOOD[:4], *DROPPED[:2], *GOOD[6:])
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    rollout = recorder.rollouts[0]
    assert rollout.kept_B.tolist() == [True] * 4 + [False] * 2 + [True] * 4
    assert not rollout.loss_mask_BT[4:6].any() and rollout.loss_mask_BT[:4].any()
    assert not (rollout.completion_ids_BT == BAD).any()
    assert all(g is None or g.isfinite().all() for g in recorder.gradients[0].values())
    assert recorder.logs[0]["samples_dropped"] == 2


@pytest.mark.slow(0.1)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, 1e30])
@pytest.mark.parametrize("method", METHODS)
def test_rewards_that_are_all_not_finite_stop_the_run(method, value, tmp_path):
    """As soon as it has lost `max_skipped_steps` steps, with the weights that it began with."""

    def mine(prompts, **columns) -> list[float]:
        return [value] * len(prompts)

    trainer = build(method, tmp_path, reward=[shared_reward(), mine], max_steps=9, max_skipped_steps=2)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    with pytest.raises(TrainingError, match=r"first in step 1 \(all 8 samples dropped, the reward mine or .* not fin"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())
    assert all("reward" not in entry for entry in trainer.state.log_history), "of nothing there is no mean"


def test_the_log_names_the_prompt(tmp_path, caplog):
    logging.getLogger("rlkd_trl").propagate = True
    with caplog.at_level(logging.WARNING, logger="rlkd_trl"):
        gradients_of("ppo", tmp_path, "reward", with_dropped=True)
    said = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
    assert len(said) == 3 and all("the reward spoil and the sum of rewards not finite" in line for line in said)
    assert any(repr(row["prompt"]) in said[0] for row in DATA)


# The equations


def test_leave_one_out_without_some():
    scores = torch.tensor([1.0, 2.0, math.nan, 4.0, 5.0, math.nan, math.inf, 7.0])
    kept_B = torch.tensor([True, True, False, True, True, False, False, True])
    # of 1, 2, 4: 1 − 3, 2 − 2.5, 4 − 1.5; of 5 and 7: 5 − 7, 7 − 5
    expected = [-2.0, -0.5, 0.0, 2.5, -2.0, 0.0, 0.0, 2.0]
    assert leave_one_out(scores, 4, kept_B=kept_B).tolist() == expected
    assert leave_one_out(torch.tensor([3.0, math.nan]), 2, kept_B=torch.tensor([True, False])).tolist() == [0.0, 0.0]
    whole = torch.tensor([1.0, 2.0, 6.0])
    assert torch.equal(leave_one_out(whole, 3, kept_B=torch.ones(3, dtype=torch.bool)), leave_one_out(whole, 3))


def test_token_leave_one_out_without_some():
    rewards_BT = torch.tensor([[1.0, 2.0], [math.nan, 0.0], [4.0, 0.0]])
    mask_BT = torch.tensor([[True, True], [True, False], [True, False]])
    advantages_BT = token_leave_one_out(
        rewards_BT, mask_BT, num_generations=3, kept_B=torch.tensor([True, False, True])
    )
    # returns 3, 2 and 4, 0: 3 − 4, 2 − 0; 4 − 3
    assert advantages_BT.tolist() == [[-1.0, 2.0], [0.0, 0.0], [1.0, 0.0]]


def test_usable_rows():
    numbers = torch.tensor([[1.0, 1e14], [math.nan, 1.0], [1.0, math.nan], [1.0, 2e15], [-math.inf, 1.0]])
    mask = torch.tensor([[True, True], [True, True], [True, False], [True, True], [True, False]])
    assert usable_rows(numbers, mask).tolist() == [True, False, True, False, False]
    assert usable_states(numbers[:, :, None].expand(-1, -1, 3), mask).tolist() == [True, False, True, False, False]
