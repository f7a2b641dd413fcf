"""Carries out a run of the encoder benchmark in a process of its own, and measures what it has made."""

import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from encoder_material import MAX_LENGTH, read_csv
from encoder_runs import MEASURED, Run, slug
from stages import RECIPES, apart, call_recipe


def carry_out(run: Run, here: Path) -> None:
    """Runs the recipe, and measures what it has made."""
    shutil.rmtree(run.directory, ignore_errors=True)
    logs = here / "logs" / run.directory.relative_to(here)
    logs.mkdir(parents=True, exist_ok=True)
    preset = logs / "preset.yaml"
    preset.write_text(yaml.safe_dump(run.settings), encoding="utf-8")
    flags = ["--config", str(preset), *run.flags, "--max_steps", str(run.steps), "--output_dir", str(run.directory)]
    seconds = logs / "cpu_seconds"
    seconds.unlink(missing_ok=True)
    apart(call_recipe, "encoder_kd", flags, seconds, log=logs / "output.txt")
    measure = measure_likeness if run.kind == "general" else measure_accuracy
    apart(measure, run, here, float(seconds.read_text()), log=logs / "measuring.txt")
    if run.kind == "task":  # its numbers are all that is wanted of it
        (run.directory / "model.safetensors").unlink()


def measure_likeness(run: Run, here: Path, cpu_seconds: float) -> None:
    """Of a general student, and of the teacher as it is: how like the teacher's its states are, size and time."""
    from transformers import AutoModel, AutoTokenizer

    from rlkd_trl.evaluation.encoders import Seen

    tokenizer = AutoTokenizer.from_pretrained(here / "teacher")
    student, teacher = (AutoModel.from_pretrained(place).eval() for place in (run.directory, here / "teacher"))
    measures: dict[str, float] = {
        "parameters": student.num_parameters(),
        "teacher_parameters": teacher.num_parameters(),
    }
    measures["cpu_seconds"] = cpu_seconds
    times = []
    for kind in ("e2e", "docstrings"):
        seen = Seen()
        for batch in _batches(tokenizer, [row["text"] for row in read_csv(here / "general" / f"{kind}.csv")]):
            (states_BSD, own), (teachers_BSD, teachers) = (_timed(model, batch) for model in (student, teacher))
            seen.add_states(states_BSD, teachers_BSD, batch["attention_mask"].bool())
            times.append(teachers / own)
        measures |= {f"{kind}_{name}": value for name, value in seen.likeness().items()}
    measures["speed_up"] = statistics.median(times)
    _save(run, measures)


def measure_accuracy(run: Run, here: Path, cpu_seconds: float) -> None:
    """On all held-out sentences of the task."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from rlkd_trl.evaluation.encoders import accuracy

    tokenizer = AutoTokenizer.from_pretrained(run.directory)
    model = AutoModelForSequenceClassification.from_pretrained(run.directory).eval()
    rows = read_csv(here / "tasks" / slug(run.task) / "test.csv")
    predictions: list[int] = []
    for batch in _batches(tokenizer, [row["text"] for row in rows]):
        predictions += _outputs(model, batch).logits.argmax(dim=1).tolist()
    labels = [model.config.label2id[row["label"]] for row in rows]
    _save(run, {"accuracy": accuracy(predictions, labels), "cpu_seconds": cpu_seconds})


def _batches(tokenizer, texts: Sequence[str]):
    for start in range(0, len(texts), 25):
        some = texts[start : start + 25]
        yield tokenizer(some, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")


def _outputs(model, batch):
    import torch

    with torch.no_grad():
        return model(**batch)


def _timed(model, batch) -> tuple[object, float]:
    """Last hidden states, and the CPU seconds of a second forward pass."""
    states_BSD = _outputs(model, batch).last_hidden_state
    began = time.process_time()
    _outputs(model, batch)
    return states_BSD, time.process_time() - began


def _save(run: Run, measures: Mapping[str, float]) -> None:
    text = json.dumps({**measures, "commit": commit(), "run": run.record}, indent=1)
    (run.directory / MEASURED).write_text(text + "\n", encoding="utf-8")


def commit() -> str:
    """That of the code, as git says it; "unknown" outside of a clone."""
    command = ["git", "-C", str(RECIPES), "describe", "--always", "--dirty", "--exclude=*"]
    finished = subprocess.run(command, capture_output=True, text=True)
    return finished.stdout.strip() if finished.returncode == 0 else "unknown"
