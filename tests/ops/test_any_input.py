"""Every equation on any input: finite in, finite out; garbage behind the mask reaches nothing, of any length."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd_trl.ops import advantages, all_actions, average_reward, divergences, lm_head, losses, masking, rewards
from rlkd_trl.ops.finite import usable_rows
from rlkd_trl.ops.rms_norm import rms_norm

QUICK = settings(max_examples=30, deadline=None, derandomize=True)
GARBAGE = [math.nan, math.inf, -math.inf, 1e30]
K = 2  # completions of each prompt


@st.composite
def batches(draw):
    """Lengths, from 0 up to T, which may be 0 or 1, whether completions ended, and a seed for the numbers."""
    T = draw(st.integers(0, 4))
    B = K * draw(st.integers(1, 3))
    lengths_B = draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    mask_BT = torch.arange(T)[None, :] < torch.tensor(lengths_B)[:, None]
    ended_B = torch.tensor(draw(st.lists(st.booleans(), min_size=B, max_size=B)))
    return mask_BT, ended_B, draw(st.integers(0, 10**6)), draw(st.sampled_from([1e-4, 1.0, 1e4]))


def numbers(shape, seed: int, scale: float = 1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Per completion and token: functions of (x, y, values, mask, ended), of which x and y are [B, T] and values [B, T+1].
# Where they stand for log-probabilities they are made so.
TOKENWISE = {
    "return_to_go": lambda x, y, v, m, e: advantages.return_to_go(x, m, gamma=0.9),
    "gae": lambda x, y, v, m, e: advantages.gae(x, v, m, e, gamma=0.9, lam=0.8),
    "token_leave_one_out": lambda x, y, v, m, e: advantages.token_leave_one_out(x, m, num_generations=K),
    "leave some out": lambda x, y, v, m, e: advantages.token_leave_one_out(x, m, num_generations=K, kept_B=e),
    "mean_baseline": lambda x, y, v, m, e: advantages.mean_baseline(x, m),
    "min_variance_baseline": lambda x, y, v, m, e: advantages.min_variance_baseline(x, -y.abs(), m),
    "explained_variance": lambda x, y, v, m, e: advantages.explained_variance(x, y, m),
    "teacher_forcing_reward": lambda x, y, v, m, e: rewards.teacher_forcing_reward(x, v, m, e, gamma=0.9),
    "k_step_return": lambda x, y, v, m, e: rewards.k_step_return(x, v, m, e, k=2, gamma=0.9),
    "log_likelihood": lambda x, y, v, m, e: rewards.log_likelihood(x, y, m),
    "log_ratio": lambda x, y, v, m, e: rewards.log_ratio(x, y, m),
    "kl_penalty": lambda x, y, v, m, e: rewards.kl_penalty(x, y, m),
    "potential_shaping": lambda x, y, v, m, e: rewards.potential_shaping(x, v, m, e, gamma=0.9),
    "bootstrap_truncated": lambda x, y, v, m, e: rewards.bootstrap_truncated(x, v, m, e, gamma=0.9),
    "sequence_sum": lambda x, y, v, m, e: rewards.sequence_sum(x, m),
    "zero_terminal_value": lambda x, y, v, m, e: rewards.zero_terminal_value(v, m, e),
    "masked_sum": lambda x, y, v, m, e: masking.masked_sum(x, m),
    "masked_mean": lambda x, y, v, m, e: masking.masked_moments(x, m)[0],
    "masked_variance": lambda x, y, v, m, e: masking.masked_moments(x, m)[1],
    "masked_whiten": lambda x, y, v, m, e: masking.masked_whiten(x, m),
    "average_reward": lambda x, y, v, m, e: average_reward.average_reward(x, m),
    "average_reward of the others": lambda x, y, v, m, e: average_reward.average_reward(x, m, num_generations=K),
    "differential_rewards": lambda x, y, v, m, e: average_reward.differential_rewards(x, m, v[:, 0]),
    "future_returns": lambda x, y, v, m, e: all_actions.future_returns(x, m, length_normalization=True),
    "future_advantages": lambda x, y, v, m, e: all_actions.future_advantages(x, m, num_generations=K),
    "mixture_importance": lambda x, y, v, m, e: all_actions.mixture_importance(-x.abs(), -y.abs(), m, weight=0.2),
    "usable_rows": lambda x, y, v, m, e: usable_rows(x, m).float(),
}
# Losses of (log-probabilities, old ones, advantages, mask); ratios of log-probabilities nearby, as a policy's are.
LOSSES = {
    "clipped_policy_loss": lambda p, o, a, m: losses.clipped_policy_loss(p, o, a, m, epsilon=0.2),
    "clipped_sequence_policy_loss": lambda p, o, a, m: losses.clipped_sequence_policy_loss(
        p, o, a.sum(1) if m.all() else masking.masked_sum(a, m, dim=1), m, epsilon=0.2
    ),
    "policy_gradient_loss": lambda p, o, a, m: losses.policy_gradient_loss(p, o, a, m, ratio_cap=2.0, weight_clip=1.0),
    "clipped_value_loss": lambda p, o, a, m: losses.clipped_value_loss(p, o, a, m, cliprange_value=0.1),
    "entropy_bonus": lambda p, o, a, m: losses.entropy_bonus(p, m),
}


def dirtied(tensor, mask, garbage: float):
    return torch.where(mask, tensor, garbage)


@pytest.mark.parametrize("name", TOKENWISE)
@QUICK
@given(batch=batches(), garbage=st.sampled_from(GARBAGE))
def test_tokens(name, batch, garbage):
    mask_BT, ended_B, seed, scale = batch
    states_BT1 = masking.state_mask(mask_BT, ended_B)
    x, y = (numbers(mask_BT.shape, seed + i, scale) for i in range(2))
    values = numbers(states_BT1.shape, seed + 2, scale)
    clean = TOKENWISE[name](x, y, values, mask_BT, ended_B)
    assert clean.isfinite().all()
    dirty = TOKENWISE[name](
        dirtied(x, mask_BT, garbage),
        dirtied(y, mask_BT, garbage),
        dirtied(values, states_BT1, garbage),
        mask_BT,
        ended_B,
    )
    assert torch.equal(dirty, clean)
    if clean.shape == mask_BT.shape:
        assert (clean[~mask_BT] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
@QUICK
@given(batch=batches(), garbage=st.sampled_from(GARBAGE))
def test_losses(name, batch, garbage):
    mask_BT, _, seed, scale = batch
    logps = -numbers(mask_BT.shape, seed, scale).abs()
    old = logps + 0.5 * numbers(mask_BT.shape, seed + 1).clamp(-3, 3)
    weights = numbers(mask_BT.shape, seed + 2, scale)

    def of(garbage: float):
        leaf = dirtied(logps, mask_BT, garbage).requires_grad_()
        loss, metrics = LOSSES[name](leaf, dirtied(old, mask_BT, garbage), dirtied(weights, mask_BT, garbage), mask_BT)
        loss.backward()
        return loss.detach(), leaf.grad, metrics

    loss, gradient, metrics = of(0.0)
    assert loss.isfinite() and gradient.isfinite().all() and (gradient[~mask_BT] == 0).all()
    assert all(value.isfinite() for value in metrics.values())
    dirty_loss, dirty_gradient, _ = of(garbage)
    assert torch.equal(dirty_loss, loss) and torch.equal(dirty_gradient, gradient)


@st.composite
def logits(draw, count: int = 2):
    """Of N positions, which may be 0, and V ids, of which some are forbidden, and not the chosen one."""
    N, V = draw(st.integers(0, 3)), draw(st.integers(2, 5))
    extreme = st.sampled_from([-1e4, 1e4, 0.0, 1.0, -1.0])
    found = [
        torch.tensor(draw(st.lists(extreme, min_size=N * V, max_size=N * V))).view(N, V).float() for _ in range(count)
    ]
    forbidden_V = torch.tensor([False, *draw(st.lists(st.booleans(), min_size=V - 1, max_size=V - 1))])
    return found, forbidden_V, torch.zeros(N, dtype=torch.long)


@QUICK
@given(case=logits(1), garbage=st.sampled_from([*GARBAGE, 0.0]))
def test_log_probabilities_of_extreme_logits(case, garbage):
    (z_NV,), forbidden_V, chosen_N = case
    hidden_NV = torch.where(forbidden_V, garbage, z_NV)
    found = lm_head.token_log_probs(z_NV.clone(), chosen_N, temperature=0.5, forbidden_V=forbidden_V, entropy=True)
    hidden = lm_head.token_log_probs(hidden_NV, chosen_N, temperature=0.5, forbidden_V=forbidden_V, entropy=True)
    for one, other in zip(found, hidden, strict=True):
        assert one.isfinite().all() and torch.equal(one, other)
    reference_NV = (z_NV.double() / 0.5).masked_fill(forbidden_V, -math.inf).log_softmax(-1)
    torch.testing.assert_close(found[0].double(), reference_NV[:, 0], rtol=1e-5, atol=1e-3)


@QUICK
@given(case=logits(1))
def test_statistics_of_extreme_logits(case):
    (z_NV,), forbidden_V, chosen_N = case
    statistics = lm_head.logit_statistics(z_NV, chosen_N, expected=True, tau=0.01)
    assert all(value.isfinite().all() for value in statistics)
    assert lm_head.allowed_logsumexp(z_NV, forbidden_V).isfinite().all()


@QUICK
@given(case=logits(1), garbage=st.booleans())
def test_a_teacher_may_rule_ids_out(case, garbage):
    """−inf for an id that was not chosen: what does not average over all logits stays finite."""
    (z_NV,), _, chosen_N = case
    z_NV[:, 1] = -math.inf
    chosen, _, largest, logsumexp, *_ = lm_head.logit_statistics(z_NV, chosen_N, expected=False, tau=None)
    assert all(value.isfinite().all() for value in (chosen, largest, logsumexp))


@pytest.mark.parametrize("name", divergences.DIVERGENCES)
@QUICK
@given(case=logits(2))
def test_divergences_of_extreme_logits(name, case):
    (teacher_NV, student_NV), forbidden_V, _ = case
    teacher, student_NV = divergences.log_probs(teacher_NV, forbidden_V=forbidden_V), student_NV.requires_grad_()
    student = divergences.log_probs(student_NV, forbidden_V=forbidden_V)
    found_N = divergences.DIVERGENCES[name](teacher, student)
    assert found_N.isfinite().all() and (found_N >= -1e-4).all()
    found_N.sum().backward()
    assert student_NV.grad.isfinite().all()


@QUICK
@given(case=logits(1))
def test_log_probabilities_of_a_support(case):
    """Over the first two of V ids, of which the first is the chosen one, against float64."""
    (z_NV,), _, chosen_N = case
    z_NV.requires_grad_()
    support_Nk = torch.arange(2).expand(len(z_NV), 2)
    logps_N, entropy_N = lm_head.support_log_probs(z_NV, chosen_N, support_Nk, temperature=0.5)
    reference_N2 = (z_NV.detach()[:, :2].double() / 0.5).log_softmax(-1)
    torch.testing.assert_close(logps_N.detach().double(), reference_N2[:, 0], rtol=1e-5, atol=1e-5)
    entropy_of_reference_N = -(reference_N2.exp() * reference_N2).sum(-1)
    torch.testing.assert_close(entropy_N.detach().double(), entropy_of_reference_N, rtol=1e-5, atol=1e-5)
    (logps_N.sum() + entropy_N.sum()).backward()
    assert z_NV.grad.isfinite().all() and (z_NV.grad[:, 2:] == 0).all()


@QUICK
@given(case=logits(2), weight=st.sampled_from([1e-3, 0.2, 0.9]), extra=st.integers(0, 2))
def test_log_probabilities_of_a_mixture(case, weight, extra):
    """A distribution over the ids that are allowed and that both heads have, whatever stands on the others."""
    (student_NV, teacher_NV), forbidden_V, _ = case
    teacher_NU = torch.cat([teacher_NV, torch.full((len(teacher_NV), extra), math.nan)], dim=1)
    found_NV = lm_head.mixture_log_probs(
        torch.where(forbidden_V, math.nan, student_NV), teacher_NU, weight=weight, forbidden_V=forbidden_V
    )
    assert found_NV.shape == student_NV.shape and (found_NV[:, forbidden_V] == -math.inf).all()
    p_NV, q_NV = (z.double().masked_fill(forbidden_V, -math.inf).softmax(-1) for z in (teacher_NV, student_NV))
    expected_NV = weight * p_NV + (1 - weight) * q_NV
    torch.testing.assert_close(found_NV.double().exp(), expected_NV, rtol=1e-5, atol=1e-7)


@QUICK
@given(rows=st.integers(0, 3), seed=st.integers(0, 999), scale=st.sampled_from([0.0, 1e-12, 1.0, 1e12, 1e18]))
def test_rms_norm_of_any_scale(rows, seed, scale):
    x_ND, weight_D = numbers((rows, 5), seed, scale).requires_grad_(), numbers((5,), seed + 1).requires_grad_()
    found_ND = rms_norm(x_ND, weight_D, 1e-6)
    x = x_ND.detach().double()
    expected_ND = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight_D.detach().double()
    torch.testing.assert_close(found_ND.detach().double(), expected_ND, rtol=1e-5, atol=1e-7)
    found_ND.sum().backward()
    assert x_ND.grad.isfinite().all() and weight_D.grad.isfinite().all()


@pytest.mark.parametrize("name", divergences.DIVERGENCES)
@QUICK
@given(
    case=logits(3),
    ensemble=st.sampled_from(list(divergences.ENSEMBLES)),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    temperature=st.sampled_from([0.5, 4.0]),
)
def test_distillation_of_extreme_logits(name, case, ensemble, alpha, temperature):
    (one_NV, other_NV, student_NV), forbidden_V, labels_N = case
    student_NV.requires_grad_()
    loss, metrics = divergences.distillation_loss(
        student_NV,
        [one_NV, other_NV],
        torch.full((len(student_NV),), 0.25),
        labels_N,
        divergence=divergences.DIVERGENCES[name],
        temperature=temperature,
        alpha=alpha,
        ensemble=divergences.ENSEMBLES[ensemble],
        forbidden_V=forbidden_V,
    )
    assert loss.isfinite() and loss >= -1e-3 and all(value.isfinite() for value in metrics.values())
    loss.backward()
    assert student_NV.grad.isfinite().all() and (student_NV.grad[:, forbidden_V] == 0).all()


def _sliced_divergence(hidden_ND, head, weight_VD, teacher_ND, weights_N, chosen_N, max_elements):
    # What has no weight is left out, whatever stands there.
    hidden_ND, teacher_ND = (torch.where(weights_N[:, None] > 0, x, math.nan) for x in (hidden_ND, teacher_ND))
    teachers = [divergences.TeacherStates(teacher_ND, head)]
    of_states = (hidden_ND, head, [weight_VD], teachers, weights_N, chosen_N)
    settings = {"divergence": divergences.jsd, "alpha": 0.5, "vocab_size": 4, "max_elements": max_elements}
    return divergences.sliced_divergence(*of_states, **settings)


def _sliced_all_actions(hidden_ND, head, weight_VD, teacher_ND, weights_N, chosen_N, max_elements):
    teachers = [divergences.TeacherStates(teacher_ND, head)]
    futures_N, old_logps_N = hidden_ND.detach()[:, 0], torch.full((len(hidden_ND),), -1.0)
    return all_actions.sliced_all_actions_loss(
        *(hidden_ND, head, [weight_VD], teachers, weights_N, chosen_N, futures_N, old_logps_N),
        teacher_signal=all_actions.log_ratio_signal,
        subtract_log_pi=True,
        vocab_size=4,
        epsilon=0.2,
        max_elements=max_elements,
    )


@pytest.mark.parametrize("sliced", [_sliced_divergence, _sliced_all_actions])
@QUICK
@given(kept_N=st.lists(st.booleans(), max_size=4), seed=st.integers(0, 999), scale=st.sampled_from([0.0, 1.0, 30.0]))
def test_losses_in_slices(sliced, kept_N, seed, scale):
    """Finite, and the same in one slice as in as many as there are positions: none, or none of any weight, too."""
    N = len(kept_N)
    weights_N, found = torch.tensor(kept_N, dtype=torch.float32) / max(N, 1), []
    for max_elements in (1, 1000):
        hidden_ND, weight_VD = (
            numbers((N, 3), seed, scale).requires_grad_(),
            numbers((4, 3), seed + 1).requires_grad_(),
        )
        loss, metrics = sliced(
            hidden_ND,
            lambda states_ND, weight_VD=weight_VD: states_ND @ weight_VD.T,
            weight_VD,
            numbers((N, 3), seed + 2, scale),
            weights_N,
            torch.zeros(N, dtype=torch.long),
            max_elements,
        )
        loss.backward()
        found.append([loss.detach(), hidden_ND.grad, weight_VD.grad, *metrics.values()])
    assert all(tensor.isfinite().all() for tensor in found[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert (found[0][1][weights_N == 0] == 0).all()
