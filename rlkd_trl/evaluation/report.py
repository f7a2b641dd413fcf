"""Writes a run's results for people: `metrics.json`, a table for the terminal, `report.html`, a model card.

Everywhere here, `results` holds each model's metrics: `{"student before": {"bleu": 12.3, ...}, "teacher": {...}}`.
"""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlkd_trl.errors import InputError
from rlkd_trl.evaluation.files import write_json, write_text
from rlkd_trl.evaluation.page import render_page
from rlkd_trl.evaluation.run_log import RunLog
from rlkd_trl.evaluation.tables import markdown_table, number, plain_table
from rlkd_trl.prompts import ChatFormat
from rlkd_trl.settings.hub import WITH_OWNER, split_revision

Results = dict[str, dict[str, float]]
Column = tuple[str, str, str]  # a metric's name, the column's heading, the format of its numbers

DEFAULT_COLUMNS: tuple[Column, ...] = (
    ("bleu", "BLEU", ".2f"),
    ("rougeL", "ROUGE-L", ".2f"),
    ("teacher_nll_per_token", "teacher NLL/token", ".4f"),
    ("reward", "mean reward", ".4f"),
    ("length_words", "length (words)", ".1f"),
    ("distinct2", "distinct-2", ".3f"),
)
# Shown only if a model has them.
EXTRA_COLUMNS: tuple[Column, ...] = (
    ("ibleu", "iBLEU", ".2f"),
    ("length_ratio", "length ratio", ".2f"),
    ("teacher_nll_per_sequence", "teacher NLL/sequence", ".2f"),
    ("student_nll_of_teacher_per_token", "NLL of teacher's/token", ".4f"),
)
ENCODER_COLUMNS: tuple[Column, ...] = (
    ("accuracy", "accuracy, %", ".2f"),
    ("f1", "F1, %", ".2f"),
    ("pearson", "Pearson", ".4f"),
    ("spearman", "Spearman", ".4f"),
    ("ensemble_accuracy", "accuracy of the encoders together, %", ".2f"),
    ("ensemble_pearson", "Pearson of the encoders together", ".4f"),
    ("agreement", "agreement with the teacher", ".4g"),
    ("similarity_spearman", "similarities, Spearman", ".4f"),
    ("hidden_cosine", "hidden cosine", ".4f"),
    ("parameters", "parameters", ",.0f"),
)
WRITING_CLASSES = ("AutoModelForSeq2SeqLM", "AutoModelForCausalLM")
READING_CLASSES = (
    "AutoModelForSequenceClassification",
    "AutoModelForMaskedLM",
    "AutoModelForPreTraining",
    "AutoModel",
)
AUTO_CLASSES = WRITING_CLASSES + READING_CLASSES


def write_metrics(path: str | Path, metrics: dict[str, Any]) -> None:
    """Write `metrics` (nested dicts and lists are fine) as JSON, at full precision.

    JSON has no NaN or infinity: they become null. The file is replaced whole or not at all.
    Raises TypeError where a value is no number, string, bool, None, dict or list.
    """
    write_json(path, metrics)


def comparison_table(results: Results, columns: Sequence[Column] = DEFAULT_COLUMNS) -> str:
    """Plain-text table, one line per model, for the terminal. A missing, null or NaN value is shown as "–"."""
    heads, *rows = _cells(results, columns)
    return plain_table(heads, rows)


def all_columns(results: Results) -> tuple[Column, ...]:
    """`DEFAULT_COLUMNS`, and those of `EXTRA_COLUMNS` that any of the models has."""
    return DEFAULT_COLUMNS + columns_in(results, EXTRA_COLUMNS)


def columns_in(results: Results, columns: Sequence[Column]) -> tuple[Column, ...]:
    """Those of the columns that any of the models has."""
    return tuple(column for column in columns if any(column[0] in row for row in results.values()))


def write_report(path: str | Path, logs: Mapping[str, RunLog], *, title: str | None = None) -> None:
    """Write one HTML file that needs no network: results, curves, completions and configuration of runs.

    logs: each run's log by the run's name. title: by default that of the first run. All text is escaped: completions
    are shown, never interpreted.
    """
    write_text(path, render_page(title or next(iter(logs.values())).title, logs))


def write_model_card(
    path: str | Path,
    *,
    title: str,
    results: Results,
    method: str,
    teacher: str | None,
    student: str,
    dataset: str,
    auto_class: str = "AutoModelForSeq2SeqLM",
    has_content_tokens: bool = False,
    has_adapters: bool = False,
    chat: ChatFormat | None = None,
    columns: Sequence[Column] = DEFAULT_COLUMNS,
    sections: Sequence[str] = (),
    checkpoint: str | None = None,
) -> None:
    """Write the README.md of a checkpoint: metadata for the Hub, the results, how to load it and let it write.

    method: a short noun phrase, e.g. "PPO on the teacher-forcing reward". teacher: None if targets taught.
    has_content_tokens: whether special tokens are part of the model's texts, so that the example must keep them when
    it decodes. has_adapters: whether the checkpoint consists of adapters, which PEFT loads. chat: how prompts were put
    into the chat template of the model's tokenizer, if they were. sections: more of the text, in Markdown (see
    `card_sections`). checkpoint: the Hub id that the model will have. The metadata name `base_model` and `datasets` if
    these are Hub ids ("owner/name", also with "@revision"), not if they are local paths; they name no license, which
    only the author can choose.

    Raises InputError: `auto_class` is none of `AUTO_CLASSES`.
    """
    if auto_class not in AUTO_CLASSES:
        raise InputError(f"auto_class {auto_class!r} is unknown; use one of: {', '.join(AUTO_CLASSES)}.")
    metadata: dict[str, Any] = {"library_name": "peft" if has_adapters else "transformers"}
    if _is_hub_id(base_model := split_revision(student)[0]):
        metadata["base_model"] = base_model
    if _is_hub_id(data := split_revision(dataset)[0]):
        metadata["datasets"] = [data]
    metadata["tags"] = ["rlkd_trl", "knowledge-distillation", "generated_from_trainer"]

    heads, *rows = [[_one_line(cell) for cell in row] for row in _cells(results, columns)]
    # A decoder-only model's output begins with the prompt.
    new = "" if auto_class == "AutoModelForSeq2SeqLM" else ', inputs["input_ids"].shape[1]:'
    skip, writes = not has_content_tokens, auto_class in WRITING_CLASSES
    imports, settings = f"from transformers import AutoTokenizer, {auto_class}", "**inputs"
    if has_adapters:
        auto_class = auto_class.replace("Auto", "AutoPeft")
        imports = f"from peft import {auto_class}\nfrom transformers import AutoTokenizer"
        if writes:  # PEFT does not read the generation config
            imports += ", GenerationConfig"
            settings += ", generation_config=GenerationConfig.from_pretrained(checkpoint)"
    loading = (
        f"{imports}\n\n"
        f'checkpoint = "{checkpoint or "path/or/hub-id/of/this-model"}"\n'
        "tokenizer = AutoTokenizer.from_pretrained(checkpoint)\n"
        f"model = {auto_class}.from_pretrained(checkpoint)\n\n"
        f"inputs = {_example_inputs(chat)}\n"
    )
    if writes:
        loading += (
            f"output_ids = model.generate({settings})  # greedy, up to the length it was trained for\n"
            f"print(tokenizer.decode(output_ids[0{new}], skip_special_tokens={skip}))"
        )
    else:
        loading += "outputs = model(**inputs)"
    sections = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---",
        f"# {_one_line(title)}",
        f"{_code(student)}, {_taught(teacher)} {_code(dataset)}.\n\n"
        f"Method: {_one_line(method)}. Trained with `rlkd_trl`.",
        f"## Results\n\n{markdown_table(heads, rows)}",
        f"## How to use\n\n```python\n{loading}\n```",
        *sections,
    ]
    write_text(path, "\n\n".join(sections) + "\n")


def _taught(teacher: str | None) -> str:
    return "trained on the targets of" if teacher is None else f"distilled from the teacher {_code(teacher)} on"


def _example_inputs(chat: ChatFormat | None) -> str:
    """Code that tokenises a prompt as it was in training."""
    if chat is None:
        return 'tokenizer("the source text", return_tensors="pt")'
    messages = [{"role": "user", "content": "the source text"}]
    if chat.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": chat.system_prompt})
    lines = [f"    {messages!r},", "    add_generation_prompt=True,", '    return_tensors="pt",']
    if chat.template_kwargs:
        lines.append(f"    **{dict(chat.template_kwargs)!r},")
    # Of backticks, which would end the block of code, only the text's own are here: inside of quotes.
    return "tokenizer.apply_chat_template(\n" + "\n".join(lines).replace("`", "\\x60") + "\n)"


def _cells(results: Results, columns: Sequence[Column]) -> list[list[str]]:
    """The results as text: the headings, then one row per model."""

    rows = [["model", *(heading for _, heading, _ in columns)]]
    for name, row in results.items():
        rows.append([name, *(number(row.get(key), number_format) for key, _, number_format in columns)])
    return rows


# --- Markdown


def _one_line(text: str) -> str:
    """The text on one line, and escaped so that it cannot open an HTML tag."""
    return html.escape(" ".join(text.split()), quote=False)


def _code(text: str) -> str:
    """A Markdown code span, delimited by more backticks than the text has in a row, so that it cannot end the span."""
    text = " ".join(text.split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    padding = " " if "`" in text else ""
    return f"{ticks}{padding}{text}{padding}{ticks}"


def _is_hub_id(name: str) -> bool:
    return WITH_OWNER.fullmatch(name) is not None and not Path(name).exists()
