"""Digests of data, templates and checkpoints: what changes them, and what does not."""

import json

import datasets
import pytest

from rlkd_trl.commands import files_read
from rlkd_trl.commands.files_read import FileDigests, checkpoint_files, file_digest


def digest(flag: str, value) -> str | None:
    return FileDigests().of_flags({flag: [str(value)]}).get(f"{flag} {value}")


@pytest.fixture
def small_samples(monkeypatch):
    """Weights above 1000 bytes: their first 100 bytes, and 5 samples of 10 bytes."""
    for name, value in {"SAMPLED_ABOVE": 1000, "HEAD": 100, "SAMPLES": 5, "SAMPLE_SIZE": 10}.items():
        monkeypatch.setattr(files_read, name, value)


def test_large_weights_are_sampled(tmp_path, small_samples):
    weights = tmp_path / "model.safetensors"
    content = bytearray(range(256)) * 8  # 2048 bytes: samples begin at 0, 509, 1019, 1528 and 2038
    weights.write_bytes(content)
    whole = file_digest(weights)

    def changes(position: int) -> bool:
        changed = content.copy()
        changed[position] ^= 1
        weights.write_bytes(changed)
        return file_digest(weights) != whole

    assert all(changes(position) for position in (0, 99, 509, 518, 1019, 1528, 2038, 2047))
    assert not any(changes(position) for position in (100, 508, 519, 1018, 2037))
    weights.write_bytes(content + b"!")
    assert file_digest(weights) != whole, "another size"


@pytest.mark.parametrize(("name", "size"), [("model.safetensors", 1000), ("train.csv", 2048)])
def test_small_weights_and_all_data_are_read_in_full(name, size, tmp_path, small_samples):
    file = tmp_path / name
    file.write_bytes(b"a" * size)
    before = file_digest(file)
    file.write_bytes(b"a" * 300 + b"b" + b"a" * (size - 301))
    assert file_digest(file) != before


def test_of_a_checkpoint_count_the_files_that_are_loaded(tmp_path):
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "spiece.model"):
        (tmp_path / name).write_text(name)
    before = digest("--teacher", tmp_path)
    assert {file.name for file in checkpoint_files(tmp_path)} == {file.name for file in tmp_path.iterdir()}
    for name in ("metrics.json", "test.json", "README.md", "report.html", "training_args.bin", "optimizer.pt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "model.safetensors").write_text("older")
    assert digest("--teacher", tmp_path) == before
    (tmp_path / "generation_config.json").write_text("{}")
    assert digest("--teacher", tmp_path) != before, "a file more"


def test_names_below_the_directory_count_and_its_own_does_not(tmp_path):
    for place in ("one", "other"):
        (tmp_path / place).mkdir()
        for split in ("train", "test"):
            (tmp_path / place / f"{split}.csv").write_text(f"mr\n{split}\n")
    assert digest("--dataset", tmp_path / "one") == digest("--dataset", tmp_path / "other")
    train, test = tmp_path / "other" / "train.csv", tmp_path / "other" / "test.csv"
    train.rename(tmp_path / "other" / "kept.csv")
    test.rename(train)
    (tmp_path / "other" / "kept.csv").rename(test)
    assert digest("--dataset", tmp_path / "one") != digest("--dataset", tmp_path / "other"), "splits exchanged"


def test_what_datasets_computes_beside_saved_rows_does_not_count(tmp_path):
    datasets.Dataset.from_list([{"mr": str(i)} for i in range(4)]).save_to_disk(tmp_path / "saved")
    before = digest("--dataset", tmp_path / "saved")
    datasets.load_from_disk(str(tmp_path / "saved")).map(lambda row: {"ref": row["mr"]})
    assert list((tmp_path / "saved").glob("cache-*")), "that is where it puts them"
    assert digest("--dataset", tmp_path / "saved") == before
    datasets.Dataset.from_list([{"mr": str(i)} for i in range(5)]).save_to_disk(tmp_path / "other")
    assert digest("--dataset", tmp_path / "other") != before


def test_adapters_by_a_relative_path_for_a_model_by_an_absolute_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "adapters"):
        (tmp_path / name).mkdir()
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_text("one")
    config = {"base_model_name_or_path": str(tmp_path / "model")}
    (tmp_path / "adapters" / "adapter_config.json").write_text(json.dumps(config))
    before = digest("--teacher", "adapters")
    assert before == digest("--teacher", tmp_path / "adapters")
    weights.write_text("other")
    assert digest("--teacher", "adapters") != before


def test_what_is_not_local_has_no_digest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {"--teacher": ["bigscience/T0_3B"], "--dataset": ["xsum"], "--reward": ["length"], "--seed": ["3"]}
    assert FileDigests().of_flags(flags) == {}


def test_templates_by_file_directory_and_name(tmp_path):
    (tmp_path / "templates.yaml").write_text("templates: {}\n")
    assert digest("--templates", tmp_path) == digest("--templates", tmp_path / "templates.yaml") is not None
    assert digest("--templates", "builtin:summarisation") != digest("--templates", "builtin:dialogue") is not None
