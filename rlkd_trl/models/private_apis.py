"""Every private attribute or function of another library that this room uses, each behind one function.

The libraries have no public way to do these things. `tests/models/test_private_apis.py` names the versions with which
they were seen to work, and fails with the name of what a newer version lacks.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as deepspeed_integration
from transformers.utils import cached_file

from rlkd_trl.settings.hub import HUB_ID, split_revision


def attention_name(model: PreTrainedModel) -> str:
    """Which of transformers' attention functions the model calls, e.g. "sdpa" or "eager"."""
    return model.config._attn_implementation


@contextmanager
def with_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Within it the model calls the attention function that is registered as `name`.

    The public `set_attn_implementation` looks for the name on the Hub, and through all submodules, in every call.
    """
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


@contextmanager
def with_attention_of_configs(configs: Sequence[PreTrainedConfig], name: str) -> Iterator[None]:
    """The same for a model whose parts have configs of their own, as T5's encoder and decoder do."""
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, its_own in zip(configs, before, strict=True):
            config._attn_implementation = its_own


def own_eager_attention(module: nn.Module) -> Callable:
    """The eager attention of an attention module's architecture, which stands in the file of its class."""
    return sys.modules[type(module).__module__].eager_attention_forward


@contextmanager
def without_deepspeed_settings() -> Iterator[None]:
    """Within it `from_pretrained` does not know of the DeepSpeed settings of the run, which it shards models by.

    transformers looks them up in a weak reference of its own, and has a public function to forget them, but none to
    ask for them.
    """
    before = deepspeed_integration._hf_deepspeed_config_weak_ref
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed_integration._hf_deepspeed_config_weak_ref = before


@contextmanager
def tying_weights_by(around: Callable[[Callable], Callable]) -> Iterator[None]:
    """Within it every model's `tie_weights` is replaced by `around(tie_weights)`.

    It is replaced on the class, because `from_pretrained` makes the model and ties its weights in one call.
    """
    tie_weights = PreTrainedModel.tie_weights
    PreTrainedModel.tie_weights = around(tie_weights)
    try:
        yield
    finally:
        PreTrainedModel.tie_weights = tie_weights


def checkpoint_file(name_or_path: str, name: str, revision: str | None) -> str | None:
    """The path of a checkpoint's file, downloaded if necessary; None if there is none, or the Hub is unreachable."""
    repository, revision = split_revision(name_or_path, revision)
    if not Path(repository).is_dir() and not HUB_ID.fullmatch(repository):
        return None  # a path of nothing, for which the Hub's library has an error of its own
    return cached_file(
        repository,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def modules_kept_in_float32(model: PreTrainedModel) -> set[str]:
    """Names of modules that transformers neither quantises nor loads in float16."""
    return set(model._keep_in_fp32_modules or ())


def execution_device(model: nn.Module) -> torch.device | None:
    """The device to which Accelerate's hooks bring offloaded weights during a call; None without hooks."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((torch.device(device) for device in devices if device is not None), None)


def is_zero3_parameter(parameter: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 has split the parameter into shards."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter, also where this process holds only a shard of it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def own_shard(parameter: Tensor) -> Tensor | None:
    """This process's shard of a ZeRO-3 parameter; None for any other parameter."""
    return getattr(parameter, "ds_tensor", None)


def without_compiled_communication() -> None:
    """Keeps DeepSpeed from compiling, for about a minute at its start, a reduction that sharding does not use."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def quantisation_scales(weight: Tensor) -> Iterator[Tensor]:
    """The scales that bitsandbytes keeps beside a quantised weight: int8's per row; nf4's per block, and those of
    the scales themselves where these are quantised too."""
    if getattr(weight, "SCB", None) is not None:
        yield weight.SCB
    state = getattr(weight, "quant_state", None)
    while state is not None:
        parts = (getattr(state, name, None) for name in ("absmax", "code", "offset"))
        yield from (part for part in parts if isinstance(part, Tensor))
        state = getattr(state, "state2", None)


def scales_of_layers(model: nn.Module) -> Iterator[Tensor]:
    """The scales that bitsandbytes' int8 layers take over from their weights when they are first used."""
    scales = (getattr(getattr(module, "state", None), "SCB", None) for module in model.modules())
    return (scale for scale in scales if scale is not None)


def compute_in_the_dtype_asked_for(model: nn.Module) -> None:
    """Keeps bitsandbytes' 4-bit layers from using their kernel for CPUs with AVX512-BF16.

    That kernel computes in bfloat16, whatever dtype was asked for, and only shapes that are multiples of 32.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
