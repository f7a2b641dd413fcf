"""The fused GELU of T5 v1.1."""

import torch
from transformers import T5ForConditionalGeneration
from transformers.activations import NewGELUActivation

from rlkd_trl.models.fusion import fuse
from tests.conftest import tiny_t5


def test_every_gelu_is_exchanged_and_the_model_computes_what_it_did():
    model = tiny_t5(tied=False)
    before = sum(isinstance(module, NewGELUActivation) for module in model.modules())
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=ids).logits
        fuse(model)
        found = model(input_ids=ids, decoder_input_ids=ids).logits
    assert before == model.config.num_layers + model.config.num_decoder_layers
    assert not any(isinstance(module, NewGELUActivation) for module in model.modules())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


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
