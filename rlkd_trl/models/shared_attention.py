"""Cross-attention over prompts that several completions share, without a copy of keys and values for each.

Cross-attention looks at every source token whatever the query's position. The queries of all completions of a prompt
can therefore stand in one row, as if they were one longer completion, beside that prompt's keys and values.
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
    """Which prompt each of B completions continues, and where its queries stand in `[P, K]` places.

    prompt_index_B: 0 .. P − 1. per_prompt: K, the most completions that a prompt has. place_B: p · K + k for the k-th
    completion of prompt p, or None where that is 0 .. B − 1, so that nothing has to move.
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
        """`[B, H, T, d]` to `[P, H, K · T, d]`, zeros in the places of completions that a prompt lacks."""
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
    """transformers' SDPA; where keys and values are of prompts, with the completions' queries gathered by prompt."""
    if prompt_rows is None or module.is_causal:  # in a decoder, what is not causal is cross-attention
        return sdpa_attention_forward(module, query, key, value, attention_mask, position_bias=position_bias, **kwargs)
    # T5 gives its cross-attention a position bias of zeros, so it may be left out.
    output_PQHd, _ = sdpa_attention_forward(
        module, prompt_rows.gather(query), key, value, attention_mask, **{**kwargs, "is_causal": False}
    )
    return prompt_rows.scatter(output_PQHd), None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


def can_share(decoder: PreTrainedModel) -> bool:
    """Whether the decoder's attention is transformers' SDPA: that may be replaced, a model's own eager one not."""
    return attention_name(decoder) == "sdpa"


def shared_cross_attention(decoder: PreTrainedModel) -> AbstractContextManager[None]:
    """Lets the decoder take `prompt_rows`, with encoder states, mask and cross-attention cache of P prompts."""
    return with_attention(decoder, _NAME)
