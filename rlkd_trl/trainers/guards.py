"""Signs that a student earns more reward by writing worse: compared with what it wrote at the start of the run."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from torch import Tensor

_NGRAM = 3
_REFERENCE = 8  # rollouts at the start, and the latest ones that are compared with them
_SILENCE = 50  # rollouts after a warning in which the same one is not given again
_LEAST_SPREAD = 0.2  # of the reference's mean

GUARDED = {
    "length": "completions/mean_length",
    "EOS rate": "completions/eos_rate",
    "entropy": "entropy",
    "repetition": "repetition",
    "distinct outputs": "distinct",
}


def repetition_counts(completion_ids_BT: Tensor, mask_BT: Tensor) -> tuple[float, float, float, float]:
    """Of this process's completions: repeated n-grams, n-grams, different completions, completions."""
    completions = [
        tuple(ids[:length])
        for ids, length in zip(completion_ids_BT.tolist(), mask_BT.sum(dim=1).tolist(), strict=True)
        if length
    ]
    repeated = grams = 0
    for ids in completions:
        found = list(zip(*(ids[i:] for i in range(_NGRAM)), strict=False))
        grams += len(found)
        repeated += len(found) - len(set(found))
    return float(repeated), float(grams), float(len(set(completions))), float(len(completions))


def left_range(reference: Sequence[float], latest: Sequence[float]) -> str | None:
    """ "above" or "below" if the mean of the latest values is outside of the reference's range, else None.

    The range is from the smallest to the largest reference value, widened on both sides by their distance, or by a
    fifth of their mean's size where that is more.
    """
    lowest, highest = min(reference), max(reference)
    spread = max(highest - lowest, _LEAST_SPREAD * abs(fmean(reference)))
    if fmean(latest) > highest + spread:
        return "above"
    return "below" if fmean(latest) < lowest - spread else None


class Guards:
    """Watches a run's rollouts. `history`, of plain values, is all its state."""

    def __init__(self):
        self.history: dict[str, dict[str, list[float]]] = {"reference": {}, "latest": {}, "rollouts_since_warning": {}}

    def warnings(self, metrics: Mapping[str, float]) -> list[str]:
        """Warnings of what has left the start's range while the mean reward rose; `metrics` are one rollout's."""
        for since in self.history["rollouts_since_warning"].values():
            since[0] += 1
        for name in ("reward", *GUARDED.values()):
            if name in metrics:
                first = self.history["reference"].setdefault(name, [])
                if len(first) < _REFERENCE:
                    first.append(metrics[name])
                else:
                    latest = self.history["latest"].setdefault(name, [])
                    latest[:] = [*latest, metrics[name]][-_REFERENCE:]
        reference, latest = self.history["reference"], self.history["latest"]
        if len(latest.get("reward", [])) < _REFERENCE or fmean(latest["reward"]) <= max(reference["reward"]):
            return []
        said = []
        for word, name in GUARDED.items():
            if len(latest.get(name, [])) < _REFERENCE or not self._may_speak(word):
                continue
            side = left_range(reference[name], latest[name])
            if side is not None:
                self.history["rollouts_since_warning"][word] = [0.0]
                said.append(
                    f"{word} is {fmean(latest[name]):.3g}, {side} the start's range ({min(reference[name]):.3g} to "
                    f"{max(reference[name]):.3g}), while the reward rises: read some completions (--log_completions)"
                )
        return said

    def _may_speak(self, word: str) -> bool:
        since = self.history["rollouts_since_warning"].get(word)
        return since is None or since[0] >= _SILENCE
