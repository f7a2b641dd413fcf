r"""Does a teacher assistant pay, at equal steps (Mirzadeh et al. 2020)? Chains and the direct way on E2E.

    python recipes/benchmarks/assistants.py --train e2e/train.csv --work_dir runs/assistants

The CSV file has the columns `mr` and `ref` (devset.csv of the E2E dataset); names are delexicalised as in `e2e.py`.
200 of its 547 inputs, drawn with seed 0, are the test inputs with all their references; all models learn from the
others' references. The teacher is a T5 from scratch, the student a far smaller one with random weights. Every way has
the same total of optimizer steps, of 32 references each:

    direct     the preset `word_kd`, all steps on the student
    chain      `assistant_kd.py`: half of them on an assistant of the geometric size between, half on the student
    dense      teacher and assistant teach the student, as in the last hop with `--dense` (DGKD, Son et al. 2021);
               the first hop is the chain's

One seed decides about random weights and order of a way; ways are compared seed by seed. Measured on the test inputs:
cross-entropy and next-token accuracy on the references as in `ensemble.py`, and BLEU of greedy outputs. A finished
stage is not run again; `--smoke` does all in small. Writes `assistants.json` and `assistants.md` to `--results_dir`.
"""

import argparse
import json
from pathlib import Path

from e2e import DATA_FLAGS, QUIET, RECIPES, RESULTS, delexicalise
from e2e_comparison import drawn_inputs, read_rows, write_rows
from ensemble import measure
from result_files import made_by, over_seeds, shown, write_results
from stages import Stages
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from rlkd_trl.evaluation.evaluate import evaluate_student
from rlkd_trl.evaluation.tables import markdown_table
from rlkd_trl.students import Policy
from rlkd_trl.students.from_scratch import new_model

TEST_INPUTS, HELD_OUT_INPUTS = 200, 4  # the second for the table that each recipe makes, which is not read here
TEACHER = "--d_model 128 --num_layers 2 --num_heads 8 --dropout 0 --vocab_size 1200 --learning_rate 4e-3".split()
TEACHER += "--warmup_steps 100 --per_device_train_batch_size 32 --seed 0".split()
STUDENT = {"d_model": 32, "num_layers": 1, "num_heads": 2, "dropout": 0.0}
RATE = "3e-3"
EACH_RUN = {"warmup_steps": "20", "per_device_train_batch_size": "32", "max_completion_length": "64"}
EACH_RUN |= {"per_device_eval_batch_size": "100"}
PRESETS = RECIPES / "configs" / "methods" / "kd"
WAYS = ("direct", "chain", "dense")
METRICS = {"nats": ("nats / token", ".3f"), "accuracy": ("next token right, %", ".1f"), "bleu": ("BLEU", ".1f")}


def make_data(train: Path, here: Path) -> None:
    delexicalise(train, here / "all.csv")
    test, held_out, rest = drawn_inputs(read_rows(here / "all.csv"), TEST_INPUTS, HELD_OUT_INPUTS)
    for name, rows in (("test", test), ("held_out", held_out), ("train", rest)):
        write_rows(here / f"{name}.csv", rows)


def run_seed(stages: Stages, here: Path, seed: int, steps: int) -> dict[str, Path]:
    """Each way's student."""
    place, teacher = here / f"seed{seed}", here / "teacher"
    begin = place / "begin"
    if not (begin / "config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(teacher)
        new_model(tokenizer, **STUDENT, seed=seed).save_pretrained(begin)
        tokenizer.save_pretrained(begin)
    of_run = ["--dataset", here / "train.csv", "--eval_dataset", here / "held_out.csv", *DATA_FLAGS]
    of_run += ["--student", begin, "--seed", seed]
    each = [word for name, value in EACH_RUN.items() for word in (f"--{name}", value)]
    word_kd = ["--config", PRESETS / "word_kd.yaml", "--learning_rate", RATE, *each, *QUIET]
    on_assistant, on_student = steps - steps // 2, steps // 2
    direct, chain, dense = (place / way for way in WAYS)
    asked = [*of_run, "--teacher", teacher, *word_kd]
    stages.run("kd", direct / "finished.json", *asked, "--max_steps", steps, "--output_dir", direct)
    hops = ["--methods", "word_kd", "--max_steps", on_assistant, on_student, "--learning_rates", RATE]
    hops += ["--common", "save_strategy=no", *(f"{name}={value}" for name, value in EACH_RUN.items())]
    stages.run("assistant_kd", chain / "chain.json", *of_run, "--teacher", teacher, *hops, "--output_dir", chain)
    asked = [*of_run, "--teacher", teacher, chain / "assistant1", *word_kd]
    stages.run("kd", dense / "finished.json", *asked, "--max_steps", on_student, "--output_dir", dense)
    return {"direct": direct, "chain": chain / "student", "dense": dense}


def measured(model: Path, rows: list[dict[str, str]], name: str = "measured.json") -> dict[str, float]:
    """On the test inputs; kept beside the model, in a file of this name."""
    file = model / name
    if not file.is_file():
        references: dict[str, list[str]] = {}
        for row in rows:
            references.setdefault(row["mr"], []).append(row["ref"])
        prompts = [{"prompt": text, "references": of_text} for text, of_text in references.items()]
        tokenizer = AutoTokenizer.from_pretrained(model)
        policy = Policy(AutoModelForSeq2SeqLM.from_pretrained(model).eval(), tokenizer)
        lengths = {"max_prompt_length": None, "max_completion_length": 64}
        metrics = evaluate_student(policy, tokenizer, prompts, None, **lengths).metrics
        measures = {**measure([model], rows), "bleu": metrics["bleu"], "parameters": policy.model.num_parameters()}
        file.write_text(json.dumps(measures) + "\n", encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def cpu_seconds(run: Path) -> float:
    return json.loads((run / "cost.json").read_text(encoding="utf-8"))["cpu_seconds"]


def found_of(way: str, students: dict[str, Path], rows: list[dict[str, str]]) -> dict[str, float]:
    """What a way's student is worth, and the CPU seconds of its training and of its assistant's."""
    seconds = cpu_seconds(students[way])
    if way != "direct":
        seconds += cpu_seconds(students["chain"].parent / "assistant1")
    return measured(students[way], rows) | {"cpu_seconds": seconds}


def table(teacher: dict[str, float], measures: dict[str, list[dict[str, float]]]) -> str:
    rows = [["teacher", *(format(teacher[name], form) for name, (_, form) in METRICS.items()), ""]]
    for way, of_seeds in measures.items():
        cells = [shown([of_seed[name] for of_seed in of_seeds], form) for name, (_, form) in METRICS.items()]
        rows.append([way, *cells, shown([of_seed["cpu_seconds"] for of_seed in of_seeds], ".0f")])
    for way in [way for way in measures if way != "direct"]:
        pairs = list(zip(measures[way], measures["direct"], strict=True))
        cells = [
            shown([of_seed[name] - direct[name] for of_seed, direct in pairs], form)
            for name, (_, form) in METRICS.items()
        ]
        rows.append([f"{way} less direct", *cells, ""])
    return markdown_table(["model", *(head for head, _ in METRICS.values()), "CPU s of training"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/assistants"))
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--teacher_steps", type=int, default=400)
    parser.add_argument("--max_steps", type=int, default=200, help="of each way, in all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--smoke", action="store_true", help="all of it in small: its numbers say nothing")
    args = parser.parse_args()
    if args.smoke:
        args.teacher_steps, args.max_steps, args.seeds = 20, 4, [0]
    here, teacher = args.work_dir, args.work_dir / "teacher"
    make_data(args.train, here)
    stages = Stages(here)
    of_teacher = ["--dataset", here / "train.csv", *DATA_FLAGS, "--max_steps", args.teacher_steps, *TEACHER, *QUIET]
    stages.run("sft", teacher / "finished.json", *of_teacher, "--output_dir", teacher)
    students = [run_seed(stages, here, seed, args.max_steps) for seed in args.seeds]
    test = read_rows(here / "test.csv")
    measures = {way: [found_of(way, of_seed, test) for of_seed in students] for way in WAYS}
    of_teacher = measured(teacher, test)
    assistant = measured(here / f"seed{args.seeds[0]}" / "chain" / "assistant1", test)
    sizes = [f"{of_model['parameters'] / 1e6:.2f}" for of_model in (of_teacher, assistant, measures["direct"][0])]
    text = (
        f"E2E, delexicalised, {TEST_INPUTS} test inputs with {len(test)} references; T5 from scratch: a teacher of "
        f"{args.teacher_steps} steps and {sizes[0]} million parameters, an assistant of {sizes[1]}, a student of "
        f"{sizes[2]}. {args.max_steps} steps of 32 in each way. {over_seeds(len(args.seeds))}\n\n"
        f"{table(of_teacher, measures)}\n\n{made_by()} {stages.cpu_seconds:.0f} s of CPU time in all.\n"
    )
    results = {"teacher": of_teacher, "assistant": assistant, "ways": measures}
    write_results(args.results_dir, "assistants", results, text)


if __name__ == "__main__":
    main()
