"""The tables of the encoder benchmark, of what its runs have measured so far."""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from encoder_runs import (
    ABLATIONS,
    EXPECTED,
    HALF_WIDTH,
    LONG,
    LONGEST,
    METHODS,
    QUESTIONS,
    SHORT,
    TEACHER_STEPS,
    Budget,
    Plan,
    Run,
)

from rlkd_trl.commands.comparison.statistics import mean_interval
from rlkd_trl.evaluation.tables import MISSING, markdown_table, number


def general_table(plan: Plan) -> str:
    heads = ["student", "begins with", "parameters", "of the teacher's", "speed-up"]
    heads += ["similarity ρ, E2E", "hidden cosine", "similarity ρ, docstrings", "hidden cosine", "CPU seconds"]
    lines = []
    for run in plan.general_runs(list(plan.methods)):
        if not run.is_done:
            continue
        measures, init = run.measured, run.flags[run.flags.index("--init") + 1]
        share = 100 * measures["parameters"] / measures["teacher_parameters"]
        cells = [f"{measures['parameters'] / 1e6:.2f} M", f"{share:.0f} %", f"{measures['speed_up']:.2f}×"]
        for kind in ("e2e", "docstrings"):
            cells += [
                number(measures.get(f"{kind}_{name}"), ".3f") for name in ("similarity_spearman", "hidden_cosine")
            ]
        lines.append([run.of, init, *cells, f"{measures['cpu_seconds']:.0f}"])
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
    tasks = [task for task in plan.tasks if any(task in plan.tasks_of(name) for name in names)]
    heads = ["method", *tasks, "mean of the tasks", "CPU seconds per run"]
    accuracies = [plan.teacher(task).measured["accuracy"] if plan.teacher(task).is_done else None for task in tasks]
    lines = [["teacher's accuracy", *(number(value, ".1f") for value in accuracies), MISSING, MISSING]]
    for name in names:
        seeds = plan.seeds
        by_task = [[retained(plan, name, task, seed) for seed in seeds] for task in tasks]
        means = [None if None in of_seed else statistics.fmean(of_seed) for of_seed in zip(*by_task, strict=True)]
        runs = [plan.task(name, task, seed) for task in tasks for seed in seeds]
        seconds = [run.measured["cpu_seconds"] for run in runs if run.is_done]
        if seconds:
            cells = [_cell(values) for values in [*by_task, means]]
            lines.append([name, *cells, f"{statistics.fmean(seconds):.0f}"])
    return markdown_table(heads, lines)


def differences(plan: Plan, of: Sequence[tuple[str, str, str]], verdicts: tuple[str, str]) -> list[str]:
    """For each (what, one method, the other): the paired difference over tasks and seeds.

    verdicts: what it means if the first method is better, and if the second one is.
    """
    lines = []
    for what, one, other in of:
        if not {one, other} <= plan.methods.keys():
            continue
        pairs = [
            (retained(plan, one, task, seed), retained(plan, other, task, seed))
            for task in plan.tasks_of(other)
            for seed in plan.seeds
        ]
        found = [first - second for first, second in pairs if first is not None and second is not None]
        lines.append(f"- {what}. {one} minus {other}: {in_points(found, verdicts)}")
    return lines


def in_points(differences: Sequence[float], verdicts: tuple[str, str]) -> str:
    """In words: points of accuracy retained, over so many pairs, and what they say."""
    if not differences:
        return "not measured."
    mean, half_width = mean_interval(differences)
    interval = "" if half_width is None else f" ± {half_width:.1f}"
    if half_width is None or abs(mean) <= half_width:
        verdict = "not told apart"
    else:
        verdict = verdicts[0] if mean > 0 else verdicts[1]
    pairs = "pair" if len(differences) == 1 else "pairs"
    return f"{mean:+.1f}{interval} points over {len(differences)} {pairs} of task and seed: {verdict}."


def write_results(plan: Plan, runs: Sequence[Run], target: Path, command: str) -> None:
    """encoders.md and encoders.json."""
    done = [one for one in runs if one.is_done]
    vocabulary = json.loads((plan.here / "vocabulary.json").read_text(encoding="utf-8"))
    minutes = sum(one.measured["cpu_seconds"] for one in done) / 60
    commits = ", ".join(sorted({one.measured["commit"] for one in done})) or MISSING
    text = [
        f"{len(done)} of {len(runs)} runs are done, in {minutes:.1f} CPU minutes with one thread. Made by "
        f"`{command}`; code of commit {commits}. The tasks' teachers had {TEACHER_STEPS} steps of 16 sentences. Of "
        f"the encoder's {vocabulary['before']} word pieces those {vocabulary['kept']} are kept that these texts need.",
        "",
        "General stage, one seed. A student begins with every other layer of the teacher (uniform), or with random "
        "numbers. The speed-up is the median over batches of 25 sentences, in CPU time.",
        "",
        general_table(plan),
        "",
        "Tasks: accuracy in percent of the teacher's. Means over seeds with their 95 % interval (Student's t); in "
        "brackets the number of seeds where not all are done, and no interval where there is one. "
        f"{in_words(SHORT)}",
        "",
        task_table(plan, [name for name in plan.methods if name in METHODS]),
        "",
        "What helps? Differences paired by task and seed, with 95 % intervals as if all pairs were independent; the "
        "seeds of a task have one teacher:",
        "",
        *differences(plan, QUESTIONS, ("it helps", "it harms")),
        "",
        "In these steps students that begin with random numbers learn one class only; what follows had more.",
        "",
        f"Ablations: {in_words(LONG)}",
        "",
        task_table(plan, [name for name in plan.methods if name in ABLATIONS]),
        "",
        "The papers' orders, with 95 % intervals over pairs of task and seed:",
        "",
        *differences(plan, EXPECTED, ("as in the paper", "the other way round")),
        "",
        f"Students of half the width, with 6 heads: {in_words(LONGEST)}",
        "",
        task_table(plan, [name for name in plan.methods if name in HALF_WIDTH]),
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


def in_words(budget: Budget) -> str:
    return (
        f"{budget.general} steps of 32 sentences in a general stage (learning rate {budget.general_rate}), "
        f"{budget.task} of 16 in each task stage ({budget.task_rate})."
    )


def left_over(runs: Sequence[Run]) -> str:
    """In words, the runs that are not done."""
    left = [run for run in runs if not run.is_done]
    parts = []
    for kind, what in (("general", "the general stage of"), ("teacher", "the teacher of")):
        names = [run.of for run in left if run.kind == kind]
        parts += [f"{what} {'; '.join(names)}"] if names else []
    tasks = Counter(run.of for run in left if run.kind == "task")
    counts = "; ".join(f"{name} ({count})" for name, count in tasks.items())
    parts += [f"so many tasks and seeds of {counts}"] if tasks else []
    return ". Nor ".join(parts) or "nothing"


def plan_table(runs: Sequence[Run]) -> str:
    """How many runs of each kind there are, how many are done, and the CPU minutes of those that are left."""
    lines = []
    for kind in ("general", "teacher", "task", "all"):
        of_kind = [run for run in runs if kind in (run.kind, "all")]
        minutes = sum(run.seconds for run in of_kind if not run.is_done) / 60
        lines.append([kind, str(len(of_kind)), str(sum(run.is_done for run in of_kind)), f"{minutes:.1f}"])
    return markdown_table(["runs", "number", "done", "CPU minutes left"], lines)
