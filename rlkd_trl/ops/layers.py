"""Distances of a student's layers from its teacher's: the losses of TinyBERT, PKD, DistilBERT and MiniLM.

Each function takes the student's tensor first and returns a number per token, `[B, S]`, or for a text's first token,
`[B]`. It is 0 where the mask is False: sums over batches can then be divided by one count, however the batches were
divided. `mask_BS` is True on real tokens; padding is not read. Every loss is 0, with gradient 0, if student and
teacher agree. The caller detaches the teacher's tensors. Computed in float32 or better.
"""

import torch
from torch import Tensor

from rlkd_trl.ops.masking import masked


def mean_squared_error(student_BSD: Tensor, teacher_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """‖h^S − h^T‖² / D, `[B, S]`: L_hidn of states, L_embd of embeddings (Jiao et al. 2020, TinyBERT, eq. 8, 9).

    If the widths differ, the student's tensor is to be multiplied by a learned matrix (W_h, W_e in the paper) before.
    """
    difference_BSD = masked(_float(student_BSD) - _float(teacher_BSD), mask_BS[..., None])
    return difference_BSD.square().mean(dim=-1)


def cosine_distance(student_BSD: Tensor, teacher_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """1 − cos(h^S, h^T), `[B, S]`, of last hidden states: L_cos (Sanh et al. 2019, DistilBERT, section 3)."""
    student_BSD, teacher_BSD = (masked(_float(x), mask_BS[..., None]) for x in (student_BSD, teacher_BSD))
    return masked(1 - torch.nn.functional.cosine_similarity(student_BSD, teacher_BSD, dim=-1), mask_BS)


def normalised_distance(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """‖h^S / ‖h^S‖ − h^T / ‖h^T‖‖², `[B]`, of a layer's states at [CLS]: L_PT (Sun et al. 2019, PKD, eq. 7)."""
    student_BD, teacher_BD = (torch.nn.functional.normalize(_float(x), dim=-1) for x in (student_BD, teacher_BD))
    return (student_BD - teacher_BD).square().sum(dim=-1)


def attention_score_mse(student_BHSS: Tensor, teacher_BHSS: Tensor, mask_BSS: Tensor) -> Tensor:
    """1/h Σ_i MSE(A_i^S, A_i^T) of scores A = Q Kᵀ / √d before softmax: L_attn (Jiao et al. 2020, TinyBERT, eq. 7).

    `[B, S]`: for each query the mean over heads and over the keys that it may attend to, where `mask_BSS` is True; 0
    if there are none. If all texts have the same length, the mean over tokens is the paper's loss.
    """
    difference_BHSS = masked(_float(student_BHSS) - _float(teacher_BHSS), mask_BSS[:, None])
    keys_BS = mask_BSS.sum(dim=-1).clamp(min=1)
    return difference_BHSS.square().mean(dim=1).sum(dim=-1) / keys_BS


def attention_kl(student_BHSS: Tensor, teacher_BHSS: Tensor, mask_BSS: Tensor) -> Tensor:
    """1/A_h Σ_a KL(A^T_{a,t} ‖ A^S_{a,t}), `[B, S]`, of attention distributions: L_AT (Wang et al. 2020, eq. 6).

    The arguments are the scores before softmax, as for `attention_score_mse`, so that logarithms of small
    probabilities are exact.
    """
    mask_BHSS = mask_BSS[:, None]
    student_BHSS, teacher_BHSS = (
        _float(x).masked_fill(~mask_BHSS, torch.finfo(torch.float32).min).log_softmax(dim=-1)
        for x in (student_BHSS, teacher_BHSS)
    )
    kl_BHSS = teacher_BHSS.exp() * (teacher_BHSS - student_BHSS)
    return masked(kl_BHSS, mask_BHSS).sum(dim=-1).mean(dim=1)


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
