"""Faults of servers: which answers are the request's own fault, and which are the server's."""

from __future__ import annotations

import json
import time
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from nanovllm.engine.backends.foreign_errors import refusal, shown
from nanovllm.errors import AnswerFailed, InvalidInput, NanoVLLMError

FaultKind = Literal["connect", "timeout", "reset", "overloaded", "error", "garbage", "refused"]

MAX_RETRY_AFTER_S = 300.0
_OF_THE_REQUEST = (400, 413, 422)
_BUSY = (429, 503)
_TOO_LONG_CODE = "context_length_exceeded"
_REFUSED_WITH_500 = ("image input is not supported",)
"""What llama.cpp's server says to a picture that it has no encoder for, as if it had failed."""
_UNREADABLE = "produced output that does not match the expected"
"""What it says where its parser of answers (off by ``--skip-chat-parsing``) does not take what the model wrote."""


class EndpointFault(Exception):
    """A failure that is the server's, not the request's.

    ``retry_after_s``: seconds for which the server wants no requests; None where it does not say.
    """

    def __init__(self, kind: FaultKind, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after_s = retry_after_s


def fault_of_answer(status: int, headers: Any, body: bytes, secrets: tuple[str, ...]) -> EndpointFault | NanoVLLMError:
    """What an answer other than 200 means; ``secrets`` never show in its message."""
    if status in (401, 403):
        # Its text is left out: servers quote the key.
        return EndpointFault("refused", f"answers {status}: it refuses the API key, or its lack")
    if status in _BUSY and (status == 429 or headers.get("retry-after") is not None):
        return EndpointFault("overloaded", f"answers {status}", retry_after(headers.get("retry-after")))
    said = error_text(body, secrets)
    if said is not None and (found := fault_in_words(said)) is not None:
        return found
    if status in _OF_THE_REQUEST and said is not None:
        return request_fault(said)
    return EndpointFault("error", f"answers {status}" + (f": {said}" if said else ""))


def fault_in_words(said: str) -> InvalidInput | AnswerFailed | None:
    """The error of a request that a server would fail with again, by its words alone; None: they do not say so."""
    if any(sign in said for sign in _REFUSED_WITH_500):
        return request_fault(said)
    if _UNREADABLE in said:
        return AnswerFailed(f"the server cannot read the answer: {said}")
    return None


def request_fault(said: str) -> InvalidInput:
    """The error of a request that a server refuses in the words ``said``."""
    return refusal(said, "the server")


def error_text(body: bytes, secrets: tuple[str, ...]) -> str | None:
    """The message of an error in JSON, in one printable line; None for any other body."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return message_in(value, secrets) if isinstance(value, dict) else None


def message_in(value: dict[str, Any], secrets: tuple[str, ...]) -> str | None:
    """As ``error_text``, of a decoded object: ``error.message`` and what other servers write in its place."""
    error = value.get("error")
    said = error.get("message") if isinstance(error, dict) else error
    said = said or value.get("message") or value.get("detail")
    if said is None:
        return None
    if isinstance(error, dict) and error.get("code") == _TOO_LONG_CODE:
        said = f"{said} ({_TOO_LONG_CODE})"
    return shown(said if isinstance(said, str) else json.dumps(said), secrets)


def retry_after(value: str | None) -> float | None:
    """Seconds of a ``Retry-After`` header, a number or a date; None where there is none that can be read."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError, OSError):
            return None
    return min(max(0.0, seconds), MAX_RETRY_AFTER_S) if seconds == seconds else None
