"""The texts of errors of `datasets` that are read: if one fails, its version says it in other words."""

import datasets
import pytest

from rlkd_trl.data.datasets_errors import configurations_named_in, splits_named_in

VERSION = f"with datasets {datasets.__version__}"

CARD = """---
configs:
- config_name: large
  data_files: large.csv
- config_name: small
  data_files: small.csv
---
"""


def error_of(*args: str, **settings) -> Exception:
    with pytest.raises(Exception) as caught:
        datasets.load_dataset(*args, **settings)
    return caught.value


def test_an_unknown_split(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text("source\na\n")
    error = error_of(str(tmp_path), split="dev", cache_dir=str(tmp_path / "cache"))
    assert splits_named_in(error) == "train, test", VERSION
    assert configurations_named_in(error) == ""


def test_a_configuration_that_is_not_named(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    for name in ("large", "small"):
        (tmp_path / f"{name}.csv").write_text("source\na\n")
    error = error_of(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert configurations_named_in(error) == "large, small", VERSION
    assert splits_named_in(error) == ""


def test_another_error():
    assert splits_named_in(ValueError("Unknown")) == configurations_named_in(ValueError("configs")) == ""
