"""Losses of classes and of regression against float64 loops, and against each other."""

import math

import pytest
import torch

from rlkd_trl.ops.classification import IGNORED, hard_cross_entropy, logits_kl, squared_error
from tests.ops.ragged_batches import DTYPES, SEEDS, assert_matches, normal

N, C = 5, 4


def slow_distribution(logits, temperature):
    exponentials = [math.exp(z / temperature) for z in logits]
    return [e / sum(exponentials) for e in exponentials]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_soft_targets(seed, dtype, temperature):
    """T² Σ p (log p − log q), which is the soft cross-entropy less the teacher's entropy."""
    student, teacher = (normal(N, C, seed=seed + i, dtype=dtype, scale=2.0) for i in (0, 10))
    expected = []
    for z_student, z_teacher in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = (slow_distribution(z, temperature) for z in (z_teacher, z_student))
        cross_entropy = -sum(a * math.log(b) for a, b in zip(p, q, strict=True))
        entropy = -sum(a * math.log(a) for a in p)
        expected.append(temperature**2 * (cross_entropy - entropy))
    assert_matches(logits_kl(student, teacher, temperature=temperature), expected, dtype)


def test_its_gradient_is_that_of_the_soft_cross_entropy():
    """TinyBERT's CE(z^T / t, z^S / t): T (q − p) with the factor T² (Hinton et al. 2015, eq. 2)."""
    teacher = normal(N, C, seed=1, dtype=torch.float64)
    student = normal(N, C, seed=2, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(logits_kl(student, teacher, temperature=3.0).sum(), student)
    by_hand = 3.0 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1))
    torch.testing.assert_close(gradient, by_hand.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_nothing_to_learn_from_a_teacher_of_the_same_mind(temperature):
    teacher = normal(N, C, seed=1, dtype=torch.float64)
    student = (teacher + 3.0).requires_grad_()  # a softmax leaves the level open
    value = logits_kl(student, teacher, temperature=temperature)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert float(value.detach().abs().max()) < 1e-12 and float(gradient.abs().max()) < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_hard_labels(dtype):
    logits = normal(N, C, seed=0, dtype=dtype)
    labels = torch.tensor([0, 3, IGNORED, 1, IGNORED])
    expected = [
        0.0 if y == IGNORED else -math.log(slow_distribution(z, 1.0)[y])
        for z, y in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    assert_matches(hard_cross_entropy(logits, labels), expected, dtype)


def test_a_row_without_a_label_gets_no_gradient():
    logits = torch.full((2, C), math.nan, dtype=torch.float64)
    logits[0] = 0.0
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(hard_cross_entropy(logits, torch.tensor([1, IGNORED])).sum(), logits)
    assert not gradient[1].any() and gradient[0].isfinite().all()


def test_squared_errors():
    assert squared_error(torch.tensor([1.0, -1.0]), torch.tensor([3.0, -1.0], dtype=torch.float64)).tolist() == [
        4.0,
        0.0,
    ]
    assert squared_error(torch.tensor([0.5]).bfloat16(), torch.tensor([0.25])).dtype == torch.float32
