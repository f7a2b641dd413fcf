"""Fused parts compute what the model's own do."""

import copy

import accelerate
import pytest
import torch
from transformers import T5ForConditionalGeneration
from transformers.activations import NewGELUActivation
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mt5.modeling_mt5 import MT5LayerNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.models.umt5.modeling_umt5 import UMT5LayerNorm

from rlkd_trl.models import fusion
from rlkd_trl.models.fusion import fuse
from tests.conftest import tiny_llama, tiny_t5

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
    fused = copy.deepcopy(model)
    fuse(fused)
    (expected, expected_gradients), (found, gradients) = loss_and_gradients(model), loss_and_gradients(fused)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[parameter], rtol=1e-4, atol=1e-4)


def test_every_gelu_is_exchanged():
    model = tiny_t5(tied=False)
    before = sum(isinstance(module, NewGELUActivation) for module in model.modules())
    fuse(model)
    assert before == model.config.num_layers + model.config.num_decoder_layers
    assert not any(isinstance(module, NewGELUActivation) for module in model.modules())


def test_it_is_the_tanh_approximation_and_not_the_exact_gelu():
    model = tiny_t5(tied=False)
    fuse(model)
    x = torch.linspace(-6, 6, 241, dtype=torch.float64)
    by_hand = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    fused = model.encoder.block[0].layer[1].DenseReluDense.act(x)
    torch.testing.assert_close(fused, by_hand, rtol=1e-12, atol=1e-12)
    assert (torch.nn.functional.gelu(x) - by_hand).abs().max() > 1e-4


def test_the_saved_config_names_the_models_own_activation(tmp_path):
    model = tiny_t5(tied=False)
    fuse(model)
    model.save_pretrained(tmp_path)
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert isinstance(loaded.encoder.block[0].layer[1].DenseReluDense.act, NewGELUActivation)


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
    fuse(torch.nn.Sequential(module))
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-6)
    assert len(counted) == 1


def test_other_dtypes_and_autocast_go_the_models_own_way(counted):
    x = torch.randn(2, 4)
    module = T5LayerNorm(4)
    fuse(torch.nn.Sequential(module))
    expected = T5LayerNorm(4)
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
    fuse(model)
    torch.testing.assert_close(model(x), expected)


def test_a_fused_model_can_be_pickled(tmp_path):
    model = tiny_t5(tied=False)
    fuse(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    norm, other = (m.decoder.final_layer_norm for m in (model, loaded))
    torch.nn.init.constant_(other.weight, 3.0)
    x = torch.randn(2, 16)
    torch.testing.assert_close(other(x), 3 * norm(x))


def test_a_copy_reads_its_own_weights():
    module = torch.nn.Sequential(T5LayerNorm(4))
    fuse(module)
    other = copy.deepcopy(module)
    torch.nn.init.constant_(other[0].weight, 3.0)
    x = torch.randn(2, 4)
    torch.testing.assert_close(other(x), 3 * module(x))
