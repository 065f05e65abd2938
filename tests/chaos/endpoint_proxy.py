"""A proxy before a server of OpenAI's protocol: spoils its answers, and notes what a client must not do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import formatdate, parsedate_to_datetime
from random import Random

from openai_server import OpenAIServer

from nanovllm.demo.child_process import free_port
from nanovllm.engine.backends.openai.faults import FaultKind

FAULTS: Mapping[str, FaultKind | None] = {
    # Connections.
    "refuse": "connect",
    "reset": "reset",
    "reset_midway": "reset",
    "half": "reset",
    "hang": "timeout",
    "hang_midway": "timeout",
    "slow": None,
    # Answers.
    "busy": "overloaded",
    "busy_seconds": "overloaded",
    "busy_date": "overloaded",
    "unavailable": "error",
    "unavailable_seconds": "overloaded",
    "error": "error",
    "unauthorized": "refused",
    "redirect": "error",
    "wrong_type": "garbage",
    "error_body": "garbage",
    "huge_error": "error",
    "compressed": "garbage",
    "images_unreachable": None,
    "other_list": "error",
    # Streams.
    "garbage": "garbage",
    "error_event": "error",
    "truncated": "reset",
    "endless": "garbage",
    "endless_line": "garbage",
    "endless_silence": "timeout",
    "other_model": "garbage",
    "mute": "timeout",
}
"""Every fault, and the kind that a worker counts it as; None: it is none, or not of the endpoint alone.

``mute`` lists its model and answers nothing; ``hang`` does not even list it. ``images_unreachable`` refuses requests
with URLs of images, as a server does that cannot fetch them. ``endless_silence`` sends comments for ever.
"""
STREAMS = frozenset(
    {
        *("reset_midway", "half", "hang_midway", "slow", "compressed", "garbage", "error_event", "truncated"),
        *("endless", "endless_line", "endless_silence", "other_model"),
    }
)
"""Faults in the answer to a completion; a list of models passes."""
RETRY_AFTER_S = 3.0
GRACE_S = 1.0
"""In which requests may still come that were under way when the client read that it must not send any."""
CLOSING_S = 0.5
"""At most that long ago a client has closed the connection whose end is seen now."""
FLOOD = b"x" * 65_536


@dataclass
class Pause:
    """Time of day (seconds since 1970) between which a client sends nothing."""

    begun: float
    until: float


@dataclass
class EndpointProxy:
    """Stands before ``server`` on a port of its own; ``trap``: the URL that redirections lead to.

    A request meets ``fault`` at the chance ``share``. Clients are told apart by their API keys. ``struck`` counts
    requests by the fault that they met, ``early`` names those that came before the time of a ``Retry-After``.
    """

    server: OpenAIServer
    trap: str
    random: Random
    fault: str | None = None
    share: float = 1.0
    port: int = field(default_factory=free_port)
    struck: Counter[str] = field(default_factory=Counter)
    early: list[str] = field(default_factory=list)
    answered: int = 0
    most_bytes: int = 0
    """The most that a client has read of one answer that does not end."""
    _pauses: dict[str, Pause] = field(default_factory=dict)
    _visits: dict[str, list[tuple[float, float, str]]] = field(default_factory=lambda: defaultdict(list))
    _listener: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def start(self) -> None:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def stop(self) -> None:
        """Refuse connections, and cut those that there are."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for writer in tuple(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    def most_at_once(self) -> dict[str, list[str]]:
        """By client: the most requests that it had here at a time, each by the fault that it met."""
        most = {}
        for client, visits in self._visits.items():
            at_begins = (
                [fault for begun, ended, fault in visits if begun <= moment < ended] for moment, _, _ in visits
            )
            most[client] = max(at_begins, key=len)
        return most

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while await self._serve_one(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection may serve another request."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        request = head + (await reader.readexactly(int(length[1])) if length else b"")
        key = re.search(rb"(?i)\r\nauthorization: bearer (\S+)", head)
        visit = Visit(self, key[1].decode() if key else "", reader, writer)
        self._check_pause(visit.client)
        is_completion = head.startswith(b"POST")
        fault = self.fault if self.random.random() < self.share else None
        if fault in STREAMS | {"mute"} and not is_completion:
            fault = None
        if fault == "images_unreachable" and b'"url":"http' not in request:
            fault = None
        if fault is not None:
            self.struck[fault] += 1
        begun = time.monotonic()
        try:
            return await visit.answer(fault, request)
        finally:
            if is_completion:
                ended = visit.ended or time.monotonic() - CLOSING_S
                self._visits[visit.client].append((begun, ended, fault or "none"))

    def _check_pause(self, client: str) -> None:
        pause, now = self._pauses.get(client), time.time()
        if pause is not None and pause.begun + GRACE_S < now < pause.until:
            self.early.append(f"{now - pause.begun:.2f} s into a pause of {pause.until - pause.begun:.2f} s")

    def pause(self, client: str, until: float) -> None:
        """``client`` has read that it shall send nothing ``until`` then."""
        now, last = time.time(), self._pauses.get(client)
        begun = now if last is None or last.until < now else last.begun
        self._pauses[client] = Pause(begun, max(until, last.until if last else 0.0))


@dataclass
class Visit:
    """One request of one client, and its answer; ``ended``: when its answer did, None where the client went away."""

    proxy: EndpointProxy
    client: str
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    ended: float | None = None

    async def answer(self, fault: str | None, request: bytes) -> bool:
        """Whether the connection may serve another request."""
        match fault:
            case "reset":
                return self._abort()
            case "hang" | "mute":
                await self.reader.read()
                return False
            case "busy" | "busy_seconds" | "busy_date" | "unavailable" | "unavailable_seconds":
                return await self._busy(fault)
            case "huge_error":
                await self._send(500, b"", length=2**40)
                return await self._flood(FLOOD)
        canned = _canned(fault, self.client, self.proxy.trap, is_list=request.startswith(b"GET"))
        if canned is not None:
            status, body, more = canned
            await self._send(status, body, more)
            return True
        answer = await self._ask(request)
        if answer is None:
            return False
        head, body = answer
        if fault is None:
            self.ended = time.monotonic()
            self.proxy.answered += request.startswith(b"POST")
            self.writer.write(head + body)
            await self.writer.drain()
            return True
        return await self._spoil(fault, head, body)

    async def _spoil(self, fault: str, head: bytes, body: bytes) -> bool:
        if b"chunked" not in head:  # the server refuses the request: no stream to spoil
            self.ended = time.monotonic()
            self.writer.write(head + body)
            return True
        events = _payload(body)
        middle = events.index(b"\n\n", len(events) // 2) + 2
        if fault == "compressed":
            head = head.replace(b"content-type", b"content-encoding: gzip\r\ncontent-type")
            await self._write(head + _chunk(_bomb()))
            return self._end()
        if fault == "other_model":
            events, middle = re.sub(rb'"model": "[^"]+"', b'"model": "other"', events).replace(b"Say", b"Do not"), -1
        sent = events if middle < 0 else events[:middle]
        sent += {
            "garbage": b"data: {no json\n\n",
            "error_event": b'data: {"error": {"message": "CUDA error", "code": 500}}\n\n',
            "truncated": events[middle : middle + 9],
        }.get(fault, b"")
        await self._write(head + _chunk(sent))
        match fault:
            case "reset_midway":
                return self._abort()
            case "half":
                return self._end(is_whole=False)
            case "hang_midway":
                await self.reader.read()
                return False
            case "slow":
                for byte in events[middle:-1]:
                    await self._write(_chunk(bytes([byte])))
                    await asyncio.sleep(0.002)
                # It has ended before the client can know.
                self.ended = time.monotonic()
                self.proxy.answered += 1
                self.writer.write(_chunk(events[-1:]) + b"0\r\n\r\n")
                return True
            case "endless":
                # As many as it likes of the last event that has text.
                event = json.dumps({"choices": [{"index": 0, "delta": {"content": " more"}}]}).encode()
                return await self._flood(_chunk(b"data: " + event + b"\n\n") * 1_000)
            case "endless_line":
                await self._write(_chunk(b"data: "))
                return await self._flood(_chunk(FLOOD))
            case "endless_silence":
                while not self.reader.at_eof():
                    await self._write(_chunk(b": still here\n\n"))
                    await asyncio.sleep(0.1)
                return False
        return self._end()

    async def _busy(self, fault: str) -> bool:
        until, more = 0.0, {}
        if fault.endswith("seconds"):
            until, more = time.time() + RETRY_AFTER_S, {"retry-after": f"{RETRY_AFTER_S:g}"}
        elif fault.endswith("date"):
            date = formatdate(time.time() + RETRY_AFTER_S + 1, usegmt=True)
            until, more = parsedate_to_datetime(date).timestamp(), {"retry-after": date}
        body = json.dumps({"error": {"message": "slow down"}}).encode()
        await self._send(429 if fault.startswith("busy") else 503, body, more | {"connection": "close"})
        with contextlib.suppress(OSError, TimeoutError):  # it has read the answer when it closes
            await asyncio.wait_for(self.reader.read(), CLOSING_S)
        if until:
            self.proxy.pause(self.client, until)
        return False

    async def _ask(self, request: bytes) -> tuple[bytes, bytes] | None:
        """Head and body of the server's answer; None where the client goes away before it comes."""
        asking = asyncio.create_task(self._forward(request))
        leaving = asyncio.create_task(self.reader.read(1))
        try:
            await asyncio.wait((asking, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                return None
            return asking.result()
        except (OSError, asyncio.IncompleteReadError):
            self._abort()
            return None
        finally:
            asking.cancel()
            leaving.cancel()
            await asyncio.gather(asking, leaving, return_exceptions=True)

    async def _forward(self, request: bytes) -> tuple[bytes, bytes]:
        port = int(self.proxy.server.url.rpartition(":")[2].partition("/")[0])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
            return head, await (reader.readexactly(int(length[1])) if length else reader.readuntil(b"\r\n0\r\n\r\n"))
        finally:
            writer.transport.abort()

    async def _flood(self, piece: bytes) -> bool:
        sent = 0
        try:
            while True:
                await self._write(piece)
                sent += len(piece)
                self.proxy.most_bytes = max(self.proxy.most_bytes, sent)
        except OSError:
            return False

    async def _send(
        self, status: int, body: bytes, more: Mapping[str, str] | None = None, length: int | None = None
    ) -> None:
        headers = {"content-type": "application/json", "content-length": str(len(body) if length is None else length)}
        lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in (headers | dict(more or {})).items())]
        self.ended = time.monotonic() if length is None else None
        await self._write("\r\n".join([*lines, "", ""]).encode() + body)

    async def _write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def _abort(self) -> bool:
        self.ended = time.monotonic()
        self.writer.transport.abort()
        return False

    def _end(self, *, is_whole: bool = True) -> bool:
        self.ended = time.monotonic()
        if is_whole:
            self.writer.write(b"0\r\n\r\n")
        return is_whole


def _canned(fault: str | None, client: str, trap: str, *, is_list: bool) -> tuple[int, bytes, Mapping[str, str]] | None:
    """Status, body and headers of the answers that need no server."""
    error = json.dumps({"error": {"message": f"no: {client}", "code": 500}}).encode()
    other = json.dumps({"object": "list", "data": [{"id": "other", "object": "model"}]}).encode()
    missing = b'{"error": {"message": "The model `tiny` does not exist.", "code": 404}}'
    unreachable = b'{"error": {"message": "Cannot fetch the image", "code": 400}}'
    return {
        "error": (500, error, {}),
        "unauthorized": (401, error, {}),
        "redirect": (307, b"", {"location": trap}),
        "wrong_type": (200, b"<html>a proxy</html>", {"content-type": "text/html"}),
        "error_body": (200, error, {}),
        "images_unreachable": (400, unreachable, {}),
        "other_list": (200, other, {}) if is_list else (404, missing, {}),
    }.get(fault or "")


def _payload(body: bytes) -> bytes:
    """What a chunked body holds."""
    data = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            return data
        data, body = data + body[:length], body[length + 2 :]


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n" % len(data) + data + b"\r\n"


def _bomb() -> bytes:
    """A gzip file of 64 KiB that holds 64 MiB."""
    packer = zlib.compressobj(9, wbits=31)
    return packer.compress(b"\n" * 2**26) + packer.flush()
