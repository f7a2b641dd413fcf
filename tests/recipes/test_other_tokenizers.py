"""The commands with a teacher of characters and a student of words."""

import shutil

import pytest

from tests.models.tokenizers_of_all_kinds import character_tokenizer
from tests.recipes.command_lines import SAMPLING, TWO_STEPS, metrics_of, run, word_rows, write_csv
from tests.tiny_models import MODELS


@pytest.fixture(scope="module")
def place(tmp_path_factory, checkpoints):
    """A teacher, a student and data."""
    place = tmp_path_factory.mktemp("characters")
    MODELS["llama"](seed=5).save_pretrained(place / "teacher")
    character_tokenizer().save_pretrained(place / "teacher")
    shutil.copytree(checkpoints["t5-tied"].student, place / "student")
    write_csv(place / "data.csv", word_rows(30))
    return place


def command(recipe: str, place) -> str:
    return (
        f"{recipe} --teacher {place}/teacher --student {place}/student --dataset {place}/data.csv --source_column mr"
    )


def test_a_run_and_its_evaluation(place):
    flags = f"--align_tokenizers True {SAMPLING} {TWO_STEPS}"
    assert run(f"{command('rloo_kd', place)} {flags} --output_dir {place}/out") == 0
    metrics = metrics_of(place / "out")
    assert metrics["after"]["unreadable"] == metrics["before"]["unreadable"] == 0
    evaluate = command("evaluate", place).replace("/student", "/out")
    flags = "--align_tokenizers True --max_completion_length 6 --reward log_likelihood"
    assert run(f"{evaluate} {flags} --output_dir {place}/scores") == 0
    student = metrics_of(place / "scores")["student"]
    assert student["teacher_nll_per_sequence"] == pytest.approx(-student["reward"])
    assert student["unreadable"] == 0 and "unreadable_of_teacher" in student


@pytest.mark.slow(0.7)
@pytest.mark.parametrize("guards", [True, False])
def test_kd_says_that_it_has_spoilt_the_student(guards, place, capsys, monkeypatch):
    monkeypatch.setattr("rlkd_trl.trainers.guards._WORSE", -10.0)  # no output is good enough
    monkeypatch.setattr("rlkd_trl.trainers.guards._QUALITIES", {"teacher_nll_per_token": (False, -10.0)})
    flags = (
        f"--align_tokenizers True --sequences data --target_column ref {TWO_STEPS} --logging_steps 1 --guards {guards}"
    )
    flags += " --max_steps 8 --learning_rate 0.01"  # enough for the loss to fall
    assert run(f"{command('kd', place)} {flags} --output_dir {place}/kd{guards}") == 0
    said = capsys.readouterr().out
    assert ("Warning: teacher_nll_per_token of held-out outputs went from" in said) == guards
    assert ("--alpha below 1" in said) == guards


@pytest.mark.parametrize("recipe", ["ppo_kd", "all_actions_kd", "evaluate"])
def test_without_the_flag_it_is_refused_before_models_load(recipe, place, capsys, monkeypatch):
    monkeypatch.setattr("rlkd_trl.models.loading.load_model", None)
    assert run(f"{command(recipe, place)} --output_dir {place}/refused") == 2
    said = capsys.readouterr().err
    assert "different tokenizers (15 and 29 tokens" in said
    assert ("set align_tokenizers" in said) == (recipe != "all_actions_kd")


@pytest.mark.parametrize(
    "flags", ["--teacher_weighting per_example", "--teacher_weighting validation", "--teacher_column mr"]
)
def test_teachers_with_different_tokenizers_are_not_compared(flags, place, capsys, monkeypatch):
    monkeypatch.setattr("rlkd_trl.models.loading.load_model", None)
    both = command("rloo_kd", place).replace("--student", f"{place}/student --student")
    flags = f"{flags} --target_column ref --align_tokenizers True {TWO_STEPS} --output_dir {place}/refused"
    assert run(f"{both} {flags}") == 2
    assert "needs teachers with one tokenizer, and those of" in capsys.readouterr().err
