"""Where the queries of a prompt's completions stand, and that keys and values are never copied for them."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from rlkd_trl.models.backbone import backbone_of
from rlkd_trl.models.shared_attention import (
    SHARING_MODEL_TYPES,
    PromptRows,
    SharedPrompts,
    attend_to_shared_prompts,
)
from tests.models.reference import own_logits, pad_completions, pad_prompts
from tests.tiny_models import PADDED_VOCAB, tiny_llama, tiny_t5

PROMPTS = [[4, 5, 6, 1], [9, 1], [10, 11, 1]]


def test_places_worked_by_hand():
    # prompt 2 has completions 0 and 3, prompt 0 has 1, 2 and 4, prompt 1 has none; three places each
    rows = PromptRows.of(torch.tensor([2, 0, 0, 2, 0]), 3)
    assert rows.per_prompt == 3
    assert rows.place_B.tolist() == [6, 0, 1, 7, 2]


def test_whole_groups_stay_where_they_are():
    assert PromptRows.of(torch.tensor([0, 0, 1, 1]), 2).place_B is None
    assert PromptRows.of(torch.tensor([0, 1, 0, 1]), 2).place_B is not None


@pytest.mark.parametrize("index", [[0, 0, 1, 1, 2, 2], [2, 0, 0, 2, 0]])
def test_what_is_gathered_is_scattered_back(index):
    H, T, d = 2, 3, 4
    rows = PromptRows.of(torch.tensor(index), 3)
    query_BHTd = torch.randn(len(index), H, T, d)
    gathered_PHQd = rows.gather(query_BHTd)
    assert gathered_PHQd.shape == (3, H, rows.per_prompt * T, d)
    torch.testing.assert_close(rows.scatter(gathered_PHQd.transpose(1, 2)), query_BHTd.transpose(1, 2))
    for b, p in enumerate(index):  # each query is somewhere among its prompt's
        of_prompt = gathered_PHQd[p].view(H, rows.per_prompt, T, d).transpose(0, 1)
        assert any(torch.equal(place, query_BHTd[b]) for place in of_prompt)


@torch.no_grad()
def test_cross_attention_keys_stay_one_row_per_prompt():
    backbone = backbone_of(tiny_t5(tied=False))
    prefix = backbone.prefill(*pad_prompts(backbone.model, PROMPTS)).select(torch.tensor([0, 0, 0, 1, 1, 2]))
    cross, own = prefix.cache.cross_attention_cache.layers[0], prefix.cache.self_attention_cache.layers[0]
    assert (len(cross.keys), len(own.keys), len(prefix.encoder_hidden_BSD)) == (3, 6, 3)
    prefix = prefix.select(torch.tensor([2, 1]))  # two of the first prompt: the others' rows are let go
    assert (len(cross.keys), len(own.keys), len(prefix.encoder_hidden_BSD)) == (1, 2, 1)


@torch.no_grad()
def test_the_models_own_attention_is_put_back(monkeypatch):
    model = tiny_t5(tied=True)
    backbone = backbone_of(model)
    prefix = backbone.prefill(*pad_prompts(model, PROMPTS))
    assert model.decoder.config._attn_implementation == "sdpa"
    with pytest.raises(IndexError):
        backbone.extend(prefix, torch.full((3, 1), 10_000))
    assert model.decoder.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_eager_attention_is_each_models_own():
    """There, each completion gets a copy, and the numbers are the same."""
    model = tiny_t5(tied=True)
    asked = (*pad_prompts(model, PROMPTS), torch.tensor([[3, 4], [5, 1], [6, 7], [8, 9]]), torch.tensor([2, 0, 0, 1]))
    expected = backbone_of(model).completion_states(*asked)
    model.set_attn_implementation("eager")
    backbone = backbone_of(model)
    assert backbone.prefill(*asked[:2]).prompt_rows is None
    torch.testing.assert_close(backbone.completion_states(*asked), expected, rtol=1e-4, atol=1e-4)


# Self-attention

COMPLETIONS, INDEX = [[3, 4, 5], [6, 1, 9], [7, 8, 10], [12, 1, 4], [3, 4, 6]], [2, 0, 0, 2, 0]
SIZES = {
    "vocab_size": PADDED_VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rotary_dim": 8, "ffn_dim": 48,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "word_embed_proj_dim": 32, "sliding_window": None, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip


def tiny(model_type: str):
    """Two layers, 4 query heads; two heads of keys and values where the architecture has grouped queries."""
    torch.manual_seed(0)
    defaults = AutoConfig.for_model(model_type)
    config = AutoConfig.for_model(
        model_type, **{name: size for name, size in SIZES.items() if hasattr(defaults, name)}
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # as large as makes the attention uneven
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(SHARING_MODEL_TYPES))
@torch.no_grad()
def test_logits_are_each_models_own(model_type):
    """All at once and token by token, for prompts of several lengths, one of which has no completion."""
    model = tiny(model_type)
    backbone = backbone_of(model)
    prompts = pad_prompts(model, PROMPTS)
    ids_BT, _ = pad_completions(COMPLETIONS)
    prefix = backbone.prefill(*prompts)
    assert prefix.prompt_rows is not None
    prefix = prefix.select(torch.tensor(INDEX))
    one_by_one = [prefix.hidden_B1D, *(backbone.extend(prefix, ids_BT[:, t : t + 1]) for t in range(3))]
    at_once = backbone.completion_states(*prompts, ids_BT, torch.tensor(INDEX))
    for states_BTD in (at_once, torch.cat(one_by_one, dim=1)):
        for b, (completion, p) in enumerate(zip(COMPLETIONS, INDEX, strict=True)):
            expected = own_logits(model, PROMPTS[p], completion)
            torch.testing.assert_close(
                backbone.head(states_BTD[b]), expected, rtol=1e-4, atol=1e-4 * expected.abs().max()
            )


@pytest.mark.parametrize("index", [[0, 0, 1, 1], [1, 0, 0]])
def test_attention_over_prompt_and_own_tokens_by_loops(index):
    """Grouped queries, a padded prompt, the last 2 of 3 own tokens; and its gradients."""
    T, U, S, H, h, d, B = 2, 3, 4, 4, 2, 5, len(index)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    query, key, value = random(B, H, T, d), random(B, h, U, d), random(B, h, U, d)
    prompt_key, prompt_value = random(2, h, S, d), random(2, h, S, d)
    mask_PS = torch.tensor([[True] * 4, [False, True, True, True]])
    expected = torch.zeros(B, T, H, d, dtype=torch.float64)
    for b, p in enumerate(index):
        for head in range(H):
            group = head // (H // h)
            for t in range(T):
                seen = [(prompt_key[p, group, s], prompt_value[p, group, s]) for s in range(S) if mask_PS[p, s]]
                seen += [(key[b, group, u], value[b, group, u]) for u in range(U - T + t + 1)]
                scores = torch.stack([0.3 * query[b, head, t] @ k for k, _ in seen])
                weights = scores.exp() / scores.exp().sum()
                expected[b, t, head] = sum(w * v for w, (_, v) in zip(weights, seen, strict=True))
    prompts = SharedPrompts(DynamicCache(), PromptRows.of(torch.tensor(index), 2), ~mask_PS)
    inputs, towards = (query, key, value, prompt_key, prompt_value), torch.randn_like(expected)
    found = attend_to_shared_prompts(*inputs, prompts, 0.3)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad((result * towards).sum(), inputs) for result in (found, expected))
    torch.testing.assert_close(ours, theirs)
    assert not attend_to_shared_prompts(*inputs, prompts, 0.3, dropout=1.0).any()


@torch.no_grad()
def test_prompts_keys_stay_one_row_each_while_completions_grow():
    backbone = backbone_of(tiny_llama())
    prefix = backbone.prefill(*pad_prompts(backbone.model, PROMPTS)).select(torch.tensor([0, 0, 0, 1, 1, 2]))
    for t in range(2):
        backbone.extend(prefix, torch.full((6, 1), 4 + t))
    prompts, own = prefix.cache.cross_attention_cache.layers[0], prefix.cache.self_attention_cache.layers[0]
    assert (prompts.keys.shape[0], prompts.keys.shape[2]) == (3, 4)
    assert (own.keys.shape[0], own.keys.shape[2]) == (6, 2)
    prefix = prefix.select(torch.tensor([2, 1]))  # two of the first prompt: the others' rows are let go
    assert (len(prompts.keys), len(own.keys), len(prefix.mask)) == (1, 2, 1)


@torch.no_grad()
def test_long_completions_get_copies_where_these_are_smaller():
    """Two heads of 8: weights of T + S for each of T tokens, or 2 · 8 numbers for each of S + T."""
    backbone = backbone_of(tiny_llama())
    config = backbone.model.config
    at_most = 2 * config.head_dim * config.num_key_value_heads // config.num_attention_heads
    prompts = pad_prompts(backbone.model, PROMPTS)
    for tokens, shares in ((at_most, True), (at_most + 1, False)):
        assert (backbone._prefill(*prompts, tokens_at_once=tokens).prompt_rows is not None) == shares


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{"attn_implementation": "eager"}, {"sliding_window": 3, "model_type": "mistral"}]
)
def test_other_attention_gets_copies(settings):
    if "model_type" in settings:
        model = tiny("mistral")
        model.config.sliding_window = settings["sliding_window"]
    else:
        model = tiny_llama()
        model.set_attn_implementation("eager")
    assert backbone_of(model).prefill(*pad_prompts(model, PROMPTS)).prompt_rows is None
