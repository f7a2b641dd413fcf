"""Fused parts compute what the model's own do."""

import contextlib

import accelerate
import pytest
import torch
from transformers.activations import NewGELUActivation
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mt5.modeling_mt5 import MT5LayerNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.models.umt5.modeling_umt5 import UMT5LayerNorm

from rlkd_trl.models import fusion
from rlkd_trl.models.backbone import backbone_of
from rlkd_trl.models.fusion import FusedParts
from tests.tiny_models import tiny_llama, tiny_t5

NORMS = [T5LayerNorm, MT5LayerNorm, UMT5LayerNorm, LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm]
MODELS = {"t5": lambda: tiny_t5(tied=False), "llama": tiny_llama}


def loss_and_gradients(model):
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
    model.zero_grad()
    logits = model(**inputs).logits
    logits.log_softmax(dim=-1)[..., 3].sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_a_fused_model_computes_what_it_did(name):
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms start at 1, where weights could be forgotten
    expected, expected_gradients = loss_and_gradients(model)
    with FusedParts(model).in_place():
        found, gradients = loss_and_gradients(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[parameter], rtol=1e-4, atol=1e-4)


def test_every_gelu_is_exchanged():
    model = tiny_t5(tied=False)
    gelus = [module for module in model.modules() if isinstance(module, NewGELUActivation)]
    assert len(gelus) == model.config.num_layers + model.config.num_decoder_layers
    with FusedParts(model).in_place():
        assert all("forward" in vars(module) for module in gelus)


def test_it_is_the_tanh_approximation_and_not_the_exact_gelu():
    model = tiny_t5(tied=False)
    x = torch.linspace(-6, 6, 241, dtype=torch.float64)
    by_hand = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    with FusedParts(model).in_place():
        fused = model.encoder.block[0].layer[1].DenseReluDense.act(x)
    torch.testing.assert_close(fused, by_hand, rtol=1e-12, atol=1e-12)
    assert (torch.nn.functional.gelu(x) - by_hand).abs().max() > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_a_backbone_leaves_its_model_as_it_was(name):
    """Before, between and after its calls, and after one that fails."""
    model = MODELS[name]()
    before = [(type(module), sorted(vars(module))) for module in model.modules()]
    backbone = backbone_of(model)
    ids = torch.tensor([[3, 4]])
    for completion in (torch.tensor([[5, 6]]), torch.tensor([[10**6, 6]])):
        with contextlib.suppress(IndexError):
            backbone.completion_states(ids, torch.ones_like(ids), completion, torch.tensor([0]))
        assert [(type(module), sorted(vars(module))) for module in model.modules()] == before


@pytest.fixture
def counted(monkeypatch):
    """Calls of `rms_norm`."""
    calls = []

    def rms_norm(*args):
        calls.append(args)
        return original(*args)

    original = fusion.rms_norm
    monkeypatch.setattr(fusion, "rms_norm", rms_norm)
    return calls


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.__name__)
def test_every_norm_that_is_named_is_that_function(norm, counted):
    assert {norm.__name__ for norm in NORMS} == fusion._RMS_NORMS
    module = norm(4, eps=0.3)
    torch.nn.init.normal_(module.weight)
    x = torch.randn(2, 3, 4)
    expected = module(x)
    with FusedParts(torch.nn.Sequential(module)).in_place():
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-6)
    assert len(counted) == 1
    module(x)
    assert len(counted) == 1


def test_other_dtypes_and_autocast_go_the_models_own_way(counted):
    x = torch.randn(2, 4)
    module = T5LayerNorm(4)
    expected = T5LayerNorm(4)
    with FusedParts(torch.nn.Sequential(module)).in_place():
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x), expected(x))
        assert torch.equal(module.bfloat16()(x.bfloat16()), expected.bfloat16()(x.bfloat16()))
    assert not counted


def test_a_forward_that_somebody_has_set_stays():
    """Here Accelerate's hook, which brings a norm's weight from the CPU's memory when it is needed."""
    model = torch.nn.Sequential(T5LayerNorm(4))
    torch.nn.init.normal_(model[0].weight)
    x = torch.randn(2, 4)
    expected = model(x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model[0].weight.is_meta
    with FusedParts(model).in_place():
        torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x), expected)
