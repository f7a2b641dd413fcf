import math
from functools import partial

import pytest
import torch

from rlkd_trl.ops.divergences import (
    DIVERGENCES,
    ENSEMBLES,
    distillation_loss,
    forward_kl,
    jsd,
    log_probs,
    mean_of_logits,
    mean_of_probabilities,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    tvd,
)
from tests.ops.ragged_batches import SEEDS, assert_matches, normal

N, V = 7, 11
FORBIDDEN = {0, 8, 10}

# Every divergence, those with a coefficient at several of its values.
CASES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "tvd": tvd,
    **{f"jsd {beta}": partial(jsd, beta=beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0)},
    **{f"skew_kl {skew}": partial(skew_kl, skew=skew) for skew in (0.0, 0.1, 0.7)},
    **{f"skew_reverse_kl {skew}": partial(skew_reverse_kl, skew=skew) for skew in (0.0, 0.1, 0.7)},
}
TEMPERATURES = [1.0, 0.5, 4.0]


def forbidden_mask():
    return torch.tensor([v in FORBIDDEN for v in range(V)])


# ---- the papers' equations, in loops over Python's floats


def log_probs_by_loop(z, temperature=1.0, forbidden=()):
    """log softmax(z / T) of the allowed ids, as {id: log-probability}."""
    z = {v: z_v / temperature for v, z_v in enumerate(z) if v not in forbidden}
    largest = max(z.values())
    logsumexp = largest + math.log(math.fsum(math.exp(z_v - largest) for z_v in z.values()))
    return {v: z_v - logsumexp for v, z_v in z.items()}


def kl_by_loop(log_p, log_q):
    return math.fsum(math.exp(log_p[v]) * (log_p[v] - log_q[v]) for v in log_p if math.exp(log_p[v]) > 0)


def mixture_by_loop(log_p, log_q, share):
    """log(share p + (1 − share) q), only where it can be taken: elsewhere p and q are 0."""
    if share in (0, 1):
        return log_p if share else log_q
    found = {v: share * math.exp(log_p[v]) + (1 - share) * math.exp(log_q[v]) for v in log_p}
    return {v: math.log(m) if m > 0 else -math.inf for v, m in found.items()}


def divergence_by_loop(case, log_p, log_q):
    name, *rest = case.split()
    coefficient = float(rest[0]) if rest else None
    if name == "tvd":
        return 0.5 * math.fsum(abs(math.exp(log_p[v]) - math.exp(log_q[v])) for v in log_p)
    if name == "forward_kl" or case == "jsd 0.0":
        return kl_by_loop(log_p, log_q)
    if name == "reverse_kl" or case == "jsd 1.0":
        return kl_by_loop(log_q, log_p)
    if name == "jsd":
        m = mixture_by_loop(log_p, log_q, coefficient)
        return coefficient * kl_by_loop(log_p, m) + (1 - coefficient) * kl_by_loop(log_q, m)
    if name == "skew_kl":
        return kl_by_loop(log_p, mixture_by_loop(log_p, log_q, coefficient))
    assert name == "skew_reverse_kl"
    return kl_by_loop(log_q, mixture_by_loop(log_p, log_q, 1 - coefficient))


def both_log_probs(teacher_NV, student_NV, **settings):
    return log_probs(teacher_NV, **settings), log_probs(student_NV, **settings)


@pytest.mark.parametrize("forbid", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("case", CASES)
def test_divergences_match_the_loop(case, temperature, forbid):
    settings = {"temperature": temperature, "forbidden_V": forbidden_mask() if forbid else None}
    for seed in SEEDS:
        for dtype in (torch.float32, torch.float64):
            teacher_NV = normal(N, V, seed=seed, scale=3.0, dtype=dtype) - 4
            student_NV = normal(N, V, seed=seed + 100, scale=3.0, dtype=dtype) + 2
            expected = [
                divergence_by_loop(
                    case, *(log_probs_by_loop(z, temperature, FORBIDDEN if forbid else ()) for z in pair)
                )
                for pair in zip(teacher_NV.tolist(), student_NV.tolist(), strict=True)
            ]
            assert min(expected) > 1e-4, "the distributions should differ"
            assert_matches(CASES[case](*both_log_probs(teacher_NV, student_NV, **settings)), expected, dtype)


def test_divergences_by_hand():
    # p = (½, ½), q = (¼, ¾), m = ½ p + ½ q = (3/8, 5/8)
    p, q = [torch.tensor([[a, 1 - a]], dtype=torch.float64).log() for a in (0.5, 0.25)]
    log = math.log
    assert_matches(forward_kl(p, q), [0.5 * log(2) + 0.5 * log(2 / 3)])
    assert_matches(reverse_kl(p, q), [0.25 * log(1 / 2) + 0.75 * log(3 / 2)])
    assert_matches(tvd(p, q), [0.25])
    p_to_m = 0.5 * log(4 / 3) + 0.5 * log(4 / 5)
    q_to_m = 0.25 * log(2 / 3) + 0.75 * log(6 / 5)
    assert_matches(jsd(p, q), [(p_to_m + q_to_m) / 2])
    assert_matches(skew_kl(p, q, skew=0.5), [p_to_m])
    assert_matches(skew_reverse_kl(p, q, skew=0.5), [q_to_m])


def test_total_variation_takes_rounding_for_agreement():
    p, q = [torch.tensor([[a, 1 - a]]).log() for a in (0.5, 0.50001)]  # log q − log p = 2e-5
    for q_N2, expected in ((q, 0.0), (q + torch.tensor([[0.01, -0.01]]), 0.01 * 0.5)):
        student_N2 = q_N2.clone().requires_grad_()
        loss = tvd(p, student_N2).sum()
        loss.backward()
        # ½ |q_1 − p_1| + ½ |q_2 − p_2|, each 0.5 × 0.01 to first order; its derivative by log q is ± ½ q
        assert loss.item() == pytest.approx(expected, abs=1e-4)
        assert student_N2.grad.abs().sum().item() == pytest.approx(0.5 if expected else 0.0, abs=1e-2)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("case", CASES)
def test_gradients_match_finite_differences(case, temperature):
    student_NV = normal(3, V, seed=0, scale=2.0, dtype=torch.float64).requires_grad_()
    settings = {"temperature": temperature, "forbidden_V": forbidden_mask()}
    teacher_NV = log_probs(normal(3, V, seed=1, scale=2.0, dtype=torch.float64), **settings)
    assert torch.autograd.gradcheck(lambda z: CASES[case](teacher_NV, log_probs(z, **settings)), student_NV)


@pytest.mark.parametrize("forbid", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("case", CASES)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(case, temperature, forbid):
    """Off centre by −100, as T5's logits are, where a careless softmax sums to 1 only up to 8e-6."""
    for scale in (0.1, 3.0, 30.0):
        logits_NV = (normal(N, V, seed=0, scale=scale) - 100).requires_grad_()
        settings = {"temperature": temperature, "forbidden_V": forbidden_mask() if forbid else None}
        divergence_N = CASES[case](*both_log_probs(logits_NV.detach(), logits_NV, **settings))
        (gradient,) = torch.autograd.grad(divergence_N.sum(), logits_NV)
        torch.testing.assert_close(divergence_N, torch.zeros(N), rtol=0, atol=5e-7)
        torch.testing.assert_close(gradient, torch.zeros(N, V), rtol=0, atol=1e-6)


@pytest.mark.parametrize("forbid", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_extreme_logits(case, forbid):
    """Logits of ±1e4, garbage at the forbidden ids and a large upstream gradient: finite, and equal to the loop."""
    signs = torch.randint(0, 2, (2, N, V), generator=torch.Generator().manual_seed(0)) * 2 - 1
    teacher_NV, student_NV = 1e4 * signs + normal(2, N, V, seed=0)
    if forbid:
        teacher_NV[:, sorted(FORBIDDEN)], student_NV[:, sorted(FORBIDDEN)] = 1e30, -1e30
    forbidden = FORBIDDEN if forbid else ()
    student_NV.requires_grad_()
    settings = {"forbidden_V": forbidden_mask() if forbid else None}
    divergence_N = CASES[case](*both_log_probs(teacher_NV, student_NV, **settings))
    expected = [
        divergence_by_loop(case, *(log_probs_by_loop(z, 1.0, forbidden) for z in pair))
        for pair in zip(teacher_NV.tolist(), student_NV.tolist(), strict=True)
    ]
    # float32 holds 20,000 to 1e-3, and a sum of a few of them a little worse.
    torch.testing.assert_close(divergence_N.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-2)
    (gradient,) = torch.autograd.grad(65536.0 * divergence_N.sum(), student_NV)
    assert gradient.isfinite().all()
    if forbid:
        assert (gradient[:, forbidden_mask()] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_upcast(dtype):
    logits_NV = normal(N, V, seed=0, scale=4.0).to(dtype)
    expected = [list(log_probs_by_loop(z, 0.7).values()) for z in logits_NV.tolist()]
    assert_matches(log_probs(logits_NV, temperature=0.7), expected, torch.float32)
    teachers = [logits_NV, normal(N, V, seed=1).to(dtype)]
    assert all(ensemble(teachers, [1, 1]).dtype == torch.float32 for ensemble in ENSEMBLES.values())


# ---- identities


def random_pair(seed, scale=3.0):
    return both_log_probs(*normal(2, N, V, seed=seed, scale=scale, dtype=torch.float64))


@pytest.mark.parametrize("seed", SEEDS)
def test_identities(seed):
    for scale in (0.5, 3.0, 30.0):
        p, q = random_pair(seed, scale)
        for divergence in CASES.values():
            assert (divergence(p, q) >= -1e-15).all()
        torch.testing.assert_close(reverse_kl(p, q), forward_kl(q, p))
        for beta in (0.0, 0.3, 0.5, 1.0):
            torch.testing.assert_close(jsd(p, q, beta=beta), jsd(q, p, beta=1 - beta))
        assert (jsd(p, q) <= math.log(2) + 1e-12).all()
        assert (tvd(p, q) <= 1 + 1e-12).all()
        assert (tvd(p, q) <= (forward_kl(p, q) / 2).sqrt() + 1e-12).all()  # Pinsker's inequality
        assert (skew_kl(p, q, skew=0.1) <= -math.log(0.1) + 1e-12).all()
        assert (skew_reverse_kl(p, q, skew=0.1) <= -math.log(0.1) + 1e-12).all()
        torch.testing.assert_close(skew_kl(p, q, skew=0.0), forward_kl(p, q))
        torch.testing.assert_close(skew_reverse_kl(p, q, skew=0.0), reverse_kl(p, q))


def test_small_coefficients_tend_to_the_divergences_at_zero():
    p, q = random_pair(0)
    small = 1e-9
    torch.testing.assert_close(jsd(p, q, beta=small) / small, jsd(p, q, beta=0.0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(jsd(p, q, beta=1 - small) / small, jsd(p, q, beta=1.0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(skew_kl(p, q, skew=small), forward_kl(p, q), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(skew_reverse_kl(p, q, skew=small), reverse_kl(p, q), rtol=1e-4, atol=1e-6)


def test_the_extremes_of_the_bounded_divergences():
    p, q = log_probs(torch.tensor([[0.0, -1e4]])), log_probs(torch.tensor([[-1e4, 0.0]]))  # no mass in common
    assert_matches(tvd(p, q), [1.0])
    assert_matches(jsd(p, q), [math.log(2)])
    assert_matches(skew_kl(p, q, skew=0.1), [-math.log(0.1)])
    assert_matches(forward_kl(p, q), [1e4])


def test_every_divergence_is_in_the_dict_and_in_the_cases():
    assert {case.split()[0] for case in CASES} == set(DIVERGENCES)
    assert all(DIVERGENCES[name].__name__ == name for name in DIVERGENCES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, q: jsd(p, q, beta=-0.1), "beta must lie in"),
        (lambda p, q: jsd(p, q, beta=1.1), "beta must lie in"),
        (lambda p, q: skew_kl(p, q, skew=1.0), "skew must lie in"),
        (lambda p, q: skew_reverse_kl(p, q, skew=-0.1), "skew must lie in"),
        (lambda p, q: log_probs(p, temperature=0.0), "temperature must be > 0"),
        (lambda p, q: mean_of_probabilities([p, q], [1.0]), "one weight > 0 for each"),
        (lambda p, q: mean_of_logits([p, q], [1.0, 0.0]), "one weight > 0 for each"),
        (lambda p, q: mean_of_logits([], []), "at least one teacher"),
        (lambda p, q: distillation_loss(p, [q], torch.ones(N), divergence=tvd, alpha=1.5), "alpha must lie in"),
        (lambda p, q: distillation_loss(p, [q], torch.ones(N), divergence=tvd, alpha=0.5), "there are none"),
        (
            lambda p, q: distillation_loss(
                p, [q], torch.ones(N), torch.arange(N), divergence=tvd, alpha=0.5, forbidden_V=torch.arange(V) == 3
            ),
            r"labels contain forbidden ids: \[3\]",
        ),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*random_pair(0))


# ---- several teachers


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("forbid", [False, True])
def test_ensembles_match_the_loop(temperature, forbid):
    logits_KNV = list(normal(3, N, V, seed=0, scale=3.0))
    weights_K = [1.0, 2.0, 5.0]  # shares 1/8, 1/4, 5/8
    forbidden = FORBIDDEN if forbid else ()
    settings = {"temperature": temperature, "forbidden_V": forbidden_mask() if forbid else None}
    probabilities_NV = mean_of_probabilities(logits_KNV, weights_K, **settings).exp()
    geometric_NV = mean_of_logits(logits_KNV, weights_K, **settings).exp()
    for n in range(N):
        rows = [logits_NV[n].tolist() for logits_NV in logits_KNV]
        each = [log_probs_by_loop(z, temperature, forbidden) for z in rows]
        mean = [
            sum(w / 8 * math.exp(p.get(v, -math.inf)) for p, w in zip(each, weights_K, strict=True)) for v in range(V)
        ]
        assert_matches(probabilities_NV[n], mean)
        logits = [sum(w / 8 * z[v] for z, w in zip(rows, weights_K, strict=True)) for v in range(V)]
        of_logits = log_probs_by_loop(logits, temperature, forbidden)
        assert_matches(geometric_NV[n], [math.exp(of_logits.get(v, -math.inf)) for v in range(V)])


@pytest.mark.parametrize("ensemble", ENSEMBLES.values())
def test_one_teacher_is_its_own_ensemble_bit_by_bit(ensemble):
    """Or the gradient of total variation, a sign, would not vanish where student and teacher agree."""
    logits_NV = normal(N, V, seed=0)
    assert torch.equal(ensemble([logits_NV], [3.0]), log_probs(logits_NV))


def test_logit_means_ignore_a_teachers_offset_and_probability_means_its_confidence():
    logits_NV = normal(N, V, seed=0)
    other_NV = normal(N, V, seed=1)
    for ensemble in ENSEMBLES.values():
        shifted = ensemble([logits_NV, other_NV + 50], [1, 1])
        torch.testing.assert_close(shifted, ensemble([logits_NV, other_NV], [1, 1]), rtol=1e-5, atol=2e-5)
    # A teacher that rules an id out: the geometric mean follows, the arithmetic mean keeps half of the other's mass.
    other_NV[:, 2] = -1e4
    assert (mean_of_logits([logits_NV, other_NV], [1, 1])[:, 2] < -1e3).all()
    half_N = log_probs(logits_NV)[:, 2] + math.log(0.5)
    torch.testing.assert_close(mean_of_probabilities([logits_NV, other_NV], [1, 1])[:, 2], half_N)


# ---- the loss


def loss_by_loop(case, student, teachers, weights, labels, *, temperature, alpha, forbidden):
    """Σ_n w_n ( α T² D(p_T, q_T) − (1−α) log q_1(y_n) ) with the teachers' mean of probabilities as p."""
    total = 0.0
    for n, (z, weight, label) in enumerate(zip(student, weights, labels, strict=True)):
        each = [log_probs_by_loop(teacher[n], temperature, forbidden) for teacher in teachers]
        log_p = {v: math.log(sum(math.exp(p[v]) for p in each) / len(each)) for v in each[0]}
        soft = divergence_by_loop(case, log_p, log_probs_by_loop(z, temperature, forbidden))
        hard = -log_probs_by_loop(z, 1.0, forbidden)[label]
        total += weight * (alpha * temperature**2 * soft + (1 - alpha) * hard)
    return total


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("case", CASES)
def test_the_loss_matches_the_loop(case, temperature, alpha):
    """Two teachers, the second with two padding rows; a student with one more: ids from V on are left out."""
    student_NV = normal(N, V + 1, seed=0, scale=2.0)
    teachers = [normal(N, V, seed=1, scale=2.0), normal(N, V + 2, seed=2, scale=2.0)]
    weights_N = torch.linspace(0.1, 0.7, N)
    labels_N = torch.arange(N) % 7 + 1  # 1 .. 7, all of them allowed
    forbidden_V = torch.cat([forbidden_mask(), torch.tensor([False])])
    settings = {"temperature": temperature, "alpha": alpha}
    loss, metrics = distillation_loss(
        student_NV, teachers, weights_N, labels_N, divergence=CASES[case], forbidden_V=forbidden_V, **settings
    )
    of_lists = [
        student_NV[:, :V].tolist(),
        [t[:, :V].tolist() for t in teachers],
        weights_N.tolist(),
        labels_N.tolist(),
    ]
    assert_matches(loss, loss_by_loop(case, *of_lists, forbidden=FORBIDDEN, **settings))
    assert set(metrics) == ({"divergence"} if alpha > 0 else set()) | ({"cross_entropy"} if alpha < 1 else set())
    for name, share in (("divergence", 1.0), ("cross_entropy", 0.0)):
        if name in metrics:
            part = loss_by_loop(case, *of_lists, forbidden=FORBIDDEN, temperature=temperature, alpha=share)
            assert_matches(metrics[name] * (temperature**2 if name == "divergence" else 1), part)


def test_temperature_squared_keeps_the_size_of_the_gradient():
    """At high T the soft gradient tends to (z_q − z_p) / V for centred logits (Hinton et al. 2015, eq. 4)."""
    student_NV, teacher_NV = (z - z.mean(-1, keepdim=True) for z in normal(2, N, V, seed=0, dtype=torch.float64))
    student_NV.requires_grad_()
    loss, _ = distillation_loss(student_NV, [teacher_NV], torch.ones(N), divergence=forward_kl, temperature=1e4)
    (gradient,) = torch.autograd.grad(loss, student_NV)
    torch.testing.assert_close(gradient, (student_NV - teacher_NV).detach() / V, rtol=1e-3, atol=1e-5)


def test_the_teacher_gets_no_gradient():
    student_NV, teacher_NV = normal(2, N, V, seed=0).requires_grad_().unbind()
    loss, _ = distillation_loss(student_NV, [teacher_NV], torch.ones(N), divergence=jsd)
    gradients = torch.autograd.grad(loss, [student_NV, teacher_NV], allow_unused=True)
    assert gradients[0].abs().min() > 0 and gradients[1] is None
