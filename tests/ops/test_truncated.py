import math
from functools import partial

import pytest
import torch

from rlkd_trl.ops.divergences import TeacherStates, distillation_loss, forward_kl, log_probs, sliced_divergence, tvd
from rlkd_trl.ops.truncated import merged, sliced_truncated_divergence, top_ids, truncated_distillation_loss
from tests.ops.ragged_batches import assert_matches, normal
from tests.ops.test_divergences import CASES, FORBIDDEN, divergence_by_loop, forbidden_mask, log_probs_by_loop

N, V = 7, 11
ALLOWED = [v for v in range(V) if v not in FORBIDDEN]


def merged_by_loop(log_p, known):
    """{id: log-probability} of the known ids, and of all others together as "rest"."""
    rest = math.fsum(math.exp(log_p[v]) for v in log_p if v not in known)
    return {v: log_p[v] for v in known} | ({"rest": math.log(rest)} if rest > 0 else {})


def truncated(teacher_NV, k, temperature):
    teacher_logps_NV = log_probs(teacher_NV, temperature=temperature, forbidden_V=forbidden_mask())
    ids_Nk = top_ids(teacher_logps_NV, k)
    return ids_Nk, merged(teacher_logps_NV, ids_Nk)


def test_merged_by_hand():
    # p = (½, ¼, ⅛, ⅛): the two largest, and ¼ for the others
    logps_14 = torch.tensor([[1 / 8, 1 / 2, 1 / 8, 1 / 4]], dtype=torch.float64).log()
    ids_12 = top_ids(logps_14, 2)
    assert ids_12.tolist() == [[1, 3]]
    assert_matches(merged(logps_14, ids_12).exp(), [[1 / 2, 1 / 4, 1 / 4]])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("k", [1, 3, len(ALLOWED)])
@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_the_loops_and_a_lower_bound_of_the_whole(case, k, temperature):
    """Of float64 loops over the k known ids and the rest; for all allowed ids it is the divergence itself."""
    teacher_NV = normal(N, V, seed=1, scale=3.0, dtype=torch.float64)
    student_NV = normal(N, V, seed=2, scale=3.0, dtype=torch.float64)
    ids_Nk, teacher_logps_Nk1 = truncated(teacher_NV, k, temperature)
    for n in range(N):
        log_p, log_q = (log_probs_by_loop(z[n].tolist(), temperature, FORBIDDEN) for z in (teacher_NV, student_NV))
        known = sorted(log_p, key=log_p.get, reverse=True)[:k]
        expected = divergence_by_loop(case, merged_by_loop(log_p, known), merged_by_loop(log_q, known))
        weights_N = torch.zeros(N, dtype=torch.float64)
        weights_N[n] = 0.7
        loss, metrics = truncated_distillation_loss(
            student_NV,
            ids_Nk,
            teacher_logps_Nk1,
            weights_N,
            divergence=CASES[case],
            temperature=temperature,
            forbidden_V=forbidden_mask(),
        )
        assert_matches(metrics["divergence"], 0.7 * expected)
        assert_matches(loss, 0.7 * temperature**2 * expected)
        whole = divergence_by_loop(case, log_p, log_q)
        assert expected <= whole + 1e-12
        if k == len(ALLOWED):
            assert expected == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("scale", [0.3, 3.0, 10.0])
def test_what_is_missing_is_bounded_as_stated(k, scale):
    teacher_NV = normal(200, V, seed=3, scale=scale, dtype=torch.float64)
    student_NV = normal(200, V, seed=4, scale=scale, dtype=torch.float64)
    p, q = log_probs(teacher_NV), log_probs(student_NV)
    ids_Nk = top_ids(p, k)
    missing_kl = (forward_kl(p, q) - forward_kl(merged(p, ids_Nk), merged(q, ids_Nk))).tolist()
    missing_tvd = (tvd(p, q) - tvd(merged(p, ids_Nk), merged(q, ids_Nk))).tolist()
    for n in range(200):
        known = ids_Nk[n].tolist()
        others = [v for v in range(V) if v not in known]
        log_p, log_q = p[n].tolist(), q[n].tolist()
        r, s = (math.fsum(math.exp(log[v]) for v in others) for log in (log_p, log_q))
        smallest = min(math.exp(log_p[v]) for v in known)
        bound = r * (math.log(min(1, smallest / r)) + math.log(s) - min(log_q[v] for v in others))
        assert -1e-12 <= missing_kl[n] <= bound + 1e-12
        assert -1e-12 <= missing_tvd[n] <= min(r, s) + 1e-4  # differences of rounding count as none there
    assert max(missing_kl) > 1e-3, "something is missing"


def test_gradients_with_all_ids_are_those_of_the_whole_loss_and_labels_enter_the_same():
    """In slices of two positions, in float32, with positions left out; also where an id has all the mass."""
    teacher_ND, student_ND, weight_VD = normal(N, 4, seed=5), normal(N, 4, seed=6), normal(V, 4, seed=7)
    teacher_ND[2] *= 1e3
    weights_N = torch.tensor([0.2, 0.0, 0.3, 0.1, 0.0, 0.25, 0.15])
    labels_N = torch.tensor([1, -100, 3, 4, 0, 5, 9])
    teacher_head_VD = normal(V, 4, seed=8)

    def gradients(loss_of_states):
        states_ND, head_VD = student_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        loss, metrics = loss_of_states(states_ND, lambda states: states @ head_VD.T, [head_VD])
        loss.backward()
        return loss, metrics, states_ND.grad, head_VD.grad

    for case in ("forward_kl", "reverse_kl", "jsd 0.5", "skew_kl 0.1"):
        settings = {
            "divergence": CASES[case],
            "vocab_size": V,
            "temperature": 2.0,
            "alpha": 0.6,
            "forbidden_V": forbidden_mask(),
            "max_elements": 2 * V,
        }
        teachers = [TeacherStates(teacher_ND, lambda states: states @ teacher_head_VD.T)]
        whole = gradients(
            partial(sliced_divergence, teachers=teachers, weights_N=weights_N, labels_N=labels_N, **settings)
        )
        ids_Nk, logps_Nk1 = truncated(teacher_ND @ teacher_head_VD.T, len(ALLOWED), 2.0)
        cached = gradients(
            partial(
                sliced_truncated_divergence,
                top_ids_Nk=ids_Nk,
                teacher_logps_Nk1=logps_Nk1,
                weights_N=weights_N,
                labels_N=labels_N,
                **settings,
            )
        )
        for ours, theirs in zip(cached, whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert whole[2].abs().max() > 0.01


def test_the_hard_term_alone_needs_no_teacher():
    student_NV = normal(N, V, seed=2)
    labels_N, weights_N = torch.tensor([1, 2, 3, 4, 5, 6, 7]), torch.full((N,), 1 / N)
    settings = {"divergence": forward_kl, "alpha": 0.0}
    ids_Nk, logps_Nk1 = truncated(normal(N, V, seed=1), 2, 1.0)
    ours, _ = truncated_distillation_loss(student_NV, ids_Nk, logps_Nk1, weights_N, labels_N, **settings)
    theirs, _ = distillation_loss(student_NV, [], weights_N, labels_N, **settings)
    assert torch.equal(ours, theirs)
