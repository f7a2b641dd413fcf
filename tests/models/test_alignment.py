"""A teacher reads what a student of any other tokenizer has written, and every sequence reward stays what it is."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlkd_trl.errors import InputError
from rlkd_trl.models.alignment import TokenAligner
from rlkd_trl.models.vocabulary import forbidden_ids
from rlkd_trl.ops.alignment import INSIDE
from tests.models.tokenizers_of_all_kinds import ALPHABET, KINDS, TEXTS, tokenizer_of

PAIRS = [(student, teacher) for student in KINDS for teacher in KINDS if student != teacher]
EXAMPLES = 30
PIECES = [*ALPHABET, " ", "  ", "\n", "\u0301", "\u200d", "🏳️‍🌈", "한", "ß", "</s>", "cheap", " shop"]
# Of the corpus, of other scripts, emoji with joiners, combining marks, spaces in odd places.
TEXT = st.one_of(
    st.sampled_from(TEXTS),
    st.lists(st.sampled_from(PIECES), max_size=24).map("".join),
    st.text(max_size=12),
)


def aligner(student: str, teacher: str, **kwargs) -> TokenAligner:
    tokenizer = tokenizer_of(teacher)
    forbidden_V = forbidden_ids(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    return TokenAligner(
        tokenizer_of(student), tokenizer, forbidden_V=forbidden_V, eos_ids=[tokenizer.eos_token_id], **kwargs
    )


def completion(kind: str, text: str, ended: bool, seed: int) -> list[int]:
    """Ids that a student may sample: those of the text, some of them exchanged, so that they are none of encode's."""
    tokenizer, generator = tokenizer_of(kind), random.Random(seed)
    ids = [i for i in tokenizer(text, add_special_tokens=False)["input_ids"] if i > 2]
    if seed % 2:
        ids = [generator.randrange(3, len(tokenizer)) if generator.random() < 0.3 else i for i in ids]
    return [*ids, tokenizer.eos_token_id] if ended or not ids else ids


def aligned(align: TokenAligner, ids: list[int], *, width: int = 0):
    T = max(width, len(ids))
    ids_BT = torch.tensor([ids + [0] * (T - len(ids))])
    mask_BT = torch.arange(T)[None, :] < len(ids)
    return align.align(ids_BT, mask_BT, torch.tensor([ids[-1] == 1]))


@pytest.mark.slow(0.1)
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
@settings(max_examples=EXAMPLES)
@given(text=TEXT, ended=st.booleans(), seed=st.integers(0, 99))
def test_sequence_rewards_are_conserved_exactly(student, teacher, text, ended, seed):
    ids = completion(student, text, ended, seed)
    result = aligned(aligner(student, teacher), ids, width=len(ids) + 2)
    # Multiples of 1/8, whose sums float32 holds exactly.
    rewards_BU = torch.randint(-64, 64, result.ids_BU.shape, generator=torch.Generator().manual_seed(seed)) / 8
    on_student_BT = result.on_students_tokens(rewards_BU)
    if not result.readable_B:
        assert on_student_BT.isnan().all() and not result.mask_BU.any()
        return
    assert on_student_BT.sum() == rewards_BU[result.mask_BU].sum()
    assert (on_student_BT[0, len(ids) :] == 0).all()
    receivers = result.receiver_BU[result.mask_BU].tolist()
    assert receivers == sorted(receivers)
    # A state within or before the completion has a teacher's state, the first one its first, the last one its last.
    states = result.state_BT1[0].tolist()
    assert states == sorted(states) and states[0] == 0 and states[len(ids)] == int(result.mask_BU.sum())


@pytest.mark.parametrize("student", [kind for kind in KINDS if kind != "byte_level"])
@settings(max_examples=EXAMPLES)
@given(text=TEXT, seed=st.integers(0, 99))
def test_spans_hold_the_same_text_on_both_sides(student, text, seed):
    """By decoding every beginning of both sides: a byte-level teacher gives back every text."""
    align = aligner(student, "byte_level")
    ids = completion(student, text, ended=False, seed=seed)
    if ids[-1] == 1:  # no token of the text
        return
    result = aligned(align, ids)
    whole, teacher_ids = align.student.decode(ids), result.ids_BU[result.mask_BU].tolist()
    unfinished = len(whole) - len(whole.rstrip("\ufffd"))
    whole = whole[: len(whole) - unfinished] if unfinished <= 3 else whole
    if not result.readable_B or not teacher_ids:
        return
    assert align.teacher.decode(teacher_ids) == whole

    def common(tokenizer, tokens):
        texts = [tokenizer.decode(tokens[:n]) for n in range(1, len(tokens) + 1)]
        return {beginning: n for n, beginning in enumerate(texts, 1) if whole.startswith(beginning)}

    of_student, of_teacher = common(align.student, ids), common(align.teacher, teacher_ids)
    expected, i, j = [], 0, 0
    for beginning, n in of_student.items():
        if n > i and of_teacher.get(beginning, 0) > j:
            i, j = n, of_teacher[beginning]
            expected.append((i, j))
    last_of_spans = sorted(set(result.last_BT[result.is_read_BT].tolist()))
    assert [(n + 1, int((result.receiver_BU[result.mask_BU] <= n).sum())) for n in last_of_spans] == expected


def test_a_text_is_unreadable_where_the_teacher_has_no_token_or_a_special_one():
    for text, readable in [("a cheap shop", True), ("a cheap ☃", False), ("a </s> shop", False)]:
        ids = tokenizer_of("byte_level")(text, split_special_tokens=True)["input_ids"]
        assert aligned(aligner("byte_level", "bpe"), [*ids, 1]).readable_B.item() is readable
    # What is taught of case and accents is nothing, but the text is read.
    ids = tokenizer_of("byte_level")("A CHEAP Café")["input_ids"]
    result = aligned(aligner("byte_level", "word_piece"), [*ids, 1])
    assert result.readable_B.item()
    assert tokenizer_of("word_piece").decode(result.ids_BU[0][:-1]) == "a cheap cafe"


def test_a_text_beyond_the_teachers_positions_is_unreadable():
    ids = tokenizer_of("bpe")("a cheap shop")["input_ids"]
    length = len(tokenizer_of("byte_level")("a cheap shop")["input_ids"]) + 1
    for max_length, readable in [(length, True), (length - 1, False)]:
        assert aligned(aligner("bpe", "byte_level", max_length=max_length), [*ids, 1]).readable_B.item() is readable


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast, eos_token_id, name_or_path = False, 1, ""

    with pytest.raises(InputError, match=r"\(Slow\) cannot say"):
        TokenAligner(tokenizer_of("bpe"), Slow(), forbidden_V=torch.zeros(3, dtype=torch.bool), eos_ids=[1])


def test_a_token_over_the_border_of_two_characters_is_no_end_of_either():
    # "éa": é is the bytes C3 A9; a tokenizer that has merged A9 with "a" reads C3 | A9 61.
    tokenizer = Tokenizer(models.BPE(vocab={"</s>": 1, "Ã": 3, "©": 4, "a": 5, "©a": 6}, merges=[("©", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    teacher = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    align = TokenAligner(teacher, teacher, forbidden_V=torch.zeros(9, dtype=torch.bool), eos_ids=[])
    assert align.read_by_teacher("éa") == ([3, 6], [INSIDE, 2])
    assert align.read_by_student([3, 6], ended=False) == ("éa", [INSIDE, 2])
    assert align.read_by_student([3, 4, 5], ended=False) == ("éa", [INSIDE, 1, 2])


@pytest.mark.parametrize("teacher", ["bpe", "unigram", "word_piece"])
def test_a_character_that_the_length_cap_has_cut_is_not_read(teacher):
    # "a| shop| |E6|9D|B1", the last three being 東; each other text has all its tokens read.
    whole = tokenizer_of("byte_level")("a shop 東", add_special_tokens=False)["input_ids"]
    assert len(whole) == 6
    align = aligner("byte_level", teacher)
    before, cut = aligned(align, whole[:3], width=6), aligned(align, whole[:5], width=6)
    assert cut.readable_B.item() and cut.ids_BU.tolist() == before.ids_BU.tolist()
    assert cut.is_read_BT[0].tolist() == [True, True, True, False, False, False]
    rewards_BU = torch.ones_like(cut.ids_BU, dtype=torch.float)
    assert (cut.on_students_tokens(rewards_BU)[0, 3:] == 0).all()
    assert cut.state_BT1[0, 3:].tolist() == [int(cut.mask_BU.sum())] * 4
    assert aligned(align, whole).is_read_BT.all()
    nothing = aligned(align, whole[3:5])
    assert nothing.readable_B.item() and not nothing.is_read_BT.any() and not nothing.mask_BU.any()
    # EOS after it, or more such bytes than a character has, is what the student wrote instead of text.
    assert "\ufffd" in align.read_by_student(whole[:5], ended=True)[0]
    assert align.read_by_student([*whole[:3], *whole[4:5] * 4], ended=False)[0].count("\ufffd") == 4


@pytest.mark.parametrize(
    ("teacher", "text", "pieces", "receivers"),
    [
        # The student has naÃ|¯|ve|Ġ|Ã|¼|ber; the first and the fifth end within a character.
        ("bpe", "naïve über", ["▁", "naï", "v", "e", "▁", "ü", "ber"], [1, 1, 2, 2, 3, 5, 6]),
        # The student has a|Ġ|ï|¬|ģ|ne. NFKC makes two letters of the ligature, and "▁f" ends within it.
        ("unigram", "a ﬁne", ["▁", "a", "▁f", "in", "e"], [0, 0, 5, 5, 5]),
        # The student has The|Ġc|af|Ã|©|Ġ. Spaces are of no piece: of the next one's span, or the last one's.
        ("word_piece", "The café ", ["the", "cafe"], [0, 5]),
    ],
)
def test_worked_spans_of_teachers_that_change_the_text(teacher, text, pieces, receivers):
    ids = tokenizer_of("byte_level")(text, add_special_tokens=False)["input_ids"]
    result = aligned(aligner("byte_level", teacher), ids)
    assert tokenizer_of(teacher).convert_ids_to_tokens(result.ids_BU[0]) == pieces
    assert result.receiver_BU[0].tolist() == receivers
