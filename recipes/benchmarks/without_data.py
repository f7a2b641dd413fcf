r"""How close does a student without data come to one with data? On E2E (Novikova et al. 2017), with the recipes.

    python recipes/benchmarks/without_data.py --train e2e/train.csv --test e2e/test.csv --work_dir runs/without_data

The two CSV files have the columns `mr` and `ref`; restaurant names are delexicalised as in e2e.py. One T5 teacher from
scratch learns to describe ("Describe: {{ mr }}") and, as T0 did, the inverse: "Invent a restaurant." has inputs as its
answers. Then the same small students learn from its greedy answers to as many inputs: those of the data, its own
(`generate_data.py`), and recombinations of slots, whose schema lists the values that occur in the training inputs.

Writes `results/without_data.json` and `.md` beside this file.
"""

import argparse
import csv
import json
import re
import resource
import statistics
from pathlib import Path

from e2e import RESULTS, delexicalise, stage
from result_files import made_by, write_results

from rlkd_trl.evaluation.tables import markdown_table

DESCRIBE, INVENT = "Describe: {{ mr }}", "Invent a restaurant."
TEACHER = "--d_model 128 --num_layers 2 --num_heads 8 --dropout 0 --vocab_size 1200 --learning_rate 4e-3".split()
TEACHER += "--warmup_steps 100 --per_device_train_batch_size 32 --save_strategy no --disable_tqdm True".split()
STUDENT = "--d_model 64 --num_layers 2 --num_heads 4 --learning_rate 3e-3 --warmup_steps 50 --max_steps 200".split()
STUDENT += "--per_device_train_batch_size 32 --save_strategy no --disable_tqdm True".split()
METRICS = {"bleu": "BLEU", "rougeL": "ROUGE-L", "teacher_nll_per_token": "teacher NLL / token", "tokens": "tokens"}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/without_data"))
    parser.add_argument("--teacher_steps", type=int, default=600)
    parser.add_argument("--num_rows", type=int, default=500)
    parser.add_argument("--test_rows", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    place, teacher = args.work_dir, args.work_dir / "teacher"
    train, test = place / "train.csv", place / "test.csv"
    for source, target in ((args.train, train), (args.test, test)):
        if not target.exists():
            delexicalise(source, target)
    real, tested = inputs_of(train), set(inputs_of(test))
    write_teachers_data(train, place / "teachers_data.csv")
    write_schema(real, place / "schema.json")
    of_teacher = ["--dataset", place / "teachers_data.csv", "--source_column", "question", "--target_column", "answer"]
    stage(
        "sft",
        teacher / "config.json",
        *of_teacher,
        "--max_steps",
        args.teacher_steps,
        *TEACHER,
        "--output_dir",
        teacher,
    )

    # The inputs: of the data, of the teacher, of the schema.
    spread = real[:: max(1, len(real) // args.num_rows)][: args.num_rows]
    write_rows(place / "data.csv", [{"source": text} for text in spread])
    asked = ["--teacher", teacher, "--template", INVENT, "--num_rows", args.num_rows, "--max_input_length", 80]
    for name, flags in (("inverse", []), ("schema", ["--schema", place / "schema.json"])):
        path = place / f"{name}.jsonl"
        stage("generate_data", path, *asked, *flags, "--output", path)
    files = {"data": place / "data.csv", "inverse": place / "inverse.jsonl", "schema": place / "schema.jsonl"}

    results: dict[str, dict] = {}
    for name, path in files.items():
        labels = place / f"{name}_labels.jsonl"
        describe = ["--teacher", teacher, "--template", DESCRIBE]
        from_source = ["--source_column", "source", "--rename_columns", "source=mr"]
        stage("pseudo_label", labels, *describe, "--dataset", path, *from_source, "--output", labels)
        with labels.open(encoding="utf-8") as file:
            rows = [json.loads(line)["source"] for line in file]
        found = {"inputs": len(rows), "in the training data": sum(text in set(real) for text in rows)}
        found["test inputs among them"] = len(tested & set(rows))
        results[name] = {"inputs": found, "seeds": {}}
        for seed in args.seeds:
            student = place / f"{name}{seed}"
            pairs = ["--dataset", labels, "--source_column", "source", "--target_column", "pseudo_label"]
            learn = ["--tokenizer", teacher, "--seed", seed, "--output_dir", student]
            stage("sft", student / "config.json", *pairs, *STUDENT, *learn)
            on_test = ["--dataset", test, "--source_column", "mr", "--target_column", "ref"]
            tested_in = place / f"{name}{seed}_test"
            on_test += ["--max_rows", args.test_rows, "--output_dir", tested_in]
            stage("evaluate", tested_in / "metrics.json", *describe, "--student", student, *on_test)
            metrics = json.loads((tested_in / "metrics.json").read_text(encoding="utf-8"))
            results[name]["seeds"][seed], results["teacher"] = metrics["student"], {"seeds": {0: metrics["teacher"]}}
    write(results, args)


def write(results: dict[str, dict], args: argparse.Namespace) -> None:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = args.work_dir / "cpu_seconds"  # of the stages, also of earlier calls
    seconds = used.ru_utime + used.ru_stime + (float(spent.read_text()) if spent.exists() else 0.0)
    spent.write_text(str(seconds))
    rows = []
    for name, found in results.items():
        cells = []
        for metric in METRICS:
            values = [metrics[metric] for metrics in found["seeds"].values()]
            cells.append(f"{statistics.mean(values):.3g} ({', '.join(f'{value:.3g}' for value in values)})")
        counts = found.get("inputs", {})
        cells += [str(counts.get(key, "–")) for key in ("inputs", "in the training data")]
        rows.append([name, *cells])
    header = ["inputs from", *METRICS.values(), "distinct inputs", "of them in the training data"]
    text = (
        f"E2E, delexicalised; {args.test_rows} test inputs, greedy outputs; mean (each of {len(args.seeds)} student "
        f"seeds); one teacher of {args.teacher_steps} steps; {seconds:.0f} s of CPU time in all. {made_by()}\n\n"
        f"{markdown_table(header, rows)}\n"
    )
    write_results(RESULTS, "without_data", results, text)


if __name__ == "__main__":
    main()
