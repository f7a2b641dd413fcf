"""What encoder_kd refuses to write over or to go on from, what a broken-off run keeps, and that 0 means sound."""

import logging
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from rlkd_trl.commands import encoder_results, encoder_stages
from tests.models.encoders import VOCAB
from tests.recipes.command_lines import metrics_of, run, write_csv
from tests.recipes.test_encoder_kd import TWO_STAGES, command, weights
from tests.recipes.test_nothing_lost import contents
from tests.trainers.tiny_runs import assert_same_weights

# Two steps of gradient descent that leave weights beyond float32's range of losses.
DIVERGES = "--losses 1e6*hidden_mse+logits_kl --optim sgd --learning_rate 10 --max_grad_norm 0"


@pytest.fixture
def inputs(encoders, tmp_path):
    """Copies of all of these, which a test may harm."""
    places = {}
    (tmp_path / "inputs").mkdir()
    for name, path in encoders._asdict().items():
        places[name] = tmp_path / "inputs" / path.name
        (shutil.copytree if path.is_dir() else shutil.copy)(path, places[name])
    return type(encoders)(**places)


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("rlkd_trl"), "propagate", True)
    return caplog


def change_weights(checkpoint: Path, name: str, row: int, value: float) -> None:
    state = load_file(checkpoint / "model.safetensors")
    state[name][row] = value
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})


# Exit code 0 means sound


def test_a_student_that_diverges_is_saved_and_named(encoders, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(f"{command(encoders, out, 'task')} --task_eval_dataset {encoders.test} {DIVERGES}") == 1
    said = capsys.readouterr().err.splitlines()
    count = len(Path(encoders.test).read_text().splitlines()) - 1
    assert f"numbers that are not finite in {count} samples of 'after'" in said[-1] and str(out) in said[-1]
    assert sum(line.startswith("error: ") for line in said) == 1
    metrics = metrics_of(out)
    assert metrics["after"]["samples_not_finite"] == count and metrics["after"]["accuracy"] is None
    assert metrics["before"]["samples_not_finite"] == 0 and metrics["before"]["accuracy"] is not None
    assert {"model.safetensors", "cost.json", "report.html", "README.md"} <= {path.name for path in out.iterdir()}
    assert not (out / "finished.json").exists()


def test_no_stage_follows_one_that_diverges(encoders, tmp_path, capsys):
    out = tmp_path / "out"
    flags = f"--stages task task {DIVERGES}"
    assert run(f"{command(encoders, out, 'task')} {flags}") == 1
    first = out / "stage1-task"
    assert str(first) in capsys.readouterr().err.splitlines()[-1]
    assert (first / "model.safetensors").is_file() and not (first / "finished.json").exists()
    assert not (out / "model.safetensors").exists()
    assert run(f"{command(encoders, out, 'task')} {flags} --resume") == 1, "it is still not sound"
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("who", "name"), [("teacher", "bert.embeddings.word_embeddings.weight"), ("student", "classifier.weight")]
)
def test_what_is_not_finite_before_training_is_said_before_training(who, name, inputs, tmp_path, capsys, warnings):
    """A word that is in held-out texts alone; and a class whose logits are too large in all."""
    word = VOCAB - 1
    write_csv(tmp_path / "train.csv", [{"text": "w5 w6 w7", "label": "low"}, {"text": "w6 w5", "label": "mid"}] * 8)
    write_csv(tmp_path / "test.csv", [{"text": "w5 w6", "label": "low"}, {"text": f"w{word} w5", "label": "mid"}])
    flags = f"--task_dataset {tmp_path}/train.csv --task_eval_dataset {tmp_path}/test.csv --losses logits_kl"
    if who == "teacher":
        change_weights(inputs.task, name, word, 3e38)
    else:
        shutil.copytree(inputs.task, inputs.task.parent / "beginner")
        change_weights(inputs.task.parent / "beginner", name, 0, 3e38)
        flags += f" --student {inputs.task.parent / 'beginner'}"
    assert run(f"{command(inputs, tmp_path / 'out', 'task')} {flags}") == 1
    error = capsys.readouterr().err
    assert ("1 samples of 'teacher'" if who == "teacher" else "2 samples of 'before'") in error
    assert "The task stage was not begun." in error
    assert ("1 of 2 texts, the first of them 'w29 w5'" if who == "teacher" else "the logits not") in warnings.text
    assert not (tmp_path / "out").exists()


def test_states_that_are_not_finite_are_counted_in_a_general_stage(inputs, tmp_path, capsys):
    write_csv(tmp_path / "train.csv", [{"text": "w5 w6 w7"}, {"text": "w6 w5"}] * 8)
    write_csv(tmp_path / "test.csv", [{"text": "w5 w6"}, {"text": "w29 w5"}, {"text": "w6 w29"}])
    change_weights(inputs.general, "bert.embeddings.word_embeddings.weight", 29, 3e38)
    flags = f"--dataset {tmp_path}/train.csv --eval_dataset {tmp_path}/test.csv --stages general --losses hidden_mse"
    assert run(f"{command(inputs, tmp_path / 'out', 'general')} {flags}") == 1
    assert "2 samples of 'before'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("harm", "flags", "message"),
    [
        ("task", "", "weights that are NaN or infinite, in classifier.weight: it was destroyed"),
        ("", "--learning_rate inf", "learning_rate = inf is out of range"),
        ("", "--stage_learning_rates inf", "stage_learning_rates = [inf] is out of range"),
        ("", "--losses inf*logits_kl", "the weight 'inf' of logits_kl is no number above 0"),
    ],
)
def test_what_is_not_finite_is_refused(harm, flags, message, inputs, tmp_path, capsys):
    if harm:
        change_weights(getattr(inputs, harm), "classifier.weight", 1, float("nan"))
    assert run(f"{command(inputs, tmp_path / 'out', 'task')} {flags}") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Nothing is written over


@pytest.mark.parametrize(
    ("output", "flag"),
    [
        ("general", "--teacher"),
        ("task", "--task_teacher"),
        ("student", "--student"),
        ("task/run", "--task_teacher"),
        ("train", "--output_dir"),
        (".", "--teacher"),
    ],
)
def test_an_input_is_never_the_output(output, flag, inputs, tmp_path, capsys):
    place, _, below = output.partition("/")
    place = inputs.train.parent if place == "." else getattr(inputs, place)
    before = contents(tmp_path)
    student = f"--student {inputs.student} --stages general task --losses hidden_mse hidden_mse+hard_ce"
    assert run(f"{command(inputs, place / below)} {student} --overwrite_output_dir") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and flag in error
    assert contents(tmp_path) == before


def test_a_finished_run_is_not_written_over(encoders, tmp_path, capsys):
    flags = f"{command(encoders, tmp_path / 'out')} {TWO_STAGES} --save_strategy no --save_steps 500"
    assert run(flags) == 0
    before = contents(tmp_path / "out")
    assert run(flags) == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err
    for path in (tmp_path / "out").iterdir():
        if path.is_file():
            path.unlink()
    assert run(flags) == 2, "the first stage's student is a result, too"
    of_first = contents(tmp_path / "out")
    assert of_first and all(before[name] == content for name, content in of_first.items())


# A run that was broken off goes on


@pytest.fixture(scope="module")
def whole(encoders, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(f"{command(encoders, out)} {TWO_STAGES} --max_steps 3") == 0
    return out


def assert_is(run_directory: Path, whole: Path) -> None:
    for place in ("stage1-general", "."):
        assert_same_weights(weights(run_directory / place), weights(whole / place))
        assert metrics_of(run_directory / place) == metrics_of(whole / place)
        assert (run_directory / place / "finished.json").is_file()


@pytest.mark.slow(0.5)
@pytest.mark.parametrize(
    ("when", "stage"), [("save_student", 1), ("finish_stage", 1), ("build", 2), ("save_student", 2)]
)
def test_killed_outside_of_training(when, stage, encoders, tmp_path, whole, monkeypatch):
    """Before a step of the recipe in either stage: `build` of the second is between the stages."""
    room = encoder_stages if when == "build" else encoder_results
    step, seen = getattr(room, when), []

    def killed(*args, **kwargs):
        seen.append(args)
        if len(seen) == stage:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    flags = f"{command(encoders, tmp_path / 'out')} {TWO_STAGES} --max_steps 3"
    with monkeypatch.context() as patch:
        patch.setattr(room, when, killed)
        assert run(flags) == 130
    assert run(f"{flags} --resume") == 0
    assert_is(tmp_path / "out", whole)


@pytest.mark.slow(0.6)
@pytest.mark.parametrize("place", ["stage1-general", "."])
def test_a_torn_checkpoint_is_not_gone_on_from(place, encoders, tmp_path, whole, capsys):
    out = tmp_path / "out"
    flags = f"{command(encoders, out)} {TWO_STAGES} --max_steps 3"
    shutil.copytree(whole, out)
    if place == "stage1-general":
        for path in [*out.glob("checkpoint-*"), *(path for path in out.iterdir() if path.is_file())]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    torn = out / place / "checkpoint-3" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:1000])
    for name in ("finished.json", "metrics.json"):
        (out / place / name).unlink(missing_ok=True)
    assert run(f"{flags} --resume") == 0
    assert "checkpoint-3 is not whole" in capsys.readouterr().out
    assert_is(out, whole)
