"""Reward functions and classes that users write: how they are called, and what they may return.

Whatever they do wrong becomes an `InputError` that names the reward and its file, so that the user can see that the
mistake is in the reward and not in this package.
"""

import asyncio
import inspect
import os
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from rlkd_trl.errors import InputError
from rlkd_trl.ops.masking import masked
from rlkd_trl.ops.rewards import on_last_token
from rlkd_trl.prompts import is_conversation
from rlkd_trl.rewards.inputs import RewardInputs
from rlkd_trl.rewards.teacher_rewards import TeacherReward
from rlkd_trl.teachers.panel import TeacherPanel
from rlkd_trl.teachers.scores import TeacherScores, weighted_mean

# A function that has one of these parameters, or takes any keyword (`**kwargs`), follows TRL's protocol.
_TRL_NAMES = ("prompts", "completions", "completion_ids")


def follows_trl_protocol(function: Callable) -> bool:
    """Whether the function takes TRL's keyword arguments, rather than one `RewardInputs`."""
    return _takes_any_keyword(function) or any(name in _parameters(function) for name in _TRL_NAMES)


def check_signature(function: Callable) -> None:
    """Raises `InputError` for a function that takes neither TRL's arguments nor one `RewardInputs`."""
    if follows_trl_protocol(function):
        return
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(_parameters(function).values())
    required = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    takes_one = any(p.kind in positional or p.kind is p.VAR_POSITIONAL for p in parameters)
    if takes_one and len(required) <= 1 and all(p.kind in positional for p in required):
        return
    raise _error(
        function,
        None,
        f"takes ({', '.join(p.name for p in parameters)}): a reward takes one argument, its `RewardInputs`, or "
        f"by name some of {', '.join(_TRL_NAMES)} and the data's columns, as in TRL",
    )


def function_reward(
    name: str, function: Callable, inputs: RewardInputs, allow_not_finite: bool = False
) -> tuple[Tensor, bool]:
    """A function's scores as `[B, T]`, 0 behind the mask, and whether it returned one score per completion.

    Raises:
        InputError: The function raised anything but `KeyboardInterrupt`, or did not return one number per completion
            or token.
    """
    mask_BT = inputs.completion_mask_BT
    try:
        result = _result(function, inputs)
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:
        place = _first_failing(function, inputs, type(error))
        raise _error(function, name, f"raised {_shown(error, function)}, {place}") from error
    scores = _as_tensor(result, function, name, mask_BT).to(mask_BT.device)
    is_per_completion = scores.shape == mask_BT.shape[:1]
    if is_per_completion:
        scores = on_last_token(scores, mask_BT)
    _check_scores(scores, function, name, mask_BT, allow_not_finite)
    return masked(scores, mask_BT), is_per_completion


@contextmanager
def contained() -> Iterator[None]:
    """For a user's code: within it `os._exit` raises `SystemExit`: a run that it ended would look like a finished one.

    After it the current directory is what it was: a run's own files may be named relative to it.
    """
    here = os.open(".", os.O_RDONLY)  # which works for one that was removed, too
    process, end_at_once = os.getpid(), os._exit

    def refuse(code: int) -> None:
        if os.getpid() != process:  # a fork of the user's, which is to end so
            end_at_once(code)
        raise SystemExit(f"os._exit({code})")

    os._exit = refuse
    try:
        yield
    finally:
        os._exit = end_at_once
        os.fchdir(here)
        os.close(here)


def construct(kind: type[TeacherReward], panel: TeacherPanel, **settings) -> TeacherReward:
    """An instance of the class for the teachers of `panel`. Raises `InputError` if the constructor fails."""
    try:
        with contained():
            return kind(panel, **settings)
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:
        arguments = ", ".join(["the teachers", *settings])
        raise _error(kind, None, f"cannot be made of {arguments}: {type(error).__name__}: {error}") from error


def teacher_reward(
    name: str,
    reward: TeacherReward,
    scores: Sequence[TeacherScores],
    inputs: RewardInputs,
    allow_not_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    """A `TeacherReward`'s rewards `[B, T]` and potentials `[B, T+1]`, the weighted means over its panel's scorers.

    Raises:
        InputError: A user's class raised anything but `KeyboardInterrupt`, or returned something else than these.
    """
    if type(reward).__module__.startswith("rlkd_trl."):
        return reward.mean_over_scorers(scores, inputs), reward.mean_potentials(scores)
    try:
        with contained():
            inputs_of = [inputs if s.alignment is None else inputs.of_teacher(s.alignment) for s in scores]
            rewards = [reward.rewards(*of_scorer) for of_scorer in zip(scores, inputs_of, strict=True)]
            potentials = [reward.potentials(of_scorer) for of_scorer in scores]
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise _error(reward, name, f"raised {_shown(error, reward)}, {_of_batch(inputs)}") from error
    for rewards_BT, of_scorer in zip(rewards, inputs_of, strict=True):
        _check_scores(rewards_BT, reward, name, of_scorer.completion_mask_BT, allow_not_finite)
    for of_scorer, potentials_BT1 in zip(scores, potentials, strict=True):
        if not isinstance(potentials_BT1, Tensor) or potentials_BT1.shape != of_scorer.logsumexp.shape:
            returned = _shape_of(potentials_BT1)
            expected = f"{tuple(of_scorer.logsumexp.shape)}, one per token and one more"
            raise _error(reward, name, f"has potentials of {returned}; expected {expected}")
    rewards = [s.on_students_tokens(of_one) for of_one, s in zip(rewards, scores, strict=True)]
    potentials = [s.at_students_states(of_one) for of_one, s in zip(potentials, scores, strict=True)]
    mean_BT, mean_BT1 = (
        weighted_mean([of_scorer.detach() for of_scorer in tensors], scores) for tensors in (rewards, potentials)
    )
    return masked(mean_BT.float(), inputs.completion_mask_BT), mean_BT1.float()


def _result(function: Callable, inputs: RewardInputs) -> object:
    """What the function returns, called by its own protocol and awaited if it is asynchronous."""
    with contained():
        if not follows_trl_protocol(function):
            return function(inputs)
        result = function(**_trl_arguments(function, inputs))
        return _wait_for(result) if inspect.isawaitable(result) else result


def _trl_arguments(function: Callable, inputs: RewardInputs) -> dict[str, list]:
    """The keyword arguments that the function accepts: those of TRL, `ended`, and data columns of other names.

    Where a prompt is a conversation, its completions are too: one message of the assistant each, as in TRL.
    """
    arguments = {key: inputs.column(key) for key in inputs.rows[0] if key != "prompt"}
    prompts = inputs.column("prompt")
    completions = [
        [{"role": "assistant", "content": text}] if is_conversation(prompt) else text
        for prompt, text in zip(prompts, inputs.completions, strict=True)
    ]
    arguments |= {
        "prompts": prompts,
        "completions": completions,
        "completion_ids": inputs.token_lists(),
        "ended": inputs.ended_B.tolist(),
    }
    parameters = _parameters(function)
    for name, parameter in parameters.items():
        is_named = parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if is_named and parameter.default is parameter.empty and name not in arguments:
            available = ", ".join(arguments)
            raise _error(function, None, f"needs the argument {name!r}; what it gets by name here is: {available}")
    if _takes_any_keyword(function):
        return arguments
    return {key: arguments[key] for key in parameters if key in arguments}


def _as_tensor(result: object, function: Callable, name: str, mask_BT: Tensor) -> Tensor:
    if isinstance(result, Tensor):
        return result.detach().float()
    expected = f"it must return one number per completion, {len(mask_BT)} here, in a list or tensor"
    if isinstance(result, str | bytes | dict) or not hasattr(result, "__iter__"):
        raise _error(function, name, f"returned {_short(result)}; {expected}")
    try:
        # As in TRL, a function may return None for a sample that it does not apply to; such a sample gets no reward.
        return torch.tensor([0.0 if score is None else float(score) for score in result])
    except (TypeError, ValueError, OverflowError) as error:
        raise _error(function, name, f"returned {_short(result)}; {expected} ({error})") from error


def _check_scores(scores: object, reward: object, name: str, mask_BT: Tensor, allow_not_finite: bool) -> None:
    if not isinstance(scores, Tensor) or scores.shape != mask_BT.shape:
        raise _error(
            reward,
            name,
            f"returned {_shape_of(scores)}; expected {tuple(mask_BT.shape)} (one per token) or "
            f"{tuple(mask_BT.shape[:1])} (one per completion)",
        )
    if not allow_not_finite and not torch.isfinite(scores[mask_BT]).all():
        raise _error(reward, name, "returned NaN or infinity")


# What went wrong, in words


def _error(reward: object, name: str | None, problem: str) -> InputError:
    """The error "The reward NAME PROBLEM. It is in FILE."; without a name it is the function's or the class's."""
    name = getattr(reward, "__name__", type(reward).__name__) if name is None else name
    file = _file_of(reward)
    return InputError(f"The reward {name!r} {problem}." + (f" It is in {file}." if file else ""))


def _file_of(reward: object) -> str | None:
    code_owner = reward if inspect.isroutine(reward) or isinstance(reward, type) else type(reward)
    try:
        return inspect.getsourcefile(inspect.unwrap(code_owner))
    except (TypeError, OSError):  # made at run time
        return None


def _shown(error: BaseException, reward: object) -> str:
    """The error in words, with the innermost line of the reward's own file that led to it."""
    frames = traceback.extract_tb(error.__traceback__)
    frames_of_reward = [frame for frame in frames if frame.filename == _file_of(reward)]
    innermost = (frames_of_reward or list(frames))[-1]
    return f"{type(error).__name__}: {error} (line {innermost.lineno} of {innermost.filename})"


def _first_failing(function: Callable, inputs: RewardInputs, kind: type[BaseException]) -> str:
    """The first completion on which the function also fails by itself, in words; the batch if there is none."""
    for b in range(len(inputs.completion_ids_BT)):
        try:
            _result(function, inputs.of_completion(b))
        except KeyboardInterrupt:
            raise
        except kind:
            prompt = inputs.rows[int(inputs.prompt_index_B[b])]["prompt"]
            completion = "" if inputs.completions is None else f" with the completion {_short(inputs.completions[b])}"
            return f"on the prompt {_short(prompt)}{completion}"
        except BaseException:
            continue
    return _of_batch(inputs)


def _of_batch(inputs: RewardInputs) -> str:
    prompt = inputs.rows[int(inputs.prompt_index_B[0])]["prompt"]
    return f"on a batch of {len(inputs.completion_ids_BT)} completions that begins with the prompt {_short(prompt)}"


def _shape_of(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else _short(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


# Signatures


def _parameters(function: Callable) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def _takes_any_keyword(function: Callable) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in _parameters(function).values())


def _wait_for(awaitable: Awaitable[list[float]]) -> list[float]:
    """The awaited result, from a new thread, because in a notebook the current thread already runs an event loop."""

    async def wait() -> list[float]:
        return await awaitable

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, wait()).result()
