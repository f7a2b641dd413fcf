"""The record of what a training run consists of, so that a run is not continued from the checkpoint of another."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from fnmatch import filter as matching
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

from rlkd_trl.data.streams import RowStream, known_rows
from rlkd_trl.errors import InputError
from rlkd_trl.models.chat import PromptWriter
from rlkd_trl.rewards import RewardModel

RUN_RECORD = "run.json"
# Settings that may differ in a resumed run: where and how much is logged, measured and saved, and how long the run
# takes. All others change what is learnt.
_MAY_CHANGE = (
    *("output_dir", "run_name", "project", "trackio_*", "report_to", "disable_tqdm", "debug", "skip_memory_metrics"),
    *(
        "log_*",
        "logging_*",
        "num_completions_to_print",
        "eval_*",
        "per_device_eval_batch_size",
        "do_*",
        "metric_for_*",
    ),
    *("include_for_metrics", "greater_is_better", "load_best_model_at_end", "batch_eval_metrics", "*_full_eval"),
    *("save_*", "push_to_hub", "hub_*", "resume_from_checkpoint", "restore_callback_states_from_checkpoint"),
    *("max_steps", "num_train_epochs", "max_generated_tokens", "max_cpu_seconds"),
    *("dataloader_*", "ddp_timeout", "local_rank"),
    *("gradient_checkpointing*", "activation_checkpointing*"),  # what has run out of memory goes on with them
)
# Of a PEFT config: names of places and versions, and what says how it is used.
_NOT_OF_ADAPTERS = ("base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping")
_ROWS_AT_A_TIME = 1000
_NUMBERS_PER_WEIGHT = 4096
_DIFFERENCES_SHOWN = 3
# Mean difference in nats with which a served teacher's numbers, which vary with what else it computes, are the same.
_SAME_PROBE = 0.1
_SAME_WEIGHT = 1e-4  # relative difference of a teacher's weight


def settings_of(args: TrainingArguments) -> dict[str, object]:
    """The settings that must be the same in a resumed run, in JSON's types."""
    settings = json.loads(json.dumps(args.to_dict(), default=str))
    may_change = {name for pattern in _MAY_CHANGE for name in matching(settings, pattern)}
    return {name: value for name, value in settings.items() if name not in may_change}


def rows_digest(dataset: Dataset | RowStream) -> str:
    """A digest of the rows' whole content, in their order; of a stream: its first rows, and its order's settings."""
    digest = hashlib.sha256()
    if isinstance(dataset, RowStream):
        digest.update(str(dataset.order).encode())
    for rows in known_rows(dataset).iter(_ROWS_AT_A_TIME):
        digest.update(json.dumps(rows, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def model_record(model: nn.Module) -> dict[str, str]:
    """A model's class, and a digest of the names and shapes of its weights and of some evenly spaced numbers in them.

    Some numbers are enough, as training changes them all, and all would take seconds per billion. Shards of ZeRO-3 and
    weights that Accelerate has offloaded count as empty.
    """
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        flat = weight.new_empty(0, device="cpu") if weight.is_meta else weight.detach().flatten()
        some = flat[:: max(1, len(flat) // _NUMBERS_PER_WEIGHT)].cpu().contiguous().view(torch.uint8)
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} ".encode() + some.numpy().tobytes())
    return {"architecture": type(model).__name__, "weights": digest.hexdigest()[:16]}


def student_record(model: nn.Module, writer: PromptWriter) -> dict[str, object]:
    """A student's class, its adapters, if it has any, and how its prompts are written, if through a chat template."""
    chat = writer.record()
    return {**architecture_record(model), **({} if chat is None else {"chat": chat})}


def architecture_record(model: nn.Module) -> dict[str, object]:
    """A student's class, and the settings of its adapters, if it has any."""
    record = {"architecture": type(model).__name__}
    if isinstance(model, PeftModel):
        settings = model.active_peft_config.to_dict()
        record["adapters"] = {
            name: sorted(value) if isinstance(value, set) else value
            for name, value in settings.items()
            if value and name not in _NOT_OF_ADAPTERS
        }
    return record


def reward_record(reward_model: RewardModel, rows: Dataset) -> dict[str, object]:
    """A reward's terms with their weights and settings; its teachers, and their questions about the first row.

    How they are weighed stands there unless it is equally.
    """
    scorers = [scorer for panel in reward_model.panels for scorer in panel.scorers]
    teachers = list({id(scorer.teacher): scorer.teacher for scorer in scorers}.values())
    weightings = [record for panel in reward_model.panels if (record := panel.record())]
    return {
        "terms": {name: [weight, _plain_settings(term)] for name, (term, weight) in reward_model.terms.items()},
        "teachers": [
            teacher.record() if teacher.model is None else model_record(teacher.model) for teacher in teachers
        ],
        "questions": [panel.questions(rows[0]) for panel in reward_model.panels],
        **({"weightings": weightings} if weightings else {}),
    }


def _plain_settings(term: Callable) -> dict[str, object]:
    plain = (str, int, float, bool)
    return {name: value for name, value in getattr(term, "__dict__", {}).items() if isinstance(value, plain)}


def check_same_run(checkpoint: Path, record: dict[str, object]) -> None:
    """Raises `InputError` if the checkpoint's record differs in a part that `record` has; the message says in what."""
    saved = json.loads((checkpoint / RUN_RECORD).read_text(encoding="utf-8"))
    now = json.loads(json.dumps(record))
    differences = [difference for part in now for difference in _differences(saved.get(part), now[part], part)]
    if differences:
        more = f" (and {len(differences) - _DIFFERENCES_SHOWN} more)" if len(differences) > _DIFFERENCES_SHOWN else ""
        raise InputError(
            f"{checkpoint} is of another run: {'; '.join(differences[:_DIFFERENCES_SHOWN])}{more}. Continue it with "
            "what it was begun with, or begin anew in another output_dir."
        )


def _differences(saved: object, now: object, name: str) -> Iterator[str]:
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in {**saved, **now}:
            yield from _differences(saved.get(key), now.get(key), f"{name}.{key}")
    elif name == "reward.teachers" and isinstance(saved, list) and len(saved) == len(now):
        for number, (one, other) in enumerate(zip(saved, now, strict=True), 1):
            if not _is_same_teacher(one, other):
                yield f"teacher {number} was {json.dumps(one)} and is {json.dumps(other)}"
    elif name == "reward.weightings" and _is_same_weighting(saved, now):
        return
    elif saved != now:
        yield f"{name} was {json.dumps(saved)} and is {json.dumps(now)}"


def _is_same_weighting(saved: object, now: object) -> bool:
    """Whether two records of how panels weigh their scorers are the same but for rounding.

    Weights by validation losses are measured anew when a run is resumed, maybe on another kind of processor.
    """
    if not isinstance(saved, list) or not isinstance(now, list) or len(saved) != len(now):
        return False
    for one, other in zip(saved, now, strict=True):
        weights = one.get("weights", []), other.get("weights", [])
        if {**one, "weights": None} != {**other, "weights": None} or len(weights[0]) != len(weights[1]):
            return False
        if not all(math.isclose(*pair, rel_tol=_SAME_WEIGHT) for pair in zip(*weights, strict=True)):
            return False
    return True


def _is_same_teacher(saved: dict[str, object], now: dict[str, object]) -> bool:
    """Whether two records of `reward_record` are of one teacher; a served one's probe may differ a little."""
    probes = [record.get("probe") or [] for record in (saved, now)]
    rest = [{name: value for name, value in record.items() if name != "probe"} for record in (saved, now)]
    if rest[0] != rest[1] or len(probes[0]) != len(probes[1]):
        return False
    known = [(one, other) for one, other in zip(*probes, strict=True) if one is not None and other is not None]
    return sum(abs(one - other) for one, other in known) <= _SAME_PROBE * len(known)
