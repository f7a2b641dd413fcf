"""How good are a model's outputs: text metrics, what the teacher thinks of them, and the other way round."""

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
from rlkd_trl.errors import TrainingError
from rlkd_trl.evaluation.metrics import text_metrics
from rlkd_trl.evaluation.samples import completion_log_probs
from rlkd_trl.models.answers import answer_prompts, decode, joined
from rlkd_trl.models.generation import Completions
from rlkd_trl.models.sharding import is_first_process
from rlkd_trl.ops.finite import usable_rows
from rlkd_trl.ops.masking import masked_sum
from rlkd_trl.ops.rewards import sequence_sum
from rlkd_trl.rewards import RewardInputs, RewardModel
from rlkd_trl.students import Policy

logger = logging.get_logger(__name__)

NOT_FINITE = "samples_not_finite"
_PROMPT_WIDTH = 200


@dataclass(frozen=True)
class Evaluation:
    """metrics: name to value. outputs: one text per row. completions: the same as tokens, in row order.

    per_input: what the metrics are means of, one value per row: `tokens`, `ended` (0 or 1), and with a reward model
    `reward` and `teacher_nll` (of the whole sequence, in nats).
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
    """Text metrics against `references`, and the reward model's view of one completion per row.

    `with_ibleu` compares with each row's `source` (`prompt` where there is none) too. Adds `reward` (mean sequence
    reward), `teacher_nll_per_token` and `teacher_nll_per_sequence` in nats, `tokens` (mean, EOS included) and
    `eos_rate`. The teacher's NLL of the student's outputs is the likelihood risk of Wen et al. 2023, "f-Divergence
    Minimization for Sequence-Level Knowledge Distillation". `advance` is called with the number of rows of each batch
    that is scored.

    `samples_not_finite` counts the completions of which the reward, the teacher's NLL or `own_logps_BT` is NaN,
    infinite or too large for float32's statistics. With any, a warning names a prompt, and `reward` and
    `teacher_nll_*` are NaN: a mean over the others would look better than the model is. See `check_finite`.
    """
    outputs = decode(completions, tokenizer)
    references = [listed_references(row.get("references")) for row in rows]
    sources = [str(row.get("source", row["prompt"])) for row in rows] if with_ibleu else None
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
        scored, is_usable_of_scores = _reward_per_input(
            rows, completions, outputs, reward_model, own_logps_BT, forbidden_V, batch_size, advance
        )
        per_input |= scored
        is_usable |= is_usable_of_scores
        metrics["reward"] = sum(scored["reward"]) / len(rows)
        if reward_model.panels:
            nll = sum(scored["teacher_nll"])
            metrics["teacher_nll_per_token"] = nll / sum(per_input["tokens"])
            metrics["teacher_nll_per_sequence"] = nll / len(rows)
    metrics[NOT_FINITE] = _count_not_finite(is_usable, rows)
    if metrics[NOT_FINITE]:
        metrics |= {name: math.nan for name in metrics if name == "reward" or name.startswith("teacher_nll")}
    return Evaluation(metrics, outputs, completions, per_input)


def _count_not_finite(is_usable: Mapping[str, Tensor], rows: Sequence[Mapping[str, object]]) -> int:
    """How many rows have a number that is not finite; is_usable: `[B]` of each kind of number. Warns of the first."""
    bad = sorted({b for usable_B in is_usable.values() for b in (~usable_B).nonzero()[:, 0].tolist()})
    if bad and is_first_process():
        what = " and ".join(name for name, usable_B in is_usable.items() if not usable_B.all())
        prompt = textwrap.shorten(str(rows[bad[0]]["prompt"]), _PROMPT_WIDTH)
        logger.warning(f"{what} not finite for {len(bad)} of {len(rows)} prompts, the first of them {prompt!r}")
    return len(bad)


def check_finite(results: Mapping[str, Mapping[str, float]], consequence: str = "") -> None:
    """Raises `TrainingError` if evaluations met numbers that are not finite; results: metrics by name of the model.

    `consequence` is a sentence about what has become of the run.
    """
    bad = {name: metrics[NOT_FINITE] for name, metrics in results.items() if metrics.get(NOT_FINITE)}
    if bad:
        listed = ", ".join(f"{count:.0f} samples of {name!r}" for name, count in bad.items())
        raise TrainingError(
            f"The evaluation cannot be relied on: numbers that are not finite in {listed}; the warnings above name "
            f"the first prompts. {consequence}".rstrip()
        )


def _reward_per_input(
    rows, completions, outputs, reward_model, own_logps_BT, forbidden_V, batch_size, advance
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """`reward` and, with a teacher, `teacher_nll`: one value per row, over the whole completion.

    And by name, `[B]`, whether all numbers behind them are finite.
    """
    reward, nll, usable = [], [], {"the reward": [], "the teacher's log-probabilities": []}
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
        )
        result = reward_model.rewards(inputs, reward_model.score(inputs), allow_not_finite=True)
        mask_BT = inputs.completion_mask_BT
        reward += sequence_sum(result.rewards_BT, mask_BT).tolist()
        usable["the reward"].append(usable_rows(result.rewards_BT, mask_BT))
        if result.scores is not None:
            nll_BT = result.teacher_nll_BT(mask_BT)
            nll += sequence_sum(nll_BT, mask_BT).tolist()
            usable["the teacher's log-probabilities"].append(usable_rows(nll_BT, mask_BT))
        advance(len(inputs.rows))
    values = {"reward": reward, "teacher_nll": nll} if reward_model.panels else {"reward": reward}
    return values, {name: torch.cat(parts) for name, parts in usable.items() if parts}


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
    teacher_completions: Completions | None = None,
    with_ibleu: bool = False,
    progress: str | None = None,
) -> Evaluation:
    """`evaluate_completions` of the student's own greedy (or, with `seed`, sampled) outputs.

    `progress` stands before a bar on the first process; None shows none. With `teacher_completions` (one per row),
    also `student_nll_of_teacher_per_token`: the coverage risk of Wen et al.
    """
    prompts = [row["prompt"] for row in rows]
    result = _evaluate_answers(
        policy,
        tokenizer,
        prompts,
        rows,
        reward_model,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
        batch_size=batch_size,
        seed=seed,
        with_ibleu=with_ibleu,
        progress=progress,
    )
    if teacher_completions is not None:
        logps_BT = completion_log_probs(
            policy, tokenizer, prompts, teacher_completions, max_prompt_length=max_prompt_length, batch_size=batch_size
        )
        nll = -masked_sum(logps_BT, teacher_completions.mask_BT) / teacher_completions.mask_BT.sum()
        result.metrics["student_nll_of_teacher_per_token"] = float(nll)
        of_teachers = usable_rows(logps_BT, teacher_completions.mask_BT)
        result.metrics[NOT_FINITE] += _count_not_finite(
            {"log-probabilities of the teacher's answers": of_teachers}, rows
        )
    return result


def evaluate_teacher(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, object]],
    reward_model: RewardModel,
    *,
    max_completion_length: int,
    batch_size: int = 64,
    seed: int | None = None,
    with_ibleu: bool = False,
    progress: str | None = None,
) -> Evaluation:
    """The first teacher's greedy (or, with `seed`, sampled) answers, asked through its first template.

    `progress` stands before a bar on the first process; None shows none.
    """
    panel = reward_model.panels[0]
    teacher = panel.scorers[0].teacher
    return _evaluate_answers(
        Policy(teacher.model, tokenizer),
        tokenizer,
        [panel.questions(row)[0] for row in rows],
        rows,
        reward_model,
        max_prompt_length=teacher.max_prompt_length,
        max_completion_length=max_completion_length,
        batch_size=batch_size,
        seed=seed,
        with_ibleu=with_ibleu,
        progress=progress,
    )


def _evaluate_answers(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    rows: Sequence[Mapping[str, object]],
    reward_model: RewardModel | None,
    *,
    max_prompt_length: int | None,
    max_completion_length: int,
    batch_size: int,
    seed: int | None,
    with_ibleu: bool,
    progress: str | None,
) -> Evaluation:
    """`evaluate_completions` of a model's greedy or sampled answers to `prompts`, its own way to ask about `rows`."""
    lengths = {"max_prompt_length": max_prompt_length, "batch_size": batch_size}
    parts = answer_prompts(
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
        completions = joined(_counted(parts, bar.update), pad_id=policy.pad_id)
        own_logps_BT = completion_log_probs(policy, tokenizer, prompts, completions, advance=bar.update, **lengths)
        return evaluate_completions(
            rows,
            completions,
            tokenizer,
            reward_model,
            own_logps_BT=own_logps_BT,
            forbidden_V=policy.forbidden_V,
            batch_size=batch_size,
            with_ibleu=with_ibleu,
            advance=bar.update,
        )


def _counted(parts: Iterable[Completions], advance: Callable[[int], object]) -> Iterator[Completions]:
    for part in parts:
        yield part
        advance(len(part.ids_BT))
