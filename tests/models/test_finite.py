"""NaN and infinity in weights: found wherever they stand, in every dtype, before a model is used."""

import math

import pytest
import torch

from rlkd_trl.errors import InputError
from rlkd_trl.models.finite import check_weights, is_finite, listed, not_finite
from rlkd_trl.models.loading import load_model
from rlkd_trl.teachers import Teacher
from tests.tiny_models import MODELS, word_tokenizer


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("place", [0, 500, 1002])
def test_one_bad_entry_is_found(bad, dtype, place):
    tensor = torch.randn(1003).to(dtype)
    assert is_finite(tensor)
    tensor[place] = bad
    assert not is_finite(tensor)


def test_what_has_no_floats_is_finite():
    assert is_finite(torch.tensor([1, 2])) and is_finite(torch.zeros(0)) and is_finite(torch.tensor([True]))


def test_names():
    tensors = {"a": torch.tensor([math.nan]), "b": torch.tensor([1.0]), "c": torch.tensor([1.0, math.inf])}
    assert not_finite(tensors.items()) == ["a", "c"]
    assert listed(["a"]) == "a" and listed(list("abcde")) == "a, b, c and 2 more"


class Quantised(torch.nn.Module):
    """Weights as bitsandbytes keeps them: integers, and the scales beside them."""

    def __init__(self, scale: float, attribute: str):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1, 2], dtype=torch.int8), requires_grad=False)
        scales = torch.tensor([1.0, scale])
        self.weight.__dict__[attribute] = scales if attribute == "SCB" else type("State", (), {"absmax": scales})()


@pytest.mark.parametrize("attribute", ["SCB", "quant_state"])
def test_scales_of_quantised_weights(attribute):
    check_weights(Quantised(2.0, attribute), "It")
    with pytest.raises(InputError, match="It has weights that are NaN or infinite, in weight"):
        check_weights(Quantised(math.nan, attribute), "It")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("family", ["t5-tied", "llama"])
def test_a_checkpoint_is_refused(family, bad, tmp_path):
    model = MODELS[family]()
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 2] = bad
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has weights that are NaN or infinite, in .*(shared|embed_tokens)"):
        load_model(str(tmp_path))
    with pytest.raises(InputError, match="The teacher has weights that are NaN or infinite"):
        Teacher(model, word_tokenizer())
