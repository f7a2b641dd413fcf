"""A teacher's own answers, written down as training targets."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from rlkd_trl.data import listed_references, reference_texts
from rlkd_trl.errors import InputError, is_first_process
from rlkd_trl.evaluation.metrics import sentence_bleu
from rlkd_trl.models.answers import answer_prompts, decode
from rlkd_trl.models.vocabulary import share_special_tokens
from rlkd_trl.teachers.panel import Scorer, TeacherPanel


def pseudo_labels(
    panel: TeacherPanel,
    rows: Sequence[Mapping[str, object]],
    *,
    interpolate: bool = False,
    num_beams: int = 4,
    leave_out: Collection[str] = ("references",),
    **generation,
) -> Iterator[dict[str, object]]:
    """Answers of the panel's first teacher to each row, through each template; with a routing each row's owners'.

    Yields, for each teacher and template all of its rows in order: the row without the columns `leave_out`, with
    `pseudo_label` (the answer) and `template` (its name). `num_beams` and `generation` go to `answer_prompts`.

    With `interpolate`, which needs strategy "beam", the answer is the `nearest_candidate` to the row's references
    among the `num_beams` best, and `candidate` is its rank, 0 for the best beam. Candidates that the length cap has
    cut take part as they are.

    Raises:
        InputError: As `answer_prompts`; or `interpolate` and a row without references.
    """
    teachers = {id(scorer.teacher): scorer.teacher for scorer in _answering(panel)}.values()
    share_special_tokens([(teacher.model, teacher.processing_class) for teacher in teachers], reference_texts(rows))
    for i, row in enumerate(rows if interpolate else []):
        if not row.get("references"):
            raise InputError(f"Row {i + 1} has no references, and interpolation needs one to choose a beam by.")
    candidates_per_row = num_beams if interpolate else 1
    names = panel.templates.names if panel.templates is not None else [None]
    owned_KP = panel.owned(rows)
    for k, scorer in enumerate(_answering(panel)):
        rows_of_scorer = [row for row, is_owned in zip(rows, owned_KP[k].tolist(), strict=True) if is_owned]
        if not rows_of_scorer:
            continue
        teacher, template_name = scorer.teacher, names[k % len(names)]
        prompts_P = scorer.prompts([panel.questions(row) for row in rows_of_scorer])
        batches = answer_prompts(
            teacher.model,
            teacher.processing_class,
            prompts_P,
            max_prompt_length=teacher.max_prompt_length,
            num_beams=num_beams,
            all_beams=interpolate,
            **generation,
        )
        remaining = iter(rows_of_scorer)
        for completions in batches:
            texts = decode(completions, teacher.processing_class)
            for first in range(0, len(texts), candidates_per_row):
                row = next(remaining)
                label = {key: value for key, value in row.items() if key not in leave_out}
                label["template"] = template_name
                if interpolate:
                    candidates = texts[first : first + num_beams]
                    rank = nearest_candidate(candidates, listed_references(row["references"]))
                    yield {**label, "pseudo_label": candidates[rank], "candidate": rank}
                else:
                    yield {**label, "pseudo_label": texts[first]}


def nearest_candidate(candidates: Sequence[str], references: Sequence[str]) -> int:
    """Index of the candidate with the highest sentence BLEU against the references; the first one if several have it.

    Sequence-level interpolation (Kim & Rush 2016, "Sequence-Level Knowledge Distillation", §3.3): argmax_{t ∈ T_K}
    sim(t, y), with T_K the teacher's K best and y the reference.
    """
    scores = [sentence_bleu(candidate, references) for candidate in candidates]
    return scores.index(max(scores))


def write_pseudo_labels(
    panel: TeacherPanel, rows: Sequence[Mapping[str, object]], path: str | Path, **generation
) -> int:
    """Writes `pseudo_labels` to a file as JSON lines, and returns their number.

    The file has the name `path` + ".part" until it is complete. Of several processes the first one writes it; with a
    sharded teacher the others compute the same answers along with it.
    """
    total = int(panel.owned(rows)[: len(_answering(panel))].sum())
    if not is_first_process():
        is_sharded = any(scorer.teacher.backbone.is_sharded for scorer in _answering(panel))
        for _ in pseudo_labels(panel, rows, **generation) if is_sharded else ():
            pass
        return total
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    with part.open("w", encoding="utf-8") as file:
        for label in tqdm(pseudo_labels(panel, rows, **generation), total=total, desc="Pseudo-labels"):
            file.write(json.dumps(label, ensure_ascii=False) + "\n")
    part.replace(path)
    return total


def part_of(path: str | Path) -> Path:
    """Where pseudo-labels stand until they are complete."""
    return Path(path).with_name(f"{Path(path).name}.part")


def _answering(panel: TeacherPanel) -> list[Scorer]:
    """The scorers that answer: the first teacher's, which come first; with a routing all."""
    num_templates = 1 if panel.templates is None else len(panel.templates)
    return panel.scorers[: None if panel.routing is not None else num_templates]
