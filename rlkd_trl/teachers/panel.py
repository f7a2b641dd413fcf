"""Several teachers and several templates as one weighted list of scorers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlkd_trl.data import listed_references
from rlkd_trl.errors import InputError
from rlkd_trl.models.prompts import target_token_ids
from rlkd_trl.models.vocabulary import are_same_tokens
from rlkd_trl.ops.ensembles import disagreement, mean_token_loss, weights_by_loss
from rlkd_trl.prompts import Message, PromptTemplates, is_conversation, question_columns, source_text
from rlkd_trl.teachers.absent import AbsentTeacher
from rlkd_trl.teachers.routing import Routing
from rlkd_trl.teachers.scores import TeacherScores
from rlkd_trl.teachers.teacher import Teacher

# How scorers are weighed: by numbers that are the same for all examples, or on each example by its losses.
FIXED, PER_EXAMPLE = "fixed", "per_example"


@dataclass(frozen=True)
class Scorer:
    """One teacher asked through one template, by its index in the panel's templates, with its share of the mean."""

    teacher: Teacher | AbsentTeacher
    template_index: int
    weight: float

    def prompts(self, questions_of_rows: Sequence[Sequence[str | list[Message]]]) -> list[str]:
        """What the teacher reads for each row, of the questions that `TeacherPanel.questions` gives for it."""
        return self.teacher.writer.texts(questions[self.template_index] for questions in questions_of_rows)


class _Reading(NamedTuple):
    """What a scorer reads: its distinct prompts, each completion's index in them `[B]`, and which completions.

    owned_b: indices of the completions that are the scorer's; None for all.
    """

    scorer: Scorer
    prompts: list[str]
    index_B: Tensor
    owned_b: Tensor | None

    def of(self, *tensors: Tensor) -> list[Tensor]:
        """The rows of tensors of B completions that the scorer reads."""
        return list(tensors) if self.owned_b is None else [tensor[self.owned_b] for tensor in tensors]


class TeacherPanel:
    """Every teacher × every template, with weights that add up to 1 (equal by default).

    LLMR averages its reward over templates; Hinton's ensemble averages over teachers.

    Args:
        teacher_weights, template_weights: Given weights; a scorer's is the product of its teacher's and template's.
        weighting: "fixed", these weights; or "per_example", MT-BERT's (Wu, Wu & Huang 2021): on each example the given
            weight over 1 + CE(y, p_i), and these divided by their sum. y is the row's first reference, and CE its mean
            per token. Without a reference it is the teachers' own agreement: CE becomes how far a scorer's
            log-probabilities of the completion's tokens are from the panel's median (`ops.ensembles.disagreement`), so
            that of three or more the odd one out has less to say; two are then weighed as given.
        routing: Of each example only the scorers that own it are asked; their weights are divided by their sum.
        max_reference_length: So many tokens of a reference are read, EOS among them.

    Raises:
        InputError: No teacher, another number of weights than of teachers or templates, a weight that is not positive,
            an unknown weighting, or a weighting per example or a routing of teachers with different tokenizers.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher | AbsentTeacher],
        templates: PromptTemplates | None = None,
        *,
        teacher_weights: Sequence[float] | None = None,
        template_weights: Sequence[float] | None = None,
        weighting: str = FIXED,
        routing: Routing | None = None,
        max_reference_length: int = 256,
    ):
        if weighting not in (FIXED, PER_EXAMPLE):
            raise InputError(f"Unknown weighting {weighting!r}: choose {FIXED!r} or {PER_EXAMPLE!r}.")
        num_templates = 1 if templates is None else len(templates)
        self.templates, self.weighting, self.routing = templates, weighting, routing
        self.max_reference_length = max_reference_length
        self.scorers = [
            Scorer(teacher, template_index, teacher_share * template_share)
            for teacher, teacher_share in zip(
                teachers, _shares(teacher_weights, len(teachers), "teacher"), strict=True
            )
            for template_index, template_share in enumerate(_shares(template_weights, num_templates, "template"))
        ]
        if routing is not None:
            self._require_one_tokenizer("Those of a routing need one: their answers are evaluated as one model's.")
        if weighting == PER_EXAMPLE:
            self._require_one_tokenizer("Weighed per example they need one: losses per token are compared.")

    @property
    def weights(self) -> list[float]:
        """The scorers' weights, of a weighting per example the given ones."""
        return [scorer.weight for scorer in self.scorers]

    @property
    def can_score(self) -> bool:
        """Whether the teachers can score any completion."""
        return all(scorer.teacher.can_score for scorer in self.scorers)

    @property
    def differs_by_example(self) -> bool:
        """Whether a scorer's share depends on the example."""
        return self.weighting == PER_EXAMPLE or self.routing is not None

    def weigh_by(self, losses: Sequence[float]) -> None:
        """Divides each scorer's weight by 1 + its loss, and all by their sum, as for weights by validation loss.

        Raises:
            InputError: A loss is NaN, infinite or below 0.
        """
        if not all(0 <= loss < math.inf for loss in losses):
            raise InputError(f"The losses to weigh teachers by must be finite and not below 0; got {list(losses)}.")
        shares = [scorer.weight / (1 + loss) for scorer, loss in zip(self.scorers, losses, strict=True)]
        self.scorers = [
            replace(scorer, weight=share / sum(shares)) for scorer, share in zip(self.scorers, shares, strict=True)
        ]

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
        is_all = set(row) <= {"prompt", "references"}
        if is_all and not (is_conversation(row["prompt"]) and self.templates.source_variable == "prompt"):
            return self.templates.render_source(source_text(row["prompt"]))
        return self.templates.render(question_columns(self.templates, row))

    def owned(self, rows: Sequence[Mapping[str, object]]) -> Tensor:
        """Whether each scorer is asked about each row, `[K, P]`. Raises `InputError` as `Routing.owners`."""
        if self.routing is None:
            return torch.ones(len(self.scorers), len(rows), dtype=torch.bool)
        names = [] if self.templates is None else self.templates.names
        num_templates = max(len(names), 1)
        owned_KP = torch.zeros(len(self.scorers), len(rows), dtype=torch.bool)
        for p, row in enumerate(rows):
            teacher, template = self.routing.owners(row, names)
            for k in range(len(self.scorers)):
                owned_KP[k, p] = teacher in (None, k // num_templates) and template in (None, k % num_templates)
        return owned_KP

    def score(
        self,
        rows: Sequence[Mapping[str, object]],
        prompt_index_B: Tensor,
        completion_ids_BT: Tensor,
        completion_mask_BT: Tensor,
        ended_B: Tensor,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        forbidden_V: Tensor | None = None,
        **statistics,
    ) -> list[TeacherScores]:
        """One `TeacherScores` per scorer, in the order of `scorers`, with its weight; 0 where a scorer is not asked.

        Args:
            rows: The P prompts' data rows, each with a `prompt`. Rows with the same question are read once.
            prompt_index_B: The prompt, 0 to P − 1, that each completion answers.
            completion_ids_BT, completion_mask_BT, ended_B: The completions, as everywhere.
            tokenizer: That of the completions. A teacher with another one reads them in its own tokens, and its scores
                have an `alignment`. None: they are in each teacher's tokens.
            forbidden_V, statistics: `forbidden_V`, `expected` and `tau` of `Teacher.score`: what to compute beyond the
                default. An aligned teacher has its own forbidden ids in place of `forbidden_V`.

        Raises:
            InputError: As `questions` and `Routing.owners`, or a question has no tokens.
        """
        completions = (completion_ids_BT, completion_mask_BT, ended_B)
        scores = []
        for reading in self._readings(rows, prompt_index_B):
            teacher = reading.scorer.teacher
            index_b, *texts = reading.of(reading.index_B, *completions)
            aligner = None if tokenizer is None else teacher.aligner(tokenizer)
            alignment, own_V = None, forbidden_V
            if aligner is not None:
                alignment = aligner.align(*texts)
                texts = [alignment.ids_BU, alignment.mask_BU, alignment.ended_B]
                own_V = None if forbidden_V is None else aligner.forbidden_V
            of_scorer = teacher.score(reading.prompts, index_b, *texts, forbidden_V=own_V, **statistics)
            of_scorer = replace(of_scorer, alignment=alignment)
            if reading.owned_b is not None:
                of_scorer = of_scorer.spread(reading.owned_b, len(prompt_index_B))
            scores.append(of_scorer)
        logps_KBT = [of_scorer.log_likelihood(completion_mask_BT) for of_scorer in scores]
        shares = self.shares(rows, prompt_index_B, logps_KBT, completion_mask_BT)
        return [replace(of_scorer, weight=share) for of_scorer, share in zip(scores, shares, strict=True)]

    def states(
        self,
        rows: Sequence[Mapping[str, object]],
        prompt_index_B: Tensor,
        completion_ids_BT: Tensor,
        completion_mask_BT: Tensor,
    ) -> list[Tensor]:
        """`Teacher.states` of each scorer, for losses over the whole vocabulary; arguments as for `score`.

        They are 0 where a scorer is not asked. `shares` says how much each counts.
        """
        all_states = []
        for reading in self._readings(rows, prompt_index_B):
            states_bTD = reading.scorer.teacher.states(
                reading.prompts, *reading.of(reading.index_B, completion_ids_BT, completion_mask_BT)
            )
            if reading.owned_b is not None:
                zeros_BTD = states_bTD.new_zeros(len(prompt_index_B), *states_bTD.shape[1:])
                states_bTD = zeros_BTD.index_copy(0, reading.owned_b.to(states_bTD.device), states_bTD)
            all_states.append(states_bTD)
        return all_states

    def shares(
        self,
        rows: Sequence[Mapping[str, object]],
        prompt_index_B: Tensor,
        logps_KBT: Sequence[Tensor],
        completion_mask_BT: Tensor,
        *,
        are_references: bool = False,
    ) -> list[float | Tensor]:
        """Each scorer's share of the mean, which add up to 1: a number, or `[B, 1]` where it differs by example.

        logps_KBT: The scorers' log p(y_t | s_t) of the completions, read where `weighting` is per example.
        are_references: the completions themselves are what is right.
        """
        if not self.differs_by_example:
            return self.weights
        device = completion_mask_BT.device
        given_K1 = torch.tensor(self.weights, device=device)[:, None]
        owned_KB = self.owned(rows).to(device)[:, prompt_index_B]
        given_KB = given_K1 * owned_KB
        losses_KB = torch.zeros_like(given_KB)
        if self.weighting == PER_EXAMPLE and are_references:
            losses_KB = torch.stack([mean_token_loss(logps_BT, completion_mask_BT) for logps_BT in logps_KBT])
        elif self.weighting == PER_EXAMPLE:
            of_references_KB = self.reference_losses(rows).to(device)[:, prompt_index_B]
            without_B = torch.tensor([_first_reference(row) is None for row in rows], device=device)[prompt_index_B]
            disagreement_KB = disagreement(logps_KBT, completion_mask_BT, owned_KB)
            losses_KB = torch.where(without_B, disagreement_KB, of_references_KB)
        return list(weights_by_loss(losses_KB, given_KB)[..., None])

    def reference_losses(self, rows: Sequence[Mapping[str, object]]) -> Tensor:
        """Each scorer's mean cross-entropy per token of each row's first reference, in nats, `[K, P]`.

        It is 0 for rows without references, and for those that are not the scorer's by the routing. With sharded
        teachers all processes call this together.
        """
        losses_KP = torch.zeros(len(self.scorers), len(rows))
        references = [_first_reference(row) for row in rows]
        has_reference_P = torch.tensor([reference is not None for reference in references])
        for k, reading in enumerate(self._readings(rows, torch.arange(len(rows)))):
            read_r = has_reference_P.nonzero()[:, 0]
            if reading.owned_b is not None:
                read_r = read_r[torch.isin(read_r, reading.owned_b)]
            teacher = reading.scorer.teacher
            ids = [
                target_token_ids(teacher.processing_class, references[p], max_length=self.max_reference_length)
                for p in read_r.tolist()
            ]
            ids_rT = torch.zeros(len(ids), max([1, *map(len, ids)]), dtype=torch.long)
            mask_rT = torch.zeros_like(ids_rT, dtype=torch.bool)
            for row_T, mask_T, of_row in zip(ids_rT, mask_rT, ids, strict=True):
                row_T[: len(of_row)] = torch.tensor(of_row)
                mask_T[: len(of_row)] = True
            ended_r = torch.ones(len(ids), dtype=torch.bool)
            scores = teacher.score(reading.prompts, reading.index_B[read_r], ids_rT, mask_rT, ended_r)
            losses_KP[k, read_r] = mean_token_loss(scores.log_likelihood(mask_rT), mask_rT)
        return losses_KP

    def mean_reference_losses(self, rows: Sequence[Mapping[str, object]]) -> list[float]:
        """Each scorer's mean of `reference_losses` over its own rows, all of which have references.

        Raises:
            InputError: No row is a scorer's, so that nothing says how good it is; or the teachers have different
                tokenizers, so that their losses per token cannot be compared.
        """
        self._require_one_tokenizer("Losses per token of their own cannot be compared.")
        owned_KP = self.owned(rows)
        for k, owned_P in enumerate(owned_KP, start=1):
            if not owned_P.any():
                raise InputError(
                    f"No row is of scorer {k} of {len(owned_KP)} (teacher by teacher, template by template), so "
                    "nothing says how good it is: add rows that are, or choose another weighting."
                )
        return (self.reference_losses(rows).sum(dim=1) / owned_KP.sum(dim=1)).tolist()

    def record(self) -> dict[str, object]:
        """What says how the scorers are weighed, in JSON's types; nothing for equal weights."""
        is_equal = max(self.weights) - min(self.weights) < 1e-12
        record: dict[str, object] = {} if is_equal else {"weights": self.weights}
        if self.weighting != FIXED:
            record["weighting"] = self.weighting
        if self.routing is not None:
            record["routing"] = [self.routing.teacher_column, self.routing.template_column]
        return record

    def _require_one_tokenizer(self, why: str) -> None:
        """Raises `InputError` if the teachers' tokenizers differ; why: why they must not."""
        first, *others = [scorer.teacher.processing_class for scorer in self.scorers]
        if not all(are_same_tokens(first, other) for other in others):
            raise InputError(f"The teachers have different tokenizers. {why}")

    def _readings(self, rows: Sequence[Mapping[str, object]], prompt_index_B: Tensor) -> Iterator[_Reading]:
        questions_of_rows = [self.questions(row) for row in rows]
        owned_KP = None if self.routing is None else self.owned(rows).to(prompt_index_B.device)
        for k, scorer in enumerate(self.scorers):
            prompts_P = scorer.prompts(questions_of_rows)
            index_of = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts_P))}
            index_P = torch.tensor([index_of[prompt] for prompt in prompts_P], device=prompt_index_B.device)
            owned_b = None if owned_KP is None else owned_KP[k][prompt_index_B].nonzero()[:, 0]
            yield _Reading(scorer, list(index_of), index_P[prompt_index_B], owned_b)


def _shares(weights: Sequence[float] | None, count: int, what: str) -> list[float]:
    """The weights over their sum; equal ones without any. Raises `InputError`."""
    weights = [1.0] * count if weights is None else list(weights)
    if count == 0 or len(weights) != count:
        raise InputError(f"{count} {what}s and {len(weights)} weights: give one weight each.")
    if not all(0 < weight < math.inf for weight in weights):
        raise InputError(f"The {what}s' weights must be positive, for an average; got {weights}.")
    return [weight / sum(weights) for weight in weights]


def _first_reference(row: Mapping[str, object]) -> str | None:
    return next(iter(listed_references(row.get("references"))), None)
