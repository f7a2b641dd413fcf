"""The planner's adapters against PEFT's on loaded models."""

import peft
import pytest
import torch

from rlkd_trl.errors import InputError
from rlkd_trl.planning.adapters import Adapters, adapted
from tests.planning.models import MODELS, checkpoint_of


@pytest.mark.parametrize(
    ("name", "adapters", "settings"),
    [
        ("t5-tied", Adapters(), {"r": 16}),
        ("t5-untied", Adapters(4, ["q", "wi_0"], use_dora=True), {"r": 4, "target_modules": ["q", "wi_0"]}),
        ("llama", Adapters(2, ["all-linear"]), {"r": 2, "target_modules": "all-linear"}),
        ("llama", Adapters(2, [".*mlp.*_proj"], ["lm_head"]), {"r": 2, "target_modules": ".*mlp.*_proj"}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weights_are_those_of_peft(name, adapters, settings, dtype, tmp_path):
    model = MODELS[name]().to(dtype)
    checkpoint = checkpoint_of(model, tmp_path)
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    config = peft.LoraConfig(
        task_type=task, use_dora=adapters.use_dora, modules_to_save=adapters.lora_modules_to_save, **settings
    )
    expected = peft.get_peft_model(model, config)
    found = adapted(checkpoint.build(dtype), adapters)
    assert of_weights(found.model) == of_weights(expected)
    assert (found.num_trained, found.num_parameters) == expected.get_nb_trainable_parameters()


def of_weights(model: torch.nn.Module) -> dict[str, tuple]:
    return {name: (w.shape, w.dtype, w.requires_grad) for name, w in model.named_parameters()}


def test_adapters_that_do_not_fit(tmp_path):
    skeleton = checkpoint_of(MODELS["llama"](), tmp_path).build(torch.float32)
    with pytest.raises(InputError, match=r"--use_peft with --lora_target_modules nowhere else: .*nowhere"):
        adapted(skeleton, Adapters(lora_target_modules=["nowhere", "else"]))
