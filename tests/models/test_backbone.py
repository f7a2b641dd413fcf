"""Prompts are shared between completions, and nobody can tell from the numbers."""

import peft
import pytest
import torch
import transformers

from rlkd_trl.errors import InputError
from rlkd_trl.models.backbone import backbone_of
from rlkd_trl.models.verification import verify
from tests.models.reference import FAMILIES, own_logits, pad_completions, pad_prompts
from tests.tiny_models import EOS, PAD, PADDED_VOCAB, tiny_llama, tiny_t5

PROMPTS = [[4, 5, 6, 7, 8, 1], [9, 1], [10, 11, 12, 1]]
# Three, one and two completions, not in the prompts' order, and one pair twice.
PROMPT_INDEX = [2, 0, 1, 0, 2, 0]
COMPLETIONS = [[3, 4, 5, 1], [6], [7, 8, 9, 10, 11], [12, 1], [3, 4, 5, 1], [13, 14, 15]]

# Two float32 computations of the same logits (here up to about 10) that group their additions differently.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=list(FAMILIES))
def model(request):
    return FAMILIES[request.param]()


def shared_logits(model, prompts=PROMPTS, completions=COMPLETIONS, index=PROMPT_INDEX, filler=0, **kwargs):
    """Through the backbone; `filler` stands behind both masks."""
    backbone = backbone_of(model)
    ids_BT, _ = pad_completions(completions, filler)
    states = backbone.completion_states(*pad_prompts(model, prompts, filler), ids_BT, torch.tensor(index), **kwargs)
    return backbone.head(states)


def assert_own_logits(model, logits_BT1V, completions=COMPLETIONS, index=PROMPT_INDEX, states_after=1):
    for b, (completion, p) in enumerate(zip(completions, index, strict=True)):
        n = len(completion) + states_after
        torch.testing.assert_close(logits_BT1V[b, :n], own_logits(model, PROMPTS[p], completion)[:n], **FLOAT32)


@torch.no_grad()
def test_states_times_head_are_the_models_own_logits(model):
    assert_own_logits(model, shared_logits(model))


@torch.no_grad()
def test_prompts_without_completions_and_one_prompt_for_all(model):
    completions = [[3, 4], [5, 1, 6], [7]]
    assert_own_logits(model, shared_logits(model, completions=completions, index=[1, 1, 1]), completions, [1, 1, 1])


@torch.no_grad()
def test_one_token_completions(model):
    completions = [[3], [4], [1]]
    logits = shared_logits(model, completions=completions, index=[0, 2, 1])
    assert logits.shape[1] == 2
    assert_own_logits(model, logits, completions, [0, 2, 1])


@torch.no_grad()
@pytest.mark.parametrize("completions", [COMPLETIONS, [[3], [4], [5], [6], [7], [8]]], ids=["ragged", "one-token"])
def test_without_the_final_state_there_is_one_position_per_token(model, completions):
    logits = shared_logits(model, completions=completions, with_final_state=False)
    assert logits.shape[1] == max(map(len, completions))
    assert_own_logits(model, logits, completions, states_after=0)


@torch.no_grad()
def test_without_the_final_state_the_last_token_is_not_read(model):
    """It is an id that the embeddings lack."""
    ids_BT = torch.tensor([[3, 4, 10_000]])
    inputs = (*pad_prompts(model, [[6, 7]]), ids_BT, torch.tensor([0]))
    with pytest.raises(IndexError):
        backbone_of(model).completion_states(*inputs)
    states_BTD = backbone_of(model).completion_states(*inputs, with_final_state=False)
    assert states_BTD.shape[:2] == (1, 3)


@torch.no_grad()
def test_token_by_token_is_the_same_as_at_once(model):
    backbone = backbone_of(model)
    prefix = backbone.prefill(*pad_prompts(model, PROMPTS)).select(torch.tensor([2, 0, 2]))
    completions = [[3, 4, 5], [6, 7, 8], [9, 10, 11]]
    states = [prefix.hidden_B1D]
    for t in range(3):
        states.append(backbone.extend(prefix, torch.tensor(completions)[:, t : t + 1]))
        torch.testing.assert_close(prefix.hidden_B1D, states[-1])
    assert_own_logits(model, backbone.head(torch.cat(states, dim=1)), completions, [2, 0, 2])


@torch.no_grad()
def test_rows_can_be_dropped_in_the_middle(model):
    backbone = backbone_of(model)
    prefix = backbone.prefill(*pad_prompts(model, PROMPTS)).select(torch.tensor([1, 0, 2]))
    backbone.extend(prefix, torch.tensor([[3], [6], [9]]))
    prefix = prefix.select(torch.tensor([2, 1]))
    last = backbone.head(backbone.extend(prefix, torch.tensor([[10], [7]])))[:, -1]
    torch.testing.assert_close(last[0], own_logits(model, PROMPTS[2], [9, 10])[-1], **FLOAT32)
    torch.testing.assert_close(last[1], own_logits(model, PROMPTS[0], [6, 7])[-1], **FLOAT32)


@torch.no_grad()
def test_what_stands_behind_the_masks_changes_nothing(model):
    clean, poisoned = shared_logits(model, filler=0), shared_logits(model, filler=29)
    for b, completion in enumerate(COMPLETIONS):
        n = len(completion) + 1
        torch.testing.assert_close(poisoned[b, :n], clean[b, :n], rtol=0, atol=0)


def test_gradients_are_those_of_separate_unshared_passes(model):
    """Every parameter; the loss weighs each logit differently, so that nothing cancels."""
    # In float64, but for Gemma: its eager attention casts float64's mask value to float32's −inf, and a row of
    # padding that may look at nothing becomes NaN.
    dtype, tolerance = (torch.float32, 1e-4) if model.config.model_type == "gemma2" else (torch.float64, 1e-5)
    model = model.to(dtype)
    weights = torch.randn(len(COMPLETIONS), 6, 32, generator=torch.Generator().manual_seed(0), dtype=dtype)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    logits_BT1V = shared_logits(model)
    assert logits_BT1V.shape == weights.shape
    shared = gradients(
        sum((logits_BT1V[b, : len(c) + 1] * weights[b, : len(c) + 1]).sum() for b, c in enumerate(COMPLETIONS))
    )
    separate = gradients(
        sum(
            (own_logits(model, PROMPTS[p], c) * weights[b, : len(c) + 1]).sum()
            for b, (p, c) in enumerate(zip(PROMPT_INDEX, COMPLETIONS, strict=True))
        )
    )
    assert shared.keys() == separate.keys()
    assert set(shared) == {name for name, _ in model.named_parameters()}, "a parameter got no gradient"
    for name, gradient in separate.items():
        # Norms and rotary embeddings round to float32 inside; 1e-5 of the largest entry is far below any mistake.
        # 1e-9: a softmax does not see a bias of its keys, whose gradient is 0 but for rounding.
        atol = tolerance * gradient.abs().max().item() + 1e-9
        torch.testing.assert_close(
            shared[name], gradient, rtol=tolerance, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_first_token_gets_a_gradient(model):
    """TRL 0.11's encoder-decoder completions gave it exactly none."""
    logits = shared_logits(model)
    logits[:, 0].log_softmax(-1)[:, 5].sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "embed" in n or n.endswith("wte.weight"))


@torch.no_grad()
def test_a_prompt_is_read_once_and_not_once_per_completion(model):
    rows = []
    reader = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    reader.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    shared_logits(model)
    prompts_read = (len(PROMPTS), max(map(len, PROMPTS)))
    if model.config.is_encoder_decoder:
        assert rows == [prompts_read]
    else:
        assert rows == [prompts_read, (len(COMPLETIONS), max(map(len, COMPLETIONS)))]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tied", [True, False])
def test_cross_attention_keys_are_projected_once_per_prompt(tied, attention):
    model = tiny_t5(tied=tied)
    model.set_attn_implementation(attention)
    rows = []
    keys = model.decoder.block[1].layer[1].EncDecAttention.k
    keys.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    shared_logits(model)
    assert rows == [len(PROMPTS)]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_padding_side_is_what_the_family_needs(name):
    expected = "right" if name in ("t5-tied", "t5-untied", "bart") else "left"
    assert backbone_of(FAMILIES[name]()).padding_side == expected


def test_sizes(model):
    backbone = backbone_of(model)
    assert (backbone.hidden_size, backbone.vocab_size) == (16, 32)


def test_verify_accepts_every_family(model):
    verify(backbone_of(model))


@pytest.mark.parametrize("family", ["MT5", "UMT5", "LongT5", "SwitchTransformers"])
@pytest.mark.parametrize("tied", [True, False])
def test_t5s_descendants(family, tied):
    """Whether the head's input is scaled by d_model**-0.5 differs between them, and with the version."""
    torch.manual_seed(0)
    more = {"SwitchTransformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 2}}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=PADDED_VOCAB,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        tie_word_embeddings=tied,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
        **more.get(family, {}),
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
        verify(backbone_of(model))
        assert_own_logits(model, shared_logits(model))


@torch.no_grad()
@pytest.mark.parametrize("encoder_layers, decoder_layers", [(1, 3), (3, 1)])
def test_a_t5_whose_decoder_has_another_depth_than_its_encoder(encoder_layers, decoder_layers):
    """A shallow decoder makes a fast student; a shallow encoder is as legal."""
    torch.manual_seed(0)
    config = tiny_t5(tied=True).config
    config.num_layers, config.num_decoder_layers = encoder_layers, decoder_layers
    model = transformers.T5ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.3)
    verify(backbone_of(model))
    assert_own_logits(model, shared_logits(model))


def test_verify_refuses_a_model_without_a_key_value_cache():
    """A state-space model cannot hand its prompt's state to several completions in this way."""
    config = transformers.MambaConfig(vocab_size=PADDED_VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(InputError, match="Mamba"):
        verify(backbone_of(transformers.MambaForCausalLM(config)))


def test_verify_leaves_the_mode_as_it_was(model):
    for training in (True, False):
        model.train(training)
        verify(backbone_of(model))
        assert model.training is training


def test_verify_accepts_bfloat16(model):
    verify(backbone_of(model.to(torch.bfloat16)))


@pytest.mark.parametrize("factor", [0.5, 1.1])
def test_verify_refuses_logits_that_are_scaled(model, factor):
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * factor
        return output

    model.forward = scaled
    with pytest.raises(InputError, match="is not supported"):
        verify(backbone_of(model))


def test_verify_refuses_nan(model):
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = float("nan")
    with pytest.raises(InputError, match=r"logits of .* are not finite in float32\. Its weights may be damaged"):
        verify(backbone_of(model))


def test_a_new_head_of_zeros_is_supported():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    verify(backbone_of(model))


def test_verify_refuses_a_model_that_overflows_in_float16():
    """Each weight is a float16 number, and the largest logit is not."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    verify(backbone_of(model))
    with pytest.raises(InputError, match=r"are not finite in float16\. It ends at 65,504: .* in bfloat16 or float32"):
        verify(backbone_of(model.half()))


def test_a_forward_pass_that_fails_is_not_called_unsupported():
    model = tiny_llama()
    model.forward = None
    with pytest.raises(InputError, match=r"^The forward pass of LlamaForCausalLM .* fails: TypeError: .*callable\.$"):
        verify(backbone_of(model))


def test_verify_refuses_a_model_that_forgets_its_prompt():
    """A broken cache, not a broken head."""
    model = tiny_llama()
    body = model.model.forward

    def without_cache(*, input_ids, **kwargs):
        return body(input_ids=input_ids)

    model.model.forward = without_cache
    with pytest.raises(InputError, match="is not supported"):
        verify(backbone_of(model))


def test_gradient_checkpointing_in_training_mode_is_refused(model):
    """transformers drops the key/value cache there, silently: completions would be scored without their prompt."""
    expected = shared_logits(model).detach()
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(InputError, match="gradient checkpointing in training mode"):
        shared_logits(model)
    verify(backbone_of(model))  # in eval mode, where it does nothing
    torch.testing.assert_close(shared_logits(model.eval()).detach(), expected, rtol=0, atol=0)


def test_verify_leaves_the_mode_as_it_was_when_it_fails():
    model = tiny_llama().train()
    model.model.forward = None
    with pytest.raises(InputError, match=r"LlamaForCausalLM.*TypeError") as caught:
        verify(backbone_of(model))
    assert model.training and isinstance(caught.value.__cause__, TypeError)


def with_lora(name):
    """Adapters that change the logits, unlike new ones, which start at zero."""
    torch.manual_seed(0)
    model = FAMILIES[name]()
    targets = ["q", "v", "wo"] if name.startswith("t5") else ["q_proj", "v_proj", "down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()


@pytest.mark.parametrize("name", ["t5-tied", "t5-untied", "llama"])
def test_a_peft_model_is_read_with_its_adapters(name):
    model = with_lora(name)
    verify(backbone_of(model))
    logits = shared_logits(model)
    assert (logits - shared_logits(FAMILIES[name]())).abs().max() > 0.1
    with torch.no_grad():
        assert_own_logits(model, logits.detach())
    logits.logsumexp(-1).sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in n for n in trained)
    with model.disable_adapter():
        torch.testing.assert_close(shared_logits(model), shared_logits(FAMILIES[name]()), **FLOAT32)


def test_a_peft_prompt_is_refused():
    """Its learned states stand before the prompt, where only PEFT's own forward pass puts them."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(InputError, match="PROMPT_TUNING"):
        backbone_of(peft.get_peft_model(tiny_llama(), config))
