"""Recipes with what is on the Hub, which a server on loopback stands in for."""

import re
import time

import datasets
import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from rlkd_trl.data import load_rows
from rlkd_trl.data.streams import stream_rows
from rlkd_trl.errors import InputError
from rlkd_trl.models.loading import load_model
from rlkd_trl.prompts import PromptTemplates
from tests.hub_server import READER, TOKEN, LoopbackHub, loopback_hub, use_endpoint
from tests.recipes.command_lines import COLUMNS, SAMPLING, TWO_STEPS, read_jsonl, run

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


@pytest.mark.slow
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


def test_a_stream_is_of_the_revision_that_is_named(filled, monkeypatch):
    """Offline `datasets` would take the last one that is cached, which is the other one here."""
    load_rows("lab/texts@main")
    assert [row["mr"] for row in stream_rows("lab/texts@old")] == ["w9 w7", "w8 w8"]
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert [row["mr"] for row in stream_rows("lab/texts")] == ["w4 w4"]
    with pytest.raises(InputError, match=r"cannot be streamed offline at a revision \(old\)"):
        stream_rows("lab/texts@old")


@pytest.mark.parametrize("options", [{"gated": True}, pytest.param({"private": True}, marks=pytest.mark.slow(0.4))])
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


@pytest.mark.slow(2)
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


PUSH = "--push_to_hub True --hub_model_id owner/student"


def check_card(files: dict[str, bytes], data: str) -> None:
    """The parts of the card of a run of RLOO."""
    card = files["README.md"].decode()
    assert "Method: RLOO" in card and "distilled from the teacher `lab/teacher@main`" in card
    assert "````text\nw5 ``` {{source}}\n````" in card
    assert f"| dataset | `{data}` |" in re.sub(" +", " ", card)
    for setting in ("learning_rate | `0.01`", "num_generations | `2`", "max_steps | `2`", "seed | `42`"):
        assert f"| {setting} |" in re.sub(" +", " ", card)
    assert not any(name in card for name in ("hub_", "output_dir", "save_steps", "logging_steps", "num_train_epochs"))
    assert "| before |" in card and "| after |" in card and "![" in card and "](curves.png)" in card
    assert files["curves.png"].startswith(b"\x89PNG") and len(files["curves.png"]) > 10_000
    assert 'checkpoint = "owner/student"' in card and "AutoModelForSeq2SeqLM.from_pretrained(checkpoint)" in card
    cited = card.split("## Citations")[1]
    assert all(name in cited for name in ("Hao, Liu & Mou 2022", "LLMR", "Ahmadian")) and "Schulman" not in cited


@pytest.mark.slow
def test_a_student_is_sent_loaded_back_and_trained_further(hub, checkpoints, train_csv, tmp_path, monkeypatch, capfd):
    pair, output_dir = checkpoints["t5-tied"], tmp_path / "out"
    hub.add_directory("lab/teacher", pair.teacher)
    data = f"--dataset {train_csv} {COLUMNS} {TWO_STEPS}"
    command = f"rloo_kd --teacher lab/teacher@main --student {pair.student} {data} {SAMPLING} {PUSH} --save_steps 1"
    command += " --template 'w5 ``` {{source}}'"
    assert run(f"{command} --hub_token {TOKEN} --hub_private_repo True --output_dir {output_dir}") == 0
    sent = hub.repositories["model", "owner/student"]
    assert sent.private
    here = {path.name: path.read_bytes() for path in output_dir.iterdir() if path.is_file()}
    assert sent.files() == {**here, ".gitattributes": b""}, "the files, and no checkpoint"
    assert (output_dir / "checkpoint-2").is_dir()
    written = [path.read_bytes() for path in output_dir.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in written) and TOKEN not in "".join(capfd.readouterr())
    check_card(sent.files(), data=str(train_csv))
    # Plain transformers, and on from there.
    with pytest.raises(OSError, match="owner/student"):
        AutoModelForSeq2SeqLM.from_pretrained("owner/student")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    loaded = AutoModelForSeq2SeqLM.from_pretrained("owner/student")
    trained = AutoModelForSeq2SeqLM.from_pretrained(output_dir)
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in trained.state_dict().items())
    push = "--push_to_hub True --hub_model_id further"
    assert run(f"sft --student owner/student@main {data} {push} --output_dir {tmp_path / 'further'}") == 0
    further = AutoModelForSeq2SeqLM.from_pretrained("owner/further")
    assert not torch.equal(further.shared.weight, trained.shared.weight)
    files = hub.repositories["model", "owner/further"].files()
    assert (
        b"base_model: owner/student\n" in files["README.md"] and b'checkpoint = "owner/further"' in files["README.md"]
    )
    assert not any(TOKEN.encode() in content for content in files.values())


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        ("sft", f"--hub_token {READER}", "push_to_hub: this account may not write to owner/student on the Hub"),
        ("sft", f"--hub_token {TOKEN} --hub_model_id lab/x", "this account may not write to lab/x on the Hub"),
        ("sft", "--hub_token hf_unknown01234567890123", "does not know the token of hub_token: log in again"),
        ("sft", f"--hub_token {TOKEN} --hub_model_id a/b/c", "hub_model_id a/b/c is no possible Hub id"),
        ("sft", "", "push_to_hub needs an account: log in with `hf auth login`, or give hub_token"),
        *[
            (recipe, *case)
            for recipe in ("sft", "kd", "encoder_kd")
            for case in [
                ("offline", "push_to_hub cannot be done in offline mode (HF_HUB_OFFLINE"),
                ("unreachable", "cannot be reached (ConnectError"),
            ]
        ],
    ],
)
def test_a_push_that_would_fail_is_refused_before_training(
    recipe, flags, message, hub, checkpoints, train_csv, tmp_path, monkeypatch, capsys
):
    pair, output_dir = checkpoints["t5-tied"], tmp_path / "out"
    models = {"sft": f"--student {pair.student}", "kd": f"--teacher {pair.teacher} --student {pair.student}"}
    inputs = f"{models[recipe]} --dataset {train_csv} {COLUMNS}" if recipe in models else ""
    hub.add("owner/student", {}, private=True)
    if flags == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif flags == "unreachable":
        use_endpoint(NOBODY, tmp_path / "hub", monkeypatch)
    account = f"--hub_token {TOKEN}" if flags in ("offline", "unreachable") else flags
    start = time.monotonic()
    assert run(f"{recipe} {inputs} {TWO_STEPS} {PUSH} {account} --output_dir {output_dir}") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line and not any(token in line for token in (TOKEN, READER, "hf_unknown"))
    assert "later: hf upload" in line or "needs an account" in line or "possible" in line
    assert time.monotonic() - start < 20 and not output_dir.exists()


@pytest.mark.parametrize("recipe", ["sft", "kd", "encoder_kd"])
def test_adapters_for_a_model_that_is_only_here_are_not_sent(
    recipe, hub, checkpoints, encoders, train_csv, tmp_path, capsys
):
    """Nobody else could load them."""
    pair = checkpoints["t5-tied"]
    inputs = {
        "sft": f"--student {pair.student} --dataset {train_csv} {COLUMNS}",
        "kd": f"--teacher {pair.teacher} --student {pair.student} --dataset {train_csv} {COLUMNS}",
        "encoder_kd": f"--stages task --losses hard_ce --student {encoders.task} --task_dataset {encoders.train} "
        "--label_column label",
    }[recipe]
    push = f"--use_peft {PUSH} --hub_token {TOKEN} --output_dir {tmp_path / 'out'}"
    assert run(f"{recipe} {inputs} {TWO_STEPS} {push}") == 2
    assert f"push_to_hub would send adapters for {inputs.split('--student ')[1].split()[0]}" in capsys.readouterr().err
    assert ("POST", "/api/repos/create") not in hub.asked and not (tmp_path / "out").exists()


def test_no_message_quotes_a_token(capsys):
    assert run(f"sft --push_to_hub True {TOKEN}") == 2
    assert capsys.readouterr().err.startswith("error: unexpected argument 'hf_***'")


@pytest.mark.slow
def test_a_push_that_fails_at_the_end_loses_nothing(hub, checkpoints, train_csv, tmp_path, capsys):
    """The exit code says that what was asked for is not there; --resume sends it."""
    output_dir, student = tmp_path / "out", checkpoints["t5-tied"].student
    hub.lost_for = "/preupload/"
    options = f"{PUSH} --hub_token {TOKEN} --hub_strategy end --hub_revision try-1 --save_steps 2"
    command = (
        f"sft --student {student} --dataset {train_csv} {COLUMNS} {TWO_STEPS} {options} --output_dir {output_dir}"
    )
    assert run(command) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"The student is in {output_dir}, but could not be sent to owner/student on the Hub" in line
    assert f'To send it: hf upload owner/student {output_dir} . --exclude "*/*" --revision try-1' in line
    assert AutoModelForSeq2SeqLM.from_pretrained(output_dir).num_parameters() > 0
    hub.lost_for = ""
    assert run(f"{command} --resume") == 0
    assert "The student is on the Hub: owner/student@try-1" in capsys.readouterr().out
    card = (output_dir / "README.md").read_text()
    assert "trained on the targets of" in card and "| trained |" in card and "## Templates" not in card
    sent = hub.repositories["model", "owner/student"]
    assert sent.files("try-1")["model.safetensors"] == (output_dir / "model.safetensors").read_bytes()
    assert set(sent.files()) == {".gitattributes"}, "the main branch is as it was"


@pytest.mark.slow
def test_of_an_encoders_stages_the_last_student_is_sent(hub, encoders, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    general = f"--teacher {encoders.general} --dataset {encoders.train} --source_column text"
    task = f"--task_teacher {encoders.task} --task_dataset {encoders.train} --task_source_column text"
    losses = "--stages general task --losses cosine logits_kl --label_column label --num_layers 1 --max_length 32"
    command = f"encoder_kd {general} {task} {losses} {TWO_STEPS} {PUSH} --output_dir {tmp_path / 'out'}"
    assert run(command) == 0
    assert hub.repositories["model", "owner/student"].messages.count("Training in progress, step 2") == 1
    files = hub.repositories["model", "owner/student"].files()
    assert not any("/" in name for name in files)
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert "task distillation: logits_kl" in card and "Hinton" in card and "Sanh" in card and "Wu, Wu" not in card
    assert "curves.png" in files
    loaded = AutoModelForSequenceClassification.from_pretrained("owner/student")
    assert loaded.config.num_hidden_layers == 1
