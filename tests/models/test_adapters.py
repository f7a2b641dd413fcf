"""Encoders from checkpoints of adapters: they compute what PEFT's model of the two does, with the head or without."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from rlkd_trl.errors import InputError
from rlkd_trl.models.encoders import load_encoder, load_encoder_config
from tests.models.encoders import batch, make

CLASSES = {None: AutoModel, "tokens": AutoModelForMaskedLM, "classes": AutoModelForSequenceClassification}


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert"])
@pytest.mark.parametrize(
    ("made_with", "read_as"),
    [(None, "none"), ("tokens", "none"), ("tokens", "tokens"), ("classes", "none"), ("classes", "classes")],
)
def test_what_adapters_and_their_model_compute(kind, made_with, read_as, tmp_path):
    base = make(kind, layers=2, head=None if made_with == "classes" and kind == "bert" else made_with)
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    labels = {"num_labels": 5, "ignore_mismatched_sizes": True} if made_with == "classes" else {}
    model = CLASSES[made_with].from_pretrained(tmp_path / "base", **labels).eval()
    settings = LoraConfig(
        r=2,
        target_modules="all-linear" if made_with is None else ["query", "q_lin", "Wqkv"],
        init_lora_weights=False,
        task_type="SEQ_CLS" if made_with == "classes" else None,
    )
    adapted = get_peft_model(model, settings)
    adapted.save_pretrained(tmp_path / "adapters")
    expected = adapted.eval()(**batch(), output_hidden_states=True)
    found_model = load_encoder(str(tmp_path / "adapters"), read_as, "The teacher").eval()
    assert not isinstance(found_model, PeftModel)
    assert not any("lora" in name for name in found_model.state_dict())
    found = found_model(**batch(), output_hidden_states=True)
    torch.testing.assert_close(found.hidden_states[-1], expected.hidden_states[-1], rtol=1e-4, atol=1e-5)
    if read_as != "none":
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    if read_as == "classes":
        assert load_encoder_config(str(tmp_path / "adapters")).num_labels == 5
    with torch.no_grad():
        plain = (
            CLASSES[made_with]
            .from_pretrained(tmp_path / "base", **labels)
            .eval()(**batch(), output_hidden_states=True)
        )
    assert (plain.hidden_states[-1] - expected.hidden_states[-1]).abs().max() > 1e-3, "the adapters change something"
    assert all(parameter.requires_grad for parameter in found_model.parameters())


def test_adapters_that_are_not_complete_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    make(layers=2).save_pretrained(tmp_path / "base")
    model = AutoModel.from_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=2, target_modules=["query"])).save_pretrained(tmp_path / "adapters")
    file = tmp_path / "adapters" / "adapter_model.safetensors"
    weights = load_file(file)
    del weights["base_model.model.encoder.layer.1.attention.self.query.lora_B.weight"]
    save_file(weights, file)
    with pytest.raises(InputError, match=r"cannot be merged into their model .*layer.1.attention.self.query.lora_B"):
        load_encoder(str(tmp_path / "adapters"), "none", "The teacher")


@pytest.mark.parametrize("head", [None, "classes"])
def test_adapters_for_more_layers_than_the_model_has_are_refused(head, tmp_path):
    make(layers=2, head=head).save_pretrained(tmp_path / "base")
    deeper = get_peft_model(make(layers=4, head=head), LoraConfig(r=2, target_modules=["query"]))
    deeper.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    deeper.save_pretrained(tmp_path / "adapters")
    read_as = "none" if head is None else head
    with pytest.raises(InputError, match=r"cannot be merged .*no place for 4 of .*layer\.2\.attention\.self"):
        load_encoder(str(tmp_path / "adapters"), read_as, "The teacher")
