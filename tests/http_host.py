"""A host of images over HTTP(S) on an address of this machine, and a resolver whose answers a test decides."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

PUBLIC = "127.0.0.2"
"""Stands for a public address: tests allow its network, and no other of this machine."""
INTERNAL = "127.0.0.1"
NAMES = ("images.test", "other.test", "a.cdn.test")

Answer = Callable[[BaseHTTPRequestHandler], None]


def send(
    status: int = 200, body: bytes = b"", headers: dict[str, str] | None = None, *, length: int | None = None
) -> Answer:
    """An answer of ``body``, of which ``length`` bytes are announced where that is not all of them."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def send_raw(*parts: bytes, until: threading.Event | None = None) -> Answer:
    """An answer of ``parts`` as they are; the last one again and again until ``until`` is set or the client ends."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        for part in parts:
            handler.wfile.write(part)
        while until is not None and not until.wait(0.05):
            handler.wfile.write(parts[-1])

    return answer


@dataclass
class ImageHost:
    """A server at ``address``; ``asked`` are the requests that it got, ``answers`` what it says, by path."""

    address: str
    port: int
    scheme: str
    answers: dict[str, Answer] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    server_names: list[str | None] = field(default_factory=list)

    def uri(self, target: str, name: str = "images.test") -> str:
        return f"{self.scheme}://{name}:{self.port}{target}"

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]


@contextmanager
def serving(certificate: Path | None = None, *, address: str = PUBLIC, port: int = 0) -> Iterator[ImageHost]:
    """A host, with TLS where there is a ``certificate`` as of `write_certificate`."""
    host = ImageHost(address, port, "https" if certificate else "http")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            host.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            self.close_connection = True
            host.answers.get(self.path.partition("?")[0], send(404))(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # a client that hangs up is part of the tests

        def get_request(self) -> tuple[Any, Any]:
            connection, client = super().get_request()
            if context is not None:
                # The handshake is the handler's: the thread that accepts would wait for a client that never begins it.
                connection = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            return connection, client

    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.with_suffix(".pem"))
        context.sni_callback = lambda _, name, __: host.server_names.append(name)
    server = Server((address, port), Handler)
    host.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield host
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class Resolver:
    """Stands for the system's resolver: each name has answers, one after another, of which the last one stays."""

    answers: dict[str, list[Sequence[str]]]
    asked: list[str] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Answer for the names that are known here; others are the system's."""
        system = socket.getaddrinfo

        def getaddrinfo(host: Any, port: Any, *arguments: Any, **options: Any) -> list[Any]:
            if host not in self.answers:
                return system(host, port, *arguments, **options)
            self.asked.append(host)
            turns = self.answers[host]
            addresses = turns.pop(0) if len(turns) > 1 else turns[0]
            if not addresses:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return [found for one in addresses for found in system(one, port, *arguments, **options)]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
