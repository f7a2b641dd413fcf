"""Relations among a layer's queries, keys or values: the losses of MiniLM and MiniLMv2, for models of any widths."""

import math

import torch
from torch import Tensor

from rlkd_trl.ops.layers import attention_kl
from rlkd_trl.ops.masking import masked


def relation_scores(vectors_BSD: Tensor, mask_BS: Tensor, *, relation_heads: int) -> Tensor:
    """A_a A_aᵀ / √d_r for each of A_r relation heads, `[B, A_r, S, S]` (Wang et al. 2021, MiniLMv2, eq. 7).

    vectors_BSD: queries, keys or values, concatenated over attention heads; they are split into A_r parts of d_r =
    D / A_r numbers. With values, and as many relation heads as attention heads, the softmax of the scores is MiniLM's
    VR (Wang et al. 2020, eq. 7). Scores of padding are 0.

    Raises:
        ValueError: D is not divisible by the number of relation heads.
    """
    B, S, D = vectors_BSD.shape
    if D % relation_heads:
        raise ValueError(f"{relation_heads} relation heads do not divide the width {D}")
    vectors_BSD = masked(vectors_BSD.to(torch.promote_types(vectors_BSD.dtype, torch.float32)), mask_BS[..., None])
    vectors_BASd = vectors_BSD.view(B, S, relation_heads, -1).transpose(1, 2)
    return vectors_BASd @ vectors_BASd.transpose(-1, -2) / math.sqrt(D // relation_heads)


def relation_kl(student_BSD: Tensor, teacher_BSD: Tensor, mask_BS: Tensor, *, relation_heads: int) -> Tensor:
    """1/A_r Σ_a KL(R^T_{a,t} ‖ R^S_{a,t}), `[B, S]`, R the softmax of `relation_scores` (MiniLMv2, eq. 6; L_VR).

    The loss is 0, with gradient 0, if the relations agree, which is possible for models of different widths.

    Raises:
        ValueError: As `relation_scores`.
    """
    scores = (relation_scores(x, mask_BS, relation_heads=relation_heads) for x in (student_BSD, teacher_BSD))
    return attention_kl(*scores, mask_BS[:, :, None] & mask_BS[:, None, :])
