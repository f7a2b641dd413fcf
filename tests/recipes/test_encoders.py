"""recipes/benchmarks/encoders.py: what it runs in which order, its texts and labels, its tables, and a tiny run."""

import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from rlkd_trl.errors import InputError
from tests.recipes.command_lines import ROOT, main_of, write_csv

PRESETS = ROOT / "recipes" / "configs" / "methods" / "encoder_kd"
SENTENCES = ["Cheap French food at The Vaults.", "The Mill is a pub in the city centre.", "Rated low, and not cheap."]
FOODS, PRICES, RATINGS = ("French", "Thai"), ("cheap", "high"), ("low", "average")
ROWS = [
    {
        "mr": f"name[{name}], food[{food}], priceRange[{price}], customer rating[{rating}]",
        "ref": f"{name} serves {food} food at a {price} price and is rated {rating}.",
    }
    for name in ("Aromi", "Blue Spice", "Clowns")
    for food in FOODS
    for price in PRICES
    for rating in RATINGS
]


@pytest.fixture
def names(monkeypatch) -> dict:
    """The global names of the script's parts, which import each other as neighbours."""
    monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks")
    import encoder_runs
    import encoder_tables

    return vars(encoder_runs) | vars(encoder_tables)


@pytest.fixture
def material(monkeypatch) -> dict:
    monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks")
    import encoder_material

    return vars(encoder_material)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A BERT of 4 layers with 12 heads, and a vocabulary larger than the sentences need."""
    words = {piece for row in ROWS for piece in row["ref"].lower().replace(".", "").split()}
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", *letters]
    pieces += [f"##{letter}" for letter in letters] + sorted(words - set(letters))
    directory = tmp_path_factory.mktemp("encoder")
    BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}).save_pretrained(directory)
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 96}
    config = BertConfig(vocab_size=len(pieces), max_position_embeddings=64, **sizes)
    BertModel(config).save_pretrained(directory)
    return directory


# Stages


def test_a_presets_stages_of_one_kind(names):
    preset = yaml.safe_load((PRESETS / "tinybert.yaml").read_text())
    general, task = (names["stages_of"](preset, kind) for kind in ("general", "task"))
    assert general["stages"] == ["general"] and general["losses"] == preset["losses"][:1]
    assert task["stages"] == ["task", "task"] and task["losses"] == preset["losses"][1:]
    assert task["layer_map"] == ["uniform", "uniform"], "one for all stages"
    assert not {"stage_epochs", "stage_learning_rates", "init"} & {*general, *task}
    assert names["stages_of"](yaml.safe_load((PRESETS / "kd.yaml").read_text()), "general") == {}


def test_every_preset_of_one_teacher_is_run(names):
    presets = {path.stem for path in PRESETS.glob("*.yaml")} - {"mt_bert"}
    assert {method.preset for method in names["METHODS"].values()} - {None} == presets


def test_terms_are_left_out(names):
    without_terms = names["without_terms"]
    assert without_terms("5*logits_kl + 2*mlm_ce + cosine", ["mlm_ce"]) == "5*logits_kl + cosine"
    assert without_terms("cosine + logits_kl", ["cosine"]) == "logits_kl"
    tinybert = names["ABLATIONS"]["tinybert, random, no transformer loss"]
    assert tinybert.settings("general")["losses"] == ["embedding_mse"]
    assert tinybert.settings("task")["losses"] == ["embedding_mse", "logits_kl"]


# The plan


def plan_of(names, tmp_path, methods, tasks=("food", "rating")):
    return names["Plan"](tmp_path, methods, tasks, seeds=(0, 1))


def test_the_order_of_runs(names, tmp_path):
    """Group by group and seed by seed; some groups have less tasks."""
    methods = ["kd", "tinybert", "tinybert, random, top", "kd, half width"]
    runs = plan_of(names, tmp_path, methods, ("price range", "food")).runs()
    found = [(one.kind, one.of, one.task, one.seed) for one in runs]
    assert found == [
        ("general", "tinybert", None, 0),
        ("teacher", "price range", "price range", 0),
        ("task", "kd", "price range", 0),
        ("task", "tinybert", "price range", 0),
        ("teacher", "food", "food", 0),
        ("task", "kd", "food", 0),
        ("task", "tinybert", "food", 0),
        *[("task", method, task, 1) for task in ("price range", "food") for method in ("kd", "tinybert")],
        ("general", "tinybert, random, top", None, 0),
        *[("task", "tinybert, random, top", "food", seed) for seed in (0, 1)],
        *[("task", "kd, half width", "food", seed) for seed in (0, 1)],
    ]
    assert len({one.directory for one in runs}) == len(runs)


def test_each_group_has_its_budget(names, tmp_path):
    plan = plan_of(names, tmp_path, ["tinybert", "tinybert, random"])
    budgets = {"tinybert": ((40, "5e-4"), (30, "3e-4")), "tinybert, random": ((100, "1e-3"), (40, "1e-3"))}
    for method, expected in budgets.items():
        for one, (steps, rate) in zip((plan.general(method), plan.task(method, "food", 0)), expected, strict=True):
            assert (one.steps, one.flags[one.flags.index("--learning_rate") + 1]) == (steps, rate)
    assert names["Plan"](tmp_path, most_steps=2).general("tinybert").steps == 2


def finished(one, accuracy: float, **settings) -> None:
    one.directory.mkdir(parents=True, exist_ok=True)
    found = {"accuracy": accuracy, "cpu_seconds": 3.0, "commit": "c0ffee", "run": {**one.record, **settings}}
    (one.directory / "measured.json").write_text(json.dumps(found))


def test_a_run_with_other_settings_is_not_done(names, tmp_path):
    one = plan_of(names, tmp_path, ["kd"]).task("kd", "food", 0)
    assert not one.is_done
    finished(one, 50.0)
    assert one.is_done
    finished(one, 50.0, steps=one.steps + 1)
    assert not one.is_done


# Tables


def test_what_is_left_in_words(names, tmp_path):
    left_over = names["left_over"]
    plan = plan_of(names, tmp_path, ["kd", "minilm"])
    runs = plan.runs()
    for one in runs:
        if one.of != "kd" and (one.kind, one.of) != ("teacher", "food"):
            finished(one, 50.0)
    finished(plan.task("kd", "rating", 1), 50.0)
    assert left_over(runs) == "the teacher of food. Nor so many tasks and seeds of kd (3)"
    for one in runs:
        finished(one, 50.0)
    assert left_over(runs) == "nothing"


def test_the_task_table_by_hand(names, tmp_path):
    plan = plan_of(names, tmp_path, ["kd", "pkd"])
    finished(plan.teacher("food"), 80.0)
    finished(plan.teacher("rating"), 50.0)
    for task, seed, accuracy in [("food", 0, 72.0), ("food", 1, 76.0), ("rating", 0, 40.0)]:
        finished(plan.task("kd", task, seed), accuracy)
    lines = names["task_table"](plan, ["kd", "pkd"]).splitlines()
    assert len(lines) == 4, "pkd has no run yet"
    # food: 90 and 95 %, mean 92.5, s = 5 / √2, so t s / √n = 12.706 · 2.5 = 31.8; rating: 80 %, one seed of two; the
    # mean over tasks of seed 0, (90 + 80) / 2
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["kd", "92.5 ± 31.8", "80.0 (1)", "85.0 (1)", "3"]
    assert [cell.strip() for cell in lines[2].split("|")[1:4]] == ["teacher's accuracy", "80.0", "50.0"]


def test_differences_in_words(names, tmp_path):
    in_points, verdicts = names["in_points"], ("better", "worse")
    assert in_points([], verdicts) == "not measured."
    assert in_points([2.0], verdicts) == "+2.0 points over 1 pair of task and seed: not told apart."
    # s = √2, t of one degree of freedom 12.706: 12.706 · √2 / √2
    assert in_points([1.0, 3.0], verdicts) == "+2.0 ± 12.7 points over 2 pairs of task and seed: not told apart."
    assert in_points([20.0, 22.0], verdicts).endswith("+21.0 ± 12.7 points over 2 pairs of task and seed: better.")
    assert in_points([-20.0, -22.0], verdicts).endswith("worse.")
    plan = plan_of(names, tmp_path, ["kd", "soft_only"])
    finished(plan.teacher("food"), 80.0)
    for name, accuracy in (("kd", 60.0), ("soft_only", 40.0)):
        finished(plan.task(name, "food", 1), accuracy)
    lines = names["differences"](plan, [("Labels", "kd", "soft_only"), ("Not asked", "kd", "mix")], verdicts)
    assert lines == ["- Labels. kd minus soft_only: +25.0 points over 1 pair of task and seed: not told apart."]


# Texts


def test_sentences_of_docstrings(material, tmp_path):
    source = '"""A module about cats and dogs.\n\nMore."""\n'
    source += 'def f():\n    """Return the cat that sleeps. Then more."""\n'
    source += 'class C:\n    """Return `x` of the code here."""\n    def g(self):\n        """Too short."""\n'
    for place in ("a.py", "b.py", "tests/c.py", "site-packages/d.py"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        text = source if place == "a.py" else '"""Sentences of this file are left out."""'
        (tmp_path / place).write_text("def (" if place == "b.py" else text)
    found = material["docstring_sentences"]([tmp_path])
    assert found == ["A module about cats and dogs.", "Return the cat that sleeps."]


def test_held_out_inputs_are_not_trained_on(material):
    train, test = material["split_by_input"](ROWS + ROWS, share=0.25)
    assert len(test) == 2 * 6 and len(train) == 2 * 18
    assert not {row["mr"] for row in train} & {row["mr"] for row in test}


def test_labels_are_an_attributes_values(material):
    rows = [
        {"mr": "food[French], name[food[x]", "ref": "a"},
        {"mr": "name[N], food[Fast food], area[city]", "ref": "b"},
        {"mr": "name[N], area[seafood[Thai]]", "ref": "none"},
    ]
    found = material["labelled"](rows, "food", 9)
    assert sorted((row["text"], row["label"]) for row in found) == [("a", "French"), ("b", "Fast food")]
    assert len(material["labelled"](rows, "food", 1)) == 1


def test_a_smaller_vocabulary_changes_nothing_on_its_texts(material, encoder, tmp_path):
    texts = [row["ref"] for row in ROWS]
    before, kept = material["with_vocabulary_of"](encoder, tmp_path / "smaller", texts)
    assert kept < before
    whole, smaller = ((AutoTokenizer.from_pretrained(place)) for place in (encoder, tmp_path / "smaller"))
    assert [whole.tokenize(text) for text in texts] == [smaller.tokenize(text) for text in texts]
    assert len(smaller) == kept
    states = []
    for place, tokenizer in ((encoder, whole), (tmp_path / "smaller", smaller)):
        model = AutoModel.from_pretrained(place).eval()
        with torch.no_grad():
            states.append(model(**tokenizer(texts, padding=True, return_tensors="pt")).last_hidden_state)
    assert torch.equal(*states)
    assert model.get_input_embeddings().weight.shape[0] == kept


def test_a_file_without_its_columns_is_refused(material, tmp_path):
    write_csv(tmp_path / "a.csv", [{"mr": "x", "text": "y"}])
    with pytest.raises(InputError, match="`mr` and `ref` are needed"):
        material["e2e_rows"]([tmp_path / "a.csv"])


# All of it


def test_sentences_are_of_packages_that_are_there(material):
    roots = material["documented_roots"]()
    assert len(roots) > 1 and all(any(root.glob("*.py")) for root in roots)


@pytest.mark.slow(10)
def test_a_tiny_run(encoder, tmp_path, monkeypatch):
    """With a general stage, and two stages of a task. Of docstrings it reads one package's."""
    write_csv(tmp_path / "e2e.csv", ROWS * 2)
    main = main_of("benchmarks/encoders")
    monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks")
    monkeypatch.setitem(main.__globals__, "documented_roots", lambda: [Path(datasets.__file__).parent])
    flags = ["--e2e", tmp_path / "e2e.csv", "--encoder", encoder, "--work_dir", tmp_path / "work", "--smoke"]
    flags += ["--results_dir", tmp_path / "results", "--seeds", "0", "--tasks", "food", "--methods", "tinybert"]
    monkeypatch.setattr(sys, "argv", ["encoders.py", *map(str, flags)])
    main()
    page = (tmp_path / "results" / "encoders.md").read_text()
    assert page.startswith("3 of 3 runs are done") and "Not run: nothing." in page
    assert str(tmp_path) not in page
    general, teacher, student = json.loads((tmp_path / "results" / "encoders.json").read_text())
    assert (general["kind"], teacher["kind"], student["kind"]) == ("general", "teacher", "task")
    assert -1 <= general["docstrings_similarity_spearman"] <= 1 and -1 <= general["e2e_hidden_cosine"] <= 1
    assert general["parameters"] < general["teacher_parameters"]
    assert student["losses"] == ["embedding_mse + attention_mse + hidden_mse", "logits_kl"]
    assert all(0 <= one["accuracy"] <= 100 for one in (teacher, student))
