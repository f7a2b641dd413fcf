"""Losses of class logits and of regression for each row: soft targets, hard labels, squared errors."""

import torch
from torch import Tensor

from rlkd_trl.ops.divergences import forward_kl, log_probs
from rlkd_trl.ops.masking import masked

IGNORED = -100  # stands for a missing label, as in torch and transformers


def logits_kl(student_NC: Tensor, teacher_NC: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T² KL(softmax(z^T / T) ‖ softmax(z^S / T)), `[N]` (Hinton et al. 2015, eq. 1 and section 2).

    The soft cross-entropy of TinyBERT (Jiao et al. 2020, eq. 10), PKD's L_DS and DistilBERT's L_ce have the same
    gradient: they add the teacher's entropy, a constant, so that this is 0 where student and teacher agree. Without
    T² (as in TinyBERT and DistilBERT at T = 1) soft gradients would shrink as 1 / T².
    """
    logps = (log_probs(logits_NC, temperature=temperature) for logits_NC in (teacher_NC, student_NC))
    return temperature**2 * forward_kl(*logps)


def hard_cross_entropy(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """−log softmax(z)_y, `[N]`; 0 where the label is `IGNORED`."""
    logits_NC = masked(logits_NC, (labels_N != IGNORED)[:, None])
    logits_NC = logits_NC.to(torch.promote_types(logits_NC.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits_NC, labels_N, ignore_index=IGNORED, reduction="none")


def squared_error(student_N: Tensor, target_N: Tensor) -> Tensor:
    """(z − y)², `[N]`: regression's loss, with the teacher's numbers or with labels as targets."""
    dtype = torch.promote_types(student_N.dtype, torch.float32)
    return (student_N.to(dtype) - target_N.to(dtype)).square()
