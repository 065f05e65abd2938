"""Server-sent events of an answer, within bounds and in time linear in their bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from nanovllm.engine.backends.openai.faults import EndpointFault

MAX_EVENT_BYTES = 8 * 2**20
"""The first event of vLLM has the prompt's token ids."""
MAX_ANSWER_BYTES = 256 * 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_DONE = b"[DONE]"


class EventStream:
    """Takes the bytes of a stream as they come. ``is_done``: its ``[DONE]`` was among them."""

    def __init__(self, max_bytes: int = MAX_ANSWER_BYTES) -> None:
        self.is_done = False
        self._max_bytes = max_bytes
        self._bytes = 0
        self._line = bytearray()
        self._data = bytearray()
        self._is_first_line = True
        self._ends_with_cr = False

    def add(self, chunk: bytes) -> Iterator[dict[str, Any]]:
        """The objects of the events that ``chunk`` completes.

        Raises:
            EndpointFault: an event is no object in JSON, or the stream is beyond its bounds.
        """
        self._bytes += len(chunk)
        if self._ends_with_cr:
            chunk = chunk.removeprefix(b"\n")
        self._ends_with_cr = chunk.endswith(b"\r")
        for line in chunk.splitlines(keepends=True):
            self._line += line
            if len(self._line) + len(self._data) > MAX_EVENT_BYTES or self._bytes > self._max_bytes:
                raise EndpointFault("garbage", "answers more than a text has")
            if line.endswith((b"\n", b"\r")):
                yield from self._end_line()
                if self.is_done:
                    return

    def end(self) -> Iterator[dict[str, Any]]:
        """The object of an event that the end of the stream completes. Raises EndpointFault, as `add`."""
        yield from self._end_line()
        yield from self._end_event()

    def _end_line(self) -> Iterator[dict[str, Any]]:
        line = bytes(self._line).rstrip(b"\r\n")
        self._line.clear()
        if self._is_first_line:
            line = line.removeprefix(_BYTE_ORDER_MARK)
            self._is_first_line = False
        if not line:
            yield from self._end_event()
        elif line.startswith(b"data:"):
            self._data += line[5:].removeprefix(b" ") + b"\n"

    def _end_event(self) -> Iterator[dict[str, Any]]:
        data = bytes(self._data).strip()
        self._data.clear()
        if data == _DONE:
            self.is_done = True
        elif data:
            yield _object(data)


def _object(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        raise EndpointFault("garbage", "answers an event that is no JSON") from None
    if not isinstance(event, dict):
        raise EndpointFault("garbage", "answers an event that is no object")
    return event
