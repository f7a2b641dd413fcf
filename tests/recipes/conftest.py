"""Checkpoints and data for recipes, as directories and files."""

import random
import shutil
from pathlib import Path
from typing import NamedTuple

import datasets
import pytest

from tests.models.encoders import FIRST_WORD, VOCAB, encoder_tokenizer, make
from tests.recipes.command_lines import word_rows, write_csv, write_templates
from tests.recipes.stand_ins import STAND_IN
from tests.tiny_models import MODELS, chat_tokenizer, word_tokenizer


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
    """One pair per family, and one of chat models."""
    pairs = {}
    for family, build in {**MODELS, "chat": MODELS["llama"]}.items():
        pairs[family] = Pair(*(tmp_path_factory.mktemp(family) / role for role in Pair._fields))
        tokenizer = chat_tokenizer() if family == "chat" else word_tokenizer()
        for seed, directory in enumerate(pairs[family]):
            build(seed).save_pretrained(directory)
            tokenizer.save_pretrained(directory)
    return pairs


CLASSES = ("low", "mid", "high")


def labelled_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts of 3 to 9 words, another text, one of `CLASSES` by the first word, its number, and a number to predict."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [rng.randint(FIRST_WORD, VOCAB - 1) for _ in range(rng.randint(3, 9))]
        number = words[0] % len(CLASSES)
        other = " ".join(f"w{rng.randint(FIRST_WORD, VOCAB - 1)}" for _ in range(3))
        text = " ".join(f"w{word}" for word in words)
        rows.append({"text": text, "next": other, "label": CLASSES[number], "number": number, "score": words[0] / 10})
    return rows


class Encoders(NamedTuple):
    """Checkpoints of BERT with four layers: of masked words, of three classes, of one number; a student of two."""

    general: Path
    task: Path
    regression: Path
    student: Path
    train: Path
    test: Path


@pytest.fixture(scope="session")
def encoders(tmp_path_factory) -> Encoders:
    """With training and test data."""
    place = tmp_path_factory.mktemp("encoders")
    classes = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    models = {
        "general": make(layers=4, head="tokens"),
        "task": make(layers=4, head="classes", seed=1, **classes),
        "regression": make(layers=4, head="classes", seed=2, num_labels=1),
        "student": make(layers=2, head="tokens", seed=3),
    }
    for name, model in models.items():
        model.save_pretrained(place / name)
        encoder_tokenizer().save_pretrained(place / name)
    data = {
        "train": write_csv(place / "train.csv", labelled_rows(40)),
        "test": write_csv(place / "test.csv", labelled_rows(10, seed=1)),
    }
    return Encoders(**{name: place / name for name in models}, **data)


@pytest.fixture(scope="session")
def train_csv(tmp_path_factory) -> Path:
    return write_csv(tmp_path_factory.mktemp("data") / "train.csv", word_rows(30))


@pytest.fixture(scope="session")
def test_csv(tmp_path_factory) -> Path:
    return write_csv(tmp_path_factory.mktemp("data") / "test.csv", word_rows(8, seed=1))


@pytest.fixture
def workplace(tmp_path, checkpoints, monkeypatch) -> Path:
    """The current directory, with stand-ins for two recipes, data and models."""
    pair = checkpoints["t5-tied"]
    shutil.copytree(pair.teacher, tmp_path / "teacher")
    shutil.copytree(pair.student, tmp_path / "student")
    shutil.copytree(pair.teacher, tmp_path / "other_tokenizer")
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["w99"])
    tokenizer.save_pretrained(tmp_path / "other_tokenizer")
    write_csv(tmp_path / "data.csv", word_rows(30))
    write_csv(tmp_path / "test.csv", word_rows(8, seed=1))
    write_csv(tmp_path / "answers.csv", [{"mr": row["mr"], "answer": row["ref"]} for row in word_rows(30)])
    write_templates(tmp_path / "good.yaml", one="w9 {{ mr }}", two="{{ mr }} w4")
    presets = tmp_path / "recipes" / "configs" / "methods"
    for name, text in {
        "ppo_kd/ppo": "num_generations: 4",
        "rloo_kd/rloo_sequence": "level: sequence",
        "rloo_kd/misspelt": "levl: sequence",
        "rloo_kd/out_of_range": "num_generations: 1",
        "rloo_kd/with_rate": "learning_rate: 1.0e-3",
        "rloo_kd/in_int8": "teacher_quantization: int8",
        "rloo_kd/a_list": "- level",
        "rloo_kd/twice": "level: token",
        "ppo_kd/twice": "num_generations: 2",
        "poetry/ode": "num_generations: 2",
        "pseudo_label/greedy": "strategy: greedy",
    }.items():
        (presets / name).parent.mkdir(parents=True, exist_ok=True)
        (presets / f"{name}.yaml").write_text(text + "\n")
    for recipe in ("ppo_kd", "rloo_kd", "pseudo_label"):
        (tmp_path / "recipes" / f"{recipe}.py").write_text(STAND_IN)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls.jsonl"))
    monkeypatch.setenv("TRAINED", str(pair.other))
    monkeypatch.delenv("FAIL", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path
