"""`report` of runs that ended and of one that did not, from what they have logged."""

import json

import pytest

from rlkd_trl.evaluation.run_log import RunLog, append_completions
from tests.recipes.command_lines import run


def log_of(directory, value):
    history = [{"step": step, "reward": value * step} for step in (1, 2, 3)]
    RunLog("PPO", {"after": {"bleu": value}}, history, headline=[("bleu", "BLEU", ".2f")]).save(directory)
    record = {"step": 1, "kind": "rollout", "by": "student", "prompt": "p", "text": "t", "tokens": ["t"]}
    append_completions(directory / "completions.jsonl", [{**record, "ended": True}])
    return directory


@pytest.fixture
def runs(tmp_path):
    return [log_of(tmp_path / name / "seed0", value) for name, value in (("a", 1.5), ("b", 2.5))]


def data_of(page):
    return json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])


def test_runs_side_by_side(runs, tmp_path, capsys):
    output = tmp_path / "report.html"
    assert run(f"report {runs[0]} {runs[1]} --output {output} --png {tmp_path / 'png'}") == 0
    data = data_of(output)
    assert data["runs"] == ["a/seed0", "b/seed0"]
    [chart] = data["groups"][0]["charts"]
    assert chart["series"] == {"a/seed0": [[1, 1.5], [2, 3.0], [3, 4.5]], "b/seed0": [[1, 2.5], [2, 5.0], [3, 7.5]]}
    assert [record["run"] for record in data["completions"]] == data["runs"]
    assert "<td>1.50</td><td>2.50</td>" in output.read_text()
    assert [file.name for file in (tmp_path / "png").iterdir()] == ["reward.png"]
    assert (tmp_path / "png" / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert "2 runs" in capsys.readouterr().out


def test_a_run_that_did_not_end_is_read_from_its_newest_checkpoint(tmp_path):
    for step in (2, 10):
        state = {"log_history": [{"step": step - 1, "loss": 1.0}, {"step": step, "loss": 2.0}]}
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    with (tmp_path / "run" / "completions.jsonl").open("w") as file:
        file.write('{"step": 1, "kind": "rollout", "by": "student", "prompt": "p", "tokens": []}\n{"step": 2, "kin')
    assert run(f"report {tmp_path}/run --output {tmp_path}/report.html") == 0
    data = data_of(tmp_path / "report.html")
    assert data["groups"][0]["charts"][0]["series"] == {"run": [[9, 1.0], [10, 2.0]]}
    assert len(data["completions"]) == 1


def test_bad_input_is_named(runs, tmp_path, capsys):
    (tmp_path / "there.html").write_text("mine")
    cases = {
        f"report {tmp_path}": "has no run_log.json and no checkpoint",
        f"report {runs[0]} --output {tmp_path}/there.html": "there.html exists: name another file, or",
        f"report {runs[0]} --output {tmp_path}": "is a directory",
        f"report {runs[0]} {runs[0]} --output {tmp_path}/new.html": "A run is named twice",
        "report": "the following arguments are required: RUN",
    }
    for command, message in cases.items():
        assert run(command) == 2, command
        assert message in capsys.readouterr().err
    assert (tmp_path / "there.html").read_text() == "mine"
    (runs[0] / "run_log.json").write_text("{")
    assert run(f"report {runs[0]} --output {tmp_path}/new.html") == 2
    assert "run_log.json cannot be read" in capsys.readouterr().err
