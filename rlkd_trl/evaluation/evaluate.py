"""Measures a model by what it answers to prompts, and by how likely it finds the teacher's answers."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from rlkd_trl.errors import is_first_process
from rlkd_trl.evaluation.completions import Evaluation, evaluate_completions
from rlkd_trl.evaluation.not_finite import NOT_FINITE, count_not_finite
from rlkd_trl.evaluation.samples import completion_log_probs
from rlkd_trl.models.alignment import TokenAligner
from rlkd_trl.models.answers import answer_prompts, joined
from rlkd_trl.models.generation import Completions
from rlkd_trl.models.limits import position_limits
from rlkd_trl.models.prompts import prompt_lengths
from rlkd_trl.models.vocabulary import are_same_tokens
from rlkd_trl.ops.finite import usable_rows
from rlkd_trl.ops.masking import masked_sum, pad_columns
from rlkd_trl.prompts import Message
from rlkd_trl.rewards import RewardModel
from rlkd_trl.students import Policy


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
        _add_coverage(result, policy, tokenizer, rows, prompts, teacher_completions, teacher_tokenizer, **lengths)
    return result


def _add_coverage(
    result: Evaluation,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, object]],
    prompts: Sequence[str],
    teacher_completions: Completions,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_prompt_length: int | None,
    batch_size: int,
) -> None:
    """Adds to a result how likely the policy finds the teacher's completions; see `evaluate_student`."""
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
    result.metrics[NOT_FINITE] += count_not_finite({"log-probabilities of the teacher's answers": is_usable_B}, rows)


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
