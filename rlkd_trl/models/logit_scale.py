"""What models do to the LM head's output before it is their logits: factors, divisors and a cap, by their config."""

import torch
from torch import Tensor
from transformers import PreTrainedConfig

# Factors: Cohere, Falcon-H1, Muse. Divisors: Granite and others; HyperCLOVA X has a divisor's name for a factor.
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")


def scaled_logits(head_outputs: Tensor, config: PreTrainedConfig) -> Tensor:
    """The logits of a model with this config, from its LM head's outputs `[..., V]`."""
    factor = _factor(config)
    logits = head_outputs if factor == 1 else head_outputs * factor
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _factor(config: PreTrainedConfig) -> float:
    """The constant by which a model multiplies the LM head's output; 1 in most models."""
    factor = 1.0
    for name in _FACTORS:
        factor *= getattr(config, name, None) or 1.0
    for name in _DIVISORS:
        value = getattr(config, name, None) or 1.0
        factor = factor * value if config.model_type.startswith("hyperclovax") else factor / value
    return factor
