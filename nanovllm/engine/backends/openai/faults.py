"""Faults of servers: which answers are the request's own fault, and which are the server's."""

from __future__ import annotations

import json
import time
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from nanovllm.engine.backends.foreign_errors import is_too_long, refusal
from nanovllm.engine.backends.openai.error_words import ServerError, error_in
from nanovllm.errors import AnswerFailed, AnswerWithheld, InvalidInput, NanoVLLMError

FaultKind = Literal["connect", "timeout", "reset", "overloaded", "error", "garbage", "refused", "missing"]

MAX_RETRY_AFTER_S = 300.0
TOO_LARGE = 413
_OF_THE_REQUEST = (400, TOO_LARGE, 422)
NOT_FOUND = (404, 405)
_BUSY = (429, 503)
_RATE_LIMIT = "rate_limit_exceeded"
"""Groq's code for a limit per minute, whatever the status."""
_NO_SUCH_KEY, _NO_SUCH_MODEL = "invalid_api_key", "model_not_found"
_FILTERS = ("content_filter", "responsibleaipolicyviolation")
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


def not_of_the_protocol(what: str) -> EndpointFault:
    """The fault of a server whose answer has ``what`` in a form that no reading makes sense of."""
    return EndpointFault("garbage", f"answers what is not of the protocol: {what}")


def withheld(why: str) -> AnswerWithheld:
    """The error of a request that a server, or its model, gives no answer to."""
    return AnswerWithheld(f"the server withheld the answer: {why}")


def fault_of_answer(status: int, headers: Any, body: bytes, secrets: tuple[str, ...]) -> EndpointFault | NanoVLLMError:
    """What an answer other than 200 means; ``secrets`` never show in its message."""
    try:
        error = error_in(json.loads(body), secrets)
    except (ValueError, RecursionError):
        error = None
    return _fault(status, headers.get("retry-after"), error)


def fault_in_answer(event: dict[str, Any], secrets: tuple[str, ...]) -> EndpointFault | NanoVLLMError:
    """What an error means that comes as an event in the middle of an answer."""
    error = error_in(event, secrets) or ServerError("no message")
    fault = _fault(error.status or 500, None, error)
    return (
        EndpointFault(fault.kind, f"fails in mid-answer: {error.said}") if isinstance(fault, EndpointFault) else fault
    )


def _fault(status: int, wait: str | None, error: ServerError | None) -> EndpointFault | NanoVLLMError:
    codes = error.codes if error is not None else frozenset()
    if status in (401, 403) or _NO_SUCH_KEY in codes:
        # Its text is left out: servers quote the key.
        return EndpointFault("refused", f"answers {status}: it refuses the API key, or its lack")
    if status == 429 or (status in _BUSY and wait is not None) or _RATE_LIMIT in codes:
        return EndpointFault("overloaded", f"answers {status}", retry_after(wait))
    if error is not None and (found := _fault_in_words(error)) is not None:
        return found
    if status in _OF_THE_REQUEST and error is not None and _NO_SUCH_MODEL not in codes:
        return refusal(error.said, "the server")
    if status == TOO_LARGE:
        return InvalidInput("the server refuses the request: 413, its body is too large")
    kind: FaultKind = "missing" if status in NOT_FOUND else "error"
    return EndpointFault(kind, f"answers {status}" + (f": {error.said}" if error is not None else ""))


def _fault_in_words(error: ServerError) -> InvalidInput | AnswerFailed | AnswerWithheld | None:
    """The error of a request that a server would fail with again, by its words and codes alone."""
    if not error.codes.isdisjoint(_FILTERS):
        return withheld(error.said)
    if is_too_long(error.said) or any(sign in error.said for sign in _REFUSED_WITH_500):
        return refusal(error.said, "the server")
    if _UNREADABLE in error.said:
        return AnswerFailed(f"the server cannot read the answer: {error.said}")
    return None


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
