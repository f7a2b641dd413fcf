"""What a command refuses to write over, and what it refuses to go on from."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlkd_trl.commands import run_directory
from tests.recipes.command_lines import COLUMNS, SAMPLING, TWO_STEPS, run

SFT = f"sft {COLUMNS} {TWO_STEPS}"
RLOO = f"rloo_kd {COLUMNS} {TWO_STEPS} {SAMPLING}"


@pytest.fixture
def inputs(checkpoints, train_csv, tmp_path):
    """Copies of a teacher, a student, a data directory, a template file and a reward file, which a test may harm."""
    pair = checkpoints["t5-tied"]
    shutil.copytree(pair.teacher, tmp_path / "teacher")
    shutil.copytree(pair.student, tmp_path / "student")
    (tmp_path / "data").mkdir()
    shutil.copy(train_csv, tmp_path / "data" / "train.csv")
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "templates.yaml").write_text("ask: 'Say {{ source }}'\n")
    (tmp_path / "reward.py").write_text("def constant(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    (tmp_path / "preset.yaml").write_text("batch_size: 2\n")
    (tmp_path / "link").symlink_to(tmp_path / "teacher")
    return tmp_path


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


DISTIL = "--teacher {i}/teacher --student {i}/student --dataset {i}/data --templates {i}/templates"
LABEL = f"pseudo_label --teacher {{i}}/teacher --dataset {{i}}/data/train.csv {COLUMNS}"
EVALUATE = f"evaluate --student {{i}}/student --teacher {{i}}/link --dataset {{i}}/data {COLUMNS}"
OVERWRITING = [
    *((f"{RLOO} {DISTIL} --output_dir {{i}}/{out}", flag) for out, flag in [
        ("teacher", "--teacher"),
        ("link", "--teacher"),
        ("link/../student", "--student"),
        ("teacher/run", "--teacher"),
        ("data", "--dataset"),
        ("data/run", "--dataset"),
        ("templates", "--templates"),
        (".", "--dataset"),
    ]),
    (f"{RLOO} {DISTIL} --reward {{i}}/reward.py:constant --output_dir {{i}}/reward.py", "--output_dir"),
    (
        f"{RLOO} --teacher {{i}}/link --student {{i}}/student --dataset {{i}}/data --output_dir {{i}}/teacher",
        "--teacher",
    ),
    (f"{SFT} --student {{i}}/student --dataset {{i}}/data/train.csv --output_dir {{i}}/student", "--student"),
    (f"{SFT} --tokenizer {{i}}/teacher --dataset {{i}}/data/train.csv --output_dir {{i}}/link", "--tokenizer"),
    (f"{LABEL} --output {{i}}/data/train.csv", "--dataset"),
    (f"{LABEL} --output {{i}}/teacher/config.json", "--teacher"),
    (f"{LABEL} --output {{i}}/link/labels.jsonl", "--teacher"),
    (f"{LABEL} --templates {{i}}/templates --output {{i}}/templates/templates.yaml", "--templates"),
    (f"{LABEL} --config {{i}}/preset.yaml --overwrite_output_dir --output {{i}}/preset.yaml", "--config"),
    (f"{EVALUATE} --output_dir {{i}}/student", "--student"),
    (f"{EVALUATE} --output_dir {{i}}/teacher", "--teacher"),
    (f"{EVALUATE} --output_dir {{i}}/data", "--dataset"),
    (
        f"compare {COLUMNS} --teacher {{i}}/teacher --student {{i}}/student --dataset {{i}}/data/train.csv "
        "--test_dataset {i}/data --methods ppo --max_steps 2 --seeds 0 --output_dir {i}/data",
        "--test_dataset",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("command", "flag"), OVERWRITING, ids=lambda value: value.replace(" ", "_")[-60:])
def test_an_input_is_never_the_output(command, flag, inputs, capsys):
    before = contents(inputs)
    assert run(command.format(i=inputs)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and flag in error
    assert contents(inputs) == before


def test_a_hard_link_to_the_data_is_the_data(inputs, capsys):
    os.link(inputs / "data" / "train.csv", inputs / "labels.jsonl")
    assert run(LABEL.format(i=inputs) + f" --overwrite_output_dir --output {inputs / 'labels.jsonl'}") == 2
    assert "--dataset" in capsys.readouterr().err


@pytest.mark.slow(1)
def test_a_finished_run_is_not_written_over(inputs, capsys):
    """Nor are an unfinished one's checkpoints, an evaluation's results and pseudo-labels."""
    command = f"{SFT} --student {inputs}/student --dataset {inputs}/data --save_steps 1 --output_dir {inputs}/run"
    assert run(command) == 0
    before = contents(inputs / "run")
    assert run(command) == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err
    for path in (inputs / "run").iterdir():
        if path.is_file():
            path.unlink()
    assert run(command) == 2
    assert "checkpoint-2 of a run that did not finish: --resume" in capsys.readouterr().err
    assert run(f"{command} --overwrite_output_dir --max_steps 1") == 0
    assert not (inputs / "run" / "checkpoint-2").exists()
    assert contents(inputs / "run") != before

    for command in (
        f"{EVALUATE.format(i=inputs)} --output_dir {inputs}/results",
        f"{LABEL.format(i=inputs)} --output {inputs}/labels.jsonl",
    ):
        assert run(command) == 0
        assert run(command) == 2
        assert "--overwrite_output_dir" in capsys.readouterr().err
        assert run(f"{command} --overwrite_output_dir") == 0


@pytest.mark.slow(1)
def test_resuming_a_finished_run_does_nothing_more(inputs, capsys):
    command = f"{RLOO} {DISTIL.format(i=inputs)} --save_steps 1 --output_dir {inputs}/run"
    assert run(command) == 0
    before = contents(inputs / "run")
    capsys.readouterr()
    assert run(f"{command} --resume") == 0
    assert "is finished, after 2 steps: nothing is left to do" in capsys.readouterr().out
    assert contents(inputs / "run") == before
    # All steps done, but killed before the results were written: these, and no further step.
    for name in ("finished.json", "metrics.json"):
        (inputs / "run" / name).unlink()
    assert run(f"{command} --resume") == 0
    metrics = json.loads((inputs / "run" / "metrics.json").read_text())
    assert metrics == json.loads(before[f"{inputs}/run/metrics.json"])
    assert before[f"{inputs}/run/model.safetensors"] == (inputs / "run" / "model.safetensors").read_bytes()
    assert not (inputs / "run" / "checkpoint-3").exists()


@pytest.mark.slow(0.4)
@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("--student {other}", "student"),
        ("--teacher {other}", "teacher"),
        ("--learning_rate 0.5", "learning_rate was 0.01 and is 0.5"),
        ("--seed 7", "seed"),
        ("--templates builtin:data_to_text", "templates"),
        ("--dataset {test} --eval_dataset {test}", "data was"),
        ("--value expected", "value"),
        ("--gradient_accumulation_steps 2", "gradient_accumulation_steps"),
    ],
)
def test_another_run_is_not_continued(changed, named, inputs, checkpoints, test_csv, capsys):
    flags = f"{DISTIL.format(i=inputs)} --learning_rate 0.01 --save_steps 1 --output_dir {inputs}/run"
    assert run(f"{RLOO} {flags}") == 0
    before = contents(inputs / "run")
    changed = changed.format(other=checkpoints["t5-tied"].other, test=test_csv)
    assert run(f"{RLOO} {flags} {changed} --max_steps 3 --resume") == 2
    error = capsys.readouterr().err
    assert "checkpoint-2 is of another run" in error and named in error
    assert contents(inputs / "run") == before


@pytest.mark.slow(1.0)
def test_another_method_or_architecture_is_not_continued(inputs, checkpoints, capsys):
    flags = f"{DISTIL.format(i=inputs)} --save_steps 1 --output_dir {inputs}/run"
    assert run(f"{RLOO} {flags}") == 0
    assert run(f"{RLOO.replace('rloo_kd', 'ppo_kd')} {flags} --resume") == 2
    assert 'trainer was "RLOOKDTrainer" and is "PPOKDTrainer"' in capsys.readouterr().err
    llama = checkpoints["llama"]
    assert run(f"{RLOO} {flags} --teacher {llama.teacher} --student {llama.student} --resume") == 2
    assert "is of another run" in capsys.readouterr().err


@pytest.mark.slow(1)
def test_what_is_logged_and_saved_may_change(inputs):
    flags = f"{DISTIL.format(i=inputs)} --save_steps 1 --output_dir {inputs}/run"
    assert run(f"{RLOO} {flags}") == 0
    changed = "--max_steps 3 --logging_steps 2 --save_steps 2 --save_total_limit 1 --log_completions True --resume"
    assert run(f"{RLOO} {flags} {changed}") == 0
    assert sorted(path.name for path in (inputs / "run").glob("checkpoint-*")) == ["checkpoint-3"]


# A reward that fails when it reads the held-out prompts for the third time, that is, after training.
LATE = """
import math
SEEN = []

def late(prompts, completions, **kwargs):
    SEEN.append(tuple(prompts))
    if SEEN.count(tuple(prompts)) < 3:
        return [float(1 + len(text)) for text in completions]
    {does}
"""
LATE_CASES = [
    ("raise ValueError('out of paper')", 2, "out of paper"),
    ("raise SystemExit", 2, "raised SystemExit"),
    ("return [math.nan] + [1.0] * (len(prompts) - 1)", 1, "1 samples of 'after'"),
    ("return [-3e38] * len(prompts)", 1, "8 samples of 'after'"),
]


@pytest.mark.slow(0.4)
@pytest.mark.parametrize(("does", "code", "said"), LATE_CASES, ids=["raises", "exits", "nan", "overflows"])
def test_a_failing_last_evaluation_loses_nothing(does, code, said, inputs, test_csv, capsys):
    """The student is there, and all that was measured before; what the last evaluation gave is not shown as sound."""
    (inputs / "late.py").write_text(LATE.format(does=does))
    command = f"{RLOO} {DISTIL} --eval_dataset {test_csv} --reward {{i}}/late.py:late --output_dir {{i}}/run"
    assert run(command.format(i=inputs)) == code
    error = capsys.readouterr().err
    assert said in error and error.count("error: ") == 1
    out = inputs / "run"
    metrics = json.loads((out / "metrics.json").read_text())
    assert min(metrics["before"]["reward"], metrics["teacher"]["reward"]) >= 1
    assert (out / "model.safetensors").read_bytes() != (inputs / "student" / "model.safetensors").read_bytes()
    assert json.loads((out / "cost.json").read_text())["optimizer_steps"] == 2
    assert not (out / "finished.json").exists()
    if code == 1:
        assert metrics["after"]["reward"] is None and metrics["after"]["samples_not_finite"] == int(said[0])
        assert (out / "report.html").is_file() and (out / "README.md").is_file()


def test_what_is_not_finite_before_training_is_said_before_training(inputs, capsys):
    (inputs / "reward.py").write_text("def bad(prompts, **kwargs):\n    return [float('inf')] * len(prompts)\n")
    assert run(f"{RLOO} {DISTIL} --reward {{i}}/reward.py:bad --output_dir {{i}}/run".format(i=inputs)) == 1
    error = capsys.readouterr().err
    assert "3 samples of 'teacher', 3 samples of 'before'" in error and "Nothing was trained." in error
    assert not (inputs / "run" / "model.safetensors").exists()


@pytest.mark.slow(0.7)
def test_an_evaluation_that_fails_keeps_what_it_has(inputs, test_csv, capsys):
    """The teacher's metrics, where the student's cannot be had; both, where they are not finite."""
    command = f"{EVALUATE.replace('{i}/data', str(test_csv))} --reward {{i}}/late.py:late"
    late = LATE.replace("< 3", "< 2")
    (inputs / "late.py").write_text(late.format(does="raise ValueError('out of paper')"))
    assert run(command.format(i=inputs) + f" --output_dir {inputs}/one") == 2
    assert "out of paper" in capsys.readouterr().err
    assert json.loads((inputs / "one" / "metrics.json").read_text())["teacher"]["reward"] >= 1
    assert "teacher" in json.loads((inputs / "one" / "outputs.jsonl").read_text().splitlines()[0])
    (inputs / "late.py").write_text(late.format(does="return [math.inf] * len(prompts)"))
    assert run(command.format(i=inputs) + f" --output_dir {inputs}/two") == 1
    assert "8 samples of 'student'" in capsys.readouterr().err
    metrics = json.loads((inputs / "two" / "metrics.json").read_text())
    assert metrics["student"]["reward"] is None and metrics["student"]["samples_not_finite"] == 8


IN_USE = {
    "sft": f"{SFT} --student {{i}}/student --dataset {{i}}/data/train.csv",
    "rloo": f"{RLOO} {DISTIL}",
    "resume": f"{RLOO} {DISTIL} --resume",
    "overwrite": f"{RLOO} {DISTIL} --overwrite_output_dir",
    "encoder": "encoder_kd",
    "search": "encoder_search --smoke",
    "assistants": "assistant_kd --smoke",
    "compare": f"compare {COLUMNS} --teacher {{i}}/teacher --student {{i}}/student --dataset {{i}}/data/train.csv "
    "--test_dataset {i}/data --methods ppo --max_steps 2 --seeds 0",
    "evaluate": EVALUATE,
}


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("name", IN_USE)
def test_two_commands_do_not_write_into_one_directory(name, inputs, capsys, monkeypatch):
    monkeypatch.setattr(run_directory, "_SECONDS_TO_END", 0.2)
    monkeypatch.chdir(inputs)  # of a demo's teachers
    (inputs / "run").mkdir()
    (inputs / "run" / "weights").touch()
    before = contents(inputs)
    with run_directory.held_alone(inputs / "run"):
        assert run(f"{IN_USE[name].format(i=inputs)} --output_dir {inputs / 'run'}") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --output_dir {inputs / 'run'} is in use by another command")
    assert error.count("\n") == 1
    assert contents(inputs) == before


@pytest.mark.slow(0.3)
def test_two_commands_do_not_write_one_cache(inputs, capsys, monkeypatch):
    monkeypatch.setattr(run_directory, "_SECONDS_TO_END", 0.2)
    (inputs / "cache").mkdir()
    with run_directory.held_alone(inputs / "cache"):
        command = f"cache_teacher {COLUMNS} --teacher {inputs}/teacher --dataset {inputs}/data"
        assert run(f"{command} --output {inputs / 'cache'}") == 2
    assert capsys.readouterr().err.startswith(f"error: --output {inputs / 'cache'} is in use by another command")
    assert not list((inputs / "cache").iterdir())


@pytest.mark.slow(0.3)
def test_two_commands_do_not_write_one_file_of_pseudo_labels(inputs, capsys, monkeypatch):
    """The part that another one writes is left as it is. One that waits finds the other's labels, and keeps them."""
    monkeypatch.setattr(run_directory, "_SECONDS_TO_END", 0.2)
    command, labels, part = LABEL.format(i=inputs), inputs / "out.jsonl", inputs / "out.jsonl.part"
    with run_directory.part_held_alone(labels, overwrite=False):
        part.write_text("of the other one\n")
        assert run(f"{command} --output {labels}") == 2
        assert part.read_text() == "of the other one\n"
    assert capsys.readouterr().err.startswith(f"error: --output {labels} is in use by another command")

    part.unlink()
    other = run_directory.part_held_alone(labels, overwrite=False)
    other.__enter__()
    part.write_text("of the other one\n")

    def finish(seconds):
        part.replace(labels)
        other.__exit__(None, None, None)

    monkeypatch.setattr(run_directory.time, "sleep", finish)
    assert run(f"{command} --output {labels}") == 2
    assert capsys.readouterr().err.startswith(f"error: --output {labels} exists")
    assert labels.read_text() == "of the other one\n" and not part.exists()


@pytest.mark.slow(3)
def test_a_directory_is_free_when_its_run_is_killed(tmp_path, monkeypatch):
    """The run that follows waits for the one that is about to end."""
    program = "import sys, time; from rlkd_trl.commands.run_directory import held_alone\n"
    program += "with held_alone(sys.argv[1]):\n    print('holds', flush=True)\n    time.sleep(600)"
    run_there = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert run_there.stdout.readline() == "holds\n"
    waits = []

    def kill_it(seconds):
        waits.append(seconds)
        run_there.kill()
        run_there.wait()

    monkeypatch.setattr(run_directory.time, "sleep", kill_it)
    with run_directory.held_alone(tmp_path):
        assert len(waits) == 1, "it was held, and then it was free"


def test_nowhere_to_write(inputs, capsys):
    (inputs / "file").write_text("")
    assert run(f"{SFT} --student {inputs}/student --dataset {inputs}/data --output_dir {inputs}/file/run") == 2
    assert "cannot be written" in capsys.readouterr().err
