r"""PPO and RLOO against the warm start on E2E (Novikova et al. 2017), over several seeds, with the recipes themselves.

    python recipes/benchmarks/e2e.py --train e2e/train.csv --test e2e/test.csv \
        --templates promptsource/e2e_nlg_cleaned/templates.yaml --work_dir runs/e2e --seeds 0 1 2

The two CSV files have the columns `mr` and `ref` (devset.csv and testset_w_refs.csv of the E2E dataset under these
names). Restaurant names are delexicalised, as is usual for small models on E2E (Dušek & Jurčíček 2016): the values of
`name` and `near` become NAME and NEAR in input and references. Every stage is one call of a recipe, and a finished
stage is not run again; one that was made with other flags is refused. For each seed: a T5 teacher from scratch, asked
through two templates; its greedy answers; a smaller T5 warm-started on them; PPO and RLOO from that warm start. No
setting of PPO or RLOO was tuned on test inputs.

Writes `results/e2e.json` and `results/e2e.md` beside this file.
"""

import argparse
import csv
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stages import RECIPES, begun_anew, is_made, mark_made

from rlkd_trl.evaluation.tables import markdown_table

RESULTS = Path(__file__).resolve().parent / "results"
DATA_FLAGS = ["--source_column", "mr", "--target_column", "ref"]
TEMPLATE_NAMES = ["create_text_for_me", "coherent_text"]
TEACHER = "--d_model 128 --num_layers 2 --num_heads 8 --dropout 0 --vocab_size 1200 --learning_rate 4e-3".split()
TEACHER += "--warmup_steps 100 --max_steps 1500 --per_device_train_batch_size 32".split()
STUDENT = "--d_model 64 --num_layers 2 --num_heads 4 --learning_rate 3e-3 --warmup_steps 50 --max_steps 250".split()
STUDENT += "--per_device_train_batch_size 32".split()
RL = "--max_steps 400 --learning_rate 5e-4 --warmup_steps 20 --per_device_train_batch_size 64".split()
RL += "--num_generations 4 --max_completion_length 64 --logging_steps 50".split()
QUIET = ["--save_strategy", "no", "--disable_tqdm", "True"]
METRICS = {"bleu": "BLEU", "rougeL": "ROUGE-L", "teacher_nll_per_sequence": "teacher NLL / sequence"}
METRICS |= {"teacher_nll_per_token": "teacher NLL / token", "reward": "reward", "length_words": "words"}
METRICS |= {"distinct2": "distinct-2"}


def delexicalise(source: Path, target: Path) -> None:
    """Copies an E2E file with the values of `name` and `near` replaced in input and reference."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        source.open(newline="", encoding="utf-8") as reading,
        target.open("w", newline="", encoding="utf-8") as writing,
    ):
        writer = csv.DictWriter(writing, ["mr", "ref"])
        writer.writeheader()
        for row in csv.DictReader(reading):
            for attribute, placeholder in (("name", "NAME"), ("near", "NEAR")):
                value = re.search(rf"\b{attribute}\[(.*?)\]", row["mr"])
                if value:
                    row = {key: text.replace(value.group(1), placeholder) for key, text in row.items()}
            writer.writerow({"mr": row["mr"], "ref": row["ref"]})


def stage(recipe: str, done: Path, *flags: str, threads: int | None = None) -> None:
    """Runs one recipe unless its result is there already, on all cores or on `threads`.

    Raises:
        SystemExit: The recipe failed, or the result that is there was made with other flags.
    """
    if is_made(recipe, done, flags):
        return
    command = [sys.executable, str(RECIPES / f"{recipe}.py"), *map(str, flags), *begun_anew(flags)]
    print(f"{time.strftime('%H:%M:%S')} {recipe} for {done}", flush=True)
    started = time.perf_counter()
    limit = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    finished = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **limit})
    if finished.returncode:
        raise SystemExit(f"{' '.join(command)}\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}")
    mark_made(recipe, done, flags)
    print(f"{time.strftime('%H:%M:%S')} {done}: {time.perf_counter() - started:.0f} s", flush=True)


def stages(*calls: tuple) -> None:
    """Independent stages two at a time, each on half the cores: small models use one core better than two."""
    threads = max(1, (os.cpu_count() or 1) // 2)
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(lambda call: stage(*call, threads=threads), calls))


def run_seed(seed: int, work_dir: Path, templates: list[str]) -> dict[str, dict[str, float]]:
    """All stages of one seed; returns the test metrics of teacher, warm start, PPO and RLOO."""
    here, train, test = work_dir / f"seed{seed}", work_dir / "train.csv", work_dir / "test.csv"
    names = ("teacher", "pseudo.jsonl", "warm", "ppo", "rloo")
    teacher, pseudo, warm, ppo, rloo = (here / name for name in names)
    common = ["--seed", str(seed), *QUIET]
    stage(
        "sft",
        teacher / "config.json",
        "--dataset",
        train,
        *DATA_FLAGS,
        *templates,
        "--output_dir",
        teacher,
        *TEACHER,
        *common,
    )
    stage(
        "pseudo_label",
        pseudo,
        "--teacher",
        teacher,
        "--dataset",
        train,
        *DATA_FLAGS,
        *templates,
        "--output",
        pseudo,
    )
    labels = ["--dataset", pseudo, "--source_column", "mr", "--target_column", "pseudo_label"]
    stage("sft", warm / "config.json", *labels, "--tokenizer", teacher, "--output_dir", warm, *STUDENT, *common)
    pair = ["--teacher", teacher, "--student", warm, "--dataset", train, *DATA_FLAGS, *templates]
    stages(
        ("ppo_kd", ppo / "metrics.json", *pair, "--output_dir", ppo, *RL, *common),
        ("rloo_kd", rloo / "metrics.json", *pair, "--output_dir", rloo, *RL, *common),
    )
    students = {"warm start": warm, "PPO": ppo, "RLOO": rloo}
    on_test = ["--teacher", teacher, "--dataset", test, *DATA_FLAGS, *templates]
    stages(
        *(
            ("evaluate", s / "test" / "metrics.json", "--student", s, *on_test, "--output_dir", s / "test")
            for s in students.values()
        )
    )
    results = {}
    for name, student in students.items():
        metrics = json.loads((student / "test" / "metrics.json").read_text(encoding="utf-8"))
        results["teacher"], results[name] = metrics["teacher"], metrics["student"]
    return results


def table(per_seed: dict[int, dict[str, dict[str, float]]]) -> str:
    """Mean ± standard deviation over seeds, in Markdown."""
    rows = []
    for model in next(iter(per_seed.values())):
        cells = []
        for metric in METRICS:
            values = [results[model][metric] for results in per_seed.values()]
            spread = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}")
        rows.append([model, *cells])
    return markdown_table(["model", *METRICS.values()], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--templates", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/e2e"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    for source, name in ((args.train, "train.csv"), (args.test, "test.csv")):
        if not (args.work_dir / name).exists():
            delexicalise(source, args.work_dir / name)
    templates = ["--templates", str(args.templates), "--template_names", *TEMPLATE_NAMES]
    per_seed, started = {}, time.perf_counter()
    for seed in args.seeds:
        per_seed[seed] = run_seed(seed, args.work_dir, templates)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall, cpu = time.perf_counter() - started, used.ru_utime + used.ru_stime
    print(f"{wall:.0f} s, {cpu:.0f} s of CPU time, stages that were done already not counted", flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "e2e.json").write_text(json.dumps(per_seed, indent=2) + "\n", encoding="utf-8")
    seeds = ", ".join(map(str, args.seeds))
    text = f"E2E test set, delexicalised, greedy outputs; mean ± standard deviation over seeds {seeds}.\n\n"
    text += table(per_seed) + "\n"
    (RESULTS / "e2e.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
