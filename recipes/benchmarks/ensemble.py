r"""Hinton, Vinyals & Dean (2015), §3: a model, an ensemble of such models, and one distilled from it, on E2E.

    python recipes/benchmarks/ensemble.py --train e2e/train.csv --work_dir runs/ensemble

The CSV file has the columns `mr` and `ref` (devset.csv of the E2E dataset); names are delexicalised as in `e2e.py`.
200 of its 547 inputs, drawn with seed 0, are the test inputs with all their references. All models are T5 of one size
and one tokenizer, trained from random weights for the same number of steps on the same data by `kd.py`, and differ in
the seed of weights and order and in what they learn from:

    base       the references alone (the preset `seq_kd` on them): k = 3 models
    ensemble   no training: the mean of the k models' probabilities
    distilled  the preset `hinton` with these k models as teachers (soft targets at T = 2, a tenth hard), by seeds

Measured on the test inputs' references, token by token as Hinton measures frames: cross-entropy in nats and accuracy
of the next token. A finished stage is not run again; one of other settings is refused. Writes `results/ensemble.json`
and `results/ensemble.md`.
"""

import argparse
import json
from pathlib import Path

import torch
from e2e import DATA_FLAGS, QUIET, RECIPES, RESULTS, delexicalise, stage
from e2e_comparison import drawn_inputs, read_rows, write_rows
from result_files import made_by, shown, write_results
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerBase

from rlkd_trl.data import train_tokenizer
from rlkd_trl.evaluation.tables import markdown_table
from rlkd_trl.ops.divergences import mean_of_probabilities
from rlkd_trl.students import Policy
from rlkd_trl.students.from_scratch import new_model

TEST_INPUTS = 200
BASE_SEEDS = (0, 1, 2)
SIZE = {"d_model": 64, "num_layers": 2, "num_heads": 4, "dropout": 0.1}
TRAINING = "--learning_rate 3e-3 --warmup_steps 30 --per_device_train_batch_size 32 --max_completion_length 64".split()
PRESETS = RECIPES / "configs" / "methods" / "kd"


def random_weights(here: Path, seed: int, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A new model with this seed; its directory."""
    begin = here / f"begin{seed}"
    new_model(tokenizer, **SIZE, seed=seed).save_pretrained(begin)
    tokenizer.save_pretrained(begin)
    return begin


def train(here: Path, name: str, preset: str, begin: Path, seed: int, teachers: list[Path], steps: int) -> Path:
    """A student of `kd.py` on the training inputs' references; its directory."""
    of_run = ["--dataset", here / "train.csv", "--eval_dataset", here / "dev.csv", *DATA_FLAGS, "--student", begin]
    of_run += ["--teacher", *teachers, "--output_dir", here / name, "--seed", seed, "--max_steps", steps]
    of_run += ["--config", PRESETS / f"{preset}.yaml"]
    stage("kd", here / name / "finished.json", *of_run, *TRAINING, *QUIET)
    return here / name


@torch.no_grad()
def measure(models: list[Path], rows: list[dict[str, str]]) -> dict[str, float]:
    """Cross-entropy per token and accuracy of the models' mean probabilities on the references, EOS included.

    They are over the ids that a student may sample, as in training: what others get is not trained.
    """
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    loaded = [AutoModelForSeq2SeqLM.from_pretrained(model).eval() for model in models]
    forbidden_V = Policy(loaded[0], tokenizer).forbidden_V
    nll, right, count = 0.0, 0, 0
    for start in range(0, len(rows), 64):
        batch = rows[start : start + 64]
        inputs = tokenizer([row["mr"] for row in batch], padding=True, return_tensors="pt")
        ids = [
            [*tokenizer(row["ref"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for row in batch
        ]
        labels_BT = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(i) for i in ids], batch_first=True, padding_value=-100
        )
        mask_BT = labels_BT >= 0
        logits = [
            model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels_BT).logits
            for model in loaded
        ]
        logits_KNV = [z_BTV[mask_BT] for z_BTV in logits]
        logps_NV = mean_of_probabilities(logits_KNV, [1.0] * len(logits), forbidden_V=forbidden_V)
        labels_N = labels_BT[mask_BT]
        nll -= float(logps_NV.gather(1, labels_N[:, None]).sum())
        right += int((logps_NV.argmax(dim=1) == labels_N).sum())
        count += len(labels_N)
    return {"nats": nll / count, "accuracy": 100 * right / count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/ensemble"))
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--distilled_seeds", type=int, nargs="+", default=[100, 101, 102])
    args = parser.parse_args()
    here = args.work_dir
    delexicalise(args.train, here / "all.csv")
    test, dev, rest = drawn_inputs(read_rows(here / "all.csv"), TEST_INPUTS, 8)
    for name, rows in (("test", test), ("dev", dev), ("train", rest)):
        write_rows(here / f"{name}.csv", rows)

    tokenizer = train_tokenizer([text for row in rest for text in row.values()], vocab_size=1200)
    bases = [
        train(here, f"base{seed}", "seq_kd", begin, seed, [begin], args.max_steps)
        for seed in BASE_SEEDS
        for begin in [random_weights(here, seed, tokenizer)]
    ]
    distilled = [
        train(here, f"distilled{seed}", "hinton", random_weights(here, seed, tokenizer), seed, bases, args.max_steps)
        for seed in args.distilled_seeds
    ]
    results = {
        "base": [measure([base], test) for base in bases],
        "ensemble": [measure(bases, test)],
        "distilled": [measure([student], test) for student in distilled],
    }
    table = [
        [
            model,
            str(len(of_model)),
            *(shown([one[name] for one in of_model], ".3f") for name in ("nats", "accuracy")),
        ]
        for model, of_model in results.items()
    ]
    header = ["model", "number", "nats / token", "next token right, %"]
    about = (
        f"E2E, {TEST_INPUTS} test inputs with {len(test)} references; T5 with {args.max_steps} steps; mean ± "
        "half-width of the 95 % interval over that number of models."
    )
    costs = [json.loads((run / "cost.json").read_text(encoding="utf-8")) for run in [*bases, *distilled]]
    cost = f"Training took {sum(one['cpu_seconds'] for one in costs):.0f} s of CPU time."
    text = f"{about}\n\n{markdown_table(header, table)}\n\n{made_by()} {cost}\n"
    write_results(args.results_dir, "ensemble", results, text)


if __name__ == "__main__":
    main()
