"""A teacher's scores are the statistics of its own full logits, however they were batched."""

import pytest
import torch
from transformers import PreTrainedModel

from rlkd_trl.errors import InputError
from rlkd_trl.ops.lm_head import map_head_slices
from rlkd_trl.teachers import Teacher
from rlkd_trl.teachers import teacher as teacher_module
from tests.models.reference import FAMILIES, count_rows, own_logits, pad_completions
from tests.tiny_models import MODELS, PADDED_VOCAB, tiny_llama, tiny_t5, word_tokenizer

PROMPTS = ["w3 w4 w5 w6 w7 w8", "w9", "w10 w11", "w12 w13 w14 w15"]
# Completion b answers PROMPTS[INDEX[b]]: three, none, two and two of them, in no order. EOS is 1.
INDEX = [3, 0, 2, 0, 3, 2, 0]
COMPLETIONS = [[4, 5, 1], [6], [7, 8, 9, 10, 11], [1], [12, 13, 14, 15, 1], [4, 16], [17, 1]]
ENDED = [ids[-1] == 1 for ids in COMPLETIONS]
NAMES = ("chosen", "mean", "max", "logsumexp", "expected", "soft", "allowed_logsumexp")
TAU = 0.5
FORBIDDEN_V = torch.tensor([v % 3 == 0 for v in range(PADDED_VOCAB - 1)])  # of a student whose head has a row less
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=list(MODELS))
def any_model(request) -> PreTrainedModel:
    """One of each family and head kind."""
    return MODELS[request.param]()


def score(teacher, prompts=PROMPTS, index=INDEX, completions=COMPLETIONS, ended=ENDED, filler=0, **kwargs):
    ids_BT, mask_BT = pad_completions(completions, filler)
    wanted = {"expected": True, "tau": TAU, "forbidden_V": FORBIDDEN_V, **kwargs}
    return teacher.score(prompts, torch.tensor(index), ids_BT, mask_BT, torch.tensor(ended), **wanted)


@torch.no_grad()
def reference(model, tokenizer, prompts=PROMPTS, index=INDEX, completions=COMPLETIONS, ended=ENDED):
    """In float64 from each pair's own logits: a state exists before every token, and after a truncated last one."""
    T = max(map(len, completions))
    expected = {n: torch.zeros(len(completions), T + (n != "chosen"), dtype=torch.float64) for n in NAMES}
    for b, (p, ids) in enumerate(zip(index, completions, strict=True)):
        z_TV = own_logits(model, tokenizer(prompts[p])["input_ids"], ids).double()
        for t in range(len(ids) + (not ended[b])):
            z_V = z_TV[t]
            probabilities_V = z_V.softmax(-1)
            expected["mean"][b, t] = z_V.sum() / PADDED_VOCAB
            expected["max"][b, t] = max(z_V.tolist())
            expected["logsumexp"][b, t] = z_V.exp().sum().log()
            expected["expected"][b, t] = (probabilities_V * z_V).sum()
            expected["soft"][b, t] = TAU * (z_V / TAU).exp().sum().log()
            expected["allowed_logsumexp"][b, t] = sum(z_V[v].exp() for v in range(PADDED_VOCAB - 1) if v % 3).log()
            if t < len(ids):
                expected["chosen"][b, t] = z_V[ids[t]]
    return expected


def assert_scores(scores, expected, **tolerance):
    for name in NAMES:
        value = getattr(scores, name)
        assert value.dtype == torch.float32 and not value.requires_grad
        torch.testing.assert_close(
            value, expected[name].float(), **(tolerance or FLOAT32), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", list(FAMILIES))
def test_scores_are_the_statistics_of_the_models_own_logits(name, tokenizer):
    model = FAMILIES[name]()
    assert_scores(score(Teacher(model, tokenizer)), reference(model, tokenizer))


@pytest.mark.parametrize("append_eos", [True, False])
def test_prompts_get_the_tokenizers_own_special_tokens(append_eos):
    tokenizer, model = word_tokenizer(append_eos=append_eos), tiny_llama()
    assert_scores(score(Teacher(model, tokenizer)), reference(model, tokenizer))


@pytest.mark.parametrize("max_batch_tokens", [1, 20, 35, 10**6])
def test_any_batching_gives_the_same(any_model, tokenizer, max_batch_tokens):
    teacher = Teacher(any_model, tokenizer, max_batch_tokens=max_batch_tokens)
    reader = any_model.get_encoder() if any_model.config.is_encoder_decoder else any_model.base_model
    batches = []
    reader.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    scores = score(teacher)
    prompts_read = list(batches) if any_model.config.is_encoder_decoder else batches[::2]
    assert_scores(scores, reference(any_model, tokenizer))
    if max_batch_tokens == 1:
        assert sorted(prompts_read) == [(1, 3), (1, 5), (1, 7)]  # words + </s>; nobody answers the second prompt
    if max_batch_tokens == 10**6:
        assert prompts_read == [(3, 7)]


def test_a_batch_stays_within_its_budget(tokenizer):
    """Counted by hand: prompts of 3, 5 and 7 tokens with (2, longest 5), (2, 5) and (3, 2) completions.

    Every completion holds its prompt's keys and values: the first two cost 4 · (5 + 5) = 40, all 7 · (7 + 5) = 84.
    """
    sizes = {}
    for budget in (39, 40, 83, 84):
        model = tiny_t5(tied=True)
        calls = []
        model.encoder.register_forward_pre_hook(
            lambda module, args, kwargs, calls=calls: calls.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        teacher = Teacher(model, tokenizer, max_batch_tokens=budget)
        calls.clear()
        score(teacher)
        sizes[budget] = calls
    assert sizes == {39: [1, 1, 1], 40: [2, 1], 83: [2, 1], 84: [3]}


def test_a_pair_scores_the_same_alone_and_among_others(any_model, tokenizer):
    """The papers' code did not mask source padding: −118.3 alone, −122.5 padded."""
    teacher = Teacher(any_model, tokenizer)
    together = score(teacher)
    for b, (p, ids) in enumerate(zip(INDEX, COMPLETIONS, strict=True)):
        alone = score(teacher, [PROMPTS[p]], [0], [ids], [ENDED[b]])
        for name in NAMES:
            value = getattr(together, name)[b]
            torch.testing.assert_close(value[: getattr(alone, name).shape[1]], getattr(alone, name)[0], **FLOAT32)


def test_what_stands_behind_the_mask_changes_nothing(any_model, tokenizer):
    teacher = Teacher(any_model, tokenizer)
    clean, poisoned = score(teacher, filler=0), score(teacher, filler=23)
    for name in NAMES:
        assert torch.equal(getattr(clean, name), getattr(poisoned, name))


def test_padding_columns_that_no_completion_uses(any_model, tokenizer):
    """A batch may be padded to the longest over all ranks."""
    teacher = Teacher(any_model, tokenizer)
    ids_BT, mask_BT = pad_completions(COMPLETIONS)
    wide_ids = torch.nn.functional.pad(ids_BT, (0, 4), value=9)
    wide_mask = torch.nn.functional.pad(mask_BT, (0, 4))
    scores = teacher.score(PROMPTS, torch.tensor(INDEX), wide_ids, wide_mask, torch.tensor(ENDED))
    expected = reference(any_model, tokenizer)
    assert scores.chosen.shape == (7, 9) and scores.max.shape == (7, 10)
    torch.testing.assert_close(scores.chosen[:, :5], expected["chosen"].float(), **FLOAT32)
    torch.testing.assert_close(scores.logsumexp[:, :6], expected["logsumexp"].float(), **FLOAT32)
    assert (scores.chosen[:, 5:] == 0).all() and (scores.max[:, 6:] == 0).all()


def test_an_empty_completion_has_only_its_first_state(any_model, tokenizer):
    completions, ended = [[4, 5, 1], []], [True, False]
    expected = reference(any_model, tokenizer, PROMPTS, [0, 2], completions, ended)
    assert_scores(score(Teacher(any_model, tokenizer), PROMPTS, [0, 2], completions, ended), expected)
    assert expected["max"][1, 0] != 0 and (expected["max"][1, 1:] == 0).all()


def test_the_end_flag_and_not_the_last_id_decides(tokenizer):
    """EOS as the last id with `ended` False: the state after it exists."""
    model = tiny_t5(tied=False)
    ended = [False] * len(COMPLETIONS)
    assert_scores(score(Teacher(model, tokenizer), ended=ended), reference(model, tokenizer, ended=ended))


def test_expected_and_soft_only_on_request(tokenizer):
    scores = score(Teacher(tiny_llama(), tokenizer), expected=False, tau=None)
    assert scores.expected is None and scores.soft is None
    scores = score(Teacher(tiny_llama(), tokenizer), expected=False)
    assert scores.expected is None and scores.soft is not None


@pytest.mark.parametrize("rows_per_slice", [1, 4])
def test_the_head_sees_each_existing_state_once_in_slices(any_model, tokenizer, rows_per_slice):
    """So no [B, T, V] tensor exists; and neither padding nor the state after EOS costs anything."""
    teacher = Teacher(any_model, tokenizer)
    teacher.backbone.max_slice_elements = rows_per_slice * PADDED_VOCAB
    calls = count_rows(any_model.get_output_embeddings())
    scores = score(teacher)
    # Tokens, and one more state for each of the three truncated completions: 3+1+5+1+5+2+2 + 3 = 22.
    assert sum(calls) == 22
    assert max(calls) == rows_per_slice
    assert_scores(scores, reference(any_model, tokenizer))


def test_the_slice_is_left_to_the_head(tokenizer, monkeypatch):
    seen = {}

    def record(*args, **kwargs):
        seen.update(kwargs)
        return map_head_slices(*args, **kwargs)

    monkeypatch.setattr(teacher_module, "map_head_slices", record)
    score(Teacher(tiny_llama(), tokenizer))
    assert seen["vocab_size"] == PADDED_VOCAB and seen["max_elements"] is None


def test_a_prompt_is_read_once_however_many_completions_it_has(tokenizer):
    model = tiny_t5(tied=True)
    teacher = Teacher(model, tokenizer)
    tokens = count_rows(model.get_encoder().block[0].layer[0].SelfAttention.q)
    score(teacher, [PROMPTS[0]], [0] * 7)
    assert tokens == [7]  # six words and </s>


def test_the_teacher_is_frozen(any_model, tokenizer):
    any_model.train()
    teacher = Teacher(any_model, tokenizer)
    assert not any(module.training for module in teacher.model.modules())
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_dropout_is_off(tokenizer):
    model = tiny_t5(tied=True, dropout=0.5).train()
    teacher = Teacher(model, tokenizer)
    assert torch.equal(score(teacher).max, score(teacher).max)


def test_scoring_inside_a_graph_records_nothing(tokenizer):
    teacher = Teacher(tiny_t5(tied=True), tokenizer)
    with torch.enable_grad():
        assert not score(teacher).chosen.requires_grad


def test_long_prompts_are_cut_only_where_asked(tokenizer):
    model = tiny_t5(tied=True)
    cut = score(Teacher(model, tokenizer, max_prompt_length=3))
    short = [" ".join(prompt.split()[:2]) for prompt in PROMPTS]  # two words and </s>
    assert_scores(cut, reference(model, tokenizer, short))


def test_bfloat16_weights_and_float32_statistics(tokenizer):
    model = tiny_t5(tied=False).to(torch.bfloat16)
    scores = score(Teacher(model, tokenizer))
    # bfloat16 has 8 bits: cached and uncached logits (up to about 10) differ by a few of 2**-8 · 10 = 0.04.
    assert_scores(scores, reference(model, tokenizer), rtol=0.02, atol=0.15)
    # The logits are rounded to bfloat16; their logsumexp must not be. On average 1 in 2**16 float32 numbers survives.
    assert not torch.equal(scores.logsumexp, scores.logsumexp.bfloat16().float())


def test_from_pretrained(tmp_path, tokenizer):
    model = tiny_t5(tied=True)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    teacher = Teacher.from_pretrained(str(tmp_path), max_batch_tokens=20)
    assert teacher.max_batch_tokens == 20
    assert_scores(score(teacher), reference(model, tokenizer))
    assert Teacher.from_pretrained(str(tmp_path), dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "kwargs, message", [({"dtype": "float16"}, "overflow"), ({"dtype": "half"}, "Unknown dtype 'half'")]
)
def test_from_pretrained_with_a_wrong_dtype(tmp_path, tokenizer, kwargs, message):
    tiny_t5(tied=True).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        Teacher.from_pretrained(str(tmp_path), **kwargs)


def test_from_pretrained_from_nowhere(tmp_path):
    with pytest.raises(InputError, match=r"without config\.json"):
        Teacher.from_pretrained(str(tmp_path))
    with pytest.raises(InputError, match="is not a directory"):
        Teacher.from_pretrained(str(tmp_path / "missing"))


def test_an_unsupported_architecture_is_refused(tokenizer):
    model = tiny_llama()
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits / 4
        return output

    model.forward = scaled
    with pytest.raises(InputError, match="LlamaForCausalLM"):
        Teacher(model, tokenizer)


@pytest.mark.parametrize("name", list(MODELS))
def test_a_tokenizer_without_pad_token(name):
    """GPT-2's and Llama's, passed in as loaded: what stands in the padding is masked, so any id would do."""
    tokenizer, model = word_tokenizer(), MODELS[name]()
    tokenizer.pad_token = None
    assert_scores(score(Teacher(model, tokenizer)), reference(model, tokenizer))


def test_an_empty_prompt_for_a_decoder_only_model_is_an_error():
    """Without BOS or EOS it has no token to predict the first one from: any number would be invented."""
    teacher = Teacher(tiny_llama(), word_tokenizer(append_eos=False))
    with pytest.raises(InputError):
        score(teacher, ["w3 w4", "", "w5", "w6"], [0, 1], [[3], [4]], [False, False])
    with pytest.raises(InputError):
        score(teacher, [""], [0, 0], [[3], [4]], [False, False])
