"""Architectures with something of their own between the states and the logits, or between the rows of a batch."""

import pytest
import torch
import transformers

from rlkd_trl.errors import InputError
from rlkd_trl.models.backbone import backbone_of
from rlkd_trl.models.loading import load_model
from rlkd_trl.models.verification import logits_of_both, verify
from rlkd_trl.teachers import Teacher
from tests.tiny_models import EOS, PAD, PADDED_VOCAB, word_tokenizer

DECODER = {
    "vocab_size": PADDED_VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None,
}  # fmt: skip
ENCODER_DECODER = {
    "vocab_size": PADDED_VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "decoder_start_token_id": PAD, "pad_token_id": PAD, "eos_token_id": EOS,
}  # fmt: skip
SCALED = {  # config and the factor of its logits
    "Granite": {"logits_scaling": 8.0},
    "Cohere": {"logit_scale": 0.0625},
    "Cohere2": {"logit_scale": 0.25},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},
}


def decoder_only(name: str):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**DECODER, **SCALED[name])
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def encoder_decoder(name: str, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**ENCODER_DECODER, **settings})
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


@pytest.mark.parametrize("name", SCALED)
@torch.no_grad()
def test_the_teacher_reads_logits_as_the_model_scales_them(name):
    """The mean is that of the scaled logits, and the score of a token its log-probability by the model itself."""
    model, prompt, completion = decoder_only(name), [4, 7, EOS], [5, 9, EOS]
    with torch.no_grad():  # large enough logits for a factor, or a cap, to show
        model.get_output_embeddings().weight.mul_(20)
    teacher = Teacher(model, word_tokenizer())
    ids, mask = torch.tensor([completion]), torch.ones(1, 3, dtype=torch.bool)
    scores = teacher.score(["w4 w7"], torch.tensor([0]), ids, mask, torch.tensor([True]))
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, 2:5]
    torch.testing.assert_close(scores.chosen[0], logits[range(3), completion], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.mean[0, :3], logits.mean(dim=-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.logsumexp[0, :3], logits.logsumexp(dim=-1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_switch_transformers_score_a_completion_whatever_stands_beside_it():
    """An expert's capacity of one token would drop those of neighbours, and of the completion itself."""
    model = encoder_decoder("SwitchTransformers", num_experts=2, expert_capacity=1, num_sparse_encoder_layers=1,
                            num_sparse_decoder_layers=1)  # fmt: skip
    teacher = Teacher(model, word_tokenizer())
    prompts = ["w4 w7", "w9", "w11 w12 w13"]
    ids = torch.tensor([[5, 9, 7, EOS], [6, 6, 6, 6], [20, 21, 3, EOS]])
    mask, ended = torch.ones_like(ids, dtype=torch.bool), torch.tensor([True, False, True])
    together = teacher.score(prompts, torch.arange(3), ids, mask, ended)
    for b in range(3):
        row = slice(b, b + 1)
        alone = teacher.score(prompts[row], torch.tensor([0]), ids[row], mask[row], ended[row])
        torch.testing.assert_close(alone.chosen[0], together.chosen[b], rtol=1e-4, atol=1e-5)
    # Token by token, as when sampling, nothing is dropped either.
    backbone = teacher.backbone
    prompt, prompt_mask = torch.tensor([[9, EOS]]), torch.ones(1, 2, dtype=torch.long)
    prefix = backbone.prefill(prompt, prompt_mask)
    states = [prefix.hidden_B1D, *(backbone.extend(prefix, ids[1:2, t : t + 1]) for t in range(4))]
    at_once = backbone.completion_states(prompt, prompt_mask, ids[1:2], torch.tensor([0]))
    torch.testing.assert_close(torch.cat(states, dim=1), at_once, rtol=1e-4, atol=1e-5)
    assert {router.expert_capacity for router in model.modules() if hasattr(router, "expert_capacity")} == {1}


@pytest.mark.parametrize("name", ["UMT5", "LongT5", "SwitchTransformers", "Granite", "Cohere"])
def test_int8_is_held_to_what_int8_can(name, tmp_path):
    """Two ways to the same logits differ by up to 0.9 % here: a last bit decides how an activation is rounded."""
    pytest.importorskip("bitsandbytes")
    model = decoder_only(name) if name in SCALED else encoder_decoder(name, d_model=64, d_kv=16, d_ff=128)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 2 and any(part in parameter_name for part in ("Attention", "Dense", "mlp")):
                parameter.mul_(4)
    model.save_pretrained(tmp_path)
    backbone = backbone_of(load_model(str(tmp_path), quantization="int8"))
    with torch.no_grad():
        ours, theirs = logits_of_both(backbone, name)
    # The decoder-only ones have nothing that is computed in another order.
    least = 0 if name in SCALED else 2e-3
    assert least <= (ours - theirs).norm() / theirs.norm() < 3e-2, "more than float32 may differ"
    verify(backbone)
    head = backbone.head
    backbone.head = lambda hidden: 1.2 * head(hidden)
    with pytest.raises(InputError, match=r"differ from states .* by a relative 0\.[12]"):
        verify(backbone)
