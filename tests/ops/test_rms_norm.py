"""The root mean square norm against a loop in float64."""

import math

import pytest
import torch

from rlkd_trl.ops.rms_norm import rms_norm
from tests.ops.ragged_batches import normal

EPS = 1e-6


def norm_by_loop(row: list[float], weight: list[float], eps: float) -> list[float]:
    """x / √(mean x² + ε) · w."""
    root = math.sqrt(math.fsum(x * x for x in row) / len(row) + eps)
    return [w * x / root for x, w in zip(row, weight, strict=True)]


def gradient_by_differences(row, weight, upstream, eps, step=1e-6):
    """Central differences of Σ_d g_d y_d, by the inputs and by the weights."""

    def loss(row, weight):
        return math.fsum(g * y for g, y in zip(upstream, norm_by_loop(row, weight, eps), strict=True))

    def moved(values, i, by):
        return [value + by * (i == j) for j, value in enumerate(values)]

    by_row = [(loss(moved(row, i, step), weight) - loss(moved(row, i, -step), weight)) / (2 * step) for i in range(3)]
    by_weight = [
        (loss(row, moved(weight, i, step)) - loss(row, moved(weight, i, -step))) / (2 * step) for i in range(3)
    ]
    return by_row, by_weight


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_forward(scale, with_gradient):
    """At 1e-4, ε = 1e-6 is most of the mean square."""
    x_BTD, weight_D = normal(2, 3, 5, seed=0, scale=scale), normal(5, seed=1)
    expected = [[norm_by_loop(row, weight_D.tolist(), EPS) for row in rows] for rows in x_BTD.tolist()]
    with torch.set_grad_enabled(with_gradient):
        found = rms_norm(x_BTD.requires_grad_(with_gradient), weight_D, EPS)
    torch.testing.assert_close(found.detach().double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("eps", [EPS, 0.5])
def test_gradients(eps):
    """Of 3 numbers a row, weights summed over rows."""
    x_ND, weight_D, upstream_ND = normal(4, 3, seed=0), normal(3, seed=1), normal(4, 3, seed=2)
    found = torch.autograd.grad(
        rms_norm(x_ND.requires_grad_(), weight_D.requires_grad_(), eps), (x_ND, weight_D), upstream_ND
    )
    rows = [
        gradient_by_differences(row, weight_D.tolist(), upstream, eps)
        for row, upstream in zip(x_ND.tolist(), upstream_ND.tolist(), strict=True)
    ]
    by_weight = [math.fsum(row[1][i] for row in rows) for i in range(3)]
    torch.testing.assert_close(found[0], torch.tensor([row[0] for row in rows]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], torch.tensor(by_weight), rtol=1e-4, atol=1e-5)


def test_a_frozen_weight_and_frozen_inputs():
    x_ND, weight_D, upstream_ND = normal(4, 3, seed=0), normal(3, seed=1), normal(4, 3, seed=2)
    both = torch.autograd.grad(
        rms_norm(x_ND.requires_grad_(), weight_D.requires_grad_(), EPS), (x_ND, weight_D), upstream_ND
    )
    (x_only,) = torch.autograd.grad(rms_norm(x_ND, weight_D.detach(), EPS), x_ND, upstream_ND)
    (weight_only,) = torch.autograd.grad(rms_norm(x_ND.detach(), weight_D, EPS), weight_D, upstream_ND)
    torch.testing.assert_close(x_only, both[0], rtol=0, atol=0)
    torch.testing.assert_close(weight_only, both[1], rtol=0, atol=0)
    assert torch.autograd.grad(rms_norm(x_ND, weight_D, EPS).sum(), x_ND)[0].shape == (4, 3)
