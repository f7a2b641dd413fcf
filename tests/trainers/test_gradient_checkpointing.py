"""Training with recomputed layers takes the steps that it takes with kept ones, in every trainer."""

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from rlkd_trl.errors import InputError
from tests.tiny_models import MODELS
from tests.trainers.test_encoder import build as encoder
from tests.trainers.test_supervised import build as supervised
from tests.trainers.tiny_runs import FULL_VOCABULARY_METHODS, METHODS, build

CHECKPOINTING = {"gradient_checkpointing": True}


class Recorder(TrainerCallback):
    """The gradients of each optimizer step, and how often a part of a layer computed with gradients."""

    def __init__(self, trainer):
        self.gradients, self.calls = [], 0
        trainer.add_callback(self)
        layers = [module for module in trainer.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        part = next(module for module in layers[0].modules() if isinstance(module, nn.Linear))
        part.register_forward_hook(self._count)

    def _count(self, *args):
        self.calls += torch.is_grad_enabled()

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def assert_same_steps(make, tmp_path, tolerance: float = 1e-6, **settings) -> None:
    """tolerance: of the largest gradient of the step."""
    recorders = []
    for name, added in (("kept", {}), ("recomputed", CHECKPOINTING)):
        trainer = make(tmp_path / name, **settings, **added)
        recorders.append(Recorder(trainer))
        trainer.train()
    kept, recomputed = recorders
    assert 0 < kept.calls < recomputed.calls, "layers are computed again"
    assert len(kept.gradients) == len(recomputed.gradients) > 0
    for expected, found in zip(kept.gradients, recomputed.gradients, strict=True):
        assert found.keys() == expected.keys()
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        assert largest > 0
        for name, gradient in expected.items():
            assert float((found[name] - gradient).abs().max()) <= tolerance * largest, name


@pytest.mark.slow(0.2)
@pytest.mark.parametrize("family", ["t5-tied", "llama"])
@pytest.mark.parametrize("method", [*METHODS, *FULL_VOCABULARY_METHODS])
def test_on_rollouts(method, family, tmp_path):
    settings = {"family": family, "optim": "sgd", "learning_rate": 1e-3}
    if method == "ppo":
        settings |= {"critic": "separate", "num_iterations": 2}
    assert_same_steps(lambda place, **s: build(method, place, **s), tmp_path, **settings)


@pytest.mark.parametrize("family", ["t5-tied", pytest.param("llama", marks=pytest.mark.slow)])
def test_with_adapters(family, tmp_path):
    """Layers whose inputs have no gradients of their own: those beneath the first adapters."""
    lora = LoraConfig(r=2, init_lora_weights=False)
    settings = {"family": family, "optim": "sgd", "learning_rate": 1e-3, "peft_config": lora}
    assert_same_steps(lambda place, **s: build("rloo-token", place, **s), tmp_path, **settings)


@pytest.mark.parametrize(
    ("stage", "losses"),
    [("general", "hidden_mse+attention_mse+value_relation_kl"), ("task", "logits_kl+hard_ce")],
)
def test_of_encoders(stage, losses, tmp_path):
    """With dropout, which is drawn alike again; the layer whose maps are read, the second, is kept."""
    settings = {"layer_map": ["2:4"]} if stage == "general" else {}
    assert_same_steps(lambda place, **s: encoder(losses, place, stage=stage, **s), tmp_path, **settings)


def test_supervised(tmp_path):
    """transformers' own, without a cache: the sums of its embeddings' gradients are in another order."""
    assert_same_steps(lambda place, **s: supervised(MODELS["t5-tied"](), place, **s), tmp_path, tolerance=3e-6)


def test_its_keywords_are_refused(tmp_path):
    with pytest.raises(InputError, match="layers are recomputed in one way"):
        build("ppo", tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
