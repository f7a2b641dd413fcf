"""Sequence-level rewards: TRL-style functions whose scores land on a completion's last token.

Each has TRL's signature `(prompts, completions, completion_ids, **columns) -> list[float]`, so all but `missing_eos`
also work as a `reward_funcs` entry of TRL's trainers, and any function written for TRL works here.
"""

from rlkd_trl.data import listed_references
from rlkd_trl.errors import InputError
from rlkd_trl.evaluation.metrics import bleu, rouge
from rlkd_trl.prompts import Message, is_conversation


def length(prompts, completions, completion_ids, **columns) -> list[float]:
    """Number of tokens, EOS included; with a negative weight it is a length penalty."""
    return [float(len(ids)) for ids in completion_ids]


def missing_eos(prompts, completions, completion_ids, *, ended=None, **columns) -> list[float]:
    """1 where the completion has no EOS within the length cap. Weight it negatively.

    Raises:
        InputError: `ended` is missing. TRL's trainers do not tell a reward function which completions ended.
    """
    if ended is None:
        raise InputError(
            "The reward 'missing_eos' needs `ended`, which TRL's trainers do not pass: there, set "
            "mask_truncated_completions=True instead."
        )
    return [0.0 if has_eos else 1.0 for has_eos in ended]


def repetition(prompts, completions, completion_ids, *, n: int = 3, **columns) -> list[float]:
    """Share of token n-grams that repeat an earlier one, 0 to 1. Weight it negatively."""
    shares = []
    for ids in completion_ids:
        grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        shares.append(1.0 - len(set(grams)) / len(grams) if grams else 0.0)
    return shares


def reference_bleu(prompts, completions, completion_ids, *, references=None, **columns) -> list[float]:
    """BLEU of each completion against its references, 0 to 100. Uses human labels, which plain RLKD does not."""
    references = _required_references("reference_bleu", references)
    texts = _texts_of(completions)
    return [bleu([text], [refs]) for text, refs in zip(texts, references, strict=True)]


def reference_rouge(prompts, completions, completion_ids, *, references=None, **columns) -> list[float]:
    """ROUGE-L F1 of each completion against its references, 0 to 100. Uses human labels, as above."""
    references = _required_references("reference_rouge", references)
    texts = _texts_of(completions)
    return [rouge([text], [refs])["rougeL"] for text, refs in zip(texts, references, strict=True)]


def _texts_of(completions: list[str] | list[list[Message]]) -> list[str]:
    """Completions as texts, also those that are a message of the assistant."""
    return [completion[-1]["content"] if is_conversation(completion) else completion for completion in completions]


def _required_references(name: str, references) -> list[list[str]]:
    if not references or not all(references):
        raise InputError(f"The reward {name!r} compares with references: name their column with --target_column.")
    return [listed_references(of_row) for of_row in references]
