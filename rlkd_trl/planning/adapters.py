"""Adapters on a model without memory, as the recipes put them on a student."""

from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from rlkd_trl.errors import InputError
from rlkd_trl.models.loading import model_without_weights
from rlkd_trl.planning.skeletons import Skeleton
from rlkd_trl.students import target_modules, with_adapters

# What PEFT puts into the names of a model's own weights.
_ADDED = ("base_model.model.", "base_layer.", "original_module.")


@dataclass(frozen=True)
class Adapters:
    """What the memory of LoRA or DoRA depends on, with the recipes' names and defaults."""

    lora_r: int = 16
    lora_target_modules: list[str] | None = None
    lora_modules_to_save: list[str] | None = None
    use_dora: bool = False


def adapted(student: Skeleton, adapters: Adapters) -> Skeleton:
    """The student with these adapters, which alone are trained.

    PEFT cannot put them on fake tensors, which `nn.Module.to` does not move: they are put on a model on the meta
    device, which then gets the student's tensors.

    Raises:
        InputError: They do not fit the student.
    """
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM" if student.model.config.is_encoder_decoder else "CAUSAL_LM",
        r=adapters.lora_r,
        target_modules=target_modules(adapters.lora_target_modules),
        modules_to_save=adapters.lora_modules_to_save,
        use_dora=adapters.use_dora,
    )
    model = model_without_weights(student.model.config).to(student.model.dtype).eval()
    model.generation_config = student.model.generation_config
    try:
        wrapped = with_adapters(model, config, seed=0)
    except InputError as error:
        named = " ".join(adapters.lora_target_modules or ["(PEFT's own choice)"])
        raise InputError(f"--use_peft with --lora_target_modules {named}: {error}") from error
    _give_tensors(wrapped, student)
    return Skeleton(wrapped, student.mode)


def _give_tensors(wrapped: PeftModel, student: Skeleton) -> None:
    """Replaces weights and buffers on the meta device: the model's own by the student's, the others by new ones."""
    of_student = dict(student.model.named_parameters(remove_duplicate=False)) | dict(student.model.named_buffers())
    with student.mode:
        for prefix, module in wrapped.named_modules():
            of_module = {"recurse": False, "remove_duplicate": False}
            for name, tensor in [*module.named_parameters(**of_module), *module.named_buffers(**of_module)]:
                given = of_student.get(_own_name(f"{prefix}.{name}"))
                if given is None:
                    given = torch.empty(tensor.shape, dtype=tensor.dtype)
                    given = nn.Parameter(given) if isinstance(tensor, nn.Parameter) else given
                setattr(module, name, given.requires_grad_(tensor.requires_grad))


def _own_name(name: str) -> str:
    """The name that a weight has in the model itself."""
    for part in _ADDED:
        name = name.replace(part, "")
    return name
