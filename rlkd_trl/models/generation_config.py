"""Which settings of a checkpoint's generation config are used, and which ones a trained checkpoint gets.

Greedy decoding, sampling and beam search use the same three: the ids that open a completion (`decoder_start_token_id`,
`forced_bos_token_id`), those that end one (`eos_token_id`), and the special tokens that are content
(`models.vocabulary`). All others are ignored. Some would change the distribution that is trained and scored
(repetition_penalty, no_repeat_ngram_size, min_length, forced_eos_token_id, ...), and a policy's samples must come from
its own distribution; the others say how to decode (temperature, num_beams, ...), which flags do here.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlkd_trl.errors import InputError
from rlkd_trl.models.vocabulary import (
    ALLOWED_SPECIAL_TOKENS,
    allowed_special_tokens,
    base_of,
    eos_token_ids,
    forbidden_ids_of,
    padding_id,
)

# Settings that change the model's distribution, with the values besides None that change nothing. Instead of
# `suppress_tokens` and its like there is one rule of what may be sampled, `models.vocabulary.forbidden_ids`.
_NOT_USED = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "guidance_scale", "length_penalty"), (1,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"), ([], {})),
    **dict.fromkeys(("forced_eos_token_id", "exponential_decay_length_penalty"), ()),
}


def completion_start_ids(model: PreTrainedModel) -> list[int]:
    """The tokens that an encoder-decoder model's decoder reads before a completion's first token; none is sampled.

    First the decoder-start token (BOS where there is none, as in transformers' `generate`); then, in BART, mBART,
    M2M100 and NLLB, the forced BOS, which may be a language code.
    """
    start = _id_of(model, "decoder_start_token_id")
    start = _id_of(model, "bos_token_id") if start is None else start
    forced = _id_of(model, "forced_bos_token_id")
    return [token for token in (start, forced) if token is not None]


def _id_of(model: PreTrainedModel, name: str) -> int | None:
    """The token id of this name in the generation config, which classifiers lack, or else in the config."""
    token_id = getattr(getattr(model, "generation_config", None), name, None)
    return getattr(model.config, name, None) if token_id is None else token_id


def plain_generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_completion_length: int
) -> GenerationConfig:
    """The config with which plain `generate` gives the same outputs as greedy decoding here.

    Completions have at most `max_completion_length` tokens, EOS included. Ids that are never sampled are
    `bad_words_ids`, because of all settings that forbid ids only this one lets a forced BOS through.
    """
    forbidden = forbidden_ids_of(model, tokenizer).nonzero()[:, 0].tolist()
    is_encoder_decoder = model.config.is_encoder_decoder
    start_ids = completion_start_ids(model) if is_encoder_decoder else []
    return GenerationConfig(
        max_new_tokens=max_completion_length + max(0, len(start_ids) - 1),
        do_sample=False,
        num_beams=1,
        bos_token_id=_id_of(model, "bos_token_id"),
        eos_token_id=eos_token_ids(model, tokenizer),
        pad_token_id=padding_id(tokenizer),
        decoder_start_token_id=start_ids[0] if start_ids else None,
        forced_bos_token_id=start_ids[1] if len(start_ids) > 1 else None,
        bad_words_ids=[[token] for token in forbidden] or None,
    )


def set_trained_generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_completion_length: int
) -> None:
    """Gives a model, before it is trained, the generation config of its checkpoints: `plain_generation_config`."""
    config = plain_generation_config(model, tokenizer, max_completion_length=max_completion_length)
    setattr(config, ALLOWED_SPECIAL_TOKENS, allowed_special_tokens(model))
    base_of(model).generation_config = config


def check_generation_config(model: PreTrainedModel, file: str | None, name: str) -> None:
    """Raises `InputError` if a checkpoint's generation config is damaged, or has a token that the model does not have.

    An EOS beyond the vocabulary does no harm, as it is never sampled; small models made of a large one's config often
    have one.

    file: its `generation_config.json`, if there is one. transformers goes on without one that it cannot read.
    """
    if file is not None:
        try:
            is_mapping = isinstance(json.loads(Path(file).read_text(encoding="utf-8")), dict)
        except (OSError, ValueError, RecursionError):
            is_mapping = False
        if not is_mapping:
            raise InputError(f"The generation_config.json of {name!r} is damaged, no JSON of settings: copy it again.")
    if not model.can_generate():
        return
    rows = model.config.get_text_config().vocab_size
    for setting in ("eos_token_id", "decoder_start_token_id", "forced_bos_token_id"):
        value, is_read = _id_of(model, setting), setting != "eos_token_id"
        ids = [] if value is None else value if isinstance(value, list | tuple) and not is_read else [value]
        for token_id in ids:
            if not isinstance(token_id, int) or token_id < 0 or (is_read and token_id >= rows):
                raise InputError(
                    f"The checkpoint {name!r} has {setting} = {value!r}: the model's token ids are whole numbers from "
                    f"0 to {rows - 1}. Correct generation_config.json or config.json, or copy them again."
                )
    if model.config.is_encoder_decoder and not completion_start_ids(model):
        raise InputError(
            f"The checkpoint {name!r} names no token that its decoder begins with: set decoder_start_token_id in its "
            "config.json (T5's is its padding token, 0)."
        )


def settings_not_used(config: GenerationConfig) -> dict[str, object]:
    """The settings of a checkpoint's generation config that change its distribution and are ignored here, by name."""
    if hasattr(config, ALLOWED_SPECIAL_TOKENS):  # trained here: its `bad_words_ids` are our own rule
        return {}
    settings = {name: getattr(config, name, None) for name in _NOT_USED}
    return {name: value for name, value in settings.items() if value is not None and value not in _NOT_USED[name]}


@contextmanager
def generating_by(config: GenerationConfig, model: PreTrainedModel) -> Iterator[None]:
    """Within it `model.generate` uses `config` alone; the model's own config would fill in what is None in it."""
    base = base_of(model)
    config_before, base.generation_config = base.generation_config, config
    try:
        yield
    finally:
        base.generation_config = config_before
