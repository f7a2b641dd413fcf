"""What is logged about rollouts: metrics over the global batch, seconds per phase, and a few completions to read."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from trl.trainer.utils import print_prompt_completions_sample

from rlkd_trl.ops.masking import masked_moments, masked_sum
from rlkd_trl.ops.rewards import sequence_sum
from rlkd_trl.rewards import RewardResult
from rlkd_trl.trainers.rollout import Rollout


def rollout_metrics(
    rollout: Rollout,
    result: RewardResult,
    kl_B: Tensor | None,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """Means over the completions, or tokens, of all processes; dropped completions do not count.

    reward, reward_std and rewards/TERM: per sequence, before the penalties for KL and truncation. teacher_nll: in nats
    per token (the teacher's own, where it has another tokenizer), the weighted mean over scorers. kl: in nats per
    sequence. And `completion_metrics`.
    """
    mask_BT, counted_B, total = rollout.counted_BT, rollout.counted_B, sum_over_ranks
    sequences, tokens = (total(count) for count in _counts(rollout))
    reward_B = sequence_sum(result.rewards_BT, mask_BT)
    mean, variance = masked_moments(reward_B, counted_B, sum_over_ranks=total)
    metrics = {"reward": mean, "reward_std": variance.sqrt(), **completion_metrics(rollout, total)}
    for name, term_BT in result.terms.items():
        metrics[f"rewards/{name}"] = total(masked_sum(term_BT, mask_BT)) / sequences
    if result.scores is not None:
        nll = total(masked_sum(result.teacher_nll_BT(mask_BT), mask_BT))
        if result.readable_B is not None:
            tokens = total(masked_sum(result.teacher_tokens_B(mask_BT), counted_B)).clamp(min=1)
        metrics["teacher_nll"] = nll / tokens
    if kl_B is not None:
        metrics["kl"] = total(masked_sum(kl_B, counted_B)) / sequences
    return {name: float(value) for name, value in metrics.items()}


def completion_metrics(rollout: Rollout, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """The mean number of tokens of a completion, and the share of completions with EOS, over all processes."""
    sequences, tokens = (sum_over_ranks(count) for count in _counts(rollout))
    ended = sum_over_ranks((rollout.ended_B & rollout.counted_B).sum().float())
    return {"completions/mean_length": float(tokens / sequences), "completions/eos_rate": float(ended / sequences)}


def _counts(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """This device's completions and tokens."""
    return rollout.counted_B.sum().float(), rollout.counted_BT.sum().float()


class RunningMeans:
    """Means by name of all that was recorded since they were last taken. `sums`, of plain values, is all its state."""

    def __init__(self):
        self.sums: dict[str, list[float]] = {}  # of each name: sum and count

    def record(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Adds one value to each of these names."""
        for name, value in metrics.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = [total + float(value), count + 1]

    def take(self) -> dict[str, float]:
        """The means; the next ones begin anew."""
        means = {name: total / count for name, (total, count) in self.sums.items()}
        self.sums = {}
        return means


class PhaseTimer:
    """Wall-clock seconds that this process spends in each phase of a rollout, the accelerator's work included."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time inside to `name`."""
        started = time.perf_counter()
        yield
        if torch.accelerator.is_available():  # it works on after its calls return
            torch.accelerator.synchronize()
        self.seconds[name] += time.perf_counter() - started

    def reset(self, *, tokens: int) -> dict[str, float]:
        """`seconds/PHASE` of each phase since the last reset, and `tokens_per_second`, of `tokens` over all phases."""
        metrics = {f"seconds/{name}": seconds for name, seconds in self.seconds.items()}
        metrics["tokens_per_second"] = tokens / sum(self.seconds.values())
        self.seconds.clear()
        return metrics


def sample_table(
    rows: list[dict], completions: list[str], rollout: Rollout, count: int, *, reward_B: Tensor | None = None
) -> list[dict[str, object]]:
    """The first completions of a rollout, for the log and the report, with their rewards where there are any."""
    tokens_B = rollout.completion_mask_BT.sum(dim=1)
    return [
        {
            "prompt": rows[int(rollout.prompt_index_B[i])]["prompt"],
            "completion": completions[i],
            **({} if reward_B is None else {"reward": float(reward_B[i])}),
            "tokens": int(tokens_B[i]),
            "ended": bool(rollout.ended_B[i]),
        }
        for i in range(min(count, len(completions)))
    ]


def print_samples(table: list[dict[str, object]], step: int) -> None:
    """Prints a `sample_table` as TRL does, with the rewards where there are any."""
    has_rewards = bool(table) and "reward" in table[0]
    print_prompt_completions_sample(
        [row["prompt"] for row in table],
        [row["completion"] for row in table],
        {"reward": [row["reward"] for row in table]} if has_rewards else {},
        None,
        step,
    )
