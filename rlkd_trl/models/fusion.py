"""Parts of transformers' models in fewer passes over memory, with the same result up to rounding.

They have the parameters and the config that they had: checkpoints are what they were.
"""

from functools import partial

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, NewGELUActivation

from rlkd_trl.ops.rms_norm import rms_norm

# By name: importing the classes would import every model. Each computes `rms_norm`; others scale by 1 + weight.
_RMS_NORMS = {"T5LayerNorm", "MT5LayerNorm", "UMT5LayerNorm", "LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"}


def fuse(model: nn.Module) -> None:
    """Exchanges, in place, what is slow in training on a CPU and in float32.

    `gelu_new` of T5 v1.1, T0, Flan-T5 and GPT-2 becomes transformers' fused `gelu_pytorch_tanh`, the same function
    (Hendrycks & Gimpel 2016, the tanh approximation): one pass instead of eight. Root mean square norms become
    `rms_norm` where all is float32, and stay as they are elsewhere.
    """
    for module in list(model.modules()):
        is_norm = type(module).__name__ in _RMS_NORMS and type(module).__module__.startswith("transformers.")
        if is_norm and "forward" not in vars(module):  # else it is somebody's, e.g. of a hook that loads the weight
            module.forward = partial(_norm_forward, module)
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, GELUTanh())


def _norm_forward(module: nn.Module, hidden_states: Tensor) -> Tensor:
    is_float32 = hidden_states.dtype == module.weight.dtype == torch.float32
    if is_float32 and not torch.is_autocast_enabled(hidden_states.device.type):
        return rms_norm(hidden_states, module.weight, module.variance_epsilon)
    return type(module).forward(module, hidden_states)
