"""A student's samples and their log-probabilities, for measurements outside of a trainer."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlkd_trl.models.answers import joined
from rlkd_trl.models.prompts import tokenize_prompts
from rlkd_trl.ops.masking import pad_columns
from rlkd_trl.rewards import RewardInputs
from rlkd_trl.students import Policy


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
    """`num_generations` completions of every row's prompt, `batch_size` prompts at a time."""
    generator = torch.Generator().manual_seed(seed)
    parts, logps = [], []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        prompt_ids_PS, prompt_mask_PS = (
            tensor.to(policy.backbone.device)
            for tensor in tokenize_prompts(
                tokenizer,
                [row["prompt"] for row in batch],
                padding_side=policy.backbone.padding_side,
                max_length=max_prompt_length,
            )
        )
        index_B = _prompt_index(len(batch), num_generations, prompt_ids_PS.device)
        uniforms_BT = torch.rand(len(index_B), max_completion_length, generator=generator).to(index_B.device)
        prompts = (prompt_ids_PS, prompt_mask_PS, index_B)
        parts.append(policy.sample(*prompts, max_completion_length=max_completion_length, uniforms_BT=uniforms_BT))
        logps.append(policy(*prompts, parts[-1].ids_BT, parts[-1].mask_BT).logps_BT)
    completions = joined(parts, pad_id=policy.pad_id)
    return RewardInputs(
        rows=rows,
        prompt_index_B=_prompt_index(len(rows), num_generations, completions.ids_BT.device),
        completion_ids_BT=completions.ids_BT,
        completion_mask_BT=completions.mask_BT,
        ended_B=completions.ended_B,
        student_logps_BT=pad_columns(logps, completions.ids_BT.shape[1]),
        forbidden_V=policy.forbidden_V,
    )


def _prompt_index(num_prompts: int, num_generations: int, device: torch.device) -> Tensor:
    return torch.arange(num_prompts, device=device).repeat_interleave(num_generations)
