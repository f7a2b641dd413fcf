"""TensorBoard's curves: one directory under output_dir, whatever is logged first."""

import sys
import types

import pytest
from transformers.integrations import integration_utils

from tests.tiny_models import MODELS
from tests.trainers.test_supervised import build as supervised
from tests.trainers.tiny_runs import build, prompts


@pytest.fixture
def written(monkeypatch, tmp_path) -> list[str]:
    """Stands in for TensorBoard, which need not be installed: the directories that writers were made for."""
    directories = []

    class Writer:
        def __init__(self, log_dir):
            directories.append(log_dir)

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.chdir(tmp_path)
    return directories


@pytest.mark.parametrize("environment", [None, "elsewhere"])
def test_evaluations_before_and_after_are_where_training_is(environment, written, tmp_path, monkeypatch):
    if environment:
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", environment)
    trainer = build("rloo-token", tmp_path / "out", report_to="tensorboard", eval_data=prompts(4, seed=3))
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert len(written) >= 1 and len(set(written)) == 1
    assert written[0].startswith(environment or str(tmp_path / "out" / "runs"))


def test_curves_of_supervised_training(written, tmp_path):
    trainer = supervised(MODELS["t5-tied"](), tmp_path / "out", report_to="tensorboard")
    trainer.train()
    assert len(set(written)) == 1 and written[0].startswith(str(tmp_path / "out" / "runs"))
