"""README and docs: one hop to every page, every path there, every flag known, every snippet run."""

import json
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from rlkd_trl.planning import command as planner
from tests.docs.pages import LANGUAGES, PAGES, ROOT, commands, links, recipe_command, snippets
from tests.recipes.command_lines import RECIPES, parsed, run, word_rows, write_csv, write_templates
from tests.recipes.conftest import Pair

SNIPPETS = [snippet for page in PAGES for snippet in snippets(page)]
SHELL = [snippet for snippet in SNIPPETS if snippet.language == "sh"]
PYTHON = [snippet for snippet in SNIPPETS if snippet.language == "python"]
# Commands of other programs, by their first words.
OTHERS = ("pip", "pytest", "tensorboard")
# Checkpoints on the Hub that the pages name -> the tests' own.
STAND_INS = {
    "bigscience/T0_3B": "runs/teacher",
    "bigscience/T0pp": "runs/teacher",
    "google/t5-v1_1-base": "runs/base",
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": "runs/teacher",
    "HuggingFaceTB/SmolLM2-135M": "runs/base",
}


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_page_is_one_hop_from_the_readme():
    assert {ROOT / link for link in links(ROOT / "README.md")} >= set(PAGES[1:])
    assert len(PAGES) > 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in links(page):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_are_there(page):
    text = page.read_text()
    named = re.findall(r"`((?:tests|recipes|accelerate_configs|rlkd_trl|docs)/[\w./]*)`", text)
    named += re.findall(r"(?<![\w/])recipes/\w+\.py", text)
    assert all((ROOT / name).exists() for name in named), [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=str)
def test_snippets_name_their_language(snippet):
    assert snippet.language in LANGUAGES


@pytest.mark.parametrize("snippet", SHELL, ids=str)
def test_flags_are_known(snippet):
    """Every command's flags are read by the recipe's own parser, which refuses those that it does not have."""
    assert commands(snippet)
    for words in commands(snippet):
        recipe = recipe_command(words)
        if recipe is not None:
            while recipe[0].startswith("--"):  # of the launcher
                recipe = recipe[2:]
            parsed(shlex.join(recipe))
        elif words[:3] == ["python", "-m", "rlkd_trl.plan"]:
            planner.parser().parse_args(words[3:])
        else:
            assert words[0] in OTHERS, f"what is {words}?"


def known_flags(capsys) -> set[str]:
    """Of all recipes and the planner, by their own `--help_all`."""
    flags = {action.dest for action in planner.parser()._actions}
    for recipe in (*RECIPES, "compare"):
        assert run(f"{recipe} --help_all") == 0
        flags |= set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.M))
    return flags


def test_every_flag_mentioned_exists(capsys):
    """Also those in running text."""
    of_other_programs = {"config_file", "num_processes"}  # accelerate's launcher
    mentioned = {flag for page in PAGES for flag in re.findall(r"--(\w+)", page.read_text())}
    assert len(mentioned) > 60
    unknown = mentioned - of_other_programs - known_flags(capsys)
    assert not unknown


# What makes any command of the pages quick, whatever sizes it names: the last of a flag counts.
SMALL = {
    "sft": "--max_steps 2 --per_device_train_batch_size 4",
    "pseudo_label": "--max_completion_length 6",
    "evaluate": "--max_completion_length 6",
    "compare": "--seeds 0 --max_steps 1 --learning_rates 1e-3 --max_completion_length 6 --num_resamples 100 "
    "--common per_device_train_batch_size=8 num_generations=2 --methods seq_kd rloo_token",
}
SMALL_TRAINING = "--max_steps 1 --per_device_train_batch_size 8 --num_generations 2 --max_completion_length 6"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A directory with the files that the pages presume."""
    write_csv(tmp_path / "train.csv", word_rows(40))
    write_csv(tmp_path / "dev.csv", word_rows(8, seed=2))
    write_csv(tmp_path / "test.csv", word_rows(8, seed=1))
    talks = [
        {"prompt": _said("user", row["mr"]), "completion": _said("assistant", row["ref"])} for row in word_rows(40)
    ]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    write_templates(tmp_path / "templates.yaml", create_text_for_me="w3 {{ source }}", coherent_text="{{ source }} w4")
    shutil.copytree(ROOT / "recipes" / "rewards", tmp_path / "recipes" / "rewards")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def pair_for(page: Path, checkpoints: dict[str, Pair]) -> Pair:
    """The checkpoints that a page's commands and snippets are about."""
    return checkpoints["chat" if page.name == "chat_models.md" else "t5-untied"]


def provide(words: list[str], pair: Pair) -> None:
    """What a command reads and no earlier command of the page has made: teacher, warm start, pseudo-labels."""
    for flag, name in pairwise(words):
        missing = Path(name)
        if missing.exists():
            continue
        if flag in ("--teacher", "--student", "--tokenizer"):
            shutil.copytree(pair.teacher if name == "runs/teacher" else pair.student, missing)
        elif flag == "--dataset" and missing.suffix == ".jsonl":
            missing.parent.mkdir(parents=True, exist_ok=True)
            rows = [{"mr": row["mr"], "pseudo_label": row["ref"]} for row in word_rows(40)]
            missing.write_text("".join(json.dumps(row) + "\n" for row in rows))


def stood_in(text: str) -> str:
    """With the tests' own checkpoints, and one step of training."""
    for name, local in STAND_INS.items():
        text = text.replace(name, local)
    return re.sub(r"\bmax_steps=\d+", "max_steps=1", text)


def runnable(page: Path) -> list[list[str]]:
    """The page's recipe commands that name a data set or a student; the demo is run in tests/recipes."""
    shell = [snippet for snippet in SHELL if snippet.page == page]
    words = [recipe_command(words) for snippet in shell for words in commands(snippet)]
    return [command for command in words if command is not None and {"--dataset", "--student"} & set(command)]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.name)
def test_commands_run_in_the_order_of_the_page(page, place, checkpoints):
    for words in runnable(page):
        words = [word for word in shlex.split(stood_in(shlex.join(words)))]
        while words[0].startswith("--"):  # of the launcher
            words = words[2:]
        provide(words, pair_for(page, checkpoints))
        small = SMALL.get(words[0], SMALL_TRAINING)
        if words[0] == "sft" and "--student" not in words:
            small += " --d_model 16 --num_layers 1 --num_heads 2"
        assert run(f"{shlex.join(words)} {small}") == 0, words


@pytest.mark.parametrize("snippet", PYTHON, ids=str)
def test_python_snippets_run(snippet, place, checkpoints):
    pair = pair_for(snippet.page, checkpoints)
    shutil.copytree(pair.teacher, "runs/teacher")
    shutil.copytree(pair.student, "runs/warm")
    texts = [row["mr"] for row in word_rows(80)]
    exec(compile(stood_in(snippet.text), str(snippet), "exec"), {"texts": texts})
