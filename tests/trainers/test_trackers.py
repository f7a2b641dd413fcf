"""Curves and completions in TensorBoard, Weights & Biases and Trackio; what of these is installed is really run."""

import json

import pytest
from transformers import TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback

from rlkd_trl.trainers.sample_log import SampleLog
from rlkd_trl.trainers.tracker_tables import TrackerTables
from tests.trainers.tiny_runs import build, pairs

ROLLOUT_COLUMNS = ["prompt", "completion", "reward", "tokens", "ended"]
HELD_OUT_COLUMNS = ["step", "by", "prompt", "completion", "reward", "references"]


class Writer:
    """Stands in for TensorBoard's, which writes from a thread: on disk is what was added before the last flush."""

    def __init__(self):
        self.texts, self._added = [], []

    def add_text(self, name, text, step):
        self._added.append((name, text, step))

    def flush(self):
        self.texts += self._added
        self._added = []


def test_tables_wait_for_a_log_and_go_once():
    tensorboard = TensorBoardCallback.__new__(TensorBoardCallback)
    tensorboard.tb_writer = Writer()
    tables = TrackerTables([object(), tensorboard])
    tables.add("completions", [])
    tables.add("completions", [{"prompt": "a|b\nc", "reward": None, "references": ["d", "e"]}])
    assert not tensorboard.tb_writer.texts
    for _ in range(2):
        tables.on_log(None, TrainerState(global_step=7, is_world_process_zero=True), TrainerControl())
    ((name, text, step),) = tensorboard.tb_writer.texts
    assert (name, step) == ("completions", 7)
    heads, _, row = (line.split(" | ") for line in text.splitlines())
    assert [head.strip("| ") for head in heads] == ["prompt", "reward", "references"]
    assert [cell.strip("| ") for cell in row] == [r"a\|b c", "", "d e"]


def test_other_processes_send_nothing():
    tensorboard = TensorBoardCallback.__new__(TensorBoardCallback)
    tensorboard.tb_writer = Writer()
    tables = TrackerTables([tensorboard])
    tables.add("completions", [{"prompt": "a"}])
    tables.on_log(None, TrainerState(is_world_process_zero=False), TrainerControl())
    assert not tensorboard.tb_writer.texts


def run(directory, tracker: str):
    """As a recipe does it: evaluations before and after, and answers to held-out prompts."""
    trainer = build(
        "ppo", directory, data=pairs(16), eval_data=pairs(3, seed=1), max_steps=2, logging_steps=1,
        log_completions=True, num_completions_to_print=2, report_to=tracker,
    )  # fmt: skip
    trainer.add_callback(SampleLog(trainer))
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    return trainer


@pytest.mark.slow
def test_tensorboard_has_curves_and_completions_in_one_directory(tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no TensorBoard")
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "out", "tensorboard")
    (directory,) = (tmp_path / "out" / "runs").iterdir()
    log = events.EventAccumulator(str(directory))
    log.Reload()
    assert [event.step for event in log.Scalars("train/reward")] == [1, 2]
    assert [event.step for event in log.Scalars("eval/reward")] == [0, 2]
    texts = {
        name: [event.tensor_proto.string_val[0].decode() for event in log.Tensors(f"{name}/text_summary")]
        for name in ("completions", "held_out_completions")
    }
    assert len(texts["completions"]) == 2
    assert len(texts["held_out_completions"]) == 3  # the teacher's, and the student's before and after
    for name, columns in (("completions", ROLLOUT_COLUMNS), ("held_out_completions", HELD_OUT_COLUMNS)):
        assert [head.strip() for head in texts[name][0].splitlines()[0].strip("|").split("|")] == columns


@pytest.mark.slow
def test_weights_and_biases_offline_has_tables(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = run(tmp_path / "out", "wandb")
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert summary["train/reward"] == pytest.approx(trainer.state.log_history[-3]["reward"])
    assert "eval/reward" in summary
    (directory,) = tmp_path.glob("wandb/offline-run-*")
    tables = [json.loads(path.read_text()) for path in directory.glob("files/media/table/**/*.table.json")]
    assert sorted(table["columns"] for table in tables) == [ROLLOUT_COLUMNS] * 2 + [HELD_OUT_COLUMNS] * 3
    assert {row[1] for table in tables for row in table["data"] if len(row) == 6} == {"teacher", "student"}


@pytest.mark.slow
def test_trackio_has_one_run_with_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="Trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.chdir(tmp_path)
    trainer = run(tmp_path / "out", "trackio")
    trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)  # it ends the run
    (name,) = SQLiteStorage.get_runs("huggingface")
    assert name.startswith("out-")
    logs = SQLiteStorage.get_logs("huggingface", name)
    assert sum("train/reward" in log for log in logs) == 2 and sum("eval/reward" in log for log in logs) == 2
    tables = [log[key]["_value"] for log in logs for key in ("completions", "held_out_completions") if key in log]
    assert sorted(list(table[0]) for table in tables) == [ROLLOUT_COLUMNS] * 2 + [HELD_OUT_COLUMNS] * 3
