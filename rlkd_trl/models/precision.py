"""In which numbers a model is held: dtypes, quantisation, and what an architecture cannot be computed in."""

import importlib.util
import logging

import torch
from transformers import (
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from rlkd_trl.errors import InputError

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


# int8: LLM.int8 (Dettmers et al. 2022). nf4: 4-bit NormalFloat (Dettmers et al. 2023, "QLoRA").
QUANTIZATIONS = ("none", "int8", "nf4")


def check_dtype(dtype: str) -> None:
    """Raises `InputError` for a name that is not in `DTYPES`."""
    if dtype not in DTYPES:
        raise InputError(f"Unknown dtype {dtype!r}; choose one of: {', '.join(DTYPES)}.")


def check_quantization(quantization: str) -> None:
    """Raises `InputError` for a name that is not in `QUANTIZATIONS`, or without the library for it."""
    if quantization not in QUANTIZATIONS:
        raise InputError(f"Unknown quantisation {quantization!r}; choose one of: {', '.join(QUANTIZATIONS)}.")
    if quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"Quantisation {quantization!r} needs bitsandbytes: pip install 'rlkd_trl[quantization]'.")


def quantization_settings(quantization: str, dtype: torch.dtype | None) -> dict[str, BitsAndBytesConfig]:
    """Arguments of `from_pretrained`; `dtype` is the one that quantised layers compute in."""
    if quantization == "none":
        return {}
    if quantization == "int8":
        # Otherwise it logs a line at every matrix product.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    compute_dtype = torch.float32 if dtype is None else dtype
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype
        )
    }


def computes_in_float32(model: PreTrainedModel) -> bool:
    """Whether weights and products of the model are in float32 where this is called, not in 16 bits or TF32."""
    if model.dtype != torch.float32 or getattr(model, "is_quantized", False):
        return False
    kind = model.device.type
    products = torch.backends.cuda.matmul if kind == "cuda" else torch.backends.mkldnn.matmul
    return not torch.is_autocast_enabled(kind) and products.fp32_precision in ("none", "ieee")


def check_precision(config: PreTrainedConfig, dtype: str, *, fp16: bool = False) -> None:
    """Raises `InputError` as `refuse_t5_in_float16`, for a name of a dtype, and with `fp16` as `check_fp16`."""
    refuse_t5_in_float16(config, config.dtype if dtype == "auto" else DTYPES[dtype])
    if fp16:
        check_fp16(config, on_cpu=not torch.accelerator.is_available())


def check_fp16(config: PreTrainedConfig, *, on_cpu: bool) -> None:
    """Raises `InputError` where a student cannot be trained in mixed precision with float16: T5, and on a CPU."""
    refuse_t5_in_float16(config, torch.float16)
    if on_cpu:
        raise InputError(
            "fp16 would have no effect on a CPU, where training goes on in float32: leave it out, or use bf16."
        )


def refuse_t5_in_float16(config: PreTrainedConfig, dtype: torch.dtype | None) -> None:
    """Raises `InputError` for a T5 in float16, whose feed-forward layers would overflow."""
    if dtype == torch.float16 and "t5" in config.model_type:
        raise InputError("T5 models overflow in float16: choose bfloat16 or float32.")
