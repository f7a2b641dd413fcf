"""A client of the OpenAI-compatible completions API, for the log-probabilities of texts that are given.

`POST /v1/completions` with token ids as the prompt is read in one of two ways, whichever the server speaks:

    prompt_logprobs    vLLM's: for each id of the prompt its log-probability, and that of the most likely id
    echo               with `logprobs`: the same of the tokens of prompt and completion, as texts

One token is generated, for the state after the last given one. Requests that fail for a while (connections, timeouts,
429, 5xx) are repeated, with growing pauses, for `patience` seconds. The texts of the tokens that the server says it
has read are compared with those of the ids that were sent. An API key is never part of a message, whatever the server
answers.
"""

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from http.client import HTTPException
from time import monotonic
from typing import Protocol
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

from rlkd_trl.errors import InputError, ServerError
from rlkd_trl.teachers.server_secrets import ApiKey, checked_url
from rlkd_trl.teachers.server_signals import signals_heard

_TEXTS_PER_REQUEST = 8
_CHECK_SECONDS = 10.0  # that a request may take when a server is tried out
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds
_POLL_SECONDS = 0.25  # between looks at whether a signal has come
_UNREADABLE = "\ufffd"  # in a text, for a token that is a part of a character


@dataclass(frozen=True)
class TextLogProbs:
    """Of n given ids: log p of each id but the first, and of the most likely id in each state, the last one's too.

    chosen: n − 1 numbers, of ids 2 to n. best: n, of the states after ids 1 to n; the last is None if the server
    does not tell it.
    """

    chosen: list[float]
    best: list[float | None]


class Vocabulary(Protocol):
    """What a tokenizer is needed for: the texts of an id, which servers with `echo` answer with."""

    def decode(self, ids: list[int]) -> str: ...

    def convert_ids_to_tokens(self, index: int) -> str: ...


class _Temporary(Exception):
    """A failure that may pass. pause: the seconds for which the server asks, if it does."""

    def __init__(self, reason: str, pause: float | None = None):
        super().__init__(reason)
        self.pause = pause


class _Refused(Exception):
    """An answer that will not change."""


class _NoRedirects(HTTPRedirectHandler):
    """A key is not sent on to another place."""

    def redirect_request(self, *args, **kwargs):
        return None


class CompletionsClient:
    """Asks one model behind a server.

    Args:
        url: Where the server is: http://host:8000, with or without /v1 behind it.
        vocabulary: The tokenizer of the model.
        model: The model's name; by default the only one that the server has.
        api_key: Sent as a bearer token.
        timeout: Seconds that one request may take.
        patience: Seconds for which a failing request is repeated.
        concurrency: Requests at a time.

    Raises:
        InputError: The URL is none, or holds a password or a key, or the key cannot be sent.
    """

    def __init__(
        self,
        url: str,
        vocabulary: Vocabulary,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 60.0,
        patience: float = 120.0,
        concurrency: int = 8,
    ):
        self.url, self.model = checked_url(url), model
        self.vocabulary, self.timeout, self.patience, self.concurrency = vocabulary, timeout, patience, concurrency
        self._key = ApiKey(api_key)
        self._opener: OpenerDirector = build_opener(_NoRedirects)
        self._speaks_echo = False
        self.max_length: int | None = None
        self.probe: list[float] = []

    def connect(self, sample_ids: Sequence[int]) -> None:
        """Finds the model and how the server is asked, with one request for a text of `sample_ids`, and no repeats.

        Of the ids only as many are sent as the server takes. `probe` has what it tells about them.

        Raises:
            InputError: There is no such server or model, it refuses the key, or does not tell log-probabilities,
                has another tokenizer, or its name holds the key.
        """
        try:
            listed = self._once("/models", None, timeout=min(self.timeout, _CHECK_SECONDS))["data"]
            names = [entry["id"] for entry in listed]
        except (_Temporary, _Refused) as failure:
            raise InputError(f"The teacher's server {self.url} cannot be asked: {failure}") from None
        except (KeyError, TypeError):
            raise InputError(f"{self.url} is no server of the completions API: it lists no models.") from None
        listing = self._key.clean(", ".join(names))
        if self.model is None and len(names) != 1:
            raise InputError(f"The server {self.url} has {len(names)} models: name one of {listing}.")
        self.model = self.model or names[0]
        if self.model not in names:
            raise InputError(f"The server {self.url} has no model {self.model!r}: name one of {listing}.")
        if self._key.is_part_of(self.model):
            raise InputError(f"The name of the model that the server {self.url} has holds the API key: rename it.")
        length = next(entry for entry in listed if entry["id"] == self.model).get("max_model_len")
        self.max_length = length if isinstance(length, int) else None
        sample_ids = sample_ids[: None if self.max_length is None else self.max_length - 1]
        failures = []
        for self._speaks_echo in (False, True):
            try:
                [answer] = self._read_once([list(sample_ids)], timeout=min(self.timeout, _CHECK_SECONDS))
                self.probe = answer.chosen
                return
            except (_Temporary, _Refused) as failure:
                failures.append(str(failure))
        raise InputError(
            f"The server {self.url} does not tell the log-probabilities of a given text. With prompt_logprobs: "
            f"{failures[0]} With echo: {failures[1]}"
        )

    def read(self, texts: Sequence[Sequence[int]]) -> list[TextLogProbs]:
        """The log-probabilities of texts of at least one id each; a few texts per request, some requests at a time.

        Raises:
            ServerError: The server refuses a request, has read other tokens, or has failed for all of `patience`.
            Interrupted: A signal to stop has come in the main thread, and five seconds have passed without an answer.
        """
        parts = [texts[start : start + _TEXTS_PER_REQUEST] for start in range(0, len(texts), _TEXTS_PER_REQUEST)]
        answers: list[Future[list[TextLogProbs]]] = [Future() for _ in parts]
        turns, given_up = iter(list(zip(answers, parts, strict=True))), threading.Event()

        def ask() -> None:
            for answer, part in turns:  # a list's iterator, which threads may share
                try:
                    answer.set_result(self._read_patiently(part, given_up))
                except Exception as error:
                    answer.set_exception(error)
                if given_up.is_set():
                    return

        with signals_heard() as heard:
            for _ in range(min(self.concurrency, len(parts))):
                # Not a pool's: the interpreter would wait for its requests before it exits.
                threading.Thread(target=ask, name="teacher", daemon=True).start()
            try:
                waiting = set(answers)
                while waiting:
                    done, waiting = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_EXCEPTION)
                    for answer in done:
                        answer.result()
                    if done:
                        heard.answered()
                    heard.obey(self.url)
            finally:  # the other requests are not repeated any longer
                given_up.set()
        return [text for answer in answers for text in answer.result()]

    def _read_patiently(self, texts: Sequence[Sequence[int]], given_up: threading.Event) -> list[TextLogProbs]:
        began, pause, tries = monotonic(), _FIRST_PAUSE, 0
        while True:
            tries += 1
            try:
                return self._read_once(texts, timeout=self.timeout)
            except _Refused as refusal:
                raise ServerError(f"The teacher's server {self.url} refuses: {refusal}") from None
            except _Temporary as failure:
                wait = pause if failure.pause is None else max(failure.pause, pause)
                if monotonic() - began + wait > self.patience or given_up.wait(wait):
                    raise ServerError(
                        f"The teacher's server {self.url} has not answered in {monotonic() - began:.0f} s and {tries} "
                        f"tries; the last time: {failure}"
                    ) from None
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _read_once(self, texts: Sequence[Sequence[int]], *, timeout: float) -> list[TextLogProbs]:
        """One request. Raises `_Temporary` or `_Refused`."""
        how = {"echo": True} if self._speaks_echo else {"prompt_logprobs": 1}
        body = {"model": self.model, "prompt": [list(ids) for ids in texts], "max_tokens": 1, "temperature": 1.0}
        answer = self._once("/completions", {**body, "logprobs": 1, **how}, timeout=timeout)
        read = self._echoed if self._speaks_echo else self._prompt_logprobs
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            if len(choices) != len(texts):
                raise _Refused(f"it answers {len(choices)} of {len(texts)} texts.")
            return [read(choice, ids) for choice, ids in zip(choices, texts, strict=True)]
        except (KeyError, TypeError, IndexError, ValueError, AttributeError):
            raise _Refused("its answer has not the log-probabilities that were asked for.") from None

    def _prompt_logprobs(self, choice: Mapping, ids: Sequence[int]) -> TextLogProbs:
        states = choice["prompt_logprobs"]
        if len(states) != len(ids):
            raise _Refused(f"it has read {len(states)} tokens, and {len(ids)} were sent.")
        chosen, best = [], []
        for index, of_state in zip(ids[1:], states[1:], strict=True):
            logps = {int(token): _number(entry["logprob"]) for token, entry in of_state.items()}
            if index not in logps:
                raise _Refused(f"it has read other tokens than were sent: not {index}, but {sorted(logps)}.")
            self._check_token(index, of_state[str(index)].get("decoded_token") or "")
            chosen.append(logps[index])
            best.append(max(logps.values()))
        return TextLogProbs(chosen, [*best, _best(choice["logprobs"], 0)])

    def _echoed(self, choice: Mapping, ids: Sequence[int]) -> TextLogProbs:
        logprobs = choice["logprobs"]
        tokens, numbers = logprobs["tokens"], logprobs["token_logprobs"]
        if not len(ids) <= len(tokens) <= len(ids) + 1:
            raise _Refused(f"it has read {len(tokens)} tokens, and {len(ids)} were sent.")
        for index, token in zip(ids, tokens, strict=False):
            self._check_token(index, token)
        chosen = [_number(number) for number in numbers[1 : len(ids)]]
        best = [max(_best(logprobs, t), chosen[t - 1]) for t in range(1, len(ids))]
        return TextLogProbs(chosen, [*best, _best(logprobs, len(ids))])

    def _check_token(self, index: int, text: str) -> None:
        """Raises `_Refused` if a text is not the token's; a part of a character cannot be told from another one."""
        piece, decoded = self.vocabulary.convert_ids_to_tokens(index), self.vocabulary.decode([index])
        is_part = not text or _UNREADABLE in text or _UNREADABLE in decoded or text.startswith("bytes:")
        if not (is_part or text in (piece, f"token_id:{index}") or text.strip() == decoded.strip()):
            raise _Refused(
                f"it has read other tokens than were sent: {self._key.clean(repr(text))} for id {index}, which is "
                f"{decoded!r} in the tokenizer that was given. Give that of the served model."
            )

    def _once(self, path: str, body: Mapping | None, *, timeout: float) -> dict:
        """The answer of one request, as JSON. Raises `_Temporary` or `_Refused`."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", **self._key.headers}
        data = None if body is None else json.dumps(body).encode()

        def answer() -> bytes:
            with self._opener.open(Request(f"{self.url}{path}", data, headers), timeout=timeout) as response:
                return response.read()

        try:
            return json.loads(_within(timeout, answer))
        except HTTPError as error:
            said = f"{error.code} {self._key.clean(_content(error))}".rstrip(" .") + "."
            if error.code == 429 or error.code >= 500:
                raise _Temporary(said, _seconds(error.headers.get("Retry-After"))) from None
            raise _Refused(said) from None
        except ValueError:  # of JSON
            raise _Refused("its answer is not JSON.") from None
        except (URLError, HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise _Temporary(f"{self._key.clean(str(reason) or type(error).__name__)}.") from None


def _within(seconds: float, call: Callable[[], bytes]) -> bytes:
    """What the call returns or raises; `TimeoutError` after that time, which a socket's own timeout is not.

    A call that takes longer is left behind in its thread.
    """
    result: Future[bytes] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=run, name="teacher's answer", daemon=True).start()
    try:
        return result.result(seconds)
    except FutureTimeoutError:  # also a socket's, as TimeoutError
        raise TimeoutError(f"no whole answer in {seconds:g} s") from None


def _best(logprobs: Mapping, position: int) -> float | None:
    """The largest log-probability that is listed there; None behind the end."""
    listed = logprobs["top_logprobs"]
    if position >= len(listed) or not listed[position]:
        return None
    return max(map(_number, listed[position].values()))


def _number(value: object) -> float:
    """A log-probability. Raises `ValueError` for what is none; minus infinity and NaN are for the trainer to drop."""
    number = float(value)
    if number > 1e-3:
        raise ValueError("a log-probability above 0")
    return number


def _content(error: HTTPError) -> str:
    try:
        return error.read().decode(errors="replace")
    except (OSError, HTTPException):
        return ""


def _seconds(text: str | None) -> float | None:
    try:
        seconds = float(text)
    except (TypeError, ValueError):
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
