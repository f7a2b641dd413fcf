"""From prompts to ids: what is too long loses the end of its documents, counted by the tokenizer itself."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from rlkd_trl import PromptTemplates, TeacherForcingReward
from rlkd_trl.data import demo_dataset, train_tokenizer
from rlkd_trl.errors import InputError
from rlkd_trl.models.prompts import check_can_fit, prompt_lengths, prompt_token_ids, shorten
from rlkd_trl.prompts import PromptTemplate
from rlkd_trl.teachers import Teacher
from tests.models.reference import own_logits
from tests.rewards.reference import teacher_forcing
from tests.tiny_models import MODELS, word_tokenizer


def words(first: int, last: int) -> str:
    return " ".join(f"w{i}" for i in range(first, last + 1))


def ids(text: str) -> list[int]:
    """w3 is token 3, and so on; every text ends with EOS, 1."""
    return [*(int(number) for number in re.findall(r"w(\d+)", text)), 1]


def render(jinja: str, **row: object) -> str:
    return PromptTemplate("t", jinja).render(row)


def test_a_templates_words_survive_and_a_bare_text_is_cut():
    prompts = [render("w3 {{ s }} w4 w5", s=words(6, 26)), words(6, 26), render("w3 {{ s }} w4 w5", s="w6 w7")]
    found = prompt_token_ids(word_tokenizer(), prompts, max_length=8)
    assert found == [ids("w3 w6 w7 w8 w9 w4 w5"), ids(words(6, 12)), ids("w3 w6 w7 w4 w5")]


def test_what_fits_is_tokenised_once_and_never_rendered_again():
    tokenizer, calls = word_tokenizer(), []
    prompts = [render("w3 {{ s }} w4", s=words(5, 5 + n)) for n in range(5)]
    for prompt in prompts:
        prompt._render = lambda shorter: pytest.fail("rendered again")

    class Counting:
        bos_token_id = None

        def __call__(self, texts, **kwargs):
            calls.append(len(texts))
            return tokenizer(texts, **kwargs)

    assert prompt_token_ids(Counting(), prompts, max_length=8)[4] == ids("w3 w5 w6 w7 w8 w9 w4")
    assert calls == [5]


def test_without_a_limit_nothing_is_cut():
    prompt = render("w3 {{ s }}", s=words(4, 26))
    assert prompt_token_ids(word_tokenizer(), [prompt]) == [ids(words(3, 26))]


def test_words_alone_that_are_too_many_name_the_row():
    prompt = render("w3 w4 w5 {{ s }} w6", s="w7 " + words(3, 26))
    for refused in (prompt_token_ids, lambda tokenizer, prompts, max_length: shorten(tokenizer, *prompts, max_length)):
        with pytest.raises(InputError, match=r"cannot be cut to 5: .* still has 6 tokens.* row begins: 'w7 w3"):
            refused(word_tokenizer(), [prompt], max_length=5)
    with pytest.raises(InputError, match="cannot be cut to 5"):
        check_can_fit(word_tokenizer(), prompt, 5)
    check_can_fit(word_tokenizer(), prompt, 6)


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's, without merges: every byte is a token, and a character that takes several is never torn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="a")


def bpe() -> PreTrainedTokenizerFast:
    return train_tokenizer(demo_dataset("train")["source"], vocab_size=200)


@pytest.mark.parametrize("tokenizer", [byte_level(), ByT5Tokenizer()], ids=["fast", "slow"])
def test_no_character_is_torn(tokenizer):
    special = len(tokenizer("")["input_ids"])
    for room in (1, 2, 3, 4, 5, 8):
        prompt = render("A{{ s }}Z", s="éé€é" * 10)
        if room == 1:
            with pytest.raises(InputError, match="cannot be cut"):
                shorten(tokenizer, prompt, 2 + special + room)
            continue
        cut = shorten(tokenizer, prompt, 2 + special + room)
        # é has two bytes, € three
        assert cut == {2: "AéZ", 3: "AéZ", 4: "AééZ", 5: "AééZ", 8: "Aéé€Z"}[room]


TEXTS = st.text(st.sampled_from("ab cde . éß€\n漢"), max_size=80)


@pytest.mark.parametrize("tokenizer", [bpe(), byte_level(), ByT5Tokenizer()], ids=["bpe", "bytes", "slow"])
def test_any_text_is_cut_to_the_limit_and_no_further_than_needed(tokenizer):
    @settings(max_examples=60, deadline=None)
    @given(TEXTS, TEXTS, st.integers(1, 90))
    def check(a, b, limit):
        prompt = render("Head {{ a }}-{{ b }} tail", a=a, b=b)
        [length] = prompt_lengths(tokenizer, [prompt])
        if length <= limit:
            return
        try:
            cut = shorten(tokenizer, prompt, limit)
        except InputError:
            [least] = prompt_lengths(tokenizer, [f"Head {a[:1]}-{b[:1]} tail"])
            assert limit < least + 5
            return
        [kept] = prompt_lengths(tokenizer, [cut])
        assert limit - 5 < kept <= limit  # a character more would be up to 3 bytes, a word piece's neighbours change
        assert cut.startswith("Head ") and cut.endswith(" tail")

    check()


@pytest.mark.parametrize("family", ["t5-untied", "llama"])
def test_a_teacher_reads_the_shortened_prompt(family):
    model, tokenizer = MODELS[family](seed=1), word_tokenizer()
    templates = PromptTemplates([PromptTemplate("t", "w3 {{ source }} w4 w5")])
    sources = [words(6, 6 + n) for n in (1, 3, 5, 8, 12, 15, 20)]
    completions = [[7, 8, 1], [9, 1], [10, 11, 12, 1], [7, 1], [8, 8, 1], [13, 1], [9, 7, 1]]
    capped = TeacherForcingReward(Teacher(model, tokenizer, max_prompt_length=8), templates=templates)
    # By hand: 8 tokens less w3, w4, w5 and EOS leave 4 words of the source.
    asked = [f"w3 {' '.join(source.split()[:4])} w4 w5" for source in sources]
    plain = TeacherForcingReward(Teacher(model, tokenizer))
    pairs = zip(capped.score_tokens(sources, completions), plain.score_tokens(asked, completions), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected)


def test_a_conversation_keeps_the_turn_to_speak():
    """And gets no EOS behind it, which this tokenizer adds to other prompts."""
    tokenizer, plain = word_tokenizer(), word_tokenizer(append_eos=False)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w3' if m.role == 'user' else 'w4' }} {{ m.content }} {% endfor %}w4"
    )
    model = MODELS["llama"](seed=1)
    talk = [{"role": "user", "content": words(6, 26)}, {"role": "assistant", "content": "w7"}]
    talk.append({"role": "user", "content": "w9"})
    capped = TeacherForcingReward(Teacher(model, tokenizer, max_prompt_length=9))
    whole = TeacherForcingReward(Teacher(model, plain))
    # 9 tokens less w3, w4 w7, w3 w9 and w4 leave 3 of the first question
    expected = whole(prompts=["w3 w6 w7 w8 w4 w7 w3 w9 w4"], completion_ids=[[8, 1]])
    assert capped(prompts=[talk], completion_ids=[[8, 1]]) == pytest.approx(expected)
    assert whole(prompts=["w3 w6 w7 w8 w4 w7 w3 w9"], completion_ids=[[8, 1]]) != pytest.approx(expected, abs=1e-4)


# ---- BOS


def with_bos(*, added: bool) -> PreTrainedTokenizerFast:
    """As Llama's: w3 stands for the BOS, which the tokenizer puts before each text if it is `added`, and no EOS."""
    tokenizer = word_tokenizer(append_eos=False)
    tokenizer.bos_token = "w3"
    if added:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="w3 $A", special_tokens=[("w3", 3)])
    return tokenizer


@pytest.mark.parametrize(
    ("added", "text", "expected"),
    [
        (True, "w5 w6", [3, 5, 6]),  # its only one
        (True, "w3 w5 w6", [3, 5, 6]),  # written by a chat template too
        (True, "w3 w3 w5", [3, 3, 5]),  # no more than one is taken away
        (False, "w5 w6", [5, 6]),
        (False, "w3 w5", [3, 5]),
        (True, "", [3]),
    ],
)
@pytest.mark.parametrize("max_length", [None, 4])
def test_every_prompt_keeps_one_bos(added, text, expected, max_length):
    assert prompt_token_ids(with_bos(added=added), [text, "w9"], max_length=max_length)[0] == expected


@pytest.mark.parametrize("max_length", [1, 2, 4, 5, 6, 7])
def test_a_second_bos_takes_no_room_from_the_cap(max_length):
    """The tokenizer's and a chat template's; whole, they would be one token more than is read."""
    tokenizer = with_bos(added=True)
    found = prompt_token_ids(tokenizer, ["w3 w5 w6 w7 w8 w9", "w5 w6 w7 w8 w9 w10"], max_length=max_length)
    assert found == [[3, 5, 6, 7, 8, 9][:max_length], [3, 5, 6, 7, 8, 9, 10][:max_length]]
    if max_length > 3:
        room = words(5, max_length + 2)  # less the BOS and w4
        asked = [render("w3 {{ s }} w4", s=words(5, 26))]
        assert prompt_token_ids(tokenizer, asked, max_length=max_length) == [[3, *ids(room)[:-1], 4]]


def test_teacher_and_student_read_the_bos():
    """The reward of a Llama whose tokenizer adds a BOS is that of its plain forward pass over prompts that have it."""
    model, completion = MODELS["llama"](seed=5), [8, 4, 1]
    found = TeacherForcingReward(model, with_bos(added=True)).score_tokens(["w5 w6", "w7"], [completion, completion])
    for prompt, rewards_T in zip(([3, 5, 6], [3, 7]), found, strict=True):
        z_TV = own_logits(model, prompt, completion).double().tolist()
        assert rewards_T.tolist() == pytest.approx(teacher_forcing(z_TV, completion, ended=True), rel=1e-4)
