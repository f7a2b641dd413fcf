"""A new T5 or Llama with random weights, for teachers and students trained on the data alone."""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

from rlkd_trl.errors import InputError

ARCHITECTURES = ("t5", "llama")


def new_model(
    tokenizer: PreTrainedTokenizerBase,
    *,
    architecture: str = "t5",
    d_model: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    d_ff: int | None = None,
    dropout: float = 0.1,
    seed: int = 0,
) -> PreTrainedModel:
    """A model of the given size over the tokenizer's vocabulary.

    Architecture "t5" is T5 v1.1 (gated GELU, no scaling before the LM head; `num_layers` in the encoder and as many in
    the decoder), except that transformers 5 ties its LM head to the embeddings. "llama" is decoder-only. `d_ff` is
    2 · d_model by default.

    Raises:
        InputError: Unknown architecture, or d_model not divisible by num_heads.
    """
    if architecture not in ARCHITECTURES:
        raise InputError(f"Unknown architecture {architecture!r}; choose one of: {', '.join(ARCHITECTURES)}.")
    if d_model % num_heads:
        raise InputError(f"d_model {d_model} is not divisible by num_heads {num_heads}.")
    d_ff = 2 * d_model if d_ff is None else d_ff
    special = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(seed)
    if architecture == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=d_model,
                intermediate_size=d_ff,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                attention_dropout=dropout,
                bos_token_id=None,
                **special,
            )
        )
    return T5ForConditionalGeneration(
        T5Config(
            d_model=d_model,
            d_kv=d_model // num_heads,
            d_ff=d_ff,
            num_layers=num_layers,
            num_heads=num_heads,
            dropout_rate=dropout,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=tokenizer.pad_token_id,
            **special,
        )
    )
