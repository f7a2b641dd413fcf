"""Checkpoints are whole, or named and passed over."""

import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from rlkd_trl.errors import CheckpointError, InputError, Interrupted
from rlkd_trl.trainers import resumable
from rlkd_trl.trainers.checkpoint_files import newest_whole
from tests.resuming.runs import same, trainer_of
from tests.trainers.tiny_runs import build, prompts, snapshot

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directory of a PPO run with a checkpoint of every step."""
    directory = tmp_path_factory.mktemp("ppo") / "run"
    build("ppo", directory, **SAVING).train()
    return directory


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    """A trainer for what it refuses before it does anything."""
    return build("ppo", tmp_path_factory.mktemp("refusing"), **SAVING)


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "run_state.pth", "trainer_state.json",
         "value_head.safetensors", "run.json", "config.json", "tokenizer.json"]  # fmt: skip


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("harm", ["missing", "empty", "truncated", "changed"])
def test_a_harmed_checkpoint_is_passed_over(name, harm, saved, refusing, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(saved, directory)
    file = directory / "checkpoint-3" / name
    content = file.read_bytes()
    if harm == "missing":
        file.unlink()
    elif harm == "changed":
        middle = len(content) // 2  # one bit
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    else:
        file.write_bytes(b"" if harm == "empty" else content[: len(content) // 2])
    found, defects = newest_whole(directory)
    assert found == directory / "checkpoint-2"
    assert list(defects) == [directory / "checkpoint-3"] and name in defects[directory / "checkpoint-3"]
    with pytest.raises(InputError, match=name):
        refusing.train(resume_from_checkpoint=str(directory / "checkpoint-3"))


def test_training_goes_on_from_the_one_before(saved, tmp_path, capsys):
    directory = tmp_path / "run"
    shutil.copytree(saved, directory)
    (directory / "checkpoint-3" / "optimizer.pt").write_bytes(b"torn")
    trainer = build("ppo", directory, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-3: optimizer.pt has 4 bytes" in capsys.readouterr().out
    again, whole = (torch.load(d / "checkpoint-3" / "optimizer.pt") for d in (directory, saved))
    assert same(again, whole), "the torn one is replaced by the same step's"


class _Touches:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "run_state.pth"])
def test_a_forged_checkpoint_runs_no_code(name, saved, tmp_path):
    """Its digests are right."""
    directory = tmp_path / "run"
    shutil.copytree(saved, directory)
    (directory / "checkpoint-2" / name).write_bytes(pickle.dumps(_Touches(tmp_path / "touched")))
    resumable.seal(directory / "checkpoint-2", resumable=True)
    with pytest.raises(InputError, match="checkpoint-2: a file of it is a pickle that holds more than tensors"):
        build("ppo", directory, **SAVING).train(resume_from_checkpoint=str(directory / "checkpoint-2"))
    assert not (tmp_path / "touched").exists()


def test_a_pickle_of_something_else_is_not_called_a_checkpoint(tmp_path, monkeypatch):
    def unpickle(*args):
        raise pickle.UnpicklingError("of the data")

    trainer = build("ppo", tmp_path, **SAVING)
    monkeypatch.setattr(trainer, "training_step", unpickle)
    with pytest.raises(pickle.UnpicklingError, match="of the data"):
        trainer.train()


def test_there_is_none_that_is_whole(saved, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(saved, directory)
    for file in directory.glob("checkpoint-*/optimizer.pt"):
        file.unlink()
    with pytest.raises(InputError, match="no whole checkpoint"):
        build("ppo", directory, **SAVING).train(resume_from_checkpoint=True)


def test_a_model_only_is_not_gone_on_from(tmp_path):
    build("ppo", tmp_path, save_only_model=True, **SAVING).train()
    with pytest.raises(InputError, match="save_only_model"):
        build("ppo", tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("failures", [1, 100])
def test_a_disk_that_refuses(failures, tmp_path, monkeypatch, capsys):
    """Once: it is tried again. Always: one clear error, and what was saved before is whole."""
    monkeypatch.setattr(resumable, "_SECONDS_BETWEEN_ATTEMPTS", 0)
    trainer, seal, left = build("rloo-token", tmp_path, **SAVING), resumable.seal, [failures]

    def refusing(checkpoint, **kwargs):
        if trainer.state.global_step >= 2 and left[0] > 0:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        seal(checkpoint, **kwargs)

    monkeypatch.setattr(resumable, "seal", refusing)
    if failures == 1:
        trainer.train()
        assert capsys.readouterr().out.count("trying again") == 1
        assert newest_whole(tmp_path) == (tmp_path / "checkpoint-3", {})
        return
    with pytest.raises(
        CheckpointError, match=r"checkpoint-2 cannot be saved .*No space left.*MiB are free.* checkpoint-1 is intact"
    ):
        trainer.train()
    assert newest_whole(tmp_path) == (tmp_path / "checkpoint-1", {})


def test_a_full_disk_that_the_tokenizer_meets_first(tmp_path, monkeypatch, capsys):
    """Its library raises an `Exception` of no kind, as recorded on a full tmpfs (tokenizers 0.23)."""
    monkeypatch.setattr(resumable, "_SECONDS_BETWEEN_ATTEMPTS", 0)
    trainer = build("rloo-token", tmp_path, **SAVING)
    save = trainer.processing_class.save_pretrained

    def refusing(*args, **kwargs):
        if trainer.state.global_step >= 2:
            raise Exception("No space left on device (os error 28)")
        return save(*args, **kwargs)

    monkeypatch.setattr(trainer.processing_class, "save_pretrained", refusing)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-2 cannot be saved .*No space left.* checkpoint-1 is intact"
    ):
        trainer.train()
    assert capsys.readouterr().out.count("trying again") == 2
    assert newest_whole(tmp_path) == (tmp_path / "checkpoint-1", {})


def test_a_process_that_others_wait_for_ends_at_once(tmp_path, monkeypatch):
    """With DeepSpeed they gather weights while they save: one that would try again leaves them waiting for good."""
    trainer, tries = build("rloo-token", tmp_path, **SAVING), []

    def refusing(directory):
        tries.append(directory)
        raise OSError(28, "No space left on device")

    def save(*args):
        if trainer.state.global_step == 2:
            trainer.is_deepspeed_enabled = True
            monkeypatch.setattr(trainer, "write_checkpoint", refusing)
        return whole_save(*args)

    whole_save = trainer._save_checkpoint
    monkeypatch.setattr(trainer, "_save_checkpoint", save)
    with pytest.raises(CheckpointError, match=r"No space left.*checkpoint-1 is intact"):
        trainer.train()
    assert len(tries) == 1


def test_no_room_for_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1000))
    with pytest.raises(InputError, match="a checkpoint takes about"):
        build("rloo-token", tmp_path, **SAVING).train()
    assert not any(tmp_path.iterdir())


def test_the_directory_is_removed_meanwhile(tmp_path):
    """It is made again: what was in it is gone, what comes is saved."""
    trainer = build("rloo-token", tmp_path / "run", **SAVING)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    trainer.train()
    assert newest_whole(tmp_path / "run")[0] == tmp_path / "run" / "checkpoint-3"


@pytest.mark.slow(0.4)
@pytest.mark.parametrize("method", ["ppo", "sft"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(method, signum, tmp_path):
    """After step 5, inside of a rollout, where nothing would be saved; the resumed run ends as one without."""
    whole = trainer_of(method, tmp_path / "whole")
    whole.train()
    stopped = trainer_of(method, tmp_path / "run")
    stopped.args.save_steps = 100
    step, micro_batches = stopped.training_step, []

    def with_signal(*args):
        if stopped.state.global_step == 4:
            micro_batches.append(args)
            if len(micro_batches) == 1:  # a second Ctrl-C would end the run at once
                os.kill(os.getpid(), signum)
        return step(*args)

    stopped.training_step = with_signal
    handler = signal.getsignal(signum)
    with pytest.raises(Interrupted, match="checkpoint-5") as stop:
        stopped.train()
    assert stop.value.signum == signum and signal.getsignal(signum) is handler
    resumed = trainer_of(method, tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert same(snapshot(resumed.model), snapshot(whole.model))
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == [
        entry["loss"] for entry in whole.state.log_history if "loss" in entry
    ]


def at_the(moment: str, trainer, signum: int) -> None:
    """The signal comes after the last step has been looked at, or within the last save."""

    class AtTheEnd(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            os.kill(os.getpid(), signum)

    if moment == "end":
        trainer.add_callback(AtTheEnd())
        return
    save = trainer._save_checkpoint

    def interrupted(*args):
        if trainer.state.global_step == 3:
            trainer._save_checkpoint = save
            os.kill(os.getpid(), signum)
        save(*args)

    trainer._save_checkpoint = interrupted


@pytest.mark.parametrize(
    ("moment", "strategy", "signum"),
    [
        pytest.param("end", "steps", signal.SIGTERM, marks=pytest.mark.slow(0.7)),
        pytest.param("end", "no", signal.SIGINT, marks=pytest.mark.slow(0.7)),
        ("last save", "steps", signal.SIGTERM),
    ],
)
def test_a_signal_after_the_last_step_is_obeyed_too(signum, strategy, moment, tmp_path):
    """What comes after training, the saved student for instance, is not there: it did not end well."""
    settings = {"max_steps": 3, "save_strategy": strategy, "save_steps": 1}
    whole = build("ppo", tmp_path / "whole", **settings)
    whole.train()
    stopped = build("ppo", tmp_path / "run", **settings)
    at_the(moment, stopped, signum)
    with pytest.raises(Interrupted, match=r"after step 3.*/checkpoint-3 holds all of it") as stop:
        stopped.train()
    assert stop.value.signum == signum
    resumed = build("ppo", tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3 and same(snapshot(resumed.model), snapshot(whole.model))


def test_a_run_that_saves_models_only_is_stopped_with_all_that_it_takes_to_go_on(tmp_path):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    whole = build("rloo-token", tmp_path / "whole", **settings)
    whole.train()
    stopped = build("rloo-token", tmp_path / "run", **settings)
    stopped._stop_request.on_any_process = lambda accelerator: signal.SIGTERM if stopped.state.global_step == 2 else 0
    with pytest.raises(Interrupted, match="checkpoint-2 holds all of it"):
        stopped.train()
    resumed = build("rloo-token", tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same(snapshot(resumed.model), snapshot(whole.model))


@pytest.mark.slow(0.7)
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_signal_in_an_evaluation_breaks_it_off(strategy, tmp_path):
    """After the batch; the resumed run evaluates, and goes on as one that was not stopped."""
    settings = {"eval_strategy": strategy, "eval_steps": 2, "eval_data": prompts(12, seed=3), "data": prompts(8),
                "max_steps": 4, "save_strategy": "no", "per_device_eval_batch_size": 2}  # fmt: skip
    whole = build("rloo-token", tmp_path / "whole", **settings)
    whole.train()
    stopped, batches = build("rloo-token", tmp_path / "run", **settings), []
    look = stopped.stop_if_asked

    def stop_if_asked():
        batches.append(stopped.state.global_step)
        if len(batches) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        look()

    stopped.stop_if_asked = stop_if_asked
    with pytest.raises(Interrupted, match=r"Stopped after step 2; .*checkpoint-2 holds all of it"):
        stopped.train()
    assert batches == [2] * 8, "of 18"
    resumed = build("rloo-token", tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=True)
    logs = [
        [(e["step"], e["eval_reward"]) for e in t.state.log_history if "eval_reward" in e] for t in (whole, resumed)
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 2
    assert same(snapshot(resumed.model), snapshot(whole.model))


def test_a_signal_before_the_first_step(tmp_path):
    """In the evaluation that it begins with: there is nothing to save."""
    stopped = build("rloo-token", tmp_path, eval_on_start=True, eval_strategy="steps", eval_steps=5,
                    eval_data=prompts(4, seed=3), save_strategy="no")  # fmt: skip
    look, seen = stopped.stop_if_asked, []

    def stop_if_asked():
        if not seen:
            os.kill(os.getpid(), signal.SIGINT)
        seen.append(1)
        look()

    stopped.stop_if_asked = stop_if_asked
    with pytest.raises(Interrupted, match=r"Stopped before step 1\.") as stop:
        stopped.train()
    assert not stop.value.is_saved and newest_whole(tmp_path) == (None, {})


@pytest.mark.parametrize("strategy", ["steps", pytest.param("epoch", marks=pytest.mark.slow(0.8))])
def test_an_evaluation_that_a_signal_put_off_is_made_up_for(strategy, tmp_path):
    settings = {"eval_strategy": strategy, "eval_steps": 2, "eval_data": prompts(4, seed=3), "data": prompts(8),
                "max_steps": 4, "save_strategy": "steps", "save_steps": 10}  # fmt: skip
    whole = build("rloo-token", tmp_path / "whole", **settings)
    whole.train()
    stopped = build("rloo-token", tmp_path / "run", **settings)
    stopped._stop_request.on_any_process = lambda accelerator: signal.SIGTERM if stopped.state.global_step == 2 else 0
    with pytest.raises(Interrupted):
        stopped.train()
    assert not any("eval_tokens" in entry for entry in stopped.state.log_history)
    resumed = build("rloo-token", tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=True)
    evaluated = [
        [(entry["step"], entry["eval_tokens"]) for entry in trainer.state.log_history if "eval_tokens" in entry]
        for trainer in (whole, resumed)
    ]
    assert evaluated[0] == evaluated[1] and len(evaluated[0]) == 2


def test_another_beginning_is_refused_where_the_reference_is_it(tmp_path):
    """The reference of the KL penalty is the student that a run began with, not the one it goes on with."""
    from tests.tiny_models import MODELS

    settings = {**SAVING, "beta": 0.1}
    build("rloo-token", tmp_path, **settings).train()
    other = build("rloo-token", tmp_path, model=MODELS["t5-tied"](seed=3), **{**settings, "max_steps": 4})
    with pytest.raises(InputError, match=r"reference\.weights was"):
        other.train(resume_from_checkpoint=True)


def test_the_record_is_in_the_checkpoint(saved):
    record = json.loads((saved / "checkpoint-3" / "run.json").read_text())
    assert record["trainer"] == "PPOKDTrainer" and record["settings"]["epsilon"] == 0.2
    assert not {"output_dir", "max_steps", "logging_steps", "save_steps"} & record["settings"].keys()
