r"""How close does a student without data come to one with data? On E2E (Novikova et al. 2017), with the recipes.

    python recipes/benchmarks/without_data.py --train e2e/train.csv --test e2e/test.csv --work_dir runs/without_data

The two CSV files have the columns `mr` and `ref`; restaurant names are delexicalised as in e2e.py. One T5 teacher from
scratch learns to describe ("Describe: {{ mr }}") and, as T0 did, the inverse: "Invent a restaurant." has inputs as its
answers. Then the same small students learn from its greedy answers to as many inputs: those of the data, its own
(`generate_data.py`), and recombinations of slots, whose schema lists the values that occur in the training inputs.
All of it is done anew for each seed, the teacher too. The same command goes on where it stopped; `--smoke` does it in
small.

Writes `without_data.json` and `without_data.md` to `--results_dir`.
"""

import argparse
import csv
import json
import re
from pathlib import Path

from e2e import RESULTS, delexicalise
from result_files import made_by, over_seeds, shown, write_results
from stages import Stages

from rlkd_trl.evaluation.tables import markdown_table

DESCRIBE, INVENT = "Describe: {{ mr }}", "Invent a restaurant."
TEACHER = "--d_model 128 --num_layers 2 --num_heads 8 --dropout 0 --vocab_size 1200 --learning_rate 4e-3".split()
TEACHER += "--warmup_steps 100 --per_device_train_batch_size 32 --save_strategy no --disable_tqdm True".split()
STUDENT = "--d_model 64 --num_layers 2 --num_heads 4 --learning_rate 3e-3 --warmup_steps 50".split()
STUDENT += "--per_device_train_batch_size 32 --save_strategy no --disable_tqdm True".split()
SOURCES = ("data", "inverse", "schema")  # of the inputs: the data, the teacher, recombined slots
METRICS = {"bleu": "BLEU", "rougeL": "ROUGE-L", "teacher_nll_per_token": "teacher NLL / token", "tokens": "tokens"}
FORMS = {"bleu": ".1f", "rougeL": ".1f", "teacher_nll_per_token": ".3f", "tokens": ".1f"}  # of the metrics


def inputs_of(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(dict.fromkeys(row["mr"] for row in csv.DictReader(file)))


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_teachers_data(train: Path, path: Path) -> None:
    """Each pair as a description, and each of its inputs once more as an answer to the inverse question."""
    with train.open(newline="", encoding="utf-8") as file:
        pairs = list(csv.DictReader(file))
    rows = [{"question": DESCRIBE.replace("{{ mr }}", row["mr"]), "answer": row["ref"]} for row in pairs]
    rows += [{"question": INVENT, "answer": row["mr"]} for row in pairs[::3]]
    write_rows(path, rows)


def write_schema(inputs: list[str], path: Path) -> None:
    slots: dict[str, dict[str, None]] = {}
    for text in inputs:
        for slot, value in re.findall(r"(\w+)\[(.*?)\]", text):
            slots.setdefault(slot, {})[value] = None
    schema = {"slots": {slot: list(values) for slot, values in slots.items()}, "required": ["name"]}
    path.write_text(json.dumps(schema, indent=1), encoding="utf-8")


def run_seed(
    args: argparse.Namespace, stages: Stages, here: Path, seed: int, train: Path, test: Path
) -> dict[str, dict]:
    """All stages with this seed; of the teacher, and of each source of inputs, metrics and what the inputs are."""
    real, tested = inputs_of(train), set(inputs_of(test))
    teacher = here / "teacher"
    here.mkdir(parents=True, exist_ok=True)
    write_teachers_data(train, here / "teachers_data.csv")
    write_schema(real, here / "schema.json")
    of_teacher = ["--dataset", here / "teachers_data.csv", "--source_column", "question", "--target_column", "answer"]
    of_teacher += ["--max_steps", args.teacher_steps, "--seed", seed, "--output_dir", teacher, *TEACHER]
    stages.run("sft", teacher / "config.json", *of_teacher)

    files = {name: here / f"{name}.jsonl" for name in SOURCES}
    spread = real[:: max(1, len(real) // args.num_rows)][: args.num_rows]
    files["data"].write_text("".join(json.dumps({"source": text}) + "\n" for text in spread), encoding="utf-8")
    teacher_flags = ["--teacher", teacher, "--template", INVENT, "--num_rows", args.num_rows, "--max_input_length", 80]
    for name, flags in (("inverse", []), ("schema", ["--schema", here / "schema.json"])):
        stages.run("generate_data", files[name], *teacher_flags, "--seed", seed, *flags, "--output", files[name])

    results: dict[str, dict] = {}
    describe = ["--teacher", teacher, "--template", DESCRIBE]
    for name, path in files.items():
        labels, student = here / f"{name}_labels.jsonl", here / name
        from_source = ["--source_column", "source", "--rename_columns", "source=mr"]
        stages.run("pseudo_label", labels, *describe, "--dataset", path, *from_source, "--output", labels)
        pairs = ["--dataset", labels, "--source_column", "source", "--target_column", "pseudo_label"]
        learn = ["--tokenizer", teacher, "--max_steps", args.student_steps, "--seed", seed, "--output_dir", student]
        stages.run("sft", student / "config.json", *pairs, *STUDENT, *learn)
        on_test = ["--dataset", test, "--source_column", "mr", "--target_column", "ref", "--max_rows", args.test_rows]
        tested_in = here / f"{name}_test"
        on_test += ["--student", student, "--output_dir", tested_in]
        stages.run("evaluate", tested_in / "metrics.json", *describe, *on_test)
        metrics = json.loads((tested_in / "metrics.json").read_text(encoding="utf-8"))
        with labels.open(encoding="utf-8") as file:
            rows = [json.loads(line)["source"] for line in file]
        results["teacher"] = {"metrics": metrics["teacher"]}
        results[name] = {
            "metrics": metrics["student"],
            "inputs": len(rows),
            "in the training data": len(set(real) & set(rows)),
            "test inputs among them": len(tested & set(rows)),
        }
    return results


def table(per_seed: dict[int, dict[str, dict]]) -> str:
    rows = []
    for name in ("teacher", *SOURCES):
        of_seeds = [of_kinds[name] for of_kinds in per_seed.values()]
        cells = [shown([result["metrics"][metric] for result in of_seeds], form) for metric, form in FORMS.items()]
        counts = [
            ", ".join(str(result.get(key, "–")) for result in of_seeds) if name != "teacher" else "–"
            for key in ("inputs", "in the training data", "test inputs among them")
        ]
        rows.append([name, *cells, *counts])
    for name in SOURCES[1:]:
        of_seeds = [(of_kinds[name]["metrics"], of_kinds["data"]["metrics"]) for of_kinds in per_seed.values()]
        cells = [
            shown([result[metric] - data[metric] for result, data in of_seeds], form) for metric, form in FORMS.items()
        ]
        rows.append([f"{name} less data", *cells, "", "", ""])
    header = ["inputs from", *METRICS.values(), "distinct inputs", "in the training data", "in the test data"]
    return markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/without_data"))
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--teacher_steps", type=int, default=600)
    parser.add_argument("--student_steps", type=int, default=200)
    parser.add_argument("--num_rows", type=int, default=500, help="inputs of each source")
    parser.add_argument("--test_rows", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--smoke", action="store_true", help="all of it in small: its numbers say nothing")
    args = parser.parse_args()
    if args.smoke:
        args.teacher_steps, args.student_steps, args.num_rows, args.test_rows, args.seeds = 60, 2, 10, 4, [0]
    train, test = args.work_dir / "train.csv", args.work_dir / "test.csv"
    for source, target in ((args.train, train), (args.test, test)):
        if not target.exists():
            delexicalise(source, target)
    stages = Stages(args.work_dir)
    per_seed = {seed: run_seed(args, stages, args.work_dir / f"seed{seed}", seed, train, test) for seed in args.seeds}
    text = (
        f"E2E, delexicalised; {args.test_rows} test inputs, greedy outputs; teachers of {args.teacher_steps} steps, "
        f"students of {args.student_steps}. {over_seeds(len(per_seed))} Teacher, inputs and students have that seed; "
        f"counts are of each. {stages.cpu_seconds:.0f} s of CPU time in all. {made_by()}\n\n{table(per_seed)}\n"
    )
    write_results(args.results_dir, "without_data", per_seed, text)


if __name__ == "__main__":
    main()
