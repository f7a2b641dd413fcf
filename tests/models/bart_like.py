"""BART and its kin, with a language's code and special tokens that are content; and what their checkpoints say."""

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerFast

from rlkd_trl.models.loading import load_tokenizer
from tests.tiny_models import EOS, PAD, PADDED_VOCAB, word_tokenizer

MARKERS = ["<triplet>", "<subj>"]  # ids 29 and 30 of the tokenizer
LANGUAGE = 31


def tokenizer() -> PreTrainedTokenizerFast:
    """The tests' words, two markers that are special tokens, and a language's code."""
    words = word_tokenizer()
    words.add_special_tokens({"additional_special_tokens": [*MARKERS, "xx_XX"]})
    assert words.convert_tokens_to_ids([*MARKERS, "xx_XX"]) == [29, 30, LANGUAGE]
    return words


def bart_like(name: str, *, start: int, forced: int | None) -> PreTrainedModel:
    config_class = getattr(transformers, f"{name}Config")
    model_class = getattr(transformers, f"{name}ForConditionalGeneration")
    torch.manual_seed(0)
    model = model_class(
        config_class(
            vocab_size=PADDED_VOCAB,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=32,
            dropout=0.0,
            bos_token_id=LANGUAGE,
            pad_token_id=PAD,
            eos_token_id=EOS,
            decoder_start_token_id=start,
        )
    )
    model.generation_config.forced_bos_token_id = forced
    model.generation_config.forced_eos_token_id = EOS  # as BART's
    return model


def checkpoint_texts(directory, sources: list[str], **generation) -> list[str]:
    """By nothing but transformers, one prompt at a time, with the checkpoint's own settings."""
    config = transformers.AutoConfig.from_pretrained(directory)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model, words, found = auto_class.from_pretrained(directory), load_tokenizer(str(directory)), []
    for source in sources:
        ids = torch.tensor([words(source)["input_ids"]])
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **generation)[0].tolist()
        new = output if config.is_encoder_decoder else output[ids.shape[1] :]
        named = [words.convert_ids_to_tokens(token) for token in new]
        found.append(" ".join(token for token in named if token not in ("<pad>", "</s>", "xx_XX")))
    return found
