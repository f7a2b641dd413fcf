r"""Which losses should I distil my encoder with? Combinations side by side, on one budget, with intervals.

    python recipes/encoder_search.py --smoke                               # the embedded demo, minutes, no network
    python recipes/encoder_search.py --base mix --sets questions --teacher runs/general_teacher --dataset texts.csv \
        --task_teacher runs/teacher --task_dataset train.csv --label_column label --task_eval_dataset dev.csv \
        --seeds 0 1 2 --max_steps 300 --learning_rate 1e-4 --common per_device_train_batch_size=32
    python recipes/encoder_search.py --base kd --sets leave_one_out add_one --task_teacher runs/teacher ...
    python recipes/encoder_search.py --base kd --sets subsets --candidates logits_kl hard_ce hidden_mse --up_to 2 ...

A preset of encoder_kd is the base; of its stages of one kind the losses are varied: one left out, one added, all
subsets of up to a few, or those that answer three questions: do attention losses help, do hard labels help, is soft
alone enough? Every combination gets the same student, steps, learning rate and seeds. Metrics are those of held-out
rows, on which nothing is trained; to report the winner's, keep a test set that was in no search.

Each run has a directory of its own, OUTPUT_DIR/SET/seedN; a finished one is not run again, and is refused if its
command or a local file that it read has changed. In OUTPUT_DIR: search.md and search.json.
"""

import sys
from pathlib import Path

from rlkd_trl.commands.checks import require_files
from rlkd_trl.commands.comparison.cells import run_cells
from rlkd_trl.commands.encoder_search import EncoderSearchSettings, Search, use_demo
from rlkd_trl.commands.run_directory import check_writable, held_alone
from rlkd_trl.commands.settings import parse_settings
from rlkd_trl.errors import continued_by, run

RECIPES = Path(__file__).resolve().parent
DEMO_PRESET = RECIPES / "configs" / "demo_encoder_search.yaml"


def main() -> None:
    # Parse, and find out what is wrong with the input before anything runs.
    demo_preset = DEMO_PRESET if "--smoke" in sys.argv else None
    settings = parse_settings(
        EncoderSearchSettings, description=__doc__, recipe="encoder_search", demo_preset=demo_preset
    )
    continued_by("the same command")
    require_files(settings)
    output_dir = Path(settings.search.output_dir)
    check_writable("--output_dir", output_dir)
    with held_alone(output_dir):
        search(settings)


def search(settings: EncoderSearchSettings) -> None:
    if settings.search.smoke:
        use_demo(settings)

    from rlkd_trl.commands.encoder_search_results import write_results

    plan = Search(settings, RECIPES)
    cells = plan.cells()
    for cell in cells:
        cell.check()
    print(f"{len(plan.combinations)} sets of losses, {len(cells)} runs.", flush=True)

    # Run each combination with each seed, then say which is best.
    run_cells(cells, settings.search.jobs)
    if not write_results(plan):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
