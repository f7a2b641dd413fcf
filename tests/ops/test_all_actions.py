"""The all-actions policy gradient: against the exact gradient of a problem small enough to enumerate, and in loops."""

import itertools
import math
from functools import partial

import pytest
import torch

from rlkd_trl.ops.all_actions import (
    VALUES,
    all_actions_loss,
    chosen_signals,
    expected_signals,
    future_advantages,
    future_returns,
    log_ratio_signal,
    sliced_all_actions_loss,
    teacher_forcing_signal,
)
from rlkd_trl.ops.divergences import TeacherStates, mean_of_logits
from tests.ops.ragged_batches import (
    DTYPES,
    POISONS,
    SEEDS,
    assert_matches,
    assert_padding_is_ignored,
    normal,
    ragged_batch,
)
from tests.rewards.reference import log_probability, teacher_forcing, value

# ---- a problem of two steps, enumerated

# Tokens 0 and 1, EOS 2, and an id 3 that is never sampled. Row 0 of the logits is the state before the first token,
# row 1 + a that after a first token a; after EOS, or a second token, all is over.
EOS, FORBIDDEN = 2, torch.tensor([False, False, False, True])
SEQUENCES = [(EOS,), *itertools.product((0, 1), (0, 1, EOS))]
PAIRS = list(itertools.product(SEQUENCES, SEQUENCES))
SIGNALS = ["log_ratio", *VALUES]


# The same with a third step, for futures of more than one.
THREE_STEPS = [*SEQUENCES[:1], *((a, EOS) for a in (0, 1)), *itertools.product((0, 1), (0, 1), (0, 1, EOS))]
STATES = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]


def states_of(sequence):
    return [STATES.index(tuple(sequence[:t])) for t in range(len(sequence))]


class Problem:
    """Random logits of student and teacher; the signal g(s, a) of every state and token, in its own loop."""

    def __init__(self, signal, seed=0, sequences=SEQUENCES):
        self.signal, self.sequences = signal, sequences
        S = 3 if sequences is SEQUENCES else 7
        self.student_SV = normal(S, 4, seed=seed, dtype=torch.float64, scale=1.5).requires_grad_()
        self.teacher_SV = normal(S, 4, seed=seed + 1, dtype=torch.float64, scale=1.5)

    @property
    def logps_SV(self):
        return self.student_SV[:, :3].log_softmax(dim=-1)

    def g(self):
        if self.signal == "log_ratio":
            return self.teacher_SV[:, :3].log_softmax(dim=-1) - self.logps_SV
        rows = self.teacher_SV.tolist()  # centred and with V over all four ids, as in the reward
        centred = [[z - sum(row) / 4 for z in row] for row in rows]
        return torch.tensor(
            [[f - value(row, self.signal) for f in fs[:3]] for fs, row in zip(centred, rows, strict=True)],
            dtype=torch.float64,
        )

    def probability(self, sequence):
        return self.log_probability(sequence).exp()

    def log_probability(self, sequence):
        return sum(self.logps_SV[s, a] for s, a in zip(states_of(sequence), sequence, strict=True))

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.student_SV)[0]

    def expected_return(self):
        """J = Σ_y π(y) Σ_t g(s_t, y_t), differentiable, g's own log π included."""
        g_SV = self.g()
        return sum(
            self.probability(y) * sum(g_SV[s, a] for s, a in zip(states_of(y), y, strict=True)) for y in self.sequences
        )

    def loss(self, samples, *, weight=1.0, gamma=1.0, length_normalization=False, future="sampled"):
        """`all_actions_loss` of K samples, each counting 1/K, put together as the trainer does it."""
        K = len(samples)
        T = max(map(len, self.sequences))
        mask_BT = torch.tensor([[t < len(y) for t in range(T)] for y in samples])
        states_N = torch.tensor([s for y in samples for s in states_of(y)])
        chosen_N = torch.tensor([a for y in samples for a in y])
        teacher_NV = self.teacher_SV[states_N]
        if self.signal == "log_ratio":
            signal_NV = log_ratio_signal([teacher_NV], [1.0], forbidden_V=FORBIDDEN)
        else:
            signal_NV = teacher_forcing_signal([teacher_NV], [1.0], value=self.signal)
        old_logps_N = self.logps_SV.detach()[states_N, chosen_N]
        signals_N = signal_NV.gather(1, chosen_N[:, None])[:, 0]
        if self.signal == "log_ratio":
            signals_N = signals_N - old_logps_N
        if future == "expected":
            signals_N = self.expected_signals(states_N)
        signals_BT = torch.zeros(K, T, dtype=torch.float64).masked_scatter(mask_BT, signals_N)
        futures_BT = future_returns(signals_BT, mask_BT, gamma=gamma, length_normalization=length_normalization)
        if K > 1:
            futures_BT = future_advantages(futures_BT, mask_BT, num_generations=K)
        return all_actions_loss(
            self.student_SV[states_N],
            signal_NV,
            torch.full((len(chosen_N),), 1 / K, dtype=torch.float64),
            chosen_N,
            weight * futures_BT[mask_BT],
            old_logps_N,
            subtract_log_pi=self.signal == "log_ratio",
            forbidden_V=FORBIDDEN,
        )[0]

    def expected_signals(self, states_N):
        """With logits for hidden states and nothing for a head."""
        log_ratio = self.signal == "log_ratio"
        return expected_signals(
            self.student_SV.detach()[states_N],
            lambda logits: logits,
            [TeacherStates(self.teacher_SV[states_N], lambda logits: logits)],
            teacher_signal=partial(log_ratio_signal, forbidden_V=FORBIDDEN)
            if log_ratio
            else partial(teacher_forcing_signal, value=self.signal),
            vocab_size=4,
            subtract_log_pi=log_ratio,
            forbidden_V=FORBIDDEN,
            max_elements=8,  # two positions at a time
        )

    def expected_loss(self, samples_of_one, **settings):
        """Over all samples, or pairs of samples, at the probabilities as they are."""
        probabilities = {y: float(self.probability(y).detach()) for y in self.sequences}
        return sum(
            math.prod(probabilities[y] for y in samples) * self.loss(samples, **settings) for samples in samples_of_one
        )


ALL_SINGLE = [(y,) for y in SEQUENCES]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("signal", SIGNALS)
def test_the_enumerated_problem_is_one(signal, seed):
    problem = Problem(signal, seed)
    assert float(sum(problem.probability(y) for y in SEQUENCES).detach()) == pytest.approx(1.0)
    assert len(SEQUENCES) == 7 and problem.g().shape == (3, 3)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("signal", SIGNALS)
def test_in_expectation_it_is_the_exact_gradient_of_the_return(signal, seed):
    problem = Problem(signal, seed)
    exact = problem.gradient(-problem.expected_return())
    assert exact[:, :3].abs().min() > 1e-4 and (exact[:, 3] == 0).all()
    found = problem.gradient(problem.expected_loss(ALL_SINGLE))
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)
    # A future of another weight or discount is another gradient. (Length normalisation divides by one token here.)
    for biased in ({"weight": 0.5}, {"gamma": 0.9}):
        assert (problem.gradient(problem.expected_loss(ALL_SINGLE, **biased)) - exact).norm() > 1e-2 * exact.norm()


@pytest.mark.parametrize("future", ["sampled", "expected"])
@pytest.mark.parametrize("signal", SIGNALS)
def test_leaving_one_out_does_not_bias_it(signal, future):
    """Over all pairs of samples, each the other's baseline."""
    problem = Problem(signal)
    found = problem.gradient(problem.expected_loss(PAIRS, future=future))
    torch.testing.assert_close(found, problem.gradient(-problem.expected_return()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("signal", SIGNALS)
def test_the_expected_future_has_the_same_gradient_in_expectation_and_less_variance(signal, seed):
    """Less for certain, where the future is one step: there F̄_1 is the mean of F_1 given the first token."""
    problem = Problem(signal, seed)
    exact = problem.gradient(-problem.expected_return())
    variance = {}
    for future in ("sampled", "expected"):
        settings = {"future": future, "weight": 0.7, "gamma": 0.9}
        mean = problem.gradient(problem.expected_loss(ALL_SINGLE, **settings))
        variance[future] = sum(
            float(problem.probability(y).detach())
            * float(((problem.gradient(problem.loss((y,), **settings)) - mean) ** 2).sum())
            for y in SEQUENCES
        )
        found = problem.gradient(problem.expected_loss(ALL_SINGLE, future=future))
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)
    assert variance["expected"] < 0.99 * variance["sampled"]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("signal", SIGNALS)
def test_the_expected_future_of_several_steps(signal, seed):
    """At every weight and discount the gradient of the sampled future, in expectation; not per token of the future."""
    problem = Problem(signal, seed, THREE_STEPS)
    singles = [(y,) for y in THREE_STEPS]
    assert sum(float(problem.probability(y).detach()) for y in THREE_STEPS) == pytest.approx(1.0)

    def gradient(**settings):
        return problem.gradient(problem.expected_loss(singles, **settings))

    exact = problem.gradient(-problem.expected_return())
    torch.testing.assert_close(gradient(future="expected"), exact, rtol=1e-10, atol=1e-12)
    settings = {"weight": 0.3, "gamma": 0.7}
    sampled, expected = gradient(**settings), gradient(**settings, future="expected")
    torch.testing.assert_close(expected, sampled, rtol=1e-10, atol=1e-12)
    per_token = [gradient(length_normalization=True, future=future) for future in ("sampled", "expected")]
    assert (per_token[0] - per_token[1]).norm() > 1e-3 * per_token[0].norm()


@pytest.mark.parametrize("signal", SIGNALS)
def test_expected_signals_match_the_loop(signal):
    problem = Problem(signal)
    g_SV, found = problem.g(), problem.expected_signals(torch.tensor([2, 0, 1, 1, 0]))
    by_state = [
        math.fsum(math.exp(logp) * g for logp, g in zip(logps, gs, strict=True))
        for logps, gs in zip(problem.logps_SV.tolist(), g_SV.tolist(), strict=True)
    ]
    assert_matches(found, [by_state[s] for s in (2, 0, 1, 1, 0)], torch.float64)
    assert not found.requires_grad


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("signal", ["log_ratio", "soft"])
def test_the_whole_gradient_is_that_of_the_sequences_reverse_kl(signal, seed):
    """log_ratio: J = −KL(π ‖ p) over sequences. soft, where no id is forbidden to the teacher: J + the entropy is."""
    problem = Problem(signal, seed)
    if signal == "soft":
        problem.teacher_SV[:, 3] = -1e4
    teacher_SV = problem.teacher_SV[:, :3].log_softmax(dim=-1)
    kl = sum(
        problem.probability(y)
        * (problem.log_probability(y) - sum(teacher_SV[s, a] for s, a in zip(states_of(y), y, strict=True)))
        for y in SEQUENCES
    )
    entropy = -sum(problem.probability(y) * problem.log_probability(y) for y in SEQUENCES)
    loss = problem.expected_loss(ALL_SINGLE)
    exact = problem.gradient(kl if signal == "log_ratio" else kl + entropy)
    torch.testing.assert_close(problem.gradient(loss), exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_without_the_future_it_is_the_reverse_kl_of_each_token_at_the_states_visited(seed):
    problem = Problem("log_ratio", seed)
    teacher_SV = problem.teacher_SV[:, :3].log_softmax(dim=-1)
    kl_S = (problem.logps_SV.exp() * (problem.logps_SV - teacher_SV)).sum(dim=-1)
    exact = sum(problem.probability(y).detach() * sum(kl_S[s] for s in states_of(y)) for y in SEQUENCES)
    loss = problem.expected_loss(ALL_SINGLE, weight=0.0)
    # At the rollout's policy the future adds −w F to the loss itself, so with w = 0 the values agree too.
    assert float(loss.detach()) == pytest.approx(float(exact.detach()))
    torch.testing.assert_close(problem.gradient(loss), problem.gradient(exact), rtol=1e-10, atol=1e-12)


def mean(numbers):
    return sum(numbers) / len(numbers)


@pytest.mark.parametrize("settings", [{"gamma": 0.7, "weight": 0.3}, {"length_normalization": True, "gamma": 0.9}])
@pytest.mark.parametrize("signal", ["log_ratio", "max"])
def test_every_sample_matches_the_loop(signal, settings):
    """−Σ_t [ Σ_a π(a|s_t) g(s_t, a) + w (F_t − b_t) log π(y_t|s_t) ], b_t of the other two samples."""
    problem = Problem(signal)
    weight, gamma = settings.get("weight", 1.0), settings.get("gamma", 1.0)
    for samples in itertools.product(SEQUENCES[::2], SEQUENCES[::3], [(1, 1)]):
        g_SV = problem.g()
        futures = []
        for y in samples:
            earned = [float(g_SV[s, a].detach()) for s, a in zip(states_of(y), y, strict=True)]
            # F_2 = 0 and F_1 = γ g_2, over one token: of these lengths, normalisation divides by 1
            futures.append([gamma * earned[1] if len(y) == 2 and t == 0 else 0.0 for t in range(2)])
        loop = 0.0
        for i, y in enumerate(samples):
            for t, (s, a) in enumerate(zip(states_of(y), y, strict=True)):
                baseline = mean([futures[j][t] for j in range(3) if j != i])
                immediate = (problem.logps_SV[s].exp() * g_SV[s]).sum()
                loop = loop - (immediate + weight * (futures[i][t] - baseline) * problem.logps_SV[s, a]) / 3
        found, expected = problem.gradient(problem.loss(samples, **settings)), problem.gradient(loop)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# ---- the future


def futures_by_loop(signals, length, gamma, length_normalization):
    rows = []
    for t in range(length):
        later = [gamma ** (i - t) * signals[i] for i in range(t + 1, length)]
        rows.append(math.fsum(later) / (len(later) or 1 if length_normalization else 1))
    return rows


def padded(rows, T=6):
    return [row + [0.0] * (T - len(row)) for row in rows]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length_normalization", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 0.8, 0.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_futures_match_the_loop(seed, gamma, length_normalization, dtype):
    batch = ragged_batch(seed)
    signals_BT = normal(8, 6, seed=seed, dtype=dtype)
    settings = {"gamma": gamma, "length_normalization": length_normalization}
    rows = [
        futures_by_loop(signals_BT[i].tolist(), length, gamma, length_normalization) for i, length, _ in batch.rows
    ]
    futures_BT = future_returns(signals_BT, batch.mask_BT, **settings)
    assert_matches(futures_BT, padded(rows), dtype)
    for K in (2, 4):
        expected = []
        for i, length, _ in batch.rows:
            others = [j for j in range(i // K * K, i // K * K + K) if j != i]
            at = [mean([rows[j][t] if t < len(rows[j]) else 0.0 for j in others]) for t in range(length)]
            expected.append([rows[i][t] - at[t] for t in range(length)])
        found = future_advantages(futures_BT, batch.mask_BT, num_generations=K)
        assert_matches(found, padded(expected), dtype)


def test_futures_by_hand():
    signals_BT, mask_BT = torch.tensor([[1.0, 2.0, 4.0, 9.0]]), torch.tensor([[True, True, True, False]])
    # F_3 = 0, F_2 = 4, F_1 = 2 + 4; with γ = ½: F_2 = ½·4 = 2, F_1 = ½·2 + ¼·4 = 2; per token: 6/2, 4/1
    assert future_returns(signals_BT, mask_BT).tolist() == [[6.0, 4.0, 0.0, 0.0]]
    assert future_returns(signals_BT, mask_BT, gamma=0.5).tolist() == [[2.0, 2.0, 0.0, 0.0]]
    assert future_returns(signals_BT, mask_BT, length_normalization=True).tolist() == [[3.0, 4.0, 0.0, 0.0]]


def test_future_advantages_by_hand():
    # Of the second sample only one token is there, with nothing to come: it is a baseline of 0 from t = 1 on.
    futures_BT, mask_BT = (
        torch.tensor([[6.0, 4.0, 0.0], [0.0, 0.0, 0.0]]),
        torch.tensor([[True] * 3, [True, False, False]]),
    )
    assert future_advantages(futures_BT, mask_BT, num_generations=2).tolist() == [[6.0, 4.0, 0.0], [-6.0, 0.0, 0.0]]


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("seed", SEEDS)
def test_what_stands_behind_the_mask_changes_no_future(seed, poison):
    batch = ragged_batch(seed)
    entries = (normal(8, 6, seed=seed), batch.mask_BT)
    for settings in ({"gamma": 0.9}, {"length_normalization": True}):
        assert_padding_is_ignored(
            lambda signals, s=settings: future_returns(signals, batch.mask_BT, **s), entries, poison=poison
        )
    assert_padding_is_ignored(
        lambda futures: future_advantages(futures, batch.mask_BT, num_generations=4), entries, poison=poison
    )


# ---- signals


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("seed", SEEDS)
def test_teacher_forcing_signals_add_up_to_the_rewards_minus_the_first_value(kind, seed):
    """Σ_t g(s_t, y_t) = Σ_t r_t − V_1 for a completion that ended, with r_t in loops from the papers."""
    z_TV, ids = normal(5, 7, seed=seed, dtype=torch.float64, scale=3.0) + 4, [3, 6, 0, 2]  # s_1 .. s_5, s_5 after EOS
    signal_TV = teacher_forcing_signal([z_TV[:4]], [1.0], value=kind)
    for t in range(4):
        mean_z = mean(z_TV[t].tolist())
        expected = [z - mean_z - value(z_TV[t].tolist(), kind) for z in z_TV[t].tolist()]
        assert_matches(signal_TV[t], expected)
    rewards = teacher_forcing(z_TV.tolist(), ids, ended=True, kind=kind)
    total = float(signal_TV[range(4), ids].sum())
    assert total == pytest.approx(sum(rewards) - value(z_TV[0].tolist(), kind))
    if kind == "soft":
        assert total == pytest.approx(sum(log_probability(z_TV[t].tolist(), ids[t]) for t in range(4)))


def test_teacher_forcing_signals_by_hand():
    # z = (0, log 3): max: (−log 3, 0); expected, V = ¾ log 3: (−¾ log 3, ¼ log 3); soft, V = log 4: (log ¼, log ¾)
    z_NV, log3 = torch.tensor([[0.0, math.log(3)]]), math.log(3)
    assert_matches(teacher_forcing_signal([z_NV], [1.0], value="max"), [[-log3, 0.0]])
    assert_matches(teacher_forcing_signal([z_NV], [1.0], value="expected"), [[-0.75 * log3, 0.25 * log3]])
    assert_matches(teacher_forcing_signal([z_NV], [1.0], value="soft"), [[math.log(0.25), math.log(0.75)]])
    # Two teachers, shares ¼ and ¾, the second with its preference the other way round and a column more: only the
    # common ones, but V is each teacher's own. max: ¼ (−log 3, 0) + ¾ (0 − 5, −log 3 − 5)
    other_NV = torch.tensor([[log3, 0.0, log3 + 5]])
    found = teacher_forcing_signal([z_NV, other_NV], [1.0, 3.0], value="max")
    assert_matches(found, [[-0.25 * log3 - 0.75 * 5, -0.75 * (log3 + 5)]])


def test_an_unknown_value_is_refused():
    with pytest.raises(ValueError, match=r"value must be one of .*'max', 'expected', 'soft'.*; got 'mean'"):
        teacher_forcing_signal([normal(2, 3, seed=0)], [1.0], value="mean")


def test_log_ratio_signals_by_hand():
    """Id 1 is forbidden; the second teacher has a padded row more, the student none: what is left is ids 0 and 2."""
    log = math.log
    one_NV = torch.tensor([[0.0, 50.0, log(3)]])  # p = ¼, ¾
    other_NV = torch.tensor([[log(9), -50.0, 0.0, 70.0]])  # p = 9/10, 1/10
    settings = {"forbidden_V": torch.tensor([False, True, False, True, True])}
    found = log_ratio_signal([one_NV], [1.0], **settings)
    assert found.shape == (1, 3) and found[0, 1] < -1e38
    assert_matches(found[:, [0, 2]], [[log(0.25), log(0.75)]])
    # shares ½: ½ (¼ + 9/10), ½ (¾ + 1/10)
    found = log_ratio_signal([one_NV, other_NV], [2.0, 2.0], **settings)
    assert_matches(found[:, [0, 2]], [[log(0.575), log(0.425)]])
    # the mean of the logits, ½ (log 9, log 3): odds √3 : 1
    found = log_ratio_signal([one_NV, other_NV], [1.0, 1.0], ensemble=mean_of_logits, **settings)
    odds = math.sqrt(3)
    assert_matches(found[:, [0, 2]], [[log(odds / (1 + odds)), log(1 / (1 + odds))]])
    # a student with fewer rows than either teacher
    assert log_ratio_signal([one_NV, other_NV], [1, 1], forbidden_V=torch.tensor([False, False])).shape == (1, 2)
    assert log_ratio_signal([other_NV], [1]).shape == (1, 4)


# ---- the loss

N, V, D = 9, 13, 5
STUDENT_V = V + 3  # the student's head has three padding rows
FORBIDDEN_V = torch.arange(STUDENT_V) % 7 == 0
ALLOWED = [v for v in range(V) if v % 7]
SLICES = [1, 2 * STUDENT_V, 4 * STUDENT_V - 1, 10**6]  # logits allowed at a time


class Batch:
    """A student and two teachers of other widths and vocabularies, all with linear heads; position 3 has no weight."""

    def __init__(self):
        self.hidden_ND = normal(N, D, seed=0).requires_grad_()
        self.weight_VD = normal(STUDENT_V, D, seed=1).requires_grad_()
        self.teacher_hidden = [normal(N, 2 * D, seed=2).requires_grad_(), normal(N, D, seed=3)]
        self.teacher_weights = [normal(V, 2 * D, seed=4).requires_grad_(), normal(V + 1, D, seed=5)]
        self.weights_N = torch.linspace(0.02, 0.1, N)
        self.weights_N[3] = 0.0
        self.chosen_N = torch.tensor(ALLOWED[:N])
        self.futures_N = normal(N, seed=6)
        self.old_logps_N = normal(N, seed=7) - 2

    @property
    def teachers(self):
        heads = [partial(torch.nn.functional.linear, weight=weight) for weight in self.teacher_weights]
        return list(map(TeacherStates, self.teacher_hidden, heads, [1.0, 3.0]))

    @property
    def per_position(self):
        return self.weights_N, self.chosen_N, self.futures_N, self.old_logps_N

    def sliced(self, teacher_signal, **settings):
        return sliced_all_actions_loss(
            self.hidden_ND,
            lambda hidden: hidden @ self.weight_VD.T,
            [self.weight_VD],
            self.teachers,
            *self.per_position,
            teacher_signal=teacher_signal,
            vocab_size=STUDENT_V,
            forbidden_V=FORBIDDEN_V,
            **settings,
        )

    def whole(self, teacher_signal, **settings):
        logits = [hidden @ weight.T for hidden, weight in zip(self.teacher_hidden, self.teacher_weights, strict=True)]
        signal_NV = teacher_signal([logits_NV.detach() for logits_NV in logits], [1.0, 3.0])
        return all_actions_loss(
            self.hidden_ND @ self.weight_VD.T, signal_NV, *self.per_position, forbidden_V=FORBIDDEN_V, **settings
        )

    def gradients(self, loss):
        return torch.autograd.grad(loss, [self.hidden_ND, self.weight_VD])


LOG_RATIO = partial(log_ratio_signal, forbidden_V=FORBIDDEN_V)
CASES = {
    "log ratio": (LOG_RATIO, {"subtract_log_pi": True}),
    "log ratio, clipped": (LOG_RATIO, {"subtract_log_pi": True, "epsilon": 0.2, "temperature": 0.7}),
    "teacher forcing": (partial(teacher_forcing_signal, value="expected"), {"subtract_log_pi": False}),
}


def loss_by_loop(batch, signals_NV, *, subtract_log_pi, epsilon=None, temperature=1.0):
    """The loss and its metrics over Python's floats."""
    logits_NV = (batch.hidden_ND @ batch.weight_VD.T).tolist()
    parts = {"loss": [], "immediate": [], "entropy": [], "approx_kl": []}
    for n, (weight, chosen, future, old) in enumerate(zip(*(x.tolist() for x in batch.per_position), strict=True)):
        scaled = {v: logits_NV[n][v] / temperature for v in ALLOWED}
        normaliser = math.log(math.fsum(math.exp(z) for z in scaled.values()))
        logps = {v: z - normaliser for v, z in scaled.items()}
        earned = {v: signals_NV[n][v] - (logps[v] if subtract_log_pi else 0.0) for v in ALLOWED}
        immediate = -math.fsum(math.exp(logps[v]) * earned[v] for v in ALLOWED)
        ratio = math.exp(logps[chosen] - old)
        surrogate = ratio * future
        if epsilon is not None:
            surrogate = min(surrogate, min(max(ratio, 1 - epsilon), 1 + epsilon) * future)
        parts["loss"].append(weight * (immediate - surrogate))
        parts["immediate"].append(weight * immediate)
        parts["entropy"].append(-weight * math.fsum(math.exp(p) * p for p in logps.values()))
        parts["approx_kl"].append(weight * (ratio - 1 - math.log(ratio)))
    return {name: math.fsum(values) for name, values in parts.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_matches_the_loop(case):
    teacher_signal, settings = CASES[case]
    batch = Batch()
    logits = [(h @ w.T).detach() for h, w in zip(batch.teacher_hidden, batch.teacher_weights, strict=True)]
    loss, metrics = batch.whole(teacher_signal, **settings)
    expected = loss_by_loop(batch, teacher_signal(logits, [1.0, 3.0]).tolist(), **settings)
    assert_matches(loss, expected.pop("loss"), torch.float32)
    assert metrics.keys() == expected.keys()
    for name, number in expected.items():
        assert not metrics[name].requires_grad
        assert_matches(metrics[name], number)


@pytest.mark.parametrize("max_elements", SLICES)
@pytest.mark.parametrize("case", CASES)
def test_slices_give_the_loss_and_the_gradients_of_the_whole(case, max_elements):
    batch, (teacher_signal, settings) = Batch(), CASES[case]
    loss, metrics = batch.sliced(teacher_signal, **settings, max_elements=max_elements)
    whole, whole_metrics = batch.whole(teacher_signal, **settings)
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics, whole_metrics, rtol=1e-5, atol=1e-6)
    # As a part of a larger loss, so that the upstream gradient is not 1.
    for found, expected in zip(batch.gradients(-2.5 * loss), batch.gradients(-2.5 * whole), strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("max_elements", [1, 2 * STUDENT_V, 10**6])
def test_chosen_signals_in_slices_are_those_of_the_whole(max_elements):
    batch = Batch()
    logits = [h @ w.T for h, w in zip(batch.teacher_hidden, batch.teacher_weights, strict=True)]
    for teacher_signal, _ in CASES.values():
        found = chosen_signals(
            batch.teachers, batch.chosen_N, teacher_signal=teacher_signal, vocab_size=V, max_elements=max_elements
        )
        expected = teacher_signal(logits, [1.0, 3.0])[range(N), batch.chosen_N]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("slices", [1, 10**6])
def test_only_the_student_gets_a_gradient(slices):
    batch = Batch()
    for tensor in (batch.weights_N, batch.futures_N, batch.old_logps_N):
        tensor.requires_grad_()
    constants = [
        batch.weights_N,
        batch.futures_N,
        batch.old_logps_N,
        batch.teacher_hidden[0],
        batch.teacher_weights[0],
    ]
    for teacher_signal, settings in CASES.values():
        loss, _ = batch.sliced(teacher_signal, **settings, max_elements=slices)
        assert torch.autograd.grad(loss, constants, allow_unused=True, retain_graph=True) == (None,) * 5
        assert all(gradient.abs().max() > 1e-3 for gradient in batch.gradients(loss))


@pytest.mark.parametrize("case", CASES)
def test_positions_without_weight_get_no_gradient(case):
    batch, (teacher_signal, settings) = Batch(), CASES[case]
    loss, _ = batch.sliced(teacher_signal, **settings)
    hidden_grad_ND, _ = batch.gradients(loss)
    assert (hidden_grad_ND[3] == 0).all() and (hidden_grad_ND[4] != 0).any()


@pytest.mark.parametrize("n", [0, 4])
def test_no_position_counts(n):
    batch = Batch()
    batch.hidden_ND = normal(n, D, seed=0).requires_grad_()
    batch.teacher_hidden = [hidden[:n] for hidden in batch.teacher_hidden]
    batch.weights_N = torch.zeros(n)
    batch.chosen_N, batch.futures_N, batch.old_logps_N = (x[:n] for x in batch.per_position[1:])
    loss, metrics = batch.sliced(LOG_RATIO, subtract_log_pi=True)
    assert loss == 0 and all(metric == 0 for metric in metrics.values())
    assert all((gradient == 0).all() for gradient in batch.gradients(loss))


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_the_temperature_is_the_students(temperature):
    """π = softmax(z / τ), while the teacher's signal stays what it is."""
    logits_NV, signal_NV = normal(2, N, V, seed=0)
    logits_NV.requires_grad_()
    batch = Batch()
    results = []
    for z_NV, setting in ((logits_NV, temperature), (logits_NV / temperature, 1.0)):
        loss, _ = all_actions_loss(z_NV, signal_NV, *batch.per_position, subtract_log_pi=True, temperature=setting)
        results.append((loss, *torch.autograd.grad(loss, logits_NV)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_the_clipped_future_is_ppos_surrogate_by_hand():
    """Four tokens of π = ½; ratios 2 and ½ against π_old, futures +1 and −1, ε = 0.2; no signal, so nothing else.

    ρ = 2, A = +1: min(2, 1.2) = 1.2, clipped; A = −1: min(−2, −1.2) = −2, not. ρ = ½, A = +1: min(½, 0.8) = ½, not;
    A = −1: min(−½, −0.8) = −0.8, clipped. Loss: −(1.2 − 2 + ½ − 0.8) = 1.1; unclipped −(2 − 2 + ½ − ½) = 0.
    """
    logits_NV = torch.zeros(4, 2, requires_grad=True)
    ratios_N, futures_N = torch.tensor([2.0, 2.0, 0.5, 0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    arguments = (torch.zeros(4, 2), torch.ones(4), torch.zeros(4, dtype=torch.long), futures_N, (0.5 / ratios_N).log())
    loss, _ = all_actions_loss(logits_NV, *arguments, subtract_log_pi=False, epsilon=0.2)
    assert float(loss.detach()) == pytest.approx(1.1)
    # ∂(−ρ A)/∂z = −A ρ ∂log π/∂z = −A ρ (½, −½); 0 where clipped
    (gradient,) = torch.autograd.grad(loss, logits_NV)
    assert_matches(gradient, [[0.0, 0.0], [1.0, -1.0], [-0.25, 0.25], [0.0, 0.0]])
    loss, _ = all_actions_loss(logits_NV, *arguments, subtract_log_pi=False)
    assert float(loss.detach()) == pytest.approx(0.0)
    (gradient,) = torch.autograd.grad(loss, logits_NV)
    assert_matches(gradient, [[-1.0, 1.0], [1.0, -1.0], [-0.25, 0.25], [0.25, -0.25]])


@pytest.mark.parametrize("max_elements", SLICES)
def test_a_student_that_equals_its_teacher_earns_and_learns_nothing(max_elements):
    batch = Batch()
    teacher_weight_VD = batch.weight_VD.detach().clone()
    batch.teacher_hidden, batch.teacher_weights = [batch.hidden_ND.detach()], [teacher_weight_VD]
    logps_NV = (batch.hidden_ND @ batch.weight_VD.T).detach().masked_fill(FORBIDDEN_V, -torch.inf).log_softmax(dim=-1)
    batch.old_logps_N = logps_NV[range(N), batch.chosen_N]
    teacher = TeacherStates(batch.teacher_hidden[0], lambda hidden: hidden @ teacher_weight_VD.T)
    earned_N = chosen_signals([teacher], batch.chosen_N, teacher_signal=LOG_RATIO, vocab_size=STUDENT_V)
    torch.testing.assert_close(earned_N, batch.old_logps_N, rtol=0, atol=1e-6)
    batch.futures_N = torch.zeros(N)
    loss, metrics = batch.sliced(LOG_RATIO, subtract_log_pi=True, max_elements=max_elements)
    torch.testing.assert_close(loss, torch.tensor(0.0), rtol=0, atol=1e-6)
    assert float(metrics["entropy"]) > 0.1
    for gradient in batch.gradients(loss):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


def test_extreme_logits_are_no_nan():
    """Logits of ±1e4, with garbage at the forbidden ids."""
    signs = torch.randint(0, 2, (2, N, STUDENT_V), generator=torch.Generator().manual_seed(0)) * 2 - 1
    student_NV, teacher_NV = 1e4 * signs + normal(2, N, STUDENT_V, seed=0)
    student_NV[:, FORBIDDEN_V], teacher_NV[:, FORBIDDEN_V] = 1e30, -1e30
    student_NV.requires_grad_()
    batch = Batch()
    loss, metrics = all_actions_loss(
        student_NV,
        LOG_RATIO([teacher_NV], [1.0]),
        batch.weights_N,
        batch.chosen_N,
        batch.futures_N,
        student_NV.detach().masked_fill(FORBIDDEN_V, -torch.inf).log_softmax(dim=-1)[range(N), batch.chosen_N],
        subtract_log_pi=True,
        forbidden_V=FORBIDDEN_V,
    )
    (gradient,) = torch.autograd.grad(loss, student_NV)
    assert loss.isfinite() and all(metric.isfinite() for metric in metrics.values())
    assert gradient.isfinite().all() and (gradient[:, FORBIDDEN_V] == 0).all()
