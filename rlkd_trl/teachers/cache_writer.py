"""Writes a teacher cache (see `teachers.cache`), shard by shard, so that it can be stopped and continued."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor
from tqdm.auto import tqdm

from rlkd_trl.data import listed_references, reference_texts
from rlkd_trl.errors import InputError
from rlkd_trl.models.prompts import target_token_ids
from rlkd_trl.models.vocabulary import (
    allowed_special_tokens,
    check_same_tokenizer,
    eos_token_ids,
    forbidden_ids_of,
    share_special_tokens,
)
from rlkd_trl.ops.divergences import ENSEMBLES
from rlkd_trl.ops.lm_head import MAX_SLICE_ELEMENTS
from rlkd_trl.ops.truncated import merged, top_ids
from rlkd_trl.prompts import Message
from rlkd_trl.teachers.cache import (
    HEADER,
    OF_HEADER,
    TOKENIZER,
    Header,
    is_shard_of,
    key_of,
    read_header,
    row_sum,
    shard_file,
)
from rlkd_trl.teachers.panel import TeacherPanel
from rlkd_trl.teachers.teacher import Teacher

_SHARD_BYTES, _MOST_ROWS = 2**28, 1024  # of a file, unless it is said how many targets it has
_PART = ".part"  # ends the name of a file that is being written
_SHARD = re.compile(r"shard-\d{5,}\.safetensors(\.part)?")


@dataclass(frozen=True)
class Target:
    """A completion to be read: the row that it answers, the questions about that row, its ids, and its key."""

    row: Mapping[str, object]
    questions: Sequence[str | list[Message]]
    ids: list[int]
    key: bytes


def targets_of(
    rows: Iterable[Mapping[str, object]],
    questions: Callable[[Mapping[str, object]], list],
    tokenizer,
    eos_ids: Sequence[int],
    *,
    max_completion_length: int,
) -> list[Target]:
    """The distinct targets of the rows' `references`, in their order, as `KDTrainer` makes completions of them."""
    targets: dict[bytes, Target] = {}
    for row in rows:
        questions_of_row = questions(row)
        for text in listed_references(row["references"]):
            ids = target_token_ids(tokenizer, text, max_length=max_completion_length)
            end = next((t + 1 for t, token in enumerate(ids) if token in eos_ids), len(ids))
            key = key_of(questions_of_row, ids[:end])
            targets.setdefault(key, Target(row, questions_of_row, ids[:end], key))
    return list(targets.values())


def write_cache(
    panel: TeacherPanel,
    rows: Sequence[Mapping[str, object]],
    directory: str | Path,
    *,
    names: Sequence[str],
    identities: Sequence[dict[str, str]],
    k: int,
    dtype: str,
    temperature: float,
    ensemble: str,
    max_completion_length: int,
    batch_size: int = 64,
    rows_per_shard: int | None = None,
    progress: str | None = None,
) -> Header:
    """Reads the rows' targets with the panel's teachers, and returns the header of the complete cache.

    Shards that are there already are left as they are.

    Args:
        names, identities: what each teacher is called, and the digest of its weights.
        k: ids to keep at each token; 0 for all that may be sampled.
        temperature, ensemble: of `KDConfig`.
        batch_size: targets at a time.
        rows_per_shard: Targets in a file; by default as many as take `_SHARD_BYTES`, and 1024 at most.
        progress: The label of a progress bar over shards; None shows none.

    Raises:
        InputError: The directory holds another cache, or the disk has no room for this one; teachers differ in their
            tokenizers; or as `questions`.
    """
    directory = Path(directory)
    teachers = list({id(scorer.teacher): scorer.teacher for scorer in panel.scorers}.values())
    first = teachers[0]
    tokenizer = first.processing_class
    for other in teachers[1:]:
        check_same_tokenizer(tokenizer, other.processing_class)
    share_special_tokens([(teacher.model, teacher.processing_class) for teacher in teachers], reference_texts(rows))
    eos_ids = eos_token_ids(first.model, tokenizer)
    targets = targets_of(rows, panel.questions, tokenizer, eos_ids, max_completion_length=max_completion_length)
    forbidden_V = forbidden_ids_of(first.model, tokenizer)
    num_allowed = int((~forbidden_V).sum())
    k = min(k or num_allowed, num_allowed)
    lengths = [len(target.ids) for target in targets]
    if rows_per_shard is None:
        largest = _bytes_per_token(k, len(tokenizer), dtype) * max(lengths, default=1)
        rows_per_shard = min(_MOST_ROWS, max(1, _SHARD_BYTES // largest))
    header = Header(
        k=k,
        num_allowed=num_allowed,
        dtype=dtype,
        temperature=temperature,
        ensemble=ensemble,
        vocab_size=len(tokenizer),
        forbidden=forbidden_V[: len(tokenizer)].nonzero()[:, 0].tolist(),
        content_tokens=allowed_special_tokens(first.model),
        eos_ids=eos_ids,
        max_completion_length=max_completion_length,
        teachers=list(identities),
        names=list(names),
        weights=panel.weights,
        chat=[teacher.writer.record() for teacher in teachers],
        templates=[] if panel.templates is None else panel.templates.names,
        max_prompt_length=first.max_prompt_length,
        targets=len(targets),
        keys=hashlib.sha256(b"".join(target.key for target in targets)).hexdigest(),
        rows_per_shard=rows_per_shard,
    )
    _check_room(directory, header, lengths)
    begin(directory, header, first)
    for number in tqdm(range(header.num_shards), desc=progress, unit="shard", disable=progress is None):
        file = shard_file(directory, number)
        if not is_shard_of(file, header):
            of_shard = targets[number * rows_per_shard : (number + 1) * rows_per_shard]
            arrays = _shard(panel, of_shard, header, forbidden_V, batch_size)
            _write(file, save(arrays, {OF_HEADER: header.digest}))
    return header


def _check_room(directory: Path, header: Header, lengths: Sequence[int]) -> None:
    """Raises `InputError` if the disk has less room than the shards take that are not there. lengths: of targets."""
    per_token, num_bytes = _bytes_per_token(header.k, header.vocab_size, header.dtype), 0
    for number in range(header.num_shards):
        if not shard_file(directory, number).is_file():
            start = number * header.rows_per_shard
            num_bytes += per_token * sum(lengths[start : start + header.rows_per_shard])
    place = next(place for place in (directory.absolute(), *directory.absolute().parents) if place.exists())
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise InputError(
            f"The cache's {header.k} ids at each of {sum(lengths):,} tokens take {num_bytes:,} bytes more in "
            f"{directory}, where {free:,} are free: keep fewer with --k, in --dtype float16, or name another place."
        )


def _bytes_per_token(k: int, vocab_size: int, dtype: str) -> int:
    return k * _id_type(vocab_size).itemsize + (k + 1) * np.dtype(dtype).itemsize


def _id_type(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def is_place_of_cache(directory: Path) -> bool:
    """Whether a directory holds a cache, or only what a command has left that was stopped while it began one."""
    try:
        read_header(directory)
    except InputError:
        return _part_of(directory / HEADER).is_file() and all(map(_is_of_cache, directory.iterdir()))
    return True


def remove_cache(directory: Path) -> None:
    """Deletes the files of a cache, and no others. If that is stopped, `is_place_of_cache` is still true."""
    header = directory / HEADER
    if header.is_file():
        header.replace(_part_of(header))
    for file in [file for file in directory.glob("shard-*") if _is_of_cache(file)]:
        file.unlink()
    shutil.rmtree(directory / TOKENIZER, ignore_errors=True)
    _part_of(header).unlink(missing_ok=True)


def _is_of_cache(file: Path) -> bool:
    return file.name in (HEADER, HEADER + _PART, TOKENIZER) or _SHARD.fullmatch(file.name) is not None


def _part_of(file: Path) -> Path:
    return file.with_name(file.name + _PART)


def begin(directory: Path, header: Header, teacher: Teacher) -> None:
    """Writes tokenizer and header, or raises `InputError` if another header is there."""
    if (directory / HEADER).is_file():
        difference = read_header(directory).difference(Header(**json.loads(json.dumps(asdict(header)))))
        if difference is not None:
            raise InputError(
                f"{directory} is a cache of something else: {difference}. Name another directory, or write over it "
                "with --overwrite_output_dir."
            )
        return
    if directory.is_dir() and is_place_of_cache(directory):
        remove_cache(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write_part(directory / HEADER, json.dumps(asdict(header), indent=1).encode())
    teacher.processing_class.save_pretrained(directory / TOKENIZER)
    teacher.model.config.save_pretrained(directory / TOKENIZER)  # from which some tokenizers are told apart
    _finish_part(directory / HEADER)  # last: without it there is no cache


def _write(file: Path, content: bytes) -> None:
    """The file appears whole: it is written beside, brought to the disk, and renamed."""
    _write_part(file, content)
    _finish_part(file)


def _write_part(file: Path, content: bytes) -> None:
    with _part_of(file).open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def _finish_part(file: Path) -> None:
    _part_of(file).replace(file)
    handle = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _shard(
    panel: TeacherPanel, targets: Sequence[Target], header: Header, forbidden_V: Tensor, batch_size: int
) -> dict[str, np.ndarray]:
    """The arrays of one shard's file."""
    num_tokens = sum(len(target.ids) for target in targets)
    ids = np.empty((num_tokens, header.k), _id_type(header.vocab_size))
    logps = np.empty((num_tokens, header.k + 1), header.dtype)
    done = 0
    for start in range(0, len(targets), batch_size):
        for ids_nk, logps_nk1 in _distributions(panel, targets[start : start + batch_size], header, forbidden_V):
            place = slice(done, done := done + len(ids_nk))
            with np.errstate(over="ignore"):  # log 0 becomes minus infinity in float16
                ids[place], logps[place] = ids_nk.numpy(), logps_nk1.numpy()
    ends = np.cumsum([len(target.ids) for target in targets])
    rows = [slice(end - len(target.ids), end) for end, target in zip(ends, targets, strict=True)]
    return {
        "keys": np.frombuffer(b"".join(target.key for target in targets), dtype=np.uint8).reshape(len(targets), -1),
        "ends": ends.astype(np.int64),
        "ids": ids,
        "logps": logps,
        "sums": np.array([row_sum(ids[row], logps[row]) for row in rows], dtype=np.uint64),
    }


@torch.no_grad()
def _distributions(
    panel: TeacherPanel, targets: Sequence[Target], header: Header, forbidden_V: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """`ids` and `logps` of all tokens of the targets, one target after the other, some tokens at a time.

    Raises:
        InputError: A log-probability is not finite.
    """
    ids_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(target.ids) for target in targets], batch_first=True)
    lengths_B = torch.tensor([len(target.ids) for target in targets])
    mask_BT = torch.arange(ids_BT.shape[1])[None, :] < lengths_B[:, None]
    states = panel.states([target.row for target in targets], torch.arange(len(targets)), ids_BT, mask_BT)
    states_KND = [states_BTD[mask_BT.to(states_BTD.device)] for states_BTD in states]
    heads = [scorer.teacher.backbone.head for scorer in panel.scorers]
    device, V = states_KND[0].device, min(scorer.teacher.backbone.vocab_size for scorer in panel.scorers)
    forbidden_V, at_once = forbidden_V[:V].to(device), max(1, MAX_SLICE_ELEMENTS // V)
    for start in range(0, len(states_KND[0]), at_once):
        logits_KnV = [
            head(states_ND[start : start + at_once])[:, :V].to(device)
            for head, states_ND in zip(heads, states_KND, strict=True)
        ]
        logps_nV = ENSEMBLES[header.ensemble](
            logits_KnV, panel.weights, temperature=header.temperature, forbidden_V=forbidden_V
        )
        ids_nk = top_ids(logps_nV, header.k)
        logps_nk1 = merged(logps_nV, ids_nk)
        if not torch.isfinite(logps_nk1).all():
            raise InputError("The teacher's log-probabilities are not finite: it cannot be cached.")
        yield ids_nk.cpu(), logps_nk1.cpu()
