"""recipes/benchmarks/e2e_comparison.py: its data, and what it runs in which order."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import T5ForConditionalGeneration

from tests.recipes.command_lines import ROOT, main_of, write_csv
from tests.recipes.command_lines import run as run_command
from tests.tiny_models import word_tokenizer

FOODS, AREAS = ("Thai", "Greek", "Lao"), ("north", "south", "west")
SOURCES = [f"name[NAME], food[{food}], area[{area}]" for food in FOODS for area in AREAS] + ["name[NAME], area[east]"]
ROWS = [{"mr": source, "ref": f"{n} {source}"} for source in SOURCES for n in range(3)]


@pytest.fixture
def names(monkeypatch) -> dict:
    """The script's global names; it imports its neighbours, as a script does."""
    monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks")
    return main_of("benchmarks/e2e_comparison").__globals__


def test_parts_are_disjoint_and_whole(names):
    drawn_inputs = names["drawn_inputs"]
    two, three, rest = drawn_inputs(ROWS, 2, 3)
    inputs = [{row["mr"] for row in part} for part in (two, three, rest)]
    assert [len(part) for part in inputs] == [2, 3, 5] and set().union(*inputs) == set(SOURCES)
    assert len(two) == 6, "with all references"
    assert sorted(row["ref"] for row in [*two, *three, *rest]) == sorted(row["ref"] for row in ROWS)
    assert drawn_inputs(ROWS[::-1], 2)[0] == two[::-1], "whatever the order of the file"


def test_variants_have_an_inputs_attributes_and_training_values(names):
    inputs, taken = SOURCES[:2] + SOURCES[-1:], set(SOURCES[2:-1])
    found = names["with_variants"](inputs, 5, taken)
    assert found[:3] == inputs and len(set(found)) == 5 and not taken & set(found)
    # Values in training: Thai; north, south and east.
    possible = {"name[NAME], food[Thai], area[east]", "name[NAME], area[north]", "name[NAME], area[south]"}
    assert set(found[3:]) < possible
    assert set(names["with_variants"](inputs, 100, taken)) == possible | set(inputs), "no more than there are"


def test_the_files(names, tmp_path, monkeypatch):
    for name, size in {"TEST_INPUTS": 2, "VALIDATION_INPUTS": 1, "STUDENT_INPUTS": 8, "OFFICIAL_INPUTS": 3}.items():
        monkeypatch.setitem(names, name, size)
    areas_of = {"a": "wx", "b": "xy", "c": "yz", "d": "zw"}  # half of all pairs, so that there are variants
    half = [f"name[NAME], food[{food}], area[{area}]" for food, areas in areas_of.items() for area in areas]
    write_csv(tmp_path / "a.csv", [{"mr": source, "ref": "r"} for source in half])
    other = {f"name[NAME], food[{food}]" for food in "abcd"}
    write_csv(tmp_path / "b.csv", [{"mr": source, "ref": "r"} for source in sorted(other)])
    names["make_data"](argparse.Namespace(train=tmp_path / "a.csv", test=tmp_path / "b.csv"), tmp_path)
    files = ("train", "validation", "in_distribution", "official", "students")
    inputs = {name: {row["mr"] for row in names["read_rows"](tmp_path / f"{name}.csv")} for name in files}
    # The teacher learns from the 5 that are left of one file, as the students do, and the 1 of the other.
    assert [len(inputs[name]) for name in files] == [6, 1, 2, 3, 8]
    assert len(inputs["train"] & inputs["students"]) == 5 and inputs["train"] <= set(half) | other
    held_out = set().union(*(inputs[name] for name in ("validation", "in_distribution", "official")))
    assert len(held_out) == 6 and not (inputs["students"] | inputs["train"]) & held_out


@pytest.fixture
def run(names, tmp_path, monkeypatch):
    """Runs the script; its calls of compare.py, a minute each: warm start, seeds, whether with --top."""
    clock, found = [0.0], []

    def compare(words, **kwargs):
        place, first = words[words.index("--output_dir") + 1], words.index("--seeds") + 1
        found.append((Path(place).name, words[first : words.index("--learning_rates")], "--top" in words))
        clock[0] += 60
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setitem(names, "make_data", lambda *args: None)
    monkeypatch.setitem(names, "make_models", lambda *args: None)
    monkeypatch.setitem(names, "subprocess", SimpleNamespace(run=compare))
    monkeypatch.setitem(names, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def of_flags(flags: str) -> list[tuple[str, list[str], bool]]:
        places = f"--work_dir {tmp_path}/work --results_dir {tmp_path}/results"
        monkeypatch.setattr(sys, "argv", f"x --train a --test b --templates t {places} {flags}".split())
        with pytest.raises(SystemExit) as ended:
            names["main"]()
        assert ended.value.code == 0
        return found

    return of_flags


def test_a_seed_of_everything_comes_before_the_next(run):
    assert run("--seeds 0 1 --warm_starts cold good") == [
        ("cold", ["0"], False),
        ("good", ["0"], False),
        ("cold", ["0", "1"], True),
        ("good", ["0", "1"], True),
    ]


def test_it_stops_in_time(run):
    assert [name for name, _, _ in run("--seeds 0 1 2 --stop_after_minutes 2")] == ["middling", "good"]


def test_a_part_says_what_it_leaves_out(names, monkeypatch):
    said = names["share_of_the_whole"]
    whole = argparse.Namespace(methods=names["METHODS"], learning_rates=names["RATES"], top=4)
    assert said(whole) == ""
    part = argparse.Namespace(methods=["ppo", "gkd"], learning_rates=["1e-3"], top=0)
    assert said(part).startswith(f"A part of the whole comparison: 2 of {len(names['METHODS'])} methods, 1 of 6 ")
    monkeypatch.setattr(sys, "argv", ["here/e2e_comparison.py", "--train", "two words"])
    assert names["made_by"]().startswith("Made by `python here/e2e_comparison.py --train 'two words'`")


def test_a_stage_of_other_flags_is_refused(names, tmp_path, monkeypatch):
    stage, done, calls = names["stage"], tmp_path / "base" / "finished.json", []

    def recipe(command, **_):
        calls.append(command)
        done.parent.mkdir(exist_ok=True)
        done.touch()
        return argparse.Namespace(returncode=0)

    monkeypatch.setattr(stage.__globals__["subprocess"], "run", recipe)
    for _ in range(2):
        stage("kd", done, "--max_steps", 300)
    assert len(calls) == 1
    with pytest.raises(
        SystemExit, match=r"of `kd --max_steps 300`, and now `kd --max_steps 600` is asked for: remove"
    ):
        stage("kd", done, "--max_steps", 600)


def test_a_result_says_where_it_is_of_no_commit(names, tmp_path, monkeypatch):
    made_by, results = names["made_by"], tmp_path / "results"
    monkeypatch.setitem(made_by.__globals__, "RESULTS", results)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=n@n.n"]
    results.mkdir()
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    (results / "table.md").write_text("a result")
    assert re.search(r", commit [0-9a-f]+, with torch [^ ]+ and transformers [^ ]+\.$", made_by())
    (tmp_path / "rival.yaml").write_text("not in the commit")
    assert re.search(r", commit [0-9a-f]+-dirty, with torch", made_by())


def test_the_tables_of_warm_starts(monkeypatch):
    """Two seeds: t is 12.706, and the half-width of a and b is t · |a − b| / 2. The differences are paired by seed."""
    monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks")
    tables_of = main_of("benchmarks/warm_start_tables").__globals__["tables_of"]

    def row(model, seeds, bleu, sampled, rate=None, at_the_edge=False):
        kinds = {"greedy": bleu, "sampled": sampled}
        metrics = ("bleu", "teacher_nll_per_token", "length_words", "distinct_outputs")
        numbers = {
            kind: {metric: {"mean": sum(values) / len(values), "values": values} for metric in metrics}
            for kind, values in kinds.items()
        }
        return {"model": model, "seeds": seeds, "learning_rate": rate, "at_the_edge": at_the_edge, **numbers}

    first = [row("teacher", [], [60.0], [30.0]), row("seq_kd", [0, 1], [50.0, 52.0], [40.0, 40.0], 1e-3)]
    first.append(row("ppo", [1, 0], [55.0, 53.2], [40.0, 40.0], 2e-4, True))
    second = [row(one["model"], one["seeds"], one["sampled"]["bleu"]["values"], [1.0] * 2) for one in first]
    found = {"tests": {"in_distribution": {"b": first}, "official": {"b": second}}, "baseline": "seq_kd"}
    of_models, of_differences = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
        for table in tables_of(found)
    )
    assert [line[0] for line in of_models] == ["`teacher`", "`ppo`", "`seq_kd`"]
    assert of_models[0][1:4] == ["", "", "60.0; 30.0"]
    assert of_models[1][1:4] == ["0.0002*", "2", "54.1 ± 11.4; 40.0 ± 0.0"]
    assert of_models[2][1:4] == ["0.001", "2", "51.0 ± 12.7; 40.0 ± 0.0"]
    # Seed 0: 53.2 − 50, seed 1: 55 − 52.
    assert of_differences[0][:3] == ["`ppo`", "2", "**+3.1 ± 1.3**; +0.0 ± 0.0"]


def test_how_distinct_answers_are(checkpoints, tmp_path, capsys):
    """Of a student that says the same to 20 inputs, beside what it began with."""
    model = T5ForConditionalGeneration.from_pretrained(checkpoints["t5-tied"].student)
    with torch.no_grad():
        model.decoder.final_layer_norm.weight.zero_()  # all words are as likely then, whatever it reads
        model.lm_head.weight.zero_()
    model.generation_config.min_new_tokens = 64  # as many as it may write
    model.generation_config.bad_words_ids = [[i] for i in range(model.config.vocab_size) if i != 5]
    model.save_pretrained(tmp_path / "same")
    word_tokenizer().save_pretrained(tmp_path / "same")
    rows = "".join(json.dumps({"mr": f"w{3 + i}"}) + "\n" for i in range(20))
    (tmp_path / "rows.jsonl").write_text(rows)
    student = checkpoints["t5-tied"].student
    flags = f"--dataset {tmp_path / 'rows.jsonl'} --source_column mr --start {student}"
    assert run_command(f"benchmarks/collapse {flags} --students {tmp_path / 'same'}") == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    start, same = (line for line in lines if line and line[0].startswith("`"))
    assert same[1:3] == ["0.050", "0.050"], "one text for 20 inputs"
    assert start[3:] == ["1.00", "1.00"] and float(start[1]) > 0.5
