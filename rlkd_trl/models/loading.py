"""Loading models and tokenizers from a local directory or the Hub, there also by "id@revision"."""

import logging
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from logging.handlers import MemoryHandler
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging

from rlkd_trl.errors import InputError, is_first_process
from rlkd_trl.models.adapters import SavedAdapters, find_adapters
from rlkd_trl.models.checkpoint_weights import check_complete, check_no_layers_left, lost_tied_weights
from rlkd_trl.models.finite import check_weights
from rlkd_trl.models.generation_config import check_generation_config, settings_not_used
from rlkd_trl.models.memory import giving_back_what_is_freed
from rlkd_trl.models.precision import (
    DTYPES,
    check_dtype,
    check_quantization,
    quantization_settings,
    refuse_t5_in_float16,
)
from rlkd_trl.models.private_apis import checkpoint_file, compute_in_the_dtype_asked_for
from rlkd_trl.models.remote_code import brings_model, may_run_code
from rlkd_trl.models.sharding import loading_shards
from rlkd_trl.settings.files import adapted_model, require_checkpoint
from rlkd_trl.settings.hub import split_revision
from rlkd_trl.settings.trusted_code import trusted_checkpoints


def load_tokenizer(name_or_path: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; its pad token is set to EOS where it has none (as decoder-only models do).

    A directory of adapters without a tokenizer has that of their model.

    Raises:
        InputError: There is no such directory or Hub repository, or it holds no tokenizer.
    """
    if (model := adapted_model(name_or_path)) and not (Path(name_or_path) / "tokenizer_config.json").is_file():
        name_or_path, revision = model, None
    tokenizer = load_part(AutoTokenizer, name_or_path, "tokenizer", revision=revision)
    if not _has_vocabulary(tokenizer, name_or_path, revision):
        raise InputError(f"{name_or_path!r} holds no tokenizer: save it there, with `tokenizer.save_pretrained`.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(name_or_path: str, *, revision: str | None = None) -> PreTrainedConfig:
    """A checkpoint's config, without its weights; of adapters their model's.

    Raises:
        InputError: There is none, or it is not a language model's that completes prompts.
    """
    adapters = find_adapters(name_or_path, revision)
    if adapters is not None:
        adapters.refuse_several()
        return load_config(adapters.model, revision=adapters.model_revision)
    config = load_part(AutoConfig, name_or_path, "model config", revision=revision)
    check_language_model(config, repr(name_or_path))
    return config


def check_language_model(config: PreTrainedConfig, what: str) -> None:
    """Raises `InputError` unless the config is an encoder-decoder's or a decoder-only language model's."""
    kind = type(config)
    mapping = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    is_encoder = (
        kind in MODEL_FOR_MASKED_LM_MAPPING
        and not config.is_encoder_decoder
        and not getattr(config, "is_decoder", False)
    )
    auto_class = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    if (kind not in mapping or is_encoder) and not brings_model(config, auto_class):
        raise InputError(
            f"{what} (model type {config.model_type!r}) is neither an encoder-decoder nor a decoder-only language "
            "model: give one of T5's, BART's, Llama's or a like kind."
        )


@contextmanager
def making_model_of(config: PreTrainedConfig) -> Iterator[None]:
    """Turns whatever a model's constructor raises about a config into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"No model can be made of the config of {config.name_or_path!r}: {_reason(error)}. Correct its "
            "config.json, or copy it again."
        ) from error


def model_without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """A language model of this config on the meta device. Raises `InputError`."""
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"), making_model_of(config):
        return auto_class.from_config(config, trust_remote_code=may_run_code(config.name_or_path))


def load_model(
    name_or_path: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    quantization: str = "none",
    zero3: dict | None = None,
) -> PreTrainedModel | PeftModel:
    """An encoder-decoder or decoder-only language model, whichever its config says; of adapters, with its adapters.

    `dtype` is one of `DTYPES`; "auto" takes the checkpoint's own. `quantization` is one of `QUANTIZATIONS`: the
    weights of linear layers inside the blocks are quantised while loading; the LM head, embeddings, norms and, in T5,
    the output layers of the feed-forward blocks stay in `dtype`. `zero3` is a DeepSpeed config of stage 3: each
    process then holds only its shard of every weight, already while the checkpoint is read.

    Raises:
        InputError: There is no such directory or Hub repository, an unknown dtype or quantisation, a missing library,
            T5 in float16, whose feed-forward layers overflow, a weight that is not in the checkpoint or is NaN or
            infinite, or a generation config that cannot be used; adapters that do not fit, or that are to be sharded.
    """
    check_dtype(dtype)
    check_quantization(quantization)
    adapters = find_adapters(name_or_path, revision)
    if adapters is not None:
        if zero3 is not None:
            refuse_sharded_adapters(name_or_path, revision=revision)
        adapters.refuse_several()
        base = load_model(adapters.model, revision=adapters.model_revision, dtype=dtype, quantization=quantization)
        return _with_saved_adapters(base, adapters)
    config = load_config(name_or_path, revision=revision)
    refuse_t5_in_float16(config, config.dtype if dtype == "auto" else DTYPES[dtype])
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    memory = nullcontext() if quantization == "none" else giving_back_what_is_freed()
    with loading_shards(zero3), memory:
        model, info = load_part(
            auto_class,
            name_or_path,
            "model",
            revision=revision,
            dtype=DTYPES[dtype],
            output_loading_info=True,
            **quantization_settings(quantization, config.dtype if dtype == "auto" else DTYPES[dtype]),
        )
    missing = {*info["missing_keys"], *lost_tied_weights(model, name_or_path, revision)}
    untied = {name for name in missing if model.all_tied_weights_keys.get(name) not in missing}
    check_complete(untied, f"The model {name_or_path!r}")
    check_no_layers_left(model, info["unexpected_keys"], f"The model {name_or_path!r}")
    check_weights(model, f"The model {name_or_path!r}")
    check_generation_config(model, checkpoint_file(name_or_path, GENERATION_CONFIG_NAME, revision), name_or_path)
    refuse_t5_in_float16(config, model.dtype)  # "auto" takes the weights' dtype where the config names none
    not_used = settings_not_used(model.generation_config) if model.can_generate() else {}
    if not_used and is_first_process():
        settings = ", ".join(f"{name} = {str(value)[:40]}" for name, value in not_used.items())
        print(f"{name_or_path}: of its generation config, not used: {settings}.", flush=True)
    compute_in_the_dtype_asked_for(model)
    return model


def _with_saved_adapters(base: PreTrainedModel, adapters: SavedAdapters) -> PeftModel:
    """The model with the adapters on it, and with the generation config that was saved with them, if one was."""
    model = adapters.placed_on(base)
    check_weights(model, f"The model {adapters.name_or_path!r}")
    file = checkpoint_file(adapters.name_or_path, GENERATION_CONFIG_NAME, adapters.revision)
    if file is not None:
        base.generation_config = load_part(
            GenerationConfig, adapters.name_or_path, "generation config", revision=adapters.revision
        )
        check_generation_config(base, file, adapters.name_or_path)
    return model


def refuse_sharded_adapters(name_or_path: str, *, revision: str | None) -> None:
    """Raises `InputError` if the checkpoint consists of adapters, whose model cannot be sharded while it is loaded."""
    if find_adapters(name_or_path, revision) is not None:
        raise InputError(
            f"{name_or_path!r} are adapters, and ZeRO-3 shards whole checkpoints only: merge them into their model "
            "first, with PEFT's merge_and_unload."
        )


def default_device() -> torch.device:
    """This process's accelerator where there is one, or the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def _has_vocabulary(tokenizer: PreTrainedTokenizerBase, name_or_path: str, revision: str | None) -> bool:
    """Whether the tokenizer was read from files; without any, transformers 5 invents one of a few tokens."""
    vocabulary_files = type(tokenizer).vocab_files_names.values()
    if not vocabulary_files:  # its tokens are bytes or characters, as ByT5's
        return True
    return any(
        checkpoint_file(name_or_path, name, revision) is not None
        for name in dict.fromkeys(("tokenizer.json", *vocabulary_files, "tokenizer.model", "tekken.json"))
    )


def load_part(
    auto_class,
    name_or_path: str,
    part: str,
    *,
    revision: str | None = None,
    quietly: bool = False,
    **kwargs,
):
    """`auto_class.from_pretrained`.

    part: what is loaded, for the message. quietly: whether what transformers says of it is not shown.

    Raises:
        InputError: For whatever fails.
    """
    require_checkpoint("model", name_or_path)
    try:
        # Never left open: at a terminal transformers would ask.
        repository, revision = split_revision(name_or_path, revision)
        may_run = may_run_code(repository, revision)
        with _quietly_unless_loaded(shows_logs=not quietly):
            return auto_class.from_pretrained(repository, revision=revision, trust_remote_code=may_run, **kwargs)
    except InputError:
        raise
    except Exception as error:  # a damaged file can make any of the libraries raise anything
        is_local = Path(name_or_path).is_dir()
        hint = "" if is_local else " (no directory here, so taken for a Hub id)"
        may_be_damaged = is_local and "trust_remote_code" not in str(error)
        remedy = " If the files are damaged, copy or download them again." if may_be_damaged else ""
        raise InputError(f"Could not load the {part} of {name_or_path!r}{hint}: {_reason(error)}{remedy}") from error


def _reason(error: Exception) -> str:
    """Why loading failed, in one line. All lines of the error count: the second often says what to do."""
    text = str(error)
    if "trust_remote_code" in text and trusted_checkpoints():
        return (
            "its architecture is Python code that comes with the checkpoint, and --trust_remote_code is for "
            "checkpoints that flags name: merge adapters into such a model, and name the result."
        )
    if "trust_remote_code" in text:
        return (
            "its architecture is Python code that comes with the checkpoint. Read it, and give --trust_remote_code if "
            "you want it to run; or use a checkpoint of an architecture that transformers has."
        )
    if "weights_only" in text or "Weights only load failed" in text:
        return (
            "its weights are a pickle that holds more than tensors, and could run code. Save it again with "
            "`save_pretrained`, as safetensors."
        )
    if "ignore_mismatched_sizes" in text:
        return "its weights have other shapes than its config.json says. Copy or save the two together again."
    explains_itself = isinstance(error, OSError | ValueError | ImportError) and text
    return textwrap.shorten(text if explains_itself else f"{type(error).__name__}: {text}", 500)


@contextmanager
def _quietly_unless_loaded(*, shows_logs: bool = True) -> Iterator[None]:
    """Holds back what transformers logs and warns about a checkpoint until it is loaded, or for good.

    If loading fails, the user sees our one message only. Progress bars are shown on a terminal only.
    """
    logger, held = logging.getLogger("transformers"), MemoryHandler(capacity=10**6, flushLevel=logging.CRITICAL + 1)
    handlers, shows_bars = logger.handlers[:], transformers_logging.is_progress_bar_enabled()
    logger.handlers = [held]
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(record=True) as warned:
            yield
    finally:
        logger.handlers = handlers
        if shows_bars:
            transformers_logging.enable_progress_bar()
    for record in held.buffer if shows_logs else ():
        logger.handle(record)
    for warning in warned:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
