"""Writes a run's results for people: `metrics.json`, a table for the terminal, `report.html`, a model card.

Everywhere here, `results` holds each model's metrics: `{"student before": {"bleu": 12.3, ...}, "teacher": {...}}`.
"""

import html
import json
import math
import os
import re
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import yaml

from rlkd_trl.errors import InputError
from rlkd_trl.evaluation.tables import MISSING, markdown_table, number, plain_table
from rlkd_trl.prompts import ChatFormat

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
    ("agreement", "agreement with the teacher", ".4g"),
    ("similarity_spearman", "similarities, Spearman", ".4f"),
    ("hidden_cosine", "hidden cosine", ".4f"),
    ("parameters", "parameters", ",.0f"),
)
NOT_CHARTED = ("step", "epoch")
NOT_CHARTED_SUFFIXES = ("_runtime", "_per_second")  # speeds of the machine, which transformers logs
WRITING_CLASSES = ("AutoModelForSeq2SeqLM", "AutoModelForCausalLM")
READING_CLASSES = (
    "AutoModelForSequenceClassification",
    "AutoModelForMaskedLM",
    "AutoModelForPreTraining",
    "AutoModel",
)
AUTO_CLASSES = WRITING_CLASSES + READING_CLASSES

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --rule: #d9dee6; --page: #fff; --line: #1f5fd0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --soft: #9aa5b4; --rule: #343d4a; --page: #14181e; --line: #7fb0ff; }
}
body { margin: 2rem auto; padding: 0 1rem; max-width: 72rem; background: var(--page); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .4rem .8rem; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; }
.results td, .results thead th + th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.samples td { min-width: 6rem; max-width: 28rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1rem; }
.chart text { fill: var(--soft); font-size: 11px; } .chart .name { fill: var(--ink); font-size: 13px; }
.chart polyline { fill: none; stroke: var(--line); stroke-width: 1.5; } .chart circle { fill: var(--line); }
.chart .grid { stroke: var(--rule); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; } .note { color: var(--soft); }
"""


def write_metrics(path: str | Path, metrics: dict[str, Any]) -> None:
    """Write `metrics` (nested dicts and lists are fine) as JSON, at full precision.

    JSON has no NaN or infinity: they become null. The file is replaced whole or not at all.
    Raises TypeError where a value is no number, string, bool, None, dict or list.
    """
    _write_text(path, json.dumps(_without_nan(metrics), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


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


def write_report(
    path: str | Path,
    *,
    title: str,
    results: Results,
    history: list[dict[str, Any]],
    samples: list[dict[str, Any]],
    config: dict[str, Any],
    columns: Sequence[Column] = DEFAULT_COLUMNS,
    samples_heading: str = "Sample completions",
) -> None:
    """Write one HTML file that needs no network and no script: results, charts, samples, configuration.

    history: what the trainer logged, `{"step": int, name: value, ...}`; entries without a step are left out. Each
        number that varies gets a chart; a NaN or infinity is a gap in its line.
    columns: the first ones of the results' table; all other numbers follow.
    samples: one dict per row; the columns are their keys, in the order in which they first appear.
    config: printed as given. Pass `TrainingArguments.to_dict()` rather than the fields: it masks the Hub token.

    All text is escaped: completions are shown, never interpreted.
    """
    listed = {key for key, _, _ in columns}
    numbers = {key: None for row in results.values() for key, value in row.items() if _is_number(value)}
    columns = [*columns, *((key, key, ".4g") for key in numbers if key not in listed)]
    keys = list({key: None for sample in samples for key in sample})
    sample_rows = [[_sample_cell(sample.get(key)) for key in keys] for sample in samples]
    sample_table = '<p class="note">No samples were given.</p>'
    if samples:
        sample_table = _html_table([[str(key) for key in keys], *sample_rows], "samples", row_headings=False)
    settings = json.dumps(_without_nan(config), indent=2, ensure_ascii=False, default=str)
    document = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'" />
<title>{_escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{_escape(title)}</h1></header>
<main>
<h2>Results</h2>
{_html_table(_cells(results, columns), "results", row_headings=True)}
<h2>Training</h2>
{_charts(history)}
<h2>{_escape(samples_heading)}</h2>
{sample_table}
<h2>Configuration</h2>
<details><summary>All settings of this run</summary><pre>{_escape(settings)}</pre></details>
</main>
</body>
</html>
"""
    _write_text(path, document)


def write_model_card(
    path: str | Path,
    *,
    title: str,
    results: Results,
    method: str,
    teacher: str,
    student: str,
    dataset: str,
    auto_class: str = "AutoModelForSeq2SeqLM",
    has_content_tokens: bool = False,
    chat: ChatFormat | None = None,
    columns: Sequence[Column] = DEFAULT_COLUMNS,
) -> None:
    """Write the README.md of a checkpoint: metadata for the Hub, the results, how to load it and let it write.

    method: a short noun phrase, e.g. "PPO on the teacher-forcing reward". has_content_tokens: whether special tokens
    are part of the model's texts, so that the example must keep them when it decodes. chat: how prompts were put into
    the chat template of the model's tokenizer, if they were. The metadata name `base_model`
    and `datasets` if these are Hub ids ("owner/name"), not if they are local paths; they name no license, which only
    the author can choose.

    Raises InputError: `auto_class` is none of `AUTO_CLASSES`.
    """
    if auto_class not in AUTO_CLASSES:
        raise InputError(f"auto_class {auto_class!r} is unknown; use one of: {', '.join(AUTO_CLASSES)}.")
    metadata: dict[str, Any] = {"library_name": "transformers"}
    if _is_hub_id(student):
        metadata["base_model"] = student
    if _is_hub_id(dataset):
        metadata["datasets"] = [dataset]
    metadata["tags"] = ["rlkd_trl", "knowledge-distillation", "generated_from_trainer"]

    heads, *rows = [[_one_line(cell) for cell in row] for row in _cells(results, columns)]
    # A decoder-only model's output begins with the prompt.
    new = "" if auto_class == "AutoModelForSeq2SeqLM" else ', inputs["input_ids"].shape[1]:'
    skip = not has_content_tokens
    loading = (
        f"from transformers import AutoTokenizer, {auto_class}\n\n"
        'checkpoint = "path/or/hub-id/of/this-model"\n'
        "tokenizer = AutoTokenizer.from_pretrained(checkpoint)\n"
        f"model = {auto_class}.from_pretrained(checkpoint)\n\n"
        f"inputs = {_example_inputs(chat)}\n"
    )
    if auto_class in WRITING_CLASSES:
        loading += (
            "output_ids = model.generate(**inputs)  # greedy, up to the length it was trained for\n"
            f"print(tokenizer.decode(output_ids[0{new}], skip_special_tokens={skip}))"
        )
    else:
        loading += "outputs = model(**inputs)"
    sections = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---",
        f"# {_one_line(title)}",
        f"{_code(student)}, distilled from the teacher {_code(teacher)} on {_code(dataset)}.\n\n"
        f"Method: {_one_line(method)}. Trained with `rlkd_trl`.",
        f"## Results\n\n{markdown_table(heads, rows)}",
        f"## How to use\n\n```python\n{loading}\n```",
    ]
    _write_text(path, "\n\n".join(sections) + "\n")


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


# --- numbers and files


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if not _is_number(value):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if math.isfinite(value) else None


def _write_text(path: str | Path, text: str) -> None:
    """Write through a temporary file beside it, so that a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # A lone surrogate, which some datasets contain, cannot be encoded; it is written as its \uXXXX escape.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _cells(results: Results, columns: Sequence[Column]) -> list[list[str]]:
    """The results as text: the headings, then one row per model."""

    rows = [["model", *(heading for _, heading, _ in columns)]]
    for name, row in results.items():
        rows.append([name, *(number(row.get(key), number_format) for key, _, number_format in columns)])
    return rows


# --- HTML


def _escape(text: str) -> str:
    # HTML does not allow control characters, even if they are escaped.
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]", "\ufffd", text))


def _sample_cell(value: Any) -> str:
    if value is None:
        return MISSING
    return format(value, ".4g") if isinstance(value, float) else str(value)


def _html_table(rows: list[list[str]], css_class: str, *, row_headings: bool) -> str:
    headings = "".join(f'<th scope="col">{_escape(cell)}</th>' for cell in rows[0])
    lines = []
    for row in rows[1:]:
        # dir="auto" keeps right-to-left text inside its own cell.
        cells = [f'<td dir="auto">{_escape(cell)}</td>' for cell in row]
        if row_headings:
            cells[0] = f'<th scope="row">{_escape(row[0])}</th>'
        lines.append(f"<tr>{''.join(cells)}</tr>")
    body = "\n".join(lines)
    return f"""<div class="scroll"><table class="{css_class}">
<thead><tr>{headings}</tr></thead>
<tbody>
{body}
</tbody></table></div>"""


def _charts(history: list[dict[str, Any]]) -> str:
    """One chart per number that varies; the others in one line of text."""
    series: dict[str, list[tuple[float, float]]] = {}
    for entry in sorted((entry for entry in history if _is_number(entry.get("step"))), key=lambda e: e["step"]):
        for name, value in entry.items():
            if _is_number(value) and name not in NOT_CHARTED and not name.endswith(NOT_CHARTED_SUFFIXES):
                series.setdefault(name, []).append((entry["step"], value))

    charts, constant = [], []
    for name, points in series.items():
        values = {value for _, value in points if math.isfinite(value)}
        if len(values) > 1:
            charts.append(_chart(len(charts), name, points))
        else:
            constant.append(f"{name} = {values.pop():.5g}" if values else f"{name} (never finite)")
    parts = [f'<div class="charts">\n{"".join(charts)}</div>'] if charts else []
    if constant:
        parts.append(f'<p class="note">Logged, and did not vary: {_escape("; ".join(constant))}.</p>')
    return "\n".join(parts) or '<p class="note">Nothing was logged.</p>'


def _chart(number: int, name: str, points: list[tuple[float, float]]) -> str:
    """A line chart as SVG, for points of which at least two finite values differ."""
    finite = [value for _, value in points if math.isfinite(value)]
    low, high = min(finite), max(finite)
    first, last = points[0][0], points[-1][0]
    left, right, top, bottom = 64, 310, 30, 150

    def x(step: float) -> float:
        return left + (right - left) * (step - first) / ((last - first) or 1)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    runs: list[list[str]] = [[]]  # stretches without a gap
    for step, value in points:
        if math.isfinite(value):
            runs[-1].append(f"{x(step):.1f},{y(value):.1f}")
        elif runs[-1]:
            runs.append([])
    marks = "".join(
        f'<polyline points="{" ".join(run)}" />'
        if len(run) > 1
        else '<circle cx="{}" cy="{}" r="2" />'.format(*run[0].split(","))
        for run in runs
        if run
    )
    grid = "".join(
        f'<line class="grid" x1="{left}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}" />'
        f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>'
        for value in (low, low + (high - low) / 2, high)
    )
    description = (
        f"From {finite[0]:.4g} to {finite[-1]:.4g} over steps {first} to {last}; lowest {low:.4g}, highest {high:.4g}."
    )
    label = _escape(name)
    return f"""<svg class="chart" viewBox="0 0 320 176" role="img" aria-labelledby="name{number} text{number}">
<title id="name{number}">{label}</title><desc id="text{number}">{description}</desc>
<text class="name" x="0" y="14">{label}</text>
{grid}<text x="{left}" y="168">{first}</text><text x="{right}" y="168" text-anchor="end">step {last}</text>
{marks}
</svg>
"""


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
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None and not Path(name).exists()
