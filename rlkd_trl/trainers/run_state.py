"""What the next update of a run depends on, beyond weights and optimizer."""

from dataclasses import dataclass

from torch import Tensor

from rlkd_trl.trainers.rollout import Rollout


@dataclass
class RolloutState:
    """What the next update depends on, beyond weights and optimizer, and what the run has spent.

    micro_step: micro-batches seen; it gives the place in the current rollout, and the random numbers of the next.
    beta: the (adaptive) KL coefficient. return_mean, return_variance: moments that a critic's targets are normalised
    with. stopped: the rest of this rollout's updates are skipped.
    """

    micro_step: int = 0
    beta: float = 0.0
    return_mean: float = 0.0
    return_variance: float | None = None
    generated_tokens: int = 0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    stopped: bool = False
    rollout: Rollout | None = None
    window_tokens: list[Tensor] | None = None
    window_sequences: list[Tensor] | None = None


SAVED = ("micro_step", "beta", "return_mean", "return_variance", "generated_tokens", "cpu_seconds", "wall_seconds")
