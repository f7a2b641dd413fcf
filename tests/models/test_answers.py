"""One answer per prompt: what transformers' own `generate` gives for each prompt alone, in any order and batch."""

import pytest
import torch

from rlkd_trl.errors import InputError
from rlkd_trl.models.answers import answer_prompts, decode, joined
from rlkd_trl.models.generation import Completions
from tests.models.plain_generate import NEVER_SAMPLED, plain_answers, plain_texts
from tests.tiny_models import EOS, MODELS, PAD, tiny_llama, word_tokenizer

# Of 1 to 6 words, longest in the middle, and one of them twice.
PROMPTS = ["w3 w4", "w9", "w10 w11 w12 w13 w14 w15", "w16 w17 w18", "w9", "w23 w8 w20 w5", "w26 w3"]
LENGTH = 8
FAMILIES = ["t5-tied", pytest.param("t5-untied", marks=pytest.mark.slow(0.3)), "llama"]
STRATEGIES = ["greedy", "sample", "beam"]


def answers(model, prompts=PROMPTS, **settings) -> list[list[int]]:
    """The answers' tokens, without their padding."""
    settings = {"max_completion_length": LENGTH, **settings}
    return [
        ids[mask].tolist()
        for batch in answer_prompts(model, word_tokenizer(), prompts, **settings)
        for ids, mask in zip(batch.ids_BT, batch.mask_BT, strict=True)
    ]


def by_generate(model, prompt: str, **generation) -> list[int]:
    return plain_answers(model, prompt, max_new_tokens=LENGTH, **generation)[0]


SEEDS = {"t5-tied": 5, "t5-untied": 14, "llama": 22}


def model_of(name: str):
    """One of a seed with which some of its answers end and some do not, at different lengths."""
    model = MODELS[name](seed=SEEDS[name])
    if name == "t5-tied":  # hardly any seed's answers end by themselves
        with torch.no_grad():
            model.get_output_embeddings().weight[EOS] *= 2.0
    return model


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_answers_are_those_of_generate(name, batch_size):
    model = model_of(name)
    expected = [by_generate(model, prompt, num_beams=1) for prompt in PROMPTS]
    assert len(set(map(tuple, expected))) >= 5 and len({len(ids) for ids in expected}) >= 3
    assert {ids[-1] == EOS for ids in expected} == {True, False}
    assert answers(model, batch_size=batch_size) == expected


@pytest.mark.parametrize("num_beams", [1, 2, 5])
@pytest.mark.parametrize("name", FAMILIES)
def test_beam_answers_are_those_of_generate(name, num_beams):
    model = model_of(name)
    expected = [by_generate(model, prompt, num_beams=num_beams) for prompt in PROMPTS]
    assert answers(model, strategy="beam", num_beams=num_beams, batch_size=3) == expected
    greedy = answers(model)
    assert (expected == greedy) == (num_beams == 1), "beams must find something else for this test to mean much"


def test_four_beams_are_the_default():
    model = model_of("t5-tied")
    assert answers(model, strategy="beam") == [by_generate(model, prompt, num_beams=4) for prompt in PROMPTS]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_all_beams_of_a_prompt_follow_one_another_as_generate_ranks_them(name, num_beams):
    model = model_of(name)
    candidates = [
        plain_answers(model, prompt, max_new_tokens=LENGTH, num_beams=num_beams, num_return_sequences=num_beams)
        for prompt in PROMPTS
    ]
    assert all(len(set(map(tuple, of_prompt))) == num_beams for of_prompt in candidates)
    found = answers(model, strategy="beam", num_beams=num_beams, all_beams=True, batch_size=3)
    assert found == [ids for of_prompt in candidates for ids in of_prompt]
    assert found[::num_beams] == answers(model, strategy="beam", num_beams=num_beams)


@pytest.mark.parametrize("strategy", ["greedy", "sample"])
def test_only_beam_search_has_beams_to_give(strategy):
    with pytest.raises(InputError, match=f"'{strategy}' has no beams to give: all_beams needs strategy 'beam'"):
        answers(tiny_llama(), strategy=strategy, all_beams=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", FAMILIES)
def test_how_prompts_are_batched_does_not_matter(name, strategy):
    model = model_of(name)
    expected = answers(model, strategy=strategy, batch_size=len(PROMPTS))
    for batch_size in (1, 2, 3, 64):
        assert answers(model, strategy=strategy, batch_size=batch_size) == expected


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_order_of_prompts_does_not_matter(name, strategy):
    model = model_of(name)
    forwards = answers(model, strategy=strategy, batch_size=3)
    backwards = answers(model, PROMPTS[::-1], strategy=strategy, batch_size=3)
    assert backwards[::-1] == forwards
    assert forwards[1] == forwards[4], "the same prompt, the same answer"


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_depend_on_the_seed_alone(name):
    model = model_of(name)
    one = answers(model, strategy="sample", seed=1)
    torch.manual_seed(123)  # the global generator plays no part
    assert answers(model, strategy="sample", seed=1) == one
    assert answers(model, strategy="sample", seed=2) != one
    state = torch.get_rng_state()
    answers(model, strategy="sample", seed=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_prompt_is_sampled_with_numbers_of_its_own():
    """In one batch and in different ones: the same prompt again and again has many answers."""
    for batch_size in (2, 64):
        samples = answers(MODELS["llama"](), ["w9"] * 20, strategy="sample", batch_size=batch_size)
        assert len(set(map(tuple, samples))) > 15


def test_a_cold_sample_is_greedy_and_a_hot_one_is_not():
    model = model_of("llama")
    greedy = answers(model)
    assert answers(model, strategy="sample", temperature=1e-4) == greedy
    assert answers(model, strategy="sample", temperature=5.0) != greedy


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["t5-untied", "llama"])  # a tied head's rows are also what the model reads
def test_ids_that_may_not_be_sampled_never_are(name, strategy):
    """Even where the model likes them best."""
    model = MODELS[name]()
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight[NEVER_SAMPLED] = 50 * head.weight[3:10]
    ids = torch.tensor([[9, EOS]])
    unrestricted = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH)
    new = unrestricted[0, 1 if model.config.is_encoder_decoder else 2 :].tolist()
    assert set(new) & set(NEVER_SAMPLED), "the test needs a model that would say them"
    found = {token for ids in answers(model, strategy=strategy) for token in ids}
    assert found and not found & set(NEVER_SAMPLED)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batches_come_in_the_prompts_order_and_are_joined_at_one_width(strategy):
    model = model_of("llama")
    batches = list(
        answer_prompts(model, word_tokenizer(), PROMPTS, strategy=strategy, max_completion_length=LENGTH, batch_size=3)
    )
    assert [len(batch.ids_BT) for batch in batches] == [3, 3, 1]
    whole = joined(batches, pad_id=PAD)
    width = whole.ids_BT.shape[1]
    assert width == max(batch.ids_BT.shape[1] for batch in batches) <= LENGTH
    assert whole.mask_BT.shape == (7, width)
    for ids_T, mask_T, ended in zip(whole.ids_BT.tolist(), whole.mask_BT.tolist(), whole.ended_B, strict=True):
        length = sum(mask_T)
        assert mask_T == [True] * length + [False] * (width - length)
        assert ids_T[length:] == [PAD] * (width - length)
        assert EOS not in ids_T[: length - 1]
        assert bool(ended) == (ids_T[length - 1] == EOS)
        assert ended or length == LENGTH
    assert whole.ended_B.any() and not whole.ended_B.all(), "both must occur for this test to mean much"
    kept = [ids[mask].tolist() for ids, mask in zip(whole.ids_BT, whole.mask_BT, strict=True)]
    assert kept == answers(model, strategy=strategy, batch_size=3)


def test_batches_of_different_widths_are_joined():
    """The narrower one is padded with the given id, outside its mask."""
    narrow = Completions(
        torch.tensor([[5, 1]]),
        torch.tensor([[True, True]]),
        torch.tensor([True]),
        logps_BT=torch.tensor([[-1.0, -2.0]]),
        values_BT1=torch.tensor([[0.5, 1.5, 0.0]]),
    )
    wide = Completions(
        torch.tensor([[6, 7, 8]]),
        torch.tensor([[True, True, True]]),
        torch.tensor([False]),
        logps_BT=torch.tensor([[-3.0, -4.0, -5.0]]),
        values_BT1=torch.tensor([[2.5, 3.5, 4.5, 5.5]]),
    )
    whole = joined([narrow, wide], pad_id=9)
    assert whole.ids_BT.tolist() == [[5, 1, 9], [6, 7, 8]]
    assert whole.mask_BT.tolist() == [[True, True, False], [True, True, True]]
    assert whole.ended_B.tolist() == [True, False]
    assert whole.support_BTk is None
    assert whole.logps_BT.tolist() == [[-1.0, -2.0, 0.0], [-3.0, -4.0, -5.0]]
    assert whole.values_BT1.tolist() == [[0.5, 1.5, 0.0, 0.0], [2.5, 3.5, 4.5, 5.5]]
    first = whole.rows([0])
    assert first.logps_BT.tolist() == [[-1.0, -2.0]] and first.values_BT1.tolist() == [[0.5, 1.5, 0.0]]


def test_the_supports_of_batches_of_different_widths_are_joined_too():
    parts = [
        Completions(
            torch.ones(1, width, dtype=torch.long),
            torch.ones(1, width, dtype=torch.bool),
            torch.tensor([True]),
            torch.arange(2 * width).view(1, width, 2) + 10 * width,
        )
        for width in (1, 2)
    ]
    assert joined(parts, pad_id=9).support_BTk.tolist() == [[[10, 11], [0, 0]], [[20, 21], [22, 23]]]


def test_nothing_is_computed_before_it_is_asked_for():
    """Answers are written as they are made: the second batch waits until the first was taken."""
    model = MODELS["t5-tied"]()
    read = []
    model.get_encoder().register_forward_hook(lambda *_: read.append(1))
    batches = answer_prompts(model, word_tokenizer(), PROMPTS, max_completion_length=2, batch_size=3)
    next(batches)
    asked = len(read)
    next(batches)
    assert len(read) == asked + 1


@pytest.mark.parametrize("name", FAMILIES)
def test_long_prompts_are_cut(name):
    """Three tokens, the tokenizer's EOS included, are two words."""
    model = model_of(name)
    cut = answers(model, max_prompt_length=3)
    assert cut == answers(model, [" ".join(prompt.split()[:2]) for prompt in PROMPTS])
    assert cut != answers(model)


def test_texts_have_neither_special_tokens_nor_padding():
    model = model_of("llama")
    batches = list(answer_prompts(model, word_tokenizer(), PROMPTS, max_completion_length=LENGTH, batch_size=3))
    expected = [plain_texts(model, prompt, max_new_tokens=LENGTH)[0] for prompt in PROMPTS]
    assert [text for batch in batches for text in decode(batch, word_tokenizer())] == expected
    assert any(expected)


def test_unknown_strategy():
    with pytest.raises(InputError, match=r"Unknown strategy 'top_k'.*greedy, sample, beam"):
        list(answer_prompts(tiny_llama(), word_tokenizer(), ["w3"], strategy="top_k", max_completion_length=2))


def test_a_prompt_without_tokens_is_named():
    tokenizer = word_tokenizer(append_eos=False)
    with pytest.raises(InputError, match="has no tokens"):
        list(answer_prompts(tiny_llama(), tokenizer, ["w3", ""], max_completion_length=2))
