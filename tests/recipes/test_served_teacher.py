"""Recipes with a teacher behind a server: the student of the teacher itself; keys; servers that go away."""

import json
import os
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file

from rlkd_trl.models.loading import load_model
from rlkd_trl.teachers import server_signals
from tests.recipes.command_lines import COLUMNS, metrics_of, run, write_templates
from tests.teachers.loopback_server import served
from tests.tiny_models import word_tokenizer

KEY = "sk-recipe-9b74c9897bac770f"
FLAGS = (
    f"{COLUMNS} --max_completion_length 6 --num_generations 2 --max_steps 4 --learning_rate 1e-2 "
    "--lr_scheduler_type constant --logging_steps 1 --disable_tqdm True --per_device_train_batch_size 8"
)


@pytest.fixture
def asked(checkpoints, train_csv, tmp_path):
    write_templates(tmp_path / "t.yaml", one="w9 {{ mr }}", two="{{ mr }} w4")
    pair = checkpoints["llama"]
    return f"--student {pair.student} --dataset {train_csv} --templates {tmp_path / 't.yaml'} {FLAGS}"


@pytest.fixture
def far(checkpoints):
    """What starts the server of the teacher, with a behaviour."""
    teacher = checkpoints["llama"].teacher
    return lambda **behaviour: served(load_model(str(teacher)), word_tokenizer(), **behaviour)


def flags(loopback, teacher) -> str:
    return f"--teacher_server {loopback.url} --teacher_tokenizer {teacher}"


def assert_same_student(one, other, **tolerance) -> None:
    theirs = load_file(other / "model.safetensors")
    for name, weight in load_file(one / "model.safetensors").items():
        torch.testing.assert_close(weight, theirs[name], **(tolerance or {"rtol": 0, "atol": 0}))


METHODS = {
    "rloo-token": "rloo_kd --level token",
    "rloo-sequence": "rloo_kd --level sequence --average_reward none --gamma 0.9",
    "ppo-soft": "ppo_kd --value soft",
    "reinforce": "reinforce_kd --reward log_likelihood",
}


@pytest.mark.parametrize(
    "method", [name if name == "rloo-token" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_the_student_is_that_of_the_teacher_itself(method, asked, far, checkpoints, tmp_path, capsys):
    teacher, command = checkpoints["llama"].teacher, f"{METHODS[method]} {asked} --max_steps 2"
    assert run(f"{command} --teacher {teacher} --output_dir {tmp_path / 'near'}") == 0
    with far() as loopback:
        assert run(f"{command} {flags(loopback, teacher)} --output_dir {tmp_path / 'far'}") == 0
    assert "Teacher: tiny, behind a server. It is not loaded." in capsys.readouterr().out
    near, metrics = metrics_of(tmp_path / "near")["after"], metrics_of(tmp_path / "far")["after"]
    assert metrics["teacher_nll_per_token"] == pytest.approx(near["teacher_nll_per_token"], rel=1e-3)
    # The rewards are the same to 1e-4 (tests/teachers); Adam divides a small gradient, and its rounding, by its size.
    assert_same_student(tmp_path / "far", tmp_path / "near", rtol=1e-3, atol=1e-3)
    assert "tiny, behind a server" in (tmp_path / "far" / "README.md").read_text()


@pytest.mark.slow(1)
def test_the_key_is_sent_and_written_nowhere(asked, far, checkpoints, tmp_path, monkeypatch, capfd):
    """Also where the server goes on failing with the request's headers in its answers."""
    monkeypatch.setenv("TEACHER_KEY", KEY)
    command = f"rloo_kd {asked} --teacher_api_key_env TEACHER_KEY --save_steps 2 --debug"
    with far(key=KEY) as loopback:
        of_server = flags(loopback, checkpoints["llama"].teacher)
        assert run(f"{command} {of_server} --output_dir {tmp_path / 'out'}") == 0
        loopback.fails = lambda body, number: 503 if body and number > 2 else None
        loopback.bodies.clear()
        failing = f"{command} {of_server} --teacher_server_patience 0.6 --output_dir {tmp_path / 'failing'}"
        assert run(failing) == 1
        monkeypatch.setenv("TEACHER_KEY", "wrong")
        assert run(f"{command} {of_server} --output_dir {tmp_path / 'wrong'}") == 2
    said = capfd.readouterr()
    assert "Bearer ***" in said.err and "401" in said.err
    assert KEY not in said.out + said.err
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


def test_an_evaluation_is_that_with_the_teacher_itself(far, checkpoints, test_csv, tmp_path, capsys):
    """But for the teacher's own outputs, which a server that only reads does not write."""
    pair = checkpoints["llama"]
    write_templates(tmp_path / "t.yaml", one="w9 {{ mr }}", two="{{ mr }} w4")
    command = f"evaluate --student {pair.student} --dataset {test_csv} {COLUMNS} --templates {tmp_path / 't.yaml'} "
    command += "--reward log_likelihood --max_completion_length 6"
    assert run(f"{command} --teacher {pair.teacher} --output_dir {tmp_path / 'near'}") == 0
    with far() as loopback:
        served_by = flags(loopback, pair.teacher)
        assert run(f"{command} {served_by} --output_dir {tmp_path / 'far'}") == 0
        assert run(f"{command} {served_by} --teacher {pair.teacher}") == 2
        assert run(f"{command} {served_by} --gamma 0.9 --reward teacher_forcing") == 2
        assert run(f"{command} {served_by} --value expected --reward teacher_forcing") == 2
    near, away = metrics_of(tmp_path / "near"), metrics_of(tmp_path / "far")
    assert list(away) == ["student"] and "teacher" in near
    del near["student"]["student_nll_of_teacher_per_token"]
    assert away["student"] == pytest.approx(near["student"], abs=1e-4)
    refused = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "in place of each other" in refused[0] and "--gamma 0.9" in refused[1] and "'expected'" in refused[2]


@pytest.mark.slow(1)
def test_a_server_that_goes_away_ends_the_run_and_it_goes_on_when_it_is_back(asked, far, checkpoints, tmp_path, capfd):
    """At another address, to the student of a run without the failure."""
    teacher = checkpoints["llama"].teacher
    command = f"rloo_kd {asked} --save_steps 1 --teacher_server_patience 0.6"
    with far() as loopback:
        assert run(f"{command} {flags(loopback, teacher)} --output_dir {tmp_path / 'whole'}") == 0
        requests = len(loopback.requests)
    with far(fails=lambda body, number: 500 if number > requests // 2 else None) as loopback:
        assert run(f"{command} {flags(loopback, teacher)} --output_dir {tmp_path / 'out'}") == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: The teacher's server http://127.0.0.1:")
    assert "the same command with --resume" in error
    saved = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert saved and "checkpoint-4" not in saved
    assert json.loads((tmp_path / "out" / saved[-1] / "trainer_state.json").read_text())["global_step"] > 0
    with far() as loopback:
        assert run(f"{command} --resume {flags(loopback, teacher)} --output_dir {tmp_path / 'out'}") == 0
    assert_same_student(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow(0.6)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_obeyed_while_the_server_hangs(signum, asked, far, checkpoints, tmp_path, capfd, monkeypatch):
    """The request of the second step is never answered; its patience is longer than any test. --resume goes on."""
    monkeypatch.setattr(server_signals, "_SECONDS_AFTER_SIGNAL", 0.3)
    teacher, released, signals = checkpoints["llama"].teacher, threading.Event(), iter([signum])
    command = f"rloo_kd {asked} --save_steps 1 --teacher_server_timeout 500 --teacher_server_patience 1000"

    def hang(body: dict, number: int) -> None:
        if (tmp_path / "out" / "checkpoint-1").is_dir() and body:
            for once in signals:
                os.kill(os.getpid(), once)
            released.wait(60)

    with far(fails=hang) as loopback:
        assert run(f"{command} {flags(loopback, teacher)} --output_dir {tmp_path / 'out'}") == 128 + signum
        assert not released.is_set()
        released.set()
    message = capfd.readouterr().err.splitlines()[-2:]
    assert "did not answer: the step is not saved" in message[0]
    assert message[1].startswith("To continue: the same command with --resume")
    with far() as loopback:
        assert run(f"{command} --resume {flags(loopback, teacher)} --output_dir {tmp_path / 'out'}") == 0
