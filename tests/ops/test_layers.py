"""Losses on layers against slow float64 loops that are written from the papers."""

import math

import pytest
import torch

from rlkd_trl.ops.layers import (
    attention_kl,
    attention_score_mse,
    cosine_distance,
    mean_squared_error,
    normalised_distance,
)
from rlkd_trl.ops.relations import relation_kl, relation_scores
from tests.ops.ragged_batches import DTYPES, POISONS, SEEDS, assert_matches, assert_padding_is_ignored, normal

B, S, D, H = 4, 5, 6, 3
LENGTHS = [5, 3, 1, 0]  # whole, cut, one token, nothing but padding
MASK_BS = torch.arange(S)[None, :] < torch.tensor(LENGTHS)[:, None]
PAIRS_BSS = MASK_BS[:, :, None] & MASK_BS[:, None, :]
CAUSAL_BSS = PAIRS_BSS & torch.ones(S, S, dtype=torch.bool).tril()
HEADS = 2

# Losses of [B, S, D] tensors with a mask of tokens.
OF_STATES = {
    "mean_squared_error": lambda student, teacher: mean_squared_error(student, teacher, MASK_BS),
    "cosine_distance": lambda student, teacher: cosine_distance(student, teacher, MASK_BS),
    "relation_kl": lambda student, teacher: relation_kl(student, teacher, MASK_BS, relation_heads=HEADS),
}
# Of [B, H, S, S] tensors with a mask of pairs.
OF_SCORES = {"attention_score_mse": attention_score_mse, "attention_kl": attention_kl}


# ---- the papers' equations, number by number


def slow_mse(student, teacher):
    return [
        [sum((x - y) ** 2 for x, y in zip(s, t, strict=True)) / len(s) for s, t in rows]
        for rows in student_teacher(student, teacher)
    ]


def student_teacher(student, teacher):
    return [list(zip(s, t, strict=True)) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]


def dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def slow_cosine(student, teacher):
    return [
        [1 - dot(s, t) / math.sqrt(dot(s, s) * dot(t, t)) for s, t in rows]
        for rows in student_teacher(student, teacher)
    ]


def slow_score_mse(student, teacher, mask_BSS):
    """(1/h) Σ_i MSE(A_i^S, A_i^T), query by query."""
    result = []
    for b in range(B):
        result.append([])
        for i in range(S):
            keys = [j for j in range(S) if mask_BSS[b, i, j]]
            squares = [float(student[b, h, i, j] - teacher[b, h, i, j]) ** 2 for h in range(H) for j in keys]
            result[-1].append(sum(squares) / (H * len(keys)) if keys else 0.0)
    return result


def slow_softmax(values):
    largest = max(values)
    exponentials = [math.exp(value - largest) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def slow_attention_kl(student, teacher, mask_BSS):
    """1/A_h Σ_a Σ_j p_j (log p_j − log q_j), p the teacher's attention, q the student's."""
    heads = student.shape[1]
    result = []
    for b in range(B):
        result.append([])
        for i in range(S):
            keys = [j for j in range(S) if mask_BSS[b, i, j]]
            total = 0.0
            for h in range(heads) if keys else ():
                p, q = (slow_softmax([float(x[b, h, i, j]) for j in keys]) for x in (teacher, student))
                total += sum(a * (math.log(a) - math.log(c)) for a, c in zip(p, q, strict=True))
            result[-1].append(total / heads)
    return result


def slow_relations(vectors_BSD, heads):
    """A Aᵀ / √d_r of each relation head."""
    width = vectors_BSD.shape[-1] // heads
    return torch.tensor(
        [
            [
                [
                    [
                        dot(x[i][a * width : (a + 1) * width], x[j][a * width : (a + 1) * width]) / math.sqrt(width)
                        for j in range(S)
                    ]
                    for i in range(S)
                ]
                for a in range(heads)
            ]
            for x in vectors_BSD.tolist()
        ],
        dtype=torch.float64,
    )


def behind_mask_zero(values):
    return [[value if MASK_BS[b, i] else 0.0 for i, value in enumerate(row)] for b, row in enumerate(values)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_states(seed, dtype):
    student, teacher = (normal(B, S, D, seed=seed + i, dtype=torch.float64) for i in (0, 10))
    given = student.to(dtype), teacher.to(dtype)
    assert_matches(
        OF_STATES["mean_squared_error"](*given), behind_mask_zero(slow_mse(*map(torch.Tensor.double, given))), dtype
    )
    assert_matches(
        OF_STATES["cosine_distance"](*given), behind_mask_zero(slow_cosine(*map(torch.Tensor.double, given))), dtype
    )
    first = [x[:, 0] for x in given]
    by_hand = []
    for s, t in zip(*(x.double().tolist() for x in first), strict=True):
        by_hand.append(
            sum((x / math.sqrt(dot(s, s)) - y / math.sqrt(dot(t, t))) ** 2 for x, y in zip(s, t, strict=True))
        )
    assert_matches(normalised_distance(*first), by_hand, dtype)


@pytest.mark.parametrize("mask_BSS", [PAIRS_BSS, CAUSAL_BSS], ids=["encoder", "decoder"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_attention(seed, dtype, mask_BSS):
    given = [normal(B, H, S, S, seed=seed + i, dtype=dtype, scale=2.0) for i in (0, 10)]
    assert_matches(
        attention_score_mse(*given, mask_BSS), slow_score_mse(*(x.double() for x in given), mask_BSS), dtype
    )
    assert_matches(attention_kl(*given, mask_BSS), slow_attention_kl(*(x.double() for x in given), mask_BSS), dtype)


@pytest.mark.parametrize(("heads", "widths"), [(1, (6, 6)), (2, (6, 10)), (6, (6, 12))])
@pytest.mark.parametrize("dtype", DTYPES)
def test_relations_of_models_of_any_widths(heads, widths, dtype):
    student, teacher = (normal(B, S, width, seed=i, dtype=dtype) for i, width in enumerate(widths))
    relations = [slow_relations(torch.where(MASK_BS[..., None], x, 0).double(), heads) for x in (student, teacher)]
    assert_matches(relation_scores(student, MASK_BS, relation_heads=heads), relations[0].tolist(), dtype)
    expected = slow_attention_kl(*relations, PAIRS_BSS)
    assert_matches(relation_kl(student, teacher, MASK_BS, relation_heads=heads), expected, dtype)


def test_minilms_value_relation_is_that_of_the_attention_heads():
    """softmax(V Vᵀ / √d_k) of each head, as the paper has it, of values [B, S, H, d]."""
    values = normal(1, S, H, 2, seed=3, dtype=torch.float64)
    mask = torch.ones(1, S, dtype=torch.bool)
    by_head = torch.stack([(v @ v.T / math.sqrt(2)).softmax(-1) for v in values[0].unbind(1)])
    found = relation_scores(values.flatten(2), mask, relation_heads=H).softmax(-1)
    torch.testing.assert_close(found[0], by_head, rtol=1e-12, atol=1e-12)


def test_relation_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="4 relation heads do not divide the width 6"):
        relation_scores(torch.zeros(1, 2, 6), torch.ones(1, 2, dtype=torch.bool), relation_heads=4)


def test_worked_numbers():
    one = torch.ones(1, 1, dtype=torch.bool)
    # ((1 − 3)² + (2 − 2)²) / 2
    assert mean_squared_error(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 2.0]]]), one).item() == 2.0
    # at right angles: 1 − 0; both of length 1 at right angles: 1² + 1²
    right = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    assert cosine_distance(right[0][None], right[1][None], one).item() == 1.0
    assert normalised_distance(*right).item() == pytest.approx(2.0)
    # two keys, scores 0 and log 3 for the teacher (¼, ¾), level for the student (½, ½): ¼ log ½ + ¾ log 3/2
    teacher = torch.tensor([0.0, math.log(3)]).expand(1, 1, 2, 2)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    found = attention_kl(torch.zeros(1, 1, 2, 2), teacher, torch.ones(1, 2, 2, dtype=torch.bool))
    assert found.tolist() == [pytest.approx([expected, expected])]


# ---- what they have in common


@pytest.mark.parametrize("name", [*OF_STATES, *OF_SCORES, "normalised_distance"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name):
    if name in OF_SCORES:
        teacher, loss = normal(B, H, S, S, seed=0, dtype=torch.float64), OF_SCORES[name]
        value_of = lambda student: loss(student, teacher, PAIRS_BSS)  # noqa: E731
    elif name in OF_STATES:
        teacher = normal(B, S, D, seed=0, dtype=torch.float64)
        value_of = lambda student: OF_STATES[name](student, teacher)  # noqa: E731
    else:
        teacher = normal(B, D, seed=0, dtype=torch.float64)
        value_of = lambda student: normalised_distance(student, teacher)  # noqa: E731
    for shift, is_zero in ((0.0, True), (0.1, False)):
        student = (teacher + shift * normal(*teacher.shape, seed=1, dtype=torch.float64)).requires_grad_()
        value = value_of(student)
        (gradient,) = torch.autograd.grad(value.sum(), student)
        value = value.detach()
        assert (float(value.abs().max()) < 1e-12) == is_zero and (float(gradient.abs().max()) < 1e-12) == is_zero


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("name", OF_STATES)
def test_padding_of_states_is_ignored(name, poison):
    real = MASK_BS[..., None].expand(B, S, D)
    inputs = [(normal(B, S, D, seed=seed, dtype=torch.float64), real) for seed in (0, 1)]
    assert_padding_is_ignored(OF_STATES[name], *inputs, poison=poison)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("mask_BSS", [PAIRS_BSS, CAUSAL_BSS], ids=["encoder", "decoder"])
@pytest.mark.parametrize("name", OF_SCORES)
def test_padding_of_scores_is_ignored(name, mask_BSS, poison):
    real = mask_BSS[:, None].expand(B, H, S, S)
    inputs = [(normal(B, H, S, S, seed=seed, dtype=torch.float64), real) for seed in (0, 1)]
    assert_padding_is_ignored(lambda s, t: OF_SCORES[name](s, t, mask_BSS), *inputs, poison=poison)


@pytest.mark.parametrize("name", [*OF_STATES, *OF_SCORES])
def test_half_precision_is_computed_in_float32(name):
    shape, loss = (
        ((B, H, S, S), lambda s, t: OF_SCORES[name](s, t, PAIRS_BSS))
        if name in OF_SCORES
        else ((B, S, D), OF_STATES[name])
    )
    given = [normal(*shape, seed=seed).bfloat16() for seed in (0, 1)]
    found = loss(*given)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(*(x.float() for x in given)), rtol=0, atol=0)


@pytest.mark.parametrize("name", OF_SCORES)
def test_large_scores_stay_finite(name):
    """Logarithms of probabilities that underflow, too: KL of (1, e^-200, …) from a level distribution is log 5."""
    teacher = torch.zeros(1, 1, S, S)
    teacher[..., 0] = 200.0
    found = OF_SCORES[name](torch.zeros(1, 1, S, S), teacher, torch.ones(1, S, S, dtype=torch.bool))
    expected = {"attention_kl": math.log(S), "attention_score_mse": 200.0**2 / S}[name]
    torch.testing.assert_close(found, torch.full((1, S), expected))
