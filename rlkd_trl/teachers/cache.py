"""A teacher's distributions along fixed completions, in files: a student learns from them without the teacher.

A directory of a cache holds

    cache.json                  what was written: `Header`
    tokenizer/                  the teacher's, with its chat template
    shard-00000.safetensors …   of `rows_per_shard` completions each, and their N tokens one after the other:
        keys [R, 16] uint8      the digest of the questions to the teacher and of the completion's ids, see `key_of`
        ends [R] int64          where the tokens of each completion end
        ids [N, k]              the k most likely ids, uint16 or uint32
        logps [N, k+1]          their log-probabilities, and that of any other id, float32 or float16
        sums [R] uint64         XXH3 of each completion's part of `ids` and `logps`

A shard appears whole or not at all, and has the header's digest in its metadata, so that no shard of another cache is
read. While tokenizer and header are written, or everything is deleted, the header is called `cache.json.part`. The
files are mapped into memory: of them only what is read is loaded.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlkd_trl.errors import InputError
from rlkd_trl.models.loading import load_tokenizer
from rlkd_trl.ops.truncated import LOG_0
from rlkd_trl.prompts import Message, PromptTemplates
from rlkd_trl.teachers.absent import AbsentTeacher
from rlkd_trl.teachers.panel import TeacherPanel

FORMAT = 2
HEADER, TOKENIZER = "cache.json", "tokenizer"
DTYPES = ("float32", "float16")
KEY_BYTES = 16
OF_HEADER = "header"  # in a shard's metadata: the digest of its header


@dataclass(frozen=True)
class Header:
    """What a cache was made of and how, in JSON's types.

    k: ids known at each token; num_allowed: of how many, so the cache is whole if both are the same. temperature,
    ensemble: as `distillation_temperature` and `ensemble` of `KDConfig`. forbidden: the ids of the tokenizer that are
    never sampled; content_tokens: the special tokens that may be; eos_ids: those that end a target.
    max_completion_length: the cap on targets, in tokens. teachers: class and digest of the weights of each. names:
    what they were called. weights: of the scorers. chat: how they are asked through chat templates. templates: names.
    max_prompt_length: the cap on questions. targets: how many completions; keys: the digest of all their keys.
    """

    k: int
    num_allowed: int
    dtype: str
    temperature: float
    ensemble: str
    vocab_size: int
    forbidden: list[int]
    content_tokens: list[str]
    eos_ids: list[int]
    max_completion_length: int
    teachers: list[dict[str, str]]
    names: list[str]
    weights: list[float]
    chat: list[dict[str, object] | None]
    templates: list[str]
    max_prompt_length: int | None
    targets: int
    keys: str
    rows_per_shard: int
    format: int = FORMAT

    @property
    def is_whole(self) -> bool:
        """Whether every id is known one by one."""
        return self.k == self.num_allowed

    @property
    def num_shards(self) -> int:
        return -(-self.targets // self.rows_per_shard)

    @property
    def digest(self) -> str:
        """Of everything but `names`: a copy of a teacher in another place is the same teacher."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name != "names"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def difference(self, other: "Header") -> str | None:
        """The first field that differs, in words; None if the other is the same."""
        for field in dataclasses.fields(self):
            if field.name == "names":
                continue
            here, there = getattr(self, field.name), getattr(other, field.name)
            if here != there:
                return f"{field.name} is {_short(here)} and would be {_short(there)}"
        return None


def read_header(directory: str | Path) -> Header:
    """A cache's header. Raises `InputError` if there is none, or it is of another version of the format."""
    file = Path(directory) / HEADER
    if not file.is_file():
        raise InputError(f"{directory} is no teacher cache: it has no {HEADER}. Make one with cache_teacher.py.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise InputError(f"{file} has format {values['format']}, and this version reads {FORMAT}: make it anew.")
        return Header(**values)
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is not the header of a teacher cache: make the cache anew.") from error


def shard_file(directory: str | Path, number: int) -> Path:
    return Path(directory) / f"shard-{number:05}.safetensors"


def is_shard_of(file: Path, header: Header) -> bool:
    """Whether a shard is there, can be opened, and was written for this header."""
    try:
        with safe_open(file, framework="np") as shard:
            return (shard.metadata() or {}).get(OF_HEADER) == header.digest
    except (SafetensorError, OSError):
        return False


def key_of(questions: Sequence[str | list[Message]], completion_ids: Sequence[int]) -> bytes:
    """The digest of what the teachers are asked, one question per template, and of a completion with its EOS."""
    content = json.dumps([list(questions), list(completion_ids)]).encode()
    return hashlib.sha256(content).digest()[:KEY_BYTES]


def row_sum(ids_nk: np.ndarray, logps_nk1: np.ndarray) -> int:
    """XXH3 of a completion's numbers, by which damage is noticed when they are read."""
    return xxhash.xxh3_64_intdigest(ids_nk.tobytes() + logps_nk1.tobytes())


class TeacherCache(AbsentTeacher):
    """The distributions in a directory, which is complete.

    Raises:
        InputError: It is no cache, or shards of it are missing.
    """

    def __init__(self, directory: str | Path):
        self.directory, self.header = Path(directory), read_header(directory)
        missing = [n for n in range(self.header.num_shards) if not shard_file(directory, n).is_file()]
        if missing:
            raise InputError(
                f"The teacher cache {directory} is not complete: {len(missing)} of its {self.header.num_shards} "
                "shards are missing. The command that makes it goes on where it stopped."
            )
        super().__init__(load_tokenizer(str(self.directory / TOKENIZER)), content_tokens=self.header.content_tokens)
        self._shards = [self._opened(n) for n in range(self.header.num_shards)]
        self._ends = [np.concatenate([[0], self._whole(n, "ends")]) for n in range(self.header.num_shards)]
        self._keys = np.concatenate([self._whole(n, "keys") for n in range(self.header.num_shards)])
        self._heads = np.ascontiguousarray(self._keys[:, :8]).view(np.uint64)[:, 0]
        self._order = np.argsort(self._heads)

    def describe(self) -> str:
        header = self.header
        ids = "all ids" if header.is_whole else f"{header.k} of {header.num_allowed} ids"
        return f"{', '.join(header.names)}, cached: {header.targets} targets, {ids} at each token, {header.dtype}"

    def record(self) -> dict[str, object]:
        return {"cache": hashlib.sha256((self.directory / HEADER).read_bytes()).hexdigest()[:16]}

    def place_of(self, key: bytes) -> int | None:
        """The number of the completion with this key; None if it is not here."""
        head = np.frombuffer(key[:8], dtype=np.uint64)[0]
        first, last = (np.searchsorted(self._heads, head, side=side, sorter=self._order) for side in ("left", "right"))
        places = (int(place) for place in self._order[first:last] if self._keys[place].tobytes() == key)
        return next(places, None)

    def read(self, place: int) -> tuple[Tensor, Tensor]:
        """Ids `[n, k]` and log-probabilities `[n, k+1]`, float32, of the n tokens of a completion.

        Raises:
            InputError: The file is damaged there.
        """
        shard, row = divmod(place, self.header.rows_per_shard)
        part = slice(int(self._ends[shard][row]), int(self._ends[shard][row + 1]))
        try:
            ids_nk, logps_nk1 = (self._shards[shard].get_slice(name)[part] for name in ("ids", "logps"))
            is_sound = row_sum(ids_nk, logps_nk1) == int(self._shards[shard].get_slice("sums")[row : row + 1][0])
        except SafetensorError:
            is_sound = False
        if not is_sound:
            raise self._damaged(shard)
        logps = torch.from_numpy(logps_nk1.astype(np.float32)).clamp(min=LOG_0)  # float16 has minus infinity there
        return torch.from_numpy(ids_nk.astype(np.int64)), logps

    def _opened(self, number: int) -> safe_open:
        try:
            shard = safe_open(shard_file(self.directory, number), framework="np")
        except (SafetensorError, OSError) as error:
            raise self._damaged(number) from error
        if (shard.metadata() or {}).get(OF_HEADER) != self.header.digest:
            raise InputError(
                f"{shard_file(self.directory, number)} is of another cache than {HEADER} beside it: run the command "
                "again that made the cache."
            )
        return shard

    def _whole(self, number: int, name: str) -> np.ndarray:
        try:
            return self._shards[number].get_tensor(name)
        except SafetensorError as error:
            raise self._damaged(number) from error

    def _damaged(self, number: int) -> InputError:
        file = shard_file(self.directory, number)
        return InputError(f"{file} is damaged: delete it, and run the command again that made the cache.")


class CachedPanel(TeacherPanel):
    """The teachers and templates of a cache as one scorer: what was cached is their ensemble's distribution.

    templates: how the teachers were asked; without a model their questions are part of a completion's key.
    """

    def __init__(self, cache: TeacherCache, templates: PromptTemplates | None = None):
        super().__init__([cache])
        self.cache, self.templates = cache, templates
        names = [] if templates is None else templates.names
        if names != cache.header.templates:
            asked = f"the templates {', '.join(cache.header.templates)}" if cache.header.templates else "no templates"
            raise InputError(
                f"The teacher cache {cache.directory} was made with {asked}, and here "
                f"{'there are none' if not names else 'they are ' + ', '.join(names)}: give the same --templates and "
                "--template_names."
            )

    def states(
        self,
        rows: Sequence[Mapping[str, object]],
        prompt_index_B: Tensor,
        completion_ids_BT: Tensor,
        completion_mask_BT: Tensor,
    ) -> list[Tensor]:
        """In place of hidden states: log-probabilities `[B, T, k+1]` and ids `[B, T, k]`; 0 behind the mask.

        Raises:
            InputError: A completion is not in the cache.
        """
        (B, T), k = completion_ids_BT.shape, self.cache.header.k
        logps_BTk1, ids_BTk = torch.zeros(B, T, k + 1), torch.zeros(B, T, k, dtype=torch.long)
        questions_P = [self.questions(row) for row in rows]
        for b, p in enumerate(prompt_index_B.tolist()):
            ids = completion_ids_BT[b][completion_mask_BT[b]].tolist()
            place = self.cache.place_of(key_of(questions_P[p], ids))
            if place is None:
                raise self.not_there(rows[p])
            ids_BTk[b, : len(ids)], logps_BTk1[b, : len(ids)] = self.cache.read(place)
        return [logps_BTk1.to(completion_ids_BT.device), ids_BTk.to(completion_ids_BT.device)]

    def not_there(self, row: Mapping[str, object]) -> InputError:
        """The error for a row of which a target is not in the cache."""
        return InputError(
            f"A target of the prompt {_short(row['prompt'])} is not in the teacher cache {self.cache.directory}: the "
            "texts, how the teacher is asked, or the tokenizer are others than when it was made. Give the same data "
            "and templates, or make the cache anew."
        )


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}…"
