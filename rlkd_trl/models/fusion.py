"""Replacements for parts of transformers' models: faster norms and GELUs, and experts that treat each row by itself.

The models stay as they are: a part is replaced for the length of a call only, and parameters, config and checkpoints
are untouched.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import NewGELUActivation

from rlkd_trl.ops.rms_norm import rms_norm

# By name: importing the classes would import every model. Each computes `rms_norm`; others scale by 1 + weight.
_RMS_NORMS = {"T5LayerNorm", "MT5LayerNorm", "UMT5LayerNorm", "LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"}
_NO_LIMIT = 2**62


class FusedParts:
    """A model's parts that have a replacement, in use inside `with fused.in_place():`.

    `gelu_new` of T5 v1.1, T0, Flan-T5 and GPT-2 becomes torch's fused tanh approximation, the same function (Hendrycks
    & Gimpel 2016) in one pass over memory instead of eight. Root mean square norms become `rms_norm` where input and
    weight are float32. The experts of Switch Transformers lose their capacity limit, which drops tokens depending on
    the rest of the batch: a completion's scores would depend on its neighbours, and training would drop tokens that
    sampling had kept.
    """

    def __init__(self, model: nn.Module):
        self._forwards: list[tuple[nn.Module, Callable]] = []
        self._routers: list[nn.Module] = []
        for module in model.modules():
            if type(module).__name__ in _RMS_NORMS and type(module).__module__.startswith("transformers."):
                self._forwards.append((module, partial(_norm_forward, module)))
            elif type(module) is NewGELUActivation:
                self._forwards.append((module, partial(F.gelu, approximate="tanh")))
            if hasattr(module, "expert_capacity"):
                self._routers.append(module)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the replacements compute. A part whose `forward` was replaced already, e.g. by a hook, is kept."""
        exchanged = [(module, forward) for module, forward in self._forwards if "forward" not in vars(module)]
        capacities = [router.expert_capacity for router in self._routers]
        for module, forward in exchanged:
            vars(module)["forward"] = forward
        for router in self._routers:
            router.expert_capacity = _NO_LIMIT
        try:
            yield
        finally:
            for module, _ in exchanged:
                del vars(module)["forward"]
            for router, capacity in zip(self._routers, capacities, strict=True):
                router.expert_capacity = capacity


def _norm_forward(module: nn.Module, hidden_states: Tensor) -> Tensor:
    is_float32 = hidden_states.dtype == module.weight.dtype == torch.float32
    if is_float32 and not torch.is_autocast_enabled(hidden_states.device.type):
        return rms_norm(hidden_states, module.weight, module.variance_epsilon)
    return type(module).forward(module, hidden_states)
