"""What the trainers override and call of transformers' Trainer without its promise to keep it, and nothing else."""

import ast
import inspect
import math
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from transformers import Trainer

import rlkd_trl
from rlkd_trl.trainers import trainer_internals
from rlkd_trl.trainers.supervised import SupervisedTrainer
from rlkd_trl.trainers.trainer_internals import OVERRIDDEN
from tests.trainers.tiny_runs import FULL_VOCABULARY_METHODS, METHODS, build, prompts

SEEN = "5.23.0 and 5.24.0"
PACKAGE = Path(rlkd_trl.__file__).parent
TRAINERS = [SupervisedTrainer, *(kind for kind, _, _ in (METHODS | FULL_VOCABULARY_METHODS).values())]
OWN_CLASSES = {base for kind in TRAINERS for base in kind.__mro__ if base.__module__.startswith("rlkd_trl.")}


def gone(what: str) -> str:
    """The message for whoever moves transformers' version."""
    return (
        f"The Trainer of transformers {version('transformers')} does not have {what} any more, or does something else "
        f"with it. See rlkd_trl/trainers/trainer_internals.py, written with transformers {SEEN}."
    )


def parameters_of(method) -> tuple[str, ...]:
    return tuple(inspect.signature(method).parameters)[1:]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_trainer_has_the_method_with_these_parameters(name):
    method = getattr(Trainer, name, None)
    assert method is not None, gone(f"`{name}`")
    assert parameters_of(method) == OVERRIDDEN[name], gone(f"the parameters {OVERRIDDEN[name]} of `{name}`")


def is_internal(name: str) -> bool:
    """Whether the method of Trainer, or one of its parameters, begins with one underscore."""
    names = () if name.startswith("__") else (name, *parameters_of(getattr(Trainer, name)))
    return any(name.startswith("_") for name in names)


def test_the_table_lists_what_is_overridden():
    """An override by accident, a name that a newer Trainer has too, is one as well."""
    overridden = {
        name for kind in OWN_CLASSES for name in vars(kind) if inspect.isfunction(getattr(Trainer, name, None))
    }
    assert {name for name in overridden if is_internal(name)} == set(OVERRIDDEN)


@cache
def names_of_trainer() -> set[str]:
    """Names with one underscore that Trainer's own code defines, or sets on itself."""
    names = set()
    for node in ast.walk(ast.parse(inspect.getsource(transformers.trainer))):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def uses(path: Path) -> list[str]:
    """Where a file touches Trainer's own names, or passes a parameter that is not public, outside of the overrides."""
    found, internals = [], names_of_trainer()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in internals:
            continues_an_override = ast.unparse(node.value) == "super()" and node.attr in OVERRIDDEN
            found += [] if continues_an_override else [f"{path.name}:{node.lineno} {ast.unparse(node)}"]
        elif isinstance(node, ast.keyword) and node.arg == "_internal_call":
            found.append(f"{path.name}:{node.value.lineno} _internal_call")
    return found


def test_no_other_module_uses_them():
    """And none of the trainers' own attributes has a name that Trainer uses for itself."""
    module = Path(trainer_internals.__file__)
    assert len(uses(module)) > 10, "the reader sees them"
    assert [use for path in PACKAGE.rglob("*.py") if path != module for use in uses(path)] == []


def test_trainer_calls_what_is_overridden(tmp_path, monkeypatch):
    """In a run that saves, is resumed, and ends with its best model; else an override would be without effect."""
    called = set()

    def noting(name: str, method):
        def call(*args, **kwargs):
            called.add(name)
            return method(*args, **kwargs)

        return call

    for kind in OWN_CLASSES:
        for name in OVERRIDDEN.keys() & vars(kind).keys():
            monkeypatch.setattr(kind, name, noting(name, vars(kind)[name]))
    settings = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_data": prompts(2),
        "load_best_model_at_end": True,
        "metric_for_best_model": "teacher_nll_per_token",
    }
    build("rloo-token", tmp_path, max_steps=1, **settings).train()
    build("rloo-token", tmp_path, max_steps=2, **settings).train(resume_from_checkpoint=True)
    calls_of_trainer = set(OVERRIDDEN) - {"_prepare_inputs"}  # by `training_step`, which is handed a rollout
    assert called >= calls_of_trainer, gone(f"a call of {sorted(calls_of_trainer - called)} in training")
    assert "_prepare_inputs" in called, gone("`_prepare_inputs` in `training_step`")


def test_the_sums_of_losses_are_those_that_logs_are_made_of(tmp_path):
    """Two steps without a log: the sum is both losses', and none is counted as logged; then what is put back is."""
    trainer, losses = build("rloo-token", tmp_path, max_steps=2, logging_steps=10), []
    step = trainer.training_step

    def noting(*args):
        losses.append(float(step(*args)))
        return torch.tensor(losses[-1])

    trainer.training_step = noting
    sums = []
    trainer.log = lambda logs, *args: sums.append(trainer_internals.loss_sums(trainer))
    trainer.train()
    at_end = sums[-1]  # by then Trainer has moved the running sum to the total
    message = gone("`_tr_loss`, `_total_loss_scalar` and `_globalstep_last_logged`")
    assert len(losses) == 2 and math.isclose(at_end["loss_until_log"], sum(losses), rel_tol=1e-5), message
    assert at_end["last_logged_step"] == 0, message
    other = {"loss_since_log": torch.tensor(3.0), "loss_until_log": 5.0, "last_logged_step": 7, "more": None}
    trainer_internals.set_loss_sums(trainer, other)
    assert trainer_internals.loss_sums(trainer) == {k: v for k, v in other.items() if k != "more"}, message


def test_the_end_of_a_step_logs_what_it_is_told(tmp_path):
    trainer, logged = build("rloo-token", tmp_path, logging_steps=1), []
    trainer.train()
    trainer.log = lambda logs, *args: logged.append(logs)
    trainer.control.should_log, trainer.control.should_save = True, False
    trainer.state.global_step += 1  # nothing is logged twice for one step
    trainer_internals.end_step(trainer, grad_norm=0.25, learning_rate=0.5)
    message = gone("`_maybe_log_save_evaluate`")
    assert [(entry["grad_norm"], entry["learning_rate"]) for entry in logged] == [(0.25, 0.5)], message


def test_the_training_state_is_in_files(tmp_path):
    trainer = build("rloo-token", tmp_path / "run", max_steps=1)
    trainer.train()
    (tmp_path / "state").mkdir()
    trainer_internals.save_training_state(trainer, tmp_path / "state")
    files = {path.name for path in (tmp_path / "state").iterdir()}
    message = gone("`_save_optimizer_and_scheduler`, `_save_rng_state`")
    assert files == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}, message
    assert hasattr(Trainer, "_save_scaler"), gone("`_save_scaler`")


def test_saving_without_a_push(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(Trainer, "push_to_hub", lambda self, **kwargs: pushed.append("model"))
    trainer = build("rloo-token", tmp_path)
    trainer.args.push_to_hub = True
    trainer.save_model()
    assert pushed == ["model"], gone("a push in `save_model`")
    trainer_internals.save_without_push(trainer, tmp_path)
    assert pushed == ["model"], gone("`_internal_call` of `save_model`")


def test_a_checkpoint_goes_to_the_hub(tmp_path, monkeypatch):
    assert parameters_of(Trainer._push_from_checkpoint) == ("checkpoint_folder",), gone("`_push_from_checkpoint`")
    pushed = []
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append(folder))
    trainer_internals.push_checkpoint(build("rloo-token", tmp_path), tmp_path / "checkpoint-1")
    assert pushed == [str(tmp_path / "checkpoint-1")]
