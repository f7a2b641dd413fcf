r"""What a teacher rewards: each token of a completion with its reward, and what the reward is made of.

    python -m rlkd_trl.score --teacher runs/teacher --template "Write a sentence about: {{ source }}" \
        --prompt "name = Loch Fyne | food = fish" --completion "Loch Fyne serves fish." "Loch Fyne is a place."

q is the teacher's centred logit of the token, V the value of the state in which it was written, log p its
log-probability in nats. In a terminal each text is also shown with its tokens coloured by their rewards, unless
NO_COLOR is set.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlkd_trl.commands.arguments import CodeArguments, PromptArguments, RewardArguments, TeacherArguments
from rlkd_trl.commands.checks import checked_rewards, require
from rlkd_trl.commands.data import load_templates
from rlkd_trl.commands.loading import load_panel, load_reward_model
from rlkd_trl.commands.settings import parse_settings
from rlkd_trl.errors import InputError

if TYPE_CHECKING:
    from rlkd_trl.rewards import RewardModel


@dataclass
class ScoreArguments:
    """Texts"""

    prompt: str | None = field(default=None, metadata={"help": "The source text that the completions answer."})
    completion: list[str] | None = field(default=None, metadata={"help": "One or several texts to be scored."})
    cut_off: bool = field(
        default=False, metadata={"help": "The texts have no EOS: they count as cut off at a length cap."}
    )


@dataclass
class ScoreSettings:
    """Settings of `score`."""

    prompts: PromptArguments
    teacher: TeacherArguments
    code: CodeArguments
    reward: RewardArguments
    score: ScoreArguments


def main() -> None:
    """Prints the tables. Raises `InputError`."""
    settings = parse_settings(ScoreSettings, description=__doc__)
    texts = settings.score
    require(**{"--teacher": settings.teacher.teacher, "--prompt": texts.prompt, "--completion": texts.completion})
    templates = load_templates(settings.prompts)
    rewards = checked_rewards(settings.reward, None)
    reward_model = load_reward_model(
        rewards, settings.reward, load_panel(settings.teacher, templates), gamma=1.0, weights=None
    )
    if any(term.reads_student_log_probs for term in reward_model.teacher_terms):
        raise InputError(f"--reward {' '.join(settings.reward.reward)} compares with a student: there is none here.")

    from rlkd_trl.evaluation.terminal import coloured, shows_colours, token_table

    records = scored(reward_model, texts.prompt, texts.completion, cut_off=texts.cut_off)
    rewards = [value for record in records for value in record["reward"]]
    low, high = min(rewards, default=0.0), max(rewards, default=0.0)
    for record in records:
        print()
        if shows_colours(sys.stdout):
            print(coloured(record["tokens"], record["reward"], low=low, high=high) + "\n")
        print(token_table(record))


def scored(reward_model: "RewardModel", prompt: str, texts: Sequence[str], *, cut_off: bool) -> list[dict[str, Any]]:
    """Records of the texts, as answers to the prompt, with their tokens' rewards (see `token_details`).

    The tokens are those of the first teacher. cut_off: without EOS at the end.

    Raises:
        InputError: A text has no tokens.
    """
    import torch

    from rlkd_trl.evaluation.token_details import completion_records, reward_values
    from rlkd_trl.models.generation import Completions
    from rlkd_trl.models.prompts import target_token_ids
    from rlkd_trl.rewards import RewardInputs

    teacher = reward_model.panels[0].scorers[0].teacher
    tokenizer, device = teacher.processing_class, teacher.backbone.device
    records = []
    for text in texts:
        ids = target_token_ids(tokenizer, text, max_length=sys.maxsize)
        ids = ids[:-1] if cut_off else ids
        if not ids:
            raise InputError(f"--completion {text!r} has no tokens: give a text, or leave out --cut_off.")
        ids_BT = torch.tensor([ids], device=device)
        completion = Completions(
            ids_BT, torch.ones_like(ids_BT, dtype=torch.bool), torch.tensor([not cut_off], device=device)
        )
        inputs = RewardInputs(
            rows=[{"prompt": prompt}],
            prompt_index_B=torch.zeros(1, dtype=torch.long, device=device),
            completion_ids_BT=completion.ids_BT,
            completion_mask_BT=completion.mask_BT,
            ended_B=completion.ended_B,
            completions=[text],
            tokenizer=tokenizer,
        )
        scores = reward_model.score(inputs)
        values = reward_values(reward_model, scores, reward_model.rewards(inputs, scores), completion.mask_BT)
        records += completion_records([prompt], completion, tokenizer, values)
    return records
