import math

import pytest
import torch

from rlkd_trl.ops.losses import (
    approximate_kl,
    clipped_policy_loss,
    clipped_sequence_policy_loss,
    clipped_value_loss,
    entropy_bonus,
    policy_gradient_loss,
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

EPSILON = 0.2


def random_policies(seed, dtype=torch.float64, T=6):
    """A ragged batch, log π, log π_old and advantages `[B, T]`; ratios between about ½ and 2."""
    batch = ragged_batch(seed, T)
    logps_BT = -normal(8, T, seed=seed, dtype=dtype).abs() - 0.5
    old_logps_BT = logps_BT + normal(8, T, seed=seed + 1, dtype=dtype, scale=0.3)
    return batch, logps_BT, old_logps_BT, normal(8, T, seed=seed + 2, dtype=dtype)


def clip(x, low, high):
    return min(max(x, low), high)


def surrogate_by_loop(pairs, epsilon, denominator):
    """Loss and metrics from (log ratio, advantage) pairs, one for each real token or sequence."""
    ratios = [math.exp(log_ratio) for log_ratio, _ in pairs]
    objective = [
        min(ratio * advantage, clip(ratio, 1 - epsilon, 1 + epsilon) * advantage)
        for ratio, (_, advantage) in zip(ratios, pairs, strict=True)
    ]
    was_clipped = [
        (ratio > 1 + epsilon and advantage > 0) or (ratio < 1 - epsilon and advantage < 0)
        for ratio, (_, advantage) in zip(ratios, pairs, strict=True)
    ]
    n = denominator or len(pairs)
    return -math.fsum(objective) / n, {
        "ratio": math.fsum(ratios) / n,
        "clip_fraction": sum(was_clipped) / n,
    }


def assert_loss_matches(actual, expected, dtype):
    (loss, metrics), (expected_loss, expected_metrics) = actual, expected
    assert loss.shape == ()
    assert_matches(loss.detach(), expected_loss, dtype)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        assert not value.requires_grad, f"{name} is for the log and must not hold the graph"
        assert value.shape == ()
        assert_matches(value, expected_metrics[name], dtype)


# ---- clipped loss per token


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("denominator", [None, 50.0])
@pytest.mark.parametrize("epsilon", [0.2, 0.05])
@pytest.mark.parametrize("seed", SEEDS)
def test_clipped_policy_loss_matches_the_loop(seed, epsilon, denominator, dtype):
    batch, logps_BT, old_logps_BT, advantages_BT = random_policies(seed, dtype)
    real = [(i, t) for i, length, _ in batch.rows for t in range(length)]
    pairs = [(logps_BT[i, t].item() - old_logps_BT[i, t].item(), advantages_BT[i, t].item()) for i, t in real]
    actual = clipped_policy_loss(
        logps_BT.requires_grad_(),
        old_logps_BT,
        advantages_BT,
        batch.mask_BT,
        epsilon=epsilon,
        denominator=denominator,
    )
    expected = surrogate_by_loop(pairs, epsilon, denominator)
    assert 0 < expected[1]["clip_fraction"] < 1
    assert_loss_matches(actual, expected, dtype)


# Ratio ρ, advantage A, and, with ε = 0.2: the objective min(ρA, clip(ρ)A) and its derivative in log π, which is ρA
# where the first is the smaller and 0 where the clipped one is.
CLIP_CASES = [
    (1.0, 2.0, 2.0, 2.0),
    (1.0, -2.0, -2.0, -2.0),
    (1.1, 2.0, 2.2, 2.2),  # inside the range: as if there were no clip
    (0.9, -2.0, -1.8, -1.8),
    (1.5, 2.0, 2.4, 0.0),  # a good token, already likelier by more than ε: 1.2·2, no gradient
    (0.5, 2.0, 1.0, 1.0),  # a good token that became less likely: 0.5·2, pushed back up
    (0.5, -2.0, -1.6, 0.0),  # a bad token, already less likely by more than ε: 0.8·(−2), no gradient
    (1.5, -2.0, -3.0, -3.0),  # a bad token that became likelier: 1.5·(−2), pushed down
    (1.5, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "objective", "derivative"), CLIP_CASES)
def test_clipping_per_token_by_hand(ratio, advantage, objective, derivative):
    logps_BT = torch.tensor([[-1.0, -9.0]], dtype=torch.float64).requires_grad_()
    old_logps_BT = torch.tensor([[-1.0 - math.log(ratio), -3.0]], dtype=torch.float64)
    advantages_BT = torch.tensor([[advantage, 7.0]], dtype=torch.float64)
    mask_BT = torch.tensor([[True, False]])
    loss, metrics = clipped_policy_loss(logps_BT, old_logps_BT, advantages_BT, mask_BT, epsilon=EPSILON)
    loss.backward()
    assert loss.item() == pytest.approx(-objective, abs=1e-12)
    assert logps_BT.grad[0, 0].item() == pytest.approx(-derivative, abs=1e-12)
    if derivative == 0:
        assert logps_BT.grad[0, 0] == 0  # exactly
    assert logps_BT.grad[0, 1] == 0
    assert metrics["clip_fraction"] == float(derivative == 0 and advantage != 0)


@pytest.mark.parametrize(("ratio", "advantage", "objective", "derivative"), CLIP_CASES)
def test_clipping_per_sequence_by_hand(ratio, advantage, objective, derivative):
    """The same numbers with log ρ split over two tokens as 3 log ρ − 2 log ρ: per token, both would be clipped."""
    logps_BT = torch.tensor([[-1.0, -2.0, -9.0]], dtype=torch.float64).requires_grad_()
    split_BT = torch.tensor([[3.0, -2.0, 1.0]], dtype=torch.float64) * math.log(ratio)
    mask_BT = torch.tensor([[True, True, False]])
    loss, metrics = clipped_sequence_policy_loss(
        logps_BT,
        logps_BT.detach() - split_BT,
        torch.tensor([advantage], dtype=torch.float64),
        mask_BT,
        epsilon=EPSILON,
    )
    loss.backward()
    assert loss.item() == pytest.approx(-objective, abs=1e-12)
    assert logps_BT.grad.tolist() == [pytest.approx([-derivative, -derivative, 0.0], abs=1e-12)]
    if derivative == 0:
        assert (logps_BT.grad == 0).all()  # exactly
    assert metrics["clip_fraction"] == float(derivative == 0 and advantage != 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_ratio_one_is_the_plain_policy_gradient(seed):
    """The gradient of −Σ A_t log π(y_t) / N, which is −A_t / N at every real token, whatever ε."""
    batch, logps_BT, _, advantages_BT = random_policies(seed)
    logps_BT.requires_grad_()
    loss, metrics = clipped_policy_loss(logps_BT, logps_BT.detach(), advantages_BT, batch.mask_BT, epsilon=1e-3)
    loss.backward()
    n = sum(batch.lengths)
    expected = [
        [-advantages_BT[i, t].item() / n if t < length else 0.0 for t in range(6)] for i, length, _ in batch.rows
    ]
    assert_matches(logps_BT.grad, expected)
    assert (metrics["ratio"], metrics["clip_fraction"]) == (1, 0)


def test_the_plain_policy_gradient_reaches_the_logits():
    """Through log softmax: −A (1[v = y] − π_v) / N, here with N = 1."""
    logits_V = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64).requires_grad_()
    logps_BT = logits_V.log_softmax(-1)[1].view(1, 1)
    advantages_BT, mask_BT = torch.tensor([[-1.5]], dtype=torch.float64), torch.tensor([[True]])
    clipped_policy_loss(logps_BT, logps_BT.detach(), advantages_BT, mask_BT, epsilon=EPSILON)[0].backward()
    exponentials = [math.exp(z) for z in (0.3, -1.0, 2.0)]
    expected = [1.5 * ((v == 1) - e / sum(exponentials)) for v, e in enumerate(exponentials)]
    assert_matches(logits_V.grad, expected)


# ---- policy gradient with a constant importance ratio


def weights_by_loop(batch, logps_BT, behaviour_logps_BT, advantages_BT, ratio_cap, weight_clip):
    """w_t, 0 behind the mask; the ratios; how many weights were cut."""
    weights, ratios, cut = [[0.0] * 6 for _ in batch.rows], [], 0
    for i, length, _ in batch.rows:
        for t in range(length):
            ratio = math.exp(logps_BT[i, t].item() - behaviour_logps_BT[i, t].item())
            weight = min(ratio, ratio_cap or math.inf) * advantages_BT[i, t].item()
            weight = clip(weight, -(weight_clip or math.inf), weight_clip or math.inf)
            cut += weight != ratio * advantages_BT[i, t].item()
            weights[i][t] = weight
            ratios.append(ratio)
    return weights, ratios, cut


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ratio_cap", "weight_clip"), [(None, None), (1.1, None), (None, 0.5), (1.1, 0.5)], ids=str)
@pytest.mark.parametrize("denominator", [None, 50.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_policy_gradient_matches_the_loop_in_value_and_gradient(seed, denominator, ratio_cap, weight_clip, dtype):
    batch, logps_BT, behaviour_logps_BT, advantages_BT = random_policies(seed, dtype)
    weights, ratios, cut = weights_by_loop(batch, logps_BT, behaviour_logps_BT, advantages_BT, ratio_cap, weight_clip)
    assert (0 < cut < len(ratios)) == bool(ratio_cap or weight_clip)
    n = denominator or len(ratios)
    expected = -math.fsum(weights[i][t] * logps_BT[i, t].item() for i, length, _ in batch.rows for t in range(length))
    actual = policy_gradient_loss(
        logps_BT.requires_grad_(),
        behaviour_logps_BT,
        advantages_BT,
        batch.mask_BT,
        ratio_cap=ratio_cap,
        weight_clip=weight_clip,
        denominator=denominator,
    )
    metrics = {"ratio": math.fsum(ratios) / n, "clip_fraction": cut / n}
    assert_loss_matches(actual, (expected / n, metrics), dtype)
    actual[0].backward()
    assert_matches(logps_BT.grad, [[-w / n for w in row] for row in weights], dtype)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_constant_ratio_has_the_gradient_of_the_ratio(seed):
    """∇(−Σ ρ_t A_t / N), with the ratio differentiated: ρ ∇log π = ∇ρ."""
    batch, logps_BT, behaviour_logps_BT, advantages_BT = random_policies(seed)
    logps_BT.requires_grad_()
    ratio_BT = (logps_BT - behaviour_logps_BT).exp()
    surrogate = -(ratio_BT * advantages_BT)[batch.mask_BT].mean()
    (expected,) = torch.autograd.grad(surrogate, logps_BT)
    loss, _ = policy_gradient_loss(logps_BT, behaviour_logps_BT, advantages_BT, batch.mask_BT)
    torch.testing.assert_close(torch.autograd.grad(loss, logps_BT)[0], expected, rtol=1e-12, atol=1e-12)


def test_policy_gradient_by_hand():
    # ρ = 4 and A = 2, cap 3: w = 6; clip 5: w = 5. log π = −1: loss 5, gradient −5.
    logps_BT = torch.tensor([[-1.0, -7.0]], dtype=torch.float64).requires_grad_()
    behaviour_BT = torch.tensor([[-1.0 - math.log(4.0), -3.0]], dtype=torch.float64)
    advantages_BT, mask_BT = torch.tensor([[2.0, 8.0]], dtype=torch.float64), torch.tensor([[True, False]])
    for settings, weight in (({}, 8.0), ({"ratio_cap": 3.0}, 6.0), ({"ratio_cap": 3.0, "weight_clip": 5.0}, 5.0)):
        loss, metrics = policy_gradient_loss(logps_BT, behaviour_BT, advantages_BT, mask_BT, **settings)
        (gradient,) = torch.autograd.grad(loss, logps_BT)
        assert loss.item() == pytest.approx(weight)
        assert gradient.tolist() == [[pytest.approx(-weight), 0.0]]
        assert metrics["clip_fraction"] == float(weight != 8.0)
        assert metrics["ratio"].item() == pytest.approx(4.0)


@pytest.mark.parametrize("poison", POISONS)
def test_padding_is_ignored_in_the_policy_gradient(poison):
    batch, logps_BT, behaviour_logps_BT, advantages_BT = random_policies(0, torch.float32)
    assert_padding_is_ignored(
        lambda *tensors: policy_gradient_loss(*tensors, batch.mask_BT, ratio_cap=1.1, weight_clip=0.5),
        *((tensor, batch.mask_BT) for tensor in (logps_BT, behaviour_logps_BT, advantages_BT)),
        poison=poison,
    )


# ---- clipped loss per sequence


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("denominator", [None, 50.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_clipped_sequence_policy_loss_matches_the_loop(seed, denominator, dtype):
    batch, logps_BT, old_logps_BT, advantages_BT = random_policies(seed, dtype)
    # the masked completion counts for nothing, in the denominator either
    pairs = [
        (
            math.fsum(logps_BT[i, t].item() - old_logps_BT[i, t].item() for t in range(length)),
            advantages_BT[i, 0].item(),
        )
        for i, length, _ in batch.rows
        if length
    ]
    actual = clipped_sequence_policy_loss(
        logps_BT.requires_grad_(),
        old_logps_BT,
        advantages_BT[:, 0],
        batch.mask_BT,
        epsilon=EPSILON,
        denominator=denominator,
    )
    expected = surrogate_by_loop(pairs, EPSILON, denominator)
    assert len(pairs) == 7
    assert_loss_matches(actual, expected, dtype)


@pytest.mark.parametrize("seed", SEEDS)
def test_sequence_ratio_one_is_the_plain_policy_gradient(seed):
    """−A_i / (number of completions) at every real token of completion i."""
    batch, logps_BT, _, advantages_BT = random_policies(seed)
    logps_BT.requires_grad_()
    loss, _ = clipped_sequence_policy_loss(
        logps_BT, logps_BT.detach(), advantages_BT[:, 0], batch.mask_BT, epsilon=1e-3
    )
    loss.backward()
    expected = [
        [-advantages_BT[i, 0].item() / 7 if t < length else 0.0 for t in range(6)] for i, length, _ in batch.rows
    ]
    assert_matches(logps_BT.grad, expected)


# ---- KL estimate


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("denominator", [None, 50.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_approximate_kl_matches_the_loop(seed, denominator, dtype):
    batch, logps_BT, old_logps_BT, _ = random_policies(seed, dtype)
    log_ratios = [
        logps_BT[i, t].item() - old_logps_BT[i, t].item() for i, length, _ in batch.rows for t in range(length)
    ]
    expected = math.fsum(math.exp(d) - 1 - d for d in log_ratios) / (denominator or len(log_ratios))
    assert expected > 1e-3
    actual = approximate_kl(logps_BT.requires_grad_(), old_logps_BT, batch.mask_BT, denominator=denominator)
    assert not actual.requires_grad, "it is for the log and must not hold the graph"
    assert_matches(actual, expected, dtype)


def test_the_expected_approximate_kl_is_the_kl():
    """E_old[ρ − 1 − log ρ] = KL(π_old ‖ π): every token of a vocabulary of four, in proportion to π_old."""
    old_V = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    new_V = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    # ten draws from π_old: four of the first token, three of the second, two of the third, one of the fourth
    draws_T = torch.tensor([0] * 4 + [1] * 3 + [2] * 2 + [3])
    actual = approximate_kl(new_V.log()[draws_T][None], old_V.log()[draws_T][None], torch.ones(1, 10).bool())
    expected = 0.4 * math.log(4) + 0.3 * math.log(1.5) + 0.2 * math.log(2 / 3) + 0.1 * math.log(1 / 4)
    assert actual.item() == pytest.approx(expected, rel=1e-12)


def test_approximate_kl_is_zero_for_one_policy_and_never_negative():
    batch, logps_BT, old_logps_BT, _ = random_policies(seed=0)
    assert approximate_kl(logps_BT, logps_BT, batch.mask_BT) == 0
    for row in range(8):  # row by row, so that no other row hides it
        assert approximate_kl(logps_BT[[row]], old_logps_BT[[row]], batch.mask_BT[[row]]) >= 0
    assert approximate_kl(logps_BT, old_logps_BT, torch.zeros(8, 6, dtype=torch.bool)) == 0


@pytest.mark.parametrize("poison", POISONS)
def test_approximate_kl_ignores_padding(poison):
    batch, logps_BT, old_logps_BT, _ = random_policies(0, torch.float32)
    clean = approximate_kl(logps_BT, old_logps_BT, batch.mask_BT)
    dirty = [torch.where(batch.mask_BT, x, torch.full_like(x, poison)) for x in (logps_BT, old_logps_BT)]
    assert approximate_kl(dirty[0], old_logps_BT, batch.mask_BT) == clean
    assert approximate_kl(logps_BT, dirty[1], batch.mask_BT) == clean
    assert approximate_kl(*dirty, batch.mask_BT) == clean


# ---- value loss


def value_loss_by_loop(numbers, cliprange, denominator):
    """`numbers`: (V, V_old, G) of every real token."""
    errors, clipped = [], 0
    for value, old, target in numbers:
        error = (value - target) ** 2
        if cliprange is not None:
            clipped_error = (clip(value, old - cliprange, old + cliprange) - target) ** 2
            clipped += clipped_error > error
            error = max(error, clipped_error)
        errors.append(error)
    n = denominator or len(numbers)
    loss = 0.5 * math.fsum(errors) / n
    return loss, {"value_loss": loss, "value_clip_fraction": clipped / n}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("denominator", [None, 50.0])
@pytest.mark.parametrize("cliprange_value", [None, 0.0, 0.2, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_clipped_value_loss_matches_the_loop(seed, cliprange_value, denominator, dtype):
    batch = ragged_batch(seed)
    values_BT, old_values_BT, returns_BT = (normal(8, 6, seed=seed + i, dtype=dtype) for i in range(3))
    numbers = [
        (values_BT[i, t].item(), old_values_BT[i, t].item(), returns_BT[i, t].item())
        for i, length, _ in batch.rows
        for t in range(length)
    ]
    loss, metrics = clipped_value_loss(
        values_BT.requires_grad_(),
        old_values_BT,
        returns_BT,
        batch.mask_BT,
        cliprange_value=cliprange_value,
        denominator=denominator,
    )
    metrics["value_clip_fraction"] = metrics["value_clip_fraction"].to(dtype)
    expected = value_loss_by_loop(numbers, cliprange_value, denominator)
    assert_loss_matches((loss, metrics), expected, dtype)


@pytest.mark.parametrize(
    ("value", "target", "loss", "derivative"),
    # V_old = 0, clip range 1. Loss ½ max((V − G)², (clip(V) − G)²); derivative V − G, or 0 where the clipped error,
    # which does not depend on V, is the larger.
    [
        (0.5, 2.5, 2.0, -2.0),  # inside: ½·2²
        (2.0, 3.0, 2.0, 0.0),  # moved towards the target by more than the range: ½·(1 − 3)², no gradient
        (2.0, -1.0, 4.5, 3.0),  # moved away from the target: ½·(2 + 1)², pulled back
        (-2.0, -3.0, 2.0, 0.0),  # the same downwards: ½·(−1 + 3)²
        (-2.0, 1.0, 4.5, -3.0),  # ½·(−2 − 1)²
        (3.0, 1.5, 1.125, 1.5),  # overshot: ½·1.5² beats ½·(1 − 1.5)²
    ],
)
def test_value_clipping_by_hand(value, target, loss, derivative):
    values_BT = torch.tensor([[value, 8.0]]).requires_grad_()
    mask_BT = torch.tensor([[True, False]])
    old_values_BT, returns_BT = torch.tensor([[0.0, 1.0]]), torch.tensor([[target, 5.0]])
    actual, metrics = clipped_value_loss(values_BT, old_values_BT, returns_BT, mask_BT, cliprange_value=1.0)
    actual.backward()
    assert (actual.item(), metrics["value_clip_fraction"].item()) == (loss, float(derivative == 0))
    assert values_BT.grad.tolist() == [[derivative, 0.0]]
    # without a clip range: ½ (V − G)² and V − G
    plain, metrics = clipped_value_loss(values_BT, old_values_BT, returns_BT, mask_BT, cliprange_value=None)
    assert (plain.item(), metrics["value_clip_fraction"].item()) == (0.5 * (value - target) ** 2, 0.0)


def test_values_inside_the_range_do_not_count_as_clipped():
    """V_old + (V − V_old) is not always V in floating point; the rounding must not pass for clipping."""
    values_BT, old_values_BT, returns_BT = (0.4 * torch.tanh(normal(40, 50, seed=i)) for i in range(3))
    mask_BT = torch.ones(40, 50, dtype=torch.bool)
    _, metrics = clipped_value_loss(values_BT, old_values_BT, returns_BT, mask_BT, cliprange_value=1.0)
    assert metrics["value_clip_fraction"] == 0


# ---- entropy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("denominator", [None, 50.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_entropy_bonus_matches_the_loop(seed, denominator, dtype):
    batch = ragged_batch(seed)
    entropy_BT = normal(8, 6, seed=seed, dtype=dtype).abs().requires_grad_()
    numbers = [entropy_BT[i, t].item() for i, length, _ in batch.rows for t in range(length)]
    n = denominator or len(numbers)
    loss, metrics = entropy_bonus(entropy_BT, batch.mask_BT, denominator=denominator)
    entropy = math.fsum(numbers) / n
    assert_loss_matches((loss, metrics), (-entropy, {"entropy": entropy}), dtype)
    loss.backward()
    # minimising it raises the entropy: −1/n at every real token
    assert_matches(entropy_BT.grad, [[-1 / n if t < length else 0.0 for t in range(6)] for _, length, _ in batch.rows])


# ---- all the losses


def token_loss(trained_BT, constant_BT, other_constant_BT, mask_BT, denominator=None):
    return clipped_policy_loss(
        trained_BT, constant_BT, other_constant_BT, mask_BT, epsilon=EPSILON, denominator=denominator
    )


def sequence_loss(trained_BT, constant_BT, other_constant_BT, mask_BT, denominator=None):
    return clipped_sequence_policy_loss(
        trained_BT, constant_BT, other_constant_BT[:, 0], mask_BT, epsilon=EPSILON, denominator=denominator
    )


def value_loss(trained_BT, constant_BT, other_constant_BT, mask_BT, denominator=None):
    return clipped_value_loss(
        trained_BT, constant_BT, other_constant_BT, mask_BT, cliprange_value=0.2, denominator=denominator
    )


def unclipped_value_loss(trained_BT, constant_BT, other_constant_BT, mask_BT, denominator=None):
    return clipped_value_loss(
        trained_BT, constant_BT, other_constant_BT, mask_BT, cliprange_value=None, denominator=denominator
    )


def entropy_loss(trained_BT, constant_BT, other_constant_BT, mask_BT, denominator=None):
    return entropy_bonus(trained_BT, mask_BT, denominator=denominator)


LOSSES = [token_loss, sequence_loss, value_loss, unclipped_value_loss, entropy_loss]


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("cuts", [[4, 8], [1, 3, 8], list(range(1, 9))])
@pytest.mark.parametrize("loss_function", LOSSES)
def test_micro_batches_with_the_global_denominator_are_the_whole_batch(loss_function, cuts, as_tensor):
    batch, *tensors = random_policies(seed=1)
    tensors[0].requires_grad_()
    whole, whole_metrics = loss_function(*tensors, batch.mask_BT)
    whole_gradient = torch.autograd.grad(whole, tensors[0])[0]
    assert whole_gradient.abs().max() > 1e-2

    count = sum(length > 0 for length in batch.lengths) if loss_function is sequence_loss else sum(batch.lengths)
    denominator = torch.tensor(count) if as_tensor else count
    total, metric_totals = 0.0, dict.fromkeys(whole_metrics, 0.0)
    for start, end in zip([0, *cuts[:-1]], cuts, strict=True):
        part, metrics = loss_function(*(x[start:end] for x in (*tensors, batch.mask_BT)), denominator=denominator)
        part.backward()
        total += part.item()
        for name, share in metrics.items():
            metric_totals[name] += share.item()
    assert total == pytest.approx(whole.item())
    assert metric_totals == pytest.approx({name: value.item() for name, value in whole_metrics.items()})
    torch.testing.assert_close(tensors[0].grad, whole_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss_function", LOSSES)
def test_only_what_is_trained_gets_a_gradient(loss_function):
    """log π_old, advantages, old values and returns are constants, even where they come with a graph."""
    batch, *tensors = random_policies(seed=1)
    for tensor in tensors:
        tensor.requires_grad_()
    loss_function(*tensors, batch.mask_BT)[0].backward()
    trained_BT, *constants = tensors
    assert trained_BT.grad.abs().max() > 1e-2
    assert all(constant.grad is None or (constant.grad == 0).all() for constant in constants)


@pytest.mark.parametrize("loss_function", LOSSES)
def test_a_batch_of_masked_completions_has_loss_zero_and_no_gradient(loss_function):
    tensors = [torch.full((2, 3), float("nan")).requires_grad_() for _ in range(3)]
    loss, metrics = loss_function(*tensors, torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert (tensors[0].grad == 0).all()
    assert all(metric == 0 for metric in metrics.values())


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("loss_function", LOSSES)
def test_padding_is_ignored(loss_function, poison):
    batch, *tensors = random_policies(0, torch.float32)
    mask_BT = batch.mask_BT
    # An advantage per sequence stands in column 0, and is padding where the whole completion is.
    assert_padding_is_ignored(
        lambda *tensors: loss_function(*tensors, mask_BT), *((x, mask_BT) for x in tensors), poison=poison
    )


@pytest.mark.parametrize("loss_function", LOSSES)
def test_gradients(loss_function):
    batch, *tensors = random_policies(2, T=3)
    tensors[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss_function(x, *tensors[1:], batch.mask_BT)[0], (tensors[0],))
