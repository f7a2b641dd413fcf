"""Attention over prompts that several completions share, without a copy of keys and values for each.

A completion's query sees every token of its prompt, whatever its own position. So the queries of all completions of a
prompt can be put into one row, as if they were one longer completion, for one copy of the prompt's keys and values. In
cross-attention that is all. In a decoder-only model the softmax runs over the prompt's tokens and over those of the
completion itself, which has keys of its own.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlkd_trl.models.private_apis import attention_name, with_attention

_NAME = "rlkd_shared_prompts"
# The decoder-only model types whose attention may be replaced: it hands on what it is given, does with keys and values
# nothing after they are in the cache, and adds nothing to the scores. Each is tested; all others get copies.
SHARING_MODEL_TYPES = frozenset(
    "apertus arcee codegen cohere ernie4_5 gemma glm glm4 gpt2 gpt_bigcode gpt_neox gptj granite granitemoe helium "
    "hunyuan_v1_dense llama mistral mixtral olmo olmo2 opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe "
    "seed_oss smollm3 starcoder2".split()
)


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

    @classmethod
    def one_each(cls, prompt_ids_PS: Tensor) -> "PromptRows":
        """One completion of each prompt, in the prompts' order."""
        P = len(prompt_ids_PS)
        return cls(torch.arange(P, device=prompt_ids_PS.device), P, 1, None)

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


@dataclass(frozen=True)
class SharedPrompts:
    """The prompts that B completions of a decoder-only model continue.

    cache: the prompts' keys and values, `[P, h, S, d]` in each layer. rows: which prompt each completion continues.
    padding_PS: True where there is no token; None where there is one everywhere.
    """

    cache: Cache
    rows: PromptRows
    padding_PS: Tensor | None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_bias: Tensor | None = None,
    prompt_rows: PromptRows | None = None,
    shared_prompts: SharedPrompts | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention; with `prompt_rows`, cross-attention gathers the queries by prompt.

    With `shared_prompts`, self-attention is also over the prompts, whose keys are not among those given.
    """
    if shared_prompts is not None:
        layer = shared_prompts.cache.layers[module.layer_idx]
        dropout, scaling = kwargs["dropout"], kwargs["scaling"]
        return attend_to_shared_prompts(
            query, key, value, layer.keys, layer.values, shared_prompts, scaling, dropout
        ), None
    if prompt_rows is None or module.is_causal:  # in a decoder, attention that is not causal is cross-attention
        return sdpa_attention_forward(module, query, key, value, attention_mask, position_bias=position_bias, **kwargs)
    # T5 gives its cross-attention a position bias of zeros, so it may be left out.
    output_PQHd, _ = sdpa_attention_forward(
        module, prompt_rows.gather(query), key, value, attention_mask, **{**kwargs, "is_causal": False}
    )
    return prompt_rows.scatter(output_PQHd), None


def attend_to_shared_prompts(
    query_BHTd: Tensor,
    key_BhUd: Tensor,
    value_BhUd: Tensor,
    prompt_key_PhSd: Tensor,
    prompt_value_PhSd: Tensor,
    prompts: SharedPrompts,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention `[B, T, H, d]` of the last T of U own tokens to their prompt's S tokens and, causally, to their own.

    H query heads share h heads of keys and values, as in grouped-query attention. All weights exist at once:
    `[B, H, T, S + U]`.
    """
    rows = prompts.rows
    B, H, T, d = query_BHTd.shape
    h, U = key_BhUd.shape[1:3]
    P, Q = rows.num_prompts, rows.per_prompt * T
    query_BHTd = query_BHTd * scaling
    own_BHTU = (query_BHTd.reshape(B, h, -1, d) @ key_BhUd.mT).view(B, H, T, U)
    if T > 1:
        is_later_TU = torch.ones(T, U, dtype=torch.bool, device=query_BHTd.device).triu(U - T + 1)
        own_BHTU = own_BHTU.masked_fill(is_later_TU, -torch.inf)
    prompt_PHQS = (rows.gather(query_BHTd).reshape(P, h, -1, d) @ prompt_key_PhSd.mT).view(P, H, Q, -1)
    if prompts.padding_PS is not None:
        prompt_PHQS = prompt_PHQS.masked_fill(prompts.padding_PS[:, None, None], -torch.inf)
    weights_PHQX = F.dropout(torch.cat([prompt_PHQS, rows.gather(own_BHTU)], dim=-1).softmax(dim=-1), dropout)
    prompt_PHQS, own_PHQU = weights_PHQX.split([prompt_key_PhSd.shape[2], U], dim=-1)
    of_prompt_PHQd = (prompt_PHQS.reshape(P, h, -1, prompt_PHQS.shape[-1]) @ prompt_value_PhSd).view(P, H, Q, -1)
    own_BTHU = rows.scatter(own_PHQU.transpose(1, 2))
    own_BhXU = own_BTHU.transpose(1, 2).reshape(B, h, -1, U)
    of_own_BHTd = (own_BhXU @ value_BhUd).view(B, H, T, -1)
    return rows.scatter(of_prompt_PHQd.transpose(1, 2)) + of_own_BHTd.transpose(1, 2)


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


def can_share(decoder: PreTrainedModel) -> bool:
    """Whether the decoder uses transformers' SDPA attention, which can be replaced; a model's own eager one cannot."""
    return attention_name(decoder) == "sdpa"


def can_share_self_attention(reader: PreTrainedModel, cache: Cache, tokens_at_once: int) -> bool:
    """Whether a decoder-only model can take `shared_prompts`, and whether that needs less memory than copies.

    For a completion it keeps weights, `[H, T, S + T]`, where copies of keys and values would be `[h, S + T, d]` twice.
    In half precision torch's fused attention to copies is more exact, and these are half as large: nothing is shared.

    cache: with the prompts, as the model filled it; layers with a sliding window or without attention are of other
    classes. tokens_at_once: T, of a completion, read in one call.
    """
    config = reader.config
    if not (
        can_share(reader)
        and config.model_type in SHARING_MODEL_TYPES
        and type(reader).__module__.startswith("transformers.")
        and len(cache.layers) == config.num_hidden_layers
        and all(type(layer) is DynamicLayer for layer in cache.layers)
        and cache.layers[0].keys.dtype == cache.layers[0].values.dtype == torch.float32
        and not torch.is_autocast_enabled(cache.layers[0].keys.device.type)
    ):
        return False
    _, h, _, d = cache.layers[0].keys.shape
    return config.num_attention_heads * tokens_at_once <= 2 * h * d


def with_shared_prompts(decoder: PreTrainedModel) -> AbstractContextManager[None]:
    """Lets a decoder take what prompts share.

    In an encoder-decoder model, `prompt_rows`, with encoder states, mask and cross-attention cache of P prompts; in a
    decoder-only one, `shared_prompts`.
    """
    return with_attention(decoder, _NAME)
