"""Reward recipes by name, a user's own functions and classes, and their weighted sum."""

import importlib.machinery
import importlib.util
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import CodeType

import torch
from torch import Tensor

from rlkd_trl.errors import InputError
from rlkd_trl.rewards import sequence_rewards
from rlkd_trl.rewards.inputs import RewardInputs
from rlkd_trl.rewards.own_rewards import (
    check_signature,
    contained,
    follows_trl_protocol,
    function_reward,
    teacher_reward,
)
from rlkd_trl.rewards.teacher_rewards import (
    LogLikelihoodReward,
    LogRatioReward,
    TeacherForcingReward,
    TeacherReward,
    score_panel,
)
from rlkd_trl.teachers.panel import TeacherPanel
from rlkd_trl.teachers.scores import TeacherScores, mean_scores, readable_by_all, weighted_mean

# Everything `--reward NAME` accepts. A class is built on the run's teachers; a function is used as it is.
REWARDS: dict[str, type[TeacherReward] | Callable] = {
    "teacher_forcing": TeacherForcingReward,
    "log_likelihood": LogLikelihoodReward,
    "log_ratio": LogRatioReward,
    "length": sequence_rewards.length,
    "missing_eos": sequence_rewards.missing_eos,
    "repetition": sequence_rewards.repetition,
    "reference_bleu": sequence_rewards.reference_bleu,
    "reference_rouge": sequence_rewards.reference_rouge,
}

# Of these, those that measure what is bad.
FAULTS = ("missing_eos", "repetition")


@dataclass(frozen=True)
class RewardResult:
    """The rewards of a batch, and what they are made of.

    rewards_BT: the weighted sum of all terms. completion_rewards_BT: the part of it from terms that give one number
    per completion, which stands on the last token. potentials_BT1: the same weighted sum of the terms' potentials.
    terms: each term by name, unweighted, `[B, T]`. scores: the first panel's scores, one per scorer, None without a
    teacher.
    """

    rewards_BT: Tensor
    completion_rewards_BT: Tensor
    potentials_BT1: Tensor
    terms: dict[str, Tensor]
    scores: list[TeacherScores] | None = None

    def teacher_nll_BT(self, mask_BT: Tensor) -> Tensor:
        """−log p_teacher(y_t | s_t) in nats, the weighted mean over scorers; 0 behind the mask. Needs `scores`.

        Of a teacher with another tokenizer, that of its own tokens of a common span on the span's last token.
        """
        return -weighted_mean((scores.log_likelihood(mask_BT) for scores in self.scores), self.scores)

    def teacher_tokens_B(self, mask_BT: Tensor) -> Tensor:
        """How many tokens of its own a teacher reads of each completion, the weighted mean over scorers, `[B]`."""
        counts = (scores.mask_of_own_tokens(mask_BT).sum(dim=1, keepdim=True) for scores in self.scores)
        return weighted_mean(counts, self.scores)[:, 0]

    @property
    def readable_B(self) -> Tensor | None:
        """`readable_by_all` of the scores."""
        return readable_by_all(self.scores or [])


class RewardModel:
    """A weighted sum of reward terms. A teacher panel scores a batch once, however many terms read its scores.

    `panel` scores even if no term reads it, for the teacher's NLL in logs and evaluations.

    A term is one of:

    - a `TeacherReward`;
    - a function of one `RewardInputs`, whose `scores` are the first panel's, that returns a tensor `[B, T]` (per
      token) or `[B]` (which is put on the last token);
    - a function with TRL's protocol: it gets those of the keyword arguments `prompts`, `completions`,
      `completion_ids`, `ended` and the data's columns that it accepts, and returns B floats, which are put on the last
      tokens. It may be asynchronous.

    Raises:
        InputError: There is no term, one is no function, the number of weights is not that of the terms, or a function
            takes other arguments than these.
    """

    def __init__(
        self, terms: Sequence[Callable], weights: Sequence[float] | None = None, *, panel: TeacherPanel | None = None
    ):
        weights = [1.0] * len(terms) if weights is None else list(weights)
        if not terms:
            raise InputError("No reward was given.")
        if len(weights) != len(terms):
            raise InputError(f"{len(weights)} reward weights for {len(terms)} rewards: give one each.")
        for term in terms:
            if not callable(term):
                raise InputError(f"A reward is a function or a TeacherReward; {term!r} is neither.")
            if not isinstance(term, TeacherReward):
                check_signature(term)
        self._panel = panel
        self.terms = dict(zip(_distinct_names(terms), zip(terms, weights, strict=True), strict=True))

    @property
    def teacher_terms(self) -> list[TeacherReward]:
        return [term for term, _ in self.terms.values() if isinstance(term, TeacherReward)]

    @property
    def panels(self) -> list[TeacherPanel]:
        """The distinct teacher panels: `panel`, then those that the terms read."""
        panels = [] if self._panel is None else [self._panel]
        panels += [term.panel for term in self.teacher_terms]
        return list({id(panel): panel for panel in panels}.values())

    @property
    def reads_student_log_probs(self) -> bool:
        """Whether a term may read `RewardInputs.student_logps_BT`; a function of `RewardInputs` always may."""
        return any(
            term.reads_student_log_probs if isinstance(term, TeacherReward) else not follows_trl_protocol(term)
            for term, _ in self.terms.values()
        )

    def score(self, inputs: RewardInputs) -> dict[int, list[TeacherScores]]:
        """Every panel's scores of the batch, by `id(panel)`. No other method calls a teacher."""
        return {
            id(panel): score_panel(panel, inputs, [term for term in self.teacher_terms if term.panel is panel])
            for panel in self.panels
        }

    def rewards(
        self, inputs: RewardInputs, scores: dict[int, list[TeacherScores]], *, allow_not_finite: bool = False
    ) -> RewardResult:
        """The weighted sum of all terms, from the scores that `score` returned.

        With `allow_not_finite`, a user's term may be NaN or infinite for some completions: trainers drop these.

        Raises:
            InputError: A user's term fails, returns other shapes, or NaN or infinity without `allow_not_finite`.
        """
        batch_size, length = inputs.completion_ids_BT.shape
        device = inputs.completion_ids_BT.device
        rewards_BT = torch.zeros(batch_size, length, device=device)
        completion_rewards_BT = torch.zeros_like(rewards_BT)
        potentials_BT1 = torch.zeros(batch_size, length + 1, device=device)
        panel = self.panels[0] if self.panels else None
        if panel is not None:
            is_aligned = any(of_scorer.alignment is not None for of_scorer in scores[id(panel)])
            inputs = replace(inputs, scores=None if is_aligned else mean_scores(scores[id(panel)]))
        terms_BT = {}
        for name, (term, weight) in self.terms.items():
            if isinstance(term, TeacherReward):
                terms_BT[name], of_term_BT1 = teacher_reward(
                    name, term, scores[id(term.panel)], inputs, allow_not_finite
                )
                potentials_BT1 += weight * of_term_BT1
            else:
                terms_BT[name], is_per_completion = function_reward(name, term, inputs, allow_not_finite)
                if is_per_completion:
                    completion_rewards_BT += weight * terms_BT[name]
            rewards_BT += weight * terms_BT[name]
        return RewardResult(
            rewards_BT,
            completion_rewards_BT,
            potentials_BT1,
            terms_BT,
            scores[id(panel)] if panel else None,
        )


def load_reward(spec: str) -> type[TeacherReward] | Callable:
    """A recipe's name, or `path/to/file.py:name` of a function or of a subclass of `TeacherReward`.

    Raises:
        InputError: There is no such recipe, file, function or class, the file fails to run, or the function takes
            other arguments than a reward.
    """
    if spec in REWARDS:
        return REWARDS[spec]
    path, separator, name = spec.rpartition(":")
    if not separator or not path.endswith(".py"):
        raise InputError(
            f"Unknown reward {spec!r}; choose one of: {', '.join(REWARDS)}; or give your own function, or class "
            "of TeacherReward, as path/to/file.py:function."
        )
    if not Path(path).is_file():
        raise InputError(f"`--reward {spec}`: there is no file {path}.")
    # The module's name holds the whole path, so that neither a file json.py nor a second reward.py hides a module.
    module_name = re.sub(r"\W", "_", str(Path(path).resolve()))
    module_spec = importlib.util.spec_from_file_location(module_name, path, loader=_AsWritten(module_name, path))
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # where dataclasses and pickle look up the module of a class
    try:
        with contained():
            module_spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        del sys.modules[module_name]
        raise InputError(f"`--reward {spec}`: {path} failed: {type(error).__name__}: {error}") from error
    reward = getattr(module, name, None)
    if _is_teacher_reward(reward):
        return reward
    if not callable(reward) or isinstance(reward, type):
        names = [key for key, value in vars(module).items() if inspect.isfunction(value) or _is_teacher_reward(value)]
        raise InputError(f"`--reward {spec}`: {path} defines no function {name!r}; it has: {', '.join(names)}.")
    check_signature(reward)
    return reward


class _AsWritten(importlib.machinery.SourceFileLoader):
    """Compiles the file whenever it is loaded, and leaves nothing beside it.

    Python's compiled files would be taken for one that was rewritten within a second in as many bytes.
    """

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _is_teacher_reward(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, TeacherReward) and value is not TeacherReward


def _distinct_names(terms: Sequence[Callable]) -> list[str]:
    """The terms' names; a second "length" is "length_2"."""
    names: list[str] = []
    for term in terms:
        name = getattr(term, "__name__", type(term).__name__)
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        names.append(next(n for n in itertools.chain([name], numbered) if n not in names))
    return names
