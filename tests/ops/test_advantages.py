import math

import pytest
import torch

from rlkd_trl.ops.advantages import (
    denormalize,
    explained_variance,
    gae,
    leave_one_out,
    mean_baseline,
    min_variance_baseline,
    normalize,
    return_to_go,
    running_moments,
    token_leave_one_out,
)
from rlkd_trl.ops.rewards import potential_shaping
from tests.ops.ragged_batches import (
    DTYPES,
    POISONS,
    SEEDS,
    assert_matches,
    assert_padding_is_ignored,
    normal,
    ragged_batch,
)


def random_episodes(seed, dtype=torch.float64, T=6):
    """A ragged batch with rewards `[B, T]` and values `[B, T+1]`: random everywhere, behind the mask too."""
    batch = ragged_batch(seed, T)
    B = len(batch.lengths)
    return batch, normal(B, T, seed=seed + 10, dtype=dtype), normal(B, T + 1, seed=seed + 20, dtype=dtype) + 2


def returns_by_loop(rewards, length, gamma):
    return [math.fsum(gamma ** (u - t) * rewards[u] for u in range(t, length)) for t in range(length)]


def padded(rows, T):
    return [row + [0.0] * (T - len(row)) for row in rows]


# ---- return-to-go


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_return_to_go_matches_the_loop(seed, gamma, dtype):
    batch, rewards_BT, _ = random_episodes(seed, dtype)
    rows = [returns_by_loop(rewards_BT[i].tolist(), length, gamma) for i, length, _ in batch.rows]
    assert_matches(return_to_go(rewards_BT, batch.mask_BT, gamma=gamma), padded(rows, 6), dtype)


def test_return_to_go_by_hand():
    # γ = ½: G_3 = 4, G_2 = 2 + ½·4 = 4, G_1 = 1 + ½·4 = 3; γ = 1 by default: 4, 6, 7
    rewards_BT, mask_BT = torch.tensor([[1.0, 2.0, 4.0, 9.0]]), torch.tensor([[True, True, True, False]])
    assert return_to_go(rewards_BT, mask_BT, gamma=0.5).tolist() == [[3.0, 4.0, 4.0, 0.0]]
    assert return_to_go(rewards_BT, mask_BT).tolist() == [[7.0, 6.0, 4.0, 0.0]]


# ---- GAE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (0.9, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("seed", SEEDS)
def test_gae_matches_the_sum_in_the_paper(seed, gamma, lam, dtype):
    """A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t, over the tokens of the completion."""
    batch, rewards_BT, values_BT1 = random_episodes(seed, dtype)
    rows = []
    for i, length, ended in batch.rows:
        rewards, values = rewards_BT[i].tolist(), values_BT1[i].tolist()
        if ended:
            values[length] = 0.0
        delta = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(length)]
        rows.append([math.fsum((gamma * lam) ** (u - t) * delta[u] for u in range(t, length)) for t in range(length)])
    advantages_BT = gae(rewards_BT, values_BT1, batch.mask_BT, batch.ended_B, gamma=gamma, lam=lam)
    assert_matches(advantages_BT, padded(rows, 6), dtype)


def test_gae_by_hand():
    # γ = ½, λ = ½, r = (1, 2), V = (4, 8, 16); γλ = ¼
    rewards_BT, values_BT1 = torch.tensor([[1.0, 2.0]] * 3), torch.tensor([[4.0, 8.0, 16.0]] * 3)
    mask_BT = torch.tensor([[True, True], [True, True], [True, False]])
    ended_B = torch.tensor([True, False, True])
    expected = [
        # ended:     δ_2 = 2 + 0 − 8 = −6;         δ_1 = 1 + ½·8 − 4 = 1;  A_1 = 1 + ¼·(−6) = −0.5
        [-0.5, -6.0],
        # truncated: δ_2 = 2 + ½·16 − 8 = 2;       δ_1 = 1;                A_1 = 1 + ¼·2 = 1.5
        [1.5, 2.0],
        # one token and ended: δ_1 = 1 + 0 − 4 = −3
        [-3.0, 0.0],
    ]
    assert gae(rewards_BT, values_BT1, mask_BT, ended_B, gamma=0.5, lam=0.5).tolist() == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_gae_with_lambda_one_is_the_return_minus_the_value(seed):
    batch, rewards_BT, values_BT1 = random_episodes(seed)
    advantages_BT = gae(rewards_BT, values_BT1, batch.mask_BT, batch.ended_B, gamma=1.0, lam=1.0)
    for i, length, ended in batch.rows:
        bootstrap = 0.0 if ended else values_BT1[i, length].item()
        for t in range(length):
            expected = rewards_BT[i, t:length].sum().item() + bootstrap - values_BT1[i, t].item()
            assert advantages_BT[i, t].item() == pytest.approx(expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_gae_with_lambda_zero_is_the_one_step_error(seed):
    batch, rewards_BT, values_BT1 = random_episodes(seed)
    advantages_BT = gae(rewards_BT, values_BT1, batch.mask_BT, batch.ended_B, gamma=0.9, lam=0.0)
    one_step_BT = potential_shaping(rewards_BT, values_BT1, batch.mask_BT, batch.ended_B, gamma=0.9)
    torch.testing.assert_close(advantages_BT, one_step_BT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7)])
@pytest.mark.parametrize("seed", SEEDS)
def test_shaped_rewards_with_values_are_raw_rewards_with_values_plus_potentials(seed, gamma, lam):
    """r + γΦ' − Φ + γV' − V = r + γ(V + Φ)' − (V + Φ): every δ, and so every advantage, is the same."""
    batch, rewards_BT, values_BT1 = random_episodes(seed)
    potentials_BT1 = normal(*values_BT1.shape, seed=seed + 30, dtype=torch.float64)
    shaped_BT = potential_shaping(rewards_BT, potentials_BT1, batch.mask_BT, batch.ended_B, gamma=gamma)
    torch.testing.assert_close(
        gae(shaped_BT, values_BT1, batch.mask_BT, batch.ended_B, gamma=gamma, lam=lam),
        gae(rewards_BT, values_BT1 + potentials_BT1, batch.mask_BT, batch.ended_B, gamma=gamma, lam=lam),
        rtol=1e-12,
        atol=1e-12,
    )


# ---- leave-one-out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(12,), (12, 3)])
@pytest.mark.parametrize("K", [2, 3, 4, 12])
@pytest.mark.parametrize("seed", SEEDS)
def test_leave_one_out_matches_the_loop(seed, K, shape, dtype):
    scores = normal(*shape, seed=seed, dtype=dtype)
    advantages = leave_one_out(scores, K)
    assert advantages.shape == scores.shape
    numbers = scores.view(12, -1).tolist()
    expected = []
    for i in range(12):
        others = [j for j in range(12) if j // K == i // K and j != i]
        expected.append(
            [score - math.fsum(numbers[j][c] for j in others) / (K - 1) for c, score in enumerate(numbers[i])]
        )
    assert_matches(advantages.view(12, -1), expected, dtype)
    torch.testing.assert_close(
        advantages.view(12 // K, K, -1).sum(dim=1), torch.zeros(12 // K, *advantages.view(12, -1).shape[1:]).to(dtype)
    )


def test_leave_one_out_by_hand():
    # prompt 1: 1 − (2 + 6)/2 = −3, 2 − (1 + 6)/2 = −1.5, 6 − (1 + 2)/2 = 4.5; prompt 2: all equal, 0
    assert leave_one_out(torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), 3).tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]
    # K = 2 is antisymmetric: ±(R_1 − R_2), not half of it; neighbours belong together
    assert leave_one_out(torch.tensor([1.0, 4.0, 10.0, 30.0]), 2).tolist() == [-3.0, 3.0, -20.0, 20.0]


@pytest.mark.parametrize(("num_samples", "K"), [(4, 1), (4, 0), (4, -2), (5, 2), (2, 4)])
def test_leave_one_out_refuses_what_it_cannot_do(num_samples, K):
    for function in (
        lambda: leave_one_out(torch.zeros(num_samples), K),
        lambda: token_leave_one_out(
            torch.zeros(num_samples, 2), torch.ones(num_samples, 2, dtype=torch.bool), num_generations=K
        ),
    ):
        with pytest.raises(ValueError, match=f"{num_samples} samples in groups of {K}"):
            function()


def test_token_leave_one_out_by_hand():
    rewards_BT = torch.tensor([[1.0, 2.0, 4.0], [8.0, 5.0, 5.0], [1.0, 1.0, 7.0]])
    mask_BT = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    # returns-to-go, 0 once a completion is over: (7, 6, 4), (8, 0, 0), (2, 1, 0)
    # sample 1: 7 − (8 + 2)/2 = 2,    6 − (0 + 1)/2 = 5.5,  4 − 0 = 4
    # sample 2: 8 − (7 + 2)/2 = 3.5
    # sample 3: 2 − (7 + 8)/2 = −5.5, 1 − (6 + 0)/2 = −2
    expected = [[2.0, 5.5, 4.0], [3.5, 0.0, 0.0], [-5.5, -2.0, 0.0]]
    assert token_leave_one_out(rewards_BT, mask_BT, num_generations=3).tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("K", [2, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_token_leave_one_out_matches_the_loop(seed, K, gamma, dtype):
    batch, rewards_BT, _ = random_episodes(seed, dtype)
    returns = padded([returns_by_loop(rewards_BT[i].tolist(), length, gamma) for i, length, _ in batch.rows], T=6)
    expected = []
    for i, length, _ in batch.rows:
        others = [j for j in range(8) if j // K == i // K and j != i]
        expected.append([returns[i][t] - math.fsum(returns[j][t] for j in others) / (K - 1) for t in range(length)])
    advantages_BT = token_leave_one_out(rewards_BT, batch.mask_BT, num_generations=K, gamma=gamma)
    assert_matches(advantages_BT, padded(expected, 6), dtype)


# ---- constant baselines


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_mean_baseline_matches_the_loop(seed, dtype):
    batch, returns_BT, _ = random_episodes(seed, dtype)
    real = [returns_BT[i, t].item() for i, length, _ in batch.rows for t in range(length)]
    assert_matches(mean_baseline(returns_BT, batch.mask_BT), math.fsum(real) / len(real), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_min_variance_baseline_matches_the_loop(seed, off_policy, dtype):
    batch, returns_BT, _ = random_episodes(seed, dtype)
    logps_BT = -normal(8, 6, seed=seed + 1, dtype=dtype).abs()
    ratios_BT = normal(8, 6, seed=seed + 2, dtype=dtype, scale=0.5).exp() if off_policy else None
    above, below = [], []
    for i, length, _ in batch.rows:
        for t in range(length):
            ratio = ratios_BT[i, t].item() if off_policy else 1.0
            weight = ratio**2 * (1 - math.exp(logps_BT[i, t].item())) ** 2
            above.append(weight * returns_BT[i, t].item())
            below.append(weight)
    actual = min_variance_baseline(returns_BT, logps_BT, batch.mask_BT, ratios_BT=ratios_BT)
    assert_matches(actual, math.fsum(above) / math.fsum(below), dtype)


def test_min_variance_baseline_by_hand():
    # π(y) = ½, ¾, 1: weights ¼, 1/16, 0, i.e. 4 : 1 : 0 on returns 10, −5, 99: (40 − 5) / 5 = 7
    logps_BT = torch.tensor([[0.5, 0.75, 1.0, 0.1]], dtype=torch.float64).log()
    returns_BT = torch.tensor([[10.0, -5.0, 99.0, 99.0]], dtype=torch.float64)
    mask_BT = torch.tensor([[True, True, True, False]])
    assert min_variance_baseline(returns_BT, logps_BT, mask_BT).item() == pytest.approx(7.0)
    # ratios 1, 2: weights 4 : 4, (10 − 5) / 2
    ratios_BT = torch.tensor([[1.0, 2.0, 5.0, 9.0]], dtype=torch.float64)
    assert min_variance_baseline(returns_BT, logps_BT, mask_BT, ratios_BT=ratios_BT).item() == pytest.approx(2.5)
    # All certain: no token has a gradient, and no baseline makes a difference.
    assert min_variance_baseline(returns_BT, torch.zeros_like(logps_BT), mask_BT).item() == 0.0


@pytest.mark.parametrize("behaviour", [None, [0.3, 0.7]])
def test_min_variance_baseline_is_the_best_constant_for_two_actions(behaviour):
    """Exact expectations over both actions: the variance of ρ ∇_z log π(y) (G − b) is least at this b.

    With two actions ‖∇_z log π(y)‖² = 2 (1 − π(y))², so that the approximation of the norm is exact.
    """
    policy, returns = [0.8, 0.2], [1.0, -3.0]
    sampled = behaviour or policy

    def variance(b):
        gradients = []
        for y in range(2):
            ratio = policy[y] / sampled[y]
            gradients.append([ratio * ((v == y) - policy[v]) * (returns[y] - b) for v in range(2)])
        mean = [math.fsum(sampled[y] * gradients[y][v] for y in range(2)) for v in range(2)]
        return math.fsum(sampled[y] * (gradients[y][v] - mean[v]) ** 2 for y in range(2) for v in range(2))

    # 1000 tokens in the proportions in which they are sampled.
    counts = [round(1000 * p) for p in sampled]
    actions = [0] * counts[0] + [1] * counts[1]
    tensors = [
        torch.tensor([[values[y] for y in actions]], dtype=torch.float64)
        for values in (returns, [math.log(p) for p in policy], [policy[y] / sampled[y] for y in range(2)])
    ]
    mask_BT = torch.ones(1, 1000, dtype=torch.bool)
    best = min_variance_baseline(*tensors[:2], mask_BT, ratios_BT=tensors[2]).item()
    assert variance(best) < min(variance(best - 0.01), variance(best + 0.01))
    assert variance(best) < 0.9 * min(variance(0.0), variance(mean_baseline(tensors[0], mask_BT).item()))


def test_constant_baselines_are_over_all_ranks():
    """Two ranks with different numbers of tokens: the baseline of one big batch, which is not the mean of the two."""
    batch, returns_BT, _ = random_episodes(0)
    logps_BT, mask_BT = -normal(8, 6, seed=1, dtype=torch.float64).abs(), batch.mask_BT
    for function in (
        lambda rows, total: mean_baseline(returns_BT[rows], mask_BT[rows], sum_over_ranks=total),
        lambda rows, total: min_variance_baseline(
            returns_BT[rows], logps_BT[rows], mask_BT[rows], sum_over_ranks=total
        ),
    ):
        sums_of_ranks = []
        for rows in (slice(0, 3), slice(3, 8)):
            sums = []
            function(rows, lambda tensor, sums=sums: sums.append(tensor) or tensor)
            sums_of_ranks.append(sums)
        totals = iter([sum(parts) for parts in zip(*sums_of_ranks, strict=True)])
        actual = function(slice(3, 8), lambda tensor, totals=totals: next(totals))
        torch.testing.assert_close(actual, function(slice(None), None), rtol=1e-12, atol=1e-12)


# ---- explained variance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_explained_variance_matches_the_loop(seed, dtype):
    batch, targets_BT, noise_BT1 = random_episodes(seed, dtype)
    predictions_BT = targets_BT + 0.5 * noise_BT1[:, 1:]

    def variance(numbers):
        mean = math.fsum(numbers) / len(numbers)
        return math.fsum((number - mean) ** 2 for number in numbers) / len(numbers)

    targets, predictions = targets_BT[batch.mask_BT].tolist(), predictions_BT[batch.mask_BT].tolist()
    residuals = [target - prediction for target, prediction in zip(targets, predictions, strict=True)]
    expected = 1 - variance(residuals) / variance(targets)
    assert 0 < expected < 0.95
    assert_matches(explained_variance(predictions_BT, targets_BT, batch.mask_BT), expected, dtype)


def test_explained_variance_by_hand():
    targets_BT, mask_BT = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])

    def of(*predictions):
        return explained_variance(torch.tensor([predictions]), targets_BT, mask_BT).item()

    assert of(1.0, 3.0, 0.0) == 1.0  # perfect
    assert of(6.0, 8.0, 0.0) == 1.0  # perfect but for a constant: the variance of the error is 0
    assert of(2.0, 2.0, 0.0) == 0.0  # constant
    assert of(1.5, 2.5, 0.0) == 0.75  # error (−½, ½): variance ¼ of 1
    assert of(3.0, 1.0, 0.0) == -3.0  # anticorrelated: error (−2, 2), variance 4 of 1


# ---- poisoned padding


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize(
    "function",
    [
        lambda r, v, mask, ended: return_to_go(r, mask, gamma=0.9),
        lambda r, v, mask, ended: gae(r, v, mask, ended, gamma=0.9, lam=0.8),
        lambda r, v, mask, ended: gae(r, v, mask, ended, gamma=1.0, lam=1.0),
        lambda r, v, mask, ended: token_leave_one_out(r, mask, num_generations=4),
    ],
    ids=["return-to-go", "gae", "gae-undiscounted", "token-leave-one-out"],
)
def test_padding_is_ignored(function, poison):
    """The value after EOS counts as padding: 0 by definition, whatever the critic says there."""
    batch, rewards_BT, values_BT1 = random_episodes(0, torch.float32)
    assert_padding_is_ignored(
        lambda rewards_BT, values_BT1: function(rewards_BT, values_BT1, batch.mask_BT, batch.ended_B),
        (rewards_BT, batch.mask_BT),
        (values_BT1, batch.has_value_BT1),
        poison=poison,
    )


@pytest.mark.parametrize("poison", POISONS)
def test_padding_is_ignored_in_the_baselines(poison):
    mask_BT = ragged_batch(0).mask_BT
    returns_BT, logps_BT, ratios_BT = (normal(8, 6, seed=seed) for seed in range(3))
    assert_padding_is_ignored(
        lambda returns_BT, logps_BT, ratios_BT: (
            mean_baseline(returns_BT, mask_BT),
            min_variance_baseline(returns_BT, logps_BT, mask_BT, ratios_BT=ratios_BT),
        ),
        (returns_BT, mask_BT),
        (-logps_BT.abs(), mask_BT),
        (ratios_BT, mask_BT),
        poison=poison,
    )


@pytest.mark.parametrize("poison", POISONS)
def test_padding_is_ignored_in_explained_variance(poison):
    mask_BT = ragged_batch(0).mask_BT
    assert_padding_is_ignored(
        lambda predictions_BT, targets_BT: explained_variance(predictions_BT, targets_BT, mask_BT),
        (normal(8, 6, seed=0), mask_BT),
        (normal(8, 6, seed=1), mask_BT),
        poison=poison,
    )


# ---- normalised returns


def test_running_moments_by_hand():
    # First moment 0.9·2 + 0.1·12 = 3; second 0.9·(4 + 2²) + 0.1·(9 + 12²) = 7.2 + 15.3 = 22.5; variance 22.5 − 3².
    assert running_moments(2.0, 4.0, 12.0, 9.0, decay=0.9) == pytest.approx((3.0, 13.5))
    assert running_moments(2.0, 4.0, 12.0, 9.0, decay=1.0) == pytest.approx((2.0, 4.0))
    assert running_moments(2.0, 4.0, 12.0, 9.0, decay=0.0) == pytest.approx((12.0, 9.0))


def test_running_moments_of_halves_are_those_of_the_whole():
    """At decay ½, two batches of one size count the same: mean and variance of all their numbers."""
    first, second = ([1.0, 4.0, -2.0], [10.0, 8.0, 3.0])
    moments = [(math.fsum(x) / 3, math.fsum((v - math.fsum(x) / 3) ** 2 for v in x) / 3) for x in (first, second)]
    # all six: sum 24, mean 4; deviations −3, 0, −6, 6, 4, −1 with squares 9 + 0 + 36 + 36 + 16 + 1 = 98
    assert running_moments(*moments[0], *moments[1], decay=0.5) == pytest.approx((4.0, 98 / 6))


def test_normalize_by_hand_and_back():
    values = torch.tensor([7.0, 3.0, -1.0], dtype=torch.float64)
    # (7 − 3)/2 = 2, (3 − 3)/2 = 0, (−1 − 3)/2 = −2
    assert normalize(values, 3.0, 4.0).tolist() == [2.0, 0.0, -2.0]
    assert denormalize(torch.tensor([2.0, 0.0, -2.0]), 3.0, 4.0).tolist() == [7.0, 3.0, -1.0]


@pytest.mark.parametrize("variance", [0.0, 1e-12, 1e-8, 0.3, 1e4])
def test_denormalize_takes_normalize_back_even_without_variance(variance):
    values = normal(20, seed=0, dtype=torch.float64)
    back = denormalize(normalize(values, -1.5, variance), -1.5, variance)
    torch.testing.assert_close(back, values, rtol=1e-9, atol=1e-9)
    # Equal returns, whose variance is 0 up to rounding, must not blow the rounding up: std is at least 1e-4.
    assert normalize(torch.tensor([-1.5 + 1e-6]), -1.5, variance).abs() < 0.02
