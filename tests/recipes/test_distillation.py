"""The distillation recipes: what a run leaves behind, for every family of models."""

import functools
import html
import itertools
import json
import math
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from tests.recipes.command_lines import (
    COLUMNS,
    METHODS,
    REWARDED_METHODS,
    SAMPLING,
    TWO_STEPS,
    metrics_of,
    read_jsonl,
    run,
)
from tests.recipes.conftest import Pair
from tests.tiny_models import EOS, MODELS, word_tokenizer
from tests.trainers.tiny_runs import assert_same_weights, largest_difference

DISTIL = f"{COLUMNS} {TWO_STEPS} {SAMPLING}"
# Every method with tied T5, and with one of the other families: methods by families, see tests/trainers.
OTHERS = ("llama", "t5-untied", "llama", "glm")
QUICK = (("ppo", "t5-tied"), ("rloo-token", "llama"), ("reinforce", "t5-tied"), ("kd", "llama"))
RUNS = [
    pytest.param(
        (method, family),
        id=f"{method}-{family}",
        marks=[] if (method, family) in QUICK else [pytest.mark.slow(0.5)],
    )
    for method, other in zip(METHODS, itertools.cycle(OTHERS))
    for family in ("t5-tied", other)
]
assert {run.values[0][1] for run in RUNS} == MODELS.keys()


TITLES = {
    "ppo": "PPO",
    "rloo-sequence": "RLOO, sequence level",
    "rloo-token": "RLOO, token level",
    "reinforce": "REINFORCE",
    "kd": "distillation on divergences",
    "all-actions": "all-actions policy gradient",
}


class Run(NamedTuple):
    method: str
    family: str
    pair: Pair
    output_dir: Path
    cpu_seconds: float
    wall_seconds: float

    @property
    def auto_class(self):
        return AutoModelForSeq2SeqLM if self.family.startswith("t5") else AutoModelForCausalLM


@pytest.fixture(scope="module")
def two_steps(checkpoints, train_csv, test_csv, tmp_path_factory) -> Callable[[str, str], Run]:
    """Two steps of a method with a pair of a family."""

    @functools.cache
    def run_once(method: str, family: str) -> Run:
        pair, output_dir = checkpoints[family], tmp_path_factory.mktemp("out") / "tiny-run"
        models = f"--teacher {pair.teacher} --student {pair.student}"
        data = f"--dataset {train_csv} --eval_dataset {test_csv}"
        began = time.process_time(), time.perf_counter()
        assert run(f"{METHODS[method]} {models} {data} {DISTIL} --output_dir {output_dir}") == 0
        ended = time.process_time(), time.perf_counter()
        return Run(method, family, pair, output_dir, *(now - then for then, now in zip(began, ended, strict=True)))

    return run_once


@pytest.fixture(scope="module", params=RUNS)
def finished(request, two_steps) -> Run:
    return two_steps(*request.param)


@pytest.mark.slow(0.4)
def test_plain_transformers_loads_the_trained_student(finished):
    model, loading = finished.auto_class.from_pretrained(finished.output_dir, output_loading_info=True)
    assert type(model) is type(MODELS[finished.family]())
    assert not any(loading.values()), loading
    start = finished.auto_class.from_pretrained(finished.pair.student).state_dict()
    # Two steps of Adam: each moves a weight by at most about the learning rate, 0.01.
    assert 0.01 < largest_difference(model.state_dict(), start) < 0.03


def test_the_student_has_no_value_head_in_it(finished):
    tensors = load_file(finished.output_dir / "model.safetensors")
    assert tensors.keys() == load_file(finished.pair.student / "model.safetensors").keys()
    critic = finished.output_dir / "value_head.safetensors"
    assert critic.exists() == (finished.method == "ppo")
    if critic.exists():
        assert any(tensor.abs().max() > 0 for tensor in load_file(critic).values()), "the critic was not trained"


def test_the_tokenizer_is_there(finished):
    tokenizer = AutoTokenizer.from_pretrained(finished.output_dir)
    assert tokenizer.get_vocab() == word_tokenizer().get_vocab()
    assert tokenizer.eos_token_id == EOS


def test_metrics(finished):
    metrics = metrics_of(finished.output_dir)
    assert list(metrics) == ["teacher", "before", "after"]
    for row in metrics.values():
        expected = {"bleu", "rouge1", "rouge2", "rougeL", "distinct1", "distinct2", "distinct_outputs"}
        expected |= {"length_words", "length_ratio"}
        expected |= {"tokens", "eos_rate", "reward", "teacher_nll_per_token", "teacher_nll_per_sequence"}
        assert expected <= row.keys()
        assert all(math.isfinite(value) for value in row.values())
        assert row["teacher_nll_per_sequence"] == pytest.approx(row["teacher_nll_per_token"] * row["tokens"])
    # Its own greedy outputs are likelier to the teacher than those of a student with other random weights.
    assert metrics["teacher"]["teacher_nll_per_token"] < metrics["before"]["teacher_nll_per_token"]


def test_evaluate_finds_the_same_of_the_saved_student(finished, test_csv, tmp_path):
    models = f"--teacher {finished.pair.teacher} --student {finished.output_dir}"
    flags = f"--max_completion_length 6 --output_dir {tmp_path}"
    assert run(f"evaluate {models} --dataset {test_csv} {COLUMNS} {flags}") == 0
    during, afterwards = metrics_of(finished.output_dir), metrics_of(tmp_path)
    for of_run, of_evaluation in (("teacher", "teacher"), ("after", "student")):
        expected = {name: value for name, value in during[of_run].items() if name != "epoch"}
        found = {name: afterwards[of_evaluation][name] for name in expected}
        assert found == pytest.approx(expected, rel=1e-4)


def test_model_card(finished):
    card = (finished.output_dir / "README.md").read_text()
    front_matter = yaml.safe_load(card.split("---")[1])
    assert front_matter["library_name"] == "transformers"
    assert str(finished.pair.teacher) in card and str(finished.pair.student) in card
    assert f"Method: {TITLES[finished.method].split(',')[0]}" in card

    # The code in it runs.
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    names = {}
    exec(code.replace("path/or/hub-id/of/this-model", str(finished.output_dir)), names)
    assert type(names["model"]) is type(MODELS[finished.family]())
    assert names["tokenizer"].get_vocab() == word_tokenizer().get_vocab()


def test_report(finished):
    report = html.unescape((finished.output_dir / "report.html").read_text())
    assert f"<h1>{TITLES[finished.method]}: tiny-run</h1>" in report
    after = metrics_of(finished.output_dir)["after"]
    assert f"{after['teacher_nll_per_token']:.4f}" in report
    for setting in (str(finished.pair.teacher), '"max_completion_length": 6', '"num_generations": 2'):
        assert setting in report
    curve = {"kd": "divergence", "all-actions": "immediate"}.get(finished.method, "teacher_nll")
    assert f"{curve}</" in report, "the curves"


def test_two_steps_were_made_and_the_last_was_saved(finished):
    state = json.loads((finished.output_dir / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    last = finished.auto_class.from_pretrained(finished.output_dir / "checkpoint-2")
    final = finished.auto_class.from_pretrained(finished.output_dir)
    assert_same_weights(last.state_dict(), final.state_dict())


def test_cost(finished):
    """Tokens as they were logged: eight completions a step."""
    cost = json.loads((finished.output_dir / "cost.json").read_text())
    assert list(cost) == ["optimizer_steps", "generated_tokens", "cpu_seconds", "wall_seconds"]
    state = json.loads((finished.output_dir / "checkpoint-2" / "trainer_state.json").read_text())
    lengths = [e["completions/mean_length"] for e in state["log_history"] if "completions/mean_length" in e]
    assert cost["optimizer_steps"] == len(lengths) == 2
    assert cost["generated_tokens"] == round(8 * sum(lengths))
    # The two steps' seconds are some of the command's own; see tests/trainers/test_cost.py for how many.
    assert 0 < cost["cpu_seconds"] < finished.cpu_seconds
    assert 0 < cost["wall_seconds"] < finished.wall_seconds


@pytest.mark.parametrize(
    "method",
    ["ppo", *(pytest.param(name, marks=pytest.mark.slow) for name in [*REWARDED_METHODS, "kd"] if name != "ppo")],
)
def test_resuming_equals_not_stopping(method, two_steps, train_csv, test_csv, tmp_path):
    begun = two_steps(method, "t5-tied")
    data = f"--dataset {train_csv} --eval_dataset {test_csv}"
    common = f"{METHODS[method]} --teacher {begun.pair.teacher} --student {begun.pair.student} {data} {DISTIL}"
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run(f"{common} --save_strategy no --max_steps 4 --output_dir {whole}") == 0
    shutil.copytree(begun.output_dir, halves)
    half = load_file(halves / "model.safetensors")
    assert run(f"{common} --max_steps 4 --output_dir {halves} --resume") == 0
    for file in halves.glob("*.safetensors"):
        assert_same_weights(load_file(file), load_file(whole / file.name))
    assert largest_difference(load_file(halves / "model.safetensors"), half) > 0.01


@pytest.mark.slow(2)
@pytest.mark.parametrize("family", ["llama", "t5-untied"])
def test_reinforce_with_the_papers_settings_runs_and_resumes(family, checkpoints, train_csv, tmp_path):
    """Stopped between two exchanges of the policy that samples."""
    pair = checkpoints[family]
    papers = "--top_k 3 --k 2 --value expected --return_denom 100 --reward_clip 1 --baseline min_variance"
    papers += " --behaviour_sync_steps 3 --entropy_coef 0.1 --mask_truncated_completions True --teacher_baseline False"
    common = f"reinforce_kd --teacher {pair.teacher} --dataset {train_csv} {DISTIL} {papers} --save_steps 2"
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run(f"{common} --student {pair.student} --max_steps 4 --output_dir {whole}") == 0
    assert run(f"{common} --student {pair.student} --output_dir {halves}") == 0
    assert (halves / "checkpoint-2" / "behaviour" / "model.safetensors").is_file()
    assert not (whole / "behaviour").exists()
    assert run(f"{common} --student {pair.student} --max_steps 4 --output_dir {halves} --resume") == 0
    assert_same_weights(load_file(halves / "model.safetensors"), load_file(whole / "model.safetensors"))
    assert "<h1>REINFORCE on 2-step returns: whole</h1>" in (whole / "report.html").read_text()
    state = json.loads((whole / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["behaviour_lag"] for entry in state["log_history"] if "behaviour_lag" in entry] == [0, 1, 2, 0]


def test_a_separate_critic_stays_out_of_the_student_too(checkpoints, train_csv, tmp_path):
    pair = checkpoints["llama"]
    models = f"--teacher {pair.teacher} --student {pair.student} --critic separate"
    assert run(f"ppo_kd {models} --dataset {train_csv} {DISTIL} --output_dir {tmp_path}") == 0
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(pair.student / "model.safetensors").keys()
    # the head's weight and bias, and the copied body
    assert len(load_file(tmp_path / "value_head.safetensors")) > 2


@pytest.mark.slow
@pytest.mark.parametrize(("method", "family"), [("ppo", "llama"), ("rloo-sequence", "t5-untied"), ("kd", "llama")])
def test_two_equal_teachers_are_one(method, family, two_steps, train_csv, test_csv, tmp_path):
    with_one = two_steps(method, family)
    teacher, student = with_one.pair.teacher, with_one.pair.student
    flags = f"--student {student} --dataset {train_csv} --eval_dataset {test_csv} {DISTIL}"
    assert run(f"{METHODS[method]} --teacher {teacher} {teacher} {flags} --output_dir {tmp_path}") == 0
    one, two = (load_file(place / "model.safetensors") for place in (with_one.output_dir, tmp_path))
    assert_same_weights(two, one, rtol=1e-4, atol=1e-6)
    for row, expected in metrics_of(with_one.output_dir).items():
        assert metrics_of(tmp_path)[row] == pytest.approx(expected, rel=1e-4)


def test_evaluate_without_a_teacher(checkpoints, test_csv, tmp_path, capsys):
    flags = f"--max_completion_length 6 --ibleu --output_dir {tmp_path}"
    assert run(f"evaluate --student {checkpoints['glm'].student} --dataset {test_csv} {COLUMNS} {flags}") == 0
    metrics = metrics_of(tmp_path)
    assert list(metrics) == ["student"]
    assert {"bleu", "ibleu"} <= metrics["student"].keys() and "reward" not in metrics["student"]
    lines = read_jsonl(tmp_path / "outputs.jsonl")
    assert len(lines) == 8
    assert lines[0].keys() == {"prompt", "student", "references"}
    words = sum(len(line["student"].split()) for line in lines)
    assert metrics["student"]["length_words"] == pytest.approx(words / 8)
    assert "student" in capsys.readouterr().out


def test_evaluate_samples_by_its_seed(checkpoints, test_csv, tmp_path):
    student = checkpoints["t5-tied"].student

    def outputs(flags: str) -> list[str]:
        directory = tmp_path / "out"
        shutil.rmtree(directory, ignore_errors=True)
        flags += f" --max_completion_length 6 --output_dir {directory}"
        assert run(f"evaluate --student {student} --dataset {test_csv} {COLUMNS} {flags}") == 0
        return [line["student"] for line in read_jsonl(directory / "outputs.jsonl")]

    greedy, first = outputs(""), outputs("--sample --seed 1")
    assert outputs("--sample --seed 1") == first
    assert len({tuple(texts) for texts in (greedy, first, outputs("--sample --seed 2"))}) == 3
    assert outputs("--sample --temperature 1e-4") == greedy


def test_training_does_not_touch_the_teacher(checkpoints, train_csv, tmp_path):
    pair = checkpoints["llama"]
    before = (pair.teacher / "model.safetensors").read_bytes()
    models = f"--teacher {pair.teacher} --student {pair.teacher}"
    assert run(f"ppo_kd {models} --dataset {train_csv} {DISTIL} --output_dir {tmp_path}") == 0
    assert (pair.teacher / "model.safetensors").read_bytes() == before
    assert not torch.equal(
        load_file(tmp_path / "model.safetensors")["model.norm.weight"],
        load_file(pair.teacher / "model.safetensors")["model.norm.weight"],
    )


@pytest.mark.parametrize("recipe", ["sft", "rloo_kd"])
def test_results_of_an_earlier_run_do_not_stay_beside_an_unfinished_one(recipe, checkpoints, train_csv, tmp_path):
    pair = checkpoints["t5-tied"]
    for name in ("metrics.json", "cost.json", "report.html", "value_head.safetensors", "notes.txt"):
        (tmp_path / name).write_text("of another run")
    distilled = f"--teacher {pair.teacher} {SAMPLING}" if recipe == "rloo_kd" else ""
    flags = f"--student {pair.student} --dataset {train_csv} {COLUMNS} {TWO_STEPS} {distilled} --output_dir {tmp_path}"
    assert run(f"{recipe} {flags}") == 2, "it looks like a finished run"
    assert run(f"{recipe} {flags} --overwrite_output_dir") == 0
    stale = {path.name for path in tmp_path.iterdir() if path.is_file() and path.read_bytes() == b"of another run"}
    assert stale == {"notes.txt"}


@pytest.mark.parametrize("disabled", [True, pytest.param(False, marks=pytest.mark.slow(0.5))])
def test_it_says_what_is_evaluated_and_shows_bars_unless_disabled(disabled, checkpoints, train_csv, tmp_path, capsys):
    pair = checkpoints["t5-tied"]
    flags = f"--teacher {pair.teacher} --student {pair.student} --dataset {train_csv} {COLUMNS} {TWO_STEPS} {SAMPLING}"
    assert run(f"rloo_kd {flags} --disable_tqdm {disabled} --output_dir {tmp_path}") == 0
    out, err = capsys.readouterr()
    for line in (
        "Evaluating the teacher: its greedy outputs on 3 held-out inputs.",
        "Evaluating the student before training: its greedy outputs on 3 held-out inputs.",
        "Evaluating the student after training: its greedy outputs on 3 held-out inputs.",
    ):
        assert line in out
    assert ("Evaluating the student:" in err) is ("Evaluating the teacher:" in err) is not disabled
