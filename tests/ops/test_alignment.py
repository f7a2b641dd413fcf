"""Common spans of two tokenisations, against a search over all pairs of positions."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlkd_trl.ops.alignment import (
    INSIDE,
    NO_SPAN,
    common_ends,
    in_two_log_probs,
    receivers,
    span_divergences,
    states_before,
    summed_at,
)
from rlkd_trl.ops.divergences import DIVERGENCES, forward_kl, reverse_kl, tvd
from rlkd_trl.ops.lm_head import token_log_probs

# Lengths of tokens; 0 is a token without characters, None one that ends within a character.
LENGTHS = st.lists(st.one_of(st.none(), st.integers(0, 4)), min_size=1, max_size=12)


def ends_of(lengths: list[int | None], total: int) -> list[int]:
    """Ends of such tokens in a text of `total` characters, which the last one completes."""
    ends, read = [], 0
    for length in lengths:
        read = min(total, read + (length or 0))
        ends.append(INSIDE if length is None else read)
    return [*ends[:-1], total]


def slow_spans(first: list[int], second: list[int]) -> list[tuple[int, int]]:
    """All pairs (i, j) after which both have read the same text, one by one: the last of each kind counts."""
    pairs, i0, j0 = [], 0, 0
    for end in range(max(first) + 1):
        i = max((n + 1 for n, e in enumerate(first) if e == end), default=0)
        j = max((n + 1 for n, e in enumerate(second) if e == end), default=0)
        if i > i0 and j > j0:
            pairs.append((i, j))
            i0, j0 = i, j
    return pairs


@given(LENGTHS, LENGTHS, st.integers(1, 20))
def test_spans_are_the_smallest_ones_and_cover_both_sides(first, second, total):
    first, second = ends_of(first, total), ends_of(second, total)
    spans = common_ends(first, second)
    assert spans == slow_spans(first, second)
    assert spans[-1] == (len(first), len(second))


def test_spans_of_a_worked_example():
    # "The café is" as The| ca|fé| is and T|he ca|f|é| is, where f| and é| are bytes: é is two tokens.
    first = [3, 6, 8, 11]
    second = [1, 6, 7, INSIDE, 8, 11]
    assert common_ends(first, second) == [(2, 2), (3, 5), (4, 6)]
    assert receivers([(2, 2), (3, 5), (4, 6)]) == ([1, 1, 2, 3], [1, 1, 2, 2, 2, 3])
    # State 1, within the first span, has the value of its beginning.
    assert states_before([(2, 2), (3, 5), (4, 6)], 5) == [0, 0, 2, 5, 6, 6]


def test_one_side_without_tokens_has_no_span():
    assert common_ends([], [1]) == [] and common_ends([1, 1], []) == []
    assert states_before([], 2) == [0, 0, 0]


def test_sums_keep_each_completions_sum_and_read_nothing_behind_the_mask():
    values_BU = torch.tensor([[0.5, -2.0, 4.0, math.nan], [1.0, math.nan, math.nan, math.nan]])
    mask_BU = torch.tensor([[True, True, True, False], [True, False, False, False]])
    receiver_BU = torch.tensor([[1, 1, 2, 0], [0, 0, 0, 0]])
    # Row 0: token 1 gets 0.5 − 2 and token 2 gets 4; row 1: token 0 gets 1.
    expected = [[0.0, -1.5, 4.0], [1.0, 0.0, 0.0]]
    assert summed_at(values_BU, receiver_BU, mask_BU, length=3).tolist() == expected


def test_two_way_log_probabilities_and_their_gradient():
    logps = torch.tensor([-0.25, -40.0, 0.0], requires_grad=True)
    both = in_two_log_probs(logps)
    # log(1 − e^−0.25) = log(0.2211992) = −1.508692; of e^−40 it is −e^−40.
    assert both[0].tolist() == pytest.approx([-0.25, -1.508692], rel=1e-5)
    assert both[1, 1].item() == pytest.approx(-math.exp(-40), rel=1e-5)
    both.sum().backward()
    assert torch.isfinite(logps.grad).all()


@pytest.mark.parametrize("divergence", [forward_kl, tvd])
def test_divergences_of_spans_against_a_loop(divergence):
    """Spans of two and one tokens in row 0, the second not to be learnt; in row 1 one of one, and a token in none."""
    nan = math.nan
    teacher = torch.tensor([[0.0, math.log(0.3), math.log(0.6)], [math.log(0.9), 0.0, nan]])
    q = torch.tensor([[0.5, 0.8, 0.1], [0.7, 0.4, nan]])
    student = q.log().requires_grad_()
    mask = torch.tensor([[True, True, True], [True, True, False]])
    learnt = torch.tensor([[True, True, False], [True, True, False]])
    last = torch.tensor([[1, 1, 2], [0, NO_SPAN, NO_SPAN]])
    result = span_divergences(teacher, student, last, mask, learnt, divergence=divergence)

    def of_two(p: float, q: float) -> float:
        if divergence is tvd:
            return abs(p - q)  # ½ (|p − q| + |1 − p − 1 + q|)
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    expected = [[0.0, of_two(0.3, 0.5 * 0.8), 0.0], [of_two(0.9, 0.7), 0.0, 0.0]]
    torch.testing.assert_close(result, torch.tensor(expected))
    result.sum().backward()
    assert student.grad[0, :2].abs().min() > 0 and student.grad[1, 0] != 0
    assert student.grad[0, 2] == 0 and (student.grad[1, 1:] == 0).all()


@pytest.mark.parametrize("gap", [2.0, 14.0, 20.0, 40.0])
@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_what_the_student_is_sure_of_and_the_teacher_not_is_unlearnt(divergence, gap):
    """Logits (g, 0), P = 0.05: with q = 1 / (1 + e^−g), ∂KL(P ‖ q) / ∂z is q−P, ∂KL(q ‖ P) is q(1−q)(g − logit P).

    A second token, which the student leads with by 30 nats, is of the same span and changes neither.
    """
    logits = torch.tensor([[gap, 0.0], [30.0, 0.0]], requires_grad=True)
    logps = token_log_probs(logits, torch.tensor([0, 0]), entropy=False, precise=True).logps[None]
    each = torch.ones(1, 2, dtype=torch.bool)
    teacher = torch.tensor([[0.0, math.log(0.05)]])
    last = torch.ones(1, 2, dtype=torch.long)
    loss = span_divergences(teacher, logps, last, each, each, divergence=divergence).sum()
    loss.backward()
    q, others = 1 / (1 + math.exp(-gap)), 1 / (1 + math.exp(gap)) + 1 / (1 + math.exp(30))
    of_span = q - 0.05 if divergence is forward_kl else q * others * math.log(q / others * 0.95 / 0.05)
    # The span's Q is q q', with 1 − Q = (1 − q) + (1 − q') up to 1e-13; each token has its share of the gradient.
    share = 1 / (1 + math.exp(gap)) / others
    torch.testing.assert_close(logits.grad[0], of_span * share * torch.tensor([1.0, -1.0]), rtol=2e-3, atol=0)
    expected = 0.05 * math.log(0.05 / q) + 0.95 * math.log(0.95 / others)
    if divergence is forward_kl:
        assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_of_a_high_temperature_small_probabilities_count_too():
    """τ D → p log(p / q) − p + q with p = −log P and q = −log Q, for P = e^−3 and Q = e^−9, and for both small."""
    each, last = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.long)

    def loss(p: float, q: float, temperature: float) -> float:
        teacher, student = (torch.tensor([[-x]], dtype=torch.float64) for x in (p, q))
        settings = {"divergence": forward_kl, "temperature": temperature}
        return span_divergences(teacher, student, last, each, each, **settings).item()

    assert loss(3.0, 9.0, 1e6) == pytest.approx(3 * math.log(3 / 9) - 3 + 9, rel=1e-4)
    # A student of 300 tokens without an idea, on what it samples itself: P = e^−9, Q = 1/300 = e^−5.7.
    assert loss(9.0, math.log(300), 1.0) < 0.004
    assert loss(9.0, math.log(300), 100.0) > 0.7


def of_two(name: str, log_p: float, log_q: float, temperature: float) -> float:
    """τ D of (P^(1/τ), 1 − P^(1/τ)) and (Q^(1/τ), 1 − Q^(1/τ)), from the papers' definitions of D."""
    pairs = [
        (math.exp(log_p / temperature), math.exp(log_q / temperature)),
        (-math.expm1(log_p / temperature), -math.expm1(log_q / temperature)),
    ]

    def kl(share: float, swapped: bool) -> float:
        """Of the first, or if swapped the second, from the mixture with `share` of it."""
        total = 0.0
        for p, q in pairs:
            p, q = (q, p) if swapped else (p, q)
            total += p * math.log(p / (share * p + (1 - share) * q))
        return total

    divergences = {
        "forward_kl": lambda: kl(0.0, False),
        "reverse_kl": lambda: kl(0.0, True),
        "jsd": lambda: 0.5 * kl(0.5, False) + 0.5 * kl(0.5, True),
        "tvd": lambda: 0.5 * sum(abs(p - q) for p, q in pairs),
        "skew_kl": lambda: kl(0.1, False),
        "skew_reverse_kl": lambda: kl(0.1, True),
    }
    return temperature * divergences[name]()


@pytest.mark.parametrize("temperature", [1.0, 100.0, 10_000.0])
@pytest.mark.parametrize(("log_p", "log_q"), [(-1e-3, -2e-3), (-2e-4, -1e-4), (-0.5, -9.0), (-9.0, -5.7)])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_float32_is_precise_enough_at_every_temperature(name, log_p, log_q, temperature):
    """Values and gradients of float32's log-probabilities against float64, of spans that both are sure of too."""
    each, last = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.long)
    teacher, student = torch.tensor([[log_p]]), torch.tensor([[log_q]], requires_grad=True)
    settings = {"divergence": DIVERGENCES[name], "temperature": temperature}
    loss = span_divergences(teacher, student, last, each, each, **settings).sum()
    loss.backward()
    assert loss.item() == pytest.approx(of_two(name, log_p, log_q, temperature), rel=1e-4)
    step = abs(log_q) * 1e-4
    above, below = (of_two(name, log_p, log_q + sign * step, temperature) for sign in (1, -1))
    assert student.grad.item() == pytest.approx((above - below) / (2 * step), rel=1e-3)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_model_read_twice_has_no_gradient(name):
    each, last = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[0, 1]])
    student = torch.tensor([[-1e-3, -3.0]], requires_grad=True)
    again = student.detach() * (1 + 1e-6) + 1e-7
    span_divergences(
        again, student, last, each, each, divergence=DIVERGENCES[name], temperature=100.0
    ).sum().backward()
    assert student.grad.abs().max() < 1e-6


class WordsInCharacters:
    """A teacher of random probabilities of up to two words, and tables of a student that writes their characters.

    The spans are words with the space before them, and the end of the text. All texts there are, float64.
    """

    def __init__(self, words: list[str]):
        generator = torch.Generator().manual_seed(0)
        texts = [text for count in range(3) for text in itertools.product(range(len(words)), repeat=count)]
        self.characters = sorted({" ", "$", *"".join(words)})
        self.prefixes: dict[str, int] = {}
        logits = 1.2 * torch.randn(len(texts), len(words) + 1, generator=generator, dtype=torch.float64)
        rows = []
        for text in texts:
            ids, owners, logps, written = [], [], [], ""
            for count in range(len(text) + 1):
                of_state = logits[texts.index(text[:count])].log_softmax(0)
                if count == 2:
                    of_state = torch.tensor([-torch.inf] * len(words) + [0.0], dtype=torch.float64)
                span = f" {words[text[count]]}" if count < len(text) else "$"
                logps.append(of_state[text[count] if count < len(text) else -1])
                for character in span:
                    ids.append((self.prefixes.setdefault(written, len(self.prefixes)), character))
                    written += character
                owners += [len(ids) - 1] * len(span)
            rows.append((ids, owners, logps))
        B, T = len(rows), max(len(ids) for ids, _, _ in rows)
        self.prefix_BT, self.character_BT, self.last_BT = (torch.zeros(B, T, dtype=torch.long) for _ in range(3))
        self.mask_BT = torch.zeros(B, T, dtype=torch.bool)
        self.teacher_BT = torch.zeros(B, T, dtype=torch.float64)
        for b, (ids, owners, logps) in enumerate(rows):
            for t, (prefix, character) in enumerate(ids):
                self.prefix_BT[b, t], self.character_BT[b, t] = prefix, self.characters.index(character)
                self.mask_BT[b, t], self.last_BT[b, t] = True, owners[t]
            for owner, logp in zip(dict.fromkeys(owners), logps, strict=True):
                self.teacher_BT[b, owner] = logp
        self.texts_B = self.teacher_BT.sum(dim=1).exp()  # the teacher's probability of each text

    def student_of_equal_texts(self) -> torch.Tensor:
        """Log-probabilities of characters after each beginning: every text has the teacher's probability."""
        mass = torch.zeros(len(self.prefixes), len(self.characters), dtype=torch.float64)
        weights_BT = self.texts_B[:, None] * self.mask_BT
        mass.index_put_((self.prefix_BT, self.character_BT), weights_BT, accumulate=True)
        return (mass / mass.sum(dim=1, keepdim=True)).log().clamp(min=-40)

    def student_log_probs(self, tables: torch.Tensor) -> torch.Tensor:
        return tables.log_softmax(dim=1)[self.prefix_BT, self.character_BT] * self.mask_BT

    def loss(self, tables: torch.Tensor, **settings) -> torch.Tensor:
        """The mean of the divergences over the teacher's texts."""
        texts = (self.teacher_BT, self.student_log_probs(tables), self.last_BT, self.mask_BT, self.mask_BT)
        return (self.texts_B[:, None] * span_divergences(*texts, **settings)).sum()

    def kl_of_texts(self, tables: torch.Tensor) -> float:
        """KL(teacher ‖ student) of whole texts."""
        of_texts_B = self.student_log_probs(tables.detach()).sum(dim=1)
        return (self.texts_B * (self.texts_B.log() - of_texts_B)).sum().item()


@pytest.mark.parametrize("temperature", [1.0, 100.0])
@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_the_loss_is_least_where_all_texts_have_the_teachers_probability(divergence, temperature):
    """Over the teacher's own texts, if no word begins another: stationary and 0 there, and a descent comes close."""
    world, settings = WordsInCharacters(["ab", "ac", "b"]), {"divergence": divergence, "temperature": temperature}
    assert world.texts_B.sum().item() == pytest.approx(1)
    equal = world.student_of_equal_texts().requires_grad_()
    assert world.kl_of_texts(equal) == pytest.approx(0, abs=1e-9)
    loss = world.loss(equal, **settings)
    assert loss.item() == pytest.approx(0, abs=1e-4)  # a P above 1 − 1e-6 counts as that
    assert torch.autograd.grad(loss, equal)[0].abs().max() < 1e-5
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        direction = torch.randn(equal.shape, generator=generator, dtype=torch.float64)
        assert world.loss(equal.detach() + 0.1 * direction, **settings) > 1e-4
    tables = torch.randn(equal.shape, generator=generator, dtype=torch.float64).requires_grad_()
    before, optimizer = world.kl_of_texts(tables), torch.optim.Adam([tables], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        world.loss(tables, **settings).backward()
        optimizer.step()
    assert before > 2 and world.kl_of_texts(tables) < 0.1 * before


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_words_that_begin_alike_move_the_point(temperature):
    """The student's Q of " a" holds the word "ab" too, and the teacher's P of "a" does not; see docs/limits.md."""
    world = WordsInCharacters(["a", "ab", "b"])
    equal = world.student_of_equal_texts().requires_grad_()
    loss = world.loss(equal, divergence=forward_kl, temperature=temperature)
    assert world.kl_of_texts(equal) == pytest.approx(0, abs=1e-9) and loss > 0.01
    assert torch.autograd.grad(loss, equal)[0].abs().max() > 1e-3
