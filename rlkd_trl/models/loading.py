"""Loading models and tokenizers from a local directory or the Hub."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlkd_trl.errors import InputError

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_tokenizer(name_or_path: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; its pad token is set to EOS where it has none (as decoder-only models do).

    Raises:
        InputError: There is no such directory or Hub repository, or it holds no tokenizer.
    """
    tokenizer = _from_pretrained(AutoTokenizer, name_or_path, "tokenizer", revision=revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name_or_path: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """An encoder-decoder or decoder-only language model, whichever its config says.

    `dtype` is one of `DTYPES`; "auto" takes the checkpoint's own.

    Raises:
        InputError: There is no such directory or Hub repository, an unknown dtype, or T5 in float16, whose
            feed-forward layers overflow.
    """
    if dtype not in DTYPES:
        raise InputError(f"Unknown dtype {dtype!r}; choose one of: {', '.join(DTYPES)}.")
    config = _from_pretrained(AutoConfig, name_or_path, "model config", revision=revision)
    if dtype == "float16" and "t5" in config.model_type:
        raise InputError("T5 models overflow in float16: choose bfloat16 or float32.")
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return _from_pretrained(
        auto_class,
        name_or_path,
        "model",
        revision=revision,
        dtype=DTYPES[dtype],
        attn_implementation=attn_implementation,
    )


def require_checkpoint(flag: str, name_or_path: str) -> None:
    """Fails at once if something that can only be a local directory is not a model checkpoint.

    Raises:
        InputError: It looks like a path and is missing, or it is a directory without `config.json`.
    """
    path = Path(name_or_path)
    looks_local = path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"`{flag} {name_or_path}` is a directory without config.json, so not a model checkpoint.")
    elif looks_local or path.exists():
        raise InputError(f"`{flag} {name_or_path}` is not a directory. Give a checkpoint directory or a Hub id.")


def _from_pretrained(auto_class, name_or_path: str, what: str, **kwargs):
    require_checkpoint("model", name_or_path)
    try:
        return auto_class.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"Could not load the {what} of {name_or_path!r}: {reason}") from error
