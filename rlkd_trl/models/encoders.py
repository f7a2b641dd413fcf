"""Encoders with the head that a stage of distillation needs: none, masked language modelling, classes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_PRETRAINING_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from rlkd_trl.errors import InputError, is_first_process
from rlkd_trl.models.adapters import SavedAdapters, find_adapters
from rlkd_trl.models.checkpoint_weights import check_complete, check_no_layers_left, weight_names
from rlkd_trl.models.finite import check_weights
from rlkd_trl.models.layer_tensors import LayerReader
from rlkd_trl.models.loading import load_part, making_model_of
from rlkd_trl.models.precision import DTYPES, check_dtype
from rlkd_trl.models.sharding import loading_shards


@dataclass(frozen=True)
class Head:
    """A kind of head. name: in words. classes: transformers' mapping from config classes to model classes."""

    name: str
    classes: Callable[[PreTrainedConfig], object]


def _masked_language_model(config: PreTrainedConfig):
    """transformers' mapping to models that predict masked tokens, or for other than encoders the next token."""
    if config.is_encoder_decoder:
        return MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    return MODEL_FOR_MASKED_LM_MAPPING if is_encoder(config) else MODEL_FOR_CAUSAL_LM_MAPPING


HEADS = {
    "none": Head("no head", lambda config: MODEL_MAPPING),
    # None, but other models than encoders keep their language-modelling head, since a later recipe trains it.
    "kept": Head("no head", lambda config: MODEL_MAPPING if is_encoder(config) else _masked_language_model(config)),
    "tokens": Head("a language-modelling head", _masked_language_model),
    "tokens and next sentence": Head("a next-sentence head", lambda config: MODEL_FOR_PRETRAINING_MAPPING),
    "classes": Head("a classification head", lambda config: MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
}


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether the config is of a model like BERT, which attends in both directions and predicts masked tokens."""
    in_mapping = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    return in_mapping and not config.is_encoder_decoder and not getattr(config, "is_decoder", False)


def load_encoder_config(name_or_path: str, *, revision: str | None = None) -> PreTrainedConfig:
    """A checkpoint's config, of adapters their model's. Raises `InputError` if there is none, or of no known model."""
    adapters = find_adapters(name_or_path, revision)
    if adapters is None:
        return load_part(AutoConfig, name_or_path, "model config", revision=revision)
    config = load_part(AutoConfig, adapters.model, "model config", revision=adapters.model_revision)
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        _count_labels(config, adapters)
    return config


def _count_labels(config: PreTrainedConfig, adapters: SavedAdapters) -> None:
    """Sets the number of labels to that of the adapters' own head: their model may have been made for another task."""
    shapes = adapters.shapes()
    with torch.device("meta"), making_model_of(config):
        model = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)](config)
    for name, parameter in model.named_parameters():
        if name in shapes and not _is_of_body(name, model) and shapes[name] != tuple(parameter.shape):
            config.num_labels = shapes[name][0]


def model_class(config: PreTrainedConfig, head: str, who: str) -> type[PreTrainedModel]:
    """The class of a model with one of `HEADS`. who: "The teacher", "The student".

    Raises:
        InputError: The architecture has none.
    """
    mapping = HEADS[head].classes(config)
    if type(config) not in mapping:
        raise InputError(
            f"{who} (model type {config.model_type!r}) is of an architecture for which transformers has no model with "
            f"{HEADS[head].name}: choose one of BERT's, RoBERTa's, DistilBERT's or a like kind."
        )
    classes = mapping[type(config)]
    return classes[0] if isinstance(classes, tuple) else classes


def load_encoder(
    name_or_path: str,
    head: str,
    who: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    may_be_new: bool = False,
    num_labels: int | None = None,
    label_names: dict[int, str] | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A checkpoint's model with one of `HEADS`.

    head: one of `HEADS`. who: "The teacher" or "The student", for messages. may_be_new: whether a missing head is
    added, with random weights of the seed. num_labels, label_names: for a classification head; None for the
    checkpoint's.

    A checkpoint of adapters is their model with the adapters merged into it.

    Raises:
        InputError: The checkpoint cannot be loaded, lacks weights, or has weights that are not finite.
    """
    check_dtype(dtype)
    adapters = find_adapters(name_or_path, revision)
    source, shown = (name_or_path, revision), f"{who} {name_or_path!r}"
    if adapters is not None:
        source, shown = (adapters.model, adapters.model_revision), f"{shown} with {adapters.model!r}"
    config = load_encoder_config(name_or_path, revision=revision)
    kind = model_class(config, head, who)
    if num_labels is not None:
        config.num_labels = num_labels
        if label_names is not None:
            config.id2label = label_names
            config.label2id = {name: index for index, name in label_names.items()}
    set_seed(seed)
    with loading_shards(None):
        model, info = load_part(
            kind,
            source[0],
            "model",
            revision=source[1],
            config=config,
            dtype=DTYPES[dtype],
            output_loading_info=True,
            quietly=True,  # missing weights are checked below
            ignore_mismatched_sizes=(may_be_new and num_labels is not None) or adapters is not None,
        )
    for name, *shapes in info["mismatched_keys"]:  # of a head for another number of labels they may be others
        if _is_of_body(name, model):
            raise InputError(
                f"{shown}: its weights have other shapes than its config.json says ({name} is {tuple(shapes[0])}, and "
                f"should be {tuple(shapes[1])}). Copy or save the two together again."
            )
    missing = {name for name in info["missing_keys"] if head == "classes" or not _is_pooler(name)}
    if adapters is not None:
        missing -= adapters.shapes().keys()
        model = adapters.merged_into(model)
    of_head = {name for name in missing if may_be_new and (not _is_of_body(name, model) or _is_pooler(name))}
    check_complete(missing - of_head, shown)
    check_no_layers_left(model, info["unexpected_keys"], shown)
    check_weights(model, shown)
    if of_head and is_first_process():
        print(f"{who}'s head is new: {', '.join(sorted(of_head))}.", flush=True)
    return model


def check_has_head(name_or_path: str, head: str, who: str, remedy: str, *, revision: str | None = None) -> None:
    """Raises `InputError` if the checkpoint lacks weights of the head. Only the names of weights are read.

    A checkpoint in other files than safetensors is not checked, since its names are not known before it is loaded.
    """
    config = load_encoder_config(name_or_path, revision=revision)
    adapters = find_adapters(name_or_path, revision)
    if adapters is not None:
        names = weight_names(adapters.model, adapters.model_revision) | adapters.shapes().keys()
    else:
        names = weight_names(name_or_path, revision)
    if not names:
        return
    with torch.device("meta"):
        model = model_class(config, head, who)(config)
    of_head = {name for name, _ in model.named_parameters() if not _is_of_body(name, model)}
    wanted = of_head - set(model.all_tied_weights_keys)
    if missing := sorted(wanted - names):
        raise InputError(f"{who} {name_or_path!r} has not {HEADS[head].name} ({missing[0]} is missing): {remedy}")


def know_padding(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tells a config without a pad token the tokenizer's: a decoder-only model classifies by the last other token."""
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id


def skeleton(config: PreTrainedConfig, head: str, who: str) -> LayerReader:
    """The layers of a model of this config on the meta device, without weights. Raises `InputError`."""
    with torch.device("meta"), making_model_of(config):
        return LayerReader(model_class(config, head, who)(config))


def _is_of_body(name: str, model: PreTrainedModel) -> bool:
    return name.startswith(f"{model.base_model_prefix}.") or model.base_model is model


def _is_pooler(name: str) -> bool:
    """Whether a weight is the pooler's, which checkpoints of language models lack and only classifiers read."""
    return "pooler." in name
