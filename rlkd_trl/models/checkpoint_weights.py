"""Whether a checkpoint has all weights that its model needs, and no others."""

import json
import re
from collections.abc import Collection
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from rlkd_trl.errors import InputError
from rlkd_trl.models.private_apis import checkpoint_file
from rlkd_trl.settings.hub import split_revision

_SHOWN = 3  # names in a message


def check_complete(missing: Collection[str], model_name: str) -> None:
    """Raises `InputError`, with the names of weights that a checkpoint lacks: they would be random numbers."""
    if missing:
        names = ", ".join(sorted(missing)[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise InputError(
            f"{model_name} is incomplete: {len(missing)} of its weights are not in the checkpoint ({names}), and "
            "would be random numbers. Copy or download it again."
        )


def check_no_layers_left(model: nn.Module, unexpected: Collection[str], model_name: str) -> None:
    """Raises `InputError` if a checkpoint has weights of more layers than the model was made with.

    unexpected: the names of the checkpoint's weights that the model has no place for.
    """
    for name in sorted(unexpected):
        for number in re.finditer(r"\.(\d+)\.", name):
            layers = dict(model.named_modules()).get(name[: number.start()])
            if isinstance(layers, nn.ModuleList) and int(number[1]) >= len(layers):
                raise InputError(
                    f"{model_name} has weights of more layers than its config.json names ({name}, and "
                    f"{name[: number.start()]} has {len(layers)} layers): the two are of different models. Copy or "
                    "download it again."
                )


def lost_tied_weights(model: PreTrainedModel, name_or_path: str, revision: str | None) -> set[str]:
    """The name of an LM head or embedding that transformers ties to the other, but whose own weight is lost; or none.

    transformers 5 ties head and embeddings of every T5: where one of them is missing it silently takes the other. That
    is right for a checkpoint of tied weights, which holds the embeddings only. But a checkpoint that holds a weight
    for the head, as T0's do, must also have embeddings; and one whose config says that the two are not tied, as
    transformers 4 wrote it for T0, must also have a head.
    """
    names = weight_names(name_or_path, revision)
    head, tied = "lm_head.weight", model.all_tied_weights_keys
    if not names or head not in tied:
        return set()
    if head not in names:
        repository, revision = split_revision(name_or_path, revision)
        as_written, _ = PreTrainedConfig.get_config_dict(repository, revision=revision)
        return {head} if as_written.get("tie_word_embeddings") is False else set()
    group = {tied[head], *(name for name, source in tied.items() if source == tied[head])} - {head}
    # A checkpoint of the model without its head names the weights without this prefix.
    without_prefix = {name.removeprefix(f"{model.base_model_prefix}.") for name in group}
    return set() if names & (group | without_prefix) else {tied[head]}


def weight_names(name_or_path: str, revision: str | None) -> set[str]:
    """Names of the weights in a checkpoint's safetensors; none where it has other files."""
    index = checkpoint_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, revision)
    if index is not None:
        return set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
    file = checkpoint_file(name_or_path, SAFE_WEIGHTS_NAME, revision)
    if file is None:
        return set()
    with safe_open(file, framework="pt") as weights:
        return set(weights.keys())
