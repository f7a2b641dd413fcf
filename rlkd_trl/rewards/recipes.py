"""Reward recipes by name, a user's own functions, and their weighted sum."""

import asyncio
import importlib.util
import inspect
import itertools
import re
import sys
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rlkd_trl.errors import InputError
from rlkd_trl.ops.masking import masked
from rlkd_trl.ops.rewards import log_likelihood, on_last_token
from rlkd_trl.rewards import sequence_rewards
from rlkd_trl.rewards.inputs import RewardInputs
from rlkd_trl.rewards.teacher_rewards import (
    LogLikelihoodReward,
    LogRatioReward,
    TeacherForcingReward,
    TeacherReward,
    score_panel,
)
from rlkd_trl.teachers.panel import TeacherPanel
from rlkd_trl.teachers.scores import TeacherScores

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

# A function with one of these parameters, or any keyword, follows TRL's protocol.
_TRL_NAMES = {"prompts", "completions", "completion_ids"}


@dataclass(frozen=True)
class RewardResult:
    """rewards_BT: the weighted sum. completion_rewards_BT: the part of it from terms that give each completion one
    number, which is on its last token. potentials_BT1: the same sum of the terms' potentials. terms: each unweighted
    term `[B, T]` by name. scores: the first panel's scores, one per scorer, None without a teacher."""

    rewards_BT: Tensor
    completion_rewards_BT: Tensor
    potentials_BT1: Tensor
    terms: dict[str, Tensor]
    scores: list[TeacherScores] | None = None
    scorer_weights: list[float] = field(default_factory=list)

    def teacher_nll_BT(self, mask_BT: Tensor) -> Tensor:
        """−log p_teacher(y_t | s_t) in nats, the weighted mean over scorers; 0 behind the mask. Needs `scores`."""
        return -sum(
            weight * log_likelihood(scores.chosen, scores.logsumexp[:, :-1], mask_BT)
            for weight, scores in zip(self.scorer_weights, self.scores, strict=True)
        )


class RewardModel:
    """A weighted sum of reward terms; each teacher panel is asked once, whatever number of terms reads it.

    `panel` is asked even if no term reads it, for the teacher's NLL in logs and evaluations.

    A term is a `TeacherReward`, or a function with TRL's protocol (of the keyword arguments `prompts`, `completions`,
    `completion_ids`, `ended` and the data's columns, those that it accepts; returns B floats, placed on the last
    token; may be asynchronous), or a function of one `RewardInputs` that returns a tensor `[B, T]` (per token) or
    `[B]` (on the last token).

    Raises:
        InputError: No term, or as many weights as terms are not given.
    """

    def __init__(
        self, terms: Sequence[Callable], weights: Sequence[float] | None = None, *, panel: TeacherPanel | None = None
    ):
        weights = [1.0] * len(terms) if weights is None else list(weights)
        if not terms:
            raise InputError("No reward was given.")
        if len(weights) != len(terms):
            raise InputError(f"{len(weights)} reward weights for {len(terms)} rewards: give one each.")
        self._panel = panel
        self.terms = dict(zip(_distinct_names(terms), zip(terms, weights, strict=True), strict=True))

    @property
    def teacher_terms(self) -> list[TeacherReward]:
        return [term for term, _ in self.terms.values() if isinstance(term, TeacherReward)]

    @property
    def panels(self) -> list[TeacherPanel]:
        """The distinct teacher panels, `panel` and those behind the terms, in order."""
        panels = [] if self._panel is None else [self._panel]
        panels += [term.panel for term in self.teacher_terms]
        return list({id(panel): panel for panel in panels}.values())

    @property
    def reads_student_log_probs(self) -> bool:
        """Whether a term reads `RewardInputs.student_logps_BT`, as any function of `RewardInputs` may."""
        return any(
            term.reads_student_log_probs if isinstance(term, TeacherReward) else not _follows_trl_protocol(term)
            for term, _ in self.terms.values()
        )

    def score(self, inputs: RewardInputs) -> dict[int, list[TeacherScores]]:
        """Asks every panel once; the teacher's only appearance. Keys are the panels' ids."""
        return {
            id(panel): score_panel(panel, inputs, [term for term in self.teacher_terms if term.panel is panel])
            for panel in self.panels
        }

    def rewards(self, inputs: RewardInputs, scores: dict[int, list[TeacherScores]]) -> RewardResult:
        """The weighted sum of all terms, from scores that `score` returned."""
        batch_size, length = inputs.completion_ids_BT.shape
        device = inputs.completion_ids_BT.device
        rewards_BT = torch.zeros(batch_size, length, device=device)
        completion_rewards_BT = torch.zeros_like(rewards_BT)
        potentials_BT1 = torch.zeros(batch_size, length + 1, device=device)
        terms_BT = {}
        for name, (term, weight) in self.terms.items():
            if isinstance(term, TeacherReward):
                terms_BT[name] = term.mean_over_scorers(scores[id(term.panel)], inputs)
                potentials_BT1 += weight * term.mean_potentials(scores[id(term.panel)])
            else:
                terms_BT[name], is_per_completion = _call(name, term, inputs)
                if is_per_completion:
                    completion_rewards_BT += weight * terms_BT[name]
            rewards_BT += weight * terms_BT[name]
        panel = self.panels[0] if self.panels else None
        return RewardResult(
            rewards_BT,
            completion_rewards_BT,
            potentials_BT1,
            terms_BT,
            scores[id(panel)] if panel else None,
            panel.weights if panel else [],
        )


def load_reward(spec: str) -> type[TeacherReward] | Callable:
    """A recipe's name, or `path/to/file.py:function`.

    Raises:
        InputError: There is no such recipe, file or function, or the file fails to run.
    """
    if spec in REWARDS:
        return REWARDS[spec]
    path, separator, name = spec.rpartition(":")
    if not separator or not path.endswith(".py"):
        raise InputError(
            f"Unknown reward {spec!r}; choose one of: {', '.join(REWARDS)}; or give your own function as "
            "path/to/file.py:function."
        )
    if not Path(path).is_file():
        raise InputError(f"`--reward {spec}`: there is no file {path}.")
    # The whole path, so that a file called json.py, or two called reward.py, replace no other module.
    module_name = re.sub(r"\W", "_", str(Path(path).resolve()))
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses, and pickle, look the module of a class up there
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise InputError(f"`--reward {spec}`: {path} failed: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found) or isinstance(found, type):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise InputError(f"`--reward {spec}`: {path} defines no function {name!r}; it has: {', '.join(functions)}.")
    return found


def _distinct_names(terms: Sequence[Callable]) -> list[str]:
    names: list[str] = []
    for term in terms:
        name = getattr(term, "__name__", type(term).__name__)
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        names.append(next(n for n in itertools.chain([name], numbered) if n not in names))
    return names


def _call(name: str, function: Callable, inputs: RewardInputs) -> tuple[Tensor, bool]:
    """A function's scores as `[B, T]`, 0 behind the mask, and whether it gave one per completion."""
    mask_BT = inputs.completion_mask_BT
    if _follows_trl_protocol(function):
        result = function(**_trl_arguments(function, inputs))
        if inspect.isawaitable(result):
            result = _wait_for(result)
    else:
        result = function(inputs)
    # A TRL reward function may return None for a sample it does not apply to: no reward.
    if not isinstance(result, Tensor):
        result = torch.tensor([0.0 if score is None else float(score) for score in result])
    scores = result.detach().to(device=mask_BT.device, dtype=torch.float32)
    is_per_completion = scores.shape == mask_BT.shape[:1]
    if is_per_completion:
        scores = on_last_token(scores, mask_BT)
    if scores.shape != mask_BT.shape:
        raise InputError(
            f"The reward {name!r} returned shape {tuple(scores.shape)}; expected {tuple(mask_BT.shape)} (one per "
            f"token) or {tuple(mask_BT.shape[:1])} (one per completion)."
        )
    if not torch.isfinite(scores[mask_BT]).all():
        raise InputError(f"The reward {name!r} returned NaN or infinity.")
    return masked(scores, mask_BT), is_per_completion


def _follows_trl_protocol(function: Callable) -> bool:
    return _takes_any_keyword(function) or not _TRL_NAMES.isdisjoint(inspect.signature(function).parameters)


def _trl_arguments(function: Callable, inputs: RewardInputs) -> dict[str, list]:
    """What TRL passes, and `ended`; data columns of these names give way. Only what the function accepts."""
    arguments = {key: inputs.column(key) for key in inputs.rows[0] if key != "prompt"}
    arguments |= {
        "prompts": inputs.column("prompt"),
        "completions": list(inputs.completions),
        "completion_ids": inputs.token_lists(),
        "ended": inputs.ended_B.tolist(),
    }
    if _takes_any_keyword(function):
        return arguments
    return {key: arguments[key] for key in inspect.signature(function).parameters if key in arguments}


def _takes_any_keyword(function: Callable) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def _wait_for(awaitable: Awaitable[list[float]]) -> list[float]:
    """In a thread of its own: in a notebook, this one already runs an event loop."""

    async def wait() -> list[float]:
        return await awaitable

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, wait()).result()
