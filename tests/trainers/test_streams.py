"""Training on streams: the same rows after a resume, and other rows on each process."""

from itertools import islice

import pytest
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from rlkd_trl.data.streams import RepeatedRows, RowStream
from rlkd_trl.errors import InputError
from tests.tiny_models import MODELS
from tests.trainers.test_supervised import build as supervised
from tests.trainers.tiny_runs import build, prompts, snapshot


class Prompts(TrainerCallback):
    """The prompts of each step."""

    def __init__(self, trainer):
        self.trainer, self.of_steps = trainer, []

    def on_step_end(self, args, state, control, **kwargs):
        ids_PS = self.trainer.rollout_state.rollout.prompt_ids_PS
        self.of_steps.append(self.trainer.processing_class.batch_decode(ids_PS, skip_special_tokens=True))


def run(directory, *, resume=None, **settings):
    stream = RowStream(prompts(10).to_iterable_dataset(), buffer_size=4, seed=1)
    settings = {"max_steps": 8, "num_iterations": 2, "save_strategy": "steps", "save_steps": 3} | settings
    trainer = build("rloo-token", directory, data=stream, **settings)
    seen = Prompts(trainer)
    trainer.add_callback(seen)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen.of_steps


def test_a_resumed_run_has_the_rows_and_weights_of_an_uninterrupted_one(tmp_path):
    """Also within a rollout (step 3 of 2 steps each), and where the stream has begun anew."""
    whole, steps = run(tmp_path)
    assert len({text for step in steps for text in step}) == 10  # all rows have been had
    resumed, later = run(tmp_path, resume=str(tmp_path / "checkpoint-3"))
    assert later == steps[3:]
    ours, theirs = snapshot(resumed.model), snapshot(whole.model)
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_another_order_is_another_run(tmp_path):
    run(tmp_path, max_steps=3)
    stream = RowStream(prompts(10).to_iterable_dataset(), buffer_size=5, seed=1)
    trainer = build("rloo-token", tmp_path, data=stream, max_steps=8, num_iterations=2)
    with pytest.raises(InputError, match="of another run: data was"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_processes_share_the_rows_of_a_rollout():
    def read(process: int, processes: int, batches: int):
        stream = RowStream(prompts(30).to_iterable_dataset(), buffer_size=8, seed=1)
        rows = RepeatedRows(stream, at_a_time=3 * processes, repeats=2)
        loader = prepare_data_loader(
            DataLoader(rows, batch_size=3, collate_fn=list, drop_last=True),
            **{
                "num_processes": processes,
                "process_index": process,
                "put_on_device": False,
                "dispatch_batches": False,
            },
        )
        return [[row["prompt"] for row in batch] for batch in islice(loader, batches)]

    alone = read(0, 1, 8)
    shares = [read(process, 2, 4) for process in range(2)]
    for rollout in range(2):
        for share in shares:
            assert share[2 * rollout] == share[2 * rollout + 1]  # both micro-batches
        together = [*shares[0][2 * rollout], *shares[1][2 * rollout]]
        assert together == [*alone[4 * rollout], *alone[4 * rollout + 2]]
        assert len(set(together)) == 6


def test_supervised_training_reads_the_stream(tmp_path):
    rows = prompts(6).map(lambda row: {"target": row["prompt"]})
    read = []

    def seen(some):
        read.extend(some["prompt"])
        return some

    stream = RowStream(rows.to_iterable_dataset(), seen, buffer_size=0)
    trainer = supervised(MODELS["t5-tied"](), tmp_path, data=stream, max_steps=4, per_device_train_batch_size=4)
    trainer.train()
    assert trainer.state.global_step == 4 and len(read) >= 16


def test_a_stream_has_no_epochs(tmp_path):
    with pytest.raises(InputError, match="say with max_steps how long to train"):
        run(tmp_path, max_steps=-1)
