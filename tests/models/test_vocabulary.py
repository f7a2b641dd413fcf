"""Which ids may be sampled, which end a completion, and when two tokenizers are one."""

import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from rlkd_trl.errors import InputError
from rlkd_trl.models.vocabulary import check_same_tokenizer, eos_token_ids, forbidden_ids
from tests.tiny_models import EOS, PAD, PADDED_VOCAB, UNK, VOCAB, tiny_llama, tiny_t5, word_tokenizer


def forbidden(tokenizer, vocab_size=PADDED_VOCAB, eos_ids=(EOS,)) -> list[int]:
    mask_V = forbidden_ids(tokenizer, vocab_size, list(eos_ids))
    assert mask_V.shape == (vocab_size,) and mask_V.dtype == torch.bool
    return mask_V.nonzero()[:, 0].tolist()


def tokenizer_with(vocab: dict[str, int], **special) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocab, unk_token="<unk>")), **special)


def test_forbidden_are_pad_sentinels_and_the_rows_beyond_the_tokenizer():
    # 29 tokens: pad 0, EOS 1, unknown 2, words 3..26, sentinels 27 and 28; the head has 32 rows.
    assert forbidden(word_tokenizer()) == [0, 2, 27, 28, 29, 30, 31]


def test_a_head_without_spare_rows():
    assert forbidden(word_tokenizer(), vocab_size=VOCAB) == [0, 2, 27, 28]


def test_a_head_smaller_than_the_tokenizer():
    assert forbidden(word_tokenizer(), vocab_size=VOCAB - 1) == [0, 2, 27]


def test_sentinels_need_not_be_declared_special():
    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2, "w": 3, "<extra_id_0>": 4, "<extra_id_words>": 5, "a<extra_id_1>": 6}
    tokenizer = tokenizer_with(vocab, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    assert forbidden(tokenizer, vocab_size=7) == [0, 2, 4]


def test_a_pad_token_that_is_eos_may_be_sampled():
    tokenizer = word_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert EOS not in forbidden(tokenizer)


def test_with_several_eos_ids_all_may_be_sampled():
    tokenizer = word_tokenizer()
    # A chat model's second EOS can be a special token of its own; here a sentinel plays it.
    assert forbidden(tokenizer, eos_ids=(EOS, 28)) == [0, 2, 27, 29, 30, 31]


def test_other_special_tokens_are_forbidden():
    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2, "<s>": 3, "<mask>": 4, "w": 5}
    tokenizer = tokenizer_with(
        vocab, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>", mask_token="<mask>"
    )
    assert forbidden(tokenizer, vocab_size=6) == [0, 2, 3, 4]


def test_unknown_is_forbidden_since_no_text_is_made_of_it():
    assert UNK in forbidden(word_tokenizer())


def test_an_unknown_token_that_is_eos_may_be_sampled():
    """As in GPT-2, whose one special token has all roles."""
    tokenizer = word_tokenizer()
    tokenizer.unk_token = tokenizer.eos_token
    assert EOS not in forbidden(tokenizer)


def test_special_tokens_without_a_role_are_forbidden_too():
    """As Llama 3's `<|start_header_id|>` and its 240 reserved tokens: special, but not bos, eos, pad or such."""
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<|start_header_id|>"], special_tokens=True)
    start = tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    assert tokenizer.decode([3, start, 4], skip_special_tokens=True) == "w3 w4"
    assert start in forbidden(tokenizer, vocab_size=40)


def test_a_vocabulary_with_a_gap():
    """Ids that no token has are forbidden, and the last token is not, though `len(tokenizer)` is its id."""
    tokenizer = tokenizer_with(
        {"<pad>": 0, "</s>": 1, "<unk>": 2, "w3": 3, "w5": 5}, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    assert forbidden(tokenizer, vocab_size=8) == [0, 2, 4, 6, 7]


def test_eos_from_the_generation_config_comes_first():
    model = tiny_llama()
    model.generation_config = GenerationConfig(eos_token_id=[5, 1])
    assert eos_token_ids(model, word_tokenizer()) == [5, 1]
    model.generation_config = GenerationConfig(eos_token_id=7)
    assert eos_token_ids(model, word_tokenizer()) == [7, EOS], "the tokenizer's is what targets end with"


@pytest.mark.parametrize("generation_config", [None, GenerationConfig()], ids=["none", "without EOS"])
def test_eos_from_the_tokenizer_otherwise(generation_config):
    model = tiny_llama()
    model.generation_config = generation_config
    assert eos_token_ids(model, word_tokenizer()) == [EOS]


def test_no_eos_at_all_is_an_error():
    model = tiny_t5(tied=True)
    model.generation_config.eos_token_id = None
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS"):
        eos_token_ids(model, tokenizer)


def test_equal_tokenizers_pass():
    check_same_tokenizer(word_tokenizer(), word_tokenizer(append_eos=False))


def test_only_the_tokenizers_matter_and_not_the_head_rows():
    """t5-base and T0 have the same tokenizer, and 32,128 and 32,100 rows or the like."""
    student, teacher = word_tokenizer(), word_tokenizer()
    assert len(student) == VOCAB != PADDED_VOCAB
    check_same_tokenizer(student, teacher)
    assert forbidden(student, VOCAB) == forbidden(teacher, PADDED_VOCAB)[:4]


@pytest.mark.parametrize("longer", ["student", "teacher"])
def test_another_vocabulary_is_refused_with_an_example(longer):
    tokenizers = {"student": word_tokenizer(), "teacher": word_tokenizer()}
    tokenizers[longer].add_tokens(["aardvark"])
    with pytest.raises(InputError) as caught:
        check_same_tokenizer(**tokenizers)
    # "29 and 30 tokens, 1 of them different; e.g. 'aardvark' is 29 for one and missing for the other"
    other = {"student": "teacher", "teacher": "student"}[longer]
    for part in ("1 of them different", "'aardvark'", f"29 for the {longer}", f"missing for the {other}"):
        assert part in str(caught.value)


def test_swapped_ids_are_refused():
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4}
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    with pytest.raises(InputError, match="2 of them different"):
        check_same_tokenizer(tokenizer_with(words, **special), tokenizer_with({**words, "a": 4, "b": 3}, **special))


def test_another_eos_is_refused():
    student, teacher = word_tokenizer(), word_tokenizer()
    teacher.eos_token = "w5"
    with pytest.raises(InputError, match=r"EOS is 5 for the teacher, 1 for the student"):
        check_same_tokenizer(student, teacher)


def test_another_pad_token_is_accepted():
    """Padding is never scored."""
    student = word_tokenizer()
    student.pad_token = "</s>"
    assert student.pad_token_id != PAD
    check_same_tokenizer(student, word_tokenizer())
