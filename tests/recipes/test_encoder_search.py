"""recipes/encoder_search.py: which sets of losses it tries, that each is run once, and what it makes of the results.

The recipe that it calls is a stand-in, a script that gives each loss a worth; checks of models and data are real.
"""

import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest

from rlkd_trl import errors
from rlkd_trl.commands import encoder_search
from rlkd_trl.commands.encoder_demo import EncoderDemoRequest
from rlkd_trl.commands.encoder_search import ATTENTION, Combination, questions
from rlkd_trl.commands.encoder_search_results import Outcome
from rlkd_trl.trainers.encoder_objective import INGREDIENTS
from tests.recipes.command_lines import ROOT, main_of, read_jsonl, run
from tests.recipes.forks import fork_recipes

# Worth of the last stage's losses, and of the seed; a run of a set that FAIL names fails.
STAND_IN = """
import json, os, re, sys
from pathlib import Path

WORTH = {"logits_kl": 5.0, "hard_ce": 2.0, "hidden_mse": 1.0, "attention_mse": -3.0, "attention_kl": 0.5}
words = sys.argv[1:]
start = words.index("--losses") + 1
end = next(i for i in range(start, len(words)) if words[i].startswith("--"))
losses = words[start:end]
values = dict(word.split("=", 1) for word in words if "=" in word)
here = Path(words[words.index("--output_dir") + 1])
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps({"place": str(here), "losses": losses, "values": values}) + "\\n")
if os.environ.get("FAIL", "nothing") in str(here):
    sys.exit("out of paper")
names = [term.split("*")[-1].strip() for term in losses[-1].split("+")]
seed = int(values["--seed"])
score = 50 + sum(WORTH.get(name, 0) for name in names) + seed * (1 + ("hard_ce" in names))
if os.environ.get("UNDEFINED", "nothing") in str(here):
    score = None
here.mkdir(parents=True, exist_ok=True)
(here / "metrics.json").write_text(json.dumps({"after": {"accuracy": score, "agreement": 1.0}}))
for place in (here, here / "stage1-general"):
    place.mkdir(exist_ok=True)
    (place / "cost.json").write_text(json.dumps({"cpu_seconds": 2.0 * len(names)}))
(here / "finished.json").write_text("{}")
"""


@pytest.fixture
def workplace(tmp_path, encoders, monkeypatch) -> Path:
    """The current directory, with the stand-in and two presets: of one stage, and of two."""
    recipes = tmp_path / "recipes"
    presets = recipes / "configs" / "methods" / "encoder_kd"
    presets.mkdir(parents=True)
    (recipes / "encoder_kd.py").write_text(STAND_IN)
    (tmp_path / "one.yaml").write_text(
        "stages: [task]\nlosses: [2*logits_kl + hard_ce + hidden_mse + attention_mse]\n"
    )
    (tmp_path / "two.yaml").write_text("stages: [general, task]\nlosses: [hidden_mse, logits_kl]\n")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls.jsonl"))
    monkeypatch.delenv("FAIL", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def search(flags: str, encoders, workplace: Path) -> int:
    """The exit code of the real recipe with the stand-in."""
    main = main_of("encoder_search")
    main.__globals__["RECIPES"] = workplace / "recipes"
    data = f"--task_teacher {encoders.task} --task_dataset {encoders.train} --label_column label --output_dir out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["encoder_search.py", *data.split(), "--common", "max_length=32", *flags.split()])
        try:
            errors.run(main)
        except SystemExit as exit:
            return exit.code
    return 0


def calls(workplace: Path) -> list[dict]:
    log = workplace / "calls.jsonl"
    return read_jsonl(log) if log.exists() else []


def sets(workplace: Path) -> dict[str, dict]:
    return {one["set"]: one for one in json.loads((workplace / "out" / "search.json").read_text())["sets"]}


@pytest.mark.slow(0.9)
def test_questions_and_what_they_come_to(encoders, workplace):
    assert search("--base one.yaml --sets questions --seeds 0 1 2 --max_steps 7", encoders, workplace) == 0
    found = {name: set(one["losses"]) for name, one in sets(workplace).items()}
    assert found == {
        "base": {"logits_kl", "hard_ce", "hidden_mse", "attention_mse"},
        "without attention": {"logits_kl", "hard_ce", "hidden_mse"},
        "without hard labels": {"logits_kl", "hidden_mse", "attention_mse"},
        "without attention and hard labels": {"logits_kl", "hidden_mse"},
        "soft and hard": {"logits_kl", "hard_ce"},
        "soft alone": {"logits_kl"},
    }
    assert len(calls(workplace)) == 18 and {call["values"]["--max_steps"] for call in calls(workplace)} == {"7"}
    assert calls(workplace)[0]["losses"] == ["2*logits_kl + hard_ce + hidden_mse + attention_mse"]
    text = (workplace / "out" / "search.md").read_text()
    # base: 50 + 5 + 2 + 1 − 3 + seed · 2 = 55, 57, 59. Without attention 58, 60, 62, without hard labels 53, 54, 55:
    # differences 2, 3, 4 are 3 ± 4.30 · 1 / √3, Student's t with two degrees of freedom.
    assert "| base | 2*logits_kl + hard_ce + hidden_mse + attention_mse | 57 ± 4.97 | – | 16.0 |" in text
    assert "- Attention losses: -3 ± 0" in text
    assert "- Hard labels beside all other losses: +3 ± 2.48" in text
    assert "- Hard labels beside soft targets alone: +3 ± 2.48" in text
    ranked = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert ranked[0] == "without attention" and ranked[-1] == "without hard labels", "the best first"


@pytest.mark.slow(0.6)
def test_one_left_out_and_one_added(encoders, workplace):
    flags = "--base one.yaml --sets leave_one_out add_one --candidates attention_kl hidden_mse --seeds 0"
    assert search(flags, encoders, workplace) == 0
    found = {name: set(one["losses"]) for name, one in sets(workplace).items()}
    base = {"logits_kl", "hard_ce", "hidden_mse", "attention_mse"}
    assert found == {
        "base": base,
        **{f"without {name}": base - {name} for name in base},
        "with attention_kl": base | {"attention_kl"},
    }
    assert sets(workplace)["with attention_kl"]["losses"]["logits_kl"] == 2.0, "weights of the base stay"


@pytest.mark.slow(0.6)
def test_all_subsets(encoders, workplace):
    flags = "--base one.yaml --sets subsets --candidates logits_kl hard_ce hidden_mse --up_to 2 --seeds 0"
    assert search(flags, encoders, workplace) == 0
    subsets = [set(one["losses"]) for name, one in sets(workplace).items() if name != "base"]
    three = ("logits_kl", "hard_ce", "hidden_mse")
    assert sorted(map(sorted, subsets)) == sorted(
        map(sorted, [*({name} for name in three), *({a, b} for a in three for b in three if a < b)])
    )


@pytest.mark.slow(1)
def test_candidates_are_what_the_models_can_have(encoders, workplace, capsys):
    """Of another width and number of heads: no attention maps, no cosines."""
    flags = "--base two.yaml --sets add_one --seeds 0 --hidden_size 8 --num_heads 4"
    general = f"--teacher {encoders.general} --dataset {encoders.train}"
    assert search(f"{flags} {general}", encoders, workplace) == 0
    added = {name.removeprefix("with ") for name in sets(workplace)} - {"base"}
    relations = {f"{name}_relation_kl" for name in ("query", "key", "value")}
    assert added == {"hard_ce", "embedding_mse", "hidden_mse", *relations}
    said = capsys.readouterr().out
    assert "Left out: attention_mse. attention_mse compares attention head by head" in said
    assert [call["losses"][0] for call in calls(workplace)] == ["hidden_mse"] * len(calls(workplace))
    assert "CPU s" in said and sets(workplace)["base"]["cpu_seconds"] == 4.0, "of both stages"


def test_general_stages_too(encoders, workplace):
    general = f"--teacher {encoders.general} --dataset {encoders.train} --stage general --metric agreement"
    flags = f"--base two.yaml --sets subsets --candidates hidden_mse mlm_ce --up_to 1 --seeds 0 {general}"
    assert search(flags, encoders, workplace) == 0
    assert [call["losses"] for call in calls(workplace)] == [["hidden_mse", "logits_kl"], ["mlm_ce", "logits_kl"]]


@pytest.mark.slow(1)
def test_a_run_is_made_once(encoders, workplace, monkeypatch, capsys):
    flags = "--base one.yaml --sets leave_one_out --seeds 0 1"
    monkeypatch.setenv("FAIL", "without_hard_ce/seed1")
    assert search(flags, encoders, workplace) == 1
    text = (workplace / "out" / "search.md").read_text()
    assert "- without hard_ce: seeds 1" in text, "a failed run is named"
    assert sets(workplace)["without hard_ce"]["scores"].keys() == {"0"}
    monkeypatch.delenv("FAIL")
    before = len(calls(workplace))
    assert search(flags, encoders, workplace) == 0
    assert len(calls(workplace)) == before + 1
    assert search(f"{flags} --learning_rate 1e-3", encoders, workplace) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "holds the results of another command: it had --learning_rate 5e-05, now --learning_rate 0.001" in error


def test_a_set_without_all_of_its_results_is_named_and_not_the_best(encoders, workplace, monkeypatch):
    """Without attention losses is best, by the seed that is left; of the base one run fails, as one that diverges."""
    monkeypatch.setenv("UNDEFINED", "without_attention/seed0")
    monkeypatch.setenv("FAIL", "base/seed1")
    assert search("--base one.yaml --sets questions --seeds 0 1", encoders, workplace) == 1
    text = (workplace / "out" / "search.md").read_text()
    ranked = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert ranked[-2:] == ["without attention", "base"] and ranked[0] == "soft and hard"
    assert "- without attention: seeds 0; of seeds 0 accuracy is no number" in text and "- base: seeds 1\n" in text
    assert sets(workplace)["without attention"]["failed"] == [0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--base nowhere", "--config nowhere is neither a file nor the name of a preset"),
        ("--base one.yaml --stage general", "--stage general: the preset one has no such stage; its stages are task"),
        ("--base one.yaml --sets everything", "--sets everything: choose one of leave_one_out, add_one, subsets"),
        ("--base one.yaml --metric bleu", "--metric bleu: choose one of accuracy, f1, pearson"),
        ("--base one.yaml --sets add_one --candidates mlm_ce", "--candidates mlm_ce: a task stage has: embedding_mse"),
        ("--base one.yaml --seeds 0 0", "--seeds 0 0: one is given twice"),
        ("--base one.yaml --common max_length", "--common max_length is not of the form name=value"),
        ("--base one.yaml --common hub_token=secret", "--common sets hub_token, which would stand in every run's"),
        ("--base one.yaml --common losses=hard_ce", "--common sets losses, which the search sets for all runs alike"),
        ("--base one.yaml --num_heads 4", "attention_mse compares attention head by head: the student has 4 heads"),
        ("--base two.yaml", "A general stage learns from texts: give --dataset"),
        ("--base one.yaml --up_to 0", "--up_to 0 is out of range"),
        ("--smoke", "--smoke brings its own data and models: leave out --task_dataset"),
    ],
)
def test_what_is_refused_before_anything_runs(flags, message, encoders, workplace, capsys):
    assert search(flags, encoders, workplace) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not calls(workplace)


def test_attention_is_all_losses_that_read_it():
    of_attention = {name for name, one in INGREDIENTS.items() if one.reads not in (None, "hidden_states")}
    assert set(ATTENTION) == of_attention
    assert [one.name for one in questions({"hard_ce": 1.0})] == [
        "without attention",
        "soft and hard",
        "soft alone",
    ]


@pytest.mark.slow(0.6)
def test_a_set_that_answers_two_questions_is_run_once(encoders, workplace):
    """Without attention losses this base is soft and hard targets, and without hard labels too it is soft alone."""
    (workplace / "three.yaml").write_text("stages: [task]\nlosses: [logits_kl + hard_ce + attention_mse]\n")
    assert search("--base three.yaml --sets questions --seeds 0 1", encoders, workplace) == 0
    assert len(calls(workplace)) == 4 * 2
    text = (workplace / "out" / "search.md").read_text()
    # 5, 2 and −3 of the three losses: base 54, 56; soft and hard 57, 59; soft alone 55, 56
    assert "- Attention losses: -3 ± 0" in text
    assert "- Hard labels beside soft targets alone: +2.5 ± 6.35" in text  # 2 and 3: 12.706 · 0.707 / √2
    assert "- All losses of the base over soft targets alone: -0.5 ± 6.35" in text


def test_differences_are_of_the_seeds_that_both_have():
    one = Outcome(Combination("one", {}), {0: 3.0, 1: 5.0}, 1.0)
    other = Outcome(Combination("other", {}), {1: 1.0, 2: 9.0}, 1.0)
    assert one.difference(other) == (4.0, None)
    assert one.difference(Outcome(Combination("none", {}), {}, math.nan)) is None


@pytest.mark.slow
def test_on_the_demo(tmp_path, monkeypatch):
    """All of it, with the real recipe, on teachers that have learnt nothing."""
    fork_recipes(monkeypatch)
    monkeypatch.setattr(
        encoder_search, "EncoderDemoRequest", partial(EncoderDemoRequest, general_steps=3, task_steps=3)
    )
    flags = f"--smoke --seeds 0 --max_steps 3 --candidates logits_kl hard_ce --output_dir {tmp_path / 'out'}"
    assert run(f"encoder_search {flags}") == 0
    text = (tmp_path / "out" / "search.md").read_text()
    assert "| soft" not in text and "logits_kl + hard_ce" in text
    assert (ROOT / "recipes" / "configs" / "demo_encoder_search.yaml").is_file()
