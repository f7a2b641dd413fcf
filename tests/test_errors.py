"""How a command ends."""

import pytest
import torch.distributed

from rlkd_trl.errors import InputError, TrainingError, run


def refuse():
    raise InputError("not\n  this")


@pytest.mark.parametrize(("processes", "ended"), [(1, 0), (2, 1)])
def test_success_ends_the_connection_between_processes(processes, ended, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append(1))
    run(lambda: None)
    assert len(calls) == ended


def test_bad_input_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as exit:
        run(refuse)
    assert exit.value.code == 2 and capsys.readouterr().err == "error: not this\n"


def test_failed_training_is_one_line_and_exit_code_1(capsys):
    def main():
        raise TrainingError("it is\nNaN")

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 1 and capsys.readouterr().err == "error: it is NaN\n"
