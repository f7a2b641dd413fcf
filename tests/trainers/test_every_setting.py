"""Every setting of every trainer's own config does something: accepted and ignored is a failure here.

A setting that is new must get a line in `CHANGED`, and then change what the trainer does, or the tests fail.
"""

import dataclasses

import pytest
import torch
from transformers import TrainingArguments

from rlkd_trl.errors import InputError
from tests.tiny_models import tiny_t5
from tests.trainers.plain_distillation import asked_twice
from tests.trainers.tiny_runs import (
    FULL_VOCABULARY_METHODS,
    METHODS,
    build,
    largest_difference,
    pairs,
    shared_reward,
    snapshot,
)

EVERY_METHOD = {**METHODS, **FULL_VOCABULARY_METHODS}
INHERITED = {option.name for option in dataclasses.fields(TrainingArguments)}
TRUNCATED_SAMPLING = {"top_k", "top_p"}  # refused but for REINFORCE's top_k; tests/trainers/test_config.py

LEARNS, EVALUATES, READS, PRINTS, STEPS = "what is learnt", "evaluation", "shapes", "output", "steps"

# Adam's steps, and clipped gradients, are the same for a loss of twice the size.
PLAIN_DESCENT = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1e-3}
SEVERAL_TEACHERS = "several teachers"

# Setting: (its other value, what it changes, what both runs have beside it).
CHANGED = {
    "num_generations": (4, LEARNS, {}),
    "max_prompt_length": (3, (LEARNS, EVALUATES), {}),
    "max_completion_length": (3, (LEARNS, EVALUATES), {}),
    "temperature": (0.5, LEARNS, {}),
    "sampling_batch_size": (2, READS, {}),
    "local_rollout_forward_batch_size": (2, READS, {"num_iterations": 2, "bf16": True}),
    "mask_truncated_completions": (True, LEARNS, {}),
    "steps_per_generation": (2, LEARNS, {"per_device_train_batch_size": 4}),
    "num_iterations": (2, LEARNS, {}),
    "max_generated_tokens": (1, STEPS, {}),
    "max_cpu_seconds": (1e-9, STEPS, {}),
    "log_completions": (True, PRINTS, {}),
    "num_completions_to_print": (2, PRINTS, {"log_completions": True}),
    # rewards
    "reward_weights": ([0.5], LEARNS, {"normalize_advantages": False, **PLAIN_DESCENT}),
    "gamma": (0.7, LEARNS, {}),
    "beta": (0.3, LEARNS, {}),
    "kl_target": (0.01, LEARNS, {"beta": 0.3, "kl_horizon": 20.0}),
    "kl_horizon": (200.0, LEARNS, {"beta": 0.3, "kl_target": 0.01}),
    "missing_eos_penalty": (5.0, LEARNS, {}),
    "teacher_baseline": (False, LEARNS, {"average_reward": "none"}),
    "average_reward": ("prompt", LEARNS, {}),
    "baseline": ("min_variance", LEARNS, {"normalize_advantages": False}),
    "entropy_coef": (0.5, LEARNS, {}),
    "normalize_advantages": (True, LEARNS, {}),
    "early_stop_kl": (1e-9, LEARNS, {"num_iterations": 3, "max_steps": 3}),
    # updates
    "epsilon": (0.001, LEARNS, {"num_iterations": 2}),
    "lam": (0.5, LEARNS, {}),
    "vf_coef": (0.7, LEARNS, {"max_grad_norm": 0.0}),
    "critic_learning_rate": (0.3, LEARNS, {}),
    "cliprange_value": (1e-6, LEARNS, {"num_iterations": 2}),
    "critic": ("separate", LEARNS, {}),
    "level": ("token", LEARNS, {}),
    "top_k": (3, LEARNS, {}),
    "return_denom": (10.0, LEARNS, {}),
    "reward_clip": (0.1, LEARNS, {}),
    "ratio_cap": (1.0, LEARNS, {"num_iterations": 2}),
    "behaviour_sync_steps": (4, LEARNS, {}),
    # whole distributions
    "ensemble": ("logits", LEARNS, {SEVERAL_TEACHERS: True}),
    "divergence": ("reverse_kl", LEARNS, {"divergence": "tvd"}),
    "skew": (0.4, LEARNS, {"divergence": "skew_kl"}),
    "distillation_temperature": (2.0, LEARNS, {}),
    "alpha": (0.5, LEARNS, {"lmbda": 0.0}),
    "sequences": ("teacher", LEARNS, {"lmbda": 0.0}),
    "lmbda": (0.0, LEARNS, {}),
    "signal": ("teacher_forcing", LEARNS, {}),
    "value": ("expected", LEARNS, {"signal": "teacher_forcing"}),
    "future_weight": (0.9, LEARNS, {}),
    "future": ("expected", LEARNS, {"future_weight": 1.0}),
    "length_normalization": (True, LEARNS, {"future_weight": 1.0}),
    "teacher_mix": (0.3, LEARNS, {}),
}
# Where a method needs other values or companions.
OF_METHOD = {
    ("ppo", "normalize_advantages"): (False, LEARNS, {}),
    ("ppo", "missing_eos_penalty"): (5.0, LEARNS, {"normalize_advantages": False}),
    ("rloo-sequence", "normalize_advantages"): (True, LEARNS, {"max_grad_norm": 0.0}),
    ("rloo-sequence", "epsilon"): (0.9, LEARNS, {"num_iterations": 2}),  # at 0.2 all is clipped
    ("rloo-token", "level"): ("sequence", LEARNS, {}),
    ("reinforce", "return_denom"): (10.0, LEARNS, {**PLAIN_DESCENT, "learning_rate": 0.03}),
    ("kd", "beta"): (0.1, LEARNS, {"divergence": "jsd"}),
    ("kd", "divergence"): ("reverse_kl", LEARNS, {}),
    ("all-actions", "baseline"): ("none", LEARNS, {"future_weight": 1.0}),
    ("all-actions", "gamma"): (0.3, LEARNS, {"future_weight": 1.0}),
    ("all-actions", "epsilon"): (0.001, LEARNS, {"future_weight": 1.0, "num_iterations": 2}),
    ("all-actions", "average_reward"): ("prompt", LEARNS, {"future_weight": 1.0}),
}
# What a method refuses, since it would change nothing: kd reads no completions before its updates; the teacher's V of
# a prompt is the same for all its completions, and leaving one out takes it away.
REFUSED = {("kd", "local_rollout_forward_batch_size"), ("rloo-sequence", "teacher_baseline")}
# Without an effect on a run in which nothing is amiss: tests/trainers/test_guards.py, tests/trainers/test_finite.py.
IN_TROUBLE = {"guards", "max_skipped_steps"}
# Refused where teacher and student have one tokenizer: tests/trainers/test_other_tokenizers.py.
OF_OTHER_TOKENIZERS = {"align_tokenizers", "span_temperature"}


def own_settings(method: str) -> list[str]:
    elsewhere = IN_TROUBLE | OF_OTHER_TOKENIZERS | TRUNCATED_SAMPLING - ({"top_k"} if method == "reinforce" else set())
    names = (option.name for option in dataclasses.fields(EVERY_METHOD[method][1]))
    return [name for name in names if name not in INHERITED | elsewhere]


def cases() -> list:
    """The quick suite tries a setting with the first method that has it, and lengths with all."""
    found, tried = [], set()
    for method in EVERY_METHOD:
        for name in own_settings(method):
            quick = name not in tried or name == "max_prompt_length" or (method, name) in REFUSED
            marks = () if quick else pytest.mark.slow(0.1)
            found.append(pytest.param(method, name, marks=marks, id=f"{method}-{name}"))
            tried.add(name)
    return found


def behaviour(method: str, output_dir, capsys, settings: dict, kinds: tuple[str, ...]) -> dict[str, object]:
    """What a trainer does on two rollouts, kind by kind."""
    settings = {"max_steps": 2, **settings}
    several = settings.pop(SEVERAL_TEACHERS, False)
    reward = asked_twice("t5-tied")[0] if several else shared_reward(gamma=settings.get("gamma", 1.0))
    data = {"data": pairs(32), "eval_data": pairs(5, seed=3)}
    trainer = build(method, output_dir, model=tiny_t5(tied=True, layers=1), reward=reward, **data, **settings)
    evaluated = trainer.evaluate() if EVALUATES in kinds else {}
    before, shapes = snapshot(trainer.model), []
    projection = next(module for module in trainer.model.model.modules() if isinstance(module, torch.nn.Linear))
    projection.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    capsys.readouterr()
    trainer.train()
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{")]
    after = snapshot(trainer.model)
    assert largest_difference(before, after) > 1e-5, "nothing is learnt at all"
    return {
        LEARNS: {name: tensor for name, tensor in after.items() if not name.startswith("critic_model")},
        EVALUATES: {name: value for name, value in evaluated.items() if name != "epoch"},
        READS: shapes,
        PRINTS: "\n".join(printed),
        STEPS: trainer.state.global_step,
    }


def differs(kind: str, one, other) -> bool:
    if kind != LEARNS:
        return one != other
    common = one.keys() & other.keys()
    return largest_difference({n: one[n] for n in common}, {n: other[n] for n in common}) > 1e-5


_BASES: dict[str, dict] = {}  # what was seen of a method under the settings that several cases compare with


@pytest.mark.parametrize(("method", "name"), cases())
def test_every_setting_changes_what_its_trainer_does(method, name, tmp_path, capsys):
    assert name in CHANGED, f"{name} is new: give it another value here, and say what that is to change"
    value, kinds, beside = OF_METHOD.get((method, name), CHANGED[name])
    if (method, name) in REFUSED:
        with pytest.raises(InputError, match=f"^{name} = {value} has no effect with .*: leave it out"):
            build(method, tmp_path, **{name: value}, **beside)
        return
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    known = {*own_settings(method), *INHERITED, SEVERAL_TEACHERS}
    beside = {setting: other for setting, other in beside.items() if setting in known}
    key = f"{method} {sorted(beside.items())} {EVALUATES in kinds}"
    if key not in _BASES:
        _BASES[key] = behaviour(method, tmp_path / "base", capsys, beside, kinds)
    changed = behaviour(method, tmp_path / "changed", capsys, {**beside, name: value}, kinds)
    for kind in kinds:
        assert differs(kind, _BASES[key][kind], changed[kind]), f"{name} = {value} and {kind}"


def test_a_run_like_another_is_no_different(tmp_path, capsys):
    """Or the tests above could not fail."""
    kinds = (LEARNS, EVALUATES)
    one, other = (behaviour("ppo", tmp_path / name, capsys, {}, kinds) for name in ("one", "other"))
    assert not any(differs(kind, one[kind], other[kind]) for kind in one)
