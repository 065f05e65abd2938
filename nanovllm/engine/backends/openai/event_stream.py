"""Server-sent events of an answer, within bounds."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

from nanovllm.engine.backends.openai.faults import EndpointFault

MAX_EVENT_BYTES = 8 * 2**20
"""The first event of vLLM has the prompt's token ids."""
MAX_ANSWER_BYTES = 256 * 2**20
_DONE = b"[DONE]"


async def event_data(chunks: AsyncIterable[bytes], max_bytes: int = MAX_ANSWER_BYTES) -> AsyncIterator[bytes]:
    """The data of each event in a stream of bytes. Raises EndpointFault for a stream beyond the bounds."""
    rest, total, size = b"", 0, 0
    data: list[bytes] = []
    async for chunk in chunks:
        total += len(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
                size += len(line)
            elif not line and data:
                yield b"\n".join(data)
                data, size = [], 0
        if max(len(rest), size) > MAX_EVENT_BYTES or total > max_bytes:
            raise EndpointFault("garbage", "answers more than a text has")
    if data:
        yield b"\n".join(data)


async def events(chunks: AsyncIterable[bytes], max_bytes: int = MAX_ANSWER_BYTES) -> AsyncIterator[dict[str, Any]]:
    """The objects in the events of a stream, up to its ``[DONE]``.

    Raises:
        EndpointFault: there is anything else in it, or more than ``max_bytes``.
    """
    async for data in event_data(chunks, max_bytes):
        if data == _DONE:
            return
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            raise EndpointFault("garbage", "answers an event that is no JSON") from None
        if not isinstance(event, dict):
            raise EndpointFault("garbage", "answers an event that is no object")
        yield event
