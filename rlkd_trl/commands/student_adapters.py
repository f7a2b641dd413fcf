"""The adapters on a student that a command's flags describe: checked before a model is loaded, then made."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.commands.arguments import (
    AdapterArguments,
    EncoderPanelArguments,
    EncoderStudentArguments,
    StudentArguments,
)
from rlkd_trl.commands.checks import refuse_unused
from rlkd_trl.commands.launched import say
from rlkd_trl.errors import InputError
from rlkd_trl.settings.hub import split_revision

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel, TrainingArguments

_OF_LORA = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save"),
    *("use_rslora", "use_dora"),
)
_DROPOUT = 0.05  # TRL's default


def check_adapters(adapters: AdapterArguments, student: StudentArguments, *, has_dropout: bool) -> None:
    """Checks the flags for adapters, and whether they fit the student that is named.

    has_dropout: whether the recipe trains with dropout.

    Raises:
        InputError: Flags without an effect, adapters on adapters, or adapters that do not fit; a quantised student
            without adapters.
    """
    is_adapters = check_adapter_flags(adapters, student.student, student.student_revision)
    if student.quantization != "none":
        _check_quantised(adapters, student, is_adapters=is_adapters)
    if adapters.lora_dropout and not has_dropout:
        raise InputError(
            f"--lora_dropout {adapters.lora_dropout} has no effect here: what is sampled is learnt from without "
            "dropout. Leave it out."
        )
    if adapters.use_peft and student.student is not None:
        _check_fit(adapters, student)


def check_adapter_flags(adapters: AdapterArguments, student: str | None, revision: str | None) -> bool:
    """Checks the flags for adapters by themselves; whether the student consists of adapters. Raises `InputError`."""
    from rlkd_trl.models.adapters import find_adapters

    refuse_unused(adapters, *_OF_LORA, unless=adapters.use_peft, needs="--use_peft")
    is_adapters = student is not None and find_adapters(student, revision) is not None
    has_adapters = adapters.use_peft or is_adapters
    refuse_unused(adapters, "merge_adapters", unless=has_adapters, needs="--use_peft, or adapters as --student")
    if adapters.use_peft and is_adapters:
        raise InputError(
            f"--use_peft makes new adapters, and --student {student} are adapters already, which are trained further "
            "without it: leave it out; or merge them into their model first (--merge_adapters when they are trained, "
            "or PEFT's merge_and_unload)."
        )
    _refuse_sharded_merge(adapters)
    return is_adapters


def check_encoder_adapters(
    adapters: AdapterArguments, student: EncoderStudentArguments, panel: EncoderPanelArguments, stages: Sequence[str]
) -> None:
    """Checks the flags for adapters in encoder distillation.

    Saved alone, adapters can be used again only if their model is a checkpoint, and the head is saved with them, as
    PEFT does for classifiers.

    Raises:
        InputError: Flags without an effect, adapters that could not be used again, or adapters on several encoders.
    """
    from rlkd_trl.models.adapters import find_adapters

    refuse_unused(adapters, *_OF_LORA, "merge_adapters", unless=adapters.use_peft, needs="--use_peft")
    if not adapters.use_peft:
        return
    _refuse_sharded_merge(adapters)
    if panel.train_along:
        raise InputError("--use_peft goes with one encoder, and --train_along names others: leave out one of them.")
    if student.student is not None and find_adapters(student.student, student.student_revision) is not None:
        raise InputError(
            f"--use_peft makes new adapters, and --student {student.student} are adapters already: leave it out, and "
            "all weights of the merged model are trained; or merge them with PEFT's merge_and_unload first."
        )
    if not adapters.merge_adapters and (student.student is None or [*stages] != ["task"]):
        raise InputError(
            "--use_peft saves adapters alone, which can be used again only for one task stage of a --student that is "
            "a checkpoint: give --merge_adapters, which saves whole students."
        )


def check_pushed_adapters(
    adapters: AdapterArguments, student: StudentArguments | EncoderStudentArguments, args: "TrainingArguments"
) -> None:
    """Raises `InputError` if adapters are to be sent to the Hub whose model is only here: they would load nowhere."""
    from rlkd_trl.models.adapters import find_adapters

    if not args.push_to_hub or adapters.merge_adapters or student.student is None:
        return
    saved = find_adapters(student.student, student.student_revision)
    model = student.student if saved is None else saved.model
    if (adapters.use_peft or saved is not None) and Path(model).is_dir():
        raise InputError(
            f"push_to_hub would send adapters for {model}, a directory on this machine, so that they load nowhere "
            "else: give --merge_adapters, which sends a whole student; or send that model too, and train adapters on "
            "it by its Hub id."
        )


def _refuse_sharded_merge(adapters: AdapterArguments) -> None:
    from transformers.integrations import is_deepspeed_zero3_enabled

    if adapters.merge_adapters and is_deepspeed_zero3_enabled():
        raise InputError(
            "--merge_adapters needs whole weights, and ZeRO-3 shards them: leave it out, and merge the saved adapters "
            "with PEFT's merge_and_unload; or use ZeRO stage 2."
        )


def _check_quantised(adapters: AdapterArguments, student: StudentArguments, *, is_adapters: bool) -> None:
    from transformers.integrations import is_deepspeed_zero3_enabled

    from rlkd_trl.models.precision import check_quantization

    flag = student.quantization_flag
    if not (adapters.use_peft or is_adapters):
        raise InputError(f"{flag}: quantised weights are not trained, only adapters on them: give --use_peft.")
    check_quantization(student.quantization)
    if adapters.merge_adapters:
        raise InputError(
            f"--merge_adapters would round the adapters away in weights of {flag}: leave it out, and merge the saved "
            "adapters into the whole model with PEFT's merge_and_unload."
        )
    if is_deepspeed_zero3_enabled():
        raise InputError(f"{flag}: ZeRO-3 cannot shard quantised weights: use ZeRO stage 2, or leave it out.")


def _check_fit(adapters: AdapterArguments, student: StudentArguments) -> None:
    from rlkd_trl.models.loading import load_config, model_without_weights

    config = load_config(student.student, revision=student.student_revision)
    check_fit(adapters, model_without_weights(config), lora_config(adapters, _task_of(config.is_encoder_decoder)))


def check_fit(adapters: AdapterArguments, skeleton: "PreTrainedModel", config: "PeftConfig") -> None:
    """Raises `InputError` if the adapters do not fit a model, of which the weights may be missing."""
    from rlkd_trl.students import with_adapters

    try:
        with_adapters(skeleton, config, seed=0)
    except InputError as error:
        modules = " ".join(adapters.lora_target_modules or ["(PEFT's own choice)"])
        raise InputError(
            f"--use_peft with --lora_target_modules {modules}: {error}. Its linear layers are called: "
            f"{', '.join(_linear_layers(skeleton))}; all-linear takes all but the head."
        ) from error


def _linear_layers(model: "nn.Module") -> list[str]:
    from torch import nn

    names = [name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return list(dict.fromkeys(names))


def student_adapters(
    adapters: AdapterArguments, student: StudentArguments, model: "PreTrainedModel", *, has_dropout: bool = False
) -> "PeftConfig | None":
    """The config of the new adapters on the loaded student; None if none are asked for. Raises `InputError`."""
    if not adapters.use_peft:
        return None
    config = lora_config(adapters, _task_of(model.config.is_encoder_decoder), has_dropout=has_dropout)
    _, config.revision = split_revision(student.student, student.student_revision)  # as PEFT calls the model's
    return config


def lora_config(adapters: AdapterArguments, task: str | None, *, has_dropout: bool = False) -> "PeftConfig":
    """LoRA (Hu et al. 2021) or DoRA (Liu et al. 2024) as the flags describe it; task: PEFT's word for the head."""
    from peft import LoraConfig

    from rlkd_trl.students import target_modules

    dropout = _DROPOUT if adapters.lora_dropout is None else adapters.lora_dropout
    return LoraConfig(
        task_type=task,
        r=adapters.lora_r,
        lora_alpha=adapters.lora_alpha,
        lora_dropout=dropout if has_dropout else 0.0,
        target_modules=target_modules(adapters.lora_target_modules),
        modules_to_save=adapters.lora_modules_to_save,
        use_rslora=adapters.use_rslora,
        use_dora=adapters.use_dora,
    )


def _task_of(is_encoder_decoder: bool) -> str:
    return "SEQ_2_SEQ_LM" if is_encoder_decoder else "CAUSAL_LM"


def encoder_adapters(adapters: AdapterArguments, head: str) -> "PeftConfig | None":
    """The same for an encoder with one of `models.encoders.HEADS`; a classifier's head is trained and saved too."""
    if not adapters.use_peft:
        return None
    return lora_config(adapters, "SEQ_CLS" if head == "classes" else None, has_dropout=True)


def report_adapters(adapters: AdapterArguments, model: "nn.Module") -> None:
    """Prints how many of a student's weights are trained, if not all. Raises `InputError` as `merged` later would."""
    from peft import PeftModel

    from rlkd_trl.models.adapters import refuse_tied_adapters

    if not isinstance(model, PeftModel):
        return
    if adapters.merge_adapters:
        refuse_tied_adapters(model)
    trained, whole = model.get_nb_trainable_parameters()
    say(f"Adapters: {trained:,} of {whole:,} weights are trained ({trained / whole:.2%}).")
