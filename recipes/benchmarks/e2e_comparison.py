r"""Every method on E2E (Novikova et al. 2017) from one teacher, three warm starts, on two test sets.

    python recipes/benchmarks/e2e_comparison.py --train e2e/train.csv --test e2e/test.csv \
        --templates promptsource/e2e_nlg_cleaned/templates.yaml --work_dir runs/e2e_comparison --stop_after_minutes 60

The same command goes on where it stopped, until all is done; after each piece the tables have what there is. One seed
of every method from every warm start comes first, then the next seed. `--smoke` does all of it in small, in minutes.

Data. Names are delexicalised as in `e2e.py`. Of the 547 inputs of `--train`, 300 drawn with seed 0 are the test set
`in_distribution` and 60 the validation set. Of the 554 of `--test`, 300 are the test set `official`, which is another
distribution: other values (restaurants, pubs, Italian food), and 45 % have 8 facts, in training 12 %. The teacher
learns from the rest of both files, 441 inputs with their references: it knows more than its students are asked. They
see no reference. They learn from the 187 inputs that are left of `--train` and from variants of these, up to 600, to
each of which the teacher answers through both of its templates. A variant has the attributes of one input, and for
each a value that some of these inputs has; none is an input of validation or test.

Three warm starts are one student after different numbers of steps on the teacher's answers: cold, middling and good.
Methods start from each with the same seeds and budget; each has its learning rate from the same six by BLEU on the
validation inputs, at the first seed; the four that are best there, by the mean of three seeds, get two seeds more.
Methods ask the teacher through one of its templates, which judges them too.

Two methods in `cold_start_methods/` are for the cold start alone: name them with `--methods`.

`recipes/compare.py` does the rest. Its tables and figures go to `--results_dir`/WARM_START. With
`--max_generated_tokens` the budget is in tokens, those read from data included, and learning rates do not decay;
`--architecture llama` makes decoder-only models of the same sizes, and needs a work_dir and a results_dir of its own.
"""

import argparse
import csv
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from e2e import DATA_FLAGS, QUIET, RECIPES, RESULTS, STUDENT, TEACHER, TEMPLATE_NAMES, delexicalise, stage
from result_files import made_by

# Inputs: of the first file for test and validation; with variants, for the students; of the second file.
TEST_INPUTS, VALIDATION_INPUTS, STUDENT_INPUTS, OFFICIAL_INPUTS = 300, 60, 600, 300
WARM_START_STEPS = {"middling": 130, "good": 400, "cold": 70}  # in the order in which they are compared
RIVALS = Path(__file__).resolve().parent / "rivals"
METHODS = "seq_kd word_kd f_distill_js f_distill_tvd f_distill_rkl gkd llmr ketchup minillm".split()
METHODS += "ppo rloo_token rloo_sequence all_actions all_actions_w1 all_actions_expected seq_kd+recommended".split()
# From here, as results name them.
METHODS += [os.path.relpath(path) for path in sorted(RIVALS.glob("*/*.yaml"))]
COMMON = ["per_device_train_batch_size=32", "warmup_steps=10", "logging_steps=20", "per_device_eval_batch_size=100"]
RATES = ["1e-5", "5e-5", "2e-4", "1e-3", "4e-3", "1.5e-2"]
TOP, TOP_SEEDS = 4, ["3", "4"]
# Of all methods and stages in small: it shows that they run, and its numbers say nothing.
SMOKE_TEACHER = ["--max_steps", "60", "--d_model", "32"]
SMOKE_METHODS, SMOKE_RATES, SMOKE_STEPS = ["seq_kd", "ppo"], ["2e-4", "1e-3"], "2"


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["mr", "ref"])
        writer.writeheader()
        writer.writerows(rows)


def drawn_inputs(rows: list[dict[str, str]], *counts: int) -> list[list[dict[str, str]]]:
    """Disjoint parts of the rows, each with all of so many distinct inputs, drawn with seed 0; and the rest."""
    inputs = sorted({row["mr"] for row in rows})
    order, parts = random.Random(0).sample(inputs, len(inputs)), []
    for count in counts:
        chosen, order = set(order[:count]), order[count:]
        parts.append([row for row in rows if row["mr"] in chosen])
    return [*parts, [row for row in rows if row["mr"] in set(order)]]


def with_variants(inputs: list[str], count: int, taken: set[str]) -> list[str]:
    """The inputs, and as many variants of them as make `count`, none of them among `taken`."""
    facts = {source: [fact.split("[", 1) for fact in source.split(", ")] for source in inputs}
    values = {}
    for of_input in facts.values():
        for attribute, value in of_input:
            values.setdefault(attribute, []).append(value)
    rng, distinct = random.Random(0), dict.fromkeys(inputs)
    for _ in range(100 * count):
        if len(distinct) >= count:
            break
        attributes = [attribute for attribute, _ in facts[rng.choice(inputs)]]
        variant = ", ".join(f"{attribute}[{rng.choice(values[attribute])}" for attribute in attributes)
        if variant not in taken:
            distinct[variant] = None
    return list(distinct)


def make_data(args: argparse.Namespace, here: Path) -> None:
    delexicalise(args.train, here / "all_train.csv")
    delexicalise(args.test, here / "all_test.csv")
    test, validation, train = drawn_inputs(read_rows(here / "all_train.csv"), TEST_INPUTS, VALIDATION_INPUTS)
    official, of_teacher = drawn_inputs(read_rows(here / "all_test.csv"), OFFICIAL_INPUTS)
    taken = {row["mr"] for part in (test, validation, official) for row in part}
    inputs = with_variants(sorted({row["mr"] for row in train}), STUDENT_INPUTS, taken)
    write_rows(here / "students.csv", [{"mr": source, "ref": ""} for source in inputs])
    write_rows(here / "validation.csv", validation)
    write_rows(here / "in_distribution.csv", test)
    write_rows(here / "official.csv", official)
    write_rows(here / "train.csv", [*train, *of_teacher])


def make_models(args: argparse.Namespace, here: Path) -> None:
    """Teacher, its answers, and the warm starts."""
    teacher, pseudo = here / "teacher", here / "pseudo.jsonl"
    templates = ["--templates", args.templates, "--template_names", *TEMPLATE_NAMES]
    common = ["--architecture", args.architecture, "--seed", "0", *QUIET]
    size = [*TEACHER, *(SMOKE_TEACHER if args.smoke else [])]
    of_train = ["--dataset", here / "train.csv", *DATA_FLAGS, *templates]
    stage("sft", teacher / "config.json", *of_train, "--output_dir", teacher, *size, *common)
    teacher_flags = ["--dataset", here / "students.csv", "--source_column", "mr", *templates]
    teacher_flags += ["--max_rows", "64"] if args.smoke else []
    stage("pseudo_label", pseudo, "--teacher", teacher, *teacher_flags, "--output", pseudo)
    labels = ["--dataset", pseudo, "--source_column", "mr", "--target_column", "pseudo_label"]
    for name in args.warm_starts:
        steps = WARM_START_STEPS[name] // (10 if args.smoke else 1)
        warm, size = here / f"warm_{name}", [*STUDENT, "--max_steps", str(steps)]
        of_student = ["--tokenizer", teacher, "--output_dir", warm, *size, *common]
        stage("sft", warm / "config.json", *labels, *of_student)


def compare(args: argparse.Namespace, warm_start: str, seeds: list[str], *, minutes: float | None, whole: bool) -> int:
    """One call of compare.py, and a copy of its tables; its exit code."""
    here, results, target = args.work_dir, args.work_dir / warm_start, args.results_dir / warm_start
    command = [sys.executable, RECIPES / "compare.py", "--teacher", here / "teacher"]
    command += ["--student", here / f"warm_{warm_start}", "--dataset", here / "pseudo.jsonl"]
    command += ["--source_column", "mr", "--target_column", "pseudo_label", "--eval_target_column", "ref"]
    command += ["--templates", args.templates, "--template_names", TEMPLATE_NAMES[0], "--num_samples", "2"]
    command += ["--validation_dataset", here / "validation.csv"]
    command += ["--test_dataset", here / "in_distribution.csv", here / "official.csv"]
    command += ["--methods", *args.methods, "--baseline", args.baseline, "--seeds", *seeds]
    command += ["--learning_rates", *args.learning_rates, "--select_on", "bleu", "--common", *COMMON]
    if args.max_generated_tokens:
        command += ["--max_generated_tokens", *args.max_generated_tokens]
    else:
        command += ["--max_steps", *args.max_steps]
    if whole and args.top:
        command += ["--top", str(args.top), "--top_seeds", *args.top_seeds]
    if minutes is not None:
        command += ["--stop_after_minutes", f"{minutes:.3f}"]
    command += ["--jobs", args.jobs, "--output_dir", results]
    code = subprocess.run([str(word) for word in command]).returncode
    target.mkdir(parents=True, exist_ok=True)
    for path in results.glob("*.*"):
        shutil.copy(path, target / path.name)
    if (target / "comparison.md").is_file():
        with (target / "comparison.md").open("a", encoding="utf-8") as file:
            file.write(f"\n{share_of_the_whole(args)}{made_by()}\n")
    return code


def share_of_the_whole(args: argparse.Namespace) -> str:
    """A sentence that says what a call with fewer methods, rates or seeds leaves out; empty where it has them all."""
    of_each = {"methods": (args.methods, METHODS), "learning rates": (args.learning_rates, RATES)}
    parts = [f"{len(some)} of {len(all_)} {name}" for name, (some, all_) in of_each.items() if len(some) < len(all_)]
    parts += [] if args.top else ["no seeds more for the best"]
    return f"A part of the whole comparison: {', '.join(parts)}. " if parts else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--templates", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/e2e_comparison"))
    parser.add_argument("--architecture", default="t5", choices=("t5", "llama"))
    parser.add_argument("--warm_starts", nargs="+", default=list(WARM_START_STEPS), choices=list(WARM_START_STEPS))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--baseline", default="seq_kd")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--top", type=int, default=TOP)
    parser.add_argument("--top_seeds", nargs="+", default=TOP_SEEDS)
    parser.add_argument("--max_steps", nargs="+", default=["150"])
    parser.add_argument("--max_generated_tokens", nargs="+")
    parser.add_argument("--learning_rates", nargs="+", default=RATES)
    parser.add_argument("--jobs", default="1")
    parser.add_argument("--stop_after_minutes", type=float)
    parser.add_argument("--results_dir", type=Path, default=RESULTS / "warm_starts")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.methods, args.learning_rates, args.max_steps = SMOKE_METHODS, SMOKE_RATES, [SMOKE_STEPS]
        args.seeds, args.top, args.top_seeds = ["0", "1"], 1, ["2"]

    until = None if args.stop_after_minutes is None else time.monotonic() + 60 * args.stop_after_minutes
    if not (args.work_dir / "train.csv").exists():
        make_data(args, args.work_dir)
    make_models(args, args.work_dir)
    failed = False
    for count in range(1, len(args.seeds) + 1):
        for warm_start in args.warm_starts:
            minutes = None if until is None else (until - time.monotonic()) / 60
            if minutes is not None and minutes <= 0:
                print("The time is over; the same command goes on.", flush=True)
                sys.exit(failed)
            whole = count == len(args.seeds)
            failed |= compare(args, warm_start, args.seeds[:count], minutes=minutes, whole=whole) != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
