"""More tiny model families, and references that use nothing but the model's own unshared, unpadded forward pass."""

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from tests.tiny_models import EOS, MODELS, PAD, PADDED_VOCAB


def tiny_bart(seed: int = 0) -> PreTrainedModel:
    """An encoder-decoder model with learned positions and a bias on the logits, which is zero until it is trained."""
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=PADDED_VOCAB,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        init_std=0.3,
        dropout=0.0,
        pad_token_id=PAD,
        bos_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    model = BartForConditionalGeneration(config)
    model.final_logits_bias.normal_(std=0.5)
    return model.eval()


def tiny_gpt2(seed: int = 0) -> PreTrainedModel:
    """A decoder-only model with learned absolute positions: left padding must not shift them."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=PADDED_VOCAB,
        n_positions=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        initializer_range=0.3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return GPT2LMHeadModel(config).eval()


def tiny_gemma2(seed: int = 0) -> PreTrainedModel:
    """Soft-capped logits, and layers whose sliding window of 3 is shorter than a prompt."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=PADDED_VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=3,
        final_logit_softcapping=2.0,
        initializer_range=0.3,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config).eval()


FAMILIES = {**MODELS, "bart": tiny_bart, "gpt2": tiny_gpt2, "gemma2": tiny_gemma2}


def own_logits(model: PreTrainedModel, prompt_ids: list[int], completion_ids: list[int]) -> Tensor:
    """z_1 .. z_{T+1} of one pair, `[T+1, V]`: alone, unpadded, without a cache, through the model's own forward."""
    prompt_1S = torch.tensor([prompt_ids])
    if model.config.is_encoder_decoder:
        decoder_1T = torch.tensor([[model.config.decoder_start_token_id, *completion_ids]])
        return model(input_ids=prompt_1S, decoder_input_ids=decoder_1T, use_cache=False).logits[0]
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    return model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 :]


def pad_prompts(model: PreTrainedModel, prompts: list[list[int]], filler: int = PAD) -> tuple[Tensor, Tensor]:
    """Ids and mask, padded with `filler` on the right for encoder-decoder models and on the left for the others."""
    width = max(map(len, prompts))
    ids_PS = torch.full((len(prompts), width), filler)
    mask_PS = torch.zeros(len(prompts), width, dtype=torch.long)
    for p, prompt in enumerate(prompts):
        real = slice(0, len(prompt)) if model.config.is_encoder_decoder else slice(width - len(prompt), width)
        ids_PS[p, real] = torch.tensor(prompt)
        mask_PS[p, real] = 1
    return ids_PS, mask_PS


def pad_completions(completions: list[list[int]], filler: int = PAD) -> tuple[Tensor, Tensor]:
    """Ids and bool mask, padded on the right."""
    width = max(map(len, completions))
    ids_BT = torch.tensor([ids + [filler] * (width - len(ids)) for ids in completions])
    mask_BT = torch.tensor([[t < len(ids) for t in range(width)] for ids in completions])
    return ids_BT, mask_BT


def count_rows(module: torch.nn.Module) -> list[int]:
    """A list to which every call of `module` adds the number of rows (all dimensions but the last) it was given."""
    calls: list[int] = []

    def record(_, args, kwargs):
        given = next(iter([*args, *kwargs.values()]))
        calls.append(given.shape[:-1].numel())

    module.register_forward_pre_hook(record, with_kwargs=True)
    return calls
