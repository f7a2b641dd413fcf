"""Positions and embeddings that a model has, against what it is to read: known before anything runs."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BioGptConfig,
    BlenderbotConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    LEDConfig,
    LlamaConfig,
    M2M100Config,
    MBartConfig,
    MptConfig,
    OPTConfig,
    PegasusConfig,
    T5Config,
)

from rlkd_trl.errors import InputError
from rlkd_trl.models.limits import (
    PositionLimits,
    check_embedding_rows,
    check_lengths,
    position_limits,
    position_limits_of_config,
)
from tests.tiny_models import MODELS, VOCAB, word_tokenizer

SMALL = {
    "gpt2": GPT2Config(vocab_size=40, n_positions=20, n_embd=16, n_layer=1, n_head=2),
    "opt": OPTConfig(
        vocab_size=40,
        max_position_embeddings=20,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    ),
    "gptj": GPTJConfig(vocab_size=40, n_positions=20, n_embd=16, n_layer=1, n_head=2, rotary_dim=4),
    "gptneo": GPTNeoConfig(
        vocab_size=40,
        max_position_embeddings=20,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        attention_types=[[["global"], 1]],
    ),
    "biogpt": BioGptConfig(
        vocab_size=40,
        max_position_embeddings=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    ),
}
SMALL["mpt"] = MptConfig(vocab_size=40, max_seq_len=20, d_model=16, n_layers=1, n_heads=2)
SEQ2SEQ = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}
SMALL |= {
    kind.model_type: kind(**SEQ2SEQ, max_position_embeddings=20)
    for kind in (BartConfig, MBartConfig, PegasusConfig, BlenderbotConfig, M2M100Config)
}
SMALL["led"] = LEDConfig(
    **SEQ2SEQ, max_encoder_position_embeddings=24, max_decoder_position_embeddings=20, attention_window=4
)
SMALL["llama"] = LlamaConfig(
    vocab_size=40,
    max_position_embeddings=20,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
)
SMALL["t5"] = T5Config(vocab_size=40, n_positions=20, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
WITHOUT_END = ("llama", "t5", "m2m_100")


def model_of(config):
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto_class.from_config(config).eval()


def runs(model, length: int) -> bool:
    """Whether the model reads so many tokens, in the decoder where there are two sides."""
    ids = torch.full((1, length), 5)
    try:
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                model(input_ids=ids[:, :4], decoder_input_ids=ids)
            else:
                model(input_ids=ids)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("name", SMALL)
def test_limits_are_where_the_model_itself_breaks(name):
    model = model_of(SMALL[name])
    limits = position_limits(model)
    assert position_limits_of_config(SMALL[name]) == limits
    if name in WITHOUT_END:
        assert (limits.prompt, limits.completion) == (None, None) and runs(model, 21)
        return
    assert runs(model, 20) and not runs(model, 21)
    if model.config.is_encoder_decoder:  # the start token takes one position
        assert limits == PositionLimits(24 if name == "led" else 20, 19, is_shared=False)
    else:
        assert limits == PositionLimits(20, 20, is_shared=True)


def check(limits, prompts, **lengths):
    check_lengths("The student", limits, word_tokenizer(), prompts, **lengths)


PROMPTS = ["w3", "w3 w4 w5 w6 w7 w8 w9", "w3 w4"]  # the longest has 8 tokens, EOS included


def test_what_fits_passes():
    shared = PositionLimits(20, 20, is_shared=True)
    check(shared, PROMPTS, max_prompt_length=None, max_completion_length=12)
    check(shared, PROMPTS, max_prompt_length=500, max_completion_length=12)
    check(shared, PROMPTS, max_prompt_length=4, max_completion_length=16)
    check(PositionLimits(8, 5, is_shared=False), PROMPTS, max_prompt_length=None, max_completion_length=5)
    check(PositionLimits(None, None, is_shared=True), PROMPTS, max_prompt_length=None, max_completion_length=10**6)
    check(shared, iter(lambda: pytest.fail("looked at"), 0), max_prompt_length=8, max_completion_length=12)


@pytest.mark.parametrize(
    "limits, lengths, message",
    [
        (
            PositionLimits(20, 20, is_shared=True),
            {"max_prompt_length": None, "max_completion_length": 13},
            r"positions for 20 tokens, too few for row 2: its prompt of 8 tokens \+ max_completion_length 13. Cut "
            "prompts with max_prompt_length 7, or lower",
        ),
        (
            PositionLimits(20, 20, is_shared=True),
            {"max_prompt_length": 6, "max_completion_length": 15},
            r"too few for row 2: its prompt of 6 tokens \+ max_completion_length 15. .*max_prompt_length 5,",
        ),
        (
            PositionLimits(20, 20, is_shared=True),
            {"max_prompt_length": 6, "max_completion_length": 20},
            "completions of 19 tokens, and max_completion_length is 20",
        ),
        (
            PositionLimits(7, 20, is_shared=False),
            {"max_prompt_length": None, "max_completion_length": 20},
            "positions for 7 tokens, too few for row 2: its prompt of 8 tokens. Cut prompts with max_prompt_length 7.",
        ),
        (
            PositionLimits(7, 19, is_shared=False),
            {"max_prompt_length": 5, "max_completion_length": 20},
            "completions of 19 tokens, and max_completion_length is 20",
        ),
    ],
)
def test_what_does_not_fit_has_its_numbers_in_the_error(limits, lengths, message):
    with pytest.raises(InputError, match=message):
        check(limits, PROMPTS, **lengths)


@pytest.mark.parametrize("family", sorted(MODELS))
def test_more_tokens_than_embeddings(family):
    model, tokenizer = MODELS[family](), word_tokenizer()
    check_embedding_rows("The student", tokenizer, model.config)
    rows = model.config.get_text_config().vocab_size
    tokenizer.add_tokens([f"new{i}" for i in range(rows - VOCAB + 2)])  # the rows behind the vocabulary, and two more
    with pytest.raises(InputError, match=rf"The student's tokenizer has 2 tokens .* is id {rows}, .* {rows} rows"):
        check_embedding_rows("The student", tokenizer, model.config)
