"""The average reward: against the exact gradient of E[Σ r] / E[T] of an enumerated problem, in float64."""

import itertools
from functools import partial

import pytest
import torch

from rlkd_trl.ops.advantages import return_to_go, token_leave_one_out
from rlkd_trl.ops.all_actions import future_advantages, future_returns
from rlkd_trl.ops.average_reward import average_reward, differential_advantages, differential_rewards
from rlkd_trl.ops.losses import policy_gradient_loss
from tests.ops.ragged_batches import DTYPES, POISONS, SEEDS, assert_matches, normal, ragged_batch

# ---- texts of up to three tokens that end at random, enumerated

# Tokens 0 and 1 go on, EOS 2 ends; after a third token without EOS the text is cut off.
EOS, T = 2, 3
TEXTS = [y for n in (1, 2, 3) for y in itertools.product((0, 1, EOS), repeat=n) if EOS not in y[:-1]]
TEXTS = [y for y in TEXTS if len(y) == T or y[-1] == EOS]
STATES = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
# In quarters, so that a rollout in which each text occurs 64 times its probability is the exact expectation.
QUARTERS = [[1, 1, 2], [2, 1, 1], [1, 2, 1], [1, 1, 2], [2, 1, 1], [1, 1, 2], [1, 2, 1]]
LOGITS_SV = torch.tensor(QUARTERS, dtype=torch.float64).log()


def states_of(text):
    return [STATES.index(text[:t]) for t in range(len(text))]


def random_rewards(seed=0):
    """Of every state and token; mostly negative, as a teacher's are."""
    return normal(len(STATES), 3, seed=seed, dtype=torch.float64) - 2.0


class Enumerated:
    """Expectations over all texts, differentiable in the policy's logits."""

    def __init__(self, rewards_SV):
        self.rewards_SV = rewards_SV
        self.logits_SV = LOGITS_SV.clone().requires_grad_()

    def probability(self, text):
        logps_SV = self.logits_SV.log_softmax(dim=-1)
        return sum(logps_SV[s, a] for s, a in zip(states_of(text), text, strict=True)).exp()

    def sum_of_rewards(self, text):
        return sum(self.rewards_SV[s, a] for s, a in zip(states_of(text), text, strict=True))

    def expected(self, number_of):
        return sum(self.probability(text) * number_of(text) for text in TEXTS)

    def gradient(self, of):
        return torch.autograd.grad(of, self.logits_SV)[0]

    def average(self):
        """J = E[Σ r] / E[T]."""
        return self.expected(self.sum_of_rewards) / self.expected(len)


def batch_of(texts, rewards_SV):
    """Mask, rewards and the sampled ids of some texts, and the states in which they were sampled."""
    mask_BT = torch.tensor([[t < len(y) for t in range(T)] for y in texts])
    rewards_BT, ids_BT, states_BT = torch.full((len(texts), T), torch.nan).double(), mask_BT.long(), mask_BT.long()
    for b, y in enumerate(texts):
        for t, (s, a) in enumerate(zip(states_of(y), y, strict=True)):
            rewards_BT[b, t], ids_BT[b, t], states_BT[b, t] = rewards_SV[s, a], a, s
    return mask_BT, rewards_BT, ids_BT, states_BT


def log_probs(logits_SV, ids_BT, states_BT):
    return logits_SV.log_softmax(dim=-1)[states_BT, ids_BT]


def copies(text):
    product = 1
    for s, a in zip(states_of(text), text, strict=True):
        product *= QUARTERS[s][a]
    return product * 4 ** (T - len(text))


EVERY_TEXT = [text for text in TEXTS for _ in range(copies(text))]


def test_the_enumerated_rollout_is_the_distribution():
    assert len(TEXTS) == 1 + 2 + 12 and len(EVERY_TEXT) == 64
    problem = Enumerated(random_rewards())
    assert float(problem.expected(lambda text: 1.0).detach()) == pytest.approx(1.0)
    for text in TEXTS:
        assert float(problem.probability(text).detach()) == pytest.approx(EVERY_TEXT.count(text) / 64)


@pytest.mark.parametrize("seed", SEEDS)
def test_over_the_rollout_it_is_the_exact_gradient_of_reward_per_token(seed):
    """Value and gradient, with the loss's own division by the number of tokens for E[T]."""
    problem = Enumerated(random_rewards(seed))
    mask_BT, rewards_BT, ids_BT, states_BT = batch_of(EVERY_TEXT, problem.rewards_SV)
    average_B = average_reward(rewards_BT, mask_BT)
    assert average_B.shape == (64,) and (average_B == average_B[0]).all()
    assert float(average_B[0]) == pytest.approx(float(problem.average().detach()), rel=1e-12)

    def loss_of(summed_BT):
        logps_BT = log_probs(problem.logits_SV, ids_BT, states_BT)
        settings = {"ratio_cap": None, "weight_clip": None, "denominator": mask_BT.sum()}
        return policy_gradient_loss(logps_BT, logps_BT.detach(), summed_BT, mask_BT, **settings)[0]

    returns_BT = return_to_go(differential_rewards(rewards_BT, mask_BT, average_B), mask_BT)
    exact = problem.gradient(-problem.average())
    assert exact.abs().max() > 1e-2
    torch.testing.assert_close(problem.gradient(loss_of(returns_BT)), exact, rtol=1e-10, atol=1e-12)
    # Without ρ it is another objective's: here one that prefers short texts.
    assert (problem.gradient(loss_of(return_to_go(rewards_BT, mask_BT))) - exact).norm() > 0.3 * exact.norm()


def pairs_gradient(problem, advantages_of_pairs):
    """E over pairs of independent texts of the mean over the two of Σ_t A_t ∇log π(y_t|s_t)."""
    pairs = list(itertools.product(TEXTS, TEXTS))
    mask_BT, rewards_BT, ids_BT, states_BT = batch_of([text for pair in pairs for text in pair], problem.rewards_SV)
    probability = {text: EVERY_TEXT.count(text) / 64 for text in TEXTS}
    weights_B = torch.tensor([probability[one] * probability[other] / 2 for one, other in pairs for _ in range(2)])
    advantages_BT = advantages_of_pairs(rewards_BT, mask_BT)
    terms_BT = weights_B[:, None] * advantages_BT * log_probs(problem.logits_SV, ids_BT, states_BT)
    return problem.gradient(terms_BT[mask_BT].sum())


def exact_for_pairs(problem):
    """∇E[Σ r] − E[ρ of the other] ∇E[T]: the gradient, had the other's average been a constant."""
    average_of_one = problem.expected(lambda text: problem.sum_of_rewards(text) / len(text)).detach()
    return problem.gradient(problem.expected(problem.sum_of_rewards) - average_of_one * problem.expected(len))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_average_of_the_prompts_other_samples_is_a_baseline(seed):
    """Over all pairs of samples, each the other's average: nothing of a sample's own actions is in its ρ."""
    problem = Enumerated(random_rewards(seed))

    def advantages(rewards_BT, mask_BT):
        average_B = average_reward(rewards_BT, mask_BT, num_generations=2)
        return return_to_go(differential_rewards(rewards_BT, mask_BT, average_B), mask_BT)

    exact = exact_for_pairs(problem)
    assert exact.abs().max() > 1e-2
    torch.testing.assert_close(pairs_gradient(problem, advantages), exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_leaving_one_out_of_differential_rewards_does_not_bias_them(seed, whole):
    """Token by token and, with the first token's advantage everywhere, for whole sequences."""
    problem = Enumerated(random_rewards(seed))
    settings = {"num_generations": 2}

    def advantages(rewards_BT, mask_BT, together=True):
        average_B = average_reward(rewards_BT, mask_BT, **settings)
        leave_one_out = partial(token_leave_one_out, mask_BT=mask_BT, **settings)
        if together:
            found_BT = differential_advantages(leave_one_out, rewards_BT, mask_BT, average_B)
        else:  # each by an average of its own
            found_BT = leave_one_out(differential_rewards(rewards_BT, mask_BT, average_B))
        return found_BT[:, :1].expand(-1, T) if whole else found_BT

    exact = exact_for_pairs(problem)
    torch.testing.assert_close(pairs_gradient(problem, advantages), exact, rtol=1e-10, atol=1e-12)
    biased = pairs_gradient(problem, partial(advantages, together=False))
    assert (biased - exact).norm() > 1e-2 * exact.norm()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_future_of_all_actions_too(seed):
    """Σ_a ∇π(a|s) g(s, a) needs no ρ, the sampled future does: together they are the gradient of E[Σ g] / E[T]."""
    problem = Enumerated(random_rewards(seed))
    mask_BT, rewards_BT, ids_BT, states_BT = batch_of(EVERY_TEXT, problem.rewards_SV)
    futures_BT = differential_advantages(
        partial(future_returns, mask_BT=mask_BT), rewards_BT, mask_BT, average_reward(rewards_BT, mask_BT)
    )
    immediate_S = (problem.logits_SV.softmax(dim=-1) * problem.rewards_SV).sum(dim=-1)
    future_BT = futures_BT * log_probs(problem.logits_SV, ids_BT, states_BT)
    surrogate = (immediate_S[states_BT] + future_BT)[mask_BT].sum() / mask_BT.sum()
    exact = problem.gradient(problem.average())
    torch.testing.assert_close(problem.gradient(surrogate), exact, rtol=1e-10, atol=1e-12)


# ---- what they are, by hand and in loops


def test_by_hand():
    # prompt 1: (−1 −2) and (−3); prompt 2: (−4 −4 −4) and, cut off, (−2 −2). Σ r = −22 over 8 tokens.
    rewards_BT = torch.tensor([[-1.0, -2.0, 9.0], [-3.0, 9.0, 9.0], [-4.0, -4.0, -4.0], [-2.0, -2.0, 9.0]])
    mask_BT = torch.tensor([[True, True, False], [True, False, False], [True, True, True], [True, True, False]])
    assert average_reward(rewards_BT, mask_BT).tolist() == [-2.75] * 4
    # each other's: −3/1, −3/2, −4/2, −12/3
    averages_B = average_reward(rewards_BT, mask_BT, num_generations=2)
    assert averages_B.tolist() == [-3.0, -1.5, -2.0, -4.0]
    differential_BT = differential_rewards(rewards_BT, mask_BT, averages_B)
    assert differential_BT.tolist() == [[2.0, 1.0, 0.0], [-1.5, 0.0, 0.0], [-2.0, -2.0, -2.0], [2.0, 2.0, 0.0]]


def averages_by_loop(rewards_BT, batch, K):
    sums = [sum(rewards_BT[i].tolist()[:length]) for i, length, _ in batch.rows]
    found = []
    for i, length, _ in batch.rows:
        others = [j for j in range(i // K * K, i // K * K + K) if j != i] if K else range(len(sums))
        tokens = sum(batch.lengths[j] for j in others)
        found.append(sum(sums[j] for j in others) / tokens if tokens else sums[i] / max(1, length))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [None, 2, 4, 8])
@pytest.mark.parametrize("seed", SEEDS)
def test_averages_match_the_loop(seed, K, dtype):
    """In every batch is a completion without a token, which counts for nothing; with K = 2 it leaves one alone."""
    batch, rewards_BT = ragged_batch(seed), normal(8, 6, seed=seed, dtype=dtype)
    found = average_reward(rewards_BT, batch.mask_BT, num_generations=K)
    expected = averages_by_loop(rewards_BT, batch, K)
    assert_matches(found, expected, dtype)
    differential = [
        [rewards_BT[i, t].item() - expected[i] if t < length else 0.0 for t in range(6)] for i, length, _ in batch.rows
    ]
    assert_matches(differential_rewards(rewards_BT, batch.mask_BT, found), differential, dtype)


@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize("of_future", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_advantages_match_the_loop(seed, of_future, gamma):
    """Completion i and the others of its prompt, all centred by i's ρ, position by position."""
    K, batch, rewards_BT = 4, ragged_batch(seed), normal(8, 6, seed=seed, dtype=torch.float64)
    averages = averages_by_loop(rewards_BT, batch, K)
    rows = []
    for i, length, _ in batch.rows:

        def to_come(j, t, average=averages[i]):
            first = t + 1 if of_future else t
            return sum(gamma ** (u - t) * (rewards_BT[j, u].item() - average) for u in range(first, batch.lengths[j]))

        others = [j for j in range(i // K * K, i // K * K + K) if j != i]
        row = [to_come(i, t) - sum(to_come(j, t) for j in others) / (K - 1) for t in range(length)]
        rows.append(row + [0.0] * (6 - length))

    def advantages_of(rewards_BT):
        if of_future:
            futures_BT = future_returns(rewards_BT, batch.mask_BT, gamma=gamma)
            return future_advantages(futures_BT, batch.mask_BT, num_generations=K)
        return token_leave_one_out(rewards_BT, batch.mask_BT, num_generations=K, gamma=gamma)

    average_B = average_reward(rewards_BT, batch.mask_BT, num_generations=K)
    assert_matches(differential_advantages(advantages_of, rewards_BT, batch.mask_BT, average_B), rows)


@pytest.mark.parametrize("K", [None, 2, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_constant_added_to_every_reward_changes_nothing(seed, K):
    batch, rewards_BT = ragged_batch(seed), normal(8, 6, seed=seed, dtype=torch.float64)
    found = []
    for constant in (0.0, -17.5):
        shifted_BT = rewards_BT + constant
        average_B = average_reward(shifted_BT, batch.mask_BT, num_generations=K)
        advantages_of = partial(token_leave_one_out, mask_BT=batch.mask_BT, num_generations=K or 2)
        found.append(
            (
                differential_rewards(shifted_BT, batch.mask_BT, average_B),
                differential_advantages(advantages_of, shifted_BT, batch.mask_BT, average_B),
            )
        )
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    assert found[0][0].abs().max() > 0.1 and found[0][1].abs().max() > 0.1


@pytest.mark.parametrize("K", [None, 2, 4])
def test_where_all_completions_are_alike_their_sum_is_zero(K):
    rewards_BT = torch.tensor([[-1.0, -5.0, 0.5, 7.0]] * 4, dtype=torch.float64)
    mask_BT = torch.tensor([[True, True, True, False]] * 4)
    average_B = average_reward(rewards_BT, mask_BT, num_generations=K)
    differential_BT = differential_rewards(rewards_BT, mask_BT, average_B)
    torch.testing.assert_close(differential_BT.sum(dim=1), torch.zeros(4).double(), rtol=0, atol=1e-12)
    assert differential_BT[0].abs().max() > 1


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("K", [None, 2])
def test_padding_is_ignored(K, poison):
    batch, rewards_BT = ragged_batch(0), normal(8, 6, seed=0)
    poisoned_BT = torch.where(batch.mask_BT, rewards_BT, torch.full_like(rewards_BT, poison))
    clean, found = (average_reward(x_BT, batch.mask_BT, num_generations=K) for x_BT in (rewards_BT, poisoned_BT))
    assert torch.equal(found, clean)
    differential_BT = differential_rewards(poisoned_BT, batch.mask_BT, found)
    assert torch.equal(differential_BT, differential_rewards(rewards_BT, batch.mask_BT, clean))
    assert (differential_BT[~batch.mask_BT] == 0).all()
    advantages_of = partial(token_leave_one_out, mask_BT=batch.mask_BT, num_generations=2)
    advantages = [differential_advantages(advantages_of, x, batch.mask_BT, found) for x in (rewards_BT, poisoned_BT)]
    assert torch.equal(advantages[0], advantages[1])


def test_over_ranks_it_is_the_average_of_the_whole_rollout():
    """Sums of rewards and of tokens are added up; the mean of two ranks' averages is another number."""
    batch, rewards_BT = ragged_batch(1), normal(8, 6, seed=1, dtype=torch.float64)
    halves = [(rewards_BT[i : i + 4], batch.mask_BT[i : i + 4]) for i in (0, 4)]
    sums = [torch.stack([torch.where(mask, x, torch.zeros_like(x)).sum(), mask.sum().double()]) for x, mask in halves]
    for (x_BT, mask_BT), other in zip(halves, reversed(sums), strict=True):
        found = average_reward(x_BT, mask_BT, sum_over_ranks=lambda own, other=other: own + other)
        torch.testing.assert_close(found, average_reward(rewards_BT, batch.mask_BT)[:4])
    assert abs(sum(float(s[0] / s[1]) for s in sums) / 2 - float(found[0])) > 1e-3


@pytest.mark.parametrize(("samples", "K"), [(4, 1), (5, 2), (4, 0)])
def test_groups_that_cannot_be_are_refused(samples, K):
    with pytest.raises(ValueError, match=f"{samples} samples in groups of {K}"):
        average_reward(torch.zeros(samples, 2), torch.ones(samples, 2, dtype=torch.bool), num_generations=K)
