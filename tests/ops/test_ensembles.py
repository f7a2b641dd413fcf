"""Shares of several teachers, against worked numbers and loops in float64."""

import math
import statistics

import pytest
import torch

from rlkd_trl.ops.ensembles import disagreement, loss_factor, mean_token_loss, weights_by_loss

MASK_BT = torch.tensor([[True, True, True], [True, False, False]])


def log_probs(*rows: list[float]) -> torch.Tensor:
    """NaN behind the mask, which must not matter."""
    return torch.tensor([[*row, *[math.nan] * (3 - len(row))] for row in rows], dtype=torch.float64)


def test_cross_entropy_per_token():
    # −(−1 − 2 − 0.6)/3 = 1.2 and −(−0.5)/1
    loss_B = mean_token_loss(log_probs([-1.0, -2.0, -0.6], [-0.5]), MASK_BT)
    assert loss_B.tolist() == pytest.approx([1.2, 0.5])


def test_mt_berts_factor():
    assert loss_factor(torch.tensor([0.0, 1.0, 3.0])).tolist() == [1.0, 0.5, 0.25]


def test_mt_berts_weights():
    # 1/(1+1) : 1/(1+3) = 2 : 1; with given weights 1 : 4 it is 1/2 : 4/4 = 1 : 2; and 0 stays 0, whatever the loss.
    losses_KB = torch.tensor([[1.0, 1.0, math.nan], [3.0, 3.0, 7.0]])
    prior_KB = torch.tensor([[1.0, 1.0, 0.0], [1.0, 4.0, 0.3]])
    shares_KB = weights_by_loss(losses_KB, prior_KB)
    torch.testing.assert_close(shares_KB, torch.tensor([[2 / 3, 1 / 3, 0.0], [1 / 3, 2 / 3, 1.0]]))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_disagreement_is_the_distance_from_the_median(count):
    generator = torch.Generator().manual_seed(count)
    rows = [
        [(-3 * torch.rand(n, generator=generator, dtype=torch.float64)).tolist() for n in (3, 1)] for _ in range(count)
    ]
    found_KB = disagreement([log_probs(*of_teacher) for of_teacher in rows], MASK_BT)
    for k in range(count):
        for b, n in enumerate((3, 1)):
            middle = [statistics.median(rows[j][b][t] for j in range(count)) for t in range(n)]
            expected = sum(abs(rows[k][b][t] - middle[t]) for t in range(n)) / n
            assert float(found_KB[k, b]) == pytest.approx(expected, abs=1e-12)
    if count == 2:
        assert found_KB[0].tolist() == pytest.approx(found_KB[1].tolist())


def test_a_teacher_that_was_not_asked_is_in_no_median():
    # asked about the first text: 1, 2 and 4, medians −1, −2, −1; about the second: 2 and 3, median −2
    rows = [([-1.0, -2.0, -1.0], [0.0]), ([-3.0, -2.0, -1.0], [-1.0]), ([0.0] * 3, [-3.0]), ([-1.0] * 3, [0.0])]
    asked_KB = torch.tensor([[True, False], [True, True], [False, True], [True, False]])
    found_KB = disagreement([log_probs(*of_teacher) for of_teacher in rows], MASK_BT, asked_KB)
    assert found_KB[asked_KB].tolist() == pytest.approx([0, 2 / 3, 1, 1, 1 / 3])
    assert found_KB[~asked_KB].isnan().all()
