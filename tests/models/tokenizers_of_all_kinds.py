"""Small tokenizers of every kind, trained on a few sentences, with `<pad>` 0, `</s>` 1 and `<unk>` 2."""

import functools

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The Eagle is a cheap coffee shop near the river.",
    "A family-friendly café in the city centre: The Mill, 5 out of 5 stars!",
    "naïve über 東京 😀👩‍👩‍👧 e\u0301 ﬁne — a cheap, cheap shop",
    "It serves Japanese food for less than £20 per person.",
]
CHARACTERS = " w0123456789"  # of the words of `tests.tiny_models.word_tokenizer`
SPECIAL = ["<pad>", "</s>", "<unk>"]
ALPHABET = sorted({character for text in TEXTS for character in text})


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def _trained(tokenizer: Tokenizer, trainer) -> PreTrainedTokenizerFast:
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return _wrapped(tokenizer)


def bpe() -> PreTrainedTokenizerFast:
    """SentencePiece's spaces, no bytes: some characters are unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _trained(tokenizer, trainers.BpeTrainer(vocab_size=110, special_tokens=SPECIAL, show_progress=False))


def byte_level(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """GPT-2's: every text, and tokens that end within a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return _trained(tokenizer, trainer)


def unigram() -> PreTrainedTokenizerFast:
    """T5's: NFKC, a space before the text, one space for several."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=110, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=ALPHABET, show_progress=False
    )
    return _trained(tokenizer, trainer)


def word_piece() -> PreTrainedTokenizerFast:
    """BERT's, uncased: lower case, no accents."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _trained(tokenizer, trainers.WordPieceTrainer(vocab_size=160, special_tokens=SPECIAL, show_progress=False))


def word_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _trained(tokenizer, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))


KINDS = {"bpe": bpe, "byte_level": byte_level, "unigram": unigram, "word_piece": word_piece, "word_level": word_level}


@functools.cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()


def character_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """A token for each character."""
    vocab = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrapped(tokenizer)
