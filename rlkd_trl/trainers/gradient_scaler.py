"""Loss scaling for float16 that allows optimizer steps without gradients."""

import torch
from torch.amp import GradScaler


def tolerating_empty_steps(scaler: GradScaler | None, device: torch.device) -> GradScaler | None:
    """A scaler with the same settings that allows steps without gradients; another class than torch's is returned."""
    if type(scaler) is not GradScaler or not scaler.is_enabled():
        return scaler
    return _TolerantScaler(
        device.type,
        init_scale=scaler.get_scale(),
        growth_factor=scaler.get_growth_factor(),
        backoff_factor=scaler.get_backoff_factor(),
        growth_interval=scaler.get_growth_interval(),
    )


class _TolerantScaler(GradScaler):
    """`torch.amp.GradScaler` without its assertion that each step has gradients.

    In a step without gradients the optimizer is called, which does not change the weights, and the scale stays.

    has_overflowed: whether gradients overflowed in the last step. Accelerate does not notice this with fused
    optimizers, which check gradients themselves.
    """

    has_overflowed = False
    _has_looked = False

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        if _has_gradients(optimizer):
            super().unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, *args, **kwargs) -> float | None:
        self._has_looked = _has_gradients(optimizer)
        return super().step(optimizer, *args, **kwargs) if self._has_looked else optimizer.step(*args, **kwargs)

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        before = self.get_scale()
        if self._has_looked or new_scale is not None:
            super().update(new_scale)
        self.has_overflowed = self.get_scale() < before


def _has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    return any(weight.grad is not None for group in optimizer.param_groups for weight in group["params"])
