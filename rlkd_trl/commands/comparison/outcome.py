"""What a model does on the test inputs, greedy and sampled, measured once and kept beside its checkpoint."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.evaluation.metrics import self_bleu
from rlkd_trl.evaluation.report import write_metrics

if TYPE_CHECKING:
    from rlkd_trl.evaluation.completions import Evaluation

_DIRECTORY = "tests"  # beside a checkpoint


@dataclass(frozen=True)
class Outcome:
    """greedy, sampled: metric to value. inputs: one dict per test input, in the data's order.

    An input has `prompt`, `references`, `greedy` (a text), `samples` (several), and of the greedy text `tokens`,
    `ended`, `reward` and `teacher_nll` (of the sequence); and `nll_of_teacher` and `teacher_tokens` of the teacher's
    sample. `sampled` has the mean of each metric over as many corpora
    as there are samples per input, each of one sample of every input, so that metrics that depend on a corpus's size
    compare with `greedy`; and `self_bleu`.
    """

    greedy: dict[str, float]
    sampled: dict[str, float]
    inputs: list[dict]


def measure(answer: "Callable[[int | None], Evaluation]", rows: Sequence[Mapping], num_samples: int) -> Outcome:
    """`answer(None)` evaluates greedy outputs on the rows, `answer(seed)` sampled ones; two samples or more."""
    greedy = answer(None)
    draws = [answer(seed) for seed in range(num_samples)]
    samples = list(zip(*(draw.outputs for draw in draws), strict=True))
    sampled = {name: statistics.fmean(draw.metrics[name] for draw in draws) for name in draws[0].metrics}
    inputs = [
        {
            "prompt": row["prompt"],
            "references": list(row["references"]),
            "greedy": greedy.outputs[i],
            "samples": list(samples[i]),
            **{name: values[i] for name, values in greedy.per_input.items()},
        }
        for i, row in enumerate(rows)
    ]
    return Outcome(greedy.metrics, sampled | {"self_bleu": self_bleu(samples)}, inputs)


def kept_outcome(directory: Path, test: str, settings: Mapping[str, object], make: Callable[[], Outcome]) -> Outcome:
    """The outcome on a test set that `directory` holds, if it was measured with these settings (JSON values); else a
    new one, kept.

    `tests/NAME.json` has the metrics, `tests/NAME.jsonl` the inputs. The former is written last, so that it vouches
    for both.
    """
    metrics_file, inputs_file = (directory / _DIRECTORY / f"{test}.{ending}" for ending in ("json", "jsonl"))
    if metrics_file.is_file():
        saved = json.loads(metrics_file.read_text(encoding="utf-8"))
        if saved["settings"] == settings:
            inputs = [json.loads(line) for line in inputs_file.read_text(encoding="utf-8").split("\n")[:-1]]
            return Outcome(_with_nan(saved["greedy"]), _with_nan(saved["sampled"]), inputs)
        metrics_file.unlink()
    outcome = make()
    metrics_file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(line) + "\n" for line in outcome.inputs]
    inputs_file.write_text("".join(lines), encoding="utf-8")
    write_metrics(metrics_file, {"settings": settings, "greedy": outcome.greedy, "sampled": outcome.sampled})
    return outcome


def _with_nan(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """The metrics with NaN where JSON has null."""
    return {name: math.nan if value is None else value for name, value in metrics.items()}
