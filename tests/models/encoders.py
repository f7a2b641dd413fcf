"""Tiny encoders of every architecture, other models with layers, and a tokenizer like BERT's."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
    XLMRobertaConfig,
)

PAD, CLS, SEP, UNK, MASK = range(5)
FIRST_WORD, VOCAB = 5, 30
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_TOKENS = {"vocab_size": VOCAB, "pad_token_id": PAD, "initializer_range": 0.3}


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """[PAD] 0, [CLS] 1, [SEP] 2, [UNK] 3, [MASK] 4, w5 .. w29; "[CLS] text [SEP]" or "[CLS] text [SEP] pair [SEP]"."""
    special = {"[PAD]": PAD, "[CLS]": CLS, "[SEP]": SEP, "[UNK]": UNK, "[MASK]": MASK}
    vocab = {**special, **{f"w{i}": i for i in range(FIRST_WORD, VOCAB)}}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    names = ("pad_token", "cls_token", "sep_token", "unk_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **dict(zip(names, special, strict=True)),
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def bert_config(layers: int = 2, width: int = 16, heads: int = 2, **settings) -> BertConfig:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 32}
    return BertConfig(**{**_TOKENS, **_NO_DROPOUT, **sizes, "max_position_embeddings": 64, **settings})


def _like_bert(kind: type[PreTrainedConfig], layers: int, **settings) -> PreTrainedConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
    return kind(**{**_TOKENS, **_NO_DROPOUT, **sizes, "max_position_embeddings": 64, **settings})


def _distilbert(layers: int) -> DistilBertConfig:
    sizes = {"dim": 16, "n_layers": layers, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 64}
    return DistilBertConfig(**{**_TOKENS, **sizes, "dropout": 0.0, "attention_dropout": 0.0})


def _modernbert(layers: int) -> ModernBertConfig:
    """Every other layer looks at its neighbours only: two tokens on each side."""
    return _like_bert(
        ModernBertConfig,
        layers,
        local_attention=4,
        global_attn_every_n_layers=2,
        bos_token_id=CLS,
        eos_token_id=SEP,
        cls_token_id=CLS,
        sep_token_id=SEP,
    )


ENCODERS = {
    "bert": bert_config,
    "roberta": lambda layers: _like_bert(RobertaConfig, layers),
    "xlm-roberta": lambda layers: _like_bert(XLMRobertaConfig, layers),
    "distilbert": _distilbert,
    "electra": lambda layers: _like_bert(ElectraConfig, layers, embedding_size=8),
    "albert": lambda layers: _like_bert(AlbertConfig, layers, embedding_size=8),
    "deberta": lambda layers: _like_bert(DebertaConfig, layers, **_DISENTANGLED),
    "deberta-v2": lambda layers: _like_bert(
        DebertaV2Config, layers, **_DISENTANGLED, share_att_key=True, position_buckets=8
    ),
    "modernbert": _modernbert,
}
# Encoder-decoders have one layer less in the decoder, BART another number of heads there.
OTHERS = {
    "t5": lambda layers: T5Config(
        vocab_size=VOCAB,
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=layers,
        num_decoder_layers=layers - 1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=SEP,
    ),
    "bart": lambda layers: BartConfig(
        vocab_size=VOCAB,
        d_model=16,
        encoder_layers=layers,
        decoder_layers=layers - 1,
        encoder_attention_heads=2,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        dropout=0.0,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=CLS,
        eos_token_id=SEP,
        decoder_start_token_id=SEP,
        init_std=0.3,
    ),
    "llama": lambda layers: LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        pad_token_id=PAD,
        bos_token_id=CLS,
        eos_token_id=SEP,
        initializer_range=0.3,
    ),
}
CONFIGS = {**ENCODERS, **OTHERS}


def make(kind: str = "bert", layers: int = 3, head: str | None = None, seed: int = 0, **settings) -> PreTrainedModel:
    """A model with random weights; head: None, "tokens" or "classes"."""
    auto_class = {None: AutoModel, "tokens": AutoModelForMaskedLM, "classes": AutoModelForSequenceClassification}[head]
    config = CONFIGS[kind](layers, **settings) if kind == "bert" else CONFIGS[kind](layers)
    torch.manual_seed(seed)
    return auto_class.from_config(config).eval()


def batch(kind: str = "bert") -> dict[str, torch.Tensor]:
    """Texts of 6 and 4 tokens, for encoder-decoders with targets of 5 and 3."""

    def ids_and_mask(S: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids_BS = torch.randint(FIRST_WORD, VOCAB, (2, S), generator=torch.Generator().manual_seed(seed))
        mask_BS = torch.arange(S)[None, :] < torch.tensor([[S], [length]])
        return ids_BS.masked_fill(~mask_BS, PAD), mask_BS.long()

    ids_BS, mask_BS = ids_and_mask(6, 4, seed=0)
    inputs = {"input_ids": ids_BS, "attention_mask": mask_BS}
    if kind in ("t5", "bart"):
        ids_BS, mask_BS = ids_and_mask(5, 3, seed=1)
        inputs |= {"decoder_input_ids": ids_BS, "decoder_attention_mask": mask_BS}
    return inputs
