"""Tiny models and a word-level tokenizer, so that no test needs a network or a minute."""

import functools

import accelerate.utils.imports
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    Glm4Config,
    Glm4ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

# Accelerate looks on the disk for DeepSpeed whenever it unwraps a model, for half a millisecond and more. That it is
# there is found out before a test could hide it.
accelerate.utils.imports._is_package_available = functools.cache(accelerate.utils.imports._is_package_available)
accelerate.utils.imports.is_deepspeed_available()

PAD, EOS, UNK = 0, 1, 2
WORDS = 24
SENTINELS = 2
VOCAB = 3 + WORDS + SENTINELS
PADDED_VOCAB = VOCAB + 3  # LM-head rows beyond the tokenizer, as in T5


def word_tokenizer(*, append_eos: bool = True) -> PreTrainedTokenizerFast:
    """`<pad>` 0, `</s>` 1, `<unk>` 2, w3 .. w26, two sentinels at the end; T5-style EOS after each text."""
    vocab = {"<pad>": PAD, "</s>": EOS, "<unk>": UNK, **{f"w{i}": i for i in range(3, 3 + WORDS)}}
    vocab |= {f"<extra_id_{i}>": VOCAB - 1 - i for i in range(SENTINELS)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if append_eos:
        tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=[f"<extra_id_{i}>" for i in range(SENTINELS)],
        model_input_names=["input_ids", "attention_mask"],
    )


# Of `chat_tokenizer`: the words that begin a turn, and the one that ends it.
USER, ASSISTANT, SYSTEM, END = "w23", "w24", "w25", "w26"
CHAT_TEMPLATE = (
    "{%- for m in messages -%}"
    "{{ {'user': 'w23', 'assistant': 'w24', 'system': 'w25'}[m.role] }} {{ m.content }} w26 {% endfor -%}"
    "{%- if add_generation_prompt %}w24 {% endif -%}"
)


def chat_tokenizer(template: str | None = CHAT_TEMPLATE, **kwargs) -> PreTrainedTokenizerFast:
    """A `word_tokenizer` with a chat template of four special tokens, of which its EOS, `</s>`, is none."""
    tokenizer = word_tokenizer(append_eos=False, **kwargs)
    tokenizer.add_tokens([USER, ASSISTANT, SYSTEM, END], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def tiny_t5(*, tied: bool, seed: int = 0, d_model: int = 16, layers: int = 2, dropout: float = 0.0) -> PreTrainedModel:
    """Tied and scaled head with ReLU (t5-base) or untied with gated GELU (T0, Flan-T5)."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=PADDED_VOCAB,
        d_model=d_model,
        d_kv=8,
        d_ff=32,
        num_layers=layers,
        num_heads=2,
        dropout_rate=dropout,
        tie_word_embeddings=tied,
        feed_forward_proj="relu" if tied else "gated-gelu",
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )
    model = T5ForConditionalGeneration(config)
    if (
        not tied
    ):  # a new T5 is tied whatever its config says (transformers 5); only a checkpoint's two matrices untie it
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    # T5's initialisation gives logits in the hundreds without training; small weights make ordinary ones.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def tiny_llama(*, seed: int = 0, hidden_size: int = 16) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=PADDED_VOCAB,
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config).eval()


def tiny_glm(*, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Glm4Config(
        vocab_size=PADDED_VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return Glm4ForCausalLM(config).eval()


MODELS = {
    "t5-tied": lambda seed=0: tiny_t5(tied=True, seed=seed),
    "t5-untied": lambda seed=0: tiny_t5(tied=False, seed=seed),
    "llama": lambda seed=0: tiny_llama(seed=seed),
    "glm": lambda seed=0: tiny_glm(seed=seed),
}
