"""Several teachers and several templates as one weighted list of scorers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlkd_trl.errors import InputError
from rlkd_trl.prompts import Message, PromptTemplates, is_conversation, question_columns, source_text
from rlkd_trl.teachers.scores import TeacherScores
from rlkd_trl.teachers.teacher import Teacher


@dataclass(frozen=True)
class Scorer:
    """One teacher asked through one template, by its index in the panel's templates, with its share of the mean."""

    teacher: Teacher
    template_index: int
    weight: float

    def prompts(self, questions_of_rows: Sequence[Sequence[str | list[Message]]]) -> list[str]:
        """What the teacher reads for each row, of the questions that `TeacherPanel.questions` gives for it."""
        return self.teacher.writer.texts(questions[self.template_index] for questions in questions_of_rows)


class TeacherPanel:
    """Every teacher × every template, with weights that add up to 1 (equal by default).

    LLMR averages its reward over templates; Hinton's ensemble averages over teachers.

    Raises:
        InputError: No teacher, another number of weights than of teachers, or a weight that is not positive.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        templates: PromptTemplates | None = None,
        *,
        teacher_weights: Sequence[float] | None = None,
    ):
        teacher_weights = [1.0] * len(teachers) if teacher_weights is None else list(teacher_weights)
        if not teachers or len(teacher_weights) != len(teachers):
            raise InputError(f"{len(teachers)} teachers and {len(teacher_weights)} weights: give one weight each.")
        if not all(0 < weight < math.inf for weight in teacher_weights):
            raise InputError(f"The teachers' weights must be positive, for an average; got {teacher_weights}.")
        self.templates = templates
        num_templates = 1 if templates is None else len(templates)
        self.scorers = [
            Scorer(teacher, template_index, weight / sum(teacher_weights) / num_templates)
            for teacher, weight in zip(teachers, teacher_weights, strict=True)
            for template_index in range(num_templates)
        ]

    @property
    def weights(self) -> list[float]:
        return [scorer.weight for scorer in self.scorers]

    def questions(self, row: Mapping[str, object]) -> list[str | list[Message]]:
        """What the teachers are asked about a data row, one question per template, before any chat template.

        Without templates it is `row["prompt"]` itself, a text or a conversation. If the row has only a prompt (and
        references), that fills the one input column of the templates; otherwise `question_columns` says which columns
        they may read.

        Raises:
            InputError: A template does not render; the message names it.
        """
        if self.templates is None:
            prompt = row["prompt"]
            return [prompt if isinstance(prompt, str) or is_conversation(prompt) else str(prompt)]
        if set(row) <= {"prompt", "references"}:
            return self.templates.render_source(source_text(row["prompt"]))
        return self.templates.render(question_columns(self.templates, row))

    def score(
        self,
        rows: Sequence[Mapping[str, object]],
        prompt_index_B: Tensor,
        completion_ids_BT: Tensor,
        completion_mask_BT: Tensor,
        ended_B: Tensor,
        **statistics,
    ) -> list[TeacherScores]:
        """One `TeacherScores` per scorer, in the order of `scorers`.

        Args:
            rows: The P prompts' data rows, each with a `prompt`. Rows with the same question are read once.
            prompt_index_B: The prompt, 0 to P − 1, that each completion answers.
            completion_ids_BT, completion_mask_BT, ended_B: The completions, as everywhere.
            statistics: `expected`, `tau` and `forbidden_V` of `Teacher.score`: what to compute beyond the default.

        Raises:
            InputError: As `questions`, or a question has no tokens.
        """
        completions = (completion_ids_BT, completion_mask_BT, ended_B)
        return [
            scorer.teacher.score(*prompts, *completions, **statistics)
            for scorer, prompts in self._distinct_prompts(rows, prompt_index_B)
        ]

    def states(
        self,
        rows: Sequence[Mapping[str, object]],
        prompt_index_B: Tensor,
        completion_ids_BT: Tensor,
        completion_mask_BT: Tensor,
    ) -> list[Tensor]:
        """`Teacher.states` of each scorer, for losses over the whole vocabulary; arguments as for `score`."""
        return [
            scorer.teacher.states(*prompts, completion_ids_BT, completion_mask_BT)
            for scorer, prompts in self._distinct_prompts(rows, prompt_index_B)
        ]

    def _distinct_prompts(
        self, rows: Sequence[Mapping[str, object]], prompt_index_B: Tensor
    ) -> Iterator[tuple[Scorer, tuple[list[str], Tensor]]]:
        """Each scorer with its distinct prompts, and for each completion the index of its prompt in them, `[B]`."""
        questions_of_rows = [self.questions(row) for row in rows]
        for scorer in self.scorers:
            prompts_P = scorer.prompts(questions_of_rows)
            index_of = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts_P))}
            index_P = torch.tensor([index_of[prompt] for prompt in prompts_P], device=prompt_index_B.device)
            yield scorer, (list(index_of), index_P[prompt_index_B])
