"""Root mean square layer normalisation, T5's and Llama's."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / √(mean_d x_d² + ε) · w over the last dimension, `[..., D]` (Zhang & Sennrich 2019, eq. 4).

    For the backward pass it keeps x and one number per position; autograd would keep several tensors `[..., D]`.
    """
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x_ND, weight_D, eps)
    return x_ND * _reciprocal_root_mean_square(x_ND, eps) * weight_D


def _reciprocal_root_mean_square(x_ND: Tensor, eps: float) -> Tensor:
    """1 / √(mean_d x_d² + ε), `[..., 1]`."""
    norm_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True)
    return norm_N1.square_().div_(x_ND.shape[-1]).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """With r = 1/√(mean x² + ε), x̂ = r x and g the gradient of the output:

    ∂/∂w_d = Σ_n g_nd x̂_nd,   ∂/∂x_d = r (g_d w_d − x̂_d · mean_e(g_e x̂_e w_e))
    """

    @staticmethod
    def forward(ctx, x_ND, weight_D, eps):
        r_N1 = _reciprocal_root_mean_square(x_ND, eps)
        ctx.save_for_backward(x_ND, weight_D, r_N1)
        return x_ND * r_N1 * weight_D

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND):
        x_ND, weight_D, r_N1 = ctx.saved_tensors
        normed_ND = x_ND * r_N1
        product_ND = grad_ND * normed_ND
        weight_grad_D = product_ND.flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[1] else None
        mean_N1 = (product_ND @ weight_D).div_(x_ND.shape[-1]).unsqueeze(-1)
        x_grad_ND = torch.mul(grad_ND, weight_D, out=product_ND).addcmul_(normed_ND, mean_N1, value=-1).mul_(r_N1)
        return x_grad_ND, weight_grad_D, None
