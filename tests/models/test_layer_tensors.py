"""What is read of a model's layers is what the model computes with, in every architecture."""

import pytest
import torch
from torch import nn
from transformers import AutoModel

from rlkd_trl.errors import InputError
from rlkd_trl.models.layer_tensors import KINDS, LayerReader
from tests.models.encoders import CONFIGS, batch, make

# The module that a layer's self-attention gives its result to, by the end of its name.
OUTPUT_PROJECTIONS = {
    "distilbert": "attention.out_lin",
    "albert": "attention.dense",
    "modernbert": "attn.Wo",
    "t5": "SelfAttention.o",
    "bart": "self_attn.out_proj",
    "llama": "self_attn.o_proj",
}
LAYERS = 3
# SDPA computes what eager attention does, in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def own_outputs(model, inputs):
    """With the architecture's own eager attention throughout."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(**inputs, output_attentions=True, output_hidden_states=True)
    if model._supports_sdpa:
        model.set_attn_implementation("sdpa")
    return outputs


def of_stack(outputs, stack: str, name: str):
    found = outputs.get(f"{stack}_{name}")
    return outputs[name] if found is None else found


def everything(reader: LayerReader) -> dict:
    return {
        stack: {kind: range(kind != "hidden_states", reader.num_layers(stack) + 1) for kind in KINDS}
        for stack in reader.stacks
    }


@pytest.fixture(params=CONFIGS)
def kind(request) -> str:
    return request.param


def test_states_and_maps_are_the_models_own(kind):
    model, inputs = make(kind, LAYERS), batch(kind)
    own = own_outputs(model, inputs)
    reader = LayerReader(model)
    with torch.no_grad():
        outputs, layers = reader.read(inputs, everything(reader))
    assert set(layers) == (
        {"encoder", "decoder"} if kind in ("t5", "bart") else {"decoder" if kind == "llama" else "encoder"}
    )
    torch.testing.assert_close(outputs.last_hidden_state, own.last_hidden_state, **CLOSE)
    for stack, tensors in layers.items():
        real_BS = inputs[
            "decoder_attention_mask" if (stack, kind != "llama") == ("decoder", True) else "attention_mask"
        ].bool()
        states, maps = of_stack(own, stack, "hidden_states"), of_stack(own, stack, "attentions")
        assert sorted(tensors.hidden_states) == list(range(len(states))) == list(range(len(maps) + 1))
        assert reader.num_layers(stack) == len(maps) and reader.num_heads(stack) == maps[0].shape[1]
        for layer, state_BSD in enumerate(states):
            torch.testing.assert_close(tensors.hidden_states[layer][real_BS], state_BSD[real_BS], **CLOSE)
        assert not torch.allclose(states[1][real_BS], states[2][real_BS], atol=1e-2), "layers must be told apart"
        for layer, map_BHSS in enumerate(maps, start=1):
            for read_BHSS in (tensors.probabilities[layer], tensors.scores[layer].softmax(dim=-1)):
                torch.testing.assert_close(
                    read_BHSS.transpose(1, 2)[real_BS], map_BHSS.transpose(1, 2)[real_BS], **CLOSE
                )


def test_values_are_what_attention_adds_up(kind):
    """Probabilities × values is what the layer's output projection gets, in all heads and layers."""
    model, inputs = make(kind, LAYERS), batch(kind)
    ending = OUTPUT_PROJECTIONS.get(kind, "attention.output.dense")
    given: dict[str, list[torch.Tensor]] = {"encoder": [], "decoder": []}
    for name, module in model.named_modules():
        if name.endswith(ending) and isinstance(module, nn.Linear):
            stack = "decoder" if kind == "llama" or name.startswith("decoder") else "encoder"
            module.register_forward_pre_hook(lambda _, args, stack=stack: given[stack].append(args[0]))
    reader = LayerReader(model)
    with torch.no_grad():
        _, layers = reader.read(inputs, everything(reader))
    for stack, tensors in layers.items():
        assert len(given[stack]) == reader.num_layers(stack)
        for layer, context_BSD in enumerate(given[stack], start=1):
            probabilities_BHSS, values_BSHd = tensors.probabilities[layer], tensors.values[layer]
            repeats = probabilities_BHSS.shape[1] // values_BSHd.shape[2]  # of grouped values
            values_BSHd = values_BSHd.repeat_interleave(repeats, dim=2)
            by_hand = torch.einsum("bhij,bjhd->bihd", probabilities_BHSS, values_BSHd).flatten(2)
            torch.testing.assert_close(by_hand, context_BSD, **CLOSE)


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "distilbert", "electra", "albert", "bart"])
def test_queries_and_keys_give_the_scores(kind):
    """Where scores are nothing but q · k / √d: the other architectures add positions."""
    model, inputs = make(kind, LAYERS), batch(kind)
    reader = LayerReader(model)
    with torch.no_grad():
        _, layers = reader.read(inputs, everything(reader))
    for tensors in layers.values():
        for layer, scores_BHSS in tensors.scores.items():
            queries_BSHd, keys_BSHd = tensors.queries[layer], tensors.keys[layer]
            scale = queries_BSHd.shape[-1] ** 0.5
            by_hand = torch.einsum("bihd,bjhd->bhij", queries_BSHd, keys_BSHd) / scale
            allowed = scores_BHSS > torch.finfo(torch.float32).min / 2
            assert 0.3 < float(allowed.float().mean()) < 1
            torch.testing.assert_close(by_hand[allowed], scores_BHSS[allowed], **CLOSE)


def test_queries_and_keys_where_positions_are_added():
    """Each by its own rule, of the module's weights and the layer's input."""
    for kind, name in (("t5", "encoder.block.1.layer.0.SelfAttention"), ("llama", "layers.1.self_attn")):
        model, inputs = make(kind, LAYERS), batch(kind)
        module, seen = model.get_submodule(name), {}
        module.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.update(x=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        reader = LayerReader(model)
        stack = reader.stacks[0]
        with torch.no_grad():
            _, layers = reader.read(inputs, {stack: {"queries": [2], "keys": [2]}})
            names = ("q", "k") if kind == "t5" else ("q_proj", "k_proj")
            for vectors, projection in zip((layers[stack].queries[2], layers[stack].keys[2]), names, strict=True):
                torch.testing.assert_close(vectors.flatten(2), getattr(module, projection)(seen["x"]), **CLOSE)
    for kind in ("deberta", "deberta-v2", "modernbert"):
        model, inputs = make(kind, LAYERS), batch(kind)
        with torch.no_grad():
            states = own_outputs(model, inputs).hidden_states
            _, layers = LayerReader(model).read(inputs, {"encoder": {kind: [2] for kind in ("queries", "keys")}})
            found = layers["encoder"].queries[2], layers["encoder"].keys[2]
            torch.testing.assert_close(torch.stack(found), torch.stack(_by_hand(kind, model, states[1])), **CLOSE)


def _by_hand(kind: str, model, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of the second layer, head by head."""
    if kind == "deberta":  # each head's rows of one matrix: query, key, value
        attention = model.encoder.layer[1].attention.self
        weights = attention.in_proj.weight.view(2, 3, 8, 16)
        queries, keys = ([x_BSD @ weights[head, part].T for head in range(2)] for part in (0, 1))
        queries = [query + attention.q_bias[8 * head : 8 * head + 8] for head, query in enumerate(queries)]
        return torch.stack(queries, dim=2), torch.stack(keys, dim=2)
    if kind == "deberta-v2":
        attention = model.encoder.layer[1].attention.self
        return tuple(p(x_BSD).unflatten(-1, (2, 8)) for p in (attention.query_proj, attention.key_proj))
    layer = model.layers[1]
    weights = layer.attn.Wqkv.weight.view(3, 2, 8, 16)
    return tuple(torch.einsum("bsD,hdD->bshd", layer.attn_norm(x_BSD), weights[part]) for part in (0, 1))


def test_only_what_is_wanted_is_kept(kind):
    model, inputs = make(kind, LAYERS), batch(kind)
    reader = LayerReader(model)
    stack = reader.stacks[-1]
    _, layers = reader.read(inputs, {stack: {"scores": [2], "values": [1]}})
    assert (list(layers[stack].scores), list(layers[stack].values)) == ([2], [1])
    for tensors in layers.values():
        assert not (tensors.hidden_states or tensors.queries or tensors.probabilities)
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks], "hooks are taken off again"


def test_a_module_that_stands_for_several_layers_is_each_of_them():
    """ALBERT's layers are one, with other inputs."""
    model, inputs = make("albert", LAYERS), batch()
    _, layers = LayerReader(model).read(inputs, {"encoder": {"scores": [1, 3], "keys": [2, 3]}})
    tensors = layers["encoder"]
    assert not torch.allclose(tensors.scores[1], tensors.scores[3]) and not torch.allclose(*tensors.keys.values())


def test_what_is_read_has_gradients():
    model, inputs = make("bert", LAYERS), batch()
    _, layers = LayerReader(model).read(inputs, {"encoder": {"scores": [2]}})
    real = inputs["attention_mask"].bool()
    layers["encoder"].scores[2].transpose(1, 2)[real].clamp(min=-1e3).sum().backward()
    gradients = {name: p.grad is not None and bool(p.grad.any()) for name, p in model.named_parameters()}
    assert (
        gradients["encoder.layer.1.attention.self.query.weight"] and gradients["encoder.layer.0.output.dense.weight"]
    )
    assert not gradients["encoder.layer.1.attention.self.value.weight"] and not gradients["pooler.dense.weight"]


def test_a_read_with_maps_leaves_the_model_as_it_was():
    model, inputs = make("bert", LAYERS), batch()
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        LayerReader(model).read(inputs, {"encoder": {"scores": [1]}})
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(model(**inputs).last_hidden_state, before)


class FusedAttention(nn.Module):
    """An attention that has no map."""

    def __init__(self, width: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, hidden_states, *args, **kwargs):
        heads = [p(hidden_states).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.query, self.key, self.value)]
        return nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2), None


def test_a_layer_without_maps_is_named():
    model = make("bert", LAYERS)
    model.encoder.layer[1].attention.self = FusedAttention(16)
    reader = LayerReader(model)
    reader.read(batch(), {"encoder": {"values": [2], "scores": [1, 3]}})
    with pytest.raises(InputError, match=r"Layer 2 gives no attention maps \(FusedAttention .*: leave out attention"):
        reader.read(batch(), {"encoder": {"scores": [2]}})
    reader.read(batch(), {"encoder": {"scores": [1]}})  # nothing is left behind


def test_an_error_inside_of_a_layer_leaves_nothing_behind():
    model = make("bert", LAYERS)
    model.encoder.layer[1].attention.self.value.weight.data = torch.ones(3, 3)
    with pytest.raises(RuntimeError, match="shapes"):
        LayerReader(model).read(batch(), {"encoder": {"scores": [2]}})
    assert torch.softmax(torch.zeros(1, 1, 2, 2), dim=-1).sum() == 2
    assert model.config._attn_implementation == "sdpa" and not [m for m in model.modules() if m._forward_hooks]


def test_other_models_offer_hidden_states_only():
    model = make("bert", LAYERS)
    for layer in model.encoder.layer:
        layer.attention.self = nn.Identity()
    reader = LayerReader(model)
    reader.check_offers({"hidden_states"}, "The teacher")
    with pytest.raises(InputError, match=r"The teacher, a BertModel, has no attention modules of a known form"):
        reader.check_offers({"hidden_states", "values"}, "The teacher")


def test_widths_of_vectors():
    assert LayerReader(make("llama")).vector_width("decoder", "queries") == 16
    assert LayerReader(make("llama")).vector_width("decoder", "values") == 8
    assert LayerReader(make("t5")).vector_width("encoder", "keys") == 8
    assert LayerReader(make("modernbert")).vector_width("encoder", "keys") == 16
    assert LayerReader(make("deberta")).vector_width("encoder", "queries") == 16


@pytest.mark.parametrize("kind", ["bert", "distilbert", "electra"])
def test_maps_of_other_layers_are_not_kept(kind):
    """Of a student with gradients: only layers in the map keep tensors of a map's size for the backward pass."""
    S = 128
    inputs = {"input_ids": torch.randint(5, 30, (2, S)), "attention_mask": torch.ones(2, S, dtype=torch.long)}
    inputs["attention_mask"][1, 100:] = 0
    config = CONFIGS[kind](4)
    config.max_position_embeddings = S
    reader = LayerReader(AutoModel.from_config(config))

    def maps_kept(layers: list[int]) -> int:
        kept = []

        def note(tensor):
            if tensor.numel() == 2 * 2 * S * S:  # texts × heads × tokens²
                kept.append(tensor)  # alive, so that no other takes its place
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            reader.read(inputs, {"encoder": {"scores": layers}})
        return len({tensor.untyped_storage().data_ptr() for tensor in kept})

    none, one, three = (maps_kept(layers) for layers in ([], [2], [1, 2, 3]))
    assert none == 0 and one > 0 and three == 3 * one, (none, one, three)
