"""How far a student's layers are from its teacher's, per token: the losses of TinyBERT, PKD, DistilBERT and MiniLM.

Each takes the student's tensor first and returns one number per token, `[B, S]` (of a text's first token, `[B]`), 0
behind the mask, so that sums over batches that are cut in any way can be divided by one count. `mask_BS` is True on
real tokens. Padding never enters the arithmetic. All of them are 0, with gradient 0, where student and teacher agree;
the teacher's tensors are constants for the caller to detach. At least float32.
"""

import torch
from torch import Tensor

from rlkd_trl.ops.masking import masked


def mean_squared_error(student_BSD: Tensor, teacher_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """‖h^S − h^T‖² / D, `[B, S]`: L_hidn of states, L_embd of embeddings (Jiao et al. 2020, TinyBERT, eq. 8, 9).

    Where the widths differ, the student's tensor comes multiplied by a learned W (W_h, W_e there).
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

    `[B, S]`: for each query the mean over heads and over the keys that it may attend to, which are True in `mask_BSS`;
    0 where there are none. For texts of one length its mean over tokens is the paper's.
    """
    difference_BHSS = masked(_float(student_BHSS) - _float(teacher_BHSS), mask_BSS[:, None])
    keys_BS = mask_BSS.sum(dim=-1).clamp(min=1)
    return difference_BHSS.square().mean(dim=1).sum(dim=-1) / keys_BS


def attention_kl(student_BHSS: Tensor, teacher_BHSS: Tensor, mask_BSS: Tensor) -> Tensor:
    """1/A_h Σ_a KL(A^T_{a,t} ‖ A^S_{a,t}), `[B, S]`, of attention distributions: L_AT (Wang et al. 2020, eq. 6).

    Of the scores that softmax makes them of, as `attention_score_mse` takes them: logarithms of small probabilities
    stay exact.
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
