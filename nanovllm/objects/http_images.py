"""The fetcher of images over HTTP: hosts on an allow-list, at addresses that were checked (SSRF).

Each hop, the URI of the job and each redirect, passes the allow-list; its host is resolved once, every address is
checked, and the connection goes to one of those addresses, with the host's name in TLS and in ``Host``. By
``http.client``: it connects where it is told, follows no redirect, unpacks nothing, keeps no cookie and heeds no proxy
of the environment, and its lines are bounded; urllib3 2 reads the lines of a chunked body whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import ssl
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse
from ipaddress import ip_network
from typing import Any, NamedTuple
from urllib.parse import urljoin

from nanovllm.errors import (
    ConfigurationError,
    FetchFailed,
    ForbiddenHost,
    NanoVLLMError,
    ObjectChanged,
    ObjectForbidden,
    ObjectNotFound,
    UrlRefused,
)
from nanovllm.messages.http_uri import HttpUri, parse_http_uri, without_secrets
from nanovllm.messages.job import ImageRef
from nanovllm.objects.daemon_threads import DaemonThreads
from nanovllm.objects.public_addresses import Network, is_allowed
from nanovllm.objects.reader import FetchedImage, SizeLimit, connection_within
from nanovllm.settings.http_images import AllowedHost, HttpImageSettings

MAX_REDIRECTS = 3
MAX_RETRY_AFTER_S = 60.0
"""Longest wait that a host is granted: the job holds its place in the worker meanwhile."""

CHUNK_BYTES = 256 * 1024
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# Request Timeout, Too Early and Too Many Requests: about the moment.
_TRANSIENT = frozenset({408, 425, 429})
_BY_STATUS: dict[int, type[NanoVLLMError]] = {
    401: ObjectForbidden,
    403: ObjectForbidden,
    404: ObjectNotFound,
    410: ObjectNotFound,
    412: ObjectChanged,
}
_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "Connection": "close", "User-Agent": "nanovllm"}


class Address(NamedTuple):
    """An address as `getaddrinfo` gives it, which was checked."""

    family: int
    place: tuple[Any, ...]


class HttpImages:
    """Reads images over HTTP in threads of its own, each over a connection of its own.

    Raises:
        ConfigurationError: ``ca_file`` cannot be read.
    """

    def __init__(self, settings: HttpImageSettings, limit: SizeLimit) -> None:
        self._settings = settings
        self._limit = limit
        self._hosts = [AllowedHost.of(entry) for entry in settings.allow]
        self._networks: list[Network] = [ip_network(network) for network in settings.allow_networks]
        self._tls = tls_context(settings) if self._hosts else None
        self._connections = asyncio.Semaphore(settings.max_connections)
        self._threads = DaemonThreads("nanovllm-http")

    def check(self, ref: ImageRef) -> None:
        """Return when a job may name the URI of ``ref``.

        Raises:
            ForbiddenHost: ``http_images.allow`` does not list its host with this scheme and port.
        """
        self._check(_parsed(ref))

    async def fetch(self, ref: ImageRef, *, held: FetchedImage | None = None) -> FetchedImage:
        """The bytes of an image; those of ``held``, read from the same URI before, where the host says they still are.

        The result names the URI without its query.

        Raises:
            ForbiddenHost, ObjectNotFound, ObjectForbidden, ObjectChanged, ImageTooLarge, UrlRefused: for good.
            FetchFailed: worth another attempt, after ``retry_after_s`` at the earliest.
        """
        exchange, longest_s = _Exchange(), self._settings.image_timeout_s
        timed_out = f"the image was not read within {longest_s:g} s"
        async with connection_within(self._connections, longest_s, timed_out):
            try:
                return await self._threads.run(lambda: self._read(ref, held, exchange))
            finally:
                exchange.abandon()

    def _check(self, uri: HttpUri) -> None:
        if not any(host.allows(uri) for host in self._hosts):
            raise ForbiddenHost(f"http_images.allow of this worker does not list {uri.origin}")

    def _read(self, ref: ImageRef, held: FetchedImage | None, exchange: _Exchange) -> FetchedImage:
        uri = _parsed(ref)
        for _ in range(1 + MAX_REDIRECTS):
            self._check(uri)
            answer = self._ask(uri, ref, held, exchange)
            if isinstance(answer, FetchedImage):
                return answer
            uri = answer
        raise UrlRefused(f"{uri.origin} is redirect number {MAX_REDIRECTS + 1}; {MAX_REDIRECTS} are followed")

    def _ask(
        self, uri: HttpUri, ref: ImageRef, held: FetchedImage | None, exchange: _Exchange
    ) -> FetchedImage | HttpUri:
        """The image at ``uri``, or where its host redirects to."""
        connection = _Connection(uri, self._resolve(uri), self._tls, self._settings, exchange)
        try:
            connection.request("GET", uri.target, headers=_headers(uri, ref, held))
            with connection.getresponse() as response:
                return self._answer(uri, ref, held, response)
        except NanoVLLMError:
            raise
        except ssl.SSLCertVerificationError as error:
            raise FetchFailed(f"{uri.origin} proves no identity: {error.verify_message}") from None
        except (OSError, HTTPException, ValueError) as error:
            # Not the error's own text or chain: http.client quotes what it was asked for.
            raise FetchFailed(f"{uri.origin} broke off: {type(error).__name__}") from None
        finally:
            connection.close()

    def _resolve(self, uri: HttpUri) -> list[Address]:
        """The addresses of the host. Raises ForbiddenHost where it has one that is not allowed."""
        try:
            found = socket.getaddrinfo(uri.host, uri.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise FetchFailed(f"the name of {uri.origin} cannot be resolved") from None
        if not all(is_allowed(str(place[0]), self._networks) for *_, place in found):
            # Not shown: a job could learn the addresses of names inside the cluster.
            raise ForbiddenHost(
                f"{uri.origin} has an address that is not public, and not in http_images.allow_networks"
            )
        return [Address(family, place) for family, _, _, _, place in found]

    def _answer(
        self, uri: HttpUri, ref: ImageRef, held: FetchedImage | None, response: HTTPResponse
    ) -> FetchedImage | HttpUri:
        status = response.status
        if status in _REDIRECTS:
            return _redirected(uri, response.getheader("Location", ""))
        if status == 304 and held is not None:
            return held
        if status != 200:
            raise _refusal(uri, status, response.getheader("Retry-After", ""))
        encoding = response.getheader("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise UrlRefused(f"{uri.origin} sends the image with a Content-Encoding, and was asked to send none")
        tag = response.getheader("ETag")
        if ref.etag is not None and (tag or "").strip('"') != ref.etag:
            # Not every server knows the condition.
            raise ObjectChanged(f"{uri.origin} sends another entity tag than the job names")
        data = self._body(uri, response)
        # It is sent back as it is: what is no header's value would end each later request.
        tag = tag if tag and tag.isascii() and tag.isprintable() else None
        return FetchedImage(data, hashlib.sha256(data).hexdigest(), without_secrets(ref.uri or ""), etag=tag)

    def _body(self, uri: HttpUri, response: HTTPResponse) -> bytes:
        self._limit.check(response.length or 0, "the image")
        bounded: Any = _BoundedReads(response.fp)
        response.fp = bounded
        data = bytearray()
        while chunk := response.read(CHUNK_BYTES):
            data += chunk
            self._limit.check(len(data), "the image")
        if response.length:
            raise FetchFailed(f"{uri.origin} broke off, with {response.length} bytes to come")
        return bytes(data)


def tls_context(settings: HttpImageSettings) -> ssl.SSLContext:
    """The TLS context of connections to hosts. Raises ConfigurationError where ``ca_file`` cannot be read."""
    try:
        context = ssl.create_default_context(cafile=settings.ca_file)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigurationError(f"http_images.ca_file {settings.ca_file} cannot be read: {reason}") from None
    context.set_alpn_protocols(["http/1.1"])
    return context


class _Exchange:
    """The socket that a thread uses, which the event loop can shut down."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._is_abandoned = False

    def use(self, used: socket.socket) -> None:
        """``used`` is the socket from now on. Raises FetchFailed where nothing waits for it any more."""
        with self._lock:
            if self._is_abandoned:
                used.close()
                raise FetchFailed("the job has ended")
            self._socket = used

    def abandon(self) -> None:
        """Break off what is under way: a host that sends byte by byte would hold its thread without end."""
        with self._lock:
            self._is_abandoned = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    # The base class's: that of an SSL socket takes the session away from the thread that reads.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


class _Connection(HTTPConnection):
    """A connection to the first of ``addresses`` that takes one; the host's name is for ``Host`` and TLS alone."""

    def __init__(
        self,
        uri: HttpUri,
        addresses: list[Address],
        tls: ssl.SSLContext | None,
        settings: HttpImageSettings,
        exchange: _Exchange,
    ) -> None:
        super().__init__(uri.host, uri.port)
        self._uri = uri
        self._addresses = addresses
        self._tls = tls
        self._settings = settings
        self._exchange = exchange

    def connect(self) -> None:
        connected = self._connected()
        self.sock = connected
        if self._uri.scheme == "https":
            assert self._tls is not None  # made where a host is allowed
            self.sock = connected = self._tls.wrap_socket(
                connected,
                server_hostname=self._uri.host,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=False,  # an image without a length ends with the session's own end alone
            )
            self._exchange.use(connected)
            connected.do_handshake()
        connected.settimeout(self._settings.read_timeout_s)

    def _connected(self) -> socket.socket:
        failure: OSError = OSError("no address")
        for address in self._addresses:
            attempt = socket.socket(address.family, socket.SOCK_STREAM)
            self._exchange.use(attempt)
            try:
                attempt.settimeout(self._settings.connect_timeout_s)
                attempt.connect(address.place)
            except OSError as error:
                attempt.close()
                failure = error
            else:
                return attempt
        raise failure


class _BoundedReads:
    """A response's file that never reads to its end at once, as ``http.client`` does for a chunk of -1 bytes."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            raise HTTPException("a chunk of a negative size")
        data: bytes = self._file.read(size)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _parsed(ref: ImageRef) -> HttpUri:
    return parse_http_uri(ref.uri or "")


def _headers(uri: HttpUri, ref: ImageRef, held: FetchedImage | None) -> Mapping[str, str]:
    if ref.etag is not None:
        return {"Host": uri.authority, **_HEADERS, "If-Match": f'"{ref.etag}"'}
    if held is not None and held.etag:
        return {"Host": uri.authority, **_HEADERS, "If-None-Match": held.etag}
    return {"Host": uri.authority, **_HEADERS}


def _redirected(uri: HttpUri, location: str) -> HttpUri:
    if not location:
        raise UrlRefused(f"{uri.origin} redirects to nowhere: its answer has no Location")
    try:
        joined = urljoin(uri.origin + uri.target, location)
    except ValueError:
        raise UrlRefused(f"{uri.origin} redirects to what is no URL") from None
    try:
        # A fragment is the reader's own, and is not sent.
        target = parse_http_uri(joined.partition("#")[0])
    except ValueError as error:
        raise UrlRefused(f"{uri.origin} redirects to what {error}") from None
    if uri.scheme == "https" and target.scheme == "http":
        raise ForbiddenHost(f"{uri.origin} redirects from https to http")
    return target


def _refusal(uri: HttpUri, status: int, retry_after: str) -> NanoVLLMError:
    said = f"{uri.origin} answered {status}"
    if status in _TRANSIENT or status >= 500:
        failed = FetchFailed(said)
        failed.retry_after_s = _seconds(retry_after)
        return failed
    return _BY_STATUS.get(status, UrlRefused)(said)


def _seconds(retry_after: str) -> float:
    """The wait that a Retry-After header asks for, within ``MAX_RETRY_AFTER_S``; 0 where it is none."""
    try:
        seconds = (
            float(retry_after)
            if retry_after.isdecimal()
            else (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds()
        )
    except (ValueError, TypeError):
        return 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)
