"""Which image of a job an error is about: its position, and its object where the job names one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from nanovllm.errors import NanoVLLMError
from nanovllm.messages.job import ImageRef
from nanovllm.pipeline.stages.failure import first_cause

MAX_URI_CHARS = 200

# A key is taken literally: one that was pasted from a URL can hold a signature or a password.
_QUERY = re.compile(r"(\?|#|%3f).*", re.IGNORECASE | re.DOTALL)
_USER = re.compile(r"//[^/@]*@")


def naming_image(refs: Sequence[ImageRef]) -> AbstractContextManager[None]:
    """Raise the first cause of an ExceptionGroup of `gather` inside, its image named: ``refs`` are those gathered."""
    return _naming_image(refs) if refs else nullcontext()


@contextmanager
def _naming_image(refs: Sequence[ImageRef]) -> Iterator[None]:
    try:
        yield
    except ExceptionGroup as group:
        error = first_cause(group)
        if not isinstance(error, NanoVLLMError) or error.position is None:
            raise
        raise of_image(error, error.position, refs) from error


def of_image(error: NanoVLLMError, position: int, refs: Sequence[ImageRef]) -> NanoVLLMError:
    """``error`` with the image at ``position``, from 1, named in its text; the same where ``refs`` are not several."""
    if len(refs) < 2:
        return error
    uri = refs[position - 1].uri
    where = f" ({_shown(uri)})" if uri else ""
    return type(error)(f"image {position} of {len(refs)}{where}: {error}")


def _shown(uri: str) -> str:
    shown = _USER.sub("//", _QUERY.sub("", uri))
    half = MAX_URI_CHARS // 2
    return shown if len(shown) <= MAX_URI_CHARS else f"{shown[:half]}…{shown[-half:]}"
