"""Inputs for a student that come from its teacher, where there are no data: asked for, recombined, or sampled."""

import itertools
import json
import math
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from rlkd_trl.errors import InputError, TrainingError
from rlkd_trl.models.answers import answer_prompts, decode
from rlkd_trl.models.generation import Completions
from rlkd_trl.models.prompts import target_token_ids
from rlkd_trl.ops.ensembles import mean_token_loss
from rlkd_trl.teachers.teacher import Teacher

_SHOWN = 80  # characters of a text in a message
_MOST_TRIES = 10  # candidates drawn for each one that is wanted


@dataclass(frozen=True)
class GeneratedInput:
    """A source text, and its mean log-probability per token in the teacher's eyes, EOS included, in nats."""

    source: str
    logp_per_token: float | None


@dataclass(frozen=True)
class Schema:
    """Slots with their values, from which inputs like "name[The Mill], food[Indian]" are put together.

    slots: values by name, in the order in which they are written. required: slots that every input has; each other one
    is there with a probability of one half.
    """

    slots: dict[str, list[str]]
    required: tuple[str, ...] = ()
    slot_format: str = "{slot}[{value}]"
    separator: str = ", "

    @classmethod
    def load(cls, path: str) -> "Schema":
        """Of a JSON file: {"slots": {"food": ["Indian", …], …}, "required": […], "slot_format": …, "separator": …}.

        Raises:
            InputError: It cannot be read, or something else stands in it.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"--schema {path} could not be read as JSON: {error}") from error
        return cls._checked(found, path)

    @classmethod
    def _checked(cls, parts: object, path: str) -> "Schema":
        known = ("slots", "required", "slot_format", "separator")
        if not isinstance(parts, dict) or not isinstance(parts.get("slots"), dict) or not parts["slots"]:
            raise InputError(f'--schema {path} needs {{"slots": {{"name": ["value", …], …}}}}.')
        if unknown := sorted(set(parts) - set(known)):
            raise InputError(f"--schema {path}: {unknown[0]!r} is none of {', '.join(known)}.")
        for name, values in parts["slots"].items():
            if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
                raise InputError(f"--schema {path}: slot {name!r} needs a list of texts; it has {values!r}.")
        required = parts.get("required", [])
        if not isinstance(required, list):
            raise InputError(f"--schema {path}: required needs a list of slots; it has {required!r}.")
        if missing := [name for name in required if name not in parts["slots"]]:
            raise InputError(f"--schema {path}: required slot {missing[0]!r} is none of {', '.join(parts['slots'])}.")
        slot_format, separator = parts.get("slot_format", cls.slot_format), parts.get("separator", cls.separator)
        texts = {"slot_format": [slot_format], "separator": [separator], **parts["slots"]}
        for name, values in texts.items():
            for text in (name, *values):
                if not isinstance(text, str) or not _is_unicode(text):
                    raise InputError(f"--schema {path}: {name!a} needs text; it has {text!a}.")
        if "{slot}" not in slot_format and "{value}" not in slot_format:
            raise InputError(f"--schema {path}: slot_format {slot_format!r} needs {{slot}}, {{value}} or both.")
        return cls(parts["slots"], tuple(required), slot_format, separator)

    def recombinations(self, seed: int) -> Iterator[str]:
        """Inputs without end, drawn independently; none is empty."""
        generator = random.Random(seed)
        while True:
            chosen = [name for name in self.slots if name in self.required or generator.random() < 0.5]
            if chosen:
                yield self.separator.join(self._filled(name, generator.choice(self.slots[name])) for name in chosen)

    def _filled(self, slot: str, value: str) -> str:
        return re.sub(r"\{(slot|value)\}", lambda match: {"slot": slot, "value": value}[match[1]], self.slot_format)


def _is_unicode(text: str) -> bool:
    """False for half a surrogate pair, which JSON may hold and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def start_text(teacher: Teacher) -> str:
    """What a decoder-only teacher has read before a text begins: its BOS, or the EOS that serves as one.

    Raises:
        InputError: It is an encoder-decoder.
    """
    refuse_to_begin(teacher.model.config)
    return teacher.processing_class.bos_token or teacher.processing_class.eos_token


def refuse_to_begin(config: PreTrainedConfig) -> None:
    """Raises `InputError` for an encoder-decoder, which writes nothing without a question."""
    if config.is_encoder_decoder:
        raise InputError(
            "An encoder-decoder does not write without a question: ask it for an input with --template, in words "
            "without a source."
        )


def generate_inputs(
    teacher: Teacher,
    questions: Sequence[str],
    *,
    num_inputs: int,
    keep_share: float = 0.5,
    schema: Schema | None = None,
    temperature: float = 1.0,
    max_input_length: int = 64,
    batch_size: int = 64,
    seed: int = 0,
) -> list[GeneratedInput]:
    """Distinct inputs: of `num_inputs` / `keep_share` candidates those that the teacher finds likeliest per token.

    Candidates are sampled as answers to the `questions` in turn (see `start_text` for none), or with `schema` put
    together from its slots; without questions these have no likelihood, and all are kept. Samples that are empty or
    were cut off are left out. The order is that in which they were drawn.

    Raises:
        InputError: Too few distinct candidates among the ten times as many that are drawn at most.
        TrainingError: The teacher's log-probability of one is not finite, so that they cannot be ordered.
    """
    wanted = math.ceil(num_inputs / keep_share)
    if schema is None:
        drawn = _sampled(teacher, questions, temperature, max_input_length, batch_size, seed)
    else:
        drawn = _recombined(teacher, questions, schema, max_input_length, batch_size, seed)
    by_source: dict[str, GeneratedInput] = {}
    tries = _MOST_TRIES * wanted
    for candidate in itertools.islice(drawn, tries):
        if candidate is not None:
            if candidate.logp_per_token is not None and not math.isfinite(candidate.logp_per_token):
                raise TrainingError(
                    f"The teacher's log-probability of {candidate.source[:_SHOWN]!r} is {candidate.logp_per_token}: "
                    "load it in another precision (--teacher_dtype float32)."
                )
            by_source.setdefault(candidate.source, candidate)
        if len(by_source) == wanted:
            break
    if len(by_source) < wanted:
        remedy = "give the schema more values" if schema is not None else "raise --temperature or --max_input_length"
        raise InputError(
            f"{len(by_source)} distinct inputs came of {tries} candidates, and {wanted} are needed, --num_rows "
            f"{num_inputs} over --keep_share {keep_share}: lower one of these, or {remedy}."
        )
    inputs = list(by_source.values())
    if len(inputs) > num_inputs:
        least = sorted((candidate.logp_per_token for candidate in inputs), reverse=True)[num_inputs - 1]
        inputs = [candidate for candidate in inputs if candidate.logp_per_token >= least][:num_inputs]
    return inputs


def _sampled(
    teacher: Teacher, questions: Sequence[str], temperature: float, max_length: int, batch_size: int, seed: int
) -> Iterator[GeneratedInput | None]:
    """Answers without end, None for those that are empty or cut off."""
    turn = itertools.cycle(range(len(questions)))
    for number in itertools.count():
        index = [next(turn) for _ in range(batch_size)]
        [completions] = answer_prompts(
            teacher.model,
            teacher.processing_class,
            [questions[i] for i in index],
            strategy="sample",
            temperature=temperature,
            max_prompt_length=teacher.max_prompt_length,
            max_completion_length=max_length,
            batch_size=batch_size,
            seed=seed * 1_000_003 + number,
        )
        texts = [text.strip() for text in decode(completions, teacher.processing_class)]
        logps = _mean_logps(teacher, questions, index, completions)
        for text, logp, ended in zip(texts, logps, completions.ended_B.tolist(), strict=True):
            yield GeneratedInput(text, logp) if ended and text else None


def _recombined(
    teacher: Teacher, questions: Sequence[str], schema: Schema, max_length: int, batch_size: int, seed: int
) -> Iterator[GeneratedInput | None]:
    """The schema's inputs without end; None for those that are longer than `max_length` tokens."""
    tokenizer, turn = teacher.processing_class, itertools.cycle(range(max(len(questions), 1)))
    for texts in _batches(schema, seed, batch_size):
        ids = [target_token_ids(tokenizer, text, max_length=max_length + 1) for text in texts]
        logps: list[float | None] = [None] * len(texts)
        if questions:
            width = max(map(len, ids))
            ids_BT = torch.tensor([row + [0] * (width - len(row)) for row in ids])
            mask_BT = torch.arange(width)[None, :] < torch.tensor([len(row) for row in ids])[:, None]
            ended_B = torch.tensor([row[-1] == tokenizer.eos_token_id for row in ids])
            index = [next(turn) for _ in texts]
            logps = _mean_logps(teacher, questions, index, Completions(ids_BT, mask_BT, ended_B))
        for text, row, logp in zip(texts, ids, logps, strict=True):
            yield GeneratedInput(text, logp) if text.strip() and len(row) <= max_length else None


def _batches(schema: Schema, seed: int, batch_size: int) -> Iterator[list[str]]:
    texts = schema.recombinations(seed)
    while True:
        yield list(itertools.islice(texts, batch_size))


def _mean_logps(
    teacher: Teacher, questions: Sequence[str], index: Sequence[int], completions: Completions
) -> list[float]:
    """Each completion's mean log-probability per token, as an answer to its question."""
    mask_BT = completions.mask_BT
    scores = teacher.score(
        questions, torch.tensor(index, device=mask_BT.device), completions.ids_BT, mask_BT, completions.ended_B
    )
    return (-mean_token_loss(scores.log_likelihood(mask_BT), mask_BT)).tolist()


def write_inputs(inputs: Sequence[GeneratedInput], path: str) -> None:
    """JSON lines with `source` and, where there is one, `logp_per_token`; the file is there whole or not at all."""
    lines = []
    for item in inputs:
        line: dict[str, object] = {"source": item.source}
        if item.logp_per_token is not None:
            line["logp_per_token"] = round(item.logp_per_token, 4)
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.tmp")  # which no other command writes
    try:
        part.write_text("".join(lines), encoding="utf-8")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
