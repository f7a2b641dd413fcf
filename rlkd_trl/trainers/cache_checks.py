"""Whether a teacher cache holds what a run of `KDTrainer` reads."""

from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlkd_trl.errors import InputError
from rlkd_trl.evaluation.directions import base_metric
from rlkd_trl.teachers.cache import CachedPanel, Header
from rlkd_trl.teachers.cache_writer import targets_of
from rlkd_trl.trainers.full_vocabulary_config import KDConfig

_TOKENS_SHOWN = 3


def check_cache_settings(header: Header, args: KDConfig) -> None:
    """Raises `InputError` for settings with which something else is read than what the cache holds."""
    if args.lmbda > 0:
        raise InputError(
            f"lmbda = {args.lmbda}: what the teacher says about the student's own samples cannot be in a cache, which "
            "is of fixed targets. Set lmbda to 0, or give the teacher itself."
        )
    if args.align_tokenizers:
        raise InputError(
            "align_tokenizers: a cache holds distributions over tokens that teacher and student share. Leave it out, "
            "or give the teacher itself."
        )
    if args.sequences != "data":
        raise InputError(
            f"sequences = {args.sequences!r}: a cache cannot write new samples. Set sequences to 'data' (a teacher's "
            "answers, from pseudo_label.py, are data too), or give the teacher itself."
        )
    if args.alpha == 0:
        raise InputError("alpha = 0 reads no teacher, so the cache would not be used: use sft.py, or raise alpha.")
    if header.temperature != args.distillation_temperature:
        raise InputError(
            f"distillation_temperature = {args.distillation_temperature}, and the cache was made at "
            f"{header.temperature}: give that, or make another cache."
        )
    if len(header.weights) > 1 and header.ensemble != args.ensemble:
        raise InputError(
            f"ensemble = {args.ensemble!r}, and the cache holds the mean of {header.ensemble}: give that, or make "
            "another cache."
        )
    if header.max_completion_length != args.max_completion_length:
        raise InputError(
            f"max_completion_length = {args.max_completion_length}, and the cache has targets of up to "
            f"{header.max_completion_length} tokens: give that, or make another cache."
        )
    metric = args.metric_for_best_model and base_metric(args.metric_for_best_model)
    if metric == "reward" or (metric or "").startswith("teacher_nll"):
        raise InputError(
            f"metric_for_best_model = {args.metric_for_best_model!r} needs a teacher that reads the student's "
            "outputs, and a cache cannot: choose another metric."
        )


def check_rows(panel: CachedPanel, rows: Sequence[Mapping[str, object]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `InputError` if a target of the rows is not in the panel's cache; the message names the row."""
    header = panel.cache.header
    for i, row in enumerate(rows):
        for target in targets_of(
            [row], panel.questions, tokenizer, header.eos_ids, max_completion_length=header.max_completion_length
        ):
            if panel.cache.place_of(target.key) is None:
                raise InputError(f"Row {i + 1}: {panel.not_there(row)}")


def check_same_ids(
    header: Header, forbidden_V: Tensor, eos_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises `InputError` if other ids end the student's texts, or it may sample others, than those of the cache.

    forbidden_V: True on ids that the student never samples. eos_ids: those that end its texts.
    """
    if set(eos_ids) != set(header.eos_ids):
        ours, theirs = (tokenizer.convert_ids_to_tokens(sorted(set(ids))) for ids in (eos_ids, header.eos_ids))
        raise InputError(
            f"The student's texts end with {', '.join(ours)}, and those of the cached teacher with "
            f"{', '.join(theirs)}, so that their targets end elsewhere: give both generation configs the same "
            "eos_token_id, and make the cache anew."
        )
    forbidden = set(forbidden_V[: header.vocab_size].nonzero()[:, 0].tolist())
    differing = sorted(forbidden ^ set(header.forbidden))
    if differing:
        shown = ", ".join(repr(tokenizer.convert_ids_to_tokens(index)) for index in differing[:_TOKENS_SHOWN])
        raise InputError(
            f"The student and the cached teacher may not write the same tokens; of {len(differing)} only one of them "
            f"may write: {shown}. See --allowed_special_tokens, and which tokens end a text in their generation "
            "configs; or make the cache anew."
        )
