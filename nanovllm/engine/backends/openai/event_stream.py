"""Server-sent events of an answer, within bounds."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

from nanovllm.engine.backends.openai.faults import EndpointFault

MAX_EVENT_BYTES = 8 * 2**20
MAX_ANSWER_BYTES = 256 * 2**20
_DONE = b"[DONE]"


async def event_data(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The data of each event in a stream of bytes. Raises EndpointFault for a stream beyond the bounds."""
    rest, data, total = b"", b"", 0
    async for chunk in chunks:
        total += len(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                value = line[5:].removeprefix(b" ")
                data = data + b"\n" + value if data else value
            elif not line and data:
                yield data
                data = b""
        if max(len(rest), len(data)) > MAX_EVENT_BYTES or total > MAX_ANSWER_BYTES:
            raise EndpointFault("garbage", "answers more than a text has")
    if data:
        yield data


async def events(chunks: AsyncIterable[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The objects in the events of a stream, up to its ``[DONE]``. Raises EndpointFault for anything else in it."""
    async for data in event_data(chunks):
        if data == _DONE:
            return
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            raise EndpointFault("garbage", "answers an event that is no JSON") from None
        if not isinstance(event, dict):
            raise EndpointFault("garbage", "answers an event that is no object")
        yield event
