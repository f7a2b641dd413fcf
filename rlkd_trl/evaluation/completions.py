"""Measures completions, whoever wrote them: text metrics, the reward, and the teacher's likelihood."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlkd_trl.data import listed_references
from rlkd_trl.evaluation.metrics import text_metrics
from rlkd_trl.evaluation.not_finite import NOT_FINITE, count_not_finite
from rlkd_trl.models.answers import decode
from rlkd_trl.models.generation import Completions
from rlkd_trl.ops.finite import usable_rows
from rlkd_trl.ops.rewards import sequence_sum
from rlkd_trl.prompts import source_text
from rlkd_trl.rewards import RewardInputs, RewardModel

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
