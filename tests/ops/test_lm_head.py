import math

import pytest
import torch

from rlkd_trl.ops.lm_head import (
    allowed_logsumexp,
    logit_statistics,
    map_head_slices,
    mixture_log_probs,
    slices_needed,
    support_log_probs,
    token_log_probs,
)
from rlkd_trl.ops.losses import policy_gradient_loss
from tests.ops.ragged_batches import SEEDS, assert_matches, normal

N, V, D = 9, 13, 5


def random_logits(seed, scale=3.0):
    """Logits `[N, V]` off centre by −4, and chosen ids `[N]`."""
    chosen_N = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(seed))
    return normal(N, V, seed=seed, scale=scale) - 4, chosen_N


def logsumexp_by_loop(z):
    largest = max(z)
    return largest + math.log(math.fsum(math.exp(z_v - largest) for z_v in z))


def softmax_by_loop(z):
    logsumexp = logsumexp_by_loop(z)
    return [math.exp(z_v - logsumexp) for z_v in z]


def entropy_by_loop(p):
    return -math.fsum(p_v * math.log(p_v) for p_v in p)


# ---- logit statistics


@pytest.mark.parametrize("tau", [1.0, 0.3, 4.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_logit_statistics_match_the_loop(seed, tau):
    logits_NV, chosen_N = random_logits(seed)
    statistics = logit_statistics(logits_NV, chosen_N, expected=True, tau=tau)
    rows = logits_NV.tolist()
    assert_matches(statistics.chosen, [z[y] for z, y in zip(rows, chosen_N.tolist(), strict=True)], torch.float32)
    assert_matches(statistics.mean, [math.fsum(z) / V for z in rows], torch.float32)
    assert_matches(statistics.max, [max(z) for z in rows], torch.float32)
    assert_matches(statistics.logsumexp, [logsumexp_by_loop(z) for z in rows], torch.float32)
    expected = [math.fsum(p_v * z_v for p_v, z_v in zip(softmax_by_loop(z), z, strict=True)) for z in rows]
    assert_matches(statistics.expected, expected, torch.float32)
    soft = [tau * logsumexp_by_loop([z_v / tau for z_v in z]) for z in rows]
    assert_matches(statistics.soft, soft, torch.float32)


def test_logit_statistics_by_hand():
    # z = (0, ln 3), the second chosen: Σ exp z = 1 + 3, p = (¼, ¾), Σ p z = ¾ ln 3
    # τ = ½: ½ ln(exp 0 + exp(2 ln 3)) = ½ ln(1 + 9)
    ln3 = math.log(3)
    statistics = logit_statistics(torch.tensor([[0.0, ln3]]), torch.tensor([1]), expected=True, tau=0.5)
    expected = [ln3, ln3 / 2, ln3, math.log(4), 0.75 * ln3, 0.5 * math.log(10)]
    assert_matches(torch.cat(list(statistics)), expected, torch.float32)


def test_expected_and_soft_only_on_request():
    logits_NV, chosen_N = random_logits(0)
    assert logit_statistics(logits_NV, chosen_N)[4:] == (None, None)
    assert logit_statistics(logits_NV, chosen_N, expected=True).soft is None
    assert logit_statistics(logits_NV, chosen_N, tau=1.0).expected is None


def test_the_values_of_a_state_are_ordered():
    """mean ≤ expected ≤ max ≤ soft, and soft tends to max as τ → 0."""
    logits_NV, chosen_N = random_logits(0)
    statistics = logit_statistics(logits_NV, chosen_N, expected=True, tau=1.0)
    assert (statistics.mean < statistics.expected).all() and (statistics.expected < statistics.max).all()
    assert (statistics.max < statistics.soft).all()
    torch.testing.assert_close(logit_statistics(logits_NV, chosen_N, tau=1e-3).soft, statistics.max)


def test_gradients_of_the_logit_statistics():
    logits_NV, chosen_N = random_logits(1)
    logits_NV.requires_grad_()
    tau = 2.0
    statistics = logit_statistics(logits_NV, chosen_N, expected=True, tau=tau)
    found = [torch.autograd.grad(statistic.sum(), logits_NV, retain_graph=True)[0] for statistic in statistics]
    z = logits_NV.detach().double()
    p = z.softmax(-1)
    expected = [
        torch.nn.functional.one_hot(chosen_N, V).double(),
        torch.full_like(z, 1 / V),
        torch.nn.functional.one_hot(z.argmax(-1), V).double(),
        p,
        p * (1 + z - (p * z).sum(-1, keepdim=True)),  # d/dz_u Σ p_v z_v = p_u + p_u (z_u − Σ p_v z_v)
        (z / tau).softmax(-1),
    ]
    for found_NV, expected_NV in zip(found, expected, strict=True):
        torch.testing.assert_close(found_NV.double(), expected_NV, rtol=1e-5, atol=1e-5)


# ---- token log-probs

FORBIDDEN_IDS = [0, 7, 12]


def forbidden_mask():
    forbidden_V = torch.zeros(V, dtype=torch.bool)
    forbidden_V[FORBIDDEN_IDS] = True
    return forbidden_V


@pytest.mark.parametrize("forbid", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_token_log_probs_match_the_softmax_over_the_allowed_ids(seed, temperature, forbid):
    logits_NV, _ = random_logits(seed)
    allowed = [v for v in range(V) if not (forbid and v in FORBIDDEN_IDS)]
    chosen = [allowed[(3 * i + seed) % len(allowed)] for i in range(N)]
    result = token_log_probs(
        logits_NV,
        torch.tensor(chosen),
        temperature=temperature,
        forbidden_V=forbidden_mask() if forbid else None,
    )
    policies = [softmax_by_loop([z[v] / temperature for v in allowed]) for z in logits_NV.tolist()]
    expected = [math.log(p[allowed.index(y)]) for p, y in zip(policies, chosen, strict=True)]
    assert_matches(result.logps, expected, torch.float32)
    assert_matches(result.entropy, [entropy_by_loop(p) for p in policies], torch.float32)


@pytest.mark.parametrize("padding", [-2, 0, 3])
def test_the_normaliser_over_the_allowed_ids(padding):
    """z_y less it is `token_log_probs`' log p(y); rows beyond the shorter of head and mask count on neither side."""
    logits_NV, _ = random_logits(0)
    forbidden_V = torch.nn.functional.pad(forbidden_mask(), (0, padding))
    allowed = [v for v in range(V + min(padding, 0)) if v not in FORBIDDEN_IDS]
    found_N = allowed_logsumexp(logits_NV.bfloat16(), forbidden_V)
    rows = logits_NV.bfloat16().tolist()
    assert_matches(found_N, [logsumexp_by_loop([z[v] for v in allowed]) for z in rows], torch.float32)


def test_token_log_probs_by_hand():
    # z = (ln 9, 0, 5), the third forbidden. Temperature 1: p = (9, 1)/10. Temperature 2: √9 = 3, p = (3, 1)/4.
    logits_NV, forbidden_V = torch.tensor([[math.log(9), 0.0, 5.0]]), torch.tensor([False, False, True])
    for temperature, p in ((1.0, 0.9), (2.0, 0.75)):
        result = token_log_probs(logits_NV, torch.tensor([0]), temperature=temperature, forbidden_V=forbidden_V)
        assert_matches(result.logps, [math.log(p)], torch.float32)
        assert_matches(result.entropy, [-p * math.log(p) - (1 - p) * math.log(1 - p)], torch.float32)


def test_a_forbidden_id_gets_no_gradient_even_when_it_is_chosen():
    """Its log-probability is −2e38 − log Σ e^z over the others: what autograd makes of that."""
    logits_NV, forbidden_V = normal(4, V, seed=3).requires_grad_(), forbidden_mask()
    chosen_N = torch.tensor([7, 1, FORBIDDEN_IDS[0], 2])
    found = torch.autograd.grad(token_log_probs(logits_NV, chosen_N, forbidden_V=forbidden_V).logps.sum(), logits_NV)[
        0
    ]
    masked_NV = logits_NV.masked_fill(forbidden_V, torch.finfo(torch.float32).min)
    logps_N = masked_NV.log_softmax(dim=-1).gather(-1, chosen_N[:, None])
    assert_matches(found, torch.autograd.grad(logps_N.sum(), logits_NV)[0].tolist())
    assert (found[:, forbidden_V] == 0).all()


def test_a_forbidden_id_has_a_finite_and_vanishing_probability():
    logits_NV, _ = random_logits(0)
    logps_N, entropy_N = token_log_probs(logits_NV, torch.full((N,), 7), forbidden_V=forbidden_mask())
    assert logps_N.isfinite().all() and (logps_N < -1e38).all()
    assert entropy_N.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.finfo(torch.float32).min])
def test_what_the_logit_of_a_forbidden_id_is_does_not_matter(value):
    logits_NV, _ = random_logits(0)
    chosen_N = torch.tensor([1, FORBIDDEN_IDS[1], 2] * 3)
    expected = token_log_probs(logits_NV, chosen_N, forbidden_V=forbidden_mask())
    logits_NV[:, FORBIDDEN_IDS] = value
    found = token_log_probs(logits_NV.requires_grad_(), chosen_N, forbidden_V=forbidden_mask())
    for ours_N, theirs_N in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_N, theirs_N, rtol=0, atol=0)
    (gradient_NV,) = torch.autograd.grad((found.logps + found.entropy).sum(), logits_NV)
    assert gradient_NV.isfinite().all() and (gradient_NV[:, FORBIDDEN_IDS] == 0).all()


def test_one_allowed_id_leaves_no_choice():
    forbidden_V = torch.ones(V, dtype=torch.bool)
    forbidden_V[3] = False
    logits_NV, _ = random_logits(0)
    logps_N, entropy_N = token_log_probs(logits_NV, torch.full((N,), 3), forbidden_V=forbidden_V)
    assert logps_N.tolist() == entropy_N.tolist() == [0.0] * N


@pytest.mark.parametrize("forbid", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_of_log_probs_and_entropy(seed, temperature, forbid):
    """d log π(y) / dz_v = (1[v = y] − π_v) / T; dH / dz_v = −π_v (log π_v + H) / T; 0 for forbidden ids."""
    logits_NV, _ = random_logits(seed)
    logits_NV.requires_grad_()
    chosen_N = torch.arange(1, N + 1) % 6 + 1  # 1 .. 6, none of them forbidden
    forbidden_V = forbidden_mask() if forbid else torch.zeros(V, dtype=torch.bool)
    result = token_log_probs(logits_NV, chosen_N, temperature=temperature, forbidden_V=forbidden_V if forbid else None)

    p = (logits_NV.detach().double() / temperature).exp() * ~forbidden_V
    p = p / p.sum(-1, keepdim=True)
    log_p = torch.where(forbidden_V, 0.0, p.log())
    entropy = -(p * log_p).sum(-1, keepdim=True)
    chosen_NV = torch.nn.functional.one_hot(chosen_N, V)

    found, expected = torch.autograd.grad(result.logps.sum(), logits_NV, retain_graph=True)[0], (chosen_NV - p)
    torch.testing.assert_close(found.double(), expected / temperature, rtol=1e-5, atol=1e-6)
    found, expected = torch.autograd.grad(result.entropy.sum(), logits_NV)[0], -p * (log_p + entropy)
    torch.testing.assert_close(found.double(), expected / temperature, rtol=1e-5, atol=2e-5)
    assert (found[:, forbidden_V] == 0).all()


@pytest.mark.parametrize("scale", [0.01, -1.0, 3.0, 65536.0])
def test_the_entropy_gradient_scales_with_a_loss_scale(scale):
    """A loss multiplied up (loss scaling, a sum over many tokens) must not overflow at the forbidden ids."""
    logits_NV, chosen_N = random_logits(0)
    gradients = []
    for factor in (1.0, scale):
        logits_NV = logits_NV.detach().requires_grad_()
        entropy_N = token_log_probs(logits_NV, chosen_N, forbidden_V=forbidden_mask()).entropy
        gradients.append(torch.autograd.grad(factor * entropy_N.sum(), logits_NV)[0])
    assert gradients[1].isfinite().all()
    torch.testing.assert_close(gradients[1] / scale, gradients[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offset", [100.0, -100.0])
def test_a_constant_added_to_the_logits_costs_no_more_than_its_rounding(offset):
    """T5's logits lie far from 0, all on one side. A softmax that sums to 1 only up to the rounding of z − logsumexp z
    (8e-6 near 100) makes Σ π z, and so entropy and expected value, wrong by 100 times that."""
    logits_NV, chosen_N = random_logits(0)
    shifted_NV = logits_NV + offset
    z = shifted_NV.double()
    log_p = z.log_softmax(-1)
    result = token_log_probs(shifted_NV, chosen_N)
    statistics = logit_statistics(shifted_NV, chosen_N, expected=True)
    for found_N, expected_N in [
        (result.logps, log_p.gather(-1, chosen_N[:, None]).squeeze(-1)),
        (result.entropy, -(log_p.exp() * log_p).sum(-1)),
        (statistics.expected - statistics.mean, (log_p.exp() * z).sum(-1) - z.mean(-1)),
    ]:
        torch.testing.assert_close(found_N.double(), expected_N, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows_in_a_block", [1, 2, 100])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("forbid", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_blocks_of_positions_and_the_logits_own_memory_change_nothing(overwrite, forbid, entropy, rows_in_a_block):
    leaf_NV = random_logits(0)[0].requires_grad_()
    chosen_N = torch.arange(1, N + 1) % 6 + 1  # 1 .. 6, none of them forbidden
    forbidden_V = forbidden_mask() if forbid else torch.zeros(V, dtype=torch.bool)
    logits_NV = leaf_NV * 1  # not a leaf, as a head's output
    found = token_log_probs(
        logits_NV,
        chosen_N,
        temperature=0.7,
        forbidden_V=forbidden_V if forbid else None,
        entropy=entropy,
        overwrite=overwrite,
        block_elements=rows_in_a_block * V,
    )
    p_NV = leaf_NV.double() / 0.7
    log_p_NV = p_NV.masked_fill(forbidden_V, -1e30).log_softmax(dim=-1)
    expected = [log_p_NV.gather(-1, chosen_N[:, None]).squeeze(-1), -(log_p_NV.exp() * log_p_NV).sum(dim=-1)]
    weights_2N = normal(2, N, seed=1)
    outputs = found if entropy else found[:1]
    for ours_N, theirs_N in zip(outputs, expected, strict=False):
        torch.testing.assert_close(ours_N.double(), theirs_N, rtol=1e-5, atol=1e-5)
    ours_NV, theirs_NV = (
        torch.autograd.grad(sum((w_N * x_N).sum() for w_N, x_N in zip(weights_2N, some, strict=False)), leaf_NV)[0]
        for some in (outputs, expected[: len(outputs)])
    )
    torch.testing.assert_close(ours_NV, theirs_NV, rtol=1e-5, atol=1e-5)
    assert (found.entropy is None) != entropy
    assert torch.equal(logits_NV, leaf_NV) is not overwrite


def test_overwritten_logits_take_one_backward_pass_and_say_so():
    leaf_NV, chosen_N = random_logits(0)
    logits_NV = leaf_NV.requires_grad_() * 1
    logps_N = token_log_probs(logits_NV, chosen_N, overwrite=True).logps
    torch.autograd.grad(logps_N.sum(), leaf_NV, retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(logps_N.sum(), leaf_NV)


def test_what_is_overwritten_may_not_be_needed_by_what_made_it():
    """tanh's gradient is read from its output: autograd notices, where nothing is recomputed."""
    leaf_NV, chosen_N = random_logits(0)
    logps_N = token_log_probs(leaf_NV.requires_grad_().tanh(), chosen_N, overwrite=True).logps
    with pytest.raises(RuntimeError, match="inplace"):
        logps_N.sum().backward()


def test_a_very_unlikely_token_keeps_its_log_probability():
    """Its probability is no float32, or nearly so, and 0 in the softmax; log π and the entropy are what they are."""
    logits_NV = torch.tensor([[0.0, -200.0, -80.0, -1.0]], requires_grad=True)
    (gradient_NV,) = torch.autograd.grad(token_log_probs(logits_NV, torch.tensor([0])).logps, logits_NV)
    assert gradient_NV[0, 1] == gradient_NV[0, 2] == 0 and gradient_NV[0, 3] < -0.2
    logits_NV = logits_NV.detach()
    for chosen in range(4):
        logps_N, entropy_N = token_log_probs(logits_NV, torch.tensor([chosen]))
        log_p = logits_NV.double().log_softmax(dim=-1)[0]
        assert_matches(logps_N, [float(log_p[chosen])])
        assert_matches(entropy_N, [float(-(log_p.exp() * log_p).sum())])


# ---- half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_they_are_float32_all_the_same(dtype):
    """Forbidden ids included, whose logits float16 cannot hold."""
    logits_NV = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    chosen_N, forbidden_V = torch.tensor([1, 2, 3, 4]), torch.arange(1000) % 7 == 0

    def found():
        logps_N, entropy_N = token_log_probs(logits_NV, chosen_N, forbidden_V=forbidden_V)
        (gradient_NV,) = torch.autograd.grad((logps_N + 0.3 * entropy_N).sum(), logits_NV)
        return logps_N, entropy_N, gradient_NV

    expected = found()
    with torch.autocast("cpu", dtype=dtype):
        for ours, theirs in zip(found(), expected, strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_upcast_before_any_statistic(dtype):
    """bf16 holds 8 bits: a sum, a quotient or a logsumexp taken in it is off in the third digit."""
    logits_NV = normal(6, 500, seed=0, scale=4.0).to(dtype)
    chosen_N = torch.arange(6)
    rows, temperature = logits_NV.double().tolist(), 0.7
    logsumexp = [logsumexp_by_loop(z) for z in rows]

    # The trap is real: taken in the logits' own dtype, the same statistic is far outside the tolerance below.
    in_own_dtype_N = logits_NV.logsumexp(-1).double()
    assert (in_own_dtype_N - torch.tensor(logsumexp)).abs().max() > 1e-3

    def assert_upcast(statistic_N, expected):
        assert statistic_N.dtype == torch.float32
        torch.testing.assert_close(statistic_N, torch.tensor(expected), rtol=1e-5, atol=5e-5)

    statistics = logit_statistics(logits_NV, chosen_N, expected=True, tau=temperature)
    assert_upcast(statistics.chosen, [z[i] for i, z in enumerate(rows)])
    assert_upcast(statistics.mean, [math.fsum(z) / 500 for z in rows])
    assert_upcast(statistics.max, [max(z) for z in rows])
    assert_upcast(statistics.logsumexp, logsumexp)
    expected = [math.fsum(p_v * z_v for p_v, z_v in zip(softmax_by_loop(z), z, strict=True)) for z in rows]
    assert_upcast(statistics.expected, expected)
    soft = [temperature * logsumexp_by_loop([z_v / temperature for z_v in z]) for z in rows]
    assert_upcast(statistics.soft, soft)

    result = token_log_probs(logits_NV, chosen_N, temperature=temperature)
    policies = [softmax_by_loop([z_v / temperature for z_v in z]) for z in rows]
    assert_upcast(result.logps, [math.log(p[i]) for i, p in enumerate(policies)])
    assert_upcast(result.entropy, [entropy_by_loop(p) for p in policies])


# ---- log-probs over the ids that were sampled from


def top_ids(logits_NV, k):
    return logits_NV.topk(k, dim=-1).indices


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_support_log_probs_match_the_softmax_over_the_support(seed, k, temperature):
    """The support is the top k of other logits, as that of a behaviour policy is."""
    logits_NV, _ = random_logits(seed)
    support_Nk = top_ids(random_logits(seed + 7)[0], k)
    chosen_N = support_Nk[torch.arange(N), torch.arange(N) % k]
    result = support_log_probs(logits_NV, chosen_N, support_Nk, temperature=temperature)
    logps, entropies = [], []
    for z, y, support in zip(logits_NV.tolist(), chosen_N.tolist(), support_Nk.tolist(), strict=True):
        policy = dict(zip(support, softmax_by_loop([z[v] / temperature for v in support]), strict=True))
        logps.append(math.log(policy[y]))
        entropies.append(entropy_by_loop(policy.values()))
    assert_matches(result.logps, logps, torch.float32)
    assert_matches(result.entropy, entropies, torch.float32)


def test_support_log_probs_by_hand():
    # z = (ln 3, 5, 0), S = {2, 0}: probabilities ¼ and ¾, the second id's 5 does not count
    logits_NV = torch.tensor([[math.log(3), 5.0, 0.0]])
    result = support_log_probs(logits_NV, torch.tensor([0]), torch.tensor([[2, 0]]))
    assert_matches(result.logps, [math.log(0.75)], torch.float32)
    assert_matches(result.entropy, [-0.25 * math.log(0.25) - 0.75 * math.log(0.75)], torch.float32)


def test_with_every_id_in_the_support_it_is_the_whole_distribution():
    logits_NV, chosen_N = random_logits(0)
    whole = token_log_probs(logits_NV, chosen_N)
    over_all = support_log_probs(logits_NV, chosen_N, top_ids(logits_NV, V))
    torch.testing.assert_close(over_all.logps, whole.logps)
    torch.testing.assert_close(over_all.entropy, whole.entropy)


def test_only_the_support_gets_a_gradient_and_its_total_none():
    logits_NV, _ = random_logits(1)
    support_Nk = top_ids(logits_NV, 3)
    logits_NV.requires_grad_()
    result = support_log_probs(logits_NV, support_Nk[:, 1], support_Nk)
    (gradient_NV,) = torch.autograd.grad((result.logps + 0.3 * result.entropy).sum(), logits_NV)
    inside_NV = torch.zeros(N, V, dtype=torch.bool).scatter(1, support_Nk, True)
    assert (gradient_NV[~inside_NV] == 0).all() and (gradient_NV[inside_NV] != 0).all()
    torch.testing.assert_close(gradient_NV.sum(dim=1), torch.zeros(N), atol=1e-6, rtol=0)


@pytest.mark.parametrize("constant", [0.0, 10.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_ratio_over_the_support_makes_the_expected_gradient_that_of_the_restricted_policy(seed, constant):
    """Five tokens, all outcomes of sampling from the behaviour policy's top 3, weighted by their probabilities.

    Their policy gradients add up to ∇ Σ_{y∈S} π_S(y) A(y), whatever constant is added to A; with π over the whole
    vocabulary in the ratio's numerator, the constant changes the sum.
    """
    behaviour_V, policy_V, advantages_V = (normal(5, seed=10 * seed + i, scale=2.0) for i in range(3))
    support_k = top_ids(behaviour_V[None], 3)[0]
    sampled_k = behaviour_V[support_k].softmax(-1)  # what is sampled from

    policy_V.requires_grad_()
    objective = (policy_V[support_k].softmax(-1) * advantages_V[support_k]).sum()
    (expected,) = torch.autograd.grad(-objective, policy_V)

    def gradient(numerator_logps_k):
        loss, _ = policy_gradient_loss(
            numerator_logps_k[:, None],
            sampled_k.log()[:, None],
            # the share of samples that have this outcome is in the weight
            (sampled_k * (advantages_V[support_k] + constant))[:, None],
            torch.ones(3, 1, dtype=torch.bool),
            denominator=1.0,
        )
        return torch.autograd.grad(loss, policy_V)[0]

    logits_kV = policy_V.expand(3, -1)
    over_support = support_log_probs(logits_kV, support_k, support_k.expand(3, -1)).logps
    torch.testing.assert_close(gradient(over_support), expected, rtol=1e-4, atol=1e-5)
    over_all = token_log_probs(policy_V.expand(3, -1), support_k).logps
    assert (gradient(over_all) - expected).abs().max() > 1e-3


# ---- the mixture of teacher and student


@pytest.mark.parametrize("teacher_rows", [V - 4, V, V + 3])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("weight", [0.0, 0.2, 1.0])
def test_mixture_log_probs_match_the_loop(weight, temperature, teacher_rows):
    student_NV, teacher_NU = random_logits(0)[0], normal(N, teacher_rows, seed=5, scale=3.0)
    common = min(V, teacher_rows)
    allowed = [v for v in range(common) if v not in FORBIDDEN_IDS]
    expected = torch.full((N, common), -math.inf, dtype=torch.float64)
    for n, (z_student, z_teacher) in enumerate(zip(student_NV.tolist(), teacher_NU.tolist(), strict=True)):
        q = softmax_by_loop([z_student[v] / temperature for v in allowed])
        p = softmax_by_loop([z_teacher[v] / temperature for v in allowed])
        for v, q_v, p_v in zip(allowed, q, p, strict=True):
            expected[n, v] = math.log(weight * p_v + (1 - weight) * q_v)
    settings = {"weight": weight, "temperature": temperature, "forbidden_V": forbidden_mask()}
    assert_matches(mixture_log_probs(student_NV, teacher_NU, **settings), expected.tolist(), torch.float32)


def test_mixture_log_probs_by_hand():
    # The third id is forbidden and the teacher's fourth is beyond the student's head.
    # Temperature 1: q = (3, 1)/4, p = (1, 3)/4, 0.2 · 1/4 + 0.8 · 3/4 = 0.65.
    # Temperature ½: 3² = 9, q = (9, 1)/10, p = (1, 9)/10, 0.2 · 1/10 + 0.8 · 9/10 = 0.74.
    ln3, forbidden_V = math.log(3), torch.tensor([False, False, True])
    student_1V, teacher_1U = torch.tensor([[ln3, 0.0, 5.0]]), torch.tensor([[0.0, ln3, 7.0, 9.0]])
    for temperature, first in ((1.0, 0.65), (0.5, 0.74)):
        result = mixture_log_probs(
            student_1V, teacher_1U, weight=0.2, temperature=temperature, forbidden_V=forbidden_V
        )
        assert_matches(result, [[math.log(first), math.log(1 - first), -math.inf]], torch.float32)


def test_a_mixture_of_half_precision_logits_is_taken_in_float32():
    """At 16 bits, softmax would round the probabilities to multiples of 2⁻⁹ and coarser; these logits are exact."""
    student_NV, teacher_NV = (normal(N, V, seed=seed).to(torch.bfloat16) for seed in (1, 2))
    forbidden_V = forbidden_mask()
    found = mixture_log_probs(student_NV, teacher_NV, weight=0.5, forbidden_V=forbidden_V)
    expected = mixture_log_probs(student_NV.float(), teacher_NV.float(), weight=0.5, forbidden_V=forbidden_V)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# ---- slices


class CountingHead:
    """A linear LM head that notes how many positions it is given at a time."""

    def __init__(self, seed=0, dtype=torch.float32):
        self.weight_VD = normal(V, D, seed=seed).to(dtype).requires_grad_()
        self.calls = []

    def __call__(self, hidden_nD):
        self.calls.append(hidden_nD.shape[0])
        return hidden_nD @ self.weight_VD.T


def all_statistics(logits_nV, chosen_n):
    logps_n, entropy_n = token_log_probs(logits_nV, chosen_n, forbidden_V=forbidden_mask())
    return (*logit_statistics(logits_nV, chosen_n, expected=True), logps_n, entropy_n)


def random_positions(n=N, seed=0):
    hidden_ND = normal(n, D, seed=seed).requires_grad_()
    return hidden_ND, torch.arange(n) % 6 + 1  # chosen ids 1 .. 6, none of them forbidden


# (logits allowed at a time, positions per slice): V = 13, N = 9
BUDGETS = [
    (V, [1] * 9),
    (2 * V, [2, 2, 2, 2, 1]),
    (3 * V - 1, [2, 2, 2, 2, 1]),
    (3 * V, [3, 3, 3]),
    (8 * V, [8, 1]),
    (9 * V, [9]),
    (10**6, [9]),
]


@pytest.mark.parametrize(("max_elements", "slices"), BUDGETS)
def test_slices_give_what_the_whole_gives(max_elements, slices):
    hidden_ND, chosen_N = random_positions()
    head = CountingHead()
    outputs = map_head_slices(head, hidden_ND, all_statistics, chosen_N, vocab_size=V, max_elements=max_elements)
    assert head.calls == slices
    expected = all_statistics(hidden_ND @ head.weight_VD.T, chosen_N)
    assert outputs[5] is expected[5] is None  # soft was not asked for
    kept = [(output, whole) for output, whole in zip(outputs, expected, strict=True) if whole is not None]
    assert len(kept) == 7
    for output, whole in kept:
        torch.testing.assert_close(output, whole, rtol=1e-5, atol=1e-6)

    weights_N = 0.1 * normal(N, seed=3)
    inputs = [hidden_ND, head.weight_VD]
    found = torch.autograd.grad(sum((output * weights_N).sum() for output, _ in kept), inputs)
    whole = torch.autograd.grad(sum((whole * weights_N).sum() for _, whole in kept), inputs)
    for found_gradient, whole_gradient in zip(found, whole, strict=True):
        torch.testing.assert_close(found_gradient, whole_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("max_elements", "slices"), BUDGETS)
def test_the_backward_pass_holds_one_slice_of_logits_at_a_time(max_elements, slices):
    hidden_ND, chosen_N = random_positions()
    head = CountingHead()
    stored = []

    def store(tensor):
        if tensor.dim() == 2 and tensor.shape[-1] == V:
            stored.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
        outputs = map_head_slices(head, hidden_ND, all_statistics, chosen_N, vocab_size=V, max_elements=max_elements)
    if len(slices) > 1:
        assert stored == [], "the forward pass of several slices keeps logits for the backward pass"
    else:
        assert stored, "one slice needs no second forward pass"

    head.calls.clear()
    sum(output.sum() for output in outputs if output is not None).backward()
    # recomputed, each slice once, in any order; a single slice is not recomputed
    assert sorted(head.calls) == (sorted(slices) if len(slices) > 1 else [])
    assert hidden_ND.grad.abs().min() > 0 and head.weight_VD.grad is not None


def test_nothing_is_recomputed_without_gradients():
    hidden_ND, chosen_N = random_positions()
    head = CountingHead()
    with torch.no_grad():
        outputs = map_head_slices(head, hidden_ND, logit_statistics, chosen_N, vocab_size=V, max_elements=4 * V)
    assert head.calls == [4, 4, 1]
    assert [output is None for output in outputs] == [False] * 4 + [True] * 2
    assert not any(output.requires_grad for output in outputs[:4])


def test_a_budget_below_one_row_still_takes_one_position_at_a_time():
    hidden_ND, chosen_N = random_positions()
    head = CountingHead()
    map_head_slices(head, hidden_ND, logit_statistics, chosen_N, vocab_size=V, max_elements=V - 1)
    assert head.calls == [1] * N


def test_positions_keep_their_own_arguments():
    """Each position's tensors travel with it: hidden states one-hot, so that the logits name the position."""
    hidden_ND = torch.eye(6)
    labels_N, weights_N = torch.arange(6), torch.arange(6) * 10.0

    def per_slice(logits_nV, labels_n, weights_n):
        return logits_nV.argmax(dim=-1), labels_n, weights_n

    outputs = map_head_slices(
        lambda hidden: hidden, hidden_ND, per_slice, labels_N, weights_N, vocab_size=6, max_elements=4 * 6
    )
    assert [output.tolist() for output in outputs] == [[0, 1, 2, 3, 4, 5]] * 2 + [[0, 10, 20, 30, 40, 50]]


def test_as_many_slices_as_another_process_needs():
    """9 positions, 4 to a slice: 3 are needed, and where another process needs 5, two have nothing in them."""
    hidden_ND, chosen_N = random_positions()
    settings = {"vocab_size": V, "max_elements": 4 * V}
    assert slices_needed(N, **settings) == 3 and slices_needed(0, **settings) == 1
    heads = CountingHead(), CountingHead()
    few = map_head_slices(heads[0], hidden_ND, all_statistics, chosen_N, **settings)
    many = map_head_slices(heads[1], hidden_ND, all_statistics, chosen_N, **settings, num_slices=5)
    assert heads[0].calls == [4, 4, 1] and heads[1].calls == [4, 4, 1, 0, 0]
    assert all(one is other is None or torch.equal(one, other) for one, other in zip(few, many, strict=True))
    gradients = [
        torch.autograd.grad(sum(o.sum() for o in outputs if o is not None), [hidden_ND, head.weight_VD])
        for outputs, head in ((few, heads[0]), (many, heads[1]))
    ]
    assert heads[1].calls == [4, 4, 1, 0, 0, 0, 0, 1, 4, 4], "each once more in the backward pass, last one first"
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("max_elements", [V, 10**6])
def test_no_positions(max_elements):
    hidden_ND, chosen_N = random_positions(n=0)
    head = CountingHead()
    outputs = map_head_slices(head, hidden_ND, all_statistics, chosen_N, vocab_size=V, max_elements=max_elements)
    assert [None if output is None else output.shape for output in outputs] == [(0,)] * 5 + [None] + [(0,)] * 2
    sum(output.sum() for output in outputs if output is not None).backward()
    assert (head.weight_VD.grad == 0).all() and hidden_ND.grad.shape == (0, D)


@pytest.mark.parametrize("max_elements", [2 * V, 10**6])
def test_a_half_precision_head_gives_float32_statistics_and_half_precision_gradients(max_elements):
    head = CountingHead(dtype=torch.bfloat16)
    hidden_ND = normal(N, D, seed=1).bfloat16().requires_grad_()
    chosen_N = torch.arange(N) % 6 + 1
    outputs = map_head_slices(head, hidden_ND, token_log_probs, chosen_N, vocab_size=V, max_elements=max_elements)
    logits = (hidden_ND @ head.weight_VD.T).double().tolist()
    policies = [softmax_by_loop(z) for z in logits]
    expected = [math.log(p[y]) for p, y in zip(policies, chosen_N.tolist(), strict=True)]
    assert_matches(outputs[0], expected, torch.float32)
    outputs[0].sum().backward()
    assert hidden_ND.grad.dtype == head.weight_VD.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("with_gradient, mebibytes", [(False, 8), (True, 64)])
def test_the_default_slice(with_gradient, mebibytes):
    """On a CPU 8 MiB of float32 logits, which a cache holds; 64 where each slice is computed twice."""
    vocab_size = 2**18
    rows = []

    def head(hidden_ND):
        rows.append(len(hidden_ND))
        return hidden_ND.expand(-1, 7)

    hidden_ND = torch.randn(100, 1, requires_grad=with_gradient)
    with torch.set_grad_enabled(with_gradient):
        map_head_slices(head, hidden_ND, lambda logits: (logits.sum(dim=-1),), vocab_size=vocab_size)
    assert max(rows) * vocab_size * 4 == mebibytes * 2**20 and sum(rows) == 100


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_log_probs_is_autograds(temperature, dtype):
    """Of both outputs together and of each alone, against plain float64 operations."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = (4 * torch.randn(5, 11, generator=generator)).to(dtype)
    chosen_N = torch.tensor([1, 2, 9, 4, 1])
    forbidden_V = torch.zeros(11, dtype=torch.bool)
    forbidden_V[[0, 10]] = True
    weights_2N = torch.randn(2, 5, generator=generator)

    def gradient(parts, logits_NV, weights):
        logits_NV = logits_NV.detach().requires_grad_()
        loss = sum((w * part).sum() for w, part in zip(weights, parts(logits_NV), strict=True) if w is not None)
        return torch.autograd.grad(loss, logits_NV)[0]

    def plain(logits_NV):
        logps_NV = (logits_NV / temperature)[:, ~forbidden_V].log_softmax(dim=-1)  # ids 1 .. 9
        return logps_NV.gather(-1, chosen_N[:, None] - 1)[:, 0], -(logps_NV.exp() * logps_NV).sum(dim=-1)

    def ours(logits_NV):
        return token_log_probs(logits_NV, chosen_N, temperature=temperature, forbidden_V=forbidden_V)

    for weights in ((weights_2N[0], weights_2N[1]), (weights_2N[0], None), (None, weights_2N[1])):
        found = gradient(ours, logits_NV, weights)
        assert found.dtype == dtype
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
        torch.testing.assert_close(found.double(), gradient(plain, logits_NV.double(), weights), **tolerance)


def test_log_probs_without_the_entropy():
    """The same log-probabilities, and the same gradient, which is all that is left."""
    logits_NV, chosen_N = random_logits(0)
    gradients = []
    for entropy in (True, False):
        logits_NV = logits_NV.detach().requires_grad_()
        found = token_log_probs(logits_NV, chosen_N, forbidden_V=forbidden_mask(), entropy=entropy)
        assert (found.entropy is None) is not entropy
        gradients.append((found.logps.detach(), torch.autograd.grad(found.logps.sum(), logits_NV)[0]))
    for with_entropy, without in zip(*gradients, strict=True):
        torch.testing.assert_close(without, with_entropy, rtol=0, atol=0)
