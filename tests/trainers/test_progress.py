"""Training's bar: in a terminal, with what was logged last."""

import io
import sys

import pytest
from transformers.trainer_callback import ProgressCallback

from rlkd_trl.trainers import progress
from tests.trainers.tiny_runs import build


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_what_the_bar_shows():
    logs = {"loss": 0.5, "reward": -12.3456, "approx_kl": 0.01, "completions/mean_length": 7.25, "lr": 1e-5}
    assert progress.shown_metrics(logs) == {"reward": "-12.3", "KL": "0.01", "length": "7.25", "loss": "0.5"}
    assert progress.shown_metrics({"kl": 2.0, **logs})["KL"] == "2"  # to the start, where both are there
    assert progress.shown_metrics({"loss": 0.5}) == {"loss": "0.5"}


@pytest.mark.parametrize("stream, shows", [(Terminal, True), (io.StringIO, False)])
def test_a_bar_in_a_terminal_only(stream, shows, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    trainer = build("rloo-token", tmp_path, max_steps=2, logging_steps=1, beta=0.1, disable_tqdm=False)
    trainer.train()
    written = sys.stderr.getvalue()
    for what in ("2/2", "reward=", "KL=", "length="):
        assert (what in written) == shows


def test_no_bar_on_request(tmp_path):
    trainer = build("rloo-token", tmp_path, disable_tqdm=True)
    assert not any(isinstance(callback, ProgressCallback) for callback in trainer.callback_handler.callbacks)
