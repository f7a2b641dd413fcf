"""Reads tensors of a model's layers during one forward pass, for many architectures.

    outputs, layers = LayerReader(model).read(inputs, {"encoder": {"hidden_states": [0, 4], "scores": [2, 4]}})
    layers["encoder"].scores[4]      # [B, H, S, S]

The tensors of a layer are its output (`hidden_states`), the scores of its self-attention before softmax and the
probabilities after it, and the queries, keys and values of each head. Queries, keys and values are the outputs of the
projections of an attention module, read by hooks; scores and probabilities are the argument and the result of the
softmax within the module. Nothing is copied: with gradients, the tensors are parts of the model's graph.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask
from transformers.utils import ModelOutput

from rlkd_trl.errors import InputError
from rlkd_trl.models.private_apis import own_eager_attention, with_attention_of_configs
from rlkd_trl.models.recomputation import Context, RecomputedLayers
from rlkd_trl.models.vocabulary import base_of

MAPS = ("scores", "probabilities")  # [B, H, S, S]
VECTORS = ("queries", "keys", "values")  # [B, S, H, d]
KINDS = ("hidden_states", *MAPS, *VECTORS)

# Names of the query, key and value projections in an attention module: BERT, RoBERTa, ELECTRA, ALBERT, XLM-R;
# DistilBERT; DeBERTa-v2; T5; Llama, BART and most decoders.
_PROJECTIONS = (
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
    ("q_proj", "k_proj", "v_proj"),
)
# One projection for all three. Its output is three parts, each of all heads; or for each head three parts.
_PACKED = {"Wqkv": "three of heads", "in_proj": "heads of three"}  # ModernBERT; DeBERTa
_CROSS_ATTENTION = ("EncDecAttention", "encoder_attn", "crossattention")
_SOFTMAX = (torch.nn.functional.softmax, torch.softmax, Tensor.softmax)
_EAGER_WHERE_WANTED = "rlkd_layer_maps"
_TAP = "_rlkd_softmax_tap"
# Stack ("encoder", "decoder") -> kind of tensor -> layers, counted from 1; 0 for the embeddings' hidden states.
Wanted = Mapping[str, Mapping[str, Collection[int]]]


@dataclass
class LayerTensors:
    """The tensors that were read of one stack of layers, by the number of the layer, counted from 1.

    hidden_states: outputs of the embeddings (layer 0) and of layers, `[B, S, D]`; the last layer's as the model
    returns it, which is after a final norm if the model has one. scores, probabilities: `[B, H, S, S]`; for keys that
    a query must not attend to, scores are about the smallest number of the dtype. queries, keys, values:
    `[B, S, H, d]`, as projected, before rotary positions and scaling; with grouped queries, keys and values have
    fewer heads.
    """

    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)
    probabilities: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)


class LayerReader:
    """Reads a model's layers.

    Args:
        model: A model of transformers, with or without a head or PEFT's adapters.

    Attributes:
        stacks: The model's stacks of layers: "encoder", "decoder", or both.
    """

    def __init__(self, model: PreTrainedModel | PeftModel):
        self.model = model
        self.config = base_of(model).config
        self._attention: dict[str, list[nn.Module]] = {}
        for name, module in model.named_modules():
            if _form_of(module) is not None and not any(part in name for part in _CROSS_ATTENTION):
                stack = _stack_of(name, module, self.config.is_encoder_decoder)
                self._attention.setdefault(stack, []).append(module)
        both = ("encoder", "decoder") if self.config.is_encoder_decoder else ("encoder",)
        self.stacks: tuple[str, ...] = tuple(self._attention) or both
        self._recomputed: RecomputedLayers | None = None

    def recompute_layers(self) -> None:
        """From now on `read` with gradients keeps inputs only of layers whose maps it does not read.

        A map that is read has to be kept, and with it what its layer has computed. Raises `InputError` as
        `RecomputedLayers`.
        """
        self._recomputed = RecomputedLayers(self.model)

    def num_layers(self, stack: str) -> int:
        """The number of layers of a stack."""
        return _of_stack(self.config, stack, "num_hidden_layers", "num_decoder_layers", "decoder_layers")

    def num_heads(self, stack: str) -> int:
        """The number of attention heads of a layer of this stack."""
        return _of_stack(self.config, stack, "num_attention_heads", "decoder_attention_heads")

    def vector_width(self, stack: str, kind: str) -> int:
        """The width of a token's queries, keys or values, of all heads together."""
        module = self._attention[stack][0]
        name, kinds = next((name, kinds) for name, kinds in _form_of(module).items() if kind in kinds)
        return getattr(module, name).weight.shape[0] // len(kinds)

    def check_offers(self, kinds: Collection[str], who: str) -> None:
        """Raises `InputError` if the layers do not offer one of `KINDS`. who: "The teacher", "The student"."""
        if not self._attention and set(kinds) - {"hidden_states"}:
            raise InputError(
                f"{who}, a {type(base_of(self.model)).__name__}, has no attention modules of a known form: its "
                "layers offer hidden states only. Leave out the losses on attention and relations, or choose a model "
                "of BERT's, RoBERTa's, DistilBERT's, ELECTRA's, ALBERT's, DeBERTa's, ModernBERT's, T5's or Llama's "
                "kind."
            )

    def read(self, inputs: Mapping[str, object], wanted: Wanted) -> tuple[ModelOutput, dict[str, LayerTensors]]:
        """Runs one forward pass and returns the model's outputs and the wanted tensors of each stack.

        Only layers whose maps (scores or probabilities) are wanted run eager attention; all others run SDPA and keep
        no map. Exceptions are models with an attention of their own (DeBERTa), which make all maps, and SDPA with a
        learned bias on scores (T5), which makes maps for the bias's gradients.

        Raises:
            InputError: Maps of a layer are wanted whose attention computes no softmax that can be read.
        """
        layers = {stack: LayerTensors() for stack in self.stacks}
        attention: Context = nullcontext
        if any(of_stack.get(kind) for of_stack in wanted.values() for kind in MAPS):
            attention = partial(with_attention_of_configs, _configs_of(self.model), _EAGER_WHERE_WANTED)
        with ExitStack() as context:
            context.enter_context(attention())
            if self._recomputed is not None:
                context.enter_context(self._recomputed.in_place(attention, but=self._layers_with_maps(wanted)))
            for stack, modules in self._attention.items():
                recorder = _Recorder(layers[stack], wanted.get(stack, {}), self.num_heads(stack))
                for module in modules:
                    for handle in recorder.hooks(module):
                        context.callback(handle.remove)
            keeps_states = any(of_stack.get("hidden_states") for of_stack in wanted.values())
            outputs = self.model(**inputs, output_hidden_states=keeps_states)
        for stack, of_stack in wanted.items():
            states = outputs.get(f"{stack}_hidden_states")
            states = outputs.get("hidden_states") if states is None else states
            layers[stack].hidden_states = {layer: states[layer] for layer in of_stack.get("hidden_states", ())}
        return outputs, layers

    def _layers_with_maps(self, wanted: Wanted) -> list[nn.Module]:
        """The layers around the attention modules whose maps are wanted."""
        read = set()
        for stack, modules in self._attention.items():
            numbers = {number for kind in MAPS for number in wanted.get(stack, {}).get(kind, ())}
            is_shared = len(modules) < self.num_layers(stack)  # one module for several layers, as in ALBERT
            read |= {module for i, module in enumerate(modules, start=1) if i in numbers or (is_shared and numbers)}
        return [layer for layer in self.model.modules() if read.intersection(layer.modules())]


def _of_stack(config: PreTrainedConfig, stack: str, name: str, *of_decoder: str) -> int:
    names = [*of_decoder, name] if config.is_encoder_decoder and stack == "decoder" else [name]
    return next(value for name in names if (value := getattr(config, name, None)) is not None)


def _form_of(module: nn.Module) -> dict[str, tuple[str, ...]] | None:
    """An attention module's projections, by name, with the kinds of vectors each gives; None for other modules."""
    for names in _PROJECTIONS:
        if all(isinstance(getattr(module, name, None), nn.Module) for name in names):
            return {name: (kind,) for name, kind in zip(names, VECTORS, strict=True)}
    packed = next((name for name in _PACKED if isinstance(getattr(module, name, None), nn.Module)), None)
    return None if packed is None else {packed: VECTORS}


def _stack_of(name: str, module: nn.Module, is_encoder_decoder: bool) -> str:
    if is_encoder_decoder:
        return "encoder" if ".encoder." in f".{name}" else "decoder"
    return "decoder" if getattr(module, "is_causal", False) else "encoder"


def _configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """The configs of the model and of the models within it (T5's encoder and decoder have their own), each once."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    return list({id(config): config for config in configs}.values())


def _attention(module: nn.Module, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
    """The architecture's own eager attention in layers whose maps are wanted, transformers' SDPA in the others."""
    return (own_eager_attention(module) if hasattr(module, _TAP) else sdpa_attention_forward)(module, *args, **kwargs)


AttentionInterface.register(_EAGER_WHERE_WANTED, _attention)
AttentionMaskInterface.register(_EAGER_WHERE_WANTED, eager_mask)  # an additive mask, which SDPA reads as well


class _SoftmaxTap(TorchFunctionMode):
    """Calls `note` with the argument and the result of each softmax of four dimensions: attention's maps."""

    def __init__(self, note: Callable[[Tensor, Tensor], None]):
        super().__init__()
        self._note = note
        self.is_used = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in _SOFTMAX and result.dim() == 4:
            self._note(args[0] if args else kwargs["input"], result)
            self.is_used = True
        return result


class _Recorder:
    """The hooks of one stack's attention modules. A module that is called several times is several layers (ALBERT)."""

    def __init__(self, tensors: LayerTensors, wanted: Mapping[str, Collection[int]], heads: int):
        self._tensors, self._wanted, self._heads = tensors, wanted, heads
        self._layer = 0

    def hooks(self, module: nn.Module) -> Iterator[RemovableHandle]:
        yield module.register_forward_pre_hook(self._begin)
        yield module.register_forward_hook(self._end, always_call=True)
        for name, kinds in _form_of(module).items():
            yield getattr(module, name).register_forward_hook(partial(self._projected, module, name, kinds))

    def _wants(self, kind: str) -> bool:
        return self._layer in self._wanted.get(kind, ())

    def _begin(self, module: nn.Module, args: tuple) -> None:
        self._layer += 1
        if any(self._wants(kind) for kind in MAPS):
            tap = _SoftmaxTap(self._note_maps)
            setattr(module, _TAP, tap)
            tap.__enter__()

    def _end(self, module: nn.Module, args: tuple, output: object) -> None:
        tap = module.__dict__.pop(_TAP, None)
        if tap is None:
            return
        tap.__exit__(None, None, None)
        if output is not None and not tap.is_used:  # None: the module has raised
            raise InputError(
                f"Layer {self._layer} gives no attention maps ({type(module).__name__} computes no softmax of its "
                "own): leave out attention_mse and attention_kl, or choose a model with eager attention."
            )

    def _note_maps(self, scores: Tensor, probabilities: Tensor) -> None:
        for kind, tensor in zip(MAPS, (scores, probabilities), strict=True):
            if self._wants(kind):
                getattr(self._tensors, kind)[self._layer] = tensor

    def _projected(
        self,
        attention: nn.Module,
        name: str,
        kinds: tuple[str, ...],
        projection: nn.Module,
        args: tuple,
        output: Tensor,
    ) -> None:
        wanted = [kind for kind in kinds if self._wants(kind) and self._layer not in getattr(self._tensors, kind)]
        if not wanted:  # also in a second call within a layer: DeBERTa-v2 projects its positions, too
            return
        vectors = _per_head(output, kinds, _PACKED.get(name), self._heads, attention)
        for kind in wanted:
            getattr(self._tensors, kind)[self._layer] = vectors[kind]


def _per_head(
    output: Tensor, kinds: tuple[str, ...], packing: str | None, heads: int, attention: nn.Module
) -> dict[str, Tensor]:
    """A projection's output by kind, `[B, S, H, d]`."""
    B, S, _ = output.shape
    if packing == "three of heads":
        return dict(zip(kinds, output.view(B, S, 3, heads, -1).unbind(dim=2), strict=True))
    if packing == "heads of three":
        vectors = dict(zip(kinds, output.view(B, S, heads, -1).chunk(3, dim=-1), strict=True))
        for kind, bias in (("queries", "q_bias"), ("values", "v_bias")):
            vectors[kind] = vectors[kind] + getattr(attention, bias).view(heads, -1)
        return vectors
    head_dim = next(
        (
            value
            for name in ("head_dim", "key_value_proj_dim")
            if (value := getattr(attention, name, None)) is not None
        ),
        None,
    )
    return {kinds[0]: output.view(B, S, -1, head_dim) if head_dim else output.view(B, S, heads, -1)}
