"""Metrics of encoders, by hand."""

import math

import pytest
import torch
from torch import tensor

from rlkd_trl.evaluation.encoders import Seen, accuracy, f1, pair_similarities, pearson, spearman
from rlkd_trl.ops.classification import IGNORED


def test_accuracy():
    assert accuracy([0, 1, 1, 2], [0, 1, 2, 2]) == 75


def test_f1_is_the_mean_over_classes_also_those_that_are_only_predicted():
    # 0: one hit, one false, one missed: 2 / 4. 1: two hits, one missed: 4 / 5. 2: never right: 0. (0.5 + 0.8 + 0) / 3
    assert f1([0, 0, 1, 1, 2], [0, 1, 1, 1, 0]) == pytest.approx(100 * 1.3 / 3)


def test_pearson():
    # deviations −1.5, −0.5, 0.5, 1.5 and −0.5, −1.5, 1.5, 0.5: products 4 · 0.75 = 3, squares 5 and 5
    assert pearson(tensor([1.0, 2, 3, 4]), tensor([2, 1, 4, 3])) == pytest.approx(0.6)
    assert pearson(tensor([1.0, 2, 3, 4]), tensor([-1.0, -2, -3, -4]) * 7 + 5) == pytest.approx(-1)
    assert math.isnan(pearson(tensor([1.0, 2]), tensor([3.0, 3]))), "one list is constant"


def test_spearman_gives_ties_their_mean_rank():
    # ranks 0, 1.5, 1.5, 3 and 0, 2, 1, 3: deviations −1.5, 0, 0, 1.5 and −1.5, 0.5, −0.5, 1.5: 4.5 / √(4.5 · 5)
    found = spearman(tensor([10.0, 20, 20, 1e6]), tensor([1.0, 3, 2, 4]))
    assert found == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_similarities_of_pairs():
    # (0, 1) at right angles; 45° between the third and both
    found = pair_similarities(tensor([[1.0, 0], [0, 2], [3, 3]]))
    assert found.tolist() == pytest.approx([0, 0.5**0.5, 0.5**0.5])


def test_outputs_of_classes():
    seen = Seen()
    seen.add_outputs(tensor([[2.0, 1], [0, 1]]), tensor([[0.0, 1], [0, 1]]), tensor([0, 0]))
    seen.add_outputs(tensor([[3.0, 1]]), tensor([[1.0, 0]]), tensor([IGNORED]))
    # predicted 0, 1, 0; the teacher's 1, 1, 0; labels 0, 0. F1 of 0: 2/3, of 1: 0
    assert seen.metrics(is_regression=False) == pytest.approx({"accuracy": 50, "f1": 100 / 3, "agreement": 200 / 3})


@pytest.mark.parametrize(
    ("predicted", "teachers", "labels", "only"),
    [
        ([1, 1, 1], [0, 1, 1], None, 1),
        ([1, 1, 1], [1, 1, 1], None, None),  # as the teacher
        ([0, 1, 1], [0, 1, 1], None, None),
        ([1, 1, 1], None, [1, 0, 1], 1),
        ([1, 1, 1], [0, 1, 1], [1, 1, IGNORED], None),  # it is right
        ([1, 1, 1], [0, 1, 1], [IGNORED] * 3, 1),
        ([1, 1, 1], None, None, None),
    ],
)
def test_one_class_for_all_texts(predicted, teachers, labels, only):
    seen = Seen()
    for cut in (slice(0, 1), slice(1, 3)):
        logits, of_teacher = (None if of is None else torch.eye(2)[of[cut]] for of in (predicted, teachers))
        seen.add_outputs(logits, of_teacher, None if labels is None else tensor(labels[cut]))
    assert seen.only_class() == only
    seen.add_losses([tensor([math.nan, 0, 0])])
    assert seen.only_class() is None, "a class of what is not finite says nothing"


def test_outputs_of_regression():
    seen = Seen()
    seen.add_outputs(tensor([[1.0], [2], [3], [4]]), tensor([[1.0], [2], [3], [4]]), tensor([2.0, 1, 4, 3]))
    found = seen.metrics(is_regression=True)
    assert found == pytest.approx({"pearson": 0.6, "spearman": 0.6, "agreement": 1})
    seen = Seen()
    seen.add_outputs(tensor([[3.0], [3.0]]), None, tensor([1.0, 2]))
    assert seen.only_class() is None


def test_states_behind_a_text_are_not_read():
    """Means of real tokens; the similarities of three texts have the same order in both models."""
    garbage = math.nan
    student = tensor([[[1.0, 0], [3, 0]], [[0, 2], [garbage, garbage]], [[1, 1], [garbage, garbage]]])
    teacher = tensor([[[1.0, 0], [0, 1]], [[0, 1], [garbage, garbage]], [[2, 2], [garbage, garbage]]])
    mask = tensor([[True, True], [True, False], [True, False]])
    seen = Seen()
    seen.add_states(student, teacher, mask)
    # student: means (2, 0), (0, 2), (1, 1): cosines 0, 0.71, 0.71, ranks 0, 1.5, 1.5
    # teacher: (0.5, 0.5), (0, 1), (2, 2): cosines 0.71, 1, 0.71, ranks 0.5, 2, 0.5. Products of deviations from 1:
    # −1 · −0.5 + 0.5 · 1 + 0.5 · −0.5 = 0.75, squares 1.5 and 1.5. Cosines of tokens 1, 0, 1, 1.
    assert seen.likeness() == pytest.approx({"similarity_spearman": 0.5, "hidden_cosine": 0.75}, abs=1e-6)
    assert all(usable.all() for usable in seen.is_usable.values())


def test_what_is_not_finite_is_known_text_by_text():
    seen = Seen()
    seen.add_losses([tensor([1.0, math.inf]), tensor([0.0, 0])])
    seen.add_losses([tensor([1.0]), tensor([math.nan])])
    seen.add_outputs(tensor([[1.0, 2], [0, 1]]), tensor([[1.0, -math.inf], [0, 1]]), None)
    found = {name: usable.tolist() for name, usable in seen.is_usable.items()}
    assert found == {
        "the losses": [True, False, False],
        "the logits": [True, True],
        "the teacher's logits": [False, True],
    }


def test_texts_of_one_width_only_have_a_cosine():
    seen = Seen()
    seen.add_states(torch.ones(2, 1, 3), torch.ones(2, 1, 4), torch.ones(2, 1, dtype=torch.bool))
    assert "hidden_cosine" not in seen.likeness()
