"""What a report shows of a completion's tokens: rewards, and what they were made of."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlkd_trl.models.generation import Completions
from rlkd_trl.ops.rewards import centre
from rlkd_trl.rewards import RewardModel, RewardResult, TeacherForcingReward
from rlkd_trl.teachers.scores import TeacherScores, weighted_mean

_DIGITS = 6  # significant ones, of each number that is kept


def completion_records(
    prompts: Sequence[str],
    completions: Completions,
    tokenizer: PreTrainedTokenizerBase,
    values: Mapping[str, Tensor],
    **common: Any,
) -> list[dict[str, Any]]:
    """One record of each completion, as JSON has it.

    `{"prompt", "text", "tokens", "total", "ended", ...}`: tokens are pieces of the text; `total` is the sum of
    rewards, if there are any.

    Args:
        prompts: What each of the completions answers; more completions than prompts are left out.
        values: Numbers of each token by name, `[B, T]` or wider; see `reward_values`.
        common: What all of the records have besides.
    """
    records = []
    for b, prompt in enumerate(prompts):
        ids = completions.ids_BT[b][completions.mask_BT[b]].tolist()
        of_token = {name: _rounded(value[b, : len(ids)]) for name, value in values.items()}
        tokens = token_texts(tokenizer, ids)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        ended = bool(completions.ended_B[b])
        record = {**common, "prompt": prompt, "text": text, "tokens": tokens, "ended": ended, **of_token}
        if "reward" in of_token:
            record["total"] = float(f"{sum(values['reward'][b, : len(ids)].tolist()):.{_DIGITS}g}")
        records.append(record)
    return records


def reward_values(
    reward_model: RewardModel, scores: Mapping[int, list[TeacherScores]], result: RewardResult, mask_BT: Tensor
) -> dict[str, Tensor]:
    """Of each token: `reward`; and with a teacher `q`, `V`, and `teacher_logp` in nats, each a mean over scorers.

    q_t is the centred logit of the token and V_t the value of the state in which it was written (see
    `rlkd_trl.ops.rewards`): that of the first teacher-forcing reward, the largest logit where there is none. Of a
    teacher that tells log p only, log p stands for the centred logit.
    """
    values = {"reward": result.rewards_BT}
    if result.scores is None:
        return values
    forcing = next((term for term in reward_model.teacher_terms if isinstance(term, TeacherForcingReward)), None)
    of_scorers = result.scores if forcing is None else scores[id(forcing.panel)]
    q_BT = weighted_mean(
        (
            of_scorer.on_students_tokens(centre(of_scorer.chosen, of_scorer.centre_BT1[:, :-1]))
            for of_scorer in of_scorers
        ),
        of_scorers,
    )
    if forcing is None:
        values_BT1 = (
            of_scorer.at_students_states(centre(of_scorer.max, of_scorer.centre_BT1)) for of_scorer in of_scorers
        )
        V_BT1 = weighted_mean(values_BT1, of_scorers)
    else:
        V_BT1 = forcing.mean_potentials(of_scorers)
    return {**values, "q": q_BT, "V": V_BT1, "teacher_logp": -result.teacher_nll_BT(mask_BT)}


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The piece of text that each token adds, special tokens included; together they are the whole text.

    A character of several tokens stands with the last of them.
    """
    pieces, before = [], ""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and count < len(ids):  # a part of a character
            pieces.append("")
            continue
        pieces.append(text[_common_length(before, text) :])
        before = text
    return pieces


def _common_length(first: str, second: str) -> int:
    """The number of characters with which both texts begin."""
    differences = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differences, min(len(first), len(second)))


def _rounded(values_T: Tensor) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values_T.tolist()]
