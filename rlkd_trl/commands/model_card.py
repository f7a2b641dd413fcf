"""What a run's model card says beside its results: templates, settings, curves, papers."""

import json
from dataclasses import MISSING, fields
from fnmatch import filter as matching
from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.commands.arguments import PromptArguments
from rlkd_trl.commands.launched import say
from rlkd_trl.commands.settings import SupervisedSettings
from rlkd_trl.prompts import PromptTemplates

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from rlkd_trl.models.chat import PromptWriter

_USUAL = (
    *("learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_steps", "num_train_epochs", "seed"),
)
# Groups that say where a run is, not what it is; and flags of others that do.
_LEFT_OUT_GROUPS = ("RunArguments", "CodeArguments")
_LEFT_OUT = ("use_cpu", "teacher_server", "teacher_api_key_env", "teacher_offload_path", "teacher_cache")
# Of the trainer's settings, as patterns.
_WHERE_AND_HOW_OFTEN = (
    *("output_dir", "run_name", "project", "trackio_*", "report_to", "disable_tqdm", "debug", "skip_memory_metrics"),
    *("log_*", "logging_*", "num_completions_to_print", "include_for_metrics", "do_*"),
    *("eval_*", "per_device_eval_batch_size", "batch_eval_metrics", "*_full_eval"),
    *("save_*", "push_to_hub", "hub_*", "resume_from_checkpoint", "restore_callback_states_from_checkpoint"),
    *("dataloader_num_workers", "dataloader_p*", "ddp_timeout", "local_rank"),
)
_OF_LOSSES = {
    "embedding_mse": "TinyBERT",
    "hidden_mse": "TinyBERT",
    "attention_mse": "TinyBERT",
    "cls_mse": "PKD",
    "cosine": "DistilBERT",
    "attention_kl": "MiniLM",
    "value_relation_kl": "MiniLM",
    "query_relation_kl": "MiniLMv2",
    "key_relation_kl": "MiniLMv2",
}


def card_sections(trainer: "Trainer", settings: object, templates: PromptTemplates | None = None) -> list[str]:
    """The sections, each a text in Markdown; writes the picture of curves if the run is to be pushed.

    templates: those that were used, as their files may have changed since.
    """
    from rlkd_trl.evaluation.card_sections import (
        citations_section,
        curves_section,
        settings_section,
        templates_section,
    )

    sections = []
    is_asked = isinstance(getattr(settings, "prompts", None), PromptArguments)
    if is_asked and (templates or getattr(getattr(settings, "teacher", None), "teacher", None)):
        sections.append(templates_section({template.name: template.jinja for template in templates or ()}))
    sections.append(settings_section(chosen_settings(settings)))
    if trainer.args.push_to_hub and _write_curves(trainer):
        sections.append(curves_section())
    if papers := papers_of(settings):
        sections.append(citations_section(papers))
    return sections


def place_on_hub(trainer: "Trainer") -> str | None:
    """The Hub id to which a student goes; None if it stays here."""
    return trainer.hub_model_id if trainer.args.push_to_hub else None


def write_supervised_card(
    trainer: "Trainer", settings: SupervisedSettings, templates: PromptTemplates | None, writer: "PromptWriter"
) -> None:
    """The model card of a model that was trained on targets; templates and writer: what wrote its prompts."""
    from peft import PeftModel

    from rlkd_trl.evaluation.report import write_model_card
    from rlkd_trl.models.vocabulary import allowed_special_tokens

    logged = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    is_encoder_decoder = trainer.model.config.is_encoder_decoder
    output_dir = Path(trainer.args.output_dir)
    write_model_card(
        output_dir / "README.md",
        title=output_dir.name,
        results={"trained": {"train_loss": logged[-1]}} if logged else {},
        columns=(("train_loss", "mean loss per token in training", ".4f"),),
        method="maximum likelihood of targets (supervised training)",
        teacher=None,
        student=settings.student.student or "a new model",
        dataset=settings.data.dataset or "the embedded demo of rlkd_trl",
        auto_class="AutoModelForSeq2SeqLM" if is_encoder_decoder else "AutoModelForCausalLM",
        has_content_tokens=bool(allowed_special_tokens(trainer.model)),
        has_adapters=isinstance(trainer.model, PeftModel),
        chat=writer.chat if writer.is_chat else None,
        sections=card_sections(trainer, settings, templates),
        checkpoint=place_on_hub(trainer),
    )


def chosen_settings(settings: object) -> dict[str, object]:
    """The flags that are not at their defaults and change what is learnt, and those that every run has."""
    chosen = {}
    for name, group in vars(settings).items():
        if type(group).__name__ in _LEFT_OUT_GROUPS:
            continue
        values = _of_trainer(group) if name == "args" else vars(group)
        for option in fields(group):
            if option.name not in values or option.name in _LEFT_OUT:
                continue
            value = values[option.name]
            if option.name in _USUAL or not _is_default(value, option):
                chosen[option.name] = value
    chosen.pop("num_train_epochs" if settings.args.max_steps > 0 else "max_steps", None)
    return chosen | {"processes": settings.args.world_size}


def _of_trainer(args: "TrainingArguments") -> dict[str, object]:
    """The trainer's settings in JSON's types, without those that say where and how often things are written."""
    from transformers.trainer_pt_utils import AcceleratorConfig

    values = json.loads(json.dumps(args.to_dict(), default=str))
    if not args.fsdp:
        del values["fsdp_config"]  # which the trainer's settings fill with defaults, as the next
    if args.accelerator_config == AcceleratorConfig():
        del values["accelerator_config"]
    left_out = {name for pattern in _WHERE_AND_HOW_OFTEN for name in matching(values, pattern)}
    return {name: value for name, value in values.items() if name not in left_out}


def _is_default(value: object, option) -> bool:
    default = option.default_factory() if option.default_factory is not MISSING else option.default
    return value == getattr(default, "value", default) or (not value and not default)


def papers_of(settings: object) -> list[str]:
    """The papers of a run's method, and those of the teacher-forcing reward by which students are measured."""
    args = settings.args
    papers = {
        "PPOKDConfig": ["PPO", "GAE"],
        "RLOOKDConfig": ["RLOO"],
        "ReinforceKDConfig": [],
        "KDConfig": ["distillation", "sequences"],
        "AllActionsKDConfig": ["MiniLLM"],
        "SupervisedConfig": [],
        "EncoderKDConfig": ["distillation"],
    }[type(args).__name__]
    papers = [*papers, *_of_choices(settings, args)]
    if type(args).__name__ not in ("SupervisedConfig", "EncoderKDConfig"):
        papers = ["teacher forcing", "LLMR", *papers]
    return list(dict.fromkeys(papers))


def _of_choices(settings: object, args: "TrainingArguments") -> list[str]:
    """Those of what the settings choose within the method."""
    papers = []
    if getattr(settings.data, "target_column", None) == "pseudo_label":
        papers.append("sequences")
    if getattr(getattr(settings, "reward", None), "k", 1) > 1:
        papers.append("KETCHUP")
    divergence = getattr(args, "divergence", "")
    if divergence == "jsd" or getattr(args, "lmbda", 0) > 0:
        papers.append("GKD")
    if divergence in ("tvd", "jsd", "reverse_kl"):
        papers.append("f-distill")
    if divergence.startswith("skew"):
        papers.append("DistiLLM")
    panel = getattr(settings, "panel", None)
    if getattr(panel, "teacher_weighting", "fixed") == "per_example" and getattr(panel, "more_teachers", True):
        papers.append("MT-BERT")
    for losses in getattr(args, "losses", []):
        papers += [paper for loss, paper in _OF_LOSSES.items() if loss in losses]
    return papers


def _write_curves(trainer: "Trainer") -> bool:
    """Writes the picture beside the card; says why not, where matplotlib is missing or there is nothing to draw."""
    from rlkd_trl.evaluation.card_sections import CURVES_FILE
    from rlkd_trl.evaluation.figures import write_overview

    try:
        return write_overview(Path(trainer.args.output_dir) / CURVES_FILE, trainer.state.log_history)
    except ImportError:
        say("The model card has no curves: they need matplotlib, pip install 'rlkd_trl[figures]'.")
        return False
