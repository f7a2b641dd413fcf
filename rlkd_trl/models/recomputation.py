"""Layers that keep only their input for the backward pass, and are computed again there (Chen et al. 2016).

Also called gradient or activation checkpointing. transformers' own drops the key/value cache, with which the
completions of a prompt would lose the prompt. Here a layer that is computed again finds the cache as it was before the
layer first wrote to it, and the same replacements of attention, norms and GELUs.
"""

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from rlkd_trl.errors import InputError

# They grow by making new tensors, so that a copy of the object that holds them is a copy of their state.
_KINDS_OF_CACHE = (DynamicLayer, DynamicSlidingWindowLayer)

Context = Callable[[], AbstractContextManager]


class RecomputedLayers:
    """A model's layers, which inside `with layers.in_place(again):` are computed again in the backward pass.

    Raises:
        InputError: The model has no layers that transformers knows as such.
    """

    def __init__(self, model: nn.Module):
        self._layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not self._layers:
            raise InputError(
                f"gradient_checkpointing: {type(model).__name__} has no layers that can be recomputed. Leave it out."
            )

    @contextmanager
    def in_place(self, again: Context, *, but: Collection[nn.Module] = ()) -> Iterator[None]:
        """Within it, calls with gradients keep the layers' inputs only; calls without them are as ever.

        again: makes a context as the layers' own is now, for the backward pass. but: layers that keep everything.
        """
        layers = [layer for layer in self._layers if layer not in but] if torch.is_grad_enabled() else []
        replaced = [vars(layer).get("forward") for layer in layers]
        for layer in layers:
            vars(layer)["forward"] = partial(_checkpointed, layer.forward, again)
        try:
            yield
        finally:
            for layer, forward in zip(layers, replaced, strict=True):
                if forward is None:
                    del vars(layer)["forward"]
                else:
                    vars(layer)["forward"] = forward


def check_cache(cache: Cache, model: nn.Module) -> None:
    """Raises `InputError` if layers that write to this cache cannot be computed again."""
    kinds = {type(layer).__name__ for layer in cache.layers if type(layer) not in _KINDS_OF_CACHE}
    if kinds:
        raise InputError(
            f"gradient_checkpointing: layers of {type(model).__name__} keep a state ({min(kinds)}) that they would "
            "find changed when they are computed again. Leave it out, and use a smaller per_device_train_batch_size "
            "with more gradient_accumulation_steps."
        )


def _checkpointed(forward: Callable, again: Context, *args, **kwargs):
    """`forward(*args, **kwargs)`; its first computation writes to the caches, the later ones to copies."""
    before = [_copy_of(value) for value in (*args, *kwargs.values())]
    is_first = True

    def run():
        nonlocal is_first
        if is_first:
            is_first = False
            return forward(*args, **kwargs)
        copies = [_copy_of(value) for value in before]
        return forward(*copies[: len(args)], **dict(zip(kwargs, copies[len(args) :], strict=True)))

    return checkpoint(run, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))


def _copy_of(value: object) -> object:
    """A copy of a cache, with the same tensors; what is no cache, as it is."""
    return _copy_of_cache(value) if isinstance(value, Cache) else value


def _copy_of_cache(cache: Cache) -> Cache:
    copied = copy.copy(cache)
    if isinstance(cache, EncoderDecoderCache):
        copied.self_attention_cache = _copy_of_cache(cache.self_attention_cache)
        copied.cross_attention_cache = _copy_of_cache(cache.cross_attention_cache)
        copied.is_updated = dict(cache.is_updated)
    else:
        copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied
