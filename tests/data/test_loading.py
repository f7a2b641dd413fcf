"""Loading rows from files, directories and the Hub: what works, and what the errors say."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict

from rlkd_trl.data import data_files, group_by_source, load_rows
from rlkd_trl.errors import InputError

E2E = Path(__file__).resolve().parents[3] / "shared" / "data" / "e2e"
ROWS = [{"mr": "name[A]", "ref": "This is A."}, {"mr": "name[B]", "ref": "This is B, not A."}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return str(path)


def fails(message, dataset, split="train", **kwargs):
    with pytest.raises(InputError, match=message) as caught:
        load_rows(str(dataset), split, **kwargs)
    assert "\n" not in str(caught.value)


# --- load_rows: what works ---


def test_every_file_format_gives_the_same_rows(tmp_path):
    files = [
        write(tmp_path / "a.csv", 'mr,ref\nname[A],This is A.\nname[B],"This is B, not A."\n'),
        write(tmp_path / "a.json", json.dumps(ROWS)),
        write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS)),
        write(tmp_path / "upper.CSV", 'mr,ref\nname[A],This is A.\nname[B],"This is B, not A."\n'),
        str(tmp_path / "a.parquet"),
    ]
    Dataset.from_list(ROWS).to_parquet(files[-1])
    for file in files:
        assert load_rows(file).to_list() == ROWS, file


def test_slices_of_a_file(tmp_path):
    file = write(tmp_path / "a.json", json.dumps(ROWS))
    assert load_rows(file, "train[:1]").to_list() == ROWS[:1]


def test_directory_with_a_file_for_each_split(tmp_path):
    write(tmp_path / "train.jsonl", json.dumps(ROWS[0]))
    write(tmp_path / "test.jsonl", json.dumps(ROWS[1]))
    assert load_rows(str(tmp_path), "train").to_list() == ROWS[:1]
    assert load_rows(str(tmp_path), "test").to_list() == ROWS[1:]
    fails(r"Split 'dev' is not in .*; its splits are: train, test\.", tmp_path, "dev")


def test_directories_that_save_to_disk_wrote(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict(test=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "dict")
    assert load_rows(str(tmp_path / "one")).to_list() == ROWS
    assert load_rows(str(tmp_path / "dict"), "test").to_list() == ROWS
    fails(r"Split 'test' is not in .*one; its splits are: train\.", tmp_path / "one", "test")
    fails(r"Split 'train' is not in .*dict; its splits are: test\.", tmp_path / "dict")


def test_changed_content_is_read_anew_even_at_the_same_size(tmp_path):
    file = write(tmp_path / "a.csv", "mr,ref\na,b\n")
    assert load_rows(file).to_list() == [{"mr": "a", "ref": "b"}]
    write(tmp_path / "a.csv", "mr,ref\nc,d\n")
    assert load_rows(file).to_list() == [{"mr": "c", "ref": "d"}]


def test_changed_content_is_read_anew_even_at_the_same_modification_time(tmp_path):
    """As when archives with fixed times are unpacked one over the other."""
    file = write(tmp_path / "a.csv", "mr,ref\na,b\n")
    os.utime(file, (1e9, 1e9))
    assert load_rows(file)["mr"][:] == ["a"]
    write(tmp_path / "a.csv", "mr,ref\nc,d\n")
    os.utime(file, (1e9, 1e9))
    assert load_rows(file)["mr"][:] == ["c"]


def test_progress_bars_are_quiet_for_small_files_and_left_as_they_were(tmp_path, capfd):
    from datasets.utils import are_progress_bars_disabled

    before = are_progress_bars_disabled()
    load_rows(write(tmp_path / "a.csv", "mr,ref\na,b\n"))
    (tmp_path / "directory").mkdir()
    write(tmp_path / "directory" / "train.csv", "mr,ref\na,b\n")
    assert len(load_rows(str(tmp_path / "directory"))) == 1
    fails("could not be read", write(tmp_path / "b.csv", 'mr,ref\n"a,b\n'))
    assert are_progress_bars_disabled() == before
    assert "Generating" not in capfd.readouterr().err


@pytest.mark.skipif(not E2E.is_dir(), reason="the E2E data are not part of the package and not beside it")
def test_the_e2e_files():
    for file, rows, inputs in (("train.csv", 4672, 547), ("test.csv", 4693, 630)):
        loaded = load_rows(str(E2E / file))
        assert (len(loaded), loaded.column_names) == (rows, ["mr", "ref"])
        grouped = group_by_source(loaded, "mr", "ref")
        assert len(grouped) == inputs
        assert sum(map(len, grouped["references"])) == rows
    assert grouped[0]["prompt"] == "name[Blue Spice], eatType[coffee shop], area[city centre]"
    assert grouped[0]["references"] == [
        "A coffee shop in the city centre area called Blue Spice.",
        "Blue Spice is a coffee shop in city centre.",
    ]


# --- load_rows: what does not ---


def test_missing_file_fails_before_the_network_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked for it"))
    fails(r"Dataset .*none\.csv does not exist; check the path", tmp_path / "none.csv")
    fails(r"Dataset none\.jsonl does not exist", "none.jsonl")
    fails(r"does not exist; check the path", tmp_path / "no_such_directory")


def test_unknown_extension(tmp_path):
    file = write(tmp_path / "a.txt", "hello\n")
    fails(r"a\.txt has an extension that is not known; use one of: \.csv, \.json, \.jsonl, \.parquet\.", file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", r"a\.csv is empty; it needs a header and rows"),
        ("a.csv", "mr,ref\n", r"a\.csv has no rows in split 'train'; there is nothing to work on"),
        ("a.json", "[]", r"a\.json has no rows"),
        ("a.jsonl", "\n\n", r"a\.jsonl has no rows"),
        ("a.csv", "\n\n", r"a\.csv could not be read: No columns to parse from file"),
        ("a.csv", 'mr,ref\nx,y\n"z', r"a\.csv could not be read: Error tokenizing data.*EOF inside string"),
        ("a.csv", "mr,ref\nx,y\na,b,c\n", r"a\.csv could not be read: Error tokenizing.*Expected 2 fields in line 3"),
        ("a.csv", "mr,ref\na,b,c\n", r"a\.csv has rows with more fields than its header; quote"),
        ("a.jsonl", '{"a": 1}\n{"a": ', r"a\.jsonl could not be read: JSON parse error"),
        ("a.json", '[{"a": 1},', r"a\.json could not be read: "),
        ("a.parquet", "xx", r"a\.parquet could not be read: Parquet file size is 2 bytes"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    fails(message, write(tmp_path / name, content))


def test_wrong_encoding(tmp_path):
    (tmp_path / "a.csv").write_bytes("mr,ref\ncafé,b\n".encode("latin-1"))
    fails(r"a\.csv could not be read: 'utf-8' codec can't decode byte 0xe9", tmp_path / "a.csv")


def test_other_split_of_a_single_file(tmp_path):
    file = write(tmp_path / "a.csv", "mr,ref\na,b\n")
    fails(r"Split 'test' is not in .*a\.csv: a single file has the one split 'train'", file, "test")
    fails(r"has no rows in split 'train\[:0\]'", file, "train[:0]")


def test_directory_without_data(tmp_path):
    fails(r"holds no data files; it needs files of one of: \.csv", tmp_path)
    write(tmp_path / "notes.foo", "hello")
    fails(r"holds no data files", tmp_path)


def test_hub_errors_say_that_neither_a_path_nor_the_hub_worked(monkeypatch):
    def unreachable(path, config, *, split, revision):
        raise ConnectionError("Couldn't reach 'owner/data' on the Hub (Timeout)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = r"Dataset owner/data is not a local path and could not be fetched from the Hub: Couldn't reach"
    fails(message, "owner/data")
    fails(r"from the Hub at revision v9: Couldn't reach", "owner/data", revision="v9")


def test_hub_arguments_and_unknown_split(monkeypatch):
    def hub(path, config, *, split, revision):
        assert (path, config, revision) == ("owner/data", "3.0.0", "main")
        if split == "dev":
            raise ValueError("Unknown split \"dev\". Should be one of ['train', 'test'].")
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert load_rows("owner/data", "test", revision="main", config="3.0.0").to_list() == ROWS
    message = r"Split 'dev' is not in owner/data; its splits are: train, test\."
    fails(message, "owner/data", "dev", revision="main", config="3.0.0")


def test_hub_dataset_with_several_configurations_lists_them(monkeypatch):
    def hub(*args, **kwargs):
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['1.0.0', '2.0.0']\n")

    monkeypatch.setattr(datasets, "load_dataset", hub)
    fails(
        r"Dataset owner/data has several configurations; choose one with --dataset_config: 1\.0\.0, 2\.0\.0\.",
        "owner/data",
    )


def test_importing_the_package_loads_no_heavy_library():
    code = "import sys, rlkd_trl.data; print(sorted({'datasets', 'transformers', 'torch'} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- What is wrong with a file, in which line, and what to do ---


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"a": "x"}\n\n{"a": "y"}\n{"a": }\n', "line 4: Expecting value"),
        ("a.jsonl", '{"a": "x"}\n["y"]\n', "line 2: a list, not an object"),
        ("a.json", '[{"a": "x"},\n {"a": "y"},\n {"a": ]\n', "line 3: Expecting value"),
        ("a.csv", "a,b,a\n1,2,3\n", "has the column `a` twice: rename or remove one"),
        ("a.csv", '"a",b,"a"\n1,2,3\n', "has the column `a` twice: rename or remove one"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ("a.csv", "a,b\n1,2\n1,caf\u00e9\n".encode("latin1"), "byte 0xe9 in line 3. Save the file as UTF-8"),
        (
            "a.jsonl",
            '{"a": "x"}\n{"a": "caf\u00e9"}\n'.encode("latin1"),
            "byte 0xe9 in line 2. Save the file",
        ),
    ],
)
def test_the_line_and_the_remedy(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    fails(message, path)


# --- Directories that lead out of themselves ---


@pytest.fixture
def secret(tmp_path):
    return write(tmp_path / "outside" / "secret.csv", "mr,ref\nsecret,secret\n")


def card(directory, data_files, name="README.md"):
    yaml = "configs:\n- config_name: default\n  data_files: " + data_files
    write(directory / name, f"---\n{yaml}\n---\n" if name == "README.md" else yaml + "\n")
    write(directory / "train.csv", "mr,ref\nopen,open\n")
    return directory


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize(
    "data_files",
    [
        '"../outside/secret.csv"',
        '["train.csv", "../outside/secret.csv"]',
        '{train: "../outside/*.csv"}',
        '[{split: train, path: "../outside/secret.csv"}]',
        '[{split: train, path: ["train.csv", "sub/../../outside/secret.csv"]}]',
        '"SECRET"',
        '"file://SECRET"',
        '"http://127.0.0.1:9/secret.csv"',
        '"hf://datasets/a/b/secret.csv"',
        '"zip://secret.csv::a.zip"',
        '"..\\\\outside\\\\secret.csv"',
    ],
)
def test_a_card_cannot_name_data_outside(tmp_path, secret, data_files, name, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    directory = card(tmp_path / "data", data_files.replace("SECRET", secret), name)
    fails("names data outside of itself", directory)


def test_a_data_dir_cannot_lead_outside(tmp_path, secret):
    write(tmp_path / "data" / "README.md", "---\nconfigs:\n- config_name: default\n  data_dir: ../outside\n---\n")
    write(tmp_path / "data" / "train.csv", "mr,ref\nopen,open\n")
    fails("names data outside of itself, '../outside'", tmp_path / "data")


def test_links_cannot_lead_outside(tmp_path, secret):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").symlink_to(secret)
    fails("names data outside of itself", tmp_path / "data")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "sub").symlink_to(tmp_path / "outside")
    fails("names data outside of itself|holds no data files", tmp_path / "more")


def test_links_and_cards_within_are_fine(tmp_path):
    directory = card(tmp_path / "data", '[{split: train, path: "sub/real.csv"}]')
    write(directory / "sub" / "real.csv", "mr,ref\nopen,open\n")
    assert load_rows(str(directory)).to_list() == [{"mr": "open", "ref": "open"}]
    snapshot = tmp_path / "hub" / "datasets--a--b" / "snapshots" / "0f"
    write(tmp_path / "hub" / "datasets--a--b" / "blobs" / "12", "mr,ref\nopen,open\n")
    snapshot.mkdir(parents=True)
    (snapshot / "train.csv").symlink_to("../../blobs/12")
    assert load_rows(str(snapshot)).to_list() == [{"mr": "open", "ref": "open"}]


@pytest.mark.parametrize("beside", [{}, {"_indices_data_files": [{}]}, {"_indices_data_files": 1}])
@pytest.mark.parametrize("inside", ["dataset_dict.json", "state.json"])
def test_what_save_to_disk_wrote_cannot_lead_outside(tmp_path, inside, beside):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "outside")
    DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "data")
    if inside == "dataset_dict.json":
        write(tmp_path / "data" / inside, json.dumps({"splits": ["../outside"]}))
    else:
        state = json.loads((tmp_path / "data" / "train" / inside).read_text()) | beside
        state["_data_files"][0]["filename"] = "../../outside/" + state["_data_files"][0]["filename"]
        write(tmp_path / "data" / "train" / inside, json.dumps(state))
    fails("names data outside of itself", tmp_path / "data")


@pytest.mark.parametrize("name", ["data.pkl", "data.pickle", "data.tar", "script.py"])
def test_pickles_archives_and_scripts_are_not_read(tmp_path, name):
    """A pickle that would make a directory when it is read, under names that something might read."""
    made = tmp_path / "made"
    payload = f"cos\nmkdir\n(V{made}\ntR."
    if name == "script.py":
        payload = f"import os\nos.mkdir({str(made)!r})\n"
    if name == "data.tar":
        write(tmp_path / "a.pickle", payload)
        (tmp_path / "data").mkdir()
        subprocess.run(["tar", "cf", tmp_path / "data" / name, "-C", tmp_path, "a.pickle"], check=True)
    else:
        write(tmp_path / "data" / name, payload)
    fails("holds no data files|is not read: use .csv|could not be read", tmp_path / "data")
    if name != "script.py":
        fails("extension that is not known", tmp_path / "data" / name)
    assert not made.exists()


def test_compressed_files_of_a_directory_count_as_its_data(tmp_path):
    """By which a comparison sees that they have changed."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl.gz").write_bytes(gzip.compress(b'{"mr": "a", "ref": "b"}\n'))
    assert load_rows(str(tmp_path / "data")).to_list() == [{"mr": "a", "ref": "b"}]
    assert data_files(str(tmp_path / "data")) == [tmp_path / "data" / "train.jsonl.gz"]
