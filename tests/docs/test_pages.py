"""README and docs: one hop to every page, every path there, every flag known, every snippet run for what it leaves."""

import json
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from rlkd_trl import PromptTemplates
from rlkd_trl.commands import report
from rlkd_trl.planning import command as planner
from rlkd_trl.rewards import RewardInputs, RewardModel
from rlkd_trl.teachers import TeacherScores
from tests.docs.pages import LANGUAGES, PAGES, ROOT, commands, links, recipe_command, snippets
from tests.recipes.command_lines import RECIPES, parsed, run, word_rows, write_csv, write_templates
from tests.recipes.conftest import Encoders, Pair, labelled_rows
from tests.recipes.forks import fork_recipes

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
    "bert-base-uncased": "runs/teacher",
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
    flags = {action.dest for command in (planner, report) for action in command.parser()._actions}
    for recipe in (*RECIPES, "generate_data", "compare", "encoder_search", "assistant_kd", "score"):
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
    "cache_teacher": "--max_completion_length 6",
    "evaluate": "--max_completion_length 6",
    "compare": "--seeds 0 --max_steps 1 --learning_rates 1e-3 --max_completion_length 6 --num_resamples 100 "
    "--common per_device_train_batch_size=8 num_generations=2 --methods seq_kd",
    "assistant_kd": "--max_steps 1 --common per_device_train_batch_size=8 max_completion_length=6",
    "encoder_kd": "--max_steps 1 --stage_max_steps 1 --per_device_train_batch_size 8 --max_length 32",
    "encoder_search": "--base soft_only --sets leave_one_out --seeds 0 --max_steps 1 --common max_length=32",
}
SMALL_TRAINING = "--max_steps 1 --per_device_train_batch_size 8 --num_generations 2 --max_completion_length 6"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A directory with the files that the pages presume."""
    write_csv(tmp_path / "train.csv", word_rows(40))
    domains = [{**row, "domain": ("restaurants", "hotels")[i % 2]} for i, row in enumerate(word_rows(40))]
    write_csv(tmp_path / "domains.csv", domains)
    write_csv(tmp_path / "dev.csv", word_rows(8, seed=2))
    write_csv(tmp_path / "test.csv", word_rows(8, seed=1))
    for name, count in (("texts", 40), ("labelled", 40), ("dev_labelled", 8)):
        write_csv(tmp_path / f"{name}.csv", labelled_rows(count))
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


def pair_for(page: Path, checkpoints: dict[str, Pair], encoders: Encoders, recipe: str = "") -> Pair:
    """The checkpoints that a page's commands and snippets are about."""
    if page.name == "encoders.md" or recipe == "encoder_kd":
        return Pair(encoders.general, encoders.student, encoders.task)
    return checkpoints["chat" if page.name == "chat_models.md" else "t5-untied"]


def provide(words: list[str], pair: Pair) -> None:
    """What a command reads and no earlier command of the page has made: teacher, warm start, pseudo-labels."""
    flag = ""
    for name in words:
        missing = Path(name)
        if name.startswith("--"):
            flag = name
        if name == flag or missing.exists():
            continue
        if words[0] == "assistant_kd" and flag == "--teacher":
            make_larger(pair.teacher, missing)
        elif flag in ("--teacher", "--student", "--tokenizer", "--train_along"):
            shutil.copytree(pair.teacher if name == "runs/teacher" else pair.student, missing)
        elif flag == "--dataset" and missing.suffix == ".jsonl":
            missing.parent.mkdir(parents=True, exist_ok=True)
            rows = [{"mr": row["mr"], "pseudo_label": row["ref"]} for row in word_rows(40)]
            missing.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_larger(checkpoint: Path, directory: Path) -> None:
    """A model with more layers, for assistants to have room."""
    config = AutoConfig.from_pretrained(checkpoint)
    config.num_layers = config.num_decoder_layers = 6
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(directory)


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


def assert_command_left(words: list[str], printed: str) -> None:
    """A recipe has printed its results and left its files where the command says."""
    recipe, flags = words[0], dict(pairwise(words))
    output_dir = Path(flags.get("--output_dir", f"runs/{recipe}"))
    if recipe == "pseudo_label":
        lines = Path(flags["--output"]).read_text().splitlines()
        assert len(lines) >= 40 and all("pseudo_label" in json.loads(line) for line in lines)
        assert f"{len(lines)} pseudo-labels are in {flags['--output']}." in printed
    elif recipe == "cache_teacher":
        assert json.loads((Path(flags["--output"]) / "cache.json").read_text())["targets"] >= 10
        assert f"bytes are in {flags['--output']}." in printed
    elif recipe == "evaluate":
        assert re.search(r"^student  .*\d", printed, re.M)
        if "--output_dir" in flags:
            rows = [json.loads(line) for line in (output_dir / "outputs.jsonl").read_text().splitlines()]
            assert len(rows) == 8 and all("student" in row for row in rows)
            assert "student" in json.loads((output_dir / "metrics.json").read_text())
    elif recipe == "assistant_kd":
        assert (output_dir / "chain.md").read_text() in printed
        assert weights_of(str(output_dir / "student")) and weights_of(str(output_dir / "assistant1"))
    elif recipe == "encoder_search":
        assert (output_dir / "search.md").read_text() in printed
    elif recipe == "compare":
        assert (output_dir / "comparison.md").read_text() in printed
        assert (output_dir / "comparison.csv").is_file() and (output_dir / "comparison.json").is_file()
    else:
        assert (output_dir / "finished.json").is_file()
        assert f"in {output_dir}." in printed
        if "--use_peft" in words:
            assert load_file(output_dir / "adapter_model.safetensors")
        else:
            assert (
                load_file(output_dir / "model.safetensors") if recipe == "encoder_kd" else weights_of(str(output_dir))
            )
        if recipe != "sft":
            assert {"before", "after", "teacher"} <= json.loads((output_dir / "metrics.json").read_text()).keys()
            assert (output_dir / "report.html").is_file() and (output_dir / "README.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.name)
def test_commands_run_in_the_order_of_the_page(page, place, checkpoints, encoders, monkeypatch, capsys):
    """What they start is forked, but for a comparison's run, which is a new interpreter here alone."""
    if page.name != "choosing.md":
        fork_recipes(monkeypatch)
    for words in runnable(page):
        words = [word for word in shlex.split(stood_in(shlex.join(words)))]
        while words[0].startswith("--"):  # of the launcher
            words = words[2:]
        provide(words, pair_for(page, checkpoints, encoders, words[0]))
        small = SMALL.get(words[0], SMALL_TRAINING)
        if words[0] == "sft" and "--student" not in words:
            small += " --d_model 16 --num_layers 1 --num_heads 2"
        assert run(f"{shlex.join(words)} {small}") == 0, words
        assert_command_left(words, capsys.readouterr().out)


def weights_of(checkpoint: str) -> dict[str, torch.Tensor]:
    """A checkpoint's weights, as plain transformers loads them."""
    encoder_decoder = AutoConfig.from_pretrained(checkpoint).is_encoder_decoder
    auto_class = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    return auto_class.from_pretrained(checkpoint).state_dict()


def assert_trained(output_dir: str, names: dict[str, object]) -> None:
    """A step was taken, and `save_model` has left a student that plain transformers loads, with other weights."""
    assert names["trainer"].state.global_step == 1
    trained, start = weights_of(output_dir), weights_of("runs/warm")
    assert trained.keys() == start.keys()
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    assert len(AutoTokenizer.from_pretrained(output_dir)) == len(AutoTokenizer.from_pretrained("runs/warm"))


def left_by_ppo(names: dict[str, object]) -> None:
    assert_trained("runs/ppo", names)
    assert load_file("runs/ppo/value_head.safetensors")["value_head.weight"].any()


def left_by_rloo(names: dict[str, object]) -> None:
    assert_trained("runs/rloo", names)
    assert not Path("runs/rloo/value_head.safetensors").exists()


def left_by_score_tokens(names: dict[str, object]) -> None:
    """The identity of docs/methods.md: the sum is V_1 + log p(y | x), here of the plain model in bfloat16."""
    [rewards_T] = names["rewards_per_token"]
    assert rewards_T.shape == (4,) and rewards_T.dtype == torch.float32
    model = AutoModelForSeq2SeqLM.from_pretrained("runs/teacher", dtype=torch.bfloat16).eval()
    inputs = AutoTokenizer.from_pretrained("runs/teacher")(names["texts"][0], return_tensors="pt")
    start_and_ids = torch.tensor([[model.config.decoder_start_token_id, 5, 6, 7]])
    with torch.no_grad():
        z_TV = model(**inputs, decoder_input_ids=start_and_ids).logits[0].double()
    log_p = z_TV.log_softmax(dim=-1)[range(4), [5, 6, 7, 1]].sum()
    first_value = z_TV[0].logsumexp(dim=-1) - z_TV[0].mean()
    assert float(rewards_T.sum()) == pytest.approx(float(first_value + log_p), abs=0.1)  # bfloat16


def left_by_lora(names: dict[str, object]) -> None:
    assert names["trainer"].state.global_step == 1
    assert not Path("runs/lora/model.safetensors").exists()
    adapters = load_file("runs/lora/adapter_model.safetensors")
    assert {name.split(".")[-3] for name in adapters} == {"q", "v"}
    assert any(weight.any() for name, weight in adapters.items() if "lora_B" in name), "they begin as zeros"


def left_by_commas(names: dict[str, object]) -> None:
    """As a reward: a number for each completion, on its last token."""
    mask_BT = torch.tensor([[True, True], [True, False]])
    inputs = RewardInputs(
        rows=[{"prompt": "x"}],
        prompt_index_B=torch.tensor([0, 0]),
        completion_ids_BT=torch.tensor([[5, 1], [1, 0]]),
        completion_mask_BT=mask_BT,
        ended_B=torch.tensor([True, True]),
        completions=["a, b, and c", ""],
    )
    result = RewardModel([names["not_too_many_commas"]]).rewards(inputs, {})
    assert result.rewards_BT.tolist() == [[0.0, -2.0], [0.0, 0.0]]


def left_by_margin(names: dict[str, object]) -> None:
    scores = TeacherScores(
        chosen=torch.tensor([[1.0, 3.0]]),
        mean=torch.zeros(1, 3),
        max=torch.tensor([[4.0, 3.0, 9.0]]),
        logsumexp=torch.zeros(1, 3),
    )
    assert names["margin"](SimpleNamespace(scores=scores)).tolist() == [[-3.0, 0.0]]  # 1 − 4, 3 − 3


def left_by_encoder(names: dict[str, object]) -> None:
    assert names["trainer"].state.global_step == 1
    trained, start = (AutoModel.from_pretrained(f"runs/{place}").state_dict() for place in ("encoder", "warm"))
    assert trained.keys() == start.keys() and not all(torch.equal(trained[name], start[name]) for name in start)


# What each Python snippet must leave behind, by a word that only it has.
LEFT = {
    'PPOKDConfig("runs/ppo"': left_by_ppo,
    'RLOOKDConfig("runs/rloo"': left_by_rloo,
    "score_tokens": left_by_score_tokens,
    "LoraConfig(": left_by_lora,
    "not_too_many_commas": left_by_commas,
    "def margin": left_by_margin,
    "EncoderKDTrainer(": left_by_encoder,
}


@pytest.mark.parametrize("snippet", PYTHON, ids=str)
def test_python_snippets_leave_what_they_say(snippet, place, checkpoints, encoders):
    pair = pair_for(snippet.page, checkpoints, encoders)
    shutil.copytree(pair.teacher, "runs/teacher")
    shutil.copytree(pair.student, "runs/warm")
    names = {"texts": [row["mr"] for row in word_rows(80)]}
    exec(compile(stood_in(snippet.text), str(snippet), "exec"), names)
    [assert_left] = [check for word, check in LEFT.items() if word in snippet.text]
    assert_left(names)


@pytest.mark.parametrize("snippet", [snippet for snippet in SNIPPETS if snippet.language == "yaml"], ids=str)
def test_yaml_snippets_are_templates(snippet, tmp_path):
    (tmp_path / "mine.yaml").write_text(snippet.text)
    templates = PromptTemplates.from_yaml(tmp_path / "mine.yaml")
    assert templates.names == re.findall(r"^(\w+):", snippet.text, re.M) and len(templates) > 1
    assert all("FACTS" in prompt for prompt in templates.render_source("FACTS"))
