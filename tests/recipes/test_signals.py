"""Ctrl-C and SIGTERM in every part of a command: what is there stays whole, what is missing shows in the exit code."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlkd_trl.commands import apart
from rlkd_trl.commands.comparison import cells
from rlkd_trl.evaluation import evaluate, report
from rlkd_trl.teachers import pseudo_labels
from rlkd_trl.trainers.rollout_trainer import RolloutTrainer
from rlkd_trl.trainers.supervised import SupervisedTrainer
from tests.recipes.command_lines import COLUMNS, SAMPLING, TWO_STEPS, run

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
SAID = {signal.SIGINT: "Stopped by Ctrl-C.", signal.SIGTERM: "Stopped by SIGTERM."}


def signalled_at(patch, owner, name: str, signum: int, call: int = 1) -> None:
    """The signal comes while the function is called for the nth time."""
    function, calls = getattr(owner, name), []

    def with_signal(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signum)
        return function(*args, **kwargs)

    patch.setattr(owner, name, with_signal)


def distillation(checkpoints, train_csv, place: Path) -> str:
    pair = checkpoints["t5-tied"]
    return (
        f"rloo_kd --teacher {pair.teacher} --student {pair.student} --dataset {train_csv} {COLUMNS} {TWO_STEPS} "
        f"{SAMPLING} --output_dir {place}/out"
    )


@pytest.fixture
def distil(checkpoints, train_csv, tmp_path):
    return distillation(checkpoints, train_csv, tmp_path)


@pytest.fixture(autouse=True)
def handlers_stay():
    before = [signal.getsignal(signum) for signum in CODES]
    yield
    assert [signal.getsignal(signum) for signum in CODES] == before


@pytest.mark.parametrize("signum", CODES)
def test_before_training(signum, distil, tmp_path, monkeypatch, capsys):
    """In an evaluation: it stops there, and nothing is left behind."""
    signalled_at(monkeypatch, evaluate, "completion_log_probs", signum)
    assert run(distil) == CODES[signum]
    errors = capsys.readouterr().err
    assert f"{SAID[signum]}\nTo continue: the same command with --resume, if a checkpoint was saved before." in errors
    assert "Traceback" not in errors and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def whole(checkpoints, train_csv, tmp_path_factory) -> Path:
    """What the run leaves where nothing stops it."""
    place = tmp_path_factory.mktemp("whole")
    assert run(distillation(checkpoints, train_csv, place)) == 0
    return place / "out"


@pytest.mark.slow(0.6)
@pytest.mark.parametrize("signum", CODES)
def test_while_the_student_is_saved(signum, distil, whole, tmp_path, capsys):
    """The student is saved whole; evaluation and report are made up for by --resume."""
    with pytest.MonkeyPatch.context() as patch:
        signalled_at(patch, RolloutTrainer, "_save", signum, call=2)  # the first is the checkpoint's
        assert run(distil) == CODES[signum]
    assert SAID[signum] in capsys.readouterr().err
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(tensor.equal(saved[key]) for key, tensor in load_file(whole / "model.safetensors").items())
    assert (tmp_path / "out" / "cost.json").is_file() and not (tmp_path / "out" / "finished.json").exists()
    assert run(f"{distil} --resume") == 0
    metrics = [json.loads((place / "metrics.json").read_text()) for place in (tmp_path / "out", whole)]
    assert metrics[0] == metrics[1] and (tmp_path / "out" / "finished.json").exists()


def test_in_the_last_evaluation(distil, tmp_path, monkeypatch):
    signalled_at(monkeypatch, evaluate, "completion_log_probs", signal.SIGTERM, call=3)  # teacher, before, after
    assert run(distil) == 143
    assert (tmp_path / "out" / "model.safetensors").is_file() and not (tmp_path / "out" / "finished.json").exists()


def test_when_all_that_was_asked_for_is_there_it_has_ended_well(distil, tmp_path, monkeypatch, capsys):
    signalled_at(monkeypatch, report, "write_report", signal.SIGTERM)
    assert run(distil) == 0
    assert (tmp_path / "out" / "finished.json").is_file() and "Stopped" not in capsys.readouterr().err


@pytest.mark.parametrize(("owner", "name", "code"), [(SupervisedTrainer, "_save", 0), (SupervisedTrainer, "log", 143)])
def test_sft(owner, name, code, checkpoints, train_csv, tmp_path, monkeypatch, capsys):
    """In the last save nothing is missing after it; in the log of the last step the saved model is."""
    signalled_at(monkeypatch, owner, name, signal.SIGTERM, call=2)
    sft = f"sft --student {checkpoints['t5-tied'].student} --dataset {train_csv} {COLUMNS} {TWO_STEPS}"
    assert run(f"{sft} --output_dir {tmp_path}/out") == code
    assert (tmp_path / "out" / "finished.json").is_file() is (code == 0)
    if code:
        assert "checkpoint-2 holds all of it.\nTo continue: the same command with --resume." in capsys.readouterr().err
        assert run(f"{sft} --output_dir {tmp_path}/out --resume") == 0
        assert (tmp_path / "out" / "finished.json").is_file()


@pytest.mark.parametrize("signum", CODES)
def test_pseudo_labels(signum, checkpoints, train_csv, tmp_path, monkeypatch, capsys):
    """The labels so far are in a file of another name, and nothing says that a flag would go on from there."""
    signalled_at(monkeypatch, pseudo_labels, "decode", signum, call=2)
    command = f"pseudo_label --teacher {checkpoints['t5-tied'].teacher} --dataset {train_csv} {COLUMNS}"
    assert run(f"{command} --batch_size 4 --output {tmp_path}/labels.jsonl") == CODES[signum]
    assert capsys.readouterr().err.endswith(f"{SAID[signum]}\n")
    assert not (tmp_path / "labels.jsonl").exists()
    assert len((tmp_path / "labels.jsonl.part").read_text().splitlines()) == 4


def test_evaluate(checkpoints, train_csv, tmp_path, monkeypatch, capsys):
    """What was measured is there: the teacher's numbers, not the student's."""
    signalled_at(monkeypatch, evaluate, "completion_log_probs", signal.SIGTERM, call=2)
    pair = checkpoints["t5-tied"]
    command = f"evaluate --teacher {pair.teacher} --student {pair.student} --dataset {train_csv} {COLUMNS}"
    assert run(f"{command} --max_completion_length 6 --output_dir {tmp_path}/out") == 143
    assert capsys.readouterr().err.endswith("Stopped by SIGTERM.\n")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()).keys() == {"teacher"}


@pytest.mark.slow(1)
@pytest.mark.parametrize("signum", CODES)
def test_the_demo_takes_the_training_of_its_models_along(signum, tmp_path, monkeypatch, capsys):
    pid_file = tmp_path / "pid"
    script = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(1000)"
    monkeypatch.setattr(apart, "_TRAIN", script)

    def signal_once_it_runs():
        while not (pid_file.exists() and pid_file.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signum)

    threading.Thread(target=signal_once_it_runs).start()
    assert run(f"ppo_kd --output_dir {tmp_path}/out") == CODES[signum]
    assert SAID[signum] in capsys.readouterr().err
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


@pytest.mark.slow(0.4)
@pytest.mark.parametrize(("jobs", "signum"), list(zip([1, 2], CODES, strict=True)))
def test_a_comparison_passes_it_on(jobs, signum, checkpoints, train_csv, test_csv, tmp_path, monkeypatch, capsys):
    """The runs save what they have, and end before the comparison does."""
    started, sent = [], []

    class Signalling(subprocess.Popen):
        def __init__(self, words, **kwargs):
            super().__init__([words[0], "-c", "import time; time.sleep(1000)"], **kwargs)
            started.append(self)

        def wait(self):
            if len(started) == jobs and not sent:
                sent.append(signum)
                os.kill(os.getpid(), signum)
            return super().wait()

    monkeypatch.setattr(cells, "subprocess", type("Subprocess", (), {"Popen": Signalling}))
    pair = checkpoints["t5-tied"]
    command = (
        f"compare --teacher {pair.teacher} --student {pair.student} --dataset {train_csv} --test_dataset {test_csv} "
        f"{COLUMNS} --methods ppo --seeds 0 1 2 --max_steps 2 --max_completion_length 6 --jobs {jobs}"
    )
    assert run(f"{command} --output_dir {tmp_path}/out") == CODES[signum]
    assert capsys.readouterr().err.endswith(f"{SAID[signum]}\nTo continue: the same command.\n")
    assert [process.returncode for process in started] == [-signal.SIGTERM] * jobs


@pytest.mark.parametrize("is_known", [True, False])
def test_a_comparison_that_is_stopped_while_it_begins_ends_its_runs(is_known, monkeypatch, tmp_path):
    """A signal comes when two processes are there: between two runs, or while the second one's thread is started, of
    which the pool does not know then."""
    started = []

    class Run:
        directory, is_done = tmp_path, False

        @property
        def parts(self):
            return [self]

        def run(self, environment, running):
            running.run([sys.executable, "-c", "import time; time.sleep(1000)"])

    class Noted(subprocess.Popen):
        def __init__(self, words, **kwargs):
            super().__init__(words, **kwargs)
            started.append(self)

        def wait(self):
            if threading.current_thread() is not threading.main_thread():
                time.sleep(0.3)  # it has ended, and its own thread does not know yet
            return super().wait()

    class Interrupted(cells.ThreadPoolExecutor):
        number = 0

        def submit(self, function, cell):
            self.number += 1
            if self.number == (3 if is_known else 2):
                if not is_known:
                    threading.Thread(target=function, args=[cell], daemon=True).start()
                while len(started) < 2:
                    time.sleep(0.01)
                raise KeyboardInterrupt
            return super().submit(function, cell)

    monkeypatch.setattr(cells, "subprocess", type("Subprocess", (), {"Popen": Noted}))
    monkeypatch.setattr(cells, "ThreadPoolExecutor", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        cells.run_cells([Run(), Run(), Run()], jobs=2)
    assert [process.returncode for process in started] == [-signal.SIGTERM] * 2
