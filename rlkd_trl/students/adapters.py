"""Adapters (LoRA and its relatives) on a student."""

import warnings

from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, set_seed

from rlkd_trl.errors import InputError

_OF_A_REGEX = set("*+?()[]|^$\\")


def with_adapters(
    model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, *, seed: int
) -> PreTrainedModel | PeftModel:
    """The student with new adapters, initialised from `seed`; without a config, the student as it is.

    Raises:
        InputError: The student has adapters already; the config is none, or does not fit the model; or it describes
            virtual tokens in the prompt, which are not supported.
    """
    if not isinstance(peft_config, PeftConfig | None):
        raise InputError(
            f"peft_config is of the type {type(peft_config).__name__}: give a configuration of PEFT, such as "
            "LoraConfig(r=16)."
        )
    config = model.active_peft_config if isinstance(model, PeftModel) else peft_config
    if config is not None and config.is_prompt_learning:
        raise InputError(f"{config.peft_type.value} is not supported: give adapters of weights, such as LoraConfig.")
    if peft_config is None:
        return model
    if isinstance(model, PeftModel):
        raise InputError("The student has adapters already: leave peft_config out, or give the model without them.")
    names = [name for name, _ in model.named_modules()]
    for wanted in peft_config.modules_to_save or ():
        if not any(f".{name}".endswith(f".{wanted}") for name in names):
            raise InputError(
                f"peft_config does not fit the student: modules_to_save {wanted!r} is none of its modules."
            )
    set_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about a name that PEFT uses
            return get_peft_model(model, peft_config)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"peft_config does not fit the student: {error}") from error


def target_modules(names: list[str] | None) -> list[str] | str | None:
    """The `target_modules` of a PEFT config for the names on a command line.

    PEFT reads a list as ends of modules' names, and a single text as a regular expression, or as "all-linear".
    """
    if names is None or len(names) > 1:
        return names
    return names[0] if names[0] == "all-linear" or _OF_A_REGEX & set(names[0]) else names


def start_as_identity(peft_config: PeftConfig) -> bool:
    """Whether new adapters change nothing at first, and the model without them stays what it was.

    The first depends on how they are initialised. The second does not hold with `bias`, where PEFT also trains biases
    of the model itself.
    """
    is_identity = getattr(peft_config, "init_lora_weights", None) in (True, "gaussian")
    return is_identity and getattr(peft_config, "bias", "none") == "none"
