"""Cross-attention over prompts that several completions share, without a copy of keys and values for each.

A query of cross-attention sees every source token, whatever its own position. So the queries of all completions of a
prompt can be put into one row, as if they were one longer completion, for one copy of the prompt's keys and values.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlkd_trl.models.private_apis import attention_name, with_attention

_NAME = "rlkd_shared_prompts"


@dataclass(frozen=True)
class PromptRows:
    """Which prompt each of B completions continues, and where its queries go in a grid of `[P, K]` places.

    prompt_index_B: the prompt, 0 to P − 1. per_prompt: K, the largest number of completions of one prompt. place_B:
    p · K + k for the k-th completion of prompt p; None where that is 0 .. B − 1, and nothing has to be moved.
    """

    prompt_index_B: Tensor
    num_prompts: int
    per_prompt: int
    place_B: Tensor | None

    @classmethod
    def of(cls, prompt_index_B: Tensor, num_prompts: int) -> "PromptRows":
        B = len(prompt_index_B)
        counts_P = torch.bincount(prompt_index_B, minlength=num_prompts)
        per_prompt = int(counts_P.max()) if B else 0
        order_B = prompt_index_B.argsort(stable=True)
        first_P = counts_P.cumsum(dim=0) - counts_P
        number_B = torch.empty_like(order_B)
        number_B[order_B] = torch.arange(B, device=order_B.device) - first_P[prompt_index_B[order_B]]
        place_B = prompt_index_B * per_prompt + number_B
        in_place = num_prompts * per_prompt == B and bool((order_B == torch.arange(B, device=order_B.device)).all())
        return cls(prompt_index_B, num_prompts, per_prompt, None if in_place else place_B)

    def gather(self, query_BHTd: Tensor) -> Tensor:
        """`[B, H, T, d]` to `[P, H, K · T, d]`; zeros where a prompt has fewer than K completions."""
        _, H, T, d = query_BHTd.shape
        P, K = self.num_prompts, self.per_prompt
        if self.place_B is not None:
            query_BHTd = query_BHTd.new_zeros(P * K, H, T, d).index_copy(0, self.place_B, query_BHTd)
        return query_BHTd.view(P, K, H, T, d).transpose(1, 2).reshape(P, H, K * T, d)

    def scatter(self, output_PQHd: Tensor) -> Tensor:
        """`[P, K · T, H, d]` back to `[B, T, H, d]`."""
        P, Q, H, d = output_PQHd.shape
        output_BTHd = output_PQHd.reshape(P * self.per_prompt, Q // self.per_prompt, H, d)
        return output_BTHd if self.place_B is None else output_BTHd[self.place_B]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_bias: Tensor | None = None,
    prompt_rows: PromptRows | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention; with `prompt_rows`, cross-attention gathers the queries by prompt."""
    if prompt_rows is None or module.is_causal:  # in a decoder, attention that is not causal is cross-attention
        return sdpa_attention_forward(module, query, key, value, attention_mask, position_bias=position_bias, **kwargs)
    # T5 gives its cross-attention a position bias of zeros, so it may be left out.
    output_PQHd, _ = sdpa_attention_forward(
        module, prompt_rows.gather(query), key, value, attention_mask, **{**kwargs, "is_causal": False}
    )
    return prompt_rows.scatter(output_PQHd), None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


def can_share(decoder: PreTrainedModel) -> bool:
    """Whether the decoder uses transformers' SDPA attention, which can be replaced; a model's own eager one cannot."""
    return attention_name(decoder) == "sdpa"


def shared_cross_attention(decoder: PreTrainedModel) -> AbstractContextManager[None]:
    """Lets the decoder take `prompt_rows`, with encoder states, mask and cross-attention cache of P prompts."""
    return with_attention(decoder, _NAME)
