"""Counts against published ones, bytes against those of loaded models, shares worked by hand."""

import logging

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from rlkd_trl.errors import InputError
from rlkd_trl.planning.skeletons import Checkpoint
from rlkd_trl.planning.weights import Shares, quantisation_workspace_bytes, training_shares, weight_bytes
from tests.distributed.launching import launch
from tests.planning.measured import weight_bytes as measured_weight_bytes
from tests.planning.models import T0_3B, T0_11B, T5_BASE, llama, t5, write_config

RANKS, PARAMETERS_OF_WORKER = 2, 32 * 128 * 128  # as in `zero_worker`, which imports DeepSpeed

# By hand, for T5 with a gated feed-forward layer, D width, F feed-forward width, A = heads · 64, L layers, V = 32,128:
#   embeddings and LM head 2VD, relative positions 2 · 32 · heads, final norms 2D
#   encoder layer 4DA + 3DF + 2D; decoder layer 8DA + 3DF + 3D
# 11B: D = A = 4096, F = 10240, L = 24:
#   2VD = 263,192,576; 24 · (12 · 4096² + 6 · 4096 · 10240 + 5 · 4096) = 10,872,127,488 (4096² = 16,777,216, so
#   201,326,592 + 251,658,240 + 20,480 = 453,005,312 a layer pair); 4,096 relative positions; 8,192 norms
# 3B: D = A = 2048, F = 5120: 131,596,288 + 24 · (50,331,648 + 62,914,560 + 10,240) + 2,048 + 4,096
# t5-base: tied, ReLU with two matrices, D = A = 768, F = 3072, L = 12:
#   VD = 24,674,304; 12 · (7,077,888 + 9,437,184 + 3,840) = 198,226,944; 768 relative positions; 1,536 norms
PARAMETERS = {
    "11B": (T0_11B, 263_192_576 + 24 * 453_005_312 + 4_096 + 8_192),
    "3B": (T0_3B, 131_596_288 + 24 * 113_256_448 + 2_048 + 4_096),
    "t5-base": (T5_BASE, 24_674_304 + 12 * (7_077_888 + 9_437_184 + 3_840) + 768 + 1_536),
}
PUBLISHED = {"11B": 11.135e9, "3B": 2.850e9, "t5-base": 222.9e6}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_published_models(name, tmp_path):
    config, by_hand = PARAMETERS[name]
    skeleton = Checkpoint.of("--teacher", str(write_config(tmp_path, config))).build(torch.bfloat16)
    assert skeleton.num_parameters == by_hand
    assert by_hand == pytest.approx(PUBLISHED[name], rel=1e-3)
    assert weight_bytes(skeleton) == 2 * by_hand


QUANTIZERS = {
    "none": None,
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


def gpt2():
    """With biases, tied, and linear layers stored the other way round."""
    return GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, vocab_size=200, bos_token_id=0, eos_token_id=1)
    )


FAMILIES = {
    "t5-untied": lambda: t5(tied=False, vocab_size=200),
    "t5-tied": lambda: t5(tied=True, vocab_size=200),
    "llama": lambda: llama(vocab_size=200),
    "gpt2": gpt2,
}


@pytest.mark.parametrize("quantization", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_a_loaded_model(family, dtype, quantization, tmp_path):
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    saved = FAMILIES[family]()
    saved.save_pretrained(tmp_path)
    auto_class = AutoModelForSeq2SeqLM if saved.config.is_encoder_decoder else AutoModelForCausalLM
    loaded = auto_class.from_pretrained(tmp_path, dtype=dtype, quantization_config=QUANTIZERS[quantization])
    measured = measured_weight_bytes(loaded)
    skeleton = Checkpoint.of("--teacher", str(tmp_path)).build(dtype)
    assert weight_bytes(skeleton, quantization) == pytest.approx(measured, rel=0.05)
    if quantization != "none":
        assert measured < 0.8 * weight_bytes(skeleton), "the model must have something to quantise"


# By hand, for FAMILIES' T5: V = 200, D = A = 64, F = 160, two layers each, 4 heads. bitsandbytes takes the matrices of
# attention (8 in the encoder, 16 in the decoder, 64 × 64) and the first of each feed-forward layer (64 × 160; of a
# gated one both: 8 instead of 4), not its last, nor LM head and embeddings.
#   all: embeddings 12,800 (twice if untied), attention 24 · 4,096, matrices of feed-forward 10,240 each,
#   norms 64 · (2 · 2 + 3 · 2 + 2), relative positions 2 · 32 · 4
#   int8: 4,096 + 4 · 64 = 4,352, and 10,240 + 4 · 160 = 10,880
#   nf4: 2,048 + 4 · (64 blocks + 16 codes) = 2,368, and 5,120 + 4 · (160 + 16) = 5,824
TIED_REST, UNTIED_REST = (embeddings * 12_800 + 4 * 10_240 + 768 + 256 for embeddings in (1, 2))
CONVERTED = {"int8": (4_352, 10_880), "nf4": (2_368, 5_824)}


@pytest.mark.parametrize("quantization", CONVERTED)
@pytest.mark.parametrize(("family", "rest", "wide"), [("t5-tied", TIED_REST, 4), ("t5-untied", UNTIED_REST, 8)])
def test_quantised_bytes_by_hand(family, rest, wide, quantization, tmp_path):
    FAMILIES[family]().save_pretrained(tmp_path)
    skeleton = Checkpoint.of("--teacher", str(tmp_path)).build(torch.bfloat16)
    attention, feed_forward = CONVERTED[quantization]
    assert weight_bytes(skeleton) == 2 * (rest + 24 * 4_096 + wide * 10_240)
    assert weight_bytes(skeleton, quantization) == 2 * rest + 24 * attention + wide * feed_forward
    assert quantisation_workspace_bytes(skeleton) == 2 * 10_240


@pytest.mark.parametrize("tied", [True, False])
def test_the_files_say_whether_a_t5_is_tied(tied, tmp_path):
    """Their configs are alike: transformers 5 writes `tie_word_embeddings: true` for every T5."""
    model = t5(tied=False)
    if tied:
        model.lm_head.weight = model.shared.weight
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.of("--teacher", str(tmp_path))
    assert checkpoint.head_is_tied == tied
    assert checkpoint.build(torch.float32).num_parameters == sum(p.numel() for p in model.parameters())
    (tmp_path / "model.safetensors").unlink()
    assert not Checkpoint.of("--teacher", str(tmp_path)).head_is_tied, "without files, as published v1.1 models are"


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shares_that_deepspeed_holds(stage, bf16, tmp_path):
    """Between steps there are weights and optimizer, and at stage 3 the share of gradients that is never released."""
    shares = training_shares(
        f"zero{stage}", trained=PARAMETERS_OF_WORKER, frozen=0, itemsize=4, ranks=RANKS, bf16=bf16
    )
    expected = shares.weights + shares.optimizer
    if stage == 3:
        expected += PARAMETERS_OF_WORKER * (2 if bf16 else 4) // RANKS
    held, _ = launch("tests.planning.zero_worker", tmp_path, RANKS, stage, bf16)
    assert held == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("model_type", ["t5", "mt5", "umt5", "bart"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_published_config_says_whether_it_is_tied(model_type, tied, tmp_path):
    config = {**T5_BASE, "model_type": model_type, "vocab_size": 100, "tie_word_embeddings": tied}
    assert Checkpoint.of("--teacher", str(write_config(tmp_path, config))).head_is_tied == tied


GIGA = 10**9
BUCKET = GIGA // 2  # elements


# One billion trained parameters in float32 on 4 ranks: 4 GB whole, 1 GB a share.
@pytest.mark.parametrize(
    ("sharding", "expected"),
    [
        # gradients 4 and as many in buckets; two moments 8
        ("ddp", Shares(4 * GIGA, 0, 0, 8 * GIGA, 8 * GIGA)),
        # gradients 4, a share of them 1, bucket 2; (copy and two moments 12) / 4
        ("zero1", Shares(4 * GIGA, 0, 0, 7 * GIGA, 3 * GIGA)),
        ("zero2", Shares(4 * GIGA, 0, 0, 4 * GIGA, 3 * GIGA)),
        ("zero3", Shares(1 * GIGA, 3 * GIGA, 3 * GIGA, 4 * GIGA, 3 * GIGA)),
    ],
)
def test_shares_in_float32(sharding, expected):
    assert training_shares(sharding, trained=GIGA, frozen=0, itemsize=4, ranks=4) == expected


def test_shares_in_mixed_precision():
    """DDP's weights stay as they are; DeepSpeed's are bfloat16, with the float32 copy in the optimizer's share."""
    both = {"trained": GIGA, "frozen": 0, "itemsize": 4, "ranks": 4, "bf16": True}
    assert training_shares("ddp", **both).weights == 4 * GIGA
    # weights 2; gradients 2, their share in float32 1, bucket 1; optimizer as before
    assert training_shares("zero1", **both) == Shares(2 * GIGA, 0, 0, 4 * GIGA, 3 * GIGA)


def test_one_rank_has_no_buckets_of_ddp():
    assert training_shares("ddp", trained=GIGA, frozen=0, itemsize=4, ranks=1).gradients == 4 * GIGA


def test_frozen_weights_have_neither_gradient_nor_moments():
    shares = training_shares("ddp", trained=GIGA, frozen=GIGA, itemsize=2, ranks=2)
    assert shares == Shares(4 * GIGA, 0, 0, 4 * GIGA, 4 * GIGA)


def test_zero3_gathers_at_most_what_may_be_live():
    """Of 3 billion in 2 bytes, 1 billion at a time: 2 GB, of which 0.5 GB are the rank's own. 4.5 GB are elsewhere."""
    shares = training_shares("zero3", trained=3 * GIGA, frozen=0, itemsize=2, ranks=4)
    assert (shares.gathered, shares.elsewhere) == (1.5 * GIGA, 4.5 * GIGA)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "neither an encoder-decoder nor a decoder-only",
        ),
        ({"model_type": "vit"}, "neither an encoder-decoder nor a decoder-only"),
        ({"model_type": "nothing-of-the-kind"}, "Could not read the config"),
    ],
)
def test_configs_that_are_not_of_language_models(config, message, tmp_path):
    with pytest.raises(InputError, match=message):
        Checkpoint.of("--teacher", str(write_config(tmp_path, config)))
