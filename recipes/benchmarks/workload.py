"""The work that the speed benchmarks share: random models, prompts, and the arithmetic that a phase needs.

It imports nothing of this package, so that an interpreter with other versions of the libraries can run the same work.
"""

import argparse
import statistics
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

PAD, EOS, UNK = 0, 1, 2


@dataclass(frozen=True)
class Dimensions:
    """A T5 v1.1 (gated GELU, untied head, `layers` in the encoder and as many in the decoder), or a Qwen2."""

    d_model: int
    d_ff: int
    heads: int
    layers: int
    d_kv: int = 64

    @property
    def inner(self) -> int:
        """Width of queries, keys and values, all heads together."""
        return self.heads * self.d_kv


@dataclass(frozen=True)
class Shape:
    """A step: `prompts` of `prompt_tokens` each, with `samples` completions of `completion_tokens` for each."""

    prompt_tokens: int
    completion_tokens: int
    prompts: int
    samples: int
    vocabulary: int = 8192

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Adds a flag for each size; the defaults are the smaller of the two shapes in the results."""
        for name, default in asdict(Shape(64, 32, 16, 4)).items():
            parser.add_argument(f"--{name}", type=int, default=default)

    @classmethod
    def of(cls, flags: argparse.Namespace) -> "Shape":
        return cls(*(getattr(flags, option.name) for option in fields(cls)))

    def flags(self) -> list[str]:
        """The words of a command line that give this shape."""
        return [word for name, value in asdict(self).items() for word in (f"--{name}", str(value))]

    @property
    def completions(self) -> int:
        return self.prompts * self.samples


STUDENT = Dimensions(d_model=256, d_ff=512, heads=4, layers=4)
TEACHER = Dimensions(d_model=512, d_ff=1024, heads=8, layers=8)
DECODER_STUDENT = Dimensions(d_model=256, d_ff=512, heads=4, layers=8)
DECODER_TEACHER = Dimensions(d_model=512, d_ff=1024, heads=8, layers=16)


def t5_config(dimensions: Dimensions, vocabulary: int, *, v1_1: bool = True) -> T5Config:
    """T5 v1.1's form, as T0 has it (gated GELU, a head of its own), or that of the first T5; without dropout."""
    return T5Config(
        vocab_size=vocabulary,
        d_model=dimensions.d_model,
        d_kv=dimensions.d_kv,
        d_ff=dimensions.d_ff,
        num_layers=dimensions.layers,
        num_decoder_layers=dimensions.layers,
        num_heads=dimensions.heads,
        feed_forward_proj="gated-gelu" if v1_1 else "relu",
        tie_word_embeddings=not v1_1,
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )


def random_t5(dimensions: Dimensions, vocabulary: int, seed: int) -> T5ForConditionalGeneration:
    """A T5 v1.1 with random float32 weights."""
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(t5_config(dimensions, vocabulary)).float()
    if model.lm_head.weight is model.shared.weight:  # transformers 5 ties every new T5, whatever its config says
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


def random_decoder(dimensions: Dimensions, vocabulary: int, seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 with random float32 weights, as many key and value heads as query heads, and a head of its own."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=dimensions.d_model,
        intermediate_size=dimensions.d_ff,
        num_hidden_layers=dimensions.layers,
        num_attention_heads=dimensions.heads,
        num_key_value_heads=dimensions.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return Qwen2ForCausalLM(config).float()


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """`<pad>` 0, `</s>` 1, `<unk>` 2, then w3, w4, …; a text's tokens are followed by `</s>`, as T5's are."""
    words = {"<pad>": PAD, "</s>": EOS, "<unk>": UNK, **{f"w{i}": i for i in range(3, vocabulary)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def prompt_ids(shape: Shape, step: int) -> torch.Tensor:
    """`[P, S]`: random words and `</s>`, the same in every library."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids_PS = torch.randint(3, shape.vocabulary, (shape.prompts, shape.prompt_tokens), generator=generator)
    ids_PS[:, -1] = EOS
    return ids_PS


def prompt_texts(shape: Shape, step: int) -> list[str]:
    """The same prompts as texts; the tokenizer adds the `</s>`."""
    return [" ".join(f"w{i}" for i in ids[:-1]) for ids in prompt_ids(shape, step).tolist()]


# Arithmetic: of matrix multiplications only; a multiplication and an addition are two operations.


def prompt_flops(dimensions: Dimensions, shape: Shape) -> int:
    """Operations of the encoder and of all layers' cross-attention keys and values, for one prompt."""
    D, inner, S = dimensions.d_model, dimensions.inner, shape.prompt_tokens
    encoder_per_token = 4 * (2 * D * inner) + 3 * (2 * D * dimensions.d_ff) + 2 * (2 * S * inner)
    cross_keys_values_per_token = 2 * (2 * D * inner)
    return dimensions.layers * S * (encoder_per_token + cross_keys_values_per_token)


def completion_flops(dimensions: Dimensions, shape: Shape, *, cached: bool = False) -> int:
    """Operations of decoder and LM head for one completion.

    cached: token by token, which does not compute what the causal mask hides.
    """
    D, inner, S, T = dimensions.d_model, dimensions.inner, shape.prompt_tokens, shape.completion_tokens
    # Self-attention's four projections, cross-attention's query and output, the gated feed-forward layer's three.
    projections_per_token = 6 * (2 * D * inner) + 3 * (2 * D * dimensions.d_ff)
    cross_attention = 2 * (2 * S * inner) * T
    self_attention = 2 * (2 * inner) * (T * (T + 1) // 2 if cached else T * T)
    per_layer = projections_per_token * T + cross_attention + self_attention
    return dimensions.layers * per_layer + 2 * D * shape.vocabulary * T


def forward_flops(dimensions: Dimensions, shape: Shape, *, cached: bool = False, shared: bool = True) -> int:
    """Operations for all completions of a step. shared: each prompt is read once, not once for each completion."""
    readings = shape.prompts if shared else shape.completions
    return readings * prompt_flops(dimensions, shape) + shape.completions * completion_flops(
        dimensions, shape, cached=cached
    )


def decoder_flops(dimensions: Dimensions, shape: Shape, *, cached: bool = False, shared: bool = True) -> int:
    """Operations of a decoder-only model for all completions of a step, with the LM head at the completions' tokens.

    cached: token by token, which does not compute what the causal mask hides. shared: each prompt is read once.
    """
    D, inner, S, T = dimensions.d_model, dimensions.inner, shape.prompt_tokens, shape.completion_tokens
    # Self-attention's four projections, the gated feed-forward layer's three; then queries × keys, weights × values.
    per_token = 4 * (2 * D * inner) + 3 * (2 * D * dimensions.d_ff)
    prompt_pairs = S * S
    completion_pairs = T * S + (T * (T + 1) // 2 if cached else T * T)
    of_prompt = dimensions.layers * (S * per_token + 2 * (2 * inner) * prompt_pairs)
    of_completion = dimensions.layers * (T * per_token + 2 * (2 * inner) * completion_pairs)
    readings = shape.prompts if shared else shape.completions
    return readings * of_prompt + shape.completions * (of_completion + 2 * D * shape.vocabulary * T)


def decoder_phase_flops(shape: Shape, *, reference: bool) -> dict[str, int]:
    """The operations that each phase of a step of decoder-only models needs, counted as in `step.py`."""
    return {
        "generate": decoder_flops(DECODER_STUDENT, shape, cached=True),
        "score": decoder_flops(DECODER_TEACHER, shape),
        "update": (3 + reference) * decoder_flops(DECODER_STUDENT, shape),
    }


# Measuring


class MatmulRate:
    """Floating-point operations per CPU second of this process, measured several times during a run."""

    def __init__(self, size: int = 1024):
        self._left, self._right = torch.randn(size, size), torch.randn(size, size)
        self._seconds: list[float] = []
        self._operations = 2 * size**3

    def measure(self, repetitions: int = 5) -> None:
        self._left @ self._right  # not counted, as other work has replaced what was in the caches
        for _ in range(repetitions):
            start = time.process_time()
            self._left @ self._right
            self._seconds.append(time.process_time() - start)

    @property
    def per_second(self) -> float:
        """The median over all repetitions so far."""
        return self._operations / statistics.median(self._seconds)


def resident_mib() -> float:
    return _status_mib("VmRSS")


def peak_resident_mib() -> float:
    """The peak since the process began, or since `reset_peak`; `ru_maxrss` would count its parent before the fork."""
    return _status_mib("VmHWM")


def reset_peak() -> None:
    """Starts a new count for `peak_resident_mib`. Linux only."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status_mib(name: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1]) / 1024
