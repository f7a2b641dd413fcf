r"""The embedded demo over several seeds: what each choice of `average_reward` does to BLEU, reward and length.

    OMP_NUM_THREADS=1 python recipes/benchmarks/demo_seeds.py --methods ppo_kd --averages none prompt rollout

The demo's data, teacher and warm start of each seed, made once, and its presets: a run is what the recipe does with
`--seed N`, from models that are named and not trained anew. Every run is measured on both held-out splits, 60 inputs
of validation and 100 of test; settings are to be chosen by the former. `--flags name=value` goes to every run, beside
or instead of the preset's: `--flags level=token`, `--flags learning_rate=2e-4 max_steps=150`. A finished run is not
run again. Prints the tables, and with `--results` writes them to a file.
"""

import argparse
import json
import shlex
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import yaml
from e2e import RECIPES, stage

from rlkd_trl.commands.arguments import PromptArguments
from rlkd_trl.commands.demo import DemoRequest, make_demo_models, write_demo_files
from rlkd_trl.evaluation.tables import markdown_table

SPLITS = ("validation", "test")
HEADS = ["run", "seed", "BLEU before", "after", "teacher's", "reward gap closed"]
HEADS += ["NLL / token before", "after", "words before", "after", "CPU s"]


def models_of(seed: int, work_dir: Path, prompts: PromptArguments) -> DemoRequest:
    """The demo's teacher and warm start of a seed, trained unless they are there."""
    request = DemoRequest(str(work_dir / f"seed{seed}" / "models"), asdict(prompts), seed)
    if not Path(request.student, "config.json").is_file():
        make_demo_models(request)
    return request


def measured(run: Path, split: str) -> dict[str, dict[str, float]]:
    """Metrics of teacher, before and after."""
    name = "metrics.json" if split == "validation" else "test.json"
    return json.loads((run / name).read_text(encoding="utf-8"))


def train_and_measure(recipe: str, seed: int, flags: list[str], run: Path, work_dir: Path) -> None:
    """One run, measured on validation inputs as it goes, and on test inputs afterwards."""
    preset = RECIPES / "configs" / f"demo_{recipe.removesuffix('_kd')}.yaml"
    values = yaml.safe_load(preset.read_text(encoding="utf-8"))
    prompts = PromptArguments(templates=values["templates"], template_names=values["template_names"])
    models = models_of(seed, work_dir, prompts)
    data = {split: work_dir / "data" / f"{split}.jsonl" for split in ("train", *SPLITS)}
    if not data["test"].is_file():
        write_demo_files(work_dir / "data")
    of_demo = ["--config", preset, "--teacher", models.teacher, "--student", models.student]
    of_demo += ["--dataset", data["train"], "--target_column", "references", "--eval_dataset", data["validation"]]
    quiet = ["--output_dir", run, "--disable_tqdm", "True", "--seed", str(seed)]
    stage(recipe, run / "finished.json", *of_demo, *quiet, *flags, threads=1)

    def on_test(student: str | Path, output_dir: Path) -> dict[str, dict[str, float]]:
        template_flags = ["--templates", prompts.templates, "--template_names", *prompts.template_names]
        template_flags += ["--dataset", data["test"], "--target_column", "references", "--teacher", models.teacher]
        lengths = ["--max_completion_length", values["max_completion_length"], "--batch_size", "100"]
        results = output_dir / "metrics.json"
        stage(
            "evaluate", results, "--student", student, *template_flags, *lengths, "--output_dir", output_dir, threads=1
        )
        return json.loads(results.read_text(encoding="utf-8"))

    before = on_test(models.student, work_dir / f"seed{seed}" / "before_test")
    results = {"teacher": before["teacher"], "before": before["student"]}
    results["after"] = on_test(run, run.with_name(f"{run.name}-test"))["student"]
    (run / "test.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def row_of(name: str, seed: int, run: Path, split: str) -> dict[str, float | str]:
    metrics = measured(run, split)
    teacher, before, after = (metrics[model] for model in ("teacher", "before", "after"))
    cost = json.loads((run / "cost.json").read_text(encoding="utf-8"))
    closed = (after["reward"] - before["reward"]) / (teacher["reward"] - before["reward"])
    numbers = [before["bleu"], after["bleu"], teacher["bleu"], 100 * closed]
    numbers += [before["teacher_nll_per_token"], after["teacher_nll_per_token"]]
    numbers += [before["length_words"], after["length_words"], cost["cpu_seconds"]]
    return {"run": name, "seed": seed, "numbers": numbers}


def cells(numbers: list[float]) -> list[str]:
    formats = [".1f", ".1f", ".1f", ".0f", ".3f", ".3f", ".1f", ".1f", ".0f"]
    shown = [format(value, spec) for value, spec in zip(numbers, formats, strict=True)]
    shown[3] += " %"
    return shown


def table(rows: list[dict]) -> str:
    """A line for each run, and its mean over seeds."""
    lines = []
    for name in dict.fromkeys(row["run"] for row in rows):
        of_run = [row for row in rows if row["run"] == name]
        lines += [[name, str(row["seed"]), *cells(row["numbers"])] for row in of_run]
        means = [statistics.fmean(column) for column in zip(*(row["numbers"] for row in of_run), strict=True)]
        lost = sum(row["numbers"][1] < row["numbers"][0] for row in of_run)
        lines.append([f"**{name}**", f"mean; {lost} lost BLEU", *cells(means)])
    return markdown_table(HEADS, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["ppo_kd", "rloo_kd"])
    parser.add_argument("--averages", nargs="+", default=["none", "prompt", "rollout"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--flags", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/demo_seeds"))
    parser.add_argument("--results", type=Path, help="Markdown file for the tables.")
    args = parser.parse_args()

    rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for recipe in args.methods:
        for average in args.averages:
            flags = [f"--average_reward={average}", *(f"--{flag}" for flag in args.flags)]
            name = " ".join([recipe.removesuffix("_kd"), average, *args.flags])
            for seed in args.seeds:
                run = args.work_dir / f"seed{seed}" / name.replace(" ", "-")
                if not (run / "test.json").is_file():
                    train_and_measure(recipe, seed, flags, run, args.work_dir)
                for split in SPLITS:
                    rows[split].append(row_of(name, seed, run, split))
    sections = [f"## {split.capitalize()} inputs\n\n{table(of_split)}\n" for split, of_split in rows.items()]
    text = f"Made by `python {shlex.join(sys.argv)}`.\n\n" + "\n".join(sections)
    print(text)
    if args.results is not None:
        args.results.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
