"""The end of a run of several processes, one of which writes: no other one ends by an error before it has written."""

from types import SimpleNamespace

import pytest

from rlkd_trl.commands import encoder_results, results
from rlkd_trl.errors import TrainingError
from rlkd_trl.trainers import processes

BAD = {"after": {"samples_not_finite": 2}}


@pytest.mark.parametrize("module", [results, encoder_results])
@pytest.mark.parametrize("writes", [True, False])
def test_all_wait_for_the_process_that_writes(module, writes, tmp_path, monkeypatch):
    happened = []
    monkeypatch.setattr(module, "_write", lambda *args, **kwargs: happened.append("written"))
    monkeypatch.setattr(processes, "wait_for_all", lambda: happened.append("all are here"))
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path)),
        state=SimpleNamespace(global_step=1),
        is_world_process_zero=lambda: writes,
    )
    is_encoder = module is encoder_results
    stage_or_templates = SimpleNamespace(directory=tmp_path, is_last=True) if is_encoder else None
    settings = {} if is_encoder else {"method": "RLOO"}
    with pytest.raises(TrainingError, match="numbers that are not finite in 2 samples of 'after'"):
        module._report(trainer, BAD, None, stage_or_templates, **settings)
    assert happened == (["written"] if writes else []) + ["all are here"]
    assert not (tmp_path / "finished.json").exists()
