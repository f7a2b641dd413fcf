"""Layers that are computed again in the backward pass find what they found, and keep little."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from rlkd_trl.errors import InputError
from rlkd_trl.models.backbone import backbone_of
from rlkd_trl.models.recomputation import RecomputedLayers, check_cache
from tests.models.reference import FAMILIES, pad_completions, pad_prompts
from tests.models.test_backbone import COMPLETIONS, PROMPT_INDEX, PROMPTS
from tests.tiny_models import tiny_llama


def gradients(model, backbone, completions=COMPLETIONS) -> tuple[dict[str, torch.Tensor], int]:
    """Of a function of the completions' states; and the bytes that were kept for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    ids_BT, mask_BT = pad_completions(completions)
    with saved_tensors_hooks(note, lambda tensor: tensor):
        states = backbone.completion_states(*pad_prompts(model, PROMPTS), ids_BT, torch.tensor(PROMPT_INDEX))
    states[:, :-1][mask_BT].square().mean().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}, sum(
        kept.values()
    )


@pytest.mark.parametrize("family", [*FAMILIES, "t5-tied with eager attention"])
def test_the_gradients_are_those_of_kept_layers(family):
    """Also of prompts, through what their completions share; with eager attention each has a copy of that."""
    model, calls = FAMILIES[family.split()[0]](), []
    if "eager" in family:
        model.set_attn_implementation("eager")
    expected, kept = gradients(model, backbone_of(model))
    backbone = backbone_of(model)
    backbone.recompute_layers()
    layer = next(module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    part = next(module for module in layer.modules() if not [*module.children()] and [*module.parameters()])
    part.register_forward_hook(lambda *args: calls.append(torch.is_grad_enabled()))
    found, kept_now = gradients(model, backbone)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-2
    assert kept_now < 0.7 * kept and len(calls) % 2 == 0
    calls.clear()
    with torch.no_grad():
        backbone.completion_states(
            *pad_prompts(model, PROMPTS), pad_completions(COMPLETIONS)[0], torch.tensor(PROMPT_INDEX)
        )
    assert 0 < len(calls) <= 2, "without gradients nothing is computed again"
    assert "forward" not in vars(layer)


def test_what_cannot_be_computed_again_is_refused():
    with pytest.raises(InputError, match="Linear has no layers that can be recomputed"):
        RecomputedLayers(torch.nn.Linear(2, 2))

    class Convolution:
        """A state that a layer changes in place."""

    cache = DynamicCache()
    cache.layers.append(Convolution())
    with pytest.raises(InputError, match=r"layers of LlamaForCausalLM keep a state \(Convolution\)"):
        check_cache(cache, tiny_llama())
