"""`--resume_from_checkpoint PATH`: training goes on from there, in any output directory."""

import pytest
from safetensors.torch import load_file

from tests.recipes.command_lines import COLUMNS, SAMPLING, TWO_STEPS, run
from tests.trainers.tiny_runs import assert_same_weights, largest_difference


@pytest.mark.slow(0.6)
@pytest.mark.parametrize("recipe", ["rloo_kd", "sft"])
def test_a_named_checkpoint_leads_to_the_whole_runs_weights(recipe, checkpoints, train_csv, tmp_path):
    """From another student: only the checkpoint can."""
    pair = checkpoints["t5-tied"]
    distilled = f"--teacher {pair.teacher} {SAMPLING}" if recipe != "sft" else ""
    common = f"{recipe} --dataset {train_csv} {COLUMNS} {TWO_STEPS} {distilled} --save_steps 1"
    whole, rest, other = (tmp_path / name for name in ("whole", "rest", "other"))
    assert run(f"{common} --student {pair.student} --output_dir {whole}") == 0
    named = f"--resume_from_checkpoint {whole / 'checkpoint-1'}"
    assert run(f"{common} --student {pair.other} --output_dir {rest} {named}") == 0
    assert not (rest / "checkpoint-1").exists()
    assert_same_weights(load_file(rest / "model.safetensors"), load_file(whole / "model.safetensors"))
    assert run(f"{common} --student {pair.other} --output_dir {other}") == 0
    assert largest_difference(load_file(other / "model.safetensors"), load_file(rest / "model.safetensors")) > 0.01
