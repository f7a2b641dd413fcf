"""Makes a smaller encoder of the teacher's architecture, with some of the teacher's layers or with random weights."""

import copy
import re
from collections.abc import Mapping, Sequence

from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, set_seed

from rlkd_trl.errors import InputError
from rlkd_trl.ops.layer_maps import FORMS, layer_pairs

# A new student's size -> the names that configs have for it.
SIZES = {
    "num_layers": ("num_hidden_layers",),
    "hidden_size": ("hidden_size",),
    "num_heads": ("num_attention_heads",),
    "intermediate_size": ("intermediate_size", "hidden_dim", "d_ff", "encoder_ffn_dim", "ffn_dim", "n_inner"),
}
# Of these the sizes that a decoder beside an encoder may have apart.
DECODER_SIZES = {
    "num_layers": ("num_decoder_layers", "decoder_layers"),
    "num_heads": ("decoder_attention_heads",),
    "intermediate_size": ("decoder_ffn_dim",),
}
RANDOM = "random"


def smaller_config(
    teacher: PreTrainedConfig, sizes: Mapping[str, int | None], *, decoder_sizes: Mapping[str, int] | None = None
) -> PreTrainedConfig:
    """The teacher's config with other sizes.

    sizes: by the names of `SIZES`; None keeps the teacher's. decoder_sizes: by those of `DECODER_SIZES`, of a
    decoder beside an encoder; by default the encoder's.

    Raises:
        InputError: The architecture has no such size; the width is not divisible by the number of heads.
    """
    config = copy.deepcopy(teacher)
    for size, value in sizes.items():
        if value is None:
            continue
        name = next((name for name in SIZES[size] if getattr(config, name, None) is not None), None)
        if name is None:
            raise InputError(f"{size} {value}: a {config.model_type} model has no such size; leave it out.")
        setattr(config, name, value)
        for name in DECODER_SIZES.get(size, ()):
            if config.is_encoder_decoder and getattr(config, name, None) is not None:
                setattr(config, name, (decoder_sizes or {}).get(size, value))
        if size == "num_layers" and getattr(teacher, "layer_types", None) is not None:
            kinds = teacher.layer_types
            config.layer_types = [kinds[i % len(kinds)] for i in range(value)]
    if getattr(config, "pooler_hidden_size", None) is not None:
        config.pooler_hidden_size = config.hidden_size
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"hidden_size {config.hidden_size} of the new student is not divisible by num_heads "
            f"{config.num_attention_heads}."
        )
    _fit_heads(config, teacher)
    return config


def _fit_heads(config: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    """Sets a head's width, where it is the teacher's width over heads, and the number of heads of keys and values.

    T5's heads have a width of their own, which stays. Grouped keys and values have as many heads as the teacher's, or
    the next smaller number that divides the queries'.
    """
    if getattr(config, "head_dim", None) == teacher.hidden_size // teacher.num_attention_heads:
        config.head_dim = config.hidden_size // config.num_attention_heads
    groups = getattr(teacher, "num_key_value_heads", None)
    if groups is not None:
        heads = config.num_attention_heads
        most = heads if groups == teacher.num_attention_heads else groups
        config.num_key_value_heads = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= most)


def check_init(init: str, student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    """Raises `InputError` if a new student cannot begin with these layers; `init` as in `smaller_student`."""
    if init == RANDOM:
        return
    try:
        layer_pairs(init, student.num_hidden_layers, teacher.num_hidden_layers)
    except ValueError as error:
        raise InputError(f"init = {init}: {error}; or {RANDOM}. (Forms: {FORMS}.)") from error
    for size, names in SIZES.items():
        for name in names:
            ours, theirs = getattr(student, name, None), getattr(teacher, name, None)
            if size != "num_layers" and ours != theirs:
                raise InputError(
                    f"init = {init}: layers of the teacher fit a student of its sizes only, and {size} is {ours}, the "
                    f"teacher's {theirs}: set init to {RANDOM}."
                )


def smaller_student(
    teacher: PreTrainedModel | PeftModel, sizes: Mapping[str, int | None], *, init: str = "uniform", seed: int = 0
) -> PreTrainedModel:
    """A new model of the teacher's class, with its kind of head, in other sizes.

    Args:
        sizes: As in `smaller_config`.
        init: A layer map (see `ops.layer_maps`), which says the teacher's layers that are copied; the embeddings and
            the head are copied as well, and layers that the map leaves out are random. Or "random" for all weights.
        seed: Of the random weights.

    Raises:
        InputError: As `smaller_config` and `check_init`.
    """
    if isinstance(teacher, PeftModel):
        teacher = copy.deepcopy(teacher).merge_and_unload()
    config = smaller_config(teacher.config, sizes)
    check_init(init, config, teacher.config)
    set_seed(seed)
    student = type(teacher)(config)
    if init != RANDOM:
        pairs = layer_pairs(init, config.num_hidden_layers, teacher.config.num_hidden_layers)
        copy_layers(student, teacher, pairs)
    return student.to(dtype=teacher.dtype)


def copy_layers(student: nn.Module, teacher: nn.Module, pairs: Sequence[tuple[int, int]]) -> None:
    """Copies the teacher's weights to the student: layers by pairs, counted from 1, and all weights outside of layers.

    pairs: (student's layer, teacher's layer).
    """
    source_of = {m - 1: n - 1 for m, n in pairs}
    weights = teacher.state_dict()
    copied = {}
    for name in student.state_dict():
        layer = _LAYER.search(name)
        if layer is None:
            source = name
        elif int(layer["number"]) in source_of:
            number = source_of[int(layer["number"])]
            source = f"{name[: layer.start('number')]}{number}{name[layer.end('number') :]}"
        else:
            continue
        if source in weights:
            copied[name] = weights[source]
    student.load_state_dict(copied, strict=False)


# The number of a layer in a weight's name. ALBERT's layers share groups of weights, which are copied as they are.
_LAYER = re.compile(r"(?:^|\.)(?:layer|layers|block|h)\.(?P<number>\d+)\.")
