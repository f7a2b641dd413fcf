"""Checkpoints and data for recipes, as directories and files."""

from pathlib import Path
from typing import NamedTuple

import datasets
import pytest

from tests.conftest import MODELS, word_tokenizer
from tests.recipes.command_lines import word_rows, write_csv


class Pair(NamedTuple):
    """Checkpoint directories of different models of one family; `other` is a second student."""

    teacher: Path
    student: Path
    other: Path


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Pair]:
    """One pair per family."""
    pairs = {}
    for family, build in MODELS.items():
        pairs[family] = Pair(*(tmp_path_factory.mktemp(family) / role for role in Pair._fields))
        for seed, directory in enumerate(pairs[family]):
            build(seed).save_pretrained(directory)
            word_tokenizer().save_pretrained(directory)
    return pairs


@pytest.fixture(scope="session")
def train_csv(tmp_path_factory) -> Path:
    return write_csv(tmp_path_factory.mktemp("data") / "train.csv", word_rows(30))


@pytest.fixture(scope="session")
def test_csv(tmp_path_factory) -> Path:
    return write_csv(tmp_path_factory.mktemp("data") / "test.csv", word_rows(8, seed=1))
