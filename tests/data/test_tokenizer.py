"""The tokenizer that models from scratch use: T5's interface, exact round trips, the same every time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, T5Config

from rlkd_trl.data import demo_dataset, train_tokenizer
from rlkd_trl.errors import InputError

TEXTS = ["name[The Mill], food[Thai]", "The Mill serves Thai food.", "The Mill is a cheap (but good) pub."] * 3


@pytest.fixture(scope="module")
def demo_texts():
    return [text for row in demo_dataset("train") for text in [row["source"], *row["references"]]]


@pytest.fixture(scope="module")
def tokenizer(demo_texts):
    return train_tokenizer(demo_texts)


def round_trip(tokenizer, text):
    return tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)


def test_special_ids_are_t5s(tokenizer):
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "</s>", "<unk>"]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.padding_side == "right"
    assert tokenizer.model_max_length == 512


def test_sentinels_are_the_last_ids_and_the_first_sentinel_is_the_very_last(tokenizer):
    size = len(tokenizer)
    last_tokens = tokenizer.convert_ids_to_tokens(list(range(size - 8, size)))
    assert last_tokens == [f"<extra_id_{i}>" for i in range(7, -1, -1)]
    assert tokenizer("<extra_id_0>").input_ids == [size - 1, 1]  # one token, not spelt out
    assert len(train_tokenizer(TEXTS, num_sentinels=0)) == len(train_tokenizer(TEXTS, num_sentinels=3)) - 3


def test_encoding_ends_in_eos_once_padding_follows_and_there_are_no_token_types(tokenizer):
    batch = tokenizer(["dogs", "dogs are welcome"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    short, long = batch["input_ids"]
    assert short == [short[0], 1, 0, 0]  # one word, EOS, padding to the three words and EOS of the other
    assert long[-1] == 1 and long.count(1) == 1
    assert batch["attention_mask"] == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert tokenizer("dogs are welcome", truncation=True, max_length=2).input_ids == [short[0], 1]


@pytest.mark.slow
def test_demo_texts_of_all_splits_survive_the_round_trip(tokenizer, demo_texts):
    unseen = [text for row in demo_dataset("test") for text in [row["source"], *row["references"]]]
    for text in demo_texts + unseen:
        assert round_trip(tokenizer, text) == text
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids


@pytest.mark.parametrize(
    "text",
    [
        "a , b ; c",
        "[ x ] ( y ) [[z]] ((  [",
        "don't 'quote' \"this\" - well-known, 5%-off!",
        "two  spaces and one at the end ",
        "line\nbreak\tand tab",
        "f(x)[i] = {a: [1, 2]} <b> \\ / @ # $ ^ & * ~ ` |",
        "",
    ],
)
def test_ascii_survives_the_round_trip_although_training_never_saw_it(tokenizer, text):
    assert round_trip(tokenizer, text) == text


@pytest.mark.parametrize("text", ["café", "日本 trail", "£20–25", "😀", "e\u0301", "\u200b\ufeff"])
def test_unknown_characters_become_unk_and_the_rest_stays(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id in ids and ids[-1] == 1
    known = "".join(character for character in text if character.isascii())
    assert round_trip(tokenizer, text).strip() == known.strip()


def test_characters_of_the_training_texts_are_known():
    text = "The café costs £20–25."
    assert round_trip(train_tokenizer([text]), text) == text


def test_words_in_brackets_share_their_pieces_with_running_text():
    tokenizer = train_tokenizer(TEXTS)
    assert tokenizer.tokenize("name[The Mill],") == ["▁name", "[", "▁The", "▁Mill", "]", ","]
    assert tokenizer.tokenize("The Mill") == ["▁The", "▁Mill"]


def test_demo_sequences_are_short(tokenizer):
    # The longest reference has 39 words; nearly every word and stop is one piece.
    assert max(len(tokenizer(ref).input_ids) for row in demo_dataset("train") for ref in row["references"]) <= 48
    assert 500 <= len(tokenizer) <= 800


def test_vocab_size_is_an_upper_bound(demo_texts):
    assert len(train_tokenizer(demo_texts, vocab_size=200)) == 200


def test_same_texts_give_the_same_tokenizer(demo_texts, tokenizer):
    assert train_tokenizer(iter(demo_texts)).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@pytest.mark.slow
def test_same_texts_give_the_same_tokenizer_in_another_process(tokenizer):
    """Other hash seeds and another number of threads: what made the Unigram trainer differ between runs."""
    code = (
        "import hashlib\n"
        "from rlkd_trl.data import demo_dataset, train_tokenizer\n"
        "texts = [t for row in demo_dataset('train') for t in [row['source'], *row['references']]]\n"
        "print(train_tokenizer(texts).backend_tokenizer.to_str())"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.rstrip("\n") == tokenizer.backend_tokenizer.to_str()


def test_save_and_load(tokenizer, demo_texts, tmp_path):
    """With a T5 config beside it as well, where AutoTokenizer might prefer T5's own class."""
    tokenizer.save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    T5Config(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    beside_model = AutoTokenizer.from_pretrained(tmp_path)
    for loaded in (plain, beside_model):
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert (loaded.padding_side, loaded.model_max_length) == ("right", 512)
        assert loaded.all_special_ids == tokenizer.all_special_ids
        assert set(loaded("x")) == {"input_ids", "attention_mask"}
        for text in [*demo_texts[:40], "a , b [ c ]", "<extra_id_3> x"]:
            assert loaded(text).input_ids == tokenizer(text).input_ids
            assert round_trip(loaded, text) == round_trip(tokenizer, text)


@pytest.mark.parametrize("texts", [[], ["", "  \n"], iter(())])
def test_no_text_is_an_input_error(texts):
    with pytest.raises(InputError, match="no non-blank text"):
        train_tokenizer(texts)


def test_one_string_is_an_input_error():
    with pytest.raises(InputError, match="got one string"):
        train_tokenizer("The Mill")


def test_too_small_a_vocabulary_is_an_input_error():
    with pytest.raises(InputError, match=r"vocab_size 50 with num_sentinels 8 is not possible.*at least 107"):
        train_tokenizer(TEXTS, vocab_size=50)  # 3 special tokens + 94 visible ASCII + tab and newline + 8 sentinels
