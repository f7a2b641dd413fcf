"""Tokens come from exactly the mixture of student and teacher, each of which reads a prompt of its own."""

import pytest
import torch

from rlkd_trl.errors import InputError
from rlkd_trl.models.backbone import backbone_of
from rlkd_trl.models.generation import MixedWith
from tests.models.reference import pad_prompts
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
from tests.tiny_models import EOS, MODELS, PADDED_VOCAB

# What the teacher is asked: in other words, of other lengths, and the same thing for two of the student's prompts.
QUESTIONS = [[19, 3, 18, 4, 17, 5, 16], [3, 4], [19], [12, 11, 10, 9]]
QUESTION_OF = [2, 0, 1, 0, 3]

# (student, teacher): encoder-decoder, decoder-only, and one of each.
PAIRS = [("t5-tied", "t5-untied"), ("llama", "glm"), ("t5-untied", "llama"), ("llama", "t5-tied")]
QUICK = [("llama", "glm"), ("t5-untied", "llama")]
ENDS_OFTEN = {"eos_ids": MANY_EOS, "forbidden_V": FORBIDDEN_MANY_EOS}


@pytest.fixture(
    params=[
        pytest.param(pair, id=" and ".join(pair), marks=() if pair in QUICK else pytest.mark.slow(0.5))
        for pair in PAIRS
    ]
)
def pair(request):
    """A student and a teacher that likes best what may not be sampled."""
    student, teacher = (MODELS[name](seed=seed) for seed, name in enumerate(request.param))
    with torch.no_grad():
        head = teacher.get_output_embeddings()
        head.weight[FORBIDDEN] = 3 * head.weight[3 : 3 + int(FORBIDDEN.sum())]
    return student, teacher


def asked(teacher, index, weight) -> MixedWith:
    """The teacher, with its own question for each of the student's prompts `index`."""
    question_index = torch.tensor([QUESTION_OF[p] for p in index])
    return MixedWith(backbone_of(teacher), *pad_prompts(teacher, QUESTIONS), question_index, weight)


def mixture(student, teacher, p, completion, weight, temperature=1.0) -> torch.Tensor:
    """weight · teacher + (1 − weight) · student in float64, over the allowed ids that both have."""
    common = min(student.config.vocab_size, teacher.config.vocab_size)
    allowed = [v for v in ALLOWED_IDS if v < common]
    of_student_V = next_token_distribution(student, PROMPTS[p], completion, temperature, allowed)
    of_teacher_V = next_token_distribution(teacher, QUESTIONS[QUESTION_OF[p]], completion, temperature, allowed)
    return weight * of_teacher_V[:common] + (1 - weight) * of_student_V[:common]


def check_shares(tokens_N, share_V) -> None:
    """Of N evenly spaced uniforms, id v has N·share, give or take one at either end of its interval."""
    counts_V = torch.bincount(tokens_N, minlength=len(share_V))
    assert (counts_V - len(tokens_N) * share_V).abs().max() <= 1.01


def check_first_and_second_token(student, teacher, weight, temperature, forbidden_V=FORBIDDEN) -> None:
    """2000 completions of one prompt; then as many after each of three first tokens."""
    N, p = 2000, 4
    even_N1 = (torch.arange(N)[:, None] + 0.5) / N
    settings = {"temperature": temperature, "forbidden_V": forbidden_V, "mixed_with": asked(teacher, [p] * N, weight)}
    first = sample(student, PROMPTS, [p] * N, max_completion_length=1, uniforms_BT=even_N1, **settings).ids_BT
    check_shares(first[:, 0], mixture(student, teacher, p, [], weight, temperature))
    followed = set()
    for u in (0.2, 0.5, 0.8):
        uniforms_N2 = torch.cat([torch.full_like(even_N1, u), even_N1], dim=1)
        ids_N2 = sample(student, PROMPTS, [p] * N, max_completion_length=2, uniforms_BT=uniforms_N2, **settings).ids_BT
        before = int(ids_N2[0, 0])
        assert (ids_N2[:, 0] == before).all()
        if before != EOS:
            check_shares(ids_N2[:, 1], mixture(student, teacher, p, [before], weight, temperature))
            followed.add(before)
    assert len(followed) >= 2, "the test needs different first tokens"


@pytest.mark.parametrize("weight, temperature", [(0.2, 1.0), (0.7, 0.7), (0.5, 2.0)])
def test_first_and_second_tokens_have_their_share_of_the_mixture(pair, weight, temperature):
    check_first_and_second_token(*pair, weight, temperature)


@pytest.mark.parametrize("rows", [(PADDED_VOCAB, 29), (29, PADDED_VOCAB), (PADDED_VOCAB, 40), (PADDED_VOCAB, 20)])
@pytest.mark.parametrize("name", ["t5-untied", "llama"])
def test_heads_of_different_sizes_are_mixed_over_the_ids_that_both_have(name, rows):
    """With 20 rows, the teacher lacks seven of the ids that the student may sample."""
    models = [MODELS[name](seed=seed) for seed in (0, 1)]
    torch.manual_seed(0)  # for the rows that are added
    for model, count in zip(models, rows, strict=True):
        model.resize_token_embeddings(count)
        assert model.get_output_embeddings().weight.shape[0] == count
    forbidden_V = FORBIDDEN[: rows[0]]
    check_first_and_second_token(*models, 0.4, 1.0, forbidden_V)


@pytest.mark.parametrize("sampled", [True, False])
def test_one_source_alone_is_sampled_as_ever(pair, sampled):
    """Weight 0 is the student, weight 1 the teacher as it answers its own questions, on the same uniforms."""
    student, teacher = pair
    index = [p for p in range(5) for _ in range(8)]
    settings = {"max_completion_length": 8, "uniforms_BT": uniforms(40, 8) if sampled else None, **ENDS_OFTEN}
    alone = [
        sample(student, PROMPTS, index, **settings),
        sample(teacher, QUESTIONS, [QUESTION_OF[p] for p in index], **settings),
    ]
    assert not torch.equal(alone[0].ids_BT, alone[1].ids_BT)
    for weight, expected in enumerate(alone):
        mixed = sample(student, PROMPTS, index, mixed_with=asked(teacher, index, weight), **settings)
        assert torch.equal(mixed.ids_BT, expected.ids_BT) and torch.equal(mixed.mask_BT, expected.mask_BT)


@pytest.mark.parametrize("name", list(MODELS))
def test_a_mixture_of_a_model_with_itself_is_the_model(name):
    """One object in both parts: what one of them has read is not the other's."""
    model, index = MODELS[name](), [0, 1, 2, 3, 4] * 4
    settings = {"max_completion_length": 6, "uniforms_BT": uniforms(20, 6), **ENDS_OFTEN}
    itself = MixedWith(backbone_of(model), *pad_prompts(model, PROMPTS), torch.tensor(index), 0.5)
    mixed = sample(model, PROMPTS, index, mixed_with=itself, **settings)
    assert torch.equal(mixed.ids_BT, sample(model, PROMPTS, index, **settings).ids_BT)


def test_greedy_takes_the_likeliest_of_the_mixture(pair):
    """Of the mixture at the given temperature, which is not the likeliest of either model, nor at temperature 1."""
    student, teacher = pair
    weight, temperature, index = 0.5, 3.0, [0, 1, 2, 3, 4]
    found = sample(
        student,
        PROMPTS,
        index,
        max_completion_length=6,
        temperature=temperature,
        mixed_with=asked(teacher, index, weight),
    )
    own_choice = []
    for p in index:
        completion = found.ids_BT[p][found.mask_BT[p]].tolist()
        for t, token in enumerate(completion):
            share_V = mixture(student, teacher, p, completion[:t], weight, temperature)
            assert token == share_V.argmax()
            own_choice += [token == mixture(student, teacher, p, completion[:t], w).argmax() for w in (0, 1)]
    assert not all(own_choice[::2]) and not all(own_choice[1::2]), "neither model alone would do"


def test_forbidden_ids_are_never_drawn(pair):
    """At temperature 1000 the teacher spreads over all ids, and would say each of the forbidden ones too."""
    student, teacher = pair
    ids_BT = sample(
        student,
        PROMPTS,
        [0] * 2000,
        max_completion_length=3,
        temperature=1000.0,
        eos_ids=[],
        uniforms_BT=uniforms(2000, 3),
        mixed_with=asked(teacher, [0] * 2000, 0.5),
    ).ids_BT
    for t in range(3):
        assert ids_BT[:, t].unique().tolist() == ALLOWED_IDS


@pytest.fixture
def many_rows(pair):
    """40 rows that end all over the place: index, uniforms, completions, and how many rows each model then read."""
    student, teacher = pair
    index, uniforms_BT = [p for p in range(5) for _ in range(8)], uniforms(40, 10, seed=1)
    mixed_with = asked(teacher, index, 0.4)
    reads = []
    teacher_extend = mixed_with.backbone.extend
    mixed_with.backbone.extend = lambda prefix, ids: reads.append(len(ids)) or teacher_extend(prefix, ids)
    batch = sample(
        student,
        PROMPTS,
        index,
        max_completion_length=10,
        uniforms_BT=uniforms_BT,
        mixed_with=mixed_with,
        **ENDS_OFTEN,
    )
    return student, teacher, index, uniforms_BT, batch, reads


@pytest.mark.slow(0.4)
def test_a_sample_does_not_depend_on_the_batch_it_is_in(many_rows):
    """Each row alone, the teacher's question alone too, is the row in the batch, out of which others were dropped."""
    student, teacher, index, uniforms_BT, batch, _ = many_rows
    assert batch.ended_B.any() and len(batch.mask_BT.sum(1).unique()) > 3
    for b, p in enumerate(index):
        question = pad_prompts(teacher, [QUESTIONS[QUESTION_OF[p]]])
        alone = sample(
            student,
            [PROMPTS[p]],
            [0],
            max_completion_length=10,
            uniforms_BT=uniforms_BT[b : b + 1],
            mixed_with=MixedWith(backbone_of(teacher), *question, torch.tensor([0]), 0.4),
            **ENDS_OFTEN,
        )
        assert alone.ids_BT[0][alone.mask_BT[0]].tolist() == batch.ids_BT[b][batch.mask_BT[b]].tolist()
        assert alone.ended_B[0] == batch.ended_B[b]


def test_the_teacher_does_not_read_finished_rows(many_rows):
    *_, batch, reads = many_rows
    steps = reads[-(batch.ids_BT.shape[1] - 1) :]  # after the prompts'
    lengths_B = batch.mask_BT.sum(dim=1)
    for t, read in enumerate(steps, start=1):
        unfinished = int((lengths_B > t).sum())
        assert unfinished <= read <= max(1, unfinished / 0.75 + 1e-6)
    assert steps[-1] < 20


def test_top_k_of_a_mixture_is_refused():
    student, teacher = MODELS["llama"](), MODELS["llama"](seed=1)
    with pytest.raises(InputError, match="top_k = 5 does not go with a mixture"):
        sample(student, PROMPTS, [0], max_completion_length=2, top_k=5, mixed_with=asked(teacher, [0], 0.5))


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_a_weight_that_is_no_share(weight):
    with pytest.raises(InputError, match=f"weight in a mixture is from 0 to 1; got {weight}"):
        asked(MODELS["llama"](), [0], weight)
