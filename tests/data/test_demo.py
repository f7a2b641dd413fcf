"""The embedded demo task: fixed content, disjoint splits, references that say what their source says."""

import hashlib
import json
import re

import pytest

from rlkd_trl.data import demo_dataset
from rlkd_trl.data.demo import DOG_CLAUSES, WORDS
from rlkd_trl.errors import InputError

SPLITS = {"train": 2000, "validation": 60, "test": 100}
PINNED = {"train": "52b40a5755ba42db", "validation": "1fa0d0406751d562", "test": "5474190ee01cefec"}


def digest(split, seed=0):
    return hashlib.sha256(json.dumps(demo_dataset(split, seed).to_list()).encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def splits():
    return {split: demo_dataset(split).to_list() for split in SPLITS}


def attributes_of(source):
    return dict(re.findall(r"(\w+)\[(.*?)\]", source))


def occurrences(phrases, text):
    """How often any of the phrases stands in the text as whole words; of two that overlap, the longer one counts."""
    longest_first = sorted(phrases, key=len, reverse=True)
    return re.findall(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b", text, flags=re.IGNORECASE)


def test_columns_and_sizes(splits):
    for split, size in SPLITS.items():
        assert len(splits[split]) == size
        for row in splits[split]:
            assert list(row) == ["source", "target", "references"]
            assert row["target"] == row["references"][0]
            assert 3 <= len(row["references"]) <= 4
            assert len(set(row["references"])) == len(row["references"])


def test_the_data_is_the_same_everywhere():
    # The first rows were read by eye when these were pinned; a change of grammar changes them, a new Python must not.
    assert {split: digest(split) for split in SPLITS} == PINNED


def test_one_row_as_read_by_eye(splits):
    assert splits["train"][1] == {
        "source": "name[Amber Meadow], type[forest], difficulty[moderate], season[autumn], start[Harbour Inn]",
        "target": "Amber Meadow is a forest walk. The climb is medium, while the ideal season is autumn. This route "
        "begins near Harbour Inn.",
        "references": [
            "Amber Meadow is a forest walk. The climb is medium, while the ideal season is autumn. This route begins "
            "near Harbour Inn.",
            "Amber Meadow is known as a forest walk. The trail is medium to walk and should be walked in autumn. The "
            "trail can be reached from Harbour Inn.",
            "Amber Meadow is a moderate forest walk. It should be walked in autumn. You set off from Harbour Inn.",
        ],
    }


def test_seed_changes_the_data_but_not_across_calls():
    assert digest("test", 3) == digest("test", 3) != digest("test", 4)


def test_splits_share_no_source_not_even_across_seeds(splits):
    for rows in splits.values():
        assert len({row["source"] for row in rows}) == len(rows)
    train = {row["source"] for row in splits["train"]}
    for seed in (0, 1, 2):
        assert not train & set(demo_dataset("test", seed)["source"])
        assert not train & set(demo_dataset("validation", seed)["source"])


def test_sources_have_three_to_five_attributes_in_a_fixed_order(splits):
    order = ["name", *WORDS]
    for row in splits["train"]:
        attributes = list(attributes_of(row["source"]))
        assert 3 <= len(attributes) <= 5
        assert attributes == [attribute for attribute in order if attribute in attributes]
        assert attributes[0] == "name"
    assert {len(attributes_of(row["source"])) for row in splits["train"]} == {3, 4, 5}


def test_each_reference_states_each_attribute_once_and_no_other(splits):
    phrases = {attribute: dict(words) for attribute, words in WORDS.items()}
    phrases["dogs"] = {value: WORDS["dogs"][value] + DOG_CLAUSES[value] for value in WORDS["dogs"]}
    for row in splits["train"] + splits["validation"] + splits["test"]:
        said = attributes_of(row["source"])
        for reference in row["references"]:
            assert reference.count(said["name"]) == 1, reference
            for attribute, words in phrases.items():
                found = occurrences([phrase for options in words.values() for phrase in options], reference)
                if attribute not in said:
                    assert not found, (attribute, reference)
                else:
                    assert len(found) == 1 and found[0].lower() in map(str.lower, words[said[attribute]]), reference


def test_vocabulary_and_lengths_are_those_of_a_small_task(splits):
    references = [reference for row in splits["train"] for reference in row["references"]]
    words = {word.lower() for reference in references for word in re.findall(r"\w+", reference)}
    lengths = [len(reference.split()) for reference in references]
    assert 150 <= len(words) <= 400
    assert 15 <= sum(lengths) / len(lengths) <= 25
    assert max(lengths) <= 45
    assert all(re.fullmatch(r"[A-Z][\w ,.]*\.", reference) for reference in references)


def test_unknown_split_lists_the_splits():
    with pytest.raises(InputError, match=r"no split 'dev'; its splits are: train, validation, test"):
        demo_dataset("dev")
