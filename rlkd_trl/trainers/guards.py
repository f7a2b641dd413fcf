"""Warnings of a student that earns more reward, or a lower loss, by writing worse than at the start of the run."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from rlkd_trl.trainers.rollout import Rollout

_NGRAM = 3
_REFERENCE = 8  # the number of rollouts at the start, and of the latest ones that are compared with them
_SILENCE = 50  # rollouts after a warning before the same one can be given again
_LEAST_SPREAD = 0.2  # as a share of the reference's mean
_WORSE = 0.1  # by so large a share, outputs have got worse

# What says how good held-out outputs are: whether more is better, and the least difference that is one.
_QUALITIES = {"teacher_nll_per_token": (False, 0.0), "bleu": (True, 1.0)}
# What is watched: its name in a warning, and the metric's name.
GUARDED = {
    "length": "completions/mean_length",
    "EOS rate": "completions/eos_rate",
    "entropy": "entropy",
    "repetition": "repetition",
    "distinct outputs": "completions/distinct",
}
_REWARDS = ("reward", "reward per token")


def repetition_counts(
    completion_ids_BT: Tensor, mask_BT: Tensor, *, num_generations: int
) -> tuple[float, float, float, float]:
    """The numbers of repeated n-grams, of n-grams, of different completions and of completions, on this process.

    The last two are of the first completion of each prompt. Samples of one prompt may well be alike; a student that
    says the same to every prompt has collapsed.
    """
    completions = [
        tuple(ids[:length])
        for ids, length in zip(completion_ids_BT.tolist(), mask_BT.sum(dim=1).tolist(), strict=True)
    ]
    repeated = grams = 0
    for ids in completions:
        ngrams = list(zip(*(ids[i:] for i in range(_NGRAM)), strict=False))
        grams += len(ngrams)
        repeated += len(ngrams) - len(set(ngrams))
    of_prompts = [ids for ids in completions[::num_generations] if ids]
    return float(repeated), float(grams), float(len(set(of_prompts))), float(len(of_prompts))


def repetition_and_distinct(
    rollout: Rollout, num_generations: int, sum_over_ranks: Callable[[Tensor], Tensor]
) -> tuple[float, float]:
    """The shares of repeated n-grams and of different completions in a rollout, over all processes; 0 of none."""
    counts = repetition_counts(rollout.completion_ids_BT, rollout.counted_BT, num_generations=num_generations)
    on_device = torch.tensor(counts, device=rollout.completion_ids_BT.device)
    repeated, grams, distinct, count = sum_over_ranks(on_device).tolist()
    return repeated / max(grams, 1), distinct / max(count, 1)


def left_range(reference: Sequence[float], latest: Sequence[float]) -> str | None:
    """ "above" or "below" if the mean of the latest values is outside the reference's range, else None.

    The range is from the smallest to the largest reference value, widened on both sides by their distance, or by a
    fifth of the absolute value of their mean if that is larger.
    """
    lowest, highest = min(reference), max(reference)
    spread = max(highest - lowest, _LEAST_SPREAD * abs(fmean(reference)))
    if fmean(latest) > highest + spread:
        return "above"
    return "below" if fmean(latest) < lowest - spread else None


def spoilt(
    losses: Sequence[float], before: Mapping[str, float], after: Mapping[str, float], remedies: Sequence[str]
) -> list[str]:
    """Warnings of held-out outputs that got worse while the loss fell.

    Worse is by more than a tenth, and of BLEU by more than a point.

    losses: as logged, in order: the means of the halves are compared, and of fewer than two nothing is said. before,
    after: metrics of the student's outputs, of which there may be none. remedies: what can be changed.
    """
    half = len(losses) // 2
    if not half or fmean(losses[-half:]) >= fmean(losses[:half]):
        return []
    warnings = []
    for name, (more_is_better, least) in _QUALITIES.items():
        if name not in before or name not in after:
            continue
        loss_of_quality = before[name] - after[name] if more_is_better else after[name] - before[name]
        if loss_of_quality > max(least, _WORSE * abs(before[name])):
            warnings.append(
                f"{name} of held-out outputs went from {before[name]:.3g} to {after[name]:.3g}, which is worse, while "
                f"the loss fell from {fmean(losses[:half]):.3g} to {fmean(losses[-half:]):.3g} (halves of what was "
                "logged): the student comes closer to what it is trained on, and writes worse than before. Compare "
                f"{', '.join(remedies)}"
            )
    return warnings


class Guards:
    """Compares a run's rollouts with its first ones. All its state is in `history`, as plain values."""

    def __init__(self):
        self.history: dict[str, dict[str, list[float]]] = {"reference": {}, "latest": {}, "rollouts_since_warning": {}}

    def warnings(self, metrics: Mapping[str, float]) -> list[str]:
        """Takes one rollout's metrics; returns warnings of those that left the start's range while the reward rose.

        The reward is that of completions, or of tokens.
        """
        for since in self.history["rollouts_since_warning"].values():
            since[0] += 1
        if "reward" in metrics and "completions/mean_length" in metrics:
            metrics = {**metrics, "reward per token": metrics["reward"] / metrics["completions/mean_length"]}
        for name in (*_REWARDS, *GUARDED.values()):
            if name in metrics:
                first = self.history["reference"].setdefault(name, [])
                if len(first) < _REFERENCE:
                    first.append(metrics[name])
                else:
                    latest = self.history["latest"].setdefault(name, [])
                    latest[:] = [*latest, metrics[name]][-_REFERENCE:]
        reference, latest = self.history["reference"], self.history["latest"]
        rising = [
            name
            for name in _REWARDS
            if len(latest.get(name, [])) == _REFERENCE and fmean(latest[name]) > max(reference[name])
        ]
        if not rising:
            return []
        warnings = []
        for word, name in GUARDED.items():
            if len(latest.get(name, [])) < _REFERENCE or not self._may_warn(word):
                continue
            side = left_range(reference[name], latest[name])
            if side is not None:
                self.history["rollouts_since_warning"][word] = [0.0]
                warnings.append(
                    f"{word} is {fmean(latest[name]):.3g}, {side} the start's range ({min(reference[name]):.3g} to "
                    f"{max(reference[name]):.3g}), while the {rising[0]} rises: read some completions "
                    "(--log_completions)"
                )
        return warnings

    def _may_warn(self, word: str) -> bool:
        since = self.history["rollouts_since_warning"].get(word)
        return since is None or since[0] >= _SILENCE
