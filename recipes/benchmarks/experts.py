r"""One student of two experts, each of a part of the inputs: who is to say how much? On E2E (Novikova et al. 2017).

    python recipes/benchmarks/experts.py --train e2e/train.csv --work_dir runs/experts

The CSV file has the columns `mr` and `ref` (devset.csv of the E2E dataset); names are delexicalised as in `e2e.py`.
200 of its 547 inputs, drawn with seed 0, are the test inputs with all their references. Inputs with the attribute
`near` are one domain, those without it the other. Teachers are T5 from scratch of one size, one tokenizer and the same
number of steps: an expert of each domain, which has seen nothing of the other, and a generalist of both. Students are
smaller T5 with random weights, which learn from all training inputs' references and

    generalist     that teacher
    near, without  one expert alone
    equal          both experts, equal weights
    validation     both, by their losses on 40 held-out inputs (`--teacher_weighting validation`)
    per example    both, by their losses on each example, as MT-BERT does (`--teacher_weighting per_example`)
    routed         of each example the expert of its domain (`--teacher_column`)

by the preset `word_kd` (next-token distributions along the references), for the same number of steps. Then the student
of equal weights is trained further by PPO, whose rewards are those of both experts with equal weights, per example, or
routed; the references serve the weights alone.

One seed decides about random weights and order; ways are compared seed by seed. Measured on the test inputs of each
domain: cross-entropy on the references as in `ensemble.py`, and BLEU of greedy outputs. A finished stage is not run
again; `--smoke` does all in small. Writes `experts.json` and `experts.md` to `--results_dir`.
"""

import argparse
import csv
from pathlib import Path

from assistants import PRESETS, TEACHER, cpu_seconds, measured
from e2e import DATA_FLAGS, QUIET, RECIPES, RESULTS, delexicalise
from e2e_comparison import drawn_inputs, read_rows, write_rows
from result_files import made_by, over_seeds, shown, write_results
from stages import Stages
from transformers import AutoTokenizer

from rlkd_trl.evaluation.tables import markdown_table
from rlkd_trl.students.from_scratch import new_model

TEST_INPUTS, HELD_OUT_INPUTS = 200, 40
DOMAINS = ("near", "without")
STUDENT = {"d_model": 64, "num_layers": 2, "num_heads": 4, "dropout": 0.0}
EACH_RUN = "--warmup_steps 20 --per_device_train_batch_size 32 --max_completion_length 64".split()
EACH_RUN += ["--per_device_eval_batch_size", "100"]
KD = ["--config", PRESETS / "word_kd.yaml", "--learning_rate", "3e-3"]
PPO = ["--config", RECIPES / "configs" / "methods" / "ppo_kd" / "ppo.yaml", "--learning_rate", "2e-4"]
ROUTED = ["--teacher_column", "expert"]
PER_EXAMPLE = ["--teacher_weighting", "per_example"]
# What students learn from: teachers, and who has how much to say.
WAYS = {
    "generalist": (["generalist"], []),
    "near": (["near"], []),
    "without": (["without"], []),
    "equal": (DOMAINS, []),
    "validation": (DOMAINS, ["--teacher_weighting", "validation"]),
    "per example": (DOMAINS, PER_EXAMPLE),
    "routed": (DOMAINS, ROUTED),
}
REWARDS = {"PPO, equal": [], "PPO, per example": PER_EXAMPLE, "PPO, routed": ROUTED}
BASELINE = {**dict.fromkeys(WAYS, "equal"), **dict.fromkeys(REWARDS, "PPO, equal")}
METRICS = {"nats": ("nats / token", ".3f"), "bleu": ("BLEU", ".1f")}


def domain_of(row: dict[str, str]) -> str:
    return "near" if "near[" in row["mr"] else "without"


def make_data(train: Path, here: Path) -> None:
    delexicalise(train, here / "all.csv")
    test, held_out, rest = drawn_inputs(read_rows(here / "all.csv"), TEST_INPUTS, HELD_OUT_INPUTS)
    write_rows(here / "test.csv", test)
    write_rows(here / "generalist.csv", rest)
    for domain in DOMAINS:
        write_rows(here / f"{domain}.csv", [row for row in rest if domain_of(row) == domain])
    for name, rows in (("train", rest), ("held_out", held_out)):
        with (here / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["mr", "ref", "expert"])
            writer.writeheader()
            writer.writerows({**row, "expert": domain_of(row)} for row in rows)


def make_teachers(stages: Stages, here: Path, steps: int) -> None:
    """The generalist first, whose tokenizer has the words of both domains."""
    for name in ("generalist", *DOMAINS):
        of_teacher = ["--dataset", here / f"{name}.csv", *DATA_FLAGS, "--max_steps", steps, *TEACHER, *QUIET]
        tokenizer = [] if name == "generalist" else ["--tokenizer", here / "generalist"]
        stages.run("sft", here / name / "finished.json", *of_teacher, *tokenizer, "--output_dir", here / name)


def run_seed(stages: Stages, here: Path, seed: int, steps: int, ppo_steps: int) -> dict[str, Path]:
    """Each way's student."""
    begin = here / f"seed{seed}" / "begin"
    if not (begin / "config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(here / "generalist")
        new_model(tokenizer, **STUDENT, seed=seed).save_pretrained(begin)
        tokenizer.save_pretrained(begin)
    of_run = ["--dataset", here / "train.csv", "--eval_dataset", here / "held_out.csv", *DATA_FLAGS, *EACH_RUN, *QUIET]
    of_run += ["--seed", seed]
    students = {way: here / f"seed{seed}" / way.replace(", ", "_").replace(" ", "_") for way in [*WAYS, *REWARDS]}
    for way, (names, weights) in WAYS.items():
        asked = [
            "--teacher",
            *(here / name for name in names),
            *weights,
            "--student",
            begin,
            *KD,
            "--max_steps",
            steps,
        ]
        stages.run("kd", students[way] / "finished.json", *of_run, *asked, "--output_dir", students[way])
    for way, weights in REWARDS.items():
        asked = ["--teacher", *(here / name for name in DOMAINS), *weights, "--student", students["equal"], *PPO]
        asked += ["--max_steps", ppo_steps]
        stages.run("ppo_kd", students[way] / "finished.json", *of_run, *asked, "--output_dir", students[way])
    return students


def by_domain(model: Path, rows: list[dict[str, str]]) -> dict[str, dict[str, float]]:
    return {
        domain: measured(model, [row for row in rows if domain_of(row) == domain], f"measured_{domain}.json")
        for domain in DOMAINS
    }


def table(teachers: dict[str, dict], found: dict[str, list[dict]]) -> str:
    """Of each domain every metric; for each way also its difference from equal weights."""
    columns = [(domain, metric, form) for domain in DOMAINS for metric, (_, form) in METRICS.items()]
    rows = [
        [f"teacher: {name}", *(format(of_domains[domain][metric], form) for domain, metric, form in columns), ""]
        for name, of_domains in teachers.items()
    ]
    for way, of_seeds in found.items():
        cells = [shown([one[domain][metric] for one in of_seeds], form) for domain, metric, form in columns]
        rows.append([way, *cells, shown([one["cpu_seconds"] for one in of_seeds], ".0f")])
    for way, baseline in BASELINE.items():
        if way != baseline:
            pairs = list(zip(found[way], found[baseline], strict=True))
            cells = [
                shown([one[domain][metric] - other[domain][metric] for one, other in pairs], form)
                for domain, metric, form in columns
            ]
            rows.append([f"{way} less {baseline}", *cells, ""])
    heads = [f"{METRICS[metric][0]}, {domain}" for domain, metric, _ in columns]
    return markdown_table(["model", *heads, "CPU s of training"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/experts"))
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--teacher_steps", type=int, default=400)
    parser.add_argument("--max_steps", type=int, default=200, help="of each student")
    parser.add_argument("--ppo_steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--smoke", action="store_true", help="all of it in small: its numbers say nothing")
    args = parser.parse_args()
    if args.smoke:
        args.teacher_steps, args.max_steps, args.ppo_steps, args.seeds = 10, 2, 2, [0]
    here = args.work_dir
    make_data(args.train, here)
    stages = Stages(here)
    make_teachers(stages, here, args.teacher_steps)
    students = [run_seed(stages, here, seed, args.max_steps, args.ppo_steps) for seed in args.seeds]
    test = read_rows(here / "test.csv")
    teachers = {name: by_domain(here / name, test) for name in ("generalist", *DOMAINS)}
    found = {
        way: [by_domain(of_seed[way], test) | {"cpu_seconds": cpu_seconds(of_seed[way])} for of_seed in students]
        for way in [*WAYS, *REWARDS]
    }
    inputs = {domain: len({row["mr"] for row in test if domain_of(row) == domain}) for domain in DOMAINS}
    about = (
        f"E2E, delexicalised; two domains, inputs with `near` and without it, of which {inputs['near']} and "
        f"{inputs['without']} are for the test; T5 from scratch: teachers of {args.teacher_steps} steps and "
        f"{teachers['near']['near']['parameters'] / 1e6:.2f} million parameters, students of {args.max_steps} and "
        f"{found['equal'][0]['near']['parameters'] / 1e6:.2f}; {args.ppo_steps} steps of PPO; 32 texts a step. "
        f"{over_seeds(len(args.seeds))} Teachers have one seed."
    )
    text = f"{about}\n\n{table(teachers, found)}\n\n{made_by()} {stages.cpu_seconds:.0f} s of CPU time in all.\n"
    write_results(args.results_dir, "experts", {"teachers": teachers, "students": found}, text)


if __name__ == "__main__":
    main()
