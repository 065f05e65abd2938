"""Proxies that spoil connections: one for any TCP, one for an object store's answers."""

from __future__ import annotations

import asyncio
import contextlib
import re
from random import Random
from typing import Literal, Protocol

LineFault = Literal["slow", "silent", "cut"]
"""``slow`` delays what passes, ``silent`` lets nothing pass and keeps connections open, ``cut`` resets connections."""

S3Fault = Literal["none", "unavailable", "slow", "truncated", "reset", "wrong_length"]


class NetworkLine(Protocol):
    """A port of loopback that leads to another one, and what a test makes of the way."""

    port: int

    async def start(self) -> None: ...
    async def spoil(self, fault: LineFault) -> None: ...
    async def heal(self) -> None: ...
    async def stop(self) -> None: ...


class TcpProxy:
    """Passes bytes to ``upstream_port`` on loopback; ``cut`` drops every connection, ``delay_s`` holds bytes back."""

    def __init__(self, upstream_port: int, port: int = 0) -> None:
        self.upstream_port = upstream_port
        self.delay_s = 0.0
        self._wanted_port = port
        self._passes = asyncio.Event()
        self._passes.set()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._wanted_port)

    def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()

    def silence(self) -> None:
        """Let nothing pass, and keep connections open."""
        self._passes.clear()

    def pass_on(self) -> None:
        """End the silence: what was held back passes."""
        self._passes.set()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        except OSError:
            writer.close()
            return
        self._writers |= {writer, up_writer}
        try:
            await asyncio.gather(self._pump(reader, up_writer), self._answer(up_reader, writer))
        except OSError:
            pass
        finally:
            self._writers -= {writer, up_writer}
            writer.close()
            up_writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._pump(reader, writer)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            await self._passes.wait()
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            writer.write(data)
            await writer.drain()
        with contextlib.suppress(OSError, RuntimeError):
            writer.write_eof()


class OwnLine:
    """A `TcpProxy` as a `NetworkLine`."""

    def __init__(self, port: int, upstream_port: int) -> None:
        self.port = port
        self._proxy = TcpProxy(upstream_port, port)

    async def start(self) -> None:
        await self._proxy.start()

    async def spoil(self, fault: LineFault) -> None:
        match fault:
            case "slow":
                self._proxy.delay_s = 0.03
            case "silent":
                self._proxy.silence()
            case "cut":
                self._proxy.cut()

    async def heal(self) -> None:
        self._proxy.delay_s = 0.0
        self._proxy.pass_on()

    async def stop(self) -> None:
        self._proxy.stop()


class S3Proxy(TcpProxy):
    """Spoils each answer of an object store with ``fault``, at the chance ``share``."""

    def __init__(self, upstream_port: int, random: Random) -> None:
        super().__init__(upstream_port)
        self.fault: S3Fault = "none"
        self.share = 0.7
        self.spoiled = 0
        self._random = random

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer by answer: a connection is kept alive for many."""
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError as end:
                writer.write(end.partial)
                return
            found = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
            body = await reader.readexactly(int(found[1])) if found else b""
            fault = self.fault if self._random.random() < self.share else "none"
            self.spoiled += fault != "none"
            if fault == "unavailable":
                head, body = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n", b""
            elif fault == "slow":
                await asyncio.sleep(self._random.uniform(0.2, 1.5))
            elif fault == "wrong_length" and found:
                head = head.replace(found[0], b"\r\nContent-Length: %d" % (len(body) + 10))
            elif fault == "truncated":
                body = body[: len(body) // 2]
            elif fault == "reset":
                writer.transport.abort()
                return
            writer.write(head + body)
            await writer.drain()
            if fault in ("truncated", "wrong_length"):
                writer.transport.close()
                return
