"""Measures a model's outputs: text metrics, the teacher's scores of them, and the student's of the teacher's."""

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from rlkd_trl.data import listed_references
from rlkd_trl.errors import TrainingError, is_first_process
from rlkd_trl.evaluation.metrics import text_metrics
from rlkd_trl.evaluation.samples import completion_log_probs
from rlkd_trl.models.alignment import TokenAligner
from rlkd_trl.models.answers import answer_prompts, decode, joined
from rlkd_trl.models.generation import Completions
from rlkd_trl.models.limits import position_limits
from rlkd_trl.models.prompts import prompt_lengths
from rlkd_trl.models.vocabulary import are_same_tokens
from rlkd_trl.ops.finite import usable_rows
from rlkd_trl.ops.masking import masked_sum, pad_columns
from rlkd_trl.ops.rewards import sequence_sum
from rlkd_trl.prompts import Message, source_text
from rlkd_trl.rewards import RewardInputs, RewardModel
from rlkd_trl.students import Policy

logger = logging.get_logger(__name__)

NOT_FINITE = "samples_not_finite"
_PROMPT_WIDTH = 200
_NONE_READ = "No output has tokens in the teacher's tokenizer (give one that knows their characters): their means"
_TOKENS_OF_TEACHER = "tokens_of_teacher"


@dataclass(frozen=True)
class Evaluation:
    """The outputs of a model for the N rows of an evaluation, and their metrics.

    metrics: each metric's value by name. outputs: the N texts. completions: the same outputs as tokens. per_input: the
    values that some metrics are means of, N each: `tokens`, `ended` (0 or 1), and with a reward model `reward` and
    `teacher_nll`, both of the whole completion, the latter in nats; with a teacher's completions also these'
    `teacher_tokens` and `nll_of_teacher`, the model's NLL of them.
    """

    metrics: dict[str, float]
    outputs: list[str]
    completions: Completions
    per_input: dict[str, list[float]] = field(default_factory=dict)


def evaluate_completions(
    rows: Sequence[Mapping[str, object]],
    completions: Completions,
    tokenizer: PreTrainedTokenizerBase,
    reward_model: RewardModel | None,
    *,
    own_logps_BT: Tensor | None = None,
    forbidden_V: Tensor | None = None,
    batch_size: int = 64,
    with_ibleu: bool = False,
    advance: Callable[[int], object] = lambda count: None,
) -> Evaluation:
    """All metrics of one completion per row: text metrics against `references`, and the reward model's.

    Beside `text_metrics` there are `tokens` (mean, EOS included) and `eos_rate`; with a reward model `reward` (the
    mean over sequences); and with a teacher `teacher_nll_per_token` and `teacher_nll_per_sequence` in nats, which are
    the likelihood risk of Wen et al. 2023, "f-Divergence Minimization for Sequence-Level Knowledge Distillation".

    `samples_not_finite` counts the completions whose reward, teacher NLL or `own_logps_BT` is NaN, infinite or too
    large for float32's statistics. If there are any, a warning names a prompt, and `reward` and `teacher_nll_*` are
    NaN, because a mean over the others would look better than the model is. See `check_finite`.

    Where a teacher has another tokenizer than `tokenizer`, `teacher_nll_per_token` is per token of the teacher, and
    `unreadable` counts the completions that it has no tokens for, which `reward` and `teacher_nll_*` leave out (they
    are NaN in `per_input`). If it has none for all of them, nothing is measured, and all count as not finite.

    Args:
        rows: The N data rows, each with a `prompt`.
        tokenizer: That of the completions.
        own_logps_BT: The model's log-probabilities of its completions, for rewards that read them.
        forbidden_V: True on ids that the model may not sample.
        with_ibleu: Also compare each output with its row's `source`, or `prompt` where there is none.
        advance: Called with the number of rows of each batch that has been scored.
    """
    outputs = decode(completions, tokenizer)
    references = [listed_references(row.get("references")) for row in rows]
    sources = [str(row.get("source", source_text(row["prompt"]))) for row in rows] if with_ibleu else None
    metrics = text_metrics(outputs, references, sources)
    per_input = {
        "tokens": completions.mask_BT.sum(dim=1).double().tolist(),
        "ended": completions.ended_B.double().tolist(),
    }
    metrics["tokens"] = sum(per_input["tokens"]) / len(rows)
    metrics["eos_rate"] = sum(per_input["ended"]) / len(rows)
    is_usable = {}
    if own_logps_BT is not None:
        is_usable["the model's log-probabilities"] = usable_rows(own_logps_BT, completions.mask_BT)
    if reward_model is not None:
        scored, is_usable_of_scores, readable = _reward_per_input(
            rows, completions, outputs, tokenizer, reward_model, own_logps_BT, forbidden_V, batch_size, advance
        )
        teacher_tokens = scored.pop(_TOKENS_OF_TEACHER, per_input["tokens"])
        per_input |= scored
        is_usable |= is_usable_of_scores
        read = [b for b in range(len(rows)) if readable is None or readable[b]]
        if readable is not None:
            metrics["unreadable"] = len(rows) - len(read)
            if not read:
                is_usable[_NONE_READ] = torch.tensor(readable)
        metrics["reward"] = _ratio(sum(scored["reward"][b] for b in read), len(read))
        if reward_model.panels:
            nll = sum(scored["teacher_nll"][b] for b in read)
            metrics["teacher_nll_per_token"] = _ratio(nll, sum(teacher_tokens[b] for b in read))
            metrics["teacher_nll_per_sequence"] = _ratio(nll, len(read))
    metrics[NOT_FINITE] = count_not_finite(is_usable, rows)
    if metrics[NOT_FINITE]:
        metrics |= {name: math.nan for name in metrics if name == "reward" or name.startswith("teacher_nll")}
    return Evaluation(metrics, outputs, completions, per_input)


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan


def count_not_finite(
    is_usable: Mapping[str, Tensor], rows: Sequence[Mapping[str, object]], column: str = "prompt"
) -> int:
    """The number of rows with a number that is not finite, with a warning that names the first of them.

    is_usable: for each kind of number, by its name, whether it is finite in each row, `[B]`. column: what a row is
    named by; its number, where there is no such column.
    """
    bad = sorted({b for usable_B in is_usable.values() for b in (~usable_B).nonzero()[:, 0].tolist()})
    if bad and is_first_process():
        what = " and ".join(name for name, usable_B in is_usable.items() if not usable_B.all())
        first = textwrap.shorten(str(rows[bad[0]].get(column, f"row {bad[0] + 1}")), _PROMPT_WIDTH)
        logger.warning(f"{what} not finite for {len(bad)} of {len(rows)} {column}s, the first of them {first!r}")
    return len(bad)


def check_finite(results: Mapping[str, Mapping[str, float]], consequence: str = "") -> None:
    """Raises `TrainingError` if evaluations met numbers that are not finite.

    results: each model's metrics by its name. consequence: a sentence for the message about what was saved.
    """
    bad = {name: metrics[NOT_FINITE] for name, metrics in results.items() if metrics.get(NOT_FINITE)}
    if bad:
        listed = ", ".join(f"{count:.0f} samples of {name!r}" for name, count in bad.items())
        raise TrainingError(
            f"The evaluation cannot be relied on: numbers that are not finite in {listed}; the warnings above name "
            f"the first of them. {consequence}".rstrip()
        )


def _reward_per_input(
    rows, completions, outputs, tokenizer, reward_model, own_logps_BT, forbidden_V, batch_size, advance
) -> tuple[dict[str, list[float]], dict[str, Tensor], list[bool] | None]:
    """`reward` and, with a teacher, `teacher_nll` of each row's whole completion; and whether they are finite.

    The latter is, by the name of each kind of number, `[B]`. With a teacher that has another tokenizer, also its
    tokens in each row, and last whether it has any for the row's text.
    """
    reward, nll, usable = [], [], {"the reward": [], "the teacher's log-probabilities": []}
    readable, teacher_tokens = [], []
    for start in range(0, len(rows), batch_size):
        cut = slice(start, start + batch_size)
        inputs = RewardInputs(
            rows=rows[cut],
            prompt_index_B=torch.arange(len(rows[cut]), device=completions.ids_BT.device),
            completion_ids_BT=completions.ids_BT[cut],
            completion_mask_BT=completions.mask_BT[cut],
            ended_B=completions.ended_B[cut],
            completions=outputs[cut],
            student_logps_BT=None if own_logps_BT is None else own_logps_BT[cut],
            forbidden_V=forbidden_V,
            tokenizer=tokenizer,
        )
        result = reward_model.rewards(inputs, reward_model.score(inputs), allow_not_finite=True)
        mask_BT = inputs.completion_mask_BT
        reward += sequence_sum(result.rewards_BT, mask_BT).tolist()
        unread_B = torch.zeros_like(inputs.ended_B)
        if result.readable_B is not None:
            unread_B = ~result.readable_B
            readable += result.readable_B.tolist()
            teacher_tokens += result.teacher_tokens_B(mask_BT).tolist()
        usable["the reward"].append(usable_rows(result.rewards_BT, mask_BT) | unread_B)
        if result.scores is not None:
            nll_BT = result.teacher_nll_BT(mask_BT)
            nll += sequence_sum(nll_BT, mask_BT).tolist()
            usable["the teacher's log-probabilities"].append(usable_rows(nll_BT, mask_BT) | unread_B)
        advance(len(inputs.rows))
    values = {"reward": reward, "teacher_nll": nll} if reward_model.panels else {"reward": reward}
    if readable:
        values[_TOKENS_OF_TEACHER] = teacher_tokens
    return values, {name: torch.cat(parts) for name, parts in usable.items() if parts}, readable or None


def evaluate_student(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, object]],
    reward_model: RewardModel | None,
    *,
    max_prompt_length: int | None,
    max_completion_length: int,
    batch_size: int = 64,
    seed: int | None = None,
    prompts: Sequence[str | list[Message]] | None = None,
    teacher_completions: Completions | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    with_ibleu: bool = False,
    progress: str | None = None,
    after_batch: Callable[[], object] = lambda: None,
) -> Evaluation:
    """`evaluate_completions` of a model's own outputs.

    Args:
        policy: The student, or any other model to be measured.
        rows: The N data rows, each with a `prompt`.
        seed: Of samples at the policy's temperature; without it decoding is greedy.
        prompts: What the model is asked, one prompt per row; by default each row's `prompt`.
        teacher_completions: One per row; with them there is also `student_nll_of_teacher_per_token`, the coverage risk
            of Wen et al., in nats per token of the model.
        teacher_tokenizer: That of `teacher_completions`, if it may be another one. The model then reads their texts in
            its own tokens; those that it has no tokens for are left out, and counted in `unreadable_of_teacher`.
        with_ibleu: As `evaluate_completions`.
        progress: The label of a progress bar on the first process; None shows no bar.
        after_batch: Called after each batch of each pass, equally often on all processes.
    """
    prompts = policy.writer.texts([row["prompt"] for row in rows] if prompts is None else prompts)
    lengths = {"max_prompt_length": max_prompt_length, "batch_size": batch_size}
    answers = answer_prompts(
        policy.model,
        tokenizer,
        prompts,
        strategy="greedy" if seed is None else "sample",
        temperature=policy.temperature,
        max_completion_length=max_completion_length,
        seed=seed or 0,
        **lengths,
    )
    passes = 2 if reward_model is None else 3  # answers, their log-probabilities, rewards
    is_hidden = progress is None or not is_first_process()
    with tqdm(total=passes * len(prompts), desc=progress, unit="read", leave=False, disable=is_hidden) as bar:

        def advance(count: int) -> None:
            bar.update(count)
            after_batch()

        completions = joined(_counted(answers, advance), pad_id=policy.pad_id)
        own_logps_BT = completion_log_probs(policy, tokenizer, prompts, completions, advance=advance, **lengths)
        result = evaluate_completions(
            rows,
            completions,
            tokenizer,
            reward_model,
            own_logps_BT=own_logps_BT,
            forbidden_V=policy.forbidden_V,
            batch_size=batch_size,
            with_ibleu=with_ibleu,
            advance=advance,
        )
    if teacher_completions is not None:
        if teacher_tokenizer is not None and not are_same_tokens(teacher_tokenizer, tokenizer):
            room = _room(policy, tokenizer, prompts, max_prompt_length)
            teacher_completions, readable_B = _in_own_tokens(
                policy, tokenizer, teacher_completions, teacher_tokenizer, max_length=room
            )
            result.metrics["unreadable_of_teacher"] = int((~readable_B).sum())
        logps_BT = completion_log_probs(
            policy, tokenizer, prompts, teacher_completions, max_prompt_length=max_prompt_length, batch_size=batch_size
        )
        mask_BT = teacher_completions.mask_BT
        nll_B, tokens_B = -masked_sum(logps_BT, mask_BT, dim=1), mask_BT.sum(dim=1)
        result.per_input["nll_of_teacher"] = nll_B.tolist()
        result.per_input["teacher_tokens"] = tokens_B.double().tolist()
        if tokens_B.any():
            result.metrics["student_nll_of_teacher_per_token"] = float(nll_B.sum() / tokens_B.sum())
        is_usable_B = usable_rows(logps_BT, mask_BT)
        result.metrics[NOT_FINITE] += count_not_finite(
            {"log-probabilities of the teacher's answers": is_usable_B}, rows
        )
    return result


def evaluate_teacher(
    rows: Sequence[Mapping[str, object]],
    reward_model: RewardModel,
    **settings,
) -> Evaluation:
    """`evaluate_student` for the first teacher, asked through its first template; `settings` go there.

    Where the panel's routing says whose a row is, the first of its owners answers it.
    """
    panel = reward_model.panels[0]
    if panel.routing is not None:
        return _evaluate_owners(rows, reward_model, **settings)
    scorer = panel.scorers[0]
    teacher = scorer.teacher
    return evaluate_student(
        Policy(teacher.model, teacher.processing_class, writer=teacher.writer),
        teacher.processing_class,
        rows,
        reward_model,
        prompts=scorer.prompts([panel.questions(row) for row in rows]),
        max_prompt_length=teacher.max_prompt_length,
        **settings,
    )


def _evaluate_owners(
    rows: Sequence[Mapping[str, object]],
    reward_model: RewardModel,
    *,
    max_completion_length: int,
    batch_size: int = 64,
    seed: int | None = None,
    with_ibleu: bool = False,
    progress: str | None = None,
    after_batch: Callable[[], object] = lambda: None,
) -> Evaluation:
    """`evaluate_completions` of each row's answer by the first scorer that owns it; settings of `evaluate_student`."""
    panel = reward_model.panels[0]
    tokenizer = panel.scorers[0].teacher.processing_class  # all teachers' (see `TeacherPanel`)
    questions_of_rows = [panel.questions(row) for row in rows]
    owner_P = panel.owned(rows).long().argmax(dim=0)
    parts, own_logps, order, policy = [], [], [], None
    for k, scorer in enumerate(panel.scorers):
        indices = (owner_P == k).nonzero()[:, 0].tolist()
        teacher = scorer.teacher
        policy = Policy(teacher.model, tokenizer, writer=teacher.writer)
        prompts = scorer.prompts([questions_of_rows[i] for i in indices])
        lengths = {"max_prompt_length": teacher.max_prompt_length, "batch_size": batch_size}
        if not indices:
            continue
        answers = answer_prompts(
            teacher.model,
            tokenizer,
            prompts,
            strategy="greedy" if seed is None else "sample",
            max_completion_length=max_completion_length,
            seed=seed or 0,
            **lengths,
        )
        part = joined(_counted(answers, lambda count: after_batch()), pad_id=policy.pad_id)
        own_logps.append(completion_log_probs(policy, tokenizer, prompts, part, **lengths))
        parts.append(part)
        order += indices
    completions = joined(parts, pad_id=policy.pad_id)
    place_P = torch.tensor(order, device=completions.ids_BT.device).argsort()
    logps_BT = pad_columns(own_logps, completions.ids_BT.shape[1])
    completions = Completions(completions.ids_BT[place_P], completions.mask_BT[place_P], completions.ended_B[place_P])
    return evaluate_completions(
        rows,
        completions,
        tokenizer,
        reward_model,
        own_logps_BT=logps_BT[place_P],
        forbidden_V=policy.forbidden_V,
        batch_size=batch_size,
        with_ibleu=with_ibleu,
    )


def _room(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_prompt_length: int | None
) -> int | None:
    """The most tokens of a completion that the policy has positions for after any of the prompts; None: no limit."""
    limits = position_limits(policy.model)
    if limits.completion is None or not limits.is_shared:
        return limits.completion
    longest = max(prompt_lengths(tokenizer, prompts))
    return limits.completion - (longest if max_prompt_length is None else min(longest, max_prompt_length))


def _in_own_tokens(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    completions: Completions,
    other: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
) -> tuple[Completions, Tensor]:
    """Completions of the `other` tokenizer in the policy's tokens, and which of them it has tokens for, `[B]`.

    The others are empty. max_length: the most tokens that it has positions for.
    """
    aligner = TokenAligner(
        other, tokenizer, forbidden_V=policy.forbidden_V, eos_ids=policy.eos_ids, max_length=max_length
    )
    aligned = aligner.align(completions.ids_BT, completions.mask_BT, completions.ended_B)
    return Completions(aligned.ids_BU, aligned.mask_BU, aligned.ended_B), aligned.readable_B


def _counted(parts: Iterable[Completions], advance: Callable[[int], object]) -> Iterator[Completions]:
    """The parts; `advance` is called with the number of completions in each when the next one is wanted."""
    for part in parts:
        yield part
        advance(len(part.ids_BT))
