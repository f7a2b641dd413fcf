"""Recipes in processes of their own, launched as the README says.

Some that start one process are launched for real; the others in forks, which import nothing. Two processes are
launched for real in test_faults.py and, by `rlkd-trl`, in test_console.py.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from tests.distributed import forked_launchers
from tests.distributed.launching import ENVIRONMENT
from tests.recipes.command_lines import COLUMNS, ROOT, SAMPLING, TWO_STEPS, metrics_of, run
from tests.trainers.tiny_runs import assert_same_weights, largest_difference

pytestmark = pytest.mark.slow(10)
LAUNCHER = f"accelerate launch --config_file {ROOT}/accelerate_configs/cpu_2_processes.yaml"


def launched(command: str, directory: Path) -> subprocess.CompletedProcess:
    program, *flags = command.split()
    words = [str(Path(sys.executable).with_name(program)), *flags]
    environment = {**ENVIRONMENT, "HF_DATASETS_CACHE": str(directory / "cache")}
    return subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=directory, env=environment)


def launched_in_forks(recipe: str, flags: str, directory: Path) -> subprocess.CompletedProcess:
    environment = {**ENVIRONMENT, "HF_DATASETS_CACHE": str(directory / "cache")}
    command = f"{LAUNCHER} {ROOT}/recipes/{recipe}.py {flags}"
    return forked_launchers.launched(command, directory=directory, environment=environment)


def test_two_processes_do_what_one_does(checkpoints, train_csv, test_csv, tmp_path):
    """The same global batch: 8 completions in one process, 4 in each of two."""
    pair = checkpoints["t5-tied"]
    flags = f"--teacher {pair.teacher} --student {pair.student} --dataset {train_csv} --eval_dataset {test_csv}"
    # Not Adam, which makes whole steps of gradients that are rounding errors.
    flags += f" {COLUMNS} {TWO_STEPS} {SAMPLING} --optim sgd --learning_rate 0.3"
    assert run(f"ppo_kd {flags} --output_dir {tmp_path / 'one'}") == 0
    flags += " --per_device_train_batch_size 4 --output_dir two"
    finished = launched_in_forks("ppo_kd", flags, tmp_path)
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert finished.stdout.count("Student, metrics.json and report.html are in") == 1, "one process speaks"

    found, expected = metrics_of(tmp_path / "two"), metrics_of(tmp_path / "one")
    assert found.keys() == expected.keys()
    for row in expected:
        assert found[row] == pytest.approx(expected[row], rel=1e-3), row
    start, one, two = (
        AutoModelForSeq2SeqLM.from_pretrained(directory).state_dict()
        for directory in (pair.student, tmp_path / "one", tmp_path / "two")
    )
    assert_same_weights(two, one, rtol=1e-4, atol=1e-5)
    assert largest_difference(one, start) > 0.01, "nothing was learnt"
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]


def test_stages_of_two_processes_do_what_those_of_one_do(encoders, tmp_path):
    """The same global batch in a general stage and in the task stage after it."""
    flags = f"--teacher {encoders.general} --dataset {encoders.train} --eval_dataset {encoders.test} "
    flags += f"--task_teacher {encoders.task} --task_dataset {encoders.train} --task_eval_dataset {encoders.test} "
    flags += f"--label_column label {TWO_STEPS} --max_length 32 --optim sgd --learning_rate 0.05 "
    flags += "--stages general task --losses hidden_mse+mlm_ce logits_kl+hard_ce --init random"
    assert run(f"encoder_kd {flags} --output_dir {tmp_path / 'one'}") == 0
    flags += " --per_device_train_batch_size 4 --output_dir two"
    finished = launched_in_forks("encoder_kd", flags, tmp_path)
    assert finished.returncode == 0, finished.stderr[-4000:]
    for place in ("stage1-general", "."):
        one, two = (load_file(tmp_path / name / place / "model.safetensors") for name in ("one", "two"))
        assert_same_weights(two, one, rtol=1e-4, atol=1e-5)
        found, expected = (metrics_of(tmp_path / name / place) for name in ("two", "one"))
        for row in expected:
            assert found[row] == pytest.approx(expected[row], rel=1e-3), row
        assert (tmp_path / "two" / place / "finished.json").is_file()


HANGING_REWARD = """
import os, pathlib, time, torch

def hanging(inputs):
    if os.environ["RANK"] == "1":
        pathlib.Path("sleeps").touch()
        time.sleep(3600)
    return torch.zeros(inputs.completion_ids_BT.shape)
"""


def test_a_process_that_hangs_ends_the_others_after_the_timeout(checkpoints, train_csv, tmp_path):
    (tmp_path / "slow.py").write_text(HANGING_REWARD)
    pair = checkpoints["t5-tied"]
    flags = f"--teacher {pair.teacher} --student {pair.student} --dataset {train_csv} {COLUMNS} {TWO_STEPS} {SAMPLING}"
    flags += f" --reward {tmp_path / 'slow.py'}:hanging --ddp_timeout 6 --output_dir {tmp_path / 'student'}"
    finished = launched_in_forks("rloo_kd", flags, tmp_path)
    seconds = time.time() - os.path.getmtime(tmp_path / "sleeps")
    assert finished.returncode != 0
    assert 3 < seconds < 60
    assert finished.stderr.count("error: process 1 has not come to where the others wait for it") == 1
    assert finished.stderr.count("Traceback") == 1, "the launcher's own"
    assert not (tmp_path / "student" / "metrics.json").exists()


def test_bad_input_in_a_process_of_its_own(tmp_path):
    finished = launched(f"python {ROOT}/recipes/rloo_kd.py --dataset nowhere.csv --teacher t --student s", tmp_path)
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: Dataset nowhere.csv does not exist")
    assert finished.stderr.count("\n") == 1
    assert finished.stdout == ""


@pytest.mark.parametrize("flags", ["--cpu --num_processes 2", "--num_processes 2"])
def test_accelerate_starts_one_process_where_two_are_meant(flags, tmp_path):
    finished = launched(f"accelerate launch {flags} {ROOT}/recipes/rloo_kd.py --output_dir {tmp_path}/out", tmp_path)
    assert finished.returncode != 0
    assert finished.stderr.count("error: accelerate launch was asked for several processes and has started one") == 1
    assert not (tmp_path / "out").exists()


def test_several_processes_say_once_what_is_wrong(tmp_path):
    flags = f"--dataset nowhere.csv --teacher t --student s --output_dir {tmp_path}/out"
    finished = launched_in_forks("rloo_kd", flags, tmp_path)
    assert finished.returncode != 0
    assert finished.stderr.count("error: Dataset nowhere.csv does not exist") == 1
    assert not (tmp_path / "out").exists()
