"""Where the queries of a prompt's completions stand, and that keys and values are never copied for them."""

import pytest
import torch

from rlkd_trl.models.backbone import backbone_of
from rlkd_trl.models.shared_attention import PromptRows
from tests.conftest import tiny_t5
from tests.models.reference import pad_prompts

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
