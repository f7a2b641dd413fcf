"""One completion for each of many prompts: greedy, sampled, or by beam search."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlkd_trl.errors import InputError
from rlkd_trl.models.backbone import backbone_of
from rlkd_trl.models.generation import Completions, sample_completions
from rlkd_trl.models.generation_config import completion_start_ids, generating_by, plain_generation_config
from rlkd_trl.models.prompts import tokenize_prompts
from rlkd_trl.models.sharding import is_sharded
from rlkd_trl.models.vocabulary import eos_token_ids, forbidden_ids_of, padding_id
from rlkd_trl.ops.masking import completion_mask, pad_columns

STRATEGIES = ("greedy", "sample", "beam")


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    strategy: str = "greedy",
    max_prompt_length: int | None = None,
    max_completion_length: int,
    batch_size: int = 64,
    temperature: float = 1.0,
    num_beams: int = 4,
    all_beams: bool = False,
    seed: int = 0,
) -> Iterator[Completions]:
    """Completions of `batch_size` prompts at a time, in the prompts' order, each as wide as its longest.

    Only ids that a student may sample are generated; `models.generation_config` says what is read of the checkpoint's
    generation config. `temperature` and `seed` are for strategy "sample", `num_beams` for "beam", which is
    transformers' own beam search with its length normalisation. With `all_beams` each batch holds all `num_beams`
    candidates of its first prompt, best first, then those of its second, and so on.

    Raises:
        InputError: Unknown strategy, or `all_beams` with another strategy than "beam".
    """
    check_strategy(strategy)
    if all_beams and strategy != "beam":
        raise InputError(f"Strategy {strategy!r} has no beams to give: all_beams needs strategy 'beam'.")
    backbone = backbone_of(model)
    eos_ids = eos_token_ids(model, tokenizer)
    pad_id = padding_id(tokenizer)
    forbidden_V = forbidden_ids_of(model, tokenizer).to(backbone.device)
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        ids_PS, mask_PS = (
            tensor.to(backbone.device)
            for tensor in tokenize_prompts(
                tokenizer, batch, padding_side=backbone.padding_side, max_length=max_prompt_length
            )
        )
        if strategy == "beam":
            config = plain_generation_config(model, tokenizer, max_completion_length=max_completion_length)
            completions = _beam_search(model, ids_PS, mask_PS, config, num_beams, all_beams)
        else:
            uniforms_BT = torch.rand(len(batch), max_completion_length, generator=generator).to(backbone.device)
            completions = sample_completions(
                backbone,
                ids_PS,
                mask_PS,
                torch.arange(len(batch), device=backbone.device),
                max_completion_length=max_completion_length,
                eos_ids=eos_ids,
                pad_id=pad_id,
                forbidden_V=forbidden_V,
                temperature=temperature,
                uniforms_BT=uniforms_BT if strategy == "sample" else None,
            )
        yield completions


def check_strategy(strategy: str) -> None:
    """Raises `InputError` for a name that is not in `STRATEGIES`."""
    if strategy not in STRATEGIES:
        raise InputError(f"Unknown strategy {strategy!r}; choose one of: {', '.join(STRATEGIES)}.")


def joined(parts: Iterable[Completions], *, pad_id: int) -> Completions:
    """Batches of completions as one, as wide as the widest."""
    batches = list(parts)
    width = max(part.ids_BT.shape[1] for part in batches)
    return Completions(
        pad_columns([part.ids_BT for part in batches], width, value=pad_id),
        pad_columns([part.mask_BT for part in batches], width, value=False),
        torch.cat([part.ended_B for part in batches]),
        None if batches[0].support_BTk is None else _joined_supports(batches, width),
        _joined_columns([part.logps_BT for part in batches], width),
        _joined_columns([part.values_BT1 for part in batches], width + 1),
    )


def _joined_columns(parts: list[Tensor | None], width: int) -> Tensor | None:
    return None if parts[0] is None else pad_columns(parts, width)


def _joined_supports(batches: list[Completions], width: int) -> Tensor:
    """Each batch's supports `[b, t, k]`, padded with zeros to `width` positions."""
    parts = [part.support_BTk for part in batches]
    return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, width - part.shape[1])) for part in parts])


def decode(completions: Completions, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The completions' texts, without the EOS that ends them.

    All other special tokens stay in the text: a model writes only those that are content (see
    `vocabulary.forbidden_ids`).
    """
    rows = zip(completions.ids_BT, completions.mask_BT, completions.ended_B.tolist(), strict=True)
    texts_ids = [ids[mask][:-1] if ended else ids[mask] for ids, mask, ended in rows]
    return tokenizer.batch_decode(texts_ids, skip_special_tokens=False)


@torch.no_grad()
def _beam_search(
    model, ids_PS: Tensor, mask_PS: Tensor, config: GenerationConfig, num_beams: int, all_beams: bool
) -> Completions:
    with generating_by(config, model):
        output_ids = model.generate(
            input_ids=ids_PS,
            attention_mask=mask_PS,
            num_beams=num_beams,
            num_return_sequences=num_beams if all_beams else 1,
            synced_gpus=is_sharded(model),
        )
    start = len(completion_start_ids(model)) if model.config.is_encoder_decoder else ids_PS.shape[1]
    ids_BT = output_ids[:, start:]
    mask_BT, ended_B = completion_mask(ids_BT, config.eos_token_id)
    return Completions(torch.where(mask_BT, ids_BT, config.pad_token_id), mask_BT, ended_B)
