r"""Teacher assistants: a chain of distillations from a large teacher to a small student, in steps of equal ratio.

    python recipes/assistant_kd.py --smoke                                # the embedded demo, minutes, no network
    python recipes/assistant_kd.py --teacher runs/teacher --student runs/warm --num_assistants 1 --methods word_kd \
        --dataset runs/pseudo.jsonl --source_column mr --target_column pseudo_label --max_steps 300 \
        --output_dir runs/chain

Mirzadeh et al. 2020, "Improved Knowledge Distillation via Teacher Assistant": a student learns less from a teacher
that is far larger, so each model teaches one that is somewhat smaller. With `--dense` every earlier model teaches each
later one (Son et al. 2021, "Densely Guided Knowledge Distillation Using Multiple Teacher Assistants", DGKD). A hop is
one run of a recipe with a preset (`--methods`), any that `compare.py` takes. New assistants have the student's
architecture and tokenizer and random weights, in sizes between the two; `rlkd-trl plan --assistants N` prints them.
The student begins as the checkpoint named. Assistants are asked what the student is asked, the teacher through its
templates.

The models stand in OUTPUT_DIR/assistant1, ..., OUTPUT_DIR/student; chain.md has a table, chain.json all numbers. The
same command goes on where it stopped: a finished hop is not run again, one that was begun goes on from its last
checkpoint.

Where this differs from the papers: they classify images; DGKD adds up one loss per teacher, here their probabilities
are averaged (the same gradient for forward KL, over their number), and none is left out at random.
"""

import sys
from pathlib import Path

from rlkd_trl.commands.assistants import Chain, ChainSettings, check_named, use_demo, write_results
from rlkd_trl.commands.checks import require_files
from rlkd_trl.commands.comparison.cells import run_cells
from rlkd_trl.commands.comparison.checks import CONFIGS
from rlkd_trl.commands.demo import make_smoke_demo
from rlkd_trl.commands.run_directory import check_writable, held_alone
from rlkd_trl.commands.settings import parse_settings
from rlkd_trl.errors import continued_by, run

RECIPES = Path(__file__).resolve().parent
DEMO_PRESET = RECIPES / "configs" / "demo_assistants.yaml"


def main() -> None:
    # Parse, and find out what is wrong with the input before anything runs.
    demo_preset = DEMO_PRESET if "--smoke" in sys.argv else None
    settings = parse_settings(ChainSettings, description=__doc__, recipe="assistant_kd", demo_preset=demo_preset)
    continued_by("the same command")
    check_named(settings)
    require_files(settings)
    output_dir = Path(settings.chain.output_dir)
    check_writable("--output_dir", output_dir)
    with held_alone(output_dir):
        distil_through_assistants(settings, output_dir)


def distil_through_assistants(settings: ChainSettings, output_dir: Path) -> None:
    demo = use_demo(settings) if settings.chain.smoke else None
    chain = Chain.of(settings, RECIPES)
    if demo is not None:
        make_smoke_demo(demo)
    chain.check(CONFIGS)

    # One hop after the other: each reads what the last one has made.
    chain.make_begins()
    for hop in range(settings.chain.num_hops):
        cell = chain.cell(hop)
        cell.check()
        if run_cells([cell], 1):
            sys.exit(1)

    print(f"\n{write_results(chain)}", flush=True)
    print(f"chain.md and chain.json are in {output_dir}, the student in {output_dir / 'student'}.")


if __name__ == "__main__":
    run(main)
