"""A teacher's own answers, written down as training targets."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from rlkd_trl.models.answers import answer_prompts, decode
from rlkd_trl.teachers.panel import TeacherPanel


def pseudo_labels(
    panel: TeacherPanel, rows: Sequence[Mapping[str, object]], **generation
) -> Iterator[dict[str, object]]:
    """Each row with `pseudo_label` and `template`, once for every template of the panel's first teacher.

    `generation` goes to `answer_prompts`. The batches of one template come before those of the next.
    """
    teacher = panel.scorers[0].teacher
    names = panel.templates.names if panel.templates is not None else [None]
    asked = [panel.questions(row) for row in rows]
    for number, name in enumerate(names):
        questions = [of_row[number] for of_row in asked]
        batches = answer_prompts(
            teacher.model,
            teacher.processing_class,
            questions,
            max_prompt_length=teacher.max_prompt_length,
            **generation,
        )
        remaining = iter(rows)
        for completions in batches:
            for text in decode(completions, teacher.processing_class):
                row = {key: value for key, value in next(remaining).items() if key != "references"}
                yield {**row, "template": name, "pseudo_label": text}


def write_pseudo_labels(
    panel: TeacherPanel, rows: Sequence[Mapping[str, object]], path: str | Path, **generation
) -> int:
    """`pseudo_labels` as JSON lines, each written as it is made; returns how many there are.

    The file appears under its name when it is complete; until then it is `path` + ".part".
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    total = len(rows) * (1 if panel.templates is None else len(panel.templates))
    with part.open("w", encoding="utf-8") as file:
        for label in tqdm(pseudo_labels(panel, rows, **generation), total=total, desc="Pseudo-labels"):
            file.write(json.dumps(label, ensure_ascii=False) + "\n")
    part.replace(path)
    return total
