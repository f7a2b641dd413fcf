"""Sequence-level rewards, worked by hand, in TRL's calling convention."""

import pytest

from rlkd_trl.errors import InputError
from rlkd_trl.rewards import sequence_rewards

# What TRL 1.16 passes beside the columns.
TRL_EXTRAS = {"trainer_state": object(), "log_extra": print, "log_metric": print}


def call(function, completions=None, completion_ids=None, **columns):
    rows = completions if completions is not None else completion_ids
    return function(
        prompts=["p"] * len(rows), completions=completions, completion_ids=completion_ids, **columns, **TRL_EXTRAS
    )


def test_length_counts_tokens():
    assert call(sequence_rewards.length, completion_ids=[[5, 6, 1], [7], []]) == [3.0, 1.0, 0.0]


def test_missing_eos():
    lengths = [[5, 1], [5, 6]]
    assert call(sequence_rewards.missing_eos, completion_ids=lengths, ended=[True, False]) == [0.0, 1.0]


def test_missing_eos_in_trl():
    """TRL passes no `ended`, nor anything to tell it from."""
    with pytest.raises(InputError, match="mask_truncated_completions"):
        call(sequence_rewards.missing_eos, completion_ids=[[5, 1], [5, 6]])


def test_repetition():
    # 3-grams of abcabc: abc bca cab abc, of which one is a repeat: 1/4. Of aaaaa: aaa aaa aaa, two repeats: 2/3.
    ids = [[3, 4, 5, 3, 4, 5], [9, 9, 9, 9, 9], [3, 4, 5, 6], [3, 4], []]
    assert call(sequence_rewards.repetition, completion_ids=ids) == pytest.approx([1 / 4, 2 / 3, 0, 0, 0])
    # 2-grams of ababa: ab ba ab ba, two repeats: 1/2.
    assert call(sequence_rewards.repetition, completion_ids=[[3, 4, 3, 4, 3]], n=2) == [0.5]


def test_reference_bleu_is_per_completion():
    completions = ["the cat sat on the mat", "the cat sat on the mat", "dogs"]
    references = [["the cat sat on the mat"], ["it rains", "the cat sat on the mat"], ["the cat sat on the mat"]]
    assert call(sequence_rewards.reference_bleu, completions, references=references) == pytest.approx([100, 100, 0])


def test_reference_rouge_is_the_f1_of_the_longest_common_subsequence():
    # "a b c d" and "a c d e" share "a c d": precision 3/4, recall 3/4. "a b" and "a b c d": 2/2 and 2/4, F1 2/3.
    scores = call(sequence_rewards.reference_rouge, ["a b c d", "a b"], references=[["a c d e"], ["a b c d", "z"]])
    assert scores == pytest.approx([75, 200 / 3])


@pytest.mark.parametrize("name", ["reference_bleu", "reference_rouge"])
@pytest.mark.parametrize("columns", [{}, {"references": [["a"], []]}], ids=["no column", "an empty row"])
def test_references_are_required(name, columns):
    with pytest.raises(InputError, match=name):
        call(getattr(sequence_rewards, name), ["a b c d", "e"], **columns)


@pytest.mark.parametrize("name", ["reference_bleu", "reference_rouge"])
def test_one_reference_may_be_a_plain_text(name):
    completions, texts = ["a b c d e", "x"], ["a b c d e", "a b c d e"]
    scores = call(getattr(sequence_rewards, name), completions, references=texts)
    assert scores == pytest.approx([100.0, 0.0])
