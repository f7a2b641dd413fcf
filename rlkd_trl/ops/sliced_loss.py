"""A loss over the whole vocabulary without ever holding `[N, V]`, in the forward or the backward pass.

The loss is a sum over positions, so it is taken slice by slice, and the gradient of a slice together with its value,
while the slice's logits exist (Hsu et al. 2024, "Liger Kernel", its fused linear cross-entropy). What is kept
for the backward pass is the gradient of the hidden states and of the head's parameters. Unlike recomputing each
slice in the backward pass, this applies the heads once.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlkd_trl.ops.lm_head import MAX_SLICE_ELEMENTS

LossAndMetrics = tuple[Tensor, dict[str, Tensor]]


def sliced_loss(
    head: Callable[[Tensor], Tensor],
    head_parameters: Iterable[Tensor],
    hidden_ND: Tensor,
    per_slice: Callable[..., LossAndMetrics],
    *per_position: Tensor,
    vocab_size: int,
    max_elements: int = MAX_SLICE_ELEMENTS,
) -> LossAndMetrics:
    """The sum of `per_slice(head(hidden_nD), *per_position_n)` over slices of the N positions.

    `per_slice` returns the loss of its n positions, summed, not averaged, and metrics likewise. `per_position` tensors
    have N rows, are sliced alongside and are constants. Gradients reach `hidden_ND` and those of `head_parameters`
    that require one, which must be all that the head depends on; a parameter that is used elsewhere too (tied
    embeddings) gets the sum of both. At most about `max_elements` logits of `vocab_size` columns exist at a time, in
    each of the tensors that `per_slice` makes. There is no gradient of the gradient.

    Returns:
        The loss, a scalar, and the summed metrics; see `weighted_sliced_loss` for weights per position.

    Raises:
        ValueError: The head depends on a trainable parameter that is not in `head_parameters`.
    """
    rows = max(1, max_elements // vocab_size)
    slices = [slice(start, start + rows) for start in range(0, max(1, hidden_ND.shape[0]), rows)]
    parameters = [parameter for parameter in head_parameters if parameter.requires_grad]

    def loss_of_slice(hidden_nD: Tensor, part: slice) -> LossAndMetrics:
        logits_nV = head(hidden_nD)
        if part.start == 0:
            _refuse_other_parameters(logits_nV, [hidden_nD, *parameters])
        return per_slice(logits_nV, *(tensor[part] for tensor in per_position))

    metrics: dict[str, Tensor] = {}
    loss = _SlicedLoss.apply(loss_of_slice, slices, metrics, torch.is_grad_enabled(), hidden_ND, *parameters)
    return loss, metrics


def weighted_sliced_loss(
    head: Callable[[Tensor], Tensor],
    head_parameters: Iterable[Tensor],
    hidden_ND: Tensor,
    per_slice: Callable[..., LossAndMetrics],
    weights_N: Tensor,
    *per_position: Tensor,
    vocab_size: int,
    max_elements: int = MAX_SLICE_ELEMENTS,
) -> LossAndMetrics:
    """`sliced_loss` of Σ_n w_n ℓ_n, linear in the weights w_n ≥ 0, which `per_slice` takes after the logits.

    `per_slice` gets weights with a mean of 1, and the result is multiplied by their true mean: 1 / (tokens in the
    batch) would make gradients of a half-precision head underflow before a loss scaler can lift them.
    """
    mean_weight = weights_N.detach().sum() / max(1, len(weights_N))
    mean_weight = mean_weight.clamp(min=torch.finfo(weights_N.dtype).tiny)
    loss, metrics = sliced_loss(
        head,
        head_parameters,
        hidden_ND,
        per_slice,
        weights_N / mean_weight,
        *per_position,
        vocab_size=vocab_size,
        max_elements=max_elements,
    )
    return mean_weight * loss, {name: mean_weight * value for name, value in metrics.items()}


class _SlicedLoss(torch.autograd.Function):
    """The loop of `sliced_loss`: loss, metrics and gradients of one slice at a time."""

    @staticmethod
    def forward(ctx, loss_of_slice, slices, metrics, with_gradient, hidden_ND, *parameters):
        """`metrics` is filled in place."""
        hidden_needs_grad = with_gradient and hidden_ND.requires_grad
        hidden_grad_ND = torch.zeros_like(hidden_ND) if hidden_needs_grad else None
        # In float32 whatever the parameters' dtype: it is a sum over many slices.
        sums = [
            torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
            for parameter in (parameters if with_gradient else ())
        ]
        total = 0.0
        for part in slices:
            hidden_nD = hidden_ND[part].detach().requires_grad_(hidden_needs_grad)
            with torch.set_grad_enabled(with_gradient):
                loss, slice_metrics = loss_of_slice(hidden_nD, part)
            total = total + loss.detach()
            for name, value in slice_metrics.items():
                metrics[name] = metrics.get(name, 0.0) + value.detach()
            differentiable = [*([hidden_nD] if hidden_needs_grad else []), *(parameters if with_gradient else ())]
            if differentiable:
                gradients = list(torch.autograd.grad(loss, differentiable))
                if hidden_needs_grad:
                    hidden_grad_ND[part] = gradients.pop(0)
                for parameter_sum, gradient in zip(sums, gradients, strict=True):
                    parameter_sum.add_(gradient)
            del loss  # its graph, before the next slice makes another
        parameter_grads = [
            parameter_sum.to(parameter.dtype) for parameter_sum, parameter in zip(sums, parameters, strict=False)
        ]
        ctx.save_for_backward(hidden_grad_ND, *parameter_grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        gradients = [None if gradient is None else upstream * gradient for gradient in ctx.saved_tensors]
        return None, None, None, None, *gradients


def _refuse_other_parameters(logits_nV: Tensor, parameters: Sequence[Tensor]) -> None:
    """Raises `ValueError` if the logits depend on a weight that is not in `parameters`: it would get no gradient."""
    known_nodes = {torch.autograd.graph.get_gradient_edge(x).node for x in parameters if x.requires_grad}
    seen, stack = set(), [logits_nV.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in known_nodes or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            raise ValueError(
                f"the head depends on a trainable tensor of shape {list(node.variable.shape)} that is not in "
                "head_parameters, so its gradient would be lost; pass every trainable parameter of the head"
            )
        stack.extend(next_node for next_node, _ in node.next_functions)
