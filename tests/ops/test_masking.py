import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rlkd_trl.ops.masking import (
    after_last_token,
    completion_mask,
    last_token,
    masked,
    masked_moments,
    masked_sum,
    masked_whiten,
    pad_columns,
    state_mask,
)
from tests.ops.ragged_batches import (
    DTYPES,
    POISONS,
    SEEDS,
    assert_matches,
    assert_padding_is_ignored,
    normal,
    ragged_batch,
)


def kept_numbers(x, mask):
    """The real entries as a list of Python floats."""
    return [value for value, real in zip(x.flatten().tolist(), mask.flatten().tolist(), strict=True) if real]


def moments_by_loop(numbers):
    mean = math.fsum(numbers) / len(numbers)
    return mean, math.fsum((number - mean) ** 2 for number in numbers) / len(numbers)


# ---- masked


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_masked_keeps_type_and_values(dtype, poison):
    garbage = poison if dtype.is_floating_point else 7
    kept = masked(torch.tensor([2, garbage, 3], dtype=dtype), torch.tensor([True, False, True]))
    assert kept.dtype == dtype and kept.tolist() == [2, 0, 3]


def test_masked_gradient():
    x = torch.tensor([2.0, 4.0, math.nan], requires_grad=True)
    (masked(x, torch.tensor([True, False, False])) ** 2).sum().backward()
    assert x.grad.tolist() == [4.0, 0.0, 0.0]  # d x²/dx at 2, and nothing behind the mask


# ---- completion masks


def test_completion_mask_ends_with_the_first_eos():
    ids_BT = torch.tensor(
        [
            [4, 1, 0, 0],  # ends at 2, padded with the pad id
            [4, 1, 1, 1],  # padded with EOS, as many decoder-only tokenizers do
            [0, 0, 4, 1],  # the pad id (T5's decoder start) sampled as a token is a token
            [4, 4, 4, 4],  # truncated
            [1, 4, 1, 4],  # EOS at once; what follows is no part of the completion
            [4, 0, 0, 0],  # truncated: pad ids without an EOS before them are tokens
        ]
    )
    mask_BT, ended_B = completion_mask(ids_BT, [1])
    assert mask_BT.dtype == ended_B.dtype == torch.bool
    assert mask_BT.int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 1],
        [1, 1, 1, 1],
        [1, 0, 0, 0],
        [1, 1, 1, 1],
    ]
    assert ended_B.tolist() == [True, True, True, False, True, False]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("eos_token_ids", [[1], [5, 2], []])
def test_completion_mask_matches_the_loop(seed, eos_token_ids):
    ids_BT = torch.randint(0, 8, (40, 7), generator=torch.Generator().manual_seed(seed))
    mask_BT, ended_B = completion_mask(ids_BT, eos_token_ids)
    for ids_T, mask_T, ended in zip(ids_BT.tolist(), mask_BT.tolist(), ended_B.tolist(), strict=True):
        expected, seen = [], False
        for token in ids_T:
            expected.append(not seen)
            seen = seen or token in eos_token_ids
        assert mask_T == expected
        assert ended == seen


def test_after_last_token_last_token_and_state_mask_by_hand():
    # T = 3: two tokens and EOS; two tokens, ended; three tokens, truncated; one, truncated; masked completion.
    mask_BT = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    ended_B = torch.tensor([True, True, False, False, False])
    assert after_last_token(mask_BT).int().tolist() == [
        [0, 0, 0, 1],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
        [0, 1, 0, 0],
        [1, 0, 0, 0],
    ]
    assert last_token(mask_BT).int().tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]]
    # A truncated completion also stops in the state after its last token; after EOS there is no state.
    assert state_mask(mask_BT, ended_B).int().tolist() == [
        [1, 1, 1, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 1],
        [1, 1, 0, 0],
        [1, 0, 0, 0],
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_positions_match_the_loop(seed):
    batch = ragged_batch(seed)
    B, T = batch.mask_BT.shape
    after_BT1, last_BT = after_last_token(batch.mask_BT), last_token(batch.mask_BT)
    state_BT1 = state_mask(batch.mask_BT, batch.ended_B)
    assert after_BT1.shape == state_BT1.shape == (B, T + 1) and last_BT.shape == (B, T)
    assert after_BT1.dtype == last_BT.dtype == state_BT1.dtype == torch.bool
    for i, length, ended in batch.rows:
        assert after_BT1[i].nonzero().flatten().tolist() == [length]
        assert last_BT[i].nonzero().flatten().tolist() == ([length - 1] if length else [])
        number_of_states = length if ended else length + 1
        assert state_BT1[i].tolist() == [t < number_of_states for t in range(T + 1)]


def test_pad_columns_by_hand():
    ids = [torch.tensor([[4, 5, 1]]), torch.tensor([[6], [7]])]
    assert pad_columns(ids, 4, value=9).tolist() == [[4, 5, 1, 9], [6, 9, 9, 9], [7, 9, 9, 9]]
    mask_BT = pad_columns([part > 4 for part in ids], 3, value=False)
    assert mask_BT.dtype == torch.bool
    assert mask_BT.tolist() == [[False, True, False], [True, False, False], [True, False, False]]
    logps = [torch.tensor([[-1.0]], requires_grad=True), torch.tensor([[-2.0, -3.0]])]
    padded_BT = pad_columns(logps, 2)
    assert padded_BT.tolist() == [[-1.0, 0.0], [-2.0, -3.0]]
    (padded_BT * torch.tensor([[5.0, 7.0], [1.0, 1.0]])).sum().backward()
    assert logps[0].grad.tolist() == [[5.0]]


# ---- masked statistics


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_sum_and_moments_match_the_loop(seed, dtype):
    mask_BT = ragged_batch(seed).mask_BT
    x_BT = normal(*mask_BT.shape, seed=seed, dtype=dtype) + 3
    numbers = kept_numbers(x_BT, mask_BT)
    mean, variance = moments_by_loop(numbers)
    assert_matches(masked_sum(x_BT, mask_BT), math.fsum(numbers), dtype)
    assert_matches(torch.stack(masked_moments(x_BT, mask_BT)), [mean, variance], dtype)
    rows = [math.fsum(kept_numbers(x_T, mask_T)) for x_T, mask_T in zip(x_BT, mask_BT, strict=True)]
    assert_matches(masked_sum(x_BT, mask_BT, dim=1), rows, dtype)


def test_moments_by_hand():
    # kept 1 and 3: mean (1 + 3)/2 = 2, population variance ((1−2)² + (3−2)²)/2 = 1 (with n − 1 it would be 2)
    x_BT, mask_BT = torch.tensor([[1.0, 3.0, 100.0]]), torch.tensor([[True, True, False]])
    mean, variance = masked_moments(x_BT, mask_BT)
    assert (mean.item(), variance.item()) == (2.0, 1.0)


def test_nothing_real_gives_zeros():
    x_BT, mask_BT = torch.full((2, 3), float("nan")), torch.zeros(2, 3, dtype=torch.bool)
    assert masked_sum(x_BT, mask_BT) == 0
    assert masked_sum(x_BT, mask_BT, dim=1).tolist() == [0, 0]
    assert [moment.item() for moment in masked_moments(x_BT, mask_BT)] == [0, 0]
    assert masked_whiten(x_BT, mask_BT).tolist() == [[0] * 3] * 2


def test_variance_survives_a_large_mean():
    # In float32, E[x²] − E[x]² at x ≈ 10⁴ subtracts two numbers near 10⁸ whose spacing is 8: all digits of a variance
    # of about 1 would be lost. Two passes keep them.
    mask_BT = ragged_batch(0, T=64).mask_BT
    x_BT = normal(*mask_BT.shape, seed=0) + 1e4
    _, expected = moments_by_loop(kept_numbers(x_BT, mask_BT))
    _, variance = masked_moments(x_BT, mask_BT)
    assert variance.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_whiten_matches_the_loop(seed, dtype, shift_mean):
    mask_BT = ragged_batch(seed).mask_BT
    x_BT = 2 * normal(*mask_BT.shape, seed=seed, dtype=dtype) + 3
    mean, variance = moments_by_loop(kept_numbers(x_BT, mask_BT))
    expected = [
        [
            ((x - mean) / math.sqrt(variance + 1e-3) + (0 if shift_mean else mean)) if real else 0.0
            for x, real in zip(x_T, mask_T, strict=True)
        ]
        for x_T, mask_T in zip(x_BT.tolist(), mask_BT.tolist(), strict=True)
    ]
    assert_matches(masked_whiten(x_BT, mask_BT, shift_mean=shift_mean, epsilon=1e-3), expected, dtype)


def test_whiten_by_hand():
    x_BT, mask_BT = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])
    # mean 2, variance 1, epsilon 3: (1 − 2)/√(1 + 3) = −0.5; epsilon is under the root
    assert masked_whiten(x_BT, mask_BT, epsilon=3.0).tolist() == [[-0.5, 0.5, 0.0]]
    # the mean kept: 2 ∓ 0.5; still 0, not the mean, behind the mask
    assert masked_whiten(x_BT, mask_BT, epsilon=3.0, shift_mean=False).tolist() == [[1.5, 2.5, 0.0]]
    # equal numbers: 0/√ε = 0, not NaN
    assert masked_whiten(torch.full((1, 3), 7.0), mask_BT).tolist() == [[0.0, 0.0, 0.0]]


def run_two_ranks(function, arguments_of_ranks):
    """`function(*arguments, sum_over_ranks=…)` on two threads that meet in every reduction, as two processes would."""
    barrier, parts = threading.Barrier(2, timeout=20), [None, None]

    def on_rank(rank):
        def sum_over_ranks(tensor):
            parts[rank] = tensor
            barrier.wait()
            total = parts[0] + parts[1]
            barrier.wait()
            return total

        return function(*arguments_of_ranks[rank], sum_over_ranks=sum_over_ranks)

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(on_rank, range(2)))


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("cut", [3, 1])
@pytest.mark.parametrize("seed", SEEDS)
def test_whitening_over_two_ranks_is_whitening_of_the_whole_batch(seed, cut, shift_mean):
    mask_BT = ragged_batch(seed).mask_BT
    # The ranks' means differ by about 5: whitening each by itself would be far off.
    x_BT = normal(*mask_BT.shape, seed=seed, dtype=torch.float64) + torch.arange(len(mask_BT))[:, None]

    def whiten(x, mask, sum_over_ranks=None):
        return masked_whiten(x, mask, shift_mean=shift_mean, sum_over_ranks=sum_over_ranks)

    parts = run_two_ranks(whiten, [(x_BT[:cut], mask_BT[:cut]), (x_BT[cut:], mask_BT[cut:])])
    torch.testing.assert_close(torch.cat(parts), whiten(x_BT, mask_BT), rtol=1e-12, atol=1e-12)


def test_a_rank_without_real_tokens_takes_part():
    # rank 0 holds 1 and 3, rank 1 nothing: mean 2 and variance 1 on both
    x_BT = torch.tensor([[1.0, 3.0]])
    real, none = torch.tensor([[True, True]]), torch.tensor([[False, False]])
    for mean, variance in run_two_ranks(masked_moments, [(x_BT, real), (x_BT, none)]):
        assert (mean.item(), variance.item()) == (2.0, 1.0)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize(
    "function",
    [
        masked_sum,
        lambda x, mask: masked_sum(x, mask, dim=1),
        masked_moments,
        masked_whiten,
        lambda x, mask: masked_whiten(x, mask, shift_mean=False),
    ],
    ids=["sum", "sum-of-rows", "moments", "whiten", "whiten-keeping-the-mean"],
)
def test_padding_is_ignored(function, poison):
    mask_BT = ragged_batch(0).mask_BT
    x_BT = normal(*mask_BT.shape, seed=0)
    assert_padding_is_ignored(lambda x_BT: function(x_BT, mask_BT), (x_BT, mask_BT), poison=poison)


@pytest.mark.parametrize("function", [masked_sum, masked_moments, masked_whiten])
def test_gradients(function):
    mask_BT = ragged_batch(1, T=3).mask_BT
    x_BT = normal(*mask_BT.shape, seed=0, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, mask_BT), (x_BT,))
