"""Sizes of teacher assistants: worked numbers, and models of these sizes."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    GPTNeoXConfig,
    LlamaConfig,
    T5Config,
)

from rlkd_trl.errors import InputError
from rlkd_trl.planning import command
from rlkd_trl.planning.assistants import assistant_configs, geometric_size, num_parameters

SMALL_T5 = {"vocab_size": 50, "d_kv": 16, "decoder_start_token_id": 0}
TEACHER = T5Config(d_model=256, num_layers=4, num_decoder_layers=4, num_heads=16, d_ff=1024, **SMALL_T5)
STUDENT = T5Config(d_model=64, num_layers=1, num_decoder_layers=1, num_heads=4, d_ff=64, **SMALL_T5)


def test_equal_ratios():
    # 64^(1/2) 4^(1/2) = 16; 64 → 4 in three steps by 64^(1/3) / 4^(1/3) = 2.52: 25.4, 10.1; to multiples of 4: 24, 12
    assert geometric_size(64, 4, 0.5) == 16
    assert [geometric_size(64, 4, share) for share in (1 / 3, 2 / 3)] == [25, 10]
    assert [geometric_size(64, 4, share, multiple_of=4) for share in (1 / 3, 2 / 3)] == [24, 12]
    assert geometric_size(1, 1, 0.5) == 1 and geometric_size(5, 1, 0.9, multiple_of=8) == 8


def test_an_assistant_is_half_way_in_every_size():
    (assistant,) = assistant_configs(TEACHER, STUDENT, 1)
    sizes = [
        assistant.d_model,
        assistant.num_layers,
        assistant.num_decoder_layers,
        assistant.num_heads,
        assistant.d_ff,
    ]
    assert sizes == [128, 2, 2, 8, 256]
    model = AutoModelForSeq2SeqLM.from_config(assistant)
    assert num_parameters(assistant) == model.num_parameters()
    assert num_parameters(STUDENT) < model.num_parameters() < num_parameters(TEACHER)


def test_decoders_too_and_a_chain_that_falls():
    teacher, student = (
        LlamaConfig(
            vocab_size=50, hidden_size=w, num_hidden_layers=n, num_attention_heads=h, num_key_value_heads=1, head_dim=d
        )
        for w, n, h, d in ((96, 6, 6, 16), (24, 2, 3, 8))
    )
    chain = [teacher, *assistant_configs(teacher, student, 3), student]
    counts = [num_parameters(config) for config in chain]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 5
    for config in chain[1:-1]:
        assert config.hidden_size % config.num_attention_heads == 0
        AutoModelForCausalLM.from_config(config)


def falls(teacher, student, count: int) -> list:
    """The assistants, once their chain is found to fall in size."""
    assistants = assistant_configs(teacher, student, count)
    counts = [num_parameters(config) for config in (teacher, *assistants, student)]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == count + 2
    return assistants


def test_a_shallow_decoder_stays_shallow():
    """12 layers and 8 above, 12 and 2 below: the decoder's go by 8^(1/2) 2^(1/2) = 4, not to the encoder's 12."""
    teacher, student = (
        T5Config(d_model=d, num_layers=12, num_decoder_layers=n, num_heads=4, d_ff=d, **SMALL_T5)
        for d, n in ((64, 8), (32, 2))
    )
    (assistant,) = falls(teacher, student, 1)
    assert (assistant.num_layers, assistant.num_decoder_layers) == (12, 4)


def test_a_decoders_heads_and_feed_forward_width_fall_too():
    # heads 10 → 4 by 6.3 = 6; width 200 → 64 by 113.1, to a multiple of 6: 114; 300 → 75 by 150; 400 → 100 by 200
    teacher, student = (
        BartConfig(
            vocab_size=50, d_model=w, encoder_layers=n, decoder_layers=n, encoder_attention_heads=h,
            decoder_attention_heads=h, encoder_ffn_dim=f, decoder_ffn_dim=g,
        )
        for w, n, h, f, g in ((200, 2, 10, 300, 400), (64, 1, 4, 75, 100))
    )  # fmt: skip
    (assistant,) = falls(teacher, student, 1)
    assert (assistant.encoder_attention_heads, assistant.decoder_attention_heads, assistant.d_model) == (6, 6, 114)
    assert (assistant.encoder_ffn_dim, assistant.decoder_ffn_dim) == (150, 200)


@pytest.mark.parametrize("kind, settings", [(LlamaConfig, {"num_key_value_heads": 3}), (GPTNeoXConfig, {})])
def test_rotary_positions_find_pairs_in_each_head(kind, settings):
    """SmolLM2's shape: 9 heads of 64, and 3 of 32; in between 5, of a width that rotation can halve."""
    teacher, student = (
        kind(vocab_size=50, hidden_size=w, num_hidden_layers=2, num_attention_heads=h, intermediate_size=w, **settings)
        for w, h in ((576, 9), (96, 3))
    )
    for assistant in falls(teacher, student, 2):
        with torch.no_grad():
            AutoModelForCausalLM.from_config(assistant)(torch.tensor([[3, 4, 5]]))


def test_sizes_that_leave_no_room():
    teacher, student = (T5Config(d_model=8, num_layers=n, num_heads=2, d_ff=8, **SMALL_T5) for n in (2, 1))
    with pytest.raises(InputError, match="1 assistants between teacher and student would have sizes that do not fall"):
        assistant_configs(teacher, student, 1)


def test_a_student_that_is_not_smaller():
    with pytest.raises(InputError, match="between a teacher and a smaller student"):
        assistant_configs(STUDENT, TEACHER, 1)


@pytest.mark.slow
def test_the_planner_prints_them(tmp_path, capsys):
    for name, config in (("teacher", TEACHER), ("student", STUDENT)):
        config.save_pretrained(tmp_path / name)
    command.main(f"--teacher {tmp_path / 'teacher'} --student {tmp_path / 'student'} --assistants 1".split())
    printed = capsys.readouterr().out
    assert "| assistant 1 | 2 | 128 | 8 | 256 |" in printed
