"""The sliced distillation loss against the same loss on whole logits, in value and gradients."""

import subprocess
import sys
from functools import partial

import pytest
import torch

from rlkd_trl.ops.divergences import (
    DIVERGENCES,
    TeacherStates,
    distillation_loss,
    forward_kl,
    jsd,
    mean_of_logits,
    sliced_divergence,
    tvd,
)
from rlkd_trl.ops.sliced_loss import sliced_loss
from tests.ops.ragged_batches import POISONS, normal

N, V, D = 9, 13, 5
PADDED_V = V + 3  # the student's head has three padding rows
SLICES = [1, PADDED_V, 2 * PADDED_V, 4 * PADDED_V - 1, 8 * PADDED_V, 10**6]  # logits allowed at a time


class Head:
    """A linear LM head with a bias and soft-capped logits that notes how many positions it is given at a time."""

    def __init__(self, V, D, *, seed, dtype=torch.float32, requires_grad=True):
        self.weight_VD = normal(V, D, seed=seed, dtype=dtype).requires_grad_(requires_grad)
        self.bias_V = normal(V, seed=seed + 1, dtype=dtype).requires_grad_(requires_grad)
        self.calls = []

    @property
    def parameters(self):
        return [self.weight_VD, self.bias_V]

    def __call__(self, hidden_nD):
        self.calls.append(hidden_nD.shape[0])
        return 10 * torch.tanh((hidden_nD @ self.weight_VD.T + self.bias_V) / 10)


class Batch:
    """Student and two teachers of different widths and vocabularies; positions 2, 3 and 7 do not count."""

    def __init__(self, *, dtype=torch.float32, n=N, requires_grad=True, poison=0.0):
        self.weights_N = torch.linspace(0.02, 0.1, n, dtype=dtype)
        self.labels_N = torch.arange(n) % 6 + 1  # 1 .. 6, allowed
        self.forbidden_V = torch.arange(PADDED_V) % 7 == 0
        self.head = Head(PADDED_V, D, seed=10, dtype=dtype, requires_grad=requires_grad)
        self.hidden_ND = normal(n, D, seed=0, dtype=dtype)
        self.teacher_heads = [
            Head(V, 2 * D, seed=20, dtype=dtype),  # trainable, and yet a constant here
            Head(V + 1, D, seed=30, dtype=dtype, requires_grad=False),
        ]
        self.teacher_hidden = [normal(n, 2 * D, seed=1, dtype=dtype), normal(n, D, seed=2, dtype=dtype)]
        self.left_out = [i for i in (2, 3, 7) if i < n]
        self.weights_N[self.left_out] = 0.0
        self.labels_N[self.left_out] = -100
        for hidden in (self.hidden_ND, *self.teacher_hidden):
            hidden[self.left_out] = poison
        self.hidden_ND.requires_grad_(requires_grad)

    def sliced(self, **settings):
        teachers = map(TeacherStates, self.teacher_hidden, self.teacher_heads, [1.0, 3.0])
        return sliced_divergence(
            self.hidden_ND,
            self.head,
            self.head.parameters,
            list(teachers),
            self.weights_N,
            self.labels_N,
            vocab_size=PADDED_V,
            forbidden_V=self.forbidden_V,
            **settings,
        )

    def plain(self, **settings):
        kept_N = self.weights_N > 0
        with torch.no_grad(), torch.autocast("cpu", enabled=False):  # the student's autocast is not the teacher's
            teacher_logits = [
                head(hidden[kept_N]) for head, hidden in zip(self.teacher_heads, self.teacher_hidden, strict=True)
            ]
        return distillation_loss(
            self.head(self.hidden_ND[kept_N]),
            teacher_logits,
            self.weights_N[kept_N],
            self.labels_N[kept_N],
            teacher_weights_K=[1.0, 3.0],
            forbidden_V=self.forbidden_V,
            **settings,
        )

    def gradients(self, loss):
        return torch.autograd.grad(loss, [self.hidden_ND, *self.head.parameters])


@pytest.mark.parametrize("max_elements", SLICES)
@pytest.mark.parametrize(
    "settings",
    [
        *({"divergence": divergence} for divergence in DIVERGENCES.values()),
        {"divergence": partial(jsd, beta=0.1), "temperature": 3.0},
        {"divergence": forward_kl, "temperature": 0.5, "alpha": 0.4, "ensemble": mean_of_logits},
        {"divergence": tvd, "alpha": 0.4},
        {"divergence": forward_kl, "alpha": 0.0},
    ],
)
def test_slices_give_the_loss_and_the_gradients_of_the_whole(settings, max_elements):
    batch = Batch(poison=float("nan"))
    loss, metrics = batch.sliced(**settings, max_elements=max_elements)
    whole, whole_metrics = batch.plain(**settings)
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics, whole_metrics, rtol=1e-5, atol=1e-6)
    assert not any(metric.requires_grad for metric in metrics.values())
    # As a part of a larger loss, so that the upstream gradient is not 1.
    for found, expected in zip(batch.gradients(-2.5 * loss), batch.gradients(-2.5 * whole), strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for head in batch.teacher_heads for parameter in head.parameters)


@pytest.mark.parametrize("poison", POISONS)
def test_positions_of_weight_zero_change_nothing(poison):
    results = []
    for filler in (0.5, poison):
        batch = Batch(poison=filler)
        loss, _ = batch.sliced(divergence=jsd, alpha=0.5, max_elements=2 * PADDED_V)
        results.append([loss, *batch.gradients(loss)])
        assert (results[-1][1][batch.left_out] == 0).all()
    for clean, poisoned in zip(*results, strict=True):
        torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("divergence", DIVERGENCES.values())
def test_gradients_match_finite_differences(divergence):
    batch = Batch(dtype=torch.float64)
    settings = {"divergence": divergence, "temperature": 2.0, "alpha": 0.7, "max_elements": 4 * PADDED_V}

    def loss_of(hidden_ND, weight_VD, bias_V):
        batch.hidden_ND, batch.head.weight_VD, batch.head.bias_V = hidden_ND, weight_VD, bias_V
        return batch.sliced(**settings)[0]

    assert torch.autograd.gradcheck(loss_of, (batch.hidden_ND, *batch.head.parameters))


@pytest.mark.parametrize("max_elements", SLICES)
def test_a_head_that_is_tied_to_the_embeddings_gets_the_gradients_of_both_uses(max_elements):
    embeddings_VD = normal(PADDED_V, D, seed=0).requires_grad_()
    ids_N = torch.arange(N)
    found = []
    for sliced in (True, False):
        batch = Batch()
        batch.head.weight_VD = embeddings_VD
        batch.hidden_ND = torch.tanh(embeddings_VD[ids_N])
        settings = {"divergence": jsd, "max_elements": max_elements} if sliced else {"divergence": jsd}
        loss, _ = (batch.sliced if sliced else batch.plain)(**settings)
        found.append(torch.autograd.grad(loss, [embeddings_VD, batch.head.bias_V]))
    for in_slices, whole in zip(*found, strict=True):
        torch.testing.assert_close(in_slices, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("which", ["hidden", "head", "bias"])
def test_only_what_requires_a_gradient_gets_one(which):
    batch = Batch(requires_grad=False)
    trained = {"hidden": batch.hidden_ND, "head": batch.head.weight_VD, "bias": batch.head.bias_V}[which]
    trained.requires_grad_()
    gradients = []
    for loss in (batch.sliced(divergence=jsd, max_elements=PADDED_V)[0], batch.plain(divergence=jsd)[0]):
        trained.grad = None
        loss.backward()
        gradients.append(trained.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert [x.grad is None for x in (batch.hidden_ND, *batch.head.parameters)].count(False) == 1


@pytest.mark.parametrize("frozen", [False, True])
def test_without_gradients_only_the_value_is_computed(frozen):
    batch = Batch(requires_grad=not frozen)
    with torch.set_grad_enabled(frozen):
        loss, _ = batch.sliced(divergence=forward_kl, max_elements=4 * PADDED_V)
    assert not loss.requires_grad
    assert batch.head.calls == [4, 2] == batch.teacher_heads[0].calls  # six positions count
    torch.testing.assert_close(loss, batch.plain(divergence=forward_kl)[0].detach())


@pytest.mark.parametrize("all_masked", [False, True])
def test_no_positions(all_masked):
    batch = Batch(n=4 if all_masked else 0, poison=float("nan"))
    batch.weights_N[:] = 0.0
    loss, metrics = batch.sliced(divergence=forward_kl, alpha=0.5)
    assert loss == 0 and set(metrics) == {"divergence", "cross_entropy"}
    assert all((gradient == 0).all() for gradient in batch.gradients(loss))


@pytest.mark.parametrize("divergence", DIVERGENCES.values())
@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(divergence, temperature):
    batch = Batch()
    batch.teacher_heads, batch.teacher_hidden = [batch.head], [batch.hidden_ND.detach()]
    loss, _ = batch.sliced(divergence=divergence, temperature=temperature, max_elements=4 * PADDED_V)
    torch.testing.assert_close(loss, torch.tensor(0.0), rtol=0, atol=1e-6)
    for gradient in batch.gradients(loss):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


def test_one_slice_of_logits_at_a_time_and_each_head_applied_once():
    batch = Batch()
    loss, _ = batch.sliced(divergence=jsd, max_elements=2 * PADDED_V)
    loss.backward()
    assert batch.head.calls == [2, 2, 2]
    assert [head.calls for head in batch.teacher_heads] == [[2, 2, 2]] * 2


def test_hard_labels_alone_need_no_teacher():
    batch = Batch()
    expected, _ = batch.plain(divergence=forward_kl, alpha=0.0)
    for teachers in ("teacher_hidden", "teacher_heads"):
        setattr(batch, teachers, [])
    batch.forbidden_V = batch.forbidden_V | (torch.arange(PADDED_V) >= V)  # what the teachers' vocabularies left out
    loss, metrics = batch.sliced(divergence=forward_kl, alpha=0.0, max_elements=2 * PADDED_V)
    torch.testing.assert_close(loss, expected)
    assert set(metrics) == {"cross_entropy"}


def test_under_autocast_the_statistics_stay_float32():
    """The student's head runs in bfloat16, the teachers' do not; gradients come back in float32, and slices still give
    what the whole gives."""
    batch = Batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = batch.sliced(divergence=jsd, max_elements=2 * PADDED_V)
        whole, _ = batch.plain(divergence=jsd)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
    for found, expected in zip(batch.gradients(loss), batch.gradients(whole), strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.02 * expected.norm()


def test_a_forgotten_parameter_of_the_head_is_refused():
    batch = Batch()
    with pytest.raises(ValueError, match=rf"shape \[{PADDED_V}\] that is not in head_parameters"):
        sliced_loss(batch.head, [batch.head.weight_VD], batch.hidden_ND, lambda z: (z.sum(), {}), vocab_size=PADDED_V)


def test_parameters_may_be_computed_from_others():
    """A weight that is itself the result of a computation, as a merged adapter's."""
    base_VD, scale = normal(V, D, seed=0), torch.tensor(2.0, requires_grad=True)
    merged_VD = base_VD * scale
    loss, _ = sliced_loss(
        lambda hidden: hidden @ merged_VD.T,
        [merged_VD],
        normal(N, D, seed=1),
        lambda logits: ((logits**2).sum(), {}),
        vocab_size=V,
        max_elements=2 * V,
    )
    loss.backward()
    # quadratic in the scale: d loss / d scale = 2 loss / scale
    torch.testing.assert_close(scale.grad, loss.detach())


def test_metrics_are_summed_over_slices_and_positions_keep_their_own_arguments():
    hidden_ND, factors_N = normal(N, V, seed=0).requires_grad_(), torch.arange(N) * 1.0
    loss, metrics = sliced_loss(
        lambda hidden: hidden,
        [],
        hidden_ND,
        lambda logits_nV, factors_n: ((logits_nV * factors_n[:, None]).sum(), {"factors": factors_n.sum()}),
        factors_N,
        vocab_size=V,
        max_elements=2 * V,
    )
    loss.backward()
    torch.testing.assert_close(hidden_ND.grad, factors_N[:, None].expand(N, V))
    assert metrics["factors"] == factors_N.sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_head_under_a_loss_scale(dtype):
    """The weights 1 / 2**18 alone would push the gradient of the logits below float16's smallest number, 6e-8."""
    n = 64
    hidden_ND, teacher_hidden_ND = normal(2, n, D, seed=0).to(dtype)
    teacher_weight_VD, weight_VD = normal(2, V, D, seed=1).to(dtype)
    scale, weights_N = 2.0**18, torch.full((n,), 2.0**-18)
    gradients = []
    for working in (dtype, torch.float64):
        hidden, weight = (x.detach().to(working).requires_grad_() for x in (hidden_ND, weight_VD))
        teacher_weight = teacher_weight_VD.to(working)
        teacher = TeacherStates(teacher_hidden_ND.to(working), lambda states, weight=teacher_weight: states @ weight.T)
        loss, _ = sliced_divergence(
            hidden,
            lambda states, weight=weight: states @ weight.T,
            [weight],
            [teacher],
            weights_N,
            divergence=forward_kl,
            vocab_size=V,
            max_elements=5 * V,
        )
        gradients.append(torch.autograd.grad(scale * loss, [hidden, weight]))
    for found, expected in zip(*gradients, strict=True):
        assert found.dtype == dtype
        assert (found.double() - expected).norm() < 0.02 * expected.norm()


PEAK_MEMORY = """
import sys, torch
from rlkd_trl.ops.divergences import TeacherStates, distillation_loss, forward_kl, sliced_divergence

N, V, D = 2048, 8192, 16
hidden_ND, weight_VD = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
teacher_ND, teacher_weight_VD = torch.randn(N, D), torch.randn(V, D)
weights_N = torch.full((N,), 1 / N)
head = lambda hidden: hidden @ weight_VD.T
teacher_head = lambda hidden: hidden @ teacher_weight_VD.T

def sliced(n):
    settings = {"divergence": forward_kl, "vocab_size": V, "max_elements": 2**20}
    teachers = [TeacherStates(teacher_ND[:n], teacher_head)]
    return sliced_divergence(hidden_ND[:n], head, [weight_VD], teachers, weights_N[:n], **settings)[0]

def plain(n):
    teacher_logits = [teacher_head(teacher_ND[:n])]
    return distillation_loss(head(hidden_ND[:n]), teacher_logits, weights_N[:n], divergence=forward_kl)[0]

def peak_kib():
    # Not ru_maxrss, which counts the parent that this process was forked from, too.
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

loss = {"sliced": sliced, "plain": plain}[sys.argv[1]]
loss(1).backward()  # what the libraries set up once
before = peak_kib()
loss(N).backward()
print(peak_kib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_peak_memory_is_that_of_a_few_slices():
    """All logits are 64 MiB and a slice is 4 MiB. Usually 64 MiB in slices, 450 MiB whole."""
    extra_mib = {}
    for variant in ("sliced", "plain"):
        command = [sys.executable, "-c", PEAK_MEMORY, variant]
        extra_mib[variant] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024
    assert extra_mib["plain"] > 4 * 64, "too little to compare with"
    assert extra_mib["sliced"] < extra_mib["plain"] / 4
