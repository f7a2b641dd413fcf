"""What must not be in messages and files: the key of a teacher's server, and URLs that hold secrets."""

import html
import re
from urllib.parse import unquote, urlsplit

from rlkd_trl.errors import InputError

_QUOTED = 300  # characters of a server's answer in a message
_KEY_PIECE = 8  # characters of a key by which it is recognised


class ApiKey:
    """The key that a server wants, if any. Raises `InputError` for one that no header can have."""

    def __init__(self, key: str | None):
        self._key = None if key is None else key.strip()
        if key is not None and not (self._key and self._key.isascii() and self._key.isprintable()):
            raise InputError("The API key is empty, or has characters that no header can have: correct it.")

    @property
    def headers(self) -> dict[str, str]:
        """Those of a request that shows it."""
        return {} if self._key is None else {"Authorization": f"Bearer {self._key}"}

    def clean(self, text: str) -> str:
        """A text of the server for a message: short, on one line, and without the key."""
        if self._key is not None:
            text = text.replace(self._key, "***")
            text = "its answer repeats the key, and is not shown" if self._is_repeated_in(text) else text
        text = " ".join(text.split())
        return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}…"

    def is_part_of(self, name: str) -> bool:
        """Whether a name holds the key; a key of a few characters may stand in any name."""
        return self._key is not None and len(self._key) >= _KEY_PIECE and self._is_repeated_in(name)

    def _is_repeated_in(self, text: str) -> bool:
        """Whether a piece of the key is there, as it is or escaped for JSON, HTML or URLs."""
        starts = range(max(1, len(self._key) - _KEY_PIECE + 1))
        readings = {text, _without_backslashes(text), html.unescape(text), unquote(text)}
        readings.add(_without_backslashes(unquote(html.unescape(text))))
        return any(self._key[i : i + _KEY_PIECE] in reading for i in starts for reading in readings)


def _without_backslashes(text: str) -> str:
    """A text with JSON's escapes, as it is without them."""
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda escape: chr(int(escape[1], 16)), text)
    return re.sub(r"\\(.)", r"\1", text)


def checked_url(url: str) -> str:
    """The URL with /v1. Raises `InputError` if it is none, or holds what must not be in messages and files."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InputError(
            "The URL of the teacher's server holds a name, a password or parameters, which would be written down with "
            "the run: give the key by the name of an environment variable."
        )
    if parts.scheme not in ("http", "https") or not host:
        raise InputError(f"The teacher's server {url!r} is no URL: give http://HOST:PORT, or https://HOST.")
    trimmed = url.rstrip("/")
    return trimmed if trimmed.endswith("/v1") else f"{trimmed}/v1"
