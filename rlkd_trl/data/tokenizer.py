"""A small T5-style tokenizer trained on a user's own texts: for the embedded demo and for models from scratch."""

from __future__ import annotations

import string
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rlkd_trl.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2, as in T5
MODEL_MAX_LENGTH = 512

# Characters that every tokenizer knows, seen in training or not; a space becomes Metaspace's "▁".
ALPHABET = sorted(set(string.printable) - set(" \r\x0b\x0c"))

# "[The Mill]" is tokenized as "[ The Mill]", so that "The" is the same piece as in running text. Decoding takes one
# space after each bracket away again, which is exact: the normaliser has put one there.
OPENING_BRACKETS = "[("


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4000, num_sentinels: int = 8) -> PreTrainedTokenizerFast:
    """Train a tokenizer with T5's interface: `<pad>` 0, `</s>` 1, `<unk>` 2, and `<extra_id_*>` as the last ids.

    As in T5, `<extra_id_0>` has the very last id and `<extra_id_1>` the one before it; encoding appends `</s>`;
    padding is on the right. Words are split from punctuation, and decoding gives the text back exactly, except for
    characters that no training text contains (`<unk>`), "▁", and one leading space.

    The model is byte-pair encoding rather than T5's Unigram: the Unigram trainer gives another vocabulary on every
    run, and the same texts must give the same tokenizer.

    Args:
        texts: training texts; read once.
        vocab_size: an upper bound, sentinels included. Small corpora give fewer pieces, and the characters of the
            texts are always kept.
        num_sentinels: how many `<extra_id_*>` tokens to reserve.

    Raises:
        InputError: `texts` holds no non-blank text, or `vocab_size` leaves no room for the printable characters.
    """
    from transformers import PreTrainedTokenizerFast

    if isinstance(texts, str):
        raise InputError("train_tokenizer got one string; pass a list of texts.")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise InputError("train_tokenizer got no non-blank text; pass at least one.")
    num_required = len((PAD, EOS, UNK)) + len(ALPHABET) + num_sentinels
    if num_sentinels < 0 or vocab_size < num_required:
        raise InputError(
            f"vocab_size {vocab_size} with num_sentinels {num_sentinels} is not possible; num_sentinels must be at "
            f"least 0 and vocab_size at least {num_required} (special tokens and printable characters)."
        )

    sentinels = [f"<extra_id_{i}>" for i in range(num_sentinels)]
    return PreTrainedTokenizerFast(
        tokenizer_object=_train_bpe(texts, vocab_size, sentinels),
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        extra_special_tokens=sentinels,
        padding_side="right",
        model_max_length=MODEL_MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],  # T5 takes no token_type_ids
        clean_up_tokenization_spaces=False,  # would remove the space in "a , b"
    )


def _train_bpe(texts: list[str], vocab_size: int, sentinels: list[str]) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE(unk_token=UNK, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(b, b + " ") for b in OPENING_BRACKETS])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation("isolated")]
    )
    # Metaspace turns "▁" into spaces token by token; brackets are put right once the tokens are one string.
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Metaspace(prepend_scheme="always"),
            decoders.Fuse(),
            *(decoders.Replace(Regex(f"\\{b} "), b) for b in OPENING_BRACKETS),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, 1)]
    )
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(sentinels),
        special_tokens=[PAD, EOS, UNK],
        initial_alphabet=ALPHABET,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in reversed(sentinels)])
    return tokenizer
