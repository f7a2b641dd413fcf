r"""How distinct students' sampled answers to different inputs are, as the guard against collapse sees them.

    python recipes/benchmarks/collapse.py --dataset runs/e2e_comparison/pseudo.jsonl --source_column mr \
        --start runs/e2e_comparison/warm_cold --students runs/e2e_comparison/cold/max_steps_150/ppo/seed0-lr5e-05

One sample at temperature 1 (seed 0) for each of 64 inputs, from the student that a run began with and from those that
it ended with: the shares of distinct whole texts and of distinct trigrams (`rlkd_trl.trainers.guards`), and these over
the first student's. Encoder-decoder models only. Prints a table in Markdown.
"""

import argparse
import json
from pathlib import Path

import torch
from result_files import made_by
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from rlkd_trl.evaluation.tables import markdown_table
from rlkd_trl.trainers.guards import answer_sketches, distinct_answers

INPUTS, MAX_TOKENS = 64, 64


def shares(student: Path, inputs: list[str]) -> tuple[float, float]:
    """Of distinct whole texts, and by trigrams."""
    torch.manual_seed(0)
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(student).eval(), AutoTokenizer.from_pretrained(student)
    read = tokenizer(inputs, return_tensors="pt", padding=True)
    with torch.no_grad():
        ids_PT = model.generate(**read, do_sample=True, top_k=0, max_new_tokens=MAX_TOKENS)[:, 1:]
    mask_PT = ids_PT != tokenizer.pad_token_id
    sketches = answer_sketches(read["input_ids"], read["attention_mask"], ids_PT, mask_PT, num_generations=1)
    return distinct_answers(sketches.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="JSON lines.")
    parser.add_argument("--source_column", required=True)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--students", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    with args.dataset.open(encoding="utf-8") as file:
        inputs = sorted({json.loads(line)[args.source_column] for line in file})[:INPUTS]
    found = {student: shares(student, inputs) for student in (args.start, *args.students)}
    rows = [
        [
            f"`{student}`",
            *(f"{share:.3f}" for share in of),
            *(f"{a / b:.2f}" for a, b in zip(of, found[args.start], strict=True)),
        ]
        for student, of in found.items()
    ]
    headings = ["student", "distinct texts", "by trigrams", "texts over the start's", "trigrams over the start's"]
    print(f"{markdown_table(headings, rows)}\n\n{made_by()}")


if __name__ == "__main__":
    main()
