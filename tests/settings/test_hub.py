"""The first contact with the Hub: a local server with the Hub's answers stands in for it."""

import os
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants

from rlkd_trl import errors
from rlkd_trl.errors import InputError
from rlkd_trl.settings.files import require_checkpoint
from rlkd_trl.settings.hub import _use_cache_only, file_on_hub, require_on_hub, split_revision
from tests.hub_server import use_endpoint
from tests.recipes.command_lines import run

# What the Hub answers by owner: status, and the code that it sends in a header.
ANSWERS = {
    "there": (200, None),
    "nobody": (401, "RepoNotFound"),
    "gone": (404, "RepoNotFound"),
    "gated": (403, "GatedRepo"),
    "gated-stranger": (401, "GatedRepo"),
    "bare": (404, "EntryNotFound"),
    "unrevised": (404, "RevisionNotFound"),
    "broken": (503, None),
}


class Hub(BaseHTTPRequestHandler):
    asked: list[str]

    def do_HEAD(self):
        self.asked.append(self.path)
        status, code = ANSWERS[self.path.removeprefix("/datasets").split("/")[1]]
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        for name, value in {"X-Repo-Commit": "0" * 40, "ETag": '"e"', "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Paths that were asked for."""
    asked = []
    server = HTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {"asked": asked}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    use_endpoint(f"http://127.0.0.1:{server.server_port}", tmp_path / "cache", monkeypatch)
    yield asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize("owner", ["there", "bare"])
def test_what_is_on_the_hub_is_asked_for_once(owner, kind, hub):
    for _ in range(2):
        require_on_hub("--teacher", f"{owner}/x", kind)
    assert len(hub) == 1


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize(
    ("owner", "what"),
    [
        ("nobody", "there is no {} of that name on the Hub"),
        ("gone", "there is no {} of that name on the Hub"),
        ("gated", "is gated on the Hub: accept its terms"),
        ("gated-stranger", "is gated on the Hub: accept its terms"),
        ("broken", "cannot be reached"),
        ("unrevised", "has no branch, tag or commit v2"),
    ],
)
def test_one_request_and_one_sentence(owner, what, kind, hub):
    start = time.monotonic()
    with pytest.raises(InputError, match=what.format(kind)) as caught:
        require_on_hub("--student", f"{owner}/x@v2", kind)
    assert str(caught.value).startswith(f"--student {owner}/x@v2 ") and "\n" not in str(caught.value)
    assert len(hub) == 1 and time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("rloo_kd --teacher nobody/t --student there/s --dataset there/d", "--teacher nobody/t"),
        ("kd --teacher there/t --student nobody/s --dataset there/d", "--student nobody/s"),
        ("ppo_kd --teacher there/t --student there/s --dataset nobody/d", "--dataset nobody/d"),
        ("pseudo_label --teacher nobody/t --dataset there/d --output o.jsonl", "--teacher nobody/t"),
        ("evaluate --student nobody/s --dataset there/d", "--student nobody/s"),
        ("sft --tokenizer nobody/t --dataset there/d --output_dir o", "--tokenizer nobody/t"),
    ],
)
def test_recipes_name_the_flag_before_anything_is_loaded(command, flag, hub, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(command) == 2
    assert capsys.readouterr().err.startswith(f"error: {flag} ")


def test_without_a_network_it_takes_seconds(tmp_path, monkeypatch):
    use_endpoint("http://127.0.0.1:9", tmp_path, monkeypatch)  # nobody listens there
    start = time.monotonic()
    with pytest.raises(InputError, match=r"^--teacher gogle/flan .* cannot be reached"):
        require_checkpoint("--teacher", "gogle/flan")
    assert time.monotonic() - start < 20, "it was asked again and again"


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("t5-base", None, ("t5-base", None)),
        ("google/t5@v1.1", None, ("google/t5", "v1.1")),
        ("t5@refs/pr/3", None, ("t5", "refs/pr/3")),
        ("google/t5", "v2", ("google/t5", "v2")),
        ("google/t5@v2", "v2", ("google/t5", "v2")),
        ("a/b/c@d", None, ("a/b/c@d", None)),
        ("./run@2", None, ("./run@2", None)),
        ("here@home", None, ("here@home", None)),
    ],
)
def test_an_id_and_its_revision(name, given, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here@home").mkdir()
    assert split_revision(name, given) == expected


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("hf://datasets/a/b/c/d.csv", ("dataset", "a/b", None, "c/d.csv")),
        ("hf://a/b@v1/c.yaml", ("model", "a/b", "v1", "c.yaml")),
        ("hf://a/b@refs/pr/1/c.yaml", ("model", "a/b", "refs/pr/1", "c.yaml")),
        ("hf://datasets/a/b@refs/convert/parquet/c", ("dataset", "a/b", "refs/convert/parquet", "c")),
        ("hf://a/b@refs/pr/1", None),
        ("hf://datasets/a/b", None),
    ],
)
def test_a_file_on_the_hub_and_its_revision(name, asked, tmp_path, monkeypatch):
    seen = []

    def download(repository, file, *, repo_type, revision):
        seen.append((repo_type, repository, revision, file))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if asked is None:
        with pytest.raises(InputError, match="names no file on the Hub"):
            file_on_hub("--template", name, "x")
    else:
        assert file_on_hub("--template", name, "x") == tmp_path
    assert seen == ([] if asked is None else [asked])


@pytest.mark.parametrize("is_command", [False, True])
def test_only_a_command_sets_its_environment_to_offline_mode(is_command, monkeypatch):
    monkeypatch.setattr(errors, "_is_command", is_command)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    _use_cache_only("The Hub cannot be reached")
    assert constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == ("1" if is_command else "0")


def test_two_revisions_are_refused():
    with pytest.raises(InputError, match=r"google/t5@v2 has two revisions, v2 and v1: give one"):
        split_revision("google/t5@v2", "v1")


def test_what_is_in_the_cache_needs_no_network(tmp_path, monkeypatch):
    use_endpoint("http://127.0.0.1:9", tmp_path, monkeypatch)
    repository = tmp_path / "models--google--flan"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert huggingface_hub.try_to_load_from_cache("google/flan", "config.json", cache_dir=tmp_path)
    require_checkpoint("--teacher", "google/flan")


def test_a_revision_in_the_cache_needs_no_network(tmp_path, monkeypatch):
    """Also where no other is there, not even the main branch."""
    use_endpoint("http://127.0.0.1:9", tmp_path, monkeypatch)
    snapshot = tmp_path / "models--google--pinned" / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    require_checkpoint("--teacher", "google/pinned")


def test_nothing_is_asked_in_offline_mode(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    require_checkpoint("--teacher", "nobody/x")
    assert hub == []
