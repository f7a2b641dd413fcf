"""Samples come from exactly the stated distribution, and depend on nothing but their own random numbers."""

import pytest
import torch

from rlkd_trl.models.backbone import backbone_of
from rlkd_trl.models.generation import _BLOCK, invert_distribution, sample_completions
from tests.models.reference import FAMILIES, pad_prompts
from tests.models.sampling import (
    ALLOWED_IDS,
    FORBIDDEN,
    FORBIDDEN_MANY_EOS,
    MANY_EOS,
    PROMPTS,
    next_token_distribution,
    sample,
    uniforms,
)
from tests.tiny_models import EOS, MODELS, PAD, PADDED_VOCAB


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("name", list(MODELS))
def test_every_token_has_its_stated_share_of_the_uniforms(name, temperature):
    """With N evenly spaced uniforms, token v is drawn N·p_v times, give or take one at either end of its interval."""
    model, N = MODELS[name](), 2000
    even_N1 = (torch.arange(N)[:, None] + 0.5) / N
    first = sample(
        model, PROMPTS, [2] * N, max_completion_length=1, temperature=temperature, uniforms_BT=even_N1
    ).ids_BT[:, 0]
    share_V = next_token_distribution(model, PROMPTS[2], [], temperature)
    assert (torch.bincount(first, minlength=PADDED_VOCAB) - N * share_V).abs().max() <= 1.01

    # The second token, given the one first token that u = 0.5 draws.
    second = sample(
        model,
        PROMPTS,
        [2] * N,
        max_completion_length=2,
        temperature=temperature,
        uniforms_BT=torch.cat([torch.full_like(even_N1, 0.5), even_N1], dim=1),
    ).ids_BT
    assert (second[:, 0] == second[0, 0]).all() and second[0, 0] != EOS
    share_V = next_token_distribution(model, PROMPTS[2], [int(second[0, 0])], temperature)
    assert (torch.bincount(second[:, 1], minlength=PADDED_VOCAB) - N * share_V).abs().max() <= 1.01


@pytest.mark.parametrize("name", ["t5-tied", "llama"])
def test_pairs_of_tokens_pass_a_chi_square_test(name):
    """20,000 random pairs against p(first) p(second | first), computed from the model's own logits."""
    model, N = MODELS[name](), 20000
    pairs = sample(
        model, PROMPTS, [0] * N, max_completion_length=2, temperature=1.0, uniforms_BT=uniforms(N, 2)
    ).ids_BT
    first_V = next_token_distribution(model, PROMPTS[0], [], 1.0)
    joint_VV = torch.zeros(PADDED_VOCAB, PADDED_VOCAB, dtype=torch.float64)
    for token in ALLOWED_IDS:
        if token == EOS:
            joint_VV[EOS, PAD] = first_V[EOS]  # it ends, and padding follows
        else:
            joint_VV[token] = first_V[token] * next_token_distribution(model, PROMPTS[0], [token], 1.0)
    torch.testing.assert_close(joint_VV.sum(), torch.tensor(1.0, dtype=torch.float64))
    counts_VV = torch.bincount(pairs[:, 0] * PADDED_VOCAB + pairs[:, 1], minlength=PADDED_VOCAB**2).double()
    expected_VV = (N * joint_VV).flatten()
    assert counts_VV[expected_VV == 0].sum() == 0
    # Cells that expect fewer than 5 draws are pooled, as the test requires.
    common = expected_VV >= 5
    observed = torch.cat([counts_VV[common], counts_VV[~common].sum()[None]])
    expected = torch.cat([expected_VV[common], expected_VV[~common].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert freedom > 100
    # χ² has mean `freedom` and standard deviation sqrt(2 freedom); on this seed it is 1.2 and 1.4 of them above.
    # Sampling at temperature 0.8 is 5 (T5) and 73 (Llama) above. Even uniforms are sharper; here, the pairs count.
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("name", list(FAMILIES))
def test_forbidden_ids_are_never_drawn_and_all_others_are(name):
    """At temperature 1000 the distribution is flat: each of 26 allowed ids is expected 77 times at each step."""
    ids_BT = sample(
        FAMILIES[name](),
        PROMPTS,
        [0] * 2000,
        max_completion_length=4,
        temperature=1000.0,
        eos_ids=[],
        uniforms_BT=uniforms(2000, 4),
    ).ids_BT
    for t in range(4):
        assert ids_BT[:, t].unique().tolist() == ALLOWED_IDS


def test_uniforms_at_the_ends_stay_among_the_allowed_ids():
    """The last ids are forbidden, the first is too: neither 0 nor the largest float below 1 may fall on them."""
    ends = torch.tensor([[0.0], [torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()]])
    ids = sample(MODELS["t5-tied"](), PROMPTS, [0, 0], max_completion_length=1, uniforms_BT=ends).ids_BT[:, 0]
    assert ids.tolist() == [ALLOWED_IDS[0], ALLOWED_IDS[-1]]


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("many_eos", [False, True])
def test_greedy_is_transformers_generate(name, many_eos):
    model = FAMILIES[name]()
    eos_ids = MANY_EOS if many_eos else [EOS]
    forbidden_V = FORBIDDEN_MANY_EOS if many_eos else FORBIDDEN
    ids_PS, mask_PS = pad_prompts(model, PROMPTS)
    theirs = model.generate(
        input_ids=ids_PS,
        attention_mask=mask_PS,
        do_sample=False,
        num_beams=1,
        max_new_tokens=8,
        eos_token_id=eos_ids,
        pad_token_id=PAD,
        suppress_tokens=forbidden_V.nonzero()[:, 0].tolist(),
    )
    theirs = theirs[:, 1:] if model.config.is_encoder_decoder else theirs[:, ids_PS.shape[1] :]
    ours = sample(
        model, PROMPTS, range(len(PROMPTS)), max_completion_length=8, eos_ids=eos_ids, forbidden_V=forbidden_V
    )
    assert ours.ids_BT.tolist() == theirs.tolist()


@pytest.fixture(scope="module", params=list(MODELS))
def many_rows(request):
    """40 rows of 5 prompts that end all over the place: model, index, uniforms, completions, and rows per step."""
    model = MODELS[request.param]()
    index = [p for p in range(5) for _ in range(8)]
    uniforms_BT = uniforms(40, 10, seed=1)
    backbone = backbone_of(model)
    rows, extend = [], backbone.extend
    backbone.extend = lambda prefix, ids: rows.append(len(ids)) or extend(prefix, ids)
    completions = sample_completions(
        backbone,
        *pad_prompts(model, PROMPTS),
        torch.tensor(index),
        max_completion_length=10,
        eos_ids=MANY_EOS,
        pad_id=PAD,
        forbidden_V=FORBIDDEN_MANY_EOS,
        uniforms_BT=uniforms_BT,
    )
    return model, index, uniforms_BT, completions, rows


def test_a_sample_does_not_depend_on_the_batch_it_is_in(many_rows):
    """Each row alone, with its own numbers, is the row in the batch, out of which finished rows were dropped."""
    model, index, uniforms_BT, batch, _ = many_rows
    for b, p in enumerate(index):
        alone = sample(
            model,
            [PROMPTS[p]],
            [0],
            max_completion_length=10,
            eos_ids=MANY_EOS,
            forbidden_V=FORBIDDEN_MANY_EOS,
            uniforms_BT=uniforms_BT[b : b + 1],
        )
        assert alone.ids_BT[0][alone.mask_BT[0]].tolist() == batch.ids_BT[b][batch.mask_BT[b]].tolist()
        assert alone.ended_B[0] == batch.ended_B[b]


def test_finished_rows_are_not_decoded(many_rows):
    *_, batch, rows = many_rows
    steps = rows[-(batch.ids_BT.shape[1] - 1) :]  # after the prompts'
    assert steps[0] <= 40 and steps == sorted(steps, reverse=True) and steps[-1] < 20
    lengths_B = batch.mask_BT.sum(dim=1)
    for t, decoded in enumerate(steps, start=1):
        unfinished = int((lengths_B > t).sum())
        assert unfinished <= decoded <= max(1, unfinished / 0.75 + 1e-6)


def test_masks_end_with_the_first_eos_and_padding_follows(many_rows):
    *_, batch, _ = many_rows
    assert batch.ended_B.any(), "no row ended: the test would be empty"
    assert len(batch.mask_BT.sum(1).unique()) > 3
    for ids_T, mask_T, ended in zip(batch.ids_BT, batch.mask_BT, batch.ended_B, strict=True):
        ends = [t for t, token in enumerate(ids_T.tolist()) if token in MANY_EOS]
        length = ends[0] + 1 if ends else len(ids_T)
        assert bool(ended) == bool(ends)
        assert mask_T.tolist() == [t < length for t in range(len(ids_T))]
        assert (ids_T[length:] == PAD).all()


def test_pad_as_a_sampled_token_counts_where_it_does_not_end_a_completion():
    """The mask comes from EOS alone; here the pad id is an ordinary word."""
    uniforms_BT = uniforms(50, 6)
    model = MODELS["llama"]()
    as_word = sample(model, PROMPTS, [0] * 50, max_completion_length=6, pad_id=9, uniforms_BT=uniforms_BT)
    usual = sample(model, PROMPTS, [0] * 50, max_completion_length=6, uniforms_BT=uniforms_BT)
    assert (usual.ids_BT[usual.mask_BT] == 9).any()
    assert torch.equal(as_word.mask_BT, usual.mask_BT)
    assert torch.equal(as_word.ids_BT[as_word.mask_BT], usual.ids_BT[usual.mask_BT])


def test_a_pad_that_is_eos():
    """Padding a row that has ended must not end it twice, or any other row at all."""
    model, uniforms_BT = MODELS["llama"](), uniforms(30, 6, seed=2)
    settings = {"max_completion_length": 6, "eos_ids": MANY_EOS, "forbidden_V": FORBIDDEN_MANY_EOS}
    usual = sample(model, PROMPTS, [1] * 30, uniforms_BT=uniforms_BT, **settings)
    padded = sample(model, PROMPTS, [1] * 30, uniforms_BT=uniforms_BT, pad_id=EOS, **settings)
    assert usual.ended_B.any() and not usual.ended_B.all()
    assert torch.equal(usual.mask_BT, padded.mask_BT) and torch.equal(usual.ended_B, padded.ended_B)
    assert torch.equal(usual.ids_BT[usual.mask_BT], padded.ids_BT[padded.mask_BT])


def test_length_one():
    completions = sample(MODELS["t5-untied"](), PROMPTS, [3, 0], max_completion_length=1, uniforms_BT=uniforms(2, 1))
    assert completions.ids_BT.shape == completions.mask_BT.shape == (2, 1)
    assert completions.mask_BT.all()
    assert torch.equal(completions.ended_B, completions.ids_BT[:, 0] == EOS)


def test_when_all_rows_end_at_once_nothing_more_is_decoded():
    completions = sample(
        MODELS["llama"](), PROMPTS, [0, 1, 2], max_completion_length=9, eos_ids=ALLOWED_IDS, uniforms_BT=uniforms(3, 9)
    )
    assert completions.ids_BT.shape == (3, 1) and completions.ended_B.all() and completions.mask_BT.all()


def test_more_uniforms_than_steps_and_the_same_numbers_twice():
    model, uniforms_BT = MODELS["t5-tied"](), uniforms(6, 12)
    short = sample(model, PROMPTS, [0, 1, 2] * 2, max_completion_length=4, uniforms_BT=uniforms_BT)
    again = sample(model, PROMPTS, [0, 1, 2] * 2, max_completion_length=4, uniforms_BT=uniforms_BT)
    assert torch.equal(short.ids_BT, again.ids_BT)
    same = sample(model, PROMPTS, [1, 1], max_completion_length=4, uniforms_BT=uniforms_BT[:1].repeat(2, 1))
    assert torch.equal(same.ids_BT[0], same.ids_BT[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_gradient_is_recorded(dtype):
    """And it works in bfloat16."""
    model = MODELS["t5-tied"]().to(dtype)
    ids = sample(model, PROMPTS, [0, 1], max_completion_length=3, uniforms_BT=uniforms(2, 3)).ids_BT
    assert ids.dtype == torch.long and not ids.requires_grad


# The distribution function by hand: p = 0, 1/2, 0, 1/4, 1/4, 0.
HAND_LOGITS = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0]).log()
BELOW_ONE = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()


def inverted(logits_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    return invert_distribution(logits_BV.softmax(dim=-1), uniforms_B)


@pytest.mark.parametrize(
    "uniform, token",
    [(0.0, 1), (0.25, 1), (0.4999, 1), (0.5, 3), (0.6, 3), (0.7499, 3), (0.75, 4), (0.99, 4), (BELOW_ONE, 4)],
)
def test_inverting_a_distribution_by_hand(uniform, token):
    assert inverted(HAND_LOGITS[None], torch.tensor([uniform])).tolist() == [token]


@pytest.mark.parametrize("certain", [0, 3, 5])
def test_inverting_a_certain_outcome(certain):
    logits_BV = torch.full((3, 6), -torch.inf)
    logits_BV[:, certain] = 7.0
    assert inverted(logits_BV, torch.tensor([0.0, 0.5, BELOW_ONE])).tolist() == [certain] * 3


def test_inverting_near_one_over_a_large_vocabulary():
    """A float32 sum of 32,128 probabilities misses 1 by rounding; the last 28 ids have probability 0."""
    logits_V = torch.randn(32128, generator=torch.Generator().manual_seed(0))
    logits_V[32100:] = -torch.inf
    near_one = 1 - torch.arange(1, 200) * 2.0**-24
    tokens = inverted(logits_V.expand(199, -1), near_one)
    assert tokens.max() < 32100
    assert tokens.min() > 32000  # the last 1e-5 of the mass; a token has 3e-5 on average


def test_a_nearly_certain_token_leaves_the_impossible_ones_alone():
    """exp(−200) underflows to 0 in float32: such an id has no interval."""
    logits_BV = torch.tensor([[-200.0, 0.0, -200.0]]).expand(3, -1)
    assert inverted(logits_BV, torch.tensor([0.0, 0.5, BELOW_ONE])).tolist() == [1, 1, 1]


def test_inverting_over_many_blocks():
    """Against a running sum in float64, over a number of ids that no power of two divides; a third of them impossible,
    among these a whole block and the last ids."""
    V, B = 3 * _BLOCK + 61, 4000
    generator = torch.Generator().manual_seed(0)
    logits_V = torch.randn(V, generator=generator)
    logits_V[torch.rand(V, generator=generator) < 0.2] = -torch.inf
    logits_V[_BLOCK : 2 * _BLOCK] = logits_V[-5:] = -torch.inf
    sums_V = logits_V.double().softmax(dim=-1).cumsum(dim=-1)
    uniforms_B = torch.rand(B, generator=generator)
    clear_B = (uniforms_B[:, None] - sums_V).abs().amin(dim=-1) > 1e-6  # of the borders, by float32's rounding
    expected_B = torch.searchsorted(sums_V, uniforms_B.double(), right=True)
    assert clear_B.sum() > 0.95 * B and len(expected_B.unique()) > 100
    assert torch.equal(inverted(logits_V.expand(B, -1), uniforms_B)[clear_B], expected_B[clear_B])


def test_a_sum_that_is_not_monotonic(monkeypatch):
    """As a GPU's parallel sum, which may fall by rounding, and rise over ids of probability 0."""
    rounded = torch.tensor([1e-8, 0.5, 0.5 + 1e-7, 0.75, 1.0, 1.0 + 1e-7])
    block = torch.nn.functional.pad(rounded, (0, _BLOCK - 6), value=1.0 + 1e-7)
    exact = torch.Tensor.cumsum  # for the running sum over blocks, of which there is one

    def running_sum(weights, dim):
        return block.expand_as(weights) if weights.shape[-1] == _BLOCK else exact(weights, dim)

    monkeypatch.setattr(torch.Tensor, "cumsum", running_sum)
    uniforms_B = torch.tensor([0.0, 0.25, 0.50000006, 0.6, 0.9, BELOW_ONE])
    assert inverted(HAND_LOGITS.expand(6, -1), uniforms_B).tolist() == [1, 1, 3, 3, 4, 4]


def test_a_uniform_that_rounds_to_one():
    """The largest float64 below 1 is 1 in float32: the last possible id, and not one beyond it."""
    uniform = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert uniform < 1 and uniform.float() == 1
    assert inverted(HAND_LOGITS[None], uniform).tolist() == [4]
