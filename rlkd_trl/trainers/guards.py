"""Warnings of a student that earns more reward, or a lower loss, by writing worse than at the start of the run."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from statistics import fmean

import torch
from torch import Tensor

from rlkd_trl.trainers.rollout import Rollout

_NGRAM = 3
_REFERENCE = 8  # the number of rollouts at the start, and of the latest ones that are compared with them
_SILENCE = 50  # rollouts after a warning before the same one can be given again
_LEAST_SPREAD = 0.2  # as a share of the reference's mean
_WORSE = 0.1  # by so large a share, outputs have got worse
# Of the first rollouts' share of distinct answers, and of distinct n-grams. Students that had ended in a few texts for
# all inputs had 0.10 to 0.30 of the first, but for one with 0.55; others 0.58 and more. The n-grams of a good one fell
# to less than half (recipes/benchmarks/results/collapse.md).
_COLLAPSED, _COLLAPSED_NGRAMS = 1 / 2, 1 / 4
_DISTINCT = "completions/distinct"
_SKETCH = 4  # values that stand for the n-grams of an answer
_NO_ANSWER = -1
_MOST_ANSWERS = 64  # of a rollout, that are compared

# What says how good held-out outputs are: whether more is better, and the least difference that is one.
_QUALITIES = {"teacher_nll_per_token": (False, 0.0), "bleu": (True, 1.0)}
# What is watched: its name in a warning, and the metric's name.
GUARDED = {
    "length": "completions/mean_length",
    "EOS rate": "completions/eos_rate",
    "entropy": "entropy",
    "repetition": "repetition",
    "distinct outputs": _DISTINCT,
}
# What may rise meanwhile: its metric's name, and that in a warning. Reward per token is the shaped one that is learnt:
# the other holds V_1 of each completion, and would rise per token where texts get shorter.
_REWARDS = {"reward": "reward", "average_reward": "reward per token"}


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


def answer_sketches(
    prompt_ids_PS: Tensor, prompt_mask_PS: Tensor, completion_ids_BT: Tensor, mask_BT: Tensor, *, num_generations: int
) -> Tensor:
    """A number for each prompt, and 5 for its first completion, `[P, 6]`, int64; −1 for a completion without tokens.

    The first is one of its whole text, the other 4 are MinHash values (Broder 1997) of its n-grams, of a shorter one
    of the whole: each is alike in two completions with the probability that an n-gram of either is one of both.
    """
    ids_PT, mask_PT = completion_ids_BT[::num_generations], mask_BT[::num_generations]
    grams_PT = _scattered(ids_PT + 1)
    is_short_P1 = mask_PT.sum(dim=1, keepdim=True) < _NGRAM
    is_first_PT = torch.arange(ids_PT.shape[1], device=ids_PT.device) == 0
    kept_PT = mask_PT & (is_first_PT | ~is_short_P1)
    for shift in range(1, _NGRAM):
        later_PT, has_later_PT = torch.zeros_like(ids_PT), torch.zeros_like(mask_PT)
        later_PT[:, :-shift], has_later_PT[:, :-shift] = ids_PT[:, shift:] + 1, mask_PT[:, shift:]
        grams_PT = _scattered(grams_PT + later_PT * has_later_PT)
        kept_PT = kept_PT & (has_later_PT | is_short_P1)
    largest = torch.iinfo(torch.int64).max
    sketches = [
        torch.where(kept_PT, _scattered(grams_PT + k) & largest, largest).amin(dim=1)  # without the sign
        for k in range(_SKETCH)
    ]
    answer_P5 = torch.stack([_number_of_text(ids_PT, mask_PT) & largest, *sketches], dim=1)
    answer_P5 = torch.where(mask_PT.any(dim=1, keepdim=True), answer_P5, _NO_ANSWER)
    return torch.cat([_number_of_text(prompt_ids_PS, prompt_mask_PS)[:, None], answer_P5], dim=1)


def _number_of_text(ids_PS: Tensor, mask_PS: Tensor) -> Tensor:
    """A number for each row of ids, `[P]`, whatever stands in the padding."""
    real_PS = mask_PS.long()
    return (_scattered(_scattered(ids_PS + 1) + real_PS.cumsum(dim=1)) * real_PS).sum(dim=1)


def _scattered(values: Tensor) -> Tensor:
    """Other 64-bit integers, as if drawn at random, alike where the values are (the finaliser of SplitMix64)."""
    values = values * -7046029254386353131  # 2⁶⁴ / golden ratio, as a signed number
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        values = (values ^ ((values >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return values


def distinct_answers(sketches: Sequence[Sequence[int]]) -> tuple[float, float]:
    """The shares of prompts whose answers differ from all others', from `answer_sketches` of some rollouts.

    As whole texts, and by their n-grams: 1 where no two have one in common, 1 / P where P are alike. Of a prompt that
    was answered several times the last answer counts. 0 of none.
    """
    of_prompt = {number: values for number, *values in sketches if _NO_ANSWER not in values}
    if not of_prompt:
        return 0.0, 0.0
    whole, *by_ngrams = (len(set(values)) / len(of_prompt) for values in zip(*of_prompt.values(), strict=True))
    return whole, fmean(by_ngrams)


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


def _rises(reference: Mapping[str, list[float]], latest: Mapping[str, list[float]], name: str) -> bool:
    return fmean(latest[name]) > max(reference[name])


class Guards:
    """Compares a run's rollouts with its first ones. All its state is in `history`, as plain values."""

    def __init__(self):
        self.history: dict[str, dict[str, list]] = {
            "reference": {},
            "latest": {},
            "rollouts_since_warning": {},
            "answers": {"first": [], "latest": []},
        }

    def warnings(self, metrics: Mapping[str, float], sketches: Sequence[Sequence[int]] = ()) -> list[str]:
        """Takes one rollout's metrics; returns warnings of those that left the start's range while the reward rose.

        The reward is that of completions, or the average of tokens. A student that says nearly the same to every
        prompt is warned of whatever the reward does: of the answers in the latest rollouts, taken together, a share is
        distinct that is half as large as of those in the first, or less; or by n-grams a quarter. If some of the first
        were answered before a collapse, it is seen as well.

        sketches: of the rollout's answers on all processes (`answer_sketches`); none are not compared.
        """
        for since in self.history["rollouts_since_warning"].values():
            since[0] += 1
        for name in (*_REWARDS, *GUARDED.values()):
            if name in metrics:
                first = self.history["reference"].setdefault(name, [])
                if len(first) < _REFERENCE:
                    first.append(metrics[name])
                else:
                    latest = self.history["latest"].setdefault(name, [])
                    latest[:] = [*latest, metrics[name]][-_REFERENCE:]
        reference, latest = self.history["reference"], self.history["latest"]
        warnings = self._of_collapse(sketches)
        rising = [
            label for name, label in _REWARDS.items() if self._is_known(name) and _rises(reference, latest, name)
        ]
        if not rising:
            return warnings
        for word, name in GUARDED.items():
            if not self._is_known(name) or not self._may_warn(word):
                continue
            side = left_range(reference[name], latest[name])
            if side is not None:
                self._note(word)
                warnings.append(
                    f"{word} is {fmean(latest[name]):.3g}, {side} the start's range ({min(reference[name]):.3g} to "
                    f"{max(reference[name]):.3g}), while the {rising[0]} rises: read some completions "
                    "(--log_completions)"
                )
        return warnings

    def _of_collapse(self, sketches: Sequence[Sequence[int]]) -> list[str]:
        word, answers = "distinct outputs", self.history.get("answers")
        if not sketches or answers is None:  # None: an earlier version began the run, and its answers are not known
            return []
        ours = [list(sketch) for sketch in sketches[:_MOST_ANSWERS]]
        if len(answers["first"]) < _REFERENCE:
            answers["first"].append(ours)
            return []
        answers["latest"][:] = [*answers["latest"], ours][-_REFERENCE:]
        if len(answers["latest"]) < _REFERENCE or not self._may_warn(word):
            return []
        now, start = (distinct_answers(list(chain(*answers[part]))) for part in ("latest", "first"))
        limits = (_COLLAPSED, _COLLAPSED_NGRAMS)
        if now[0] == 0 or not any(n <= limit * s for n, s, limit in zip(now, start, limits, strict=True)):
            return []
        self._note(word)
        return [
            f"{word} is {now[0]:.3g}, {start[0]:.3g} at the start (of prompts in {_REFERENCE} rollouts), by trigrams "
            f"{now[1]:.3g} and {start[1]:.3g}: the student says nearly the same to many prompts. If "
            "their answers should differ, begin anew with a lower --learning_rate, or from a student that imitates "
            "better (kd.py with seq_kd)"
        ]

    def _is_known(self, name: str) -> bool:
        """Whether there are rollouts enough after those of the start."""
        return len(self.history["latest"].get(name, [])) == _REFERENCE

    def _note(self, word: str) -> None:
        self.history["rollouts_since_warning"][word] = [0.0]

    def _may_warn(self, word: str) -> bool:
        since = self.history["rollouts_since_warning"].get(word)
        return since is None or since[0] >= _SILENCE
