"""Recipes with what is on the Hub, which a server on loopback stands in for."""

import pytest
import torch
from huggingface_hub import constants

from rlkd_trl.models.loading import load_model
from rlkd_trl.prompts import PromptTemplates
from tests.hub_server import TOKEN, LoopbackHub, loopback_hub, use_endpoint
from tests.recipes.command_lines import read_jsonl, run

TEMPLATES = b'short: "w5 {{ source }}"\n'
SOURCE = "--source_column mr"
NOBODY = "http://127.0.0.1:9"  # where nobody listens


@pytest.fixture
def hub(tmp_path):
    with loopback_hub(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def filled(hub, checkpoints) -> LoopbackHub:
    """A model, data and templates, each with a branch `old` of other content."""
    pair = checkpoints["t5-tied"]
    model = hub.add_directory("lab/model", pair.student)
    model.commit({path.name: path.read_bytes() for path in pair.other.iterdir()}, ref="old")
    data = hub.add("lab/texts", {"train.csv": b"mr,ref\nw4 w4,w4\n"}, "dataset")
    data.commit({"train.csv": b"mr,ref\nw9 w7,w9\nw8 w8,w8\n"}, ref="old")
    templates = hub.add(
        "lab/prompts", {"templates.yaml": TEMPLATES, "more/w.yaml": b'w: "w7 {{ source }}"\n'}, "dataset"
    )
    templates.commit({"templates.yaml": b'old: "w6 {{ source }}"\n'}, ref="old")
    return hub


def test_models_data_and_templates_by_id_and_revision(filled, checkpoints, tmp_path, monkeypatch, capsys):
    """The answers are those of the same files here; again from the cache, and with the network lost."""
    (tmp_path / "old.csv").write_text("mr,ref\nw9 w7,w9\nw8 w8,w8\n")
    (tmp_path / "old.yaml").write_text('old: "w6 {{ source }}"')
    other = checkpoints["t5-tied"].other
    here = f"--teacher {other} --dataset {tmp_path / 'old.csv'} --templates {tmp_path / 'old.yaml'}"
    there = "--teacher lab/model@old --dataset lab/texts@old --templates lab/prompts@old"
    command = f"pseudo_label {SOURCE} --max_completion_length 4"
    assert run(f"{command} {here} --output {tmp_path / 'here.jsonl'}") == 0
    expected = read_jsonl(tmp_path / "here.jsonl")
    assert run(f"{command} {there} --output {tmp_path / 'there.jsonl'}") == 0
    assert read_jsonl(tmp_path / "there.jsonl") == expected and len(expected) == 2
    for name, is_other in {"lab/model@old": True, "lab/model": False}.items():
        embeddings = [load_model(place).get_input_embeddings().weight for place in (name, str(other))]
        assert torch.equal(*embeddings) is is_other
    capsys.readouterr()
    use_endpoint(NOBODY, tmp_path / "hub", monkeypatch)
    assert run(f"{command} {there} --output {tmp_path / 'cached.jsonl'}") == 0
    assert f"{NOBODY} cannot be reached" in capsys.readouterr().out
    assert read_jsonl(tmp_path / "cached.jsonl") == expected
    assert constants.HF_HUB_OFFLINE
    other = there.replace("texts@old", "texts@main")  # which the cache does not have
    assert run(f"{command} {other} --output {tmp_path / 'other.jsonl'}") == 2
    assert "is in the cache, but not" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"gated": True}, {"private": True}])
def test_what_needs_an_account_is_said_once_and_loaded_with_its_token(options, hub, checkpoints, monkeypatch, capfd):
    hub.add_directory("owner/secret", checkpoints["t5-tied"].teacher, **options)
    hub.add("lab/texts", {"train.csv": b"mr\nw4\n"}, "dataset")
    hub.add("owner/prompts", {"templates.yaml": TEMPLATES}, "dataset", **options)
    words = {"gated": "is gated on the Hub: accept its terms on", "private": "if it is private, log in with"}
    for flags, name in {
        "--teacher owner/secret --templates builtin:paraphrase": "--teacher owner/secret",
        "--teacher lab/t --templates owner/prompts": "--templates owner/prompts",
    }.items():
        assert run(f"pseudo_label {flags} --dataset lab/texts {SOURCE} --output o.jsonl") == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: {name} ") and words[next(iter(options))] in line and "HF_TOKEN" in line
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (
        load_model("owner/secret").num_parameters() == load_model(str(checkpoints["t5-tied"].teacher)).num_parameters()
    )
    assert PromptTemplates.load("owner/prompts").names == ["short"]
    assert TOKEN not in "".join(capfd.readouterr())


def test_a_broken_download_goes_on_where_it_stopped(hub, checkpoints, tmp_path, monkeypatch, capsys):
    """In one command from the byte where the connection broke; in the next one with the file that is missing."""
    teacher = checkpoints["t5-tied"].teacher
    size = (teacher / "model.safetensors").stat().st_size
    hub.add_directory("lab/model", teacher)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cut_after = 25_000
    assert torch.equal(load_model("lab/model").shared.weight, load_model(str(teacher)).shared.weight)
    assert hub.sent_from == [0, 25_000] and size > 25_000
    # Lost for good, in the middle of it.
    hub.add_directory("lab/other", teacher)
    hub.cut_after, hub.lost_after_cut = 25_000, True
    command = f"pseudo_label --teacher lab/other --dataset {tmp_path / 'd.csv'} {SOURCE}"
    (tmp_path / "d.csv").write_text("mr\nw9\n")
    assert run(f"{command} --output {tmp_path / 'o.jsonl'}") == 2
    assert "Could not load the model of 'lab/other'" in capsys.readouterr().err
    hub.lost = False
    hub.asked.clear()
    assert run(f"{command} --output {tmp_path / 'o.jsonl'}") == 0
    fetched = [path for method, path in hub.asked if method == "GET" and ("/resolve/" in path or "/lfs/" in path)]
    assert [path for path in fetched if path.endswith("config.json") and "generation" not in path] == []
    assert sum(path.startswith("/lfs/") for path in fetched) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf://lab", "names no file on the Hub: write hf://datasets/owner/name@revision/path/file"),
        ("hf://datasets/lab/prompts@v9/templates.yaml", "has no branch, tag or commit v9"),
        ("hf://datasets/lab/prompts/none.yaml", "has no file none.yaml"),
        ("lab/nobody", "there is no dataset of that name on the Hub"),
        ("here/none.yaml", "There is no prompt template file here/none.yaml"),
    ],
)
def test_templates_that_are_not_there(spec, message, filled, capsys):
    assert run(f"pseudo_label --teacher lab/model --dataset lab/texts --templates {spec} --output o.jsonl") == 2
    assert message in capsys.readouterr().err


def test_templates_by_their_place_on_the_hub(filled, monkeypatch, tmp_path):
    filled.add("lab/in_model", {"t/x.yaml": b'x: "w3 {{ source }}"'})
    for spec, name in {
        "hf://datasets/lab/prompts/more/w.yaml": "w",
        "hf://datasets/lab/prompts@old/templates.yaml": "old",
        "hf://lab/in_model@main/t/x.yaml": "x",
        "lab/prompts": "short",
    }.items():
        assert PromptTemplates.load(spec).names == [name]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert PromptTemplates.load("lab/prompts@old").names == ["old"], "from the cache"
    (tmp_path / "lab" / "prompts").mkdir(parents=True)
    (tmp_path / "lab" / "prompts" / "templates.yaml").write_text('mine: "w4 {{ source }}"')
    monkeypatch.chdir(tmp_path)
    assert PromptTemplates.load("lab/prompts").names == ["mine"], "what is here comes first"
