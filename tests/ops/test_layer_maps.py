"""Layer maps are the papers', and lead nowhere else than to layers that there are."""

import pytest

from rlkd_trl.ops.layer_maps import layer_pairs

# Student's layers, teacher's layers, and what the papers print for them.
PAPERS = [
    ("uniform", 4, 12, [3, 6, 9, 12]),  # TinyBERT-4 (section 4.2)
    ("uniform", 6, 12, [2, 4, 6, 8, 10, 12]),  # TinyBERT-6
    ("top", 4, 12, [9, 10, 11, 12]),  # section 4.4, "g(m) = m + N − M"
    ("bottom", 4, 12, [1, 2, 3, 4]),
    ("skip", 6, 12, [2, 4, 6, 8, 10]),  # PKD, section 3.2, BERT6
    ("last", 6, 12, [7, 8, 9, 10, 11]),
]


@pytest.mark.parametrize(("name", "M", "L", "teachers"), PAPERS)
def test_the_papers_maps(name, M, L, teachers):
    assert layer_pairs(name, M, L) == list(enumerate(teachers, start=1))


def test_single_layers():
    assert layer_pairs("single", 6, 12) == [(6, 12)]  # MiniLM
    assert layer_pairs("single=21", 6, 24) == [(6, 21)]  # MiniLMv2, of a large teacher


def test_pair_by_pair():
    assert layer_pairs("1:4,3:2", 3, 4) == [(1, 4), (3, 2)]


def test_a_teacher_that_is_no_multiple_deep():
    """⌊m · 5 / 3⌋"""
    assert layer_pairs("uniform", 3, 5) == [(1, 1), (2, 3), (3, 5)]


def test_equal_depths_are_layer_by_layer():
    for name in ("uniform", "top", "bottom"):
        assert layer_pairs(name, 3, 3) == [(1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize(
    ("layer_map", "M", "L", "message"),
    [
        ("middle", 2, 4, "choose one of uniform, top, bottom, skip, last, single, single=9"),
        ("", 2, 4, "choose one of"),
        ("1:2;2:4", 2, 4, "choose one of"),
        ("single=5", 2, 4, "it leads to layer 5 of the teacher, which has layers 1 to 4"),
        ("single=0", 2, 4, "it leads to layer 0 of the teacher, which has layers 1 to 4"),
        ("3:1", 2, 4, "it leads to layer 3 of the student, which has layers 1 to 2"),
        ("1:1,1:2", 2, 4, "the student's layer 1 is there twice"),
        ("skip", 1, 4, "of a student with 1 layers it leaves none"),
        ("last", 1, 4, "of a student with 1 layers it leaves none"),
        ("uniform", 4, 2, "it leads to layer 0 of the teacher"),
        ("top", 4, 2, "it leads to layer -1 of the teacher"),
        ("bottom", 4, 2, "it leads to layer 3 of the teacher"),
    ],
)
def test_maps_that_do_not_fit(layer_map, M, L, message):
    with pytest.raises(ValueError) as error:
        layer_pairs(layer_map, M, L)
    assert str(error.value).startswith(message)
