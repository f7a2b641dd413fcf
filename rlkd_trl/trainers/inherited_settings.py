"""Every field of `transformers.TrainingArguments` either works here as documented or is refused.

Each field is in one table. Fields that only some kinds of trainers refuse are in a table for each of these kinds. A
refused field may keep its default; any other value is an error, because it would be ignored, or make the run fail
half-way.
"""

import copy
import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path

import torch
from accelerate.utils import DynamoBackend
from huggingface_hub import get_token
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, is_flytekit_available
from transformers.trainer_pt_utils import AcceleratorConfig

from rlkd_trl.errors import InputError

# These work in every trainer here as transformers documents them.
WORKS = (
    *("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("bf16", "fp16", "tf32", "use_cpu", "use_cache", "torch_empty_cache_steps", "full_determinism"),
    *("seed", "data_seed", "ignore_data_skip", "resume_from_checkpoint", "restore_callback_states_from_checkpoint"),
    *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_on_each_node"),
    *("log_level", "log_level_replica", "disable_tqdm", "skip_memory_metrics"),
    *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node"),
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    "hub_revision",
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
    *("ddp_backend", "ddp_timeout", "deepspeed"),
    "local_rank",  # deprecated: the launcher says which process this is
    *("gradient_checkpointing", "activation_checkpointing"),  # the second since transformers 5.24
    "remove_unused_columns",  # must stay False, in both configs
    *("dataloader_pin_memory", "do_train"),  # a list of texts cannot be pinned; a recipe always trains
)

REFUSED = {
    "label_smoothing_factor": "the losses here are not smoothed",
    "neftune_noise_alpha": "T5's embeddings would get no noise, and a noisy policy is not the one that sampled",
    "use_liger_kernel": "the losses here read logits, or states, that Liger's fused loss does not return",
    "liger_kernel_config": "the losses here read logits, or states, that Liger's fused loss does not return",
    "optim_target_modules": "GaLore and APOLLO, which it is for, are not supported",
    "label_names": "the names of the batch's fields are fixed",
    "length_column_name": "batches are not grouped by length",
    "parallelism_config": "tensor, context and sequence parallelism are not supported",
    "enable_jit_checkpoint": "a run that is told to end saves a checkpoint without it",
    "do_predict": "recipes do not predict; use recipes/evaluate.py",
    "bf16_full_eval": "evaluation runs in the precision of training",
    "fp16_full_eval": "evaluation runs in the precision of training",
    "prediction_loss_only": "evaluation has no loss",
    "eval_do_concat_batches": "evaluation keeps no logits",
    "eval_use_gather_object": "evaluation keeps no logits",
    "eval_accumulation_steps": "evaluation keeps no logits",
    "include_for_metrics": "evaluation has metrics of its own",
    "batch_eval_metrics": "evaluation has metrics of its own",
}

_RECOMPUTED = "layers are recomputed in one way, each of them and without entering autograd again"
_SHARDED = "FSDP gathers weights for the whole forward pass only. Use DeepSpeed, as in accelerate_configs/zero3.yaml"
_PROMPTS_ARE_TEXTS = "prompts are short texts, read by the training process itself"

# Refused by the trainers on rollouts (PPO, RLOO, REINFORCE, KD, all actions); these work in supervised training.
REFUSED_ON_ROLLOUTS = {
    "average_tokens_across_devices": "losses are always averaged over the tokens of all devices",
    "debug": "its hooks do not know the outputs of a policy",
    "activation_checkpointing_kwargs": _RECOMPUTED,
    "gradient_checkpointing_kwargs": _RECOMPUTED,
    "torch_compile": "the shapes of samples change with every batch",
    "torch_compile_backend": "the shapes of samples change with every batch",
    "torch_compile_mode": "the shapes of samples change with every batch",
    "auto_find_batch_size": "a rollout is cut into micro-batches of a fixed size",
    "include_num_input_tokens_seen": "cost.json counts the generated tokens",
    "accelerator_config": "how prompts are dealt to processes is fixed by the rollout",
    "train_sampling_strategy": "each rollout takes the next prompts of a shuffled epoch",
    "dataloader_drop_last": "prompts that do not fill a rollout are always left out",
    "dataloader_num_workers": _PROMPTS_ARE_TEXTS,
    "dataloader_persistent_workers": _PROMPTS_ARE_TEXTS,
    "dataloader_prefetch_factor": _PROMPTS_ARE_TEXTS,
    "dataloader_multiprocessing_context": _PROMPTS_ARE_TEXTS,
    "dataloader_in_order": _PROMPTS_ARE_TEXTS,
    "fsdp": _SHARDED,
    "fsdp_config": _SHARDED,
}

_NOT_EVALUATED = "supervised training does not evaluate as it goes: measure its checkpoints afterwards"

# Refused by supervised training; these work on rollouts.
REFUSED_SUPERVISED = {
    "eval_strategy": _NOT_EVALUATED,
    "eval_steps": _NOT_EVALUATED,
    "eval_delay": _NOT_EVALUATED,
    "eval_on_start": _NOT_EVALUATED,
    "per_device_eval_batch_size": _NOT_EVALUATED,
    "do_eval": _NOT_EVALUATED,
    "load_best_model_at_end": _NOT_EVALUATED,
    "metric_for_best_model": _NOT_EVALUATED,
    "greater_is_better": _NOT_EVALUATED,
}

# Refused by encoder distillation, whose losses read layers. Other fields that trainers on rollouts refuse work there.
REFUSED_ON_LAYERS = {
    "average_tokens_across_devices": "losses are always averaged over the tokens of all devices",
    "debug": "its hooks do not know what layers are read",
    "activation_checkpointing_kwargs": _RECOMPUTED,
    "gradient_checkpointing_kwargs": _RECOMPUTED,
    "torch_compile": "compiled layers have no hooks to read them by",
    "torch_compile_backend": "compiled layers have no hooks to read them by",
    "torch_compile_mode": "compiled layers have no hooks to read them by",
    "auto_find_batch_size": "the losses are averaged over batches of a fixed size",
    "include_num_input_tokens_seen": "cost.json counts steps and seconds",
    "fsdp": _SHARDED,
    "fsdp_config": _SHARDED,
}

_REFUSED_OPTIMIZERS = {
    "galore": "it needs a plain model's module names",
    "apollo": "it needs a plain model's module names",
    "lomo": "it updates weights inside of the backward pass",
    "schedule_free": "its weights would have to be exchanged for every sample and evaluation",
}


# Fields that hold a mapping, given as JSON or as a file of it.
_MAPPINGS = ("lr_scheduler_kwargs", "deepspeed", "fsdp_config", "accelerator_config", "gradient_checkpointing_kwargs")
# The package of each reporter whose package has another name.
_PACKAGES_OF_REPORTERS = {"azure_ml": "azureml-core", "dagshub": "dagshub mlflow", "flyte": "flytekit"}


def check_inherited(args: TrainingArguments, refused: dict[str, str]) -> None:
    """Raises `InputError` for a field of `TrainingArguments` that is set and would be ignored or fail.

    Call it before `TrainingArguments.__post_init__`, which fills fields in.
    """
    for option in dataclasses.fields(args):
        value = getattr(args, option.name)
        if option.name in refused and _is_set(value, option.default):
            raise InputError(f"{option.name} = {value} is not supported: {refused[option.name]}.")
    for family, reason in _REFUSED_OPTIMIZERS.items():
        if family in str(getattr(args.optim, "value", args.optim)):
            raise InputError(f"optim = {args.optim} is not supported: {reason}. adamw_torch_fused is the default.")
    _check_reporters(args.report_to)
    _check_json(args)
    _check_launch(args)
    if args.push_to_hub and args.hub_token is None and get_token() is None:
        raise InputError("push_to_hub needs an account: log in with `hf auth login`, or give hub_token.")


@contextmanager
def refusals_are_input_errors() -> Iterator[None]:
    """A context in which exceptions of transformers' own checks of settings become `InputError`s."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise InputError(str(error)) from error


def check_optimizer(args: TrainingArguments) -> None:
    """Raises `InputError` for an optimizer or schedule that cannot be made: a library or a setting is missing.

    Call it after `TrainingArguments.__post_init__`.
    """
    optimizer = _made(args, "optim", "optim_args", lambda: _optimizer(args))
    steps = max(args.max_steps, 100)
    _made(
        args,
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        lambda: get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        ),
    )


def _optimizer(args: TrainingArguments) -> torch.optim.Optimizer:
    """An optimizer like the run's, for a single weight."""
    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    without_optim_args = copy.copy(args)
    without_optim_args.optim_args = None
    if args.optim_args and settings == Trainer.get_optimizer_cls_and_kwargs(without_optim_args)[1]:
        raise InputError("it has no effect with this optimizer; leave it out.")
    return optimizer_class([torch.nn.Parameter(torch.zeros(1))], **settings)


def _made(args: TrainingArguments, name: str, settings: str, make):
    """Calls `make` and returns the result. Any exception becomes an `InputError` that names both settings."""
    try:
        return make()
    except Exception as error:
        values_set = f"{name} = {getattr(args, name).value}, {settings} = {getattr(args, settings)}"
        raise InputError(f"{values_set}: {error}") from error


def _is_set(value: object, default: object) -> bool:
    """Whether a value differs from the default, and from what `TrainingArguments` itself makes of the default."""
    if isinstance(value, AcceleratorConfig):
        return value != AcceleratorConfig()
    if default is dataclasses.MISSING:  # an empty list or dictionary
        return bool(value)
    value = getattr(value, "value", value)
    is_number = isinstance(value, Real) and not isinstance(value, bool)  # 0 is something else than None
    return value != getattr(default, "value", default) and (bool(value) or default is True or is_number)


def _check_json(args: TrainingArguments) -> None:
    """Raises `InputError` for a field that should hold a mapping and does not, and for malformed `optim_args`."""
    for name in _MAPPINGS:
        value = getattr(args, name, None)
        if not isinstance(value, str):
            continue
        is_inline = value.lstrip().startswith("{")
        if not is_inline and not Path(value).is_file():
            if value.endswith(".json"):
                raise InputError(f"{name} = {value}: there is no such file.")
            continue
        try:
            content = json.loads(value if is_inline else Path(value).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{name} = {value} is not JSON ({error}): give a mapping, or a file of one.") from error
        if not isinstance(content, dict):
            raise InputError(f'{name} = {value} holds {content!r}: a mapping is wanted, as {{"name": 1}}.')
    if args.optim_args and not all("=" in part for part in args.optim_args.split(",")):
        raise InputError(f"optim_args = {args.optim_args}: write name=value, several of them separated by commas.")


def _check_launch(args: TrainingArguments) -> None:
    """Raises `InputError` for FSDP in a single process, and for an unknown backend or mode of torch.compile."""
    if args.fsdp and os.environ.get("WORLD_SIZE", "1") == "1":
        raise InputError(
            f"fsdp = {args.fsdp} shards over several processes, and this is one: start them with accelerate launch or "
            "rlkd-trl --num_processes N, or leave it out."
        )
    for name, known in (
        ("torch_compile_backend", [backend.lower() for backend in DynamoBackend.list()]),
        ("torch_compile_mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]),
    ):
        value = getattr(args, name)
        if value is not None and value.lower() not in known:
            raise InputError(f"{name} = {value}: choose one of {', '.join(known)}.")


def _check_reporters(report_to: str | list[str] | None) -> None:
    """Raises `InputError` for an unknown reporter, or one whose package is not installed."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise InputError(f"report_to = {name}: choose none, all, or some of {', '.join(INTEGRATION_TO_CALLBACK)}.")
        is_there = is_flytekit_available() if name == "flyte" else name in get_available_reporting_integrations()
        if name == "kubeflow" and not is_there:
            raise InputError(
                "report_to = kubeflow is for jobs that Kubeflow Trainer starts, with KUBEFLOW_TRAINER_SERVER_URL in "
                "their environment: leave it out."
            )
        if not is_there:
            package = _PACKAGES_OF_REPORTERS.get(name, name)
            raise InputError(f"report_to = {name} needs a package that is not installed: pip install {package}.")
