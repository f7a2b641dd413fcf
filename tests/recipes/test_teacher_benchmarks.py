"""The benchmarks of assistants, several encoders, and other tokenizers: budgets, tables by hand, and all in small."""

import csv
import json
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from tests.recipes.command_lines import ROOT, main_of, write_csv
from tests.recipes.forks import fork_recipes, import_before_forking
from tests.recipes.test_encoders import ROWS as SENTENCES
from tests.recipes.test_encoders import encoder  # noqa: F401 (a fixture)
from tests.recipes.test_smollm2 import ROWS, make_teacher

T_OF_TWO = 12.7062  # the 97.5 % quantile of Student's t with one degree of freedom


@pytest.fixture
def script(monkeypatch) -> Callable[[str], SimpleNamespace]:
    """A script's global names; it imports its neighbours, as a script does."""
    monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks")
    return lambda name: SimpleNamespace(**main_of(f"benchmarks/{name}").__globals__)


@pytest.fixture
def run_forked(monkeypatch, tmp_path):
    """Runs a whole script with these flags, its recipes being forks of this process: nothing is imported again."""
    import_before_forking()
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)

    def with_flags(names: SimpleNamespace, *flags: object) -> None:
        places = ["--work_dir", tmp_path / "work", "--results_dir", tmp_path / "results"]
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, (*flags, *places))])
        names.main()

    return with_flags


class Recorder:
    """In place of `Stages`: what would be run, as (recipe, flags); each leaves what the script reads of it."""

    cpu_seconds = 0.0

    def __init__(self, metrics: dict | None = None):
        self.calls: list[tuple[str, list[str]]] = []
        self.metrics = metrics or {}

    def run(self, recipe: str, done: Path, *flags: object) -> None:
        self.calls.append((recipe, [str(flag) for flag in flags]))
        place = done.parent
        places = [place / "assistant1", place / "student"] if recipe == "assistant_kd" else [place]
        for number, one in enumerate(places, start=1):
            one.mkdir(parents=True, exist_ok=True)
            (one / "cost.json").write_text(json.dumps({"cpu_seconds": 10.0 * number}))
            (one / "metrics.json").write_text(json.dumps(self.metrics.get(place.name, {})))


def values_of(flags: list[str], name: str, count: int = 1) -> list[str]:
    place = flags.index(name) + 1
    return flags[place : place + count]


def cells_of(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


# Assistants


def test_each_way_has_the_same_steps(script, tmp_path):
    names, stages = script("assistants"), Recorder()
    begin = tmp_path / "seed3" / "begin"
    begin.mkdir(parents=True)
    (begin / "config.json").write_text("{}")
    students = names.run_seed(stages, tmp_path, 3, 101)
    (_, direct), (recipe, chain), (_, dense) = stages.calls
    assert recipe == "assistant_kd" and len(students) == 3
    assert values_of(direct, "--max_steps") == ["101"]
    assert values_of(chain, "--max_steps", 2) == ["51", "50"] and values_of(dense, "--max_steps") == ["50"]
    teachers = [str(tmp_path / "teacher"), str(tmp_path / "seed3" / "chain" / "assistant1")]
    assert values_of(direct, "--teacher", 2)[0] == teachers[0] and values_of(dense, "--teacher", 2) == teachers
    for _, flags in stages.calls:
        assert values_of(flags, "--student") == [str(begin)] and values_of(flags, "--seed") == ["3"]
        assert values_of(flags, "--dataset") == [str(tmp_path / "train.csv")]
    # The assistant's 10 s are part of what a chain's and a dense student's cost (20 s and 10 s).
    for way, seconds in {"direct": 10, "chain": 30, "dense": 20}.items():
        (students[way] / "measured.json").write_text(json.dumps({"nats": 1.0}))
        assert names.found_of(way, students, [])["cpu_seconds"] == seconds


def test_ways_are_compared_seed_by_seed(script):
    def one(nats: float) -> dict[str, float]:
        return {"nats": nats, "accuracy": 50.0, "bleu": 30.0, "cpu_seconds": 5.0}

    found = {"direct": [one(3.0), one(2.0)], "chain": [one(3.5), one(2.3)], "dense": [one(3.0), one(2.0)]}
    rows = cells_of(script("assistants").table(one(1.5), found))
    assert rows["teacher"][:3] == ["1.500", "50.0", "30.0"]
    # Of 3 and 2: 12.7 · 1 / 2. Of the differences 0.5 and 0.3: 12.7 · 0.2 / 2.
    assert rows["direct"][0] == f"2.500 ± {T_OF_TWO / 2:.3f}"
    assert rows["chain less direct"][0] == f"0.400 ± {T_OF_TWO / 10:.3f}"
    assert rows["dense less direct"][0] == "0.000 ± 0.000"


@pytest.mark.slow(6)
def test_assistants_in_small(script, run_forked, tmp_path, monkeypatch):
    fork_recipes(monkeypatch)
    inputs = [f"name[NAME], food[{food}], priceRange[{price}]" for food in "abcdefgh" for price in range(6)]
    write_csv(
        tmp_path / "e2e.csv", [{"mr": text, "ref": f"NAME serves {text[17]} for {text[-2]}."} for text in inputs]
    )
    names = script("assistants")
    for name, value in {
        "TEST_INPUTS": 6,
        "TEACHER": [*names.TEACHER, "--per_device_train_batch_size", "8"],
        "EACH_RUN": names.EACH_RUN | {"per_device_train_batch_size": "8", "max_completion_length": "12"},
    }.items():
        monkeypatch.setitem(names.main.__globals__, name, value)
    run_forked(names, "--train", tmp_path / "e2e.csv", "--smoke")
    found = json.loads((tmp_path / "results" / "assistants.json").read_text())
    assert list(found["ways"]) == ["direct", "chain", "dense"]
    sizes = [one["parameters"] for one in (found["teacher"], found["assistant"], *found["ways"]["chain"])]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert "6 test inputs with 6 references" in (tmp_path / "results" / "assistants.md").read_text()


# Experts


def test_students_of_experts_differ_in_who_says_how_much(script, tmp_path):
    names, stages = script("experts"), Recorder()
    begin = tmp_path / "seed3" / "begin"
    begin.mkdir(parents=True)
    (begin / "config.json").write_text("{}")
    students = names.run_seed(stages, tmp_path, 3, 7, 5)
    asked = dict(zip(students, stages.calls, strict=True))
    experts = [str(tmp_path / "near"), str(tmp_path / "without")]
    own = {"--teacher_weighting", "--teacher_column"}
    weighed = {way: next((word for word in flags if word in own), None) for way, (_, flags) in asked.items()}
    assert {way for way, flag in weighed.items() if flag == "--teacher_column"} == {"routed", "PPO, routed"}
    by_losses = {way for way, flag in weighed.items() if flag == "--teacher_weighting"}
    assert by_losses == {"validation", "per example", "PPO, per example"}
    assert values_of(asked["validation"][1], "--teacher_weighting") == ["validation"]
    assert values_of(asked["PPO, routed"][1], "--teacher_column") == ["expert"]
    for way, (recipe, flags) in asked.items():
        is_ppo = way.startswith("PPO")
        assert recipe == ("ppo_kd" if is_ppo else "kd") and values_of(flags, "--seed") == ["3"]
        assert values_of(flags, "--max_steps") == ["5" if is_ppo else "7"]
        assert values_of(flags, "--student") == [str(students["equal"] if is_ppo else begin)]
        of_one = {"generalist", "near", "without"}
        assert (
            values_of(flags, "--teacher", 2) == experts
            if way not in of_one
            else flags[flags.index("--teacher") + 2] == "--student"
        )
    assert len(set(students.values())) == len(students) == 10


def test_data_of_experts_is_divided_by_domain(script, tmp_path, monkeypatch):
    names = script("experts")
    monkeypatch.setitem(names.main.__globals__, "TEST_INPUTS", 4)
    monkeypatch.setitem(names.main.__globals__, "HELD_OUT_INPUTS", 2)
    inputs = [f"name[N{i}], food[f{i}]" + (f", near[P{i}]" if i % 3 == 0 else "") for i in range(12)]
    write_csv(tmp_path / "e2e.csv", [{"mr": text, "ref": f"N{i} serves f{i}."} for i, text in enumerate(inputs)])
    names.make_data(tmp_path / "e2e.csv", tmp_path / "work")
    rows = {path.stem: names.read_rows(path) for path in (tmp_path / "work").glob("*.csv")}
    assert {name: len(rows[name]) for name in ("all", "test", "held_out", "train", "generalist")} == {
        "all": 12,
        "test": 4,
        "held_out": 2,
        "train": 6,
        "generalist": 6,
    }
    assert all(("near[" in row["mr"]) == (row["expert"] == "near") for row in [*rows["train"], *rows["held_out"]])
    of_experts = [row["mr"] for domain in ("near", "without") for row in rows[domain]]
    assert sorted(of_experts) == sorted(row["mr"] for row in rows["generalist"])
    assert all("near[" in row["mr"] for row in rows["near"]) and not any(
        "near[" in row["mr"] for row in rows["without"]
    )


def test_table_of_experts_by_hand(script):
    def one(near: float, without: float) -> dict:
        return {"near": {"nats": near, "bleu": 30.0}, "without": {"nats": without, "bleu": 40.0}, "cpu_seconds": 5.0}

    names = script("experts")
    found = {way: [one(2.0, 3.0), one(1.0, 2.0)] for way in [*names.WAYS, *names.REWARDS]}
    found["routed"] = [one(1.5, 3.0), one(0.7, 2.0)]
    rows = cells_of(names.table({"near": one(1.25, 4.5)}, found))
    assert rows["teacher: near"] == ["1.250", "30.0", "4.500", "40.0"]
    assert rows["equal"][0] == f"1.500 ± {T_OF_TWO / 2:.3f}" and rows["equal"][4] == "5 ± 0"
    # Of -0.5 and -0.3: 12.7 · 0.2 / 2.
    assert rows["routed less equal"][0] == f"-0.400 ± {T_OF_TWO / 10:.3f}"
    assert rows["PPO, routed less PPO, equal"][2] == "0.000 ± 0.000" and "equal less equal" not in rows


@pytest.mark.slow(6)
def test_experts_in_small(script, run_forked, tmp_path, monkeypatch):
    inputs = [
        f"name[NAME], food[{food}]" + ", near[NEAR]" * near for food in "abcdefghijklmnopqrstuvwx" for near in (0, 1)
    ]
    write_csv(tmp_path / "e2e.csv", [{"mr": text, "ref": f"NAME serves {text[17]} there."} for text in inputs])
    names = script("experts")
    kept = {way: names.WAYS[way] for way in ("equal", "routed")}
    for name, value in (
        ("TEST_INPUTS", 6),
        ("HELD_OUT_INPUTS", 4),
        ("TEACHER", [*names.TEACHER, "--per_device_train_batch_size", "8"]),
        ("EACH_RUN", [*names.EACH_RUN, *"--per_device_train_batch_size 8 --max_completion_length 12".split()]),
        ("WAYS", kept),
        ("REWARDS", {"PPO, routed": names.ROUTED}),
    ):
        monkeypatch.setitem(names.main.__globals__, name, value)
    monkeypatch.setitem(names.main.__globals__, "BASELINE", {"equal": "equal", "routed": "equal"})
    run_forked(names, "--train", tmp_path / "e2e.csv", "--smoke")
    found = json.loads((tmp_path / "results" / "experts.json").read_text())
    assert list(found["teachers"]) == ["generalist", "near", "without"]
    assert list(found["students"]) == ["equal", "routed", "PPO, routed"]
    weights = {way: of_seed[0]["near"]["nats"] for way, of_seed in found["students"].items()}
    assert len(set(weights.values())) == 3, "each learnt something else"


# Several encoders


def encoder_runs(script, encoder: Path, tmp_path: Path, most_steps: int | None = None):  # noqa: F811
    here = tmp_path / "work"
    AutoConfig.from_pretrained(encoder).save_pretrained(here / "encoder")
    names = script("several_encoders")
    return names, names.Runs(here, most_steps)


def test_the_chain_of_encoders_has_the_direct_ways_steps(script, encoder, tmp_path):  # noqa: F811
    names, runs = encoder_runs(script, encoder, tmp_path)
    assistant, student, direct = runs.assistant(1), runs.through_assistant(1), runs.direct(1)
    assert assistant.steps + student.steps == direct.steps == 160
    assert values_of(student.flags, "--task_teacher") == [str(assistant.directory)]
    assert values_of(direct.flags, "--task_teacher") == [str(runs.first.directory)]
    # 6 layers, width 48 and 12 heads, and 3, 192 and 6: √18 = 4.2 layers, √72 = 8.5 heads, √9216 = 96 wide.
    assert [values_of(assistant.flags, f"--{name}") for name in ("num_layers", "num_heads", "hidden_size")] == [
        ["4"],
        ["8"],
        ["96"],
    ]
    assert names.STUDENT == {"num_layers": 3, "hidden_size": 192, "num_heads": 6}
    together = runs.student("together, equal weights", 1).flags
    assert values_of(together, "--more_teachers") == [str(runs.together.directory / "encoder2")]
    assert "--more_teachers" not in runs.student("one teacher", 1).flags
    assert len({one.directory for seed in (0, 1) for one in runs.of_seed(seed)}) == 2 * 8
    assert {one.steps for one in encoder_runs(script, encoder, tmp_path, 2)[1].of_seed(0)} == {2}


def test_questions_about_encoders_by_hand(script, encoder, tmp_path):  # noqa: F811
    names, runs = encoder_runs(script, encoder, tmp_path)

    def finished(one, accuracy: float) -> None:
        one.directory.mkdir(parents=True)
        (one.directory / "measured.json").write_text(json.dumps({"accuracy": accuracy, "cpu_seconds": 3.0}))

    for one in [*runs.teachers, names.second_of(runs.together)]:
        finished(one, 80.0)
    for seed in (0, 1):
        for one in runs.of_seed(seed):
            finished(
                one, {"one teacher": 70.0 + 4 * seed, "alone, MT-BERT's weights": 73.0 + 2 * seed}.get(one.of, 60)
            )
    found, answers, results = names.tables(runs, [0, 1])
    # Of 73 and 75 less 70 and 74: 3 and 1, 12.7 · 2 / 2.
    row = cells_of(answers)["A second teacher: alone, MT-BERT's weights less one teacher"]
    assert row == [f"+2.0 ± {T_OF_TWO:.1f}"]
    assert cells_of(found)["one teacher"] == [f"72.0 ± {2 * T_OF_TWO:.1f}", "70.0, 74.0", "3 ± 0"]
    assert results["students"][1]["one teacher"]["accuracy"] == 74.0


@torch.no_grad()
def percent_right(checkpoint: Path, task: Path) -> float:
    """Of the held-out sentences, read one by one, those whose likeliest class is the label."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    with (task / "test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    classes = [int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax()) for row in rows]
    assert len(rows) > 1
    return (
        100 * sum(model.config.id2label[c] == row["label"] for c, row in zip(classes, rows, strict=True)) / len(rows)
    )


@pytest.mark.slow(7)
def test_several_encoders_in_small(script, encoder, run_forked, tmp_path, monkeypatch):  # noqa: F811
    names = script("several_encoders")
    kept = {name: names.STUDENTS[name] for name in ("one teacher", "together, MT-BERT's weights")}
    monkeypatch.setitem(names.main.__globals__, "STUDENTS", kept)
    monkeypatch.setitem(names.main.__globals__, "QUESTIONS", names.QUESTIONS[-1:])
    import encoders  # the script's neighbour

    # Of docstrings it reads one package's.
    monkeypatch.setattr(encoders, "documented_roots", lambda: [Path(datasets.__file__).parent])
    write_csv(tmp_path / "e2e.csv", SENTENCES * 2)
    flags = ["--e2e", tmp_path / "e2e.csv", "--encoder", encoder, "--smoke", "--seeds", 0]
    run_forked(names, *flags)
    found = json.loads((tmp_path / "results" / "several_encoders.json").read_text())
    assert len(found["teachers"]) == 4 and len(found["students"]["0"]) == 5
    runs = names.Runs(tmp_path / "work", 2)
    teachers = [runs.first, runs.second, runs.together, names.second_of(runs.together)]
    task = Path(values_of(runs.first.flags, "--task_dataset")[0]).parent
    expected = [percent_right(run.directory, task) for run in teachers]
    assert [one["accuracy"] for one in found["teachers"].values()] == pytest.approx(expected)
    assert {run.of: run.measured for run in runs.of_seed(0)} == found["students"]["0"]
    assert "2 steps of 16 in all" in (tmp_path / "results" / "several_encoders.md").read_text()


# Other tokenizers


def test_each_method_begins_with_the_same_student_and_data(script, tmp_path, monkeypatch):
    names = script("other_tokenizers")
    quality = {"teacher_nll_per_token": 1.25, "bleu": 40.0, "rougeL": 50.0, "tokens": 7.0, "unreadable": 1}
    metrics = {"teacher": {**quality, "bleu": 100.0}, "before": quality, "after": {**quality, "bleu": 41.0}}
    stages = Recorder(dict.fromkeys(names.METHODS, metrics))
    for name in ("teacher", "warm"):
        make_teacher(tmp_path / name)
    place = names.main.__globals__
    monkeypatch.setitem(place, "Stages", lambda here: stages)
    monkeypatch.setitem(place, "make_models", lambda *args: tmp_path / "warm")
    command = ["--train", "e2e.csv", "--teacher", tmp_path / "teacher", "--work_dir", tmp_path / "work"]
    command += ["--results_dir", tmp_path / "results", "--max_steps", "5"]
    monkeypatch.setattr(sys, "argv", ["other_tokenizers.py", *map(str, command)])
    names.main()
    assert [recipe for recipe, _ in stages.calls] == ["rloo_kd", "kd", "kd"]
    for name in ("--student", "--dataset", "--eval_dataset", "--max_steps", "--seed", "--align_tokenizers"):
        assert len({values_of(flags, name)[0] for _, flags in stages.calls}) == 1, name
    found = json.loads((tmp_path / "results" / "other_tokenizers.json").read_text())
    assert list(found) == ["teacher", "warm start", *names.METHODS]
    assert cells_of(names.table(found))["word_kd"] == ["1.250", "41.0", "50.0", "7.0", "1", "10"]


@pytest.mark.slow(6)
def test_other_tokenizers_in_small(script, run_forked, tmp_path, monkeypatch):
    """On a tiny chat model in the teacher's place."""
    write_csv(tmp_path / "e2e.csv", ROWS)
    make_teacher(tmp_path / "teacher")
    flags = ["--train", tmp_path / "e2e.csv", "--teacher", tmp_path / "teacher", "--smoke"]
    names = script("other_tokenizers")
    monkeypatch.setitem(names.main.__globals__, "CAP", ["--max_completion_length", "16"])
    run_forked(names, *flags)
    found = json.loads((tmp_path / "results" / "other_tokenizers.json").read_text())
    assert list(found) == ["teacher", "warm start", "rloo", "word_kd", "seq_kd"]
    assert found["teacher"]["bleu"] == pytest.approx(100)  # against its own answers
    assert (
        "16 training inputs, 4 test inputs, 2 steps of warm start"
        in (tmp_path / "results" / "other_tokenizers.md").read_text()
    )


# A served teacher


def test_what_a_served_teacher_costs_by_hand(script, tmp_path):
    def entry(score: float, nll: float) -> dict[str, float]:
        return {"seconds/sample": 1.0, "seconds/score": score, "seconds/update": 0.5, "teacher_nll": nll}

    (tmp_path / "checkpoint-3").mkdir()
    history = [{"eval_bleu": 1.0}, entry(0.5, 7.25), entry(3.0, 7.0), entry(0.75, 6.0), {"train_loss": 1.0}]
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    names = script("served_teacher")
    run = names.of_run(tmp_path, 3)
    assert run == {"teacher_nll": 7.25, "step_seconds": 2.25, "score_seconds": 0.75}
    run |= {"peak_mib": 600.4, "cpu_seconds": 9.06}
    assert names.line("local", run, 3) == ["local", "600", "9.1", "2.250", "0.750", "–", "–", "7.25000"]
    asked = names.line("served", run | {"requests": 21, "bytes": 6000}, 3)
    assert asked[5:] == ["7", "2", "7.25000"] and len(asked) == len(names.HEADS)
