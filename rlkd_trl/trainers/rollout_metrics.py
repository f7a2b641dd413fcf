"""What is logged of a rollout: scalars over the global batch, seconds, and a few completions to read."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rlkd_trl.ops.masking import masked_moments, masked_sum
from rlkd_trl.ops.rewards import sequence_sum
from rlkd_trl.rewards import RewardInputs, RewardResult
from rlkd_trl.trainers.rollout import Rollout


def rollout_metrics(
    rollout: Rollout,
    result: RewardResult,
    kl_B: Tensor | None,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """Means over the completions (or tokens) of all processes.

    reward, reward_std, rewards/TERM: per sequence, before KL and truncation penalties. teacher_nll: nats per token,
    weighted over scorers. kl: nats per sequence.
    """
    mask_BT, total = rollout.completion_mask_BT, sum_over_ranks
    sequences = total(torch.tensor(float(len(mask_BT)), device=mask_BT.device))
    tokens = total(mask_BT.sum().float())
    reward_B = sequence_sum(result.rewards_BT, mask_BT)
    mean, variance = masked_moments(reward_B, torch.ones_like(reward_B, dtype=torch.bool), sum_over_ranks=total)
    metrics = {
        "reward": mean,
        "reward_std": variance.sqrt(),
        "completions/mean_length": tokens / sequences,
        "completions/eos_rate": total(rollout.ended_B.sum().float()) / sequences,
    }
    for name, term_BT in result.terms.items():
        metrics[f"rewards/{name}"] = total(masked_sum(term_BT, mask_BT)) / sequences
    if result.scores is not None:
        metrics["teacher_nll"] = total(masked_sum(result.teacher_nll_BT(mask_BT), mask_BT)) / tokens
    if kl_B is not None:
        metrics["kl"] = total(kl_B.sum()) / sequences
    return {name: float(value) for name, value in metrics.items()}


class PhaseTimer:
    """Wall-clock seconds that this process spends in each phase of a rollout, the accelerator's work included."""

    def __init__(self):
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time inside to `name`."""
        started = time.perf_counter()
        yield
        if torch.accelerator.is_available():  # it works on after its calls return
            torch.accelerator.synchronize()
        self._seconds[name] += time.perf_counter() - started

    def reset(self, *, tokens: int) -> dict[str, float]:
        """`seconds/PHASE` since the last reset, and over all phases `tokens_per_second` for so many tokens."""
        metrics = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        metrics["tokens_per_second"] = tokens / sum(self._seconds.values())
        self._seconds.clear()
        return metrics


def sample_table(inputs: RewardInputs, result: RewardResult, count: int) -> list[dict[str, object]]:
    """The first completions of a rollout, for the log and the report."""
    prompts = inputs.column("prompt")
    reward_B = sequence_sum(result.rewards_BT, inputs.completion_mask_BT)
    return [
        {
            "prompt": prompts[i],
            "completion": inputs.completions[i],
            "reward": float(reward_B[i]),
            "tokens": int(inputs.completion_mask_BT[i].sum()),
            "ended": bool(inputs.ended_B[i]),
        }
        for i in range(min(count, len(inputs.completions)))
    ]
