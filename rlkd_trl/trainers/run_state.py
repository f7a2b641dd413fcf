"""The state of a run on rollouts, beyond weights and optimizer."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from rlkd_trl.trainers.rollout import Rollout


@dataclass
class RolloutState:
    """What the next update depends on, beyond weights and optimizer, and what the run has spent.

    micro_step: the number of micro-batches so far, which determines the place in the current rollout, and the random
    numbers of the next one. beta: the (adaptive) KL coefficient. return_mean, return_variance: the moments by which a
    critic's targets are normalised. generated_tokens, cpu_seconds, wall_seconds: see `budget.Cost`. stopped: whether
    the remaining updates of this rollout are skipped. lost: why none of its completions can be used; "" if they can.
    rollout: the one in use. window_tokens, window_sequences: how many tokens and sequences the loss of each of its
    optimizer steps has, over all processes.
    """

    micro_step: int = 0
    beta: float = 0.0
    return_mean: float = 0.0
    return_variance: float | None = None
    generated_tokens: int = 0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    stopped: bool = False
    lost: str = ""
    rollout: Rollout | None = None
    window_tokens: list[Tensor] | None = None
    window_sequences: list[Tensor] | None = None

    def count_windows(self, steps: int, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Counts tokens and sequences in the loss of each of the rollout's `steps` optimizer steps, of all processes.

        At least 1 each, since losses are divided by them.
        """
        loss_mask_BT = self.rollout.loss_mask_BT
        counts_B2 = torch.stack([loss_mask_BT.sum(dim=1), loss_mask_BT.any(dim=1)], dim=1).float()
        in_loss_W2 = sum_over_ranks(counts_B2.view(steps, -1, 2).sum(dim=1)).clamp(min=1)
        self.window_tokens, self.window_sequences = list(in_loss_W2[:, 0]), list(in_loss_W2[:, 1])

    def saved(self) -> dict[str, object]:
        """The whole state as tensors and plain values."""
        state = {item.name: getattr(self, item.name) for item in fields(self)}
        if self.rollout is not None:
            state["rollout"] = {item.name: getattr(self.rollout, item.name) for item in fields(Rollout)}
        return state

    @classmethod
    def of_saved(cls, state: dict[str, object], device: torch.device) -> "RolloutState":
        """The state that `saved` returned, with its tensors on the device."""
        state = {name: send_to_device(value, device) for name, value in state.items()}
        if state["rollout"] is not None:
            state["rollout"] = Rollout(**state["rollout"])
        return cls(**state)
