"""Shares of K teachers in their mean, from losses: a teacher that is wrong has less to say.

Wu, Wu & Huang 2021, "One Teacher is Enough? Pre-trained Language Model Distillation from Multiple Teachers"
("MT-BERT"), weigh teacher i on an example with the label y by its own error, 1 / (1 + CE(y, p_i)). There it is a
factor of each teacher's loss; where teachers are averaged, the shares here are these numbers over their sum, so that
the loss or reward keeps its scale.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlkd_trl.ops.masking import masked, masked_sum


def mean_token_loss(logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """CE(y, p) of a text per token, −(1/n) Σ_t log p(y_t | s_t) over its n real tokens, in nats, `[B]`."""
    return -masked_sum(logps_BT, mask_BT, dim=1) / mask_BT.sum(dim=1).clamp(min=1)


def disagreement(logps_KBT: Sequence[Tensor], mask_BT: Tensor, asked_KB: Tensor | None = None) -> Tensor:
    """How far each of K teachers is from all of them on a completion, in nats per token, `[K, B]`.

    (1/n) Σ_t | log p_i(y_t | s_t) − median_k log p_k(y_t | s_t) |. It is symmetric, so that neither a teacher that
    likes everything nor one that likes nothing is preferred; the median of an even number is the mean of the middle
    two. So one or two teachers have equal disagreement, and of three or more the one that differs has the most.
    asked_KB: which teachers were asked about each completion, some about every one; the others are in no median, and
    their own disagreement is NaN. None: all were.
    """
    logps_KBT = torch.stack([masked(logps_BT, mask_BT) for logps_BT in logps_KBT])
    if asked_KB is not None:
        logps_KBT = logps_KBT.masked_fill(~asked_KB[..., None], math.nan)
    middle_BT = logps_KBT.nanquantile(0.5, dim=0)
    return (logps_KBT - middle_BT).abs().sum(dim=-1) / mask_BT.sum(dim=1).clamp(min=1)


def loss_factor(loss: Tensor) -> Tensor:
    """1 / (1 + L), MT-BERT's factor of a teacher's soft loss on an example where its own loss is L ≥ 0."""
    return 1 / (1 + loss)


def weights_by_loss(losses_KB: Tensor, prior_KB: Tensor) -> Tensor:
    """w_i = v_i / (1 + L_i) over its sum: `loss_factor` times a given weight v_i, `[K, B]`.

    losses_KB: L_i ≥ 0 of teacher i on each example. prior_KB: v_i ≥ 0, some above 0 for each example; a teacher with
    v_i = 0 has no share there, whatever its loss.
    """
    shares_KB = torch.where(prior_KB > 0, prior_KB * loss_factor(losses_KB), torch.zeros_like(losses_KB))
    return shares_KB / shares_KB.sum(dim=0)
