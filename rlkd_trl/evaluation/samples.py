"""A student's samples and their log-probabilities, for measurements outside of a trainer."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlkd_trl.models.answers import joined
from rlkd_trl.models.generation import Completions
from rlkd_trl.models.prompts import tokenize_prompts
from rlkd_trl.rewards import RewardInputs
from rlkd_trl.students import Policy, log_probs_in_batches


@torch.no_grad()
def completion_log_probs(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Completions,
    *,
    num_generations: int = 1,
    max_prompt_length: int | None,
    batch_size: int = 64,
    advance: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """log π(y_t | s_t) of completions, `[B, T]`; 0 behind the mask.

    `completions` are `num_generations` for each prompt, those of a prompt next to each other. `batch_size` prompts are
    read at a time, and `advance` is called with the number of prompts of each batch that is done.
    """

    def batches() -> Iterator[dict[str, Tensor]]:
        for first in range(0, len(prompts), batch_size):
            ids_PS, mask_PS = _tokenized(policy, tokenizer, prompts[first : first + batch_size], max_prompt_length)
            index_B = _prompt_index(len(ids_PS), num_generations, policy.backbone.device)
            rows = slice(first * num_generations, first * num_generations + len(index_B))
            yield {
                "prompt_ids_PS": ids_PS,
                "prompt_mask_PS": mask_PS,
                "prompt_index_B": index_B,
                "completion_ids_BT": completions.ids_BT[rows],
                "completion_mask_BT": completions.mask_BT[rows],
            }
            advance(len(ids_PS))

    return log_probs_in_batches(policy, batches(), completions.ids_BT.shape[1])


@torch.no_grad()
def sampled_inputs(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    *,
    num_generations: int,
    max_prompt_length: int,
    max_completion_length: int,
    batch_size: int,
    seed: int,
) -> RewardInputs:
    """`num_generations` samples for every row's prompt, as inputs for rewards; `batch_size` prompts at a time."""
    generator = torch.Generator().manual_seed(seed)
    prompts, device = policy.writer.texts(row["prompt"] for row in rows), policy.backbone.device
    parts = []
    for first in range(0, len(prompts), batch_size):
        prompt_PS = _tokenized(policy, tokenizer, prompts[first : first + batch_size], max_prompt_length)
        index_B = _prompt_index(len(prompt_PS[0]), num_generations, device)
        uniforms_BT = torch.rand(len(index_B), max_completion_length, generator=generator).to(device)
        lengths = {"max_completion_length": max_completion_length, "uniforms_BT": uniforms_BT}
        parts.append(policy.sample(*prompt_PS, index_B, **lengths))
    completions = joined(parts, pad_id=policy.pad_id)
    logps_BT = completion_log_probs(
        policy,
        tokenizer,
        prompts,
        completions,
        num_generations=num_generations,
        max_prompt_length=max_prompt_length,
        batch_size=batch_size,
    )
    return RewardInputs(
        rows=rows,
        prompt_index_B=_prompt_index(len(rows), num_generations, device),
        completion_ids_BT=completions.ids_BT,
        completion_mask_BT=completions.mask_BT,
        ended_B=completions.ended_B,
        student_logps_BT=logps_BT,
        forbidden_V=policy.forbidden_V,
    )


def _tokenized(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_length: int | None
) -> tuple[Tensor, Tensor]:
    """Ids and mask, `[P, S]`, on the policy's device."""
    side, device = policy.backbone.padding_side, policy.backbone.device
    ids_PS, mask_PS = tokenize_prompts(tokenizer, prompts, padding_side=side, max_length=max_length)
    return ids_PS.to(device), mask_PS.to(device)


def _prompt_index(num_prompts: int, num_generations: int, device: torch.device) -> Tensor:
    return torch.arange(num_prompts, device=device).repeat_interleave(num_generations)
