"""A comparison whose runs were killed, run again, ends as one that was not interrupted."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlkd_trl.commands.comparison import cells
from tests.recipes.command_lines import COLUMNS, run, word_rows, write_csv
from tests.recipes.forks import Fork
from tests.resuming.runs import without_times
from tests.tiny_models import MODELS, word_tokenizer

pytestmark = pytest.mark.slow

CELL = Path("max_steps_20/ppo/seed0")


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> str:
    """One PPO run, with several updates of a rollout, and a checkpoint inside of each."""
    inputs = tmp_path_factory.mktemp("inputs")
    for seed, role in enumerate(("teacher", "student")):
        MODELS["t5-tied"](seed).save_pretrained(inputs / role)
        word_tokenizer().save_pretrained(inputs / role)
    data, test = write_csv(inputs / "data.csv", word_rows(30)), write_csv(inputs / "test.csv", word_rows(8, seed=1))
    common = "per_device_train_batch_size=8 num_iterations=2 save_strategy=steps save_steps=3 logging_steps=1"
    return (
        f"compare --teacher {inputs}/teacher --student {inputs}/student --dataset {data} --test_dataset {test} "
        f"{COLUMNS} --methods ppo --seeds 0 --max_steps 20 --max_completion_length 6 "
        "--num_samples 2 --num_resamples 100 "
        f"--common {common} --output_dir"
    )


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "subprocess", SimpleNamespace(Popen=Fork))
        assert run(f"{command} {output_dir}") == 0
    return output_dir


@pytest.mark.parametrize(("moment", "flag"), [("checkpoint-6", "--resume"), ("stdout.txt", "--overwrite_output_dir")])
def test_a_killed_run_is_made_up_for(moment, flag, command, whole, tmp_path, monkeypatch):
    """Killed when a checkpoint is there, it goes on from it; when none is there, it begins anew."""
    started, kills = [], []

    class WithKills(Fork):
        def __init__(self, words, **kwargs):
            started.append(words)
            super().__init__(words, **kwargs)

        def wait(self):
            while not kills and not self.has_ended():
                seen = tmp_path / CELL / moment
                if seen.is_dir() or (seen.is_file() and "Teacher" in seen.read_text()):
                    self.kill()
                    kills.append(self.pid)
                time.sleep(0.01)
            return super().wait()

    monkeypatch.setattr(cells, "subprocess", SimpleNamespace(Popen=WithKills))
    assert run(f"{command} {tmp_path}") == 1 and len(kills) == 1
    assert not (tmp_path / CELL / "finished.json").exists()
    assert run(f"{command} {tmp_path}") == 0
    assert len(started) == 2 and flag in started[1]
    for name in ("model.safetensors", "metrics.json"):
        assert (tmp_path / CELL / name).read_bytes() == (whole / CELL / name).read_bytes(), name
    tests = [json.loads((place / "comparison.json").read_text())["tests"] for place in (tmp_path, whole)]
    assert without_times(tests[0]) == without_times(tests[1])
    costs = [json.loads((place / CELL / "cost.json").read_text()) for place in (tmp_path, whole)]
    assert without_times(costs[0]) == without_times(costs[1])
