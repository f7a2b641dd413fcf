r"""Every method on E2E (Novikova et al. 2017) from one teacher and one warm start: the README's comparison.

    python recipes/benchmarks/e2e_comparison.py --train e2e/train.csv --test e2e/test.csv \
        --templates promptsource/e2e_nlg_cleaned/templates.yaml --work_dir runs/e2e_comparison --jobs 2

Data, teacher and warm start are made as in `e2e.py` with seed 0, except that 100 of the training inputs are set aside
before anything is trained, for the choice of learning rates; 200 of the test inputs are used, drawn with seed 0; and
methods ask the teacher through one of its two templates, which judges them too, while pseudo-labels come from both.
The step counts, the learning rates and these cuts are what two hours on two cores allow. Methods that learn from
data get the teacher's greedy answers to the training inputs; no method sees a human reference, except that learning
rates are chosen by BLEU. `recipes/compare.py` does the rest; a run that breaks off is taken up again where it was.
Writes `comparison.md`, `.csv`, `.json` and the figures to `--results_dir`. A longer budget for some of the methods
(run `by_slots.py` before it, which reads the last comparison in the work_dir):

    ... --methods f_distill_rkl all_actions all_actions_expected rloo_sequence --baseline f_distill_rkl \
        --max_steps 50 400 --results_dir recipes/benchmarks/results/long

`--architecture llama` makes decoder-only models of the same sizes; give it a work_dir and a results_dir of its own.
"""

import argparse
import csv
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from e2e import DATA_FLAGS, QUIET, RECIPES, RESULTS, STUDENT, TEACHER, TEMPLATE_NAMES, delexicalise, stage

VALIDATION_INPUTS, TEST_INPUTS = 100, 200
METHODS = "seq_kd word_kd f_distill_js f_distill_tvd f_distill_rkl gkd llmr ketchup".split()
METHODS += "rloo_sequence rloo_token ppo minillm".split()
METHODS += "all_actions all_actions_w1 all_actions_discount all_actions_expected".split()
COMMON = ["per_device_train_batch_size=32", "warmup_steps=10", "logging_steps=20", "per_device_eval_batch_size=100"]


def split_inputs(source: Path, count: int, drawn: Path, rest: Path | None = None) -> None:
    """All rows of `count` distinct inputs, drawn with seed 0, to `drawn`, those of the others to `rest`."""
    with source.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    inputs = sorted({row["mr"] for row in rows})
    chosen = set(random.Random(0).sample(inputs, count))
    for target, wanted in ((drawn, True), (rest, False)):
        if target is None:
            continue
        with target.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["mr", "ref"])
            writer.writeheader()
            writer.writerows(row for row in rows if (row["mr"] in chosen) == wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--templates", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/e2e_comparison"))
    parser.add_argument("--architecture", default="t5", choices=("t5", "llama"))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--baseline", default="seq_kd")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--max_steps", nargs="+", default=["50", "150"])
    parser.add_argument("--learning_rates", nargs="+", default=["3e-5", "1e-4", "5e-4", "2e-3", "5e-3", "1e-2"])
    parser.add_argument("--jobs", default="1")
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    args = parser.parse_args()

    here = args.work_dir
    train, validation, test = (here / f"{name}.csv" for name in ("train", "validation", "test"))
    if not test.exists():
        delexicalise(args.train, here / "all_train.csv")
        split_inputs(here / "all_train.csv", VALIDATION_INPUTS, validation, train)
        delexicalise(args.test, here / "all_test.csv")
        split_inputs(here / "all_test.csv", TEST_INPUTS, test)
    teacher, pseudo, warm, results = (here / name for name in ("teacher", "pseudo.jsonl", "warm", "results"))
    templates = ["--templates", args.templates, "--template_names", *TEMPLATE_NAMES]
    common = ["--architecture", args.architecture, "--seed", "0", *QUIET]
    of_train = ["--dataset", train, *DATA_FLAGS, *templates]
    stage("sft", teacher / "config.json", *of_train, "--output_dir", teacher, *TEACHER, *common)
    stage("pseudo_label", pseudo, "--teacher", teacher, *of_train, "--output", pseudo)
    labels = ["--dataset", pseudo, "--source_column", "mr", "--target_column", "pseudo_label"]
    stage("sft", warm / "config.json", *labels, "--tokenizer", teacher, "--output_dir", warm, *STUDENT, *common)

    command = [sys.executable, RECIPES / "compare.py", "--teacher", teacher, "--student", warm, *labels]
    command += ["--templates", args.templates, "--template_names", TEMPLATE_NAMES[0], "--num_samples", "2"]
    command += ["--validation_dataset", validation, "--test_dataset", test, "--eval_target_column", "ref"]
    command += ["--methods", *args.methods, "--baseline", args.baseline, "--seeds", *args.seeds]
    command += ["--max_steps", *args.max_steps, "--learning_rates", *args.learning_rates, "--select_on", "bleu"]
    command += ["--common", *COMMON]
    command += ["--jobs", args.jobs, "--output_dir", results]
    finished = subprocess.run([str(word) for word in command])
    args.results_dir.mkdir(parents=True, exist_ok=True)
    for path in results.glob("*.*"):
        shutil.copy(path, args.results_dir / path.name)
    with (args.results_dir / "comparison.md").open("a", encoding="utf-8") as file:
        file.write(f"\nMade by `python {shlex.join(sys.argv)}`.\n")
    sys.exit(finished.returncode)


if __name__ == "__main__":
    main()
