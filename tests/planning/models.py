"""Models between tiny and real: large enough for activations to outweigh what a count may leave out."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from rlkd_trl.planning.skeletons import Checkpoint

# The shapes of google/t5-v1_1-xxl (T0-11B), t5-v1_1-xl (T0-3B) and google-t5/t5-base, as their config.json says.
_T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "is_encoder_decoder": True,
    "d_kv": 64,
    "vocab_size": 32128,
    "relative_attention_num_buckets": 32,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_layers": 24, "num_decoder_layers": 24}
T0_11B = {**_T5, **_GATED, "d_model": 4096, "d_ff": 10240, "num_heads": 64}
T0_3B = {**_T5, **_GATED, "d_model": 2048, "d_ff": 5120, "num_heads": 32}
T5_BASE = {**_T5, "d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}


def write_config(directory: Path, config: dict) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def t5(*, tied: bool, layers: int = 2, decoder_layers: int = 2, vocab_size: int = 1000) -> PreTrainedModel:
    config = T5Config(
        vocab_size=vocab_size,
        d_model=64,
        d_kv=16,
        d_ff=160,
        num_layers=layers,
        num_decoder_layers=decoder_layers,
        num_heads=4,
        tie_word_embeddings=tied,
        feed_forward_proj="relu" if tied else "gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    if not tied:  # as a checkpoint with two matrices leaves it
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model.eval()


def llama(*, layers: int = 2, hidden_size: int = 64, vocab_size: int = 1000) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


MODELS = {
    "t5-tied": lambda: t5(tied=True),
    "t5-untied": lambda: t5(tied=False),
    "t5-deep-encoder": lambda: t5(tied=False, layers=3, decoder_layers=1),
    "t5-large-vocabulary": lambda: t5(tied=False, vocab_size=8000),
    "llama": llama,
    "llama-deep": lambda: llama(layers=3, hidden_size=32),
}


def checkpoint_of(model: PreTrainedModel, directory: Path) -> Checkpoint:
    """What the planner reads of a model: its config, without weights."""
    model.config.save_pretrained(directory)
    return Checkpoint.of("--teacher", str(directory))
