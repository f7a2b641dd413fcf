"""recipes/compare.py: which runs it makes, what it makes of them, and that it makes them once.

The recipes that it calls are stand-ins, scripts that copy a checkpoint; the comparison itself and its tests are real.
"""

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from rlkd_trl.commands import demo, files_read
from rlkd_trl.commands.comparison import cells
from rlkd_trl.commands.comparison.arguments import Budget, ComparisonSettings
from rlkd_trl.commands.comparison.cells import Cell
from rlkd_trl.commands.comparison.checks import ENCODERS, check_flags, find_method, first_runs
from rlkd_trl.commands.comparison.grid import Grid
from rlkd_trl.commands.parser import RecipeParser
from rlkd_trl.commands.settings import groups_of
from rlkd_trl.trainers.config import RLOOKDConfig
from tests.recipes.command_lines import (
    COLUMNS,
    ROOT,
    main_of,
    metrics_of,
    parsed,
    read_jsonl,
    run,
    word_rows,
    write_csv,
    write_templates,
)
from tests.recipes.forks import fork_recipes
from tests.recipes.stand_ins import DATA, GOOD, MODELS, MeasuredOnce, calls, compare, places, results_of
from tests.tiny_models import word_tokenizer


@pytest.fixture(scope="module")
def measured_once() -> MeasuredOnce:
    return MeasuredOnce()


@pytest.fixture
def in_full() -> None:
    """For tests of processes and of numbers: every run is a process, and every model is measured anew."""


@pytest.fixture(autouse=True)
def in_short(request, measured_once, monkeypatch) -> None:
    """The others are about which runs are made, and what is kept of them."""
    if "in_full" not in request.fixturenames:
        measured_once.patch(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Callable[[str, Path], None]:
    """Leaves in the working directory what `compare` does, which runs once for all tests that begin with it."""
    kept: dict[str, Path] = {}

    def leave(flags: str, workplace: Path) -> None:
        if flags not in kept:
            assert compare(flags, workplace) == 0
            kept[flags] = tmp_path_factory.mktemp("finished")
            shutil.copytree(workplace / "out", kept[flags] / "out")
            shutil.copy(workplace / "calls.jsonl", kept[flags])
        else:
            shutil.copytree(kept[flags], workplace, dirs_exist_ok=True)

    return leave


@pytest.mark.slow
def test_search_runs_and_tables(in_full, workplace):
    rates = "--learning_rates 2e-4 5e-4 1e-3 --common logging_steps=7 temperature=0.9"
    assert compare(f"{GOOD} --max_steps 9 3 {rates} --baseline rloo_sequence", workplace, figures=True) == 0
    # The search: the smallest budget, the first seed, all rates. Then each method's best rate, once for each cell.
    search = [f"max_steps_3/{m}/seed0-lr{r}" for m in ("ppo", "rloo_sequence") for r in ("0.0002", "0.0005", "0.001")]
    best = {"ppo": "0.0005", "rloo_sequence": "0.001"}
    runs = [f"max_steps_{b}/{m}/seed{s}-lr{r}" for b in (3, 9) for s in (0, 1) for m, r in best.items()]
    assert places(workplace)[:6] == search
    assert sorted(places(workplace)) == sorted({*search, *runs}), "each once"

    results = results_of(workplace)
    assert results["search"]["chosen"] == {"ppo": 5e-4, "rloo_sequence": 1e-3}
    assert results["search"]["scores"]["ppo"] == pytest.approx({"0.0002": 3e-4, "0.0005": 0, "0.001": 5e-4})
    assert results["search"]["cost"]["ppo"]["0.0002"]["cpu_seconds"] == 2.5
    assert list(results["tests"]["test"]) == ["max_steps_3", "max_steps_9"]
    for rows in results["tests"]["test"].values():
        assert [row["model"] for row in rows] == ["teacher", "warm_start", "ppo", "rloo_sequence"]
        assert [row["seeds"] for row in rows] == [[], [], [0, 1], [0, 1]]
        assert rows[2]["cost"]["cpu_seconds"]["mean"] == 2.5 and rows[0]["cost"] == {}
        # Both methods' runs end in the same weights here.
        assert rows[2]["greedy"] == rows[3]["greedy"] != rows[1]["greedy"]
        assert rows[2]["difference"]["bleu"] == {"difference": 0, "low": 0, "high": 0}
        assert rows[3]["difference"] == {}
    text = (workplace / "out" / "comparison.md").read_text()
    assert text.count("\n## max_steps_") == 2 and "Difference from rloo_sequence" in text
    assert "| ppo | 0.0003 | **0** | 0.0005 |" in text
    written = {path.name for path in (workplace / "out").iterdir() if path.is_file()}
    assert written == {f"comparison.{kind}" for kind in ("md", "csv", "json")} | {
        "metrics.png",
        "quality_diversity.png",
    }

    values = {Path(call["place"]).relative_to("out").as_posix(): call["values"] for call in calls(workplace)}
    of_run = values["max_steps_9/ppo/seed1-lr0.0005"]
    expected = {"--teacher": "teacher", "--student": "student", "--dataset": "data.csv", "--seed": "1"}
    expected |= {"--eval_dataset": "data.csv", "--max_steps": "9", "--max_completion_length": "6"}
    expected |= {"--source_column": "mr", "--target_column": "ref", "--templates": "good.yaml"}
    expected |= {"--learning_rate": "0.0005", "--logging_steps": "7", "--temperature": "0.9"}
    assert expected.items() <= of_run.items()
    assert "--lr_scheduler_type" not in of_run
    assert of_run["--config"].endswith("methods/ppo_kd/ppo.yaml") and "--eval_target_column" not in of_run


FOLLOWED = GOOD.replace("ppo rloo_sequence", "ppo+rloo_sequence ppo")


@pytest.mark.slow
def test_methods_that_follow_one_another(workplace):
    """Half of the budget each, the first one's rate chosen by what it leaves; the second begins with that."""
    flags = f"{FOLLOWED} --max_steps 5 --learning_rates 2e-4 5e-4 1e-3"
    assert compare(flags, workplace) == 0
    both = "max_steps_5/ppo+rloo_sequence"
    search = [f"{both}/ppo/seed0-lr{rate}" for rate in ("0.0002", "0.0005", "0.001")]
    search += [f"max_steps_5/ppo/seed0-lr{rate}" for rate in ("0.0002", "0.0005", "0.001")]
    search += [f"{both}/seed0-lr0.0005-lr{rate}" for rate in ("0.0002", "0.0005", "0.001")]
    runs = [f"{both}/ppo/seed1-lr0.0005", f"{both}/seed1-lr0.0005-lr0.001", "max_steps_5/ppo/seed1-lr0.0005"]
    assert places(workplace) == search + runs

    values = {Path(call["place"]).relative_to("out").as_posix(): call["values"] for call in calls(workplace)}
    first, second = values[f"{both}/ppo/seed1-lr0.0005"], values[f"{both}/seed1-lr0.0005-lr0.001"]
    assert (first["--student"], first["--max_steps"], first["--seed"]) == ("student", "2", "1")
    assert first["--config"].endswith("ppo_kd/ppo.yaml")
    assert (second["--student"], second["--max_steps"], second["--seed"]) == (f"out/{runs[0]}", "3", "1")
    assert second["--config"].endswith("rloo_kd/rloo_sequence.yaml") and second["--learning_rate"] == "0.001"

    results = results_of(workplace)
    assert results["search"]["chosen"] == {
        "ppo (of ppo+rloo_sequence)": 5e-4,
        "ppo+rloo_sequence": 1e-3,
        "ppo": 5e-4,
    }
    rows = {row["model"]: row for row in results["tests"]["test"]["max_steps_5"]}
    assert rows["ppo+rloo_sequence"]["cost"]["cpu_seconds"]["values"] == [2.5 + 2.5] * 2
    assert rows["ppo"]["cost"]["cpu_seconds"]["values"] == [2.5] * 2
    assert rows["ppo+rloo_sequence"]["at_the_edge"] and not rows["ppo"]["at_the_edge"]
    # All of it is there: nothing is run again. With another first preset, it is not the same run.
    assert compare(flags, workplace) == 0 and len(calls(workplace)) == 12
    with (workplace / "recipes/configs/methods/ppo_kd/ppo.yaml").open("a") as file:
        file.write("\ntemperature: 0.9\n")
    again = flags.replace("ppo+rloo_sequence ppo", "ppo+rloo_sequence")
    shutil.rmtree(workplace / "out" / both / "ppo")
    assert compare(again, workplace) == 2 and len(calls(workplace)) == 12


@pytest.mark.slow
def test_a_first_part_that_fails_is_the_methods_failure(workplace, monkeypatch, capsys):
    monkeypatch.setenv("FAIL", "rloo_sequence/ppo/seed1")
    assert compare(FOLLOWED, workplace) == 1
    part = "out/max_steps_3/ppo+rloo_sequence/ppo/seed1"  # where its output is
    assert f"ppo+rloo_sequence/seed1: FAILED: {part}: ppo_kd.py ended with exit code 3:" in capsys.readouterr().out
    rows = {row["model"]: row for row in results_of(workplace)["tests"]["test"]["max_steps_3"]}
    assert (rows["ppo+rloo_sequence"]["seeds"], rows["ppo+rloo_sequence"]["failed_seeds"]) == ([0], [1])
    monkeypatch.delenv("FAIL")
    assert compare(FOLLOWED, workplace) == 0
    both = "max_steps_3/ppo+rloo_sequence"
    assert places(workplace)[-2:] == [f"{both}/ppo/seed1", f"{both}/seed1"], "what is there is kept"
    # A first part without a rate leaves none for the method.
    monkeypatch.setenv("FAIL", "rloo_sequence/ppo")
    again = f"{FOLLOWED} --output_dir out2 --learning_rates 5e-4 1e-3"
    assert compare(again, workplace) == 1
    results = json.loads((workplace / "out2" / "comparison.json").read_text())
    assert results["search"]["chosen"]["ppo+rloo_sequence"] is None
    rows = {row["model"]: row for row in results["tests"]["test"]["max_steps_3"]}
    assert rows["ppo+rloo_sequence"]["failed_seeds"] == [0, 1] and rows["ppo"]["seeds"] == [0, 1]


@pytest.mark.parametrize(
    ("kind", "value", "parts", "shares"),
    [
        ("max_steps", 150, 2, ["75", "75"]),
        ("max_steps", 5, 3, ["1", "2", "2"]),
        ("max_generated_tokens", 10**9 + 1, 2, ["500000000", "500000001"]),
        ("max_cpu_seconds", 1.5, 2, ["0.75", "0.75"]),
        ("max_cpu_seconds", 60.0, 1, ["60"]),
    ],
)
def test_shares_of_a_budget(kind, value, parts, shares):
    assert [Budget(kind, value).flag(part, parts) for part in range(parts)] == [f"--{kind}={of}" for of in shares]


@pytest.mark.slow
def test_one_learning_rate_is_not_searched_for(workplace):
    without_validation = GOOD.replace("--validation_dataset data.csv", "")
    assert compare(f"{without_validation} --learning_rates 1e-3", workplace) == 0
    assert sorted(places(workplace)) == [f"max_steps_3/{m}/seed{s}" for m in ("ppo", "rloo_sequence") for s in (0, 1)]
    assert all(call["values"]["--learning_rate"] == "0.001" for call in calls(workplace))
    assert not any("--eval_dataset" in call["values"] for call in calls(workplace)), "the recipes hold some out"
    assert "Learning rates" not in (workplace / "out" / "comparison.md").read_text()


@pytest.mark.slow
def test_the_metric_to_select_on_says_what_is_better(workplace):
    one = GOOD.replace("ppo rloo_sequence", "ppo").replace("--seeds 0 1", "--seeds 5")
    assert compare(f"{one} --learning_rates 5e-4 2e-3 --select_on bleu", workplace) == 0
    assert results_of(workplace)["search"]["chosen"] == {"ppo": 2e-3}, "the stand-in's BLEU rises away from 5e-4"
    assert calls(workplace)[0]["values"]["--seed"] == "5"


@pytest.mark.slow
def test_the_test_metrics_are_those_of_the_evaluation_recipe(in_full, workplace):
    """Teacher, warm start and a run's student, greedy and sampled, measured by recipes/evaluate.py."""
    assert compare(f"{GOOD} --seeds 0", workplace) == 0
    rows = {row["model"]: row for row in results_of(workplace)["tests"]["test"]["max_steps_3"]}
    flags = f"--teacher teacher --dataset test.csv {COLUMNS} --templates good.yaml --max_completion_length 6"
    for name, student in {"warm_start": "student", "ppo": os.environ["TRAINED"]}.items():
        assert run(f"evaluate --student {student} {flags} --output_dir greedy_{name}") == 0
        found = metrics_of(workplace / f"greedy_{name}")
        for model, metrics in ((name, found["student"]), ("teacher", found["teacher"])):
            shown = {metric: interval["mean"] for metric, interval in rows[model]["greedy"].items()}
            del shown["nll_of_teacher_samples_per_token"]  # of samples; the recipe takes greedy answers
            assert shown == pytest.approx({key: metrics[key] for key in shown}, rel=1e-5), model
            assert {"bleu", "rougeL", "teacher_nll_per_sequence", "reward", "eos_rate"} <= shown.keys()
        draws = []
        for seed in (0, 1):
            assert run(f"evaluate --student {student} {flags} --sample --seed {seed} --output_dir {name}{seed}") == 0
            draws.append(metrics_of(workplace / f"{name}{seed}")["student"])
        for metric in ("bleu", "distinct2", "teacher_nll_per_sequence"):
            expected = (draws[0][metric] + draws[1][metric]) / 2
            assert rows[name]["sampled"][metric]["mean"] == pytest.approx(expected, rel=1e-5)
    assert rows["teacher"]["sampled"]["bleu"] != rows["teacher"]["greedy"]["bleu"]


@pytest.mark.slow
def test_what_is_finished_is_not_run_or_tested_again(finished, workplace, capsys):
    finished(f"{GOOD} --seeds 0", workplace)
    first, made = results_of(workplace), len(calls(workplace))
    capsys.readouterr()
    assert compare(f"{GOOD} --seeds 0", workplace) == 0
    assert len(calls(workplace)) == made == 2
    assert "Testing" not in capsys.readouterr().out
    assert results_of(workplace)["tests"]["test"] == first["tests"]["test"]
    # One seed more: its runs only, and only they are tested.
    assert compare(f"{GOOD} --seeds 0 1", workplace) == 0
    assert sorted(places(workplace)[made:]) == ["max_steps_3/ppo/seed1", "max_steps_3/rloo_sequence/seed1"]
    assert capsys.readouterr().out.count("Testing") == 2
    # The same flags in another order are the same command.
    assert compare(f"--seeds 0 1 {GOOD} --common save_strategy=no", workplace) == 0
    assert len(calls(workplace)) == 4
    # Another test set-up: nothing is trained, everything is tested again.
    assert compare(f"{GOOD} --seeds 0 1 --num_samples 3", workplace) == 0
    assert len(calls(workplace)) == 4
    assert capsys.readouterr().out.count("Testing") == 6
    (row,) = read_jsonl(workplace / "out/max_steps_3/ppo/seed0/tests/test.jsonl")[:1]
    assert len(row["samples"]) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--common temperature=0.5", "it had no --temperature, now --temperature 0.5"),
        ("--teacher student teacher", "it had --teacher teacher, now --teacher student teacher"),
        ("--learning_rates 1e-2", "it had --learning_rate 0.0005, now --learning_rate 0.01"),
    ],
)
@pytest.mark.slow
def test_results_of_another_command_are_not_mixed_in(change, message, finished, workplace, capsys):
    finished(f"{GOOD} --seeds 0", workplace)
    before = (workplace / "out" / "comparison.json").read_text()
    assert compare(f"{GOOD} --seeds 0 {change}", workplace) == 2
    err = capsys.readouterr().err
    assert message in err and "out/max_steps_3/ppo/seed0 holds the results of another command" in err
    assert "delete the directory" in err
    assert len(calls(workplace)) == 2 and (workplace / "out" / "comparison.json").read_text() == before


@pytest.mark.slow
def test_an_edited_preset_is_another_command(finished, workplace, capsys):
    finished(f"{GOOD} --seeds 0", workplace)
    (workplace / "recipes/configs/methods/ppo_kd/ppo.yaml").write_text("num_generations: 8\n")
    assert compare(f"{GOOD} --seeds 0", workplace) == 2
    assert "its preset was {'num_generations': 4}, now {'num_generations': 8}" in capsys.readouterr().err


def retrain(model: Path) -> None:
    """Other weights in files of the same names and sizes, of the same age."""
    (weights,) = model.glob("*.safetensors")
    before = weights.stat()
    tensors = load_file(weights)
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size


def rewrite_data(file: Path) -> None:
    write_csv(file, word_rows(30, seed=2))


def rewrite_templates(file: Path) -> None:
    write_templates(file, one="w8 {{ mr }}", two="{{ mr }} w4")


@pytest.mark.parametrize(
    ("change", "name", "flag"),
    [
        (retrain, "teacher", "--teacher teacher"),
        (retrain, "student", "--student student"),
        (rewrite_data, "data.csv", "--dataset data.csv"),
        (rewrite_data, "validation.csv", "--eval_dataset validation.csv"),
        (rewrite_templates, "good.yaml", "--templates good.yaml"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.slow
def test_results_of_files_that_have_changed_are_not_mixed_in(change, name, flag, finished, workplace, capsys):
    shutil.copy("data.csv", "validation.csv")
    command = f"{GOOD} --seeds 0 --validation_dataset validation.csv"
    finished(command, workplace)
    before = (workplace / "out" / "comparison.json").read_text()
    change(workplace / name)
    assert compare(command, workplace) == 2
    err = capsys.readouterr().err
    assert f"ppo/seed0 holds the results of other files, {flag}: its files have changed since" in err
    assert len(calls(workplace)) == 2 and (workplace / "out" / "comparison.json").read_text() == before


@pytest.mark.slow
def test_a_reward_of_ones_own_that_has_changed(workplace, capsys):
    """Only the methods that read it are concerned; the preset names it."""
    reward = workplace / "mine.py"
    reward.write_text("def length(completions):\n    return [0.0] * len(completions)\n")
    (workplace / "recipes/configs/methods/ppo_kd/ppo.yaml").write_text("reward: [mine.py:length]\n")
    assert compare(f"{GOOD} --seeds 0", workplace) == 0
    reward.write_text(reward.read_text().replace("0.0", "1.0"))
    assert compare(f"{GOOD} --seeds 0 --methods rloo_sequence", workplace) == 0
    assert compare(f"{GOOD} --seeds 0", workplace) == 2
    assert "other files, --reward mine.py:length: its files have changed since" in capsys.readouterr().err


@pytest.mark.slow
def test_files_are_read_once_and_copies_are_the_same(workplace, monkeypatch):
    read = []
    digest = files_read.file_digest
    monkeypatch.setattr(files_read, "file_digest", lambda file: read.append(file) or digest(file))
    assert compare(f"{GOOD} --jobs 2", workplace) == 0
    assert len(read) == len(set(read)) and Path("teacher/model.safetensors").absolute() in read
    # New times of modification, and results beside a model: still the same.
    for name in ("teacher", "student"):
        shutil.copytree(name, "copy")
        shutil.rmtree(name)
        shutil.move("copy", name)
        Path(name, "model.safetensors").touch()
        Path(name, "metrics.json").write_text("{}")
    assert compare(GOOD, workplace) == 0
    assert len(calls(workplace)) == 4


@pytest.mark.slow
def test_a_record_without_files_is_not_trusted(finished, workplace, capsys):
    """As it was written before files were recorded."""
    finished(f"{GOOD} --seeds 0", workplace)
    file = workplace / "out/max_steps_3/ppo/seed0/command.json"
    record = json.loads(file.read_text())
    del record["files"]
    file.write_text(json.dumps(record))
    assert compare(f"{GOOD} --seeds 0", workplace) == 2
    assert "other files, --dataset data.csv: its record has none of them" in capsys.readouterr().err


@pytest.mark.slow
def test_what_was_tested_before_is_tested_again_with_other_weights(finished, workplace, capsys):
    """Tests are kept for the models that they were made of: teacher, warm start and trained students."""
    flags = f"{GOOD} --seeds 0 --methods ppo"
    finished(flags, workplace)
    capsys.readouterr()
    retrain(workplace / "out/max_steps_3/ppo/seed0")
    assert compare(flags, workplace) == 0
    out = capsys.readouterr().out
    assert "Testing out/max_steps_3/ppo/seed0" in out and out.count("Testing") == 1
    # Another teacher judges all; training is elsewhere, or the runs would be refused.
    tests = {name: (workplace / "out" / name / "tests" / "test.json") for name in ("teacher", "warm_start")}
    kept = {name: file.read_text() for name, file in tests.items()}
    retrain(workplace / "teacher")
    shutil.rmtree(workplace / "out/max_steps_3")
    assert compare(flags, workplace) == 0
    assert capsys.readouterr().out.count("Testing") == 3
    assert all(file.read_text() != kept[name] for name, file in tests.items())
    retrain(workplace / "student")
    shutil.rmtree(workplace / "out/max_steps_3")
    assert compare(flags, workplace) == 0
    out = capsys.readouterr().out
    assert "Testing student" in out and "Testing the teacher" not in out


@pytest.mark.parametrize("column", ["mr", "ref"])
@pytest.mark.slow
def test_what_was_tested_before_is_tested_again_on_other_test_data(column, finished, workplace, capsys):
    """Inputs, or references only, under the same name of a file. Nothing is trained for that."""
    flags = f"{GOOD} --seeds 0 --methods ppo"
    finished(flags, workplace)
    capsys.readouterr()
    edited = [
        {**row, column: other[column]} for row, other in zip(word_rows(8, seed=1), word_rows(8, seed=4), strict=True)
    ]
    write_csv(workplace / "test.csv", edited)
    assert compare(flags, workplace) == 0
    assert capsys.readouterr().out.count("Testing") == 3 and len(calls(workplace)) == 1
    for name in ("teacher", "warm_start", "max_steps_3/ppo/seed0"):
        inputs = read_jsonl(workplace / "out" / name / "tests" / "test.jsonl")
        assert [row["prompt"] for row in inputs] == [row["mr"] for row in edited]
        assert [row["references"] for row in inputs] == [[row["ref"]] for row in edited]


@pytest.mark.slow
def test_several_test_sets_have_a_table_each(in_full, finished, workplace):
    """What was tested on one of them is not tested again; the same inputs under two names give the same numbers."""
    finished(f"{GOOD} --seeds 0", workplace)
    alone = results_of(workplace)["tests"]["test"]
    shutil.copy("test.csv", "again.csv")
    write_csv(workplace / "other.csv", word_rows(5, seed=7))
    assert compare(f"{GOOD} --seeds 0 --test_dataset test.csv again.csv other.csv", workplace) == 0
    tests = results_of(workplace)["tests"]
    assert list(tests) == ["test", "again", "other"] and tests["test"] == tests["again"] == alone
    assert tests["other"] != alone
    assert len(calls(workplace)) == 2, "nothing is trained for that"
    text = (workplace / "out" / "comparison.md").read_text()
    assert "8 test and 8 again and 5 other test inputs" in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## {name}, max_steps_3" for name in tests
    ]
    assert len(read_jsonl(workplace / "out/max_steps_3/ppo/seed0/tests/other.jsonl")) == 5
    with (workplace / "out" / "comparison.csv").open() as file:
        assert {row["test"] for row in csv.DictReader(file)} == set(tests)


@pytest.mark.slow
def test_coverage_is_the_nll_of_the_teachers_samples(in_full, workplace):
    """By a student with the teacher's weights that is asked in the teacher's words, it is the teacher's own."""
    write_templates(workplace / "bare.yaml", one="{{ mr }}")
    flags = GOOD.replace("good.yaml", "bare.yaml")
    assert compare(f"{flags} --seeds 0 --methods ppo --student teacher", workplace) == 0
    rows = {row["model"]: row for row in results_of(workplace)["tests"]["test"]["max_steps_3"]}
    coverage = {model: row["greedy"]["nll_of_teacher_samples_per_token"]["mean"] for model, row in rows.items()}
    assert coverage["warm_start"] == pytest.approx(coverage["teacher"], rel=1e-5)
    assert coverage["ppo"] > coverage["teacher"] + 0.01
    # The first sample of each input, as the teacher's table has it: a token for a word, and one for an end.
    for row in read_jsonl(workplace / "out/teacher/tests/test.jsonl"):
        assert row["teacher_tokens"] - len(row["samples"][0].split()) in (0, 1)
        assert row["greedy"] != row["samples"][0]


@pytest.mark.slow
def test_the_best_methods_get_more_seeds(workplace):
    """By the stand-in's BLEU on validation inputs, 0 for PPO and 0.5 for RLOO."""
    top = f"{GOOD} --top 1 --top_seeds 7 8 --select_on bleu"
    assert compare(top, workplace) == 0
    assert places(workplace)[4:] == [f"max_steps_3/rloo_sequence/seed{seed}" for seed in (7, 8)]
    rows = {row["model"]: row for row in results_of(workplace)["tests"]["test"]["max_steps_3"]}
    assert (rows["ppo"]["seeds"], rows["rloo_sequence"]["seeds"]) == ([0, 1], [0, 1, 7, 8])
    # By the NLL, where less is better, it is the other one.
    assert compare(top.replace("--select_on bleu", ""), workplace) == 0
    assert places(workplace)[6:] == [f"max_steps_3/ppo/seed{seed}" for seed in (7, 8)]


@pytest.mark.slow
def test_a_comparison_in_pieces(workplace, monkeypatch):
    """Once the time is over, no run is begun, and the tables have what there is; the same command goes on."""
    monkeypatch.setattr(cells.time, "monotonic", lambda: 60.0 * len(calls(workplace)))
    flags = f"{GOOD} --top 1 --top_seeds 7 --learning_rates 5e-4 1e-3"
    assert compare(f"{flags} --stop_after_minutes 2", workplace) == 0
    assert len(calls(workplace)) == 2, "both of the first method"
    rows = {row["model"]: row for row in results_of(workplace)["tests"]["test"]["max_steps_3"]}
    assert (rows["rloo_sequence"]["missing_seeds"], rows["rloo_sequence"]["failed_seeds"]) == ([0, 1], [])
    assert compare(f"{flags} --stop_after_minutes 1", workplace) == 0
    assert len(calls(workplace)) == 3, "within the search"
    results = results_of(workplace)
    assert results["search"]["chosen"] == {"ppo": 5e-4, "rloo_sequence": 5e-4}, "of what there is"
    rows = {row["model"]: row for row in results["tests"]["test"]["max_steps_3"]}
    assert [(rows[name]["seeds"], rows[name]["missing_seeds"]) for name in ("ppo", "rloo_sequence")] == [
        ([0], [1]),
        ([0], [1]),
    ]
    assert not any(row["failed_seeds"] for row in rows.values())
    text = (workplace / "out" / "comparison.md").read_text()
    assert "| ppo (not run yet: seed 1) | 0.0005 (edge) |" in text
    assert "Not all rates have a finished run: rloo_sequence (1 of 2)." in text
    for piece in range(4):
        assert compare(f"{flags} --stop_after_minutes {5 + 2 * piece}", workplace) == 0
    assert len(places(workplace)) == len(set(places(workplace))) == 4 + 2 + 1, "each once"
    rows = {row["model"]: row for row in results_of(workplace)["tests"]["test"]["max_steps_3"]}
    assert sorted((row["seeds"], row["missing_seeds"]) for row in list(rows.values())[2:]) == [
        ([0, 1], []),
        ([0, 1, 7], []),
    ]


@pytest.mark.slow
def test_methods_that_follow_one_another_in_pieces(workplace, monkeypatch):
    """No part is begun once the time is over; a part whose results are gone is made again, and that one alone."""
    monkeypatch.setattr(cells.time, "monotonic", lambda: 60.0 * len(calls(workplace)))
    both = "max_steps_3/ppo+rloo_sequence"
    flags = GOOD.replace("ppo rloo_sequence --seeds 0 1", "ppo+rloo_sequence --seeds 0")
    assert compare(f"{flags} --stop_after_minutes 1", workplace) == 0
    assert places(workplace) == [f"{both}/ppo/seed0"], "within the method"
    row = results_of(workplace)["tests"]["test"]["max_steps_3"][-1]
    assert (row["seeds"], row["missing_seeds"], row["failed_seeds"]) == ([], [0], [])
    assert compare(flags, workplace) == 0
    assert places(workplace) == [f"{both}/ppo/seed0", f"{both}/seed0"], "the same command goes on"
    shutil.rmtree(workplace / "out" / both / "ppo")
    assert compare(flags, workplace) == 0
    assert places(workplace)[2:] == [f"{both}/ppo/seed0"]
    row = results_of(workplace)["tests"]["test"]["max_steps_3"][-1]
    assert row["cost"]["cpu_seconds"]["values"] == [2.5 + 2.5]


@pytest.mark.slow
def test_a_run_that_fails(in_full, workplace, monkeypatch, capsys):
    monkeypatch.setenv("FAIL", "ppo/seed1")
    assert compare(GOOD, workplace) == 1
    assert len(calls(workplace)) == 4, "the others went on"
    out = capsys.readouterr().out
    assert "ppo/seed1: FAILED: ppo_kd.py ended with exit code 3:" in out and "out of paper" in out
    text = (workplace / "out" / "comparison.md").read_text()
    assert "| ppo (FAILED: seed 1) |" in text and "out of paper" in text.split("## Failed runs")[1]
    rows = {row["model"]: row for row in results_of(workplace)["tests"]["test"]["max_steps_3"]}
    assert rows["ppo"]["seeds"] == [0] and rows["ppo"]["greedy"]["bleu"]["half_width"] is None
    assert rows["rloo_sequence"]["seeds"] == [0, 1]
    # Once the cause is gone, that run is made up for.
    monkeypatch.delenv("FAIL")
    assert compare(GOOD, workplace) == 0
    assert places(workplace)[4:] == ["max_steps_3/ppo/seed1"]
    assert "FAILED" not in (workplace / "out" / "comparison.md").read_text()


@pytest.mark.slow
def test_a_method_that_always_fails(workplace, monkeypatch):
    """In the search too: it has no learning rate, no further runs, and a line that says so."""
    monkeypatch.setenv("FAIL", "/ppo/")
    assert compare(f"{GOOD} --learning_rates 5e-4 1e-3 --baseline warm_start", workplace) == 1
    results = results_of(workplace)
    assert results["search"]["chosen"] == {"ppo": None, "rloo_sequence": 1e-3}
    assert len([place for place in places(workplace) if "/ppo/" in place]) == 2
    rows = {row["model"]: row for row in results["tests"]["test"]["max_steps_3"]}
    assert rows["ppo"]["failed_seeds"] == [0, 1] and rows["ppo"]["greedy"] == {}
    assert rows["rloo_sequence"]["difference"].keys() >= {"bleu", "teacher_nll_per_sequence"}


@pytest.mark.slow
def test_a_broken_off_run_does_not_look_finished(finished, workplace, monkeypatch):
    """Files of an earlier run with a file missing are not taken for those of the next."""
    finished(f"{GOOD} --seeds 0", workplace)
    (workplace / "out/max_steps_3/ppo/seed0/metrics.json").unlink()
    monkeypatch.setenv("FAIL", "ppo/seed0")
    assert compare(f"{GOOD} --seeds 0", workplace) == 1
    assert not (workplace / "out/max_steps_3/ppo/seed0/cost.json").exists()


def test_a_run_without_its_last_evaluation_is_not_done(tmp_path):
    """A recipe writes what it has measured before training, and the student's cost, before that evaluation."""
    cell = Cell(None, tmp_path, (), None)
    (tmp_path / "cost.json").write_text("{}")
    (tmp_path / "metrics.json").write_text('{"teacher": {}, "before": {}}')
    assert not cell.is_done
    (tmp_path / "metrics.json").write_text('{"teacher": {}, "before": {}, "after": {"reward": null}}')
    assert not cell.is_done, "written, but not found sound"
    (tmp_path / "finished.json").write_text("{}")
    assert cell.is_done


@pytest.mark.slow
def test_several_at_a_time_get_one_thread_each(workplace):
    assert compare(f"{GOOD} --jobs 2", workplace) == 0
    assert [call["threads"] for call in calls(workplace)] == ["1"] * 4
    assert compare(f"{GOOD} --output_dir out2 --seeds 0", workplace) == 0
    assert [call["threads"] for call in calls(workplace)[4:]] == [None] * 2


@pytest.mark.parametrize(
    ("budget", "flag", "places_of"),
    [
        ("--max_generated_tokens 1000000 20000", "--max_generated_tokens", {"20000", "1000000"}),
        ("--max_cpu_seconds 60 1.5", "--max_cpu_seconds", {"1.5", "60"}),
    ],
)
@pytest.mark.slow
def test_other_budgets(budget, flag, places_of, workplace):
    one = GOOD.replace("--max_steps 3", "").replace("ppo rloo_sequence", "ppo")
    assert compare(f"{one} --seeds 0 {budget}", workplace) == 0
    assert {call["values"][flag] for call in calls(workplace)} == places_of
    for call in calls(workplace):  # no other end, and no schedule that looks ahead to it
        assert call["values"]["--max_steps"] == "1000000"
        assert call["values"]["--lr_scheduler_type"] == "constant_with_warmup"
    assert list(results_of(workplace)["tests"]["test"]) == [
        f"{flag.removeprefix('--')}_{value}" for value in sorted(places_of, key=float)
    ]


@pytest.mark.slow
def test_pseudo_labels_for_training_and_references_for_evaluation(workplace):
    pseudo = GOOD.replace("--dataset data.csv", "--dataset answers.csv", 1).replace("_column ref", "_column answer")
    assert compare(f"{pseudo} --eval_target_column ref --seeds 0", workplace) == 0
    call = calls(workplace)[0]["values"]
    assert (call["--target_column"], call["--eval_target_column"]) == ("answer", "ref")
    (row,) = read_jsonl(workplace / "out/warm_start/tests/test.jsonl")[:1]
    assert row["references"] == [word_rows(8, seed=1)[0]["ref"]]


# Beside those of `bad_inputs`: (what is wrong, a part of the message)
BAD = [
    ("--max_steps 0", "--max_steps 0 is out of range"),
    ("--batch_size 0", "--batch_size 0 is out of range"),
    ("--baseline kd", "--baseline kd: choose warm_start or one of --methods: ppo, rloo_sequence"),
    ("--methods poem", "--methods poem: no such method; give one of ode, ppo, twice, "),
    ("--methods twice", "there are several; give a path: "),
    ("--methods ppo+poem", "--methods poem: no such method; give one of ode, ppo, twice, "),
    ("--methods ppo+", "--methods : no such method; give one of ode, ppo, twice, "),
    (
        "--methods ppo+rloo_sequence+ppo --max_steps 9 2",
        "--max_steps 2 is less than one for each of the 3 methods of ",
    ),
    ("--methods ppo+with_rate", "with_rate.yaml sets learning_rate, which compare.py sets for all methods alike"),
    ("--methods greedy+ppo", "pseudo_label is none of the recipes to compare: ppo_kd, rloo_kd"),
    ("--methods ppo+out_of_range", "Method ppo+out_of_range: "),
    ("--methods out_of_range+ppo", "Method out_of_range (of out_of_range+ppo): "),
    ("--methods ppo+rloo_sequence --common use_peft=True", "add merge_adapters=True to --common"),
    ("--methods ode", "its directory is to be named for a recipe, and there is no "),
    ("--methods greedy", "pseudo_label is none of the recipes to compare: ppo_kd, rloo_kd"),
    ("--methods misspelt", "unknown key levl; did you mean level"),
    ("--methods out_of_range", "num_generations = 1"),
    ("--methods with_rate", "with_rate.yaml sets learning_rate, which compare.py sets for all methods alike"),
    ("--methods in_int8 --teacher_quantization nf4", "in_int8.yaml sets teacher_quantization, which compare.py sets"),
    ("--methods a_list", "is not a YAML mapping"),
    ("--common dataset=data.csv", "--common sets dataset, which compare.py sets"),
    ("--common hub_token=abc", "--common sets hub_token, which would stand in every run's record: log in with"),
    ("--common push-to-hub=True", "--common sets push_to_hub, which would send the student of every run"),
    ("--common hub-token=abc", "--common sets hub_token, which would stand in every run's record: log in with"),
    ("--validation_dataset nowhere.csv", "nowhere.csv does not exist"),
    ("--test_dataset test.csv elsewhere/test.csv", "two have the same name"),
    ("--test_dataset test.csv data.csv", "inputs of --test_dataset data.csv are in --dataset too"),
    ("--top 2", "--top and --top_seeds go together"),
    ("--top_seeds 5 6", "--top and --top_seeds go together"),
    ("--top 1 --top_seeds 1 2", "--seeds and --top_seeds 0 1 1 2: one is given twice"),
    ("--stop_after_minutes 0", "--stop_after_minutes 0.0 is out of range"),
]


def check_refusal(command: str, message: str, workplace: Path, capsys) -> None:
    before = sorted(workplace.rglob("*"))
    assert compare(command, workplace) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, "one line"
    assert message in err
    assert sorted(workplace.rglob("*")) == before, "nothing is run or written"


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[flags for flags, _ in BAD])
def test_bad_input(flags, message, workplace, capsys):
    check_refusal(f"{GOOD} {flags}", message, workplace, capsys)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "",
            "--dataset and --test_dataset and --teacher and --student missing. To try this on the embedded demo",
        ),
        (GOOD.replace("--test_dataset test.csv", ""), "error: --test_dataset missing."),
        (
            GOOD.replace("--max_steps 3", ""),
            "One kind of budget is needed, and there is none: give one of --max_steps",
        ),
        (
            GOOD.replace("--validation_dataset data.csv", "") + " --learning_rates 1e-4 1e-3",
            "Several --learning_rates need a --validation_dataset",
        ),
        (GOOD.replace("--target_column ref", "") + " --select_on bleu", "--select_on bleu needs references"),
    ],
)
def test_something_is_missing(command, message, workplace, capsys):
    check_refusal(command, message, workplace, capsys)


@pytest.mark.slow(1)
def test_adapters_that_a_first_part_merges_are_not_there_for_the_next(workplace, capsys):
    model = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained("student"), LoraConfig(task_type="SEQ_2_SEQ_LM"))
    model.save_pretrained("adapters")
    word_tokenizer().save_pretrained("adapters")
    capsys.readouterr()
    flags = f"{GOOD} --student adapters --common merge_adapters=True --methods"
    check_refusal(
        f"{flags} ppo+rloo_sequence", "Method ppo+rloo_sequence: --merge_adapters True has no eff", workplace, capsys
    )
    assert compare(f"{flags} ppo --seeds 0", workplace) == 0


def shipped() -> list[Path]:
    return sorted((ROOT / "recipes" / "configs" / "methods").glob("*/*.yaml"))


@pytest.mark.parametrize("preset", shipped(), ids=lambda path: path.stem)
def test_shipped_methods(preset):
    settings = parsed(f"{preset.parent.name} --teacher t --config {preset}")  # without one, the demo adds its own
    for key, value in yaml.safe_load(preset.read_text()).items():
        assert settings[key] == value, key
    assert preset.read_text().startswith("# "), "names the paper"
    if preset.parent.name == ENCODERS:  # they write nothing that could be compared
        return
    configs = main_of("compare").__globals__["CONFIGS"]
    method = find_method(str(preset), ROOT / "recipes")
    flags = f"{MODELS} {DATA} --max_steps 3 --common logging_steps=5".split()
    settings = ComparisonSettings(*RecipeParser(*groups_of(ComparisonSettings).values(), description="").parse(flags))
    check_flags([method], settings.compare.common, configs, settings.teacher)
    (run,) = first_runs(Grid.of(settings, [method]), configs).values()
    assert (run.args.logging_steps, run.args.max_steps, run.teacher.teacher) == (5, 3, ["teacher"])


@pytest.mark.slow(0.7)
def test_a_method_may_keep_its_teacher_in_another_way(workplace):
    assert compare(f"{GOOD} --methods in_int8 --baseline in_int8 --seeds 0", workplace) == 0
    (call,) = [call for call in calls(workplace) if "in_int8" in str(call)]
    assert "--teacher_quantization" not in str(call), "the preset says it"


def test_shipped_methods_are_found_by_name():
    found = find_method("rloo_sequence", ROOT / "recipes")
    assert found.recipe == ROOT / "recipes" / "rloo_kd.py"
    assert main_of("compare").__globals__["CONFIGS"]["rloo_kd"] is RLOOKDConfig


@pytest.mark.slow(9)
def test_smoke(in_full, tmp_path, monkeypatch):
    """With the real recipes; fewer of all than `--smoke` has, which takes 117 s of CPU."""
    fork_recipes(monkeypatch)
    monkeypatch.setattr(demo, "SMOKE_STEPS", {"teacher_steps": 40, "student_steps": 30})
    for split, size in {"train": 200, "validation": 6, "test": 8}.items():
        monkeypatch.setitem(demo.SPLIT_SIZES, split, size)
    monkeypatch.chdir(tmp_path)
    assert run("compare --smoke --seeds 0 --learning_rates 1e-3") == 0
    results = json.loads((tmp_path / "runs" / "compare_smoke" / "comparison.json").read_text())
    (rows,) = results["tests"]["test"].values()
    assert [row["model"] for row in rows] == ["teacher", "warm_start", "gkd_on_policy", "ppo"]
    assert all(row["greedy"]["bleu"]["mean"] > 0 and row["sampled"]["self_bleu"]["mean"] > 0 for row in rows)
    assert all(row["cost"]["optimizer_steps"]["values"] == [4] for row in rows[2:])


@pytest.mark.slow(1)
def test_a_run_whose_student_gives_numbers_that_are_not_finite(workplace, monkeypatch, capsys):
    """Of finite weights, for some inputs: the tables are written, and the exit code says that they do not hold."""
    spoiled = workplace / "spoiled"
    shutil.copytree(workplace / "student", spoiled)
    weights = load_file(spoiled / "model.safetensors")
    first_word = word_rows(8, seed=1)[0]["mr"].split()[0]  # of the test inputs
    weights["shared.weight"][word_tokenizer().convert_tokens_to_ids(first_word)] = 1e30  # its square is infinite
    save_file(weights, spoiled / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setenv("TRAINED", str(spoiled))
    flags = GOOD.replace("--methods ppo rloo_sequence --seeds 0 1", "--methods ppo --seeds 0")
    for _ in range(2):  # the second time by what is kept
        assert compare(flags, workplace) == 1
        error = capsys.readouterr().err
        said = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(said) == 1 and "Traceback" not in error
        assert "The evaluation cannot be relied on" in said[0] and "max_steps_3/ppo/seed0 (test, greedy)" in said[0]
        (lines,) = results_of(workplace)["tests"]["test"].values()
        assert [line["model"] for line in lines] == ["teacher", "warm_start", "ppo"]
