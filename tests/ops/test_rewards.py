import math

import pytest
import torch

from rlkd_trl.ops.advantages import return_to_go
from rlkd_trl.ops.lm_head import logit_statistics
from rlkd_trl.ops.rewards import (
    adaptive_kl_coefficient,
    bootstrap_truncated,
    centre,
    k_step_return,
    kl_penalty,
    log_likelihood,
    log_ratio,
    on_last_token,
    potential_shaping,
    rewards_from_returns,
    sequence_sum,
    teacher_forcing_reward,
    zero_terminal_value,
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

GAMMAS = [1.0, 0.9, 0.0]


def random_scores(seed, dtype=torch.float64, T=6):
    """A ragged batch with q `[B, T]` and V `[B, T+1]`: random everywhere, behind the mask too."""
    batch = ragged_batch(seed, T)
    B = len(batch.lengths)
    return (
        batch,
        normal(B, T, seed=seed + 100, dtype=dtype, scale=2.0),
        normal(B, T + 1, seed=seed + 200, dtype=dtype, scale=2.0) + 1,
    )


def value_after(values, t, length, ended):
    """V_{t+1} of the paper, with t the 0-based index of a real token: 0 after EOS, else the value in that state."""
    return 0.0 if ended and t == length - 1 else values[t + 1]


def padded(rows, T):
    return [row + [0.0] * (T - len(row)) for row in rows]


# ---- teacher-forcing reward


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_teacher_forcing_reward_matches_the_loop(seed, gamma, dtype):
    batch, q_BT, values_BT1 = random_scores(seed, dtype)
    q, values = q_BT.tolist(), values_BT1.tolist()
    rows = [
        [q[i][t] - gamma * value_after(values[i], t, length, ended) for t in range(length)]
        for i, length, ended in batch.rows
    ]
    rewards_BT = teacher_forcing_reward(q_BT, values_BT1, batch.mask_BT, batch.ended_B, gamma=gamma)
    assert_matches(rewards_BT, padded(rows, 6), dtype)


def test_teacher_forcing_reward_by_hand():
    # T = 3, γ = ½. Both rows: q = (1, 2, 3), V = (10, 20, 30, 40).
    q_BT = torch.tensor([[1.0, 2.0, 3.0]] * 3)
    values_BT1 = torch.tensor([[10.0, 20.0, 30.0, 40.0]] * 3)
    mask_BT = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0]]).bool()
    ended_B = torch.tensor([True, False, True])
    expected = [
        # ended: 1 − ½·20 = −9, 2 − ½·30 = −13, 3 − 0
        [-9.0, -13.0, 3.0],
        # truncated: the last is bootstrapped from position T+1: 3 − ½·40 = −17
        [-9.0, -13.0, -17.0],
        # ended after two: 1 − ½·20, 2 − 0, padding
        [-9.0, 2.0, 0.0],
    ]
    assert teacher_forcing_reward(q_BT, values_BT1, mask_BT, ended_B, gamma=0.5).tolist() == expected
    # γ = 1 by default: 1 − 20, 2 − 30, 3
    assert teacher_forcing_reward(q_BT, values_BT1, mask_BT, ended_B)[0].tolist() == [-19.0, -28.0, 3.0]


@pytest.mark.parametrize("ended", [True, False])
def test_the_first_value_is_in_no_reward(ended):
    """The trap: torch.roll(V, −1) puts V_1 into the last reward. No r_t reads V_1."""
    q_BT, mask_BT = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
    rewards = [
        teacher_forcing_reward(q_BT, torch.tensor([[first, 1.0, 2.0, 3.0]]), mask_BT, torch.tensor([ended]))
        for first in (0.0, 1e6)
    ]
    assert rewards[0].tolist() == rewards[1].tolist() == [[-1.0, -2.0, 0.0 if ended else -3.0]]


@pytest.mark.parametrize("seed", SEEDS)
def test_zero_terminal_value_matches_the_loop(seed):
    batch, _, values_BT1 = random_scores(seed)
    values = values_BT1.tolist()
    expected = [
        [values[i][t] if t < length or (t == length and not ended) else 0.0 for t in range(7)]
        for i, length, ended in batch.rows
    ]
    assert zero_terminal_value(values_BT1, batch.mask_BT, batch.ended_B).tolist() == expected


# ---- identities, from logits to rewards


def scores_from_logits(logits_BTV, ids_BT, value):
    """q `[B, T]` and V `[B, T+1]` of a teacher, through the package's own statistics of its logits `[B, T+1, V]`."""
    B, T1, V = logits_BTV.shape
    # Position T+1 has no chosen token: any id does.
    chosen_BT1 = torch.cat([ids_BT, torch.zeros_like(ids_BT[:, :1])], dim=1)
    statistics = logit_statistics(logits_BTV.reshape(-1, V), chosen_BT1.flatten(), expected=True, tau=1.0)
    mean_BT1 = statistics.mean.view(B, T1)
    q_BT1 = centre(statistics.chosen.view(B, T1), mean_BT1)
    statistic = {"max": statistics.max, "expected": statistics.expected, "soft": statistics.soft}[value]
    return q_BT1[:, :-1], centre(statistic.view(B, T1), mean_BT1)


def random_logits(seed, V=11, T=6):
    batch = ragged_batch(seed, T)
    generator = torch.Generator().manual_seed(seed)
    B = len(batch.lengths)
    logits_BTV = 3 * torch.randn(B, T + 1, V, generator=generator) - 2
    return batch, logits_BTV, torch.randint(0, V, (B, T), generator=generator)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_soft_reward_sums_to_the_log_likelihood_plus_the_first_value(seed):
    """Σ_t r_t = V_1 + log p(y | x) for γ = 1, value="soft", τ = 1, ended; minus V_{n+1} where truncated."""
    batch, logits_BTV, ids_BT = random_logits(seed)
    q_BT, values_BT1 = scores_from_logits(logits_BTV, ids_BT, "soft")
    total_B = sequence_sum(teacher_forcing_reward(q_BT, values_BT1, batch.mask_BT, batch.ended_B), batch.mask_BT)

    for i, length, ended in batch.rows:
        if length == 0:
            assert total_B[i] == 0
            continue
        z = logits_BTV[i].double()
        log_p = sum((z[t, ids_BT[i, t]] - torch.logsumexp(z[t], 0)).item() for t in range(length))
        soft_value = [(torch.logsumexp(z[t], 0) - z[t].mean()).item() for t in range(length + 1)]
        expected = soft_value[0] + log_p - (0.0 if ended else soft_value[length])
        assert total_B[i].item() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("value", ["max", "expected", "soft"])
@pytest.mark.parametrize("seed", SEEDS)
def test_rewards_do_not_change_with_a_constant_per_state(seed, value):
    batch, logits_BTV, ids_BT = random_logits(seed)
    constant_BT1 = normal(*logits_BTV.shape[:2], 1, seed=seed, scale=5.0)
    rewards, shifted = (
        teacher_forcing_reward(*scores_from_logits(logits, ids_BT, value), batch.mask_BT, batch.ended_B, gamma=0.9)
        for logits in (logits_BTV, logits_BTV + constant_BT1)
    )
    torch.testing.assert_close(shifted, rewards, rtol=0, atol=2e-5)
    assert rewards.abs().max() > 1


@pytest.mark.parametrize("value", ["max", "expected", "soft"])
def test_rewards_from_logits_match_the_loop(value):
    batch, logits_BTV, ids_BT = random_logits(seed=3)
    rewards_BT = teacher_forcing_reward(
        *scores_from_logits(logits_BTV, ids_BT, value), batch.mask_BT, batch.ended_B, gamma=0.9
    )
    state_value = {
        "max": max,
        "expected": lambda f: sum(math.exp(f_v) * f_v for f_v in f) / sum(math.exp(f_v) for f_v in f),
        "soft": lambda f: math.log(sum(math.exp(f_v) for f_v in f)),
    }[value]
    rows = []
    for i, length, ended in batch.rows:
        centred = [[z - sum(z_V) / len(z_V) for z in z_V] for z_V in logits_BTV[i].tolist()]
        values = [state_value(f_V) for f_V in centred]
        ids = ids_BT[i].tolist()
        rows.append([centred[t][ids[t]] - 0.9 * value_after(values, t, length, ended) for t in range(length)])
    assert_matches(rewards_BT, padded(rows, 6), torch.float32)


def test_centre_by_hand():
    # logits (1, 2, 6): mean 3, so the largest becomes 6 − 3 = 3 and the first 1 − 3 = −2
    assert centre(torch.tensor([6.0, 1.0]), torch.tensor([3.0, 3.0])).tolist() == [3.0, -2.0]


# ---- K-step returns


def k_step_by_loop(q, values, t, length, ended, k, gamma):
    """Σ_j γ^{jk} ( q_{t+jk} − γ^m V ), V in the state m = min(k, what is left) tokens on; 0-based t."""
    terms, start, discount = [], t, 1.0
    while start < length:
        m = min(k, length - start)
        end_value = 0.0 if ended and start + m == length else values[start + m]
        terms.append(discount * (q[start] - gamma**m * end_value))
        discount *= gamma**m
        start += m
    return math.fsum(terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("k", [1, 2, 3, 5, 6, 7, 100])
@pytest.mark.parametrize("seed", SEEDS)
def test_k_step_return_matches_the_loop(seed, k, gamma, dtype):
    batch, q_BT, values_BT1 = random_scores(seed, dtype)
    q, values = q_BT.tolist(), values_BT1.tolist()
    rows = [
        [k_step_by_loop(q[i], values[i], t, length, ended, k, gamma) for t in range(length)]
        for i, length, ended in batch.rows
    ]
    returns_BT = k_step_return(q_BT, values_BT1, batch.mask_BT, batch.ended_B, k=k, gamma=gamma)
    assert_matches(returns_BT, padded(rows, 6), dtype)


def test_k_step_return_by_hand():
    # T = 3, k = 2, γ = ½, q = (1, 2, 3), V = (10, 20, 30, 40)
    q_BT, values_BT1 = torch.tensor([[1.0, 2.0, 3.0]] * 2), torch.tensor([[10.0, 20.0, 30.0, 40.0]] * 2)
    mask_BT, ended_B = torch.ones(2, 3, dtype=torch.bool), torch.tensor([True, False])
    # ended:     G_3 = 3;  G_2 = 2 − 0 (segment of two ends with EOS);  G_1 = 1 − ¼·30 + ¼·G_3 = 1 − 7.5 + 0.75
    # truncated: G_3 = 3 − ½·40 = −17;  G_2 = 2 − ¼·40 = −8;            G_1 = 1 − 7.5 + ¼·(−17) = −10.75
    expected = [[-5.75, 2.0, 3.0], [-10.75, -8.0, -17.0]]
    assert k_step_return(q_BT, values_BT1, mask_BT, ended_B, k=2, gamma=0.5).tolist() == expected


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("seed", SEEDS)
def test_one_step_is_the_return_to_go_of_the_one_step_reward(seed, gamma):
    batch, q_BT, values_BT1 = random_scores(seed)
    rewards_BT = teacher_forcing_reward(q_BT, values_BT1, batch.mask_BT, batch.ended_B, gamma=gamma)
    torch.testing.assert_close(
        k_step_return(q_BT, values_BT1, batch.mask_BT, batch.ended_B, k=1, gamma=gamma),
        return_to_go(rewards_BT, batch.mask_BT, gamma=gamma),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("k", [6, 50])
def test_k_beyond_the_end_leaves_one_segment(k):
    """G_t = q_t − γ^m V_end, with V_end = 0 where the completion ended."""
    batch, q_BT, values_BT1 = random_scores(seed=4)
    returns_BT = k_step_return(q_BT, values_BT1, batch.mask_BT, batch.ended_B, k=k, gamma=0.9)
    for i, length, ended in batch.rows:
        for t in range(length):
            end_value = 0.0 if ended else values_BT1[i, length].item()
            assert returns_BT[i, t].item() == pytest.approx(q_BT[i, t].item() - 0.9 ** (length - t) * end_value)


@pytest.mark.parametrize("k", [1, 3, 100])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_rewards_from_returns_have_these_returns(seed, gamma, k):
    batch, q_BT, values_BT1 = random_scores(seed)
    returns_BT = k_step_return(q_BT, values_BT1, batch.mask_BT, batch.ended_B, k=k, gamma=gamma)
    rewards_BT = rewards_from_returns(returns_BT, gamma=gamma)
    again_BT = return_to_go(rewards_BT, batch.mask_BT, gamma=gamma)
    torch.testing.assert_close(again_BT, returns_BT, rtol=1e-12, atol=1e-12)
    assert (rewards_BT[~batch.mask_BT] == 0).all()


def test_rewards_from_returns_by_hand():
    # γ = ½: 8 − ½·4, 4 − ½·2, 2 − 0: the last return does not wrap round to the first
    assert rewards_from_returns(torch.tensor([[8.0, 4.0, 2.0]]), gamma=0.5).tolist() == [[6.0, 3.0, 2.0]]
    assert rewards_from_returns(torch.tensor([[8.0, 4.0, 2.0]])).tolist() == [[4.0, 2.0, 2.0]]


# ---- potential shaping


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_potential_shaping_matches_the_loop(seed, gamma, dtype):
    batch, rewards_BT, potentials_BT1 = random_scores(seed, dtype)
    rewards, potentials = rewards_BT.tolist(), potentials_BT1.tolist()
    rows = [
        [
            rewards[i][t] + gamma * value_after(potentials[i], t, length, ended) - potentials[i][t]
            for t in range(length)
        ]
        for i, length, ended in batch.rows
    ]
    shaped_BT = potential_shaping(rewards_BT, potentials_BT1, batch.mask_BT, batch.ended_B, gamma=gamma)
    assert_matches(shaped_BT, padded(rows, 6), dtype)


@pytest.mark.parametrize("seed", SEEDS)
def test_potential_shaping_telescopes(seed):
    """γ = 1: Σ shaped = Σ r − Φ_1, and + Φ_{n+1} where truncated: nothing in between is left."""
    batch, rewards_BT, potentials_BT1 = random_scores(seed)
    shaped_BT = potential_shaping(rewards_BT, potentials_BT1, batch.mask_BT, batch.ended_B)
    for i, length, ended in batch.rows:
        if length:
            left = 0.0 if ended else potentials_BT1[i, length].item()
            expected = rewards_BT[i, :length].sum().item() - potentials_BT1[i, 0].item() + left
            assert shaped_BT[i].sum().item() == pytest.approx(expected)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_teacher_forcing_reward_shaped_by_its_values_is_q_minus_v(seed, gamma):
    batch, logits_BTV, ids_BT = random_logits(seed)
    q_BT, values_BT1 = scores_from_logits(logits_BTV, ids_BT, "max")
    rewards_BT = teacher_forcing_reward(q_BT, values_BT1, batch.mask_BT, batch.ended_B, gamma=gamma)
    shaped_BT = potential_shaping(rewards_BT, values_BT1, batch.mask_BT, batch.ended_B, gamma=gamma)
    expected_BT = (q_BT - values_BT1[:, :-1]) * batch.mask_BT
    torch.testing.assert_close(shaped_BT, expected_BT, rtol=1e-5, atol=5e-6)
    assert (shaped_BT < 5e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_bootstrap_truncated_matches_the_loop(seed, gamma, dtype):
    batch, rewards_BT, potentials_BT1 = random_scores(seed, dtype)
    rows = []
    for i, length, ended in batch.rows:
        row = rewards_BT[i, :length].tolist()
        if length and not ended:
            row[-1] += gamma * potentials_BT1[i, length].item()
        rows.append(row)
    bootstrapped_BT = bootstrap_truncated(rewards_BT, potentials_BT1, batch.mask_BT, batch.ended_B, gamma=gamma)
    assert_matches(bootstrapped_BT, padded(rows, 6), dtype)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_shaping_and_bootstrapping_differ_by_the_first_potential(seed, gamma):
    """In the discounted sum of a completion: Σ γ^t shaped = Σ γ^t bootstrapped − Φ_1, ended or truncated."""
    batch, rewards_BT, potentials_BT1 = random_scores(seed)
    arguments = (rewards_BT, potentials_BT1, batch.mask_BT, batch.ended_B)
    shaped_BT = potential_shaping(*arguments, gamma=gamma)
    bootstrapped_BT = bootstrap_truncated(*arguments, gamma=gamma)
    for i, length, _ in batch.rows:
        if length:
            sums = [
                math.fsum(gamma**t * x_BT[i, t].item() for t in range(length)) for x_BT in (shaped_BT, bootstrapped_BT)
            ]
            assert sums[0] == pytest.approx(sums[1] - potentials_BT1[i, 0].item(), abs=1e-12)


# ---- other per-token rewards


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [log_likelihood, log_ratio, kl_penalty])
@pytest.mark.parametrize("seed", SEEDS)
def test_differences_match_the_loop(seed, function, dtype):
    """chosen − logsumexp, teacher − student, policy − reference: the first argument minus the second."""
    batch = ragged_batch(seed)
    first_BT, second_BT = (normal(8, 6, seed=seed + offset, dtype=dtype) for offset in (0, 50))
    first, second = first_BT.tolist(), second_BT.tolist()
    rows = [[first[i][t] - second[i][t] for t in range(length)] for i, length, _ in batch.rows]
    assert_matches(function(first_BT, second_BT, batch.mask_BT), padded(rows, 6), dtype)


def test_log_likelihood_by_hand():
    # logits (0, ln 3), the second chosen: p = 3/(1 + 3) = ¾
    statistics = logit_statistics(torch.tensor([[0.0, math.log(3)]]), torch.tensor([1]))
    logp_BT = log_likelihood(statistics.chosen[None], statistics.logsumexp[None], torch.tensor([[True]]))
    assert logp_BT.item() == pytest.approx(math.log(0.75), rel=1e-6)


def test_the_expected_log_ratio_is_minus_the_reverse_kl():
    teacher_p, student_p = [0.5, 0.25, 0.25], [0.1, 0.6, 0.3]
    # every token once, weighted with the student's probability
    mask_BT = torch.ones(1, 3, dtype=torch.bool)
    student_BT = torch.tensor([student_p], dtype=torch.float64).log()
    ratio_BT = log_ratio(torch.tensor([teacher_p], dtype=torch.float64).log(), student_BT, mask_BT)
    reverse_kl = sum(s * math.log(s / t) for s, t in zip(student_p, teacher_p, strict=True))
    assert (student_BT.exp() * ratio_BT).sum().item() == pytest.approx(-reverse_kl)
    # and kl_penalty, whose arguments are policy first, has the KL itself as its expectation
    penalty_BT = kl_penalty(student_BT, torch.tensor([teacher_p], dtype=torch.float64).log(), mask_BT)
    assert (student_BT.exp() * penalty_BT).sum().item() == pytest.approx(reverse_kl)


@pytest.mark.parametrize("seed", SEEDS)
def test_on_last_token_and_sequence_sum_match_the_loop(seed):
    batch, rewards_BT, _ = random_scores(seed)
    score_B = normal(8, seed=seed, dtype=torch.float64)
    expected = [[score_B[i].item() if t == length - 1 else 0.0 for t in range(6)] for i, length, _ in batch.rows]
    placed_BT = on_last_token(score_B, batch.mask_BT)
    assert placed_BT.tolist() == expected
    # a masked completion has no last token, all others keep their score
    assert sequence_sum(placed_BT, batch.mask_BT).tolist() == [
        score_B[i].item() if length else 0.0 for i, length, _ in batch.rows
    ]
    assert_matches(
        sequence_sum(rewards_BT, batch.mask_BT),
        [math.fsum(rewards_BT[i, :length].tolist()) for i, length, _ in batch.rows],
    )


# ---- adaptive KL coefficient


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.5),  # on target: unchanged
        (6.6, 0.505),  # 10 % over: error 0.1, 0.5·(1 + 0.1·64/640) = 0.5·1.01
        (5.4, 0.495),  # 10 % under: 0.5·(1 − 0.01)
        (12.0, 0.51),  # 100 % over: error clipped to 0.2, 0.5·(1 + 0.2·0.1)
        (0.0, 0.49),  # 100 % under: clipped to −0.2
        (-3.0, 0.49),  # a one-sample estimate may be negative
    ],
)
def test_adaptive_kl_coefficient_by_hand(kl, expected):
    beta = adaptive_kl_coefficient(0.5, kl=kl, target=6.0, horizon=640, num_samples=64)
    assert beta == pytest.approx(expected, rel=1e-12)


# ---- poisoned padding


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize(
    "function",
    [
        lambda q, v, mask, ended: zero_terminal_value(v, mask, ended),
        lambda q, v, mask, ended: teacher_forcing_reward(q, v, mask, ended, gamma=0.9),
        lambda q, v, mask, ended: k_step_return(q, v, mask, ended, k=1, gamma=0.9),
        lambda q, v, mask, ended: k_step_return(q, v, mask, ended, k=2),
        lambda q, v, mask, ended: k_step_return(q, v, mask, ended, k=100),
        lambda q, v, mask, ended: k_step_return(q, v, mask, ended, k=2, gamma=0.0),
        lambda q, v, mask, ended: potential_shaping(q, v, mask, ended, gamma=0.9),
        lambda q, v, mask, ended: bootstrap_truncated(q, v, mask, ended, gamma=0.9),
        lambda q, v, mask, ended: sequence_sum(q, mask),
    ],
    ids=[
        "zero-terminal",
        "teacher-forcing",
        "1-step",
        "2-step",
        "100-step",
        "2-step-myopic",
        "shaping",
        "bootstrap",
        "sum",
    ],
)
def test_padding_is_ignored(function, poison):
    """The value after EOS counts as padding: 0 by definition, whatever the model says there."""
    batch, q_BT, values_BT1 = random_scores(0, torch.float32)
    assert_padding_is_ignored(
        lambda q_BT, values_BT1: function(q_BT, values_BT1, batch.mask_BT, batch.ended_B),
        (q_BT, batch.mask_BT),
        (values_BT1, batch.has_value_BT1),
        poison=poison,
    )


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("function", [log_likelihood, log_ratio, kl_penalty])
def test_padding_is_ignored_in_differences(function, poison):
    mask_BT = ragged_batch(0).mask_BT
    assert_padding_is_ignored(
        lambda first_BT, second_BT: function(first_BT, second_BT, mask_BT),
        (normal(8, 6, seed=0), mask_BT),
        (normal(8, 6, seed=1), mask_BT),
        poison=poison,
    )


@pytest.mark.parametrize("poison", POISONS)
def test_the_score_of_a_masked_completion_is_ignored(poison):
    mask_BT = ragged_batch(0).mask_BT
    assert_padding_is_ignored(
        lambda score_B: on_last_token(score_B, mask_BT), (normal(8, seed=0), mask_BT.any(dim=1)), poison=poison
    )
