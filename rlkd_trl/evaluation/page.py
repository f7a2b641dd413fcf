"""Renders `report.html`: one file with its style, script and data inside, of one run or several.

The page, its style and its script lie in `report_page/`. The browser runs that script and no other: the page's policy
names its hash, so that no text of a run could be run as a script even if it were not escaped.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlkd_trl.evaluation.curves import charts
from rlkd_trl.evaluation.files import is_number, without_nan
from rlkd_trl.evaluation.metric_guide import note_on
from rlkd_trl.evaluation.run_log import RunLog
from rlkd_trl.evaluation.tables import MISSING, number

MOST_COMPLETIONS = 10_000  # in one page; a browser sorts and filters these at once
_DIRECTORY = Path(__file__).parent / "report_page"


def render_page(title: str, logs: Mapping[str, RunLog]) -> str:
    """The page as text. logs: each run's log by the run's name, in the order in which they are shown."""
    runs = list(logs)
    in_table = {name for log in logs.values() for row in log.results.values() for name in row}
    groups, steady = charts({run: log.history for run, log in logs.items()}, in_table=in_table)
    all_completions = [{**record, "run": run} for run, log in logs.items() for record in log.completions]
    completions = _thinned(all_completions)
    left_out = ""
    if len(completions) < len(all_completions):
        left_out = f"Of {len(all_completions)} texts, {len(completions)} evenly spaced ones are here."
    samples = [] if completions else [row for log in logs.values() for row in log.samples]
    keys = list({key: None for sample in samples for key in sample})
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = _template().render(
        title=_printable(title),
        style=Markup(_asset("page.css")),
        script=Markup(script),
        script_hash=Markup(f"sha256-{digest}"),
        several=len(runs) > 1,
        **_result_rows(logs),
        groups=groups,
        steady=steady,
        has_completions=bool(completions),
        left_out=left_out,
        samples_heading="Completions" if completions else next(iter(logs.values())).samples_heading,
        sample_keys=keys,
        sample_rows=[[_sample_cell(sample.get(key)) for key in keys] for sample in samples],
        configs=[(run, _settings(log.config)) for run, log in logs.items()],
        data=_script_data({"runs": runs, "groups": groups, "completions": completions}),
    )
    return _printable(page)


def _result_rows(logs: Mapping[str, RunLog]) -> dict[str, Any]:
    """The table of results, a row for each metric: first those that the runs name, then all other numbers."""
    headline = {column[0]: column for log in logs.values() for column in log.headline}
    models = [(model, values) for log in logs.values() for model, values in log.results.items()]
    numbers = {key: None for _, values in models for key, value in values.items() if is_number(value)}
    others = [(key, key, ".4g") for key in numbers if key not in headline]

    def rows(columns: Sequence[tuple[str, str, str]]) -> list[dict[str, Any]]:
        return [
            {
                "heading": heading,
                "meaning": note_on(key).meaning,
                "cells": [number(values.get(key), number_format) for _, values in models],
            }
            for key, heading, number_format in columns
        ]

    return {
        "models": [model for model, _ in models],
        "run_headings": [(run, len(log.results)) for run, log in logs.items() if log.results] if len(logs) > 1 else [],
        "headline_rows": rows(list(headline.values())),
        "other_rows": rows(others),
    }


def _thinned(completions: list[dict]) -> list[dict]:
    """At most `MOST_COMPLETIONS` of them, evenly spaced; those of held-out prompts are all kept where they fit."""
    held_out = [record for record in completions if record["kind"] == "held-out"]
    if len(held_out) >= MOST_COMPLETIONS or len(completions) <= MOST_COMPLETIONS:
        return _evenly(completions, MOST_COMPLETIONS)
    others = [record for record in completions if record["kind"] != "held-out"]
    return held_out + _evenly(others, MOST_COMPLETIONS - len(held_out))


def _evenly(records: list[dict], most: int) -> list[dict]:
    if len(records) <= most:
        return records
    return [records[i * len(records) // most] for i in range(most)]


def _settings(config: Mapping[str, Any]) -> str:
    return json.dumps(without_nan(dict(config)), indent=2, ensure_ascii=False, default=str)


def _script_data(value: Any) -> Markup:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(without_nan(value), ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _printable(text: str) -> str:
    # HTML does not allow control characters, even if they are escaped.
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]", "\ufffd", text)


def _sample_cell(value: Any) -> str:
    if value is None:
        return MISSING
    return format(value, ".4g") if isinstance(value, float) else str(value)


@cache
def _asset(name: str) -> str:
    return (_DIRECTORY / name).read_text(encoding="utf-8")


@cache
def _template():
    environment = Environment(
        loader=FileSystemLoader(_DIRECTORY), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html")
