"""Classification of the errors of obstore 0.12, which say in their text alone what the store answered."""

from __future__ import annotations

import re

from obstore.exceptions import (
    AlreadyExistsError,
    NotFoundError,
    NotModifiedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from nanovllm.errors import CredentialsRefused, FetchFailed, NanoVLLMError, StoreUnreachable
from nanovllm.objects.errors import classify_answer

_STATUSES: dict[type[Exception], int] = {
    NotModifiedError: 304,
    UnauthenticatedError: 401,
    PermissionDeniedError: 403,
    FileNotFoundError: 404,
    NotFoundError: 404,
    AlreadyExistsError: 409,
    PreconditionError: 412,
}
_STATUS = re.compile(r"\bstatus(?: code)?: (\d{3})\b")
# The last one: the text of some errors has the key, whose characters a job chose, before the answer.
_CODE = re.compile(r".*<Error\b.*?<Code>([\w.]+)</Code>", re.DOTALL)
_KIND = re.compile(r"\bkind: (Connect|Request|Timeout|Interrupted|Decode|Unknown)\b")
# A connection that takes too long is a Timeout whose source is this.
_CONNECTING = re.compile(r"legacy::Error\(\s*Connect,")
_TOKEN = re.compile(r"\bToken(?:Request|ResponseBody) \{")


def answer_of(error: Exception) -> tuple[int, str]:
    """The HTTP status (0: there was no answer) and the error code ("": none) of the store's answer."""
    text = str(error)
    status = _STATUSES.get(type(error), 0)
    if not status and not _TOKEN.search(text):
        if "BareRedirect" in text:
            status = 301
        elif match := _STATUS.search(text):
            status = int(match[1])
    code = _CODE.match(text) if status else None
    return status, code[1] if code else ""


def is_unread(error: Exception) -> bool:
    """Whether the store answered what obstore does not follow or read, and another client might.

    A redirect, whose signature is dropped at another host (then 403), a region that it names, a header that is no
    ASCII or is missing.
    """
    status, code = answer_of(error)
    if status:
        return status == 403 or (300 <= status < 400 and status != 304) or code == "AuthorizationHeaderMalformed"
    text = str(error)
    return not _KIND.search(text) and not _TOKEN.search(text) and "credential" not in text.lower()


def classify_obstore(error: Exception) -> NanoVLLMError:
    """What a failure of obstore means for the job. The message never repeats URLs, paths or credentials."""
    status, code = answer_of(error)
    if status:
        return classify_answer(code, status)
    text, kind = str(error), _KIND.search(str(error))
    if _TOKEN.search(text):
        return CredentialsRefused("no usable credentials for the object store: it gives no token for them")
    if _CONNECTING.search(text) or (kind and kind[1] == "Connect"):
        return StoreUnreachable("the object store cannot be reached: Connect")
    if kind:
        return FetchFailed(f"the object store broke off: {kind[1]}")
    if "Missing" in text:
        return StoreUnreachable(
            "what answers at the endpoint of the object store is no object store: a header is missing"
        )
    return CredentialsRefused(f"obstore cannot ask the object store: {type(error).__name__}")
