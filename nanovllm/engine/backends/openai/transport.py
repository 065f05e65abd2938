"""HTTP to one server: bytes are never unpacked, cookies never kept, and a proxy asked only where one is set."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy
from ipaddress import ip_address
from typing import Any

import httpx

from nanovllm.engine.backends.foreign_errors import shown
from nanovllm.engine.backends.openai.addresses import advice
from nanovllm.engine.backends.openai.event_stream import EventStream
from nanovllm.engine.backends.openai.faults import EndpointFault, fault_of_answer
from nanovllm.engine.backends.openai.options import EndpointOptions, OpenAIOptions

MAX_ERROR_BYTES = 64 * 2**10
KEEP_ALIVE_S = 2.0
"""Of idle connections: servers close theirs after 5 s (uvicorn), and a request may cross the closing."""
_DRAIN_S, _DRAIN_BYTES = 0.2, 64 * 2**10
"""What may follow an answer, so that its connection can take another request."""
_TURN_S = 0.01
"""How long bytes of one answer are read before others have their turn."""


class Transport:
    """The connections to one server. ``key`` is its API key, ``secrets`` what no message may show."""

    def __init__(self, endpoint: EndpointOptions, options: OpenAIOptions, context: ssl.SSLContext) -> None:
        self.url = endpoint.url
        key = endpoint.api_key.get_secret_value() if endpoint.api_key is not None else None
        self.secrets = (key,) if key else ()
        self._client = httpx.AsyncClient(
            headers={"accept-encoding": "identity"} | ({"authorization": f"Bearer {key}"} if key else {}),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            timeout=httpx.Timeout(options.read_timeout_s, connect=options.connect_timeout_s, pool=None),
            limits=httpx.Limits(
                max_connections=None,
                max_keepalive_connections=options.max_concurrency,
                keepalive_expiry=KEEP_ALIVE_S,
            ),
            verify=context,
            trust_env=False,
            proxy=None if _is_loopback(endpoint.url) else options.proxy,
            follow_redirects=False,
        )

    async def get(self, path: str, max_bytes: int, timeout_s: float) -> tuple[httpx.Response, bytes]:
        """The answer to a question and its body, cut at ``max_bytes``. Raises EndpointFault."""
        with _transport_faults():
            async with asyncio.timeout(timeout_s), self._client.stream("GET", f"{self.url}{path}") as response:
                return response, await _read(response, max_bytes)

    async def events(
        self, path: str, body: bytes, max_bytes: int, timeout_s: float
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The events that answer a request, in at most ``max_bytes`` and ``timeout_s``.

        Raises:
            EndpointFault: the server failed.
            NanoVLLMError: as `fault_of_answer`.
        """
        headers = {"content-type": "application/json", "accept": "text/event-stream"}
        stream = EventStream(max_bytes)
        with _transport_faults():
            async with (
                asyncio.timeout(timeout_s),
                self._client.stream("POST", f"{self.url}{path}", content=body, headers=headers) as response,
            ):
                if response.status_code != 200:
                    said = await _read(response, MAX_ERROR_BYTES)
                    fault = fault_of_answer(response.status_code, response.headers, said, self.secrets)
                    if isinstance(fault, EndpointFault) and fault.kind == "missing":
                        raise EndpointFault("missing", f"{fault} ({advice(self.url)})")
                    raise fault
                if not response.headers.get("content-type", "").strip().lower().startswith("text/event-stream"):
                    raise EndpointFault("garbage", "answers no event stream")
                if _is_compressed(response):
                    raise EndpointFault("garbage", "compresses its answer, though asked not to")
                chunks, turn = response.aiter_raw(), _Turn()
                async for chunk in chunks:
                    for event in stream.add(chunk):
                        yield event
                        await turn.over()
                    if stream.is_done:
                        await _drain(chunks)
                        return
                    await turn.over()
                for event in stream.end():
                    yield event

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


class _Turn:
    """Lets the loop do other work every ``_TURN_S`` while bytes are there at once."""

    def __init__(self) -> None:
        self._ends = time.monotonic() + _TURN_S

    async def over(self) -> None:
        if time.monotonic() >= self._ends:
            await asyncio.sleep(0)
            self._ends = time.monotonic() + _TURN_S


async def _drain(chunks: AsyncIterator[bytes]) -> None:
    """Read what follows a whole answer; a connection that has too much of it, or not in time, is closed."""
    size = 0
    with suppress(httpx.HTTPError, TimeoutError):
        async with asyncio.timeout(_DRAIN_S):
            async for chunk in chunks:
                size += len(chunk)
                if size > _DRAIN_BYTES:
                    return


async def _read(response: httpx.Response, max_bytes: int) -> bytes:
    if _is_compressed(response):
        return b""
    body, turn = bytearray(), _Turn()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > max_bytes:
            break
        await turn.over()
    return bytes(body[:max_bytes])


def _is_compressed(response: httpx.Response) -> bool:
    """Whether decoding it may make any number of bytes out of few."""
    return response.headers.get("content-encoding", "").strip().lower() not in ("", "identity")


def _is_loopback(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


@contextmanager
def _transport_faults() -> Iterator[None]:
    """Failures of connections and their time-outs as EndpointFault; their texts hold addresses alone."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        why = "in time" if isinstance(error, httpx.ConnectTimeout) else f"({shown(str(error))})"
        raise EndpointFault("connect", f"takes no connection {why}") from None
    except httpx.ProxyError as error:
        raise EndpointFault("connect", f"is not reached through remote.proxy ({shown(str(error))})") from None
    except (httpx.TimeoutException, TimeoutError):
        raise EndpointFault("timeout", "does not answer in time") from None
    except httpx.TransportError:
        raise EndpointFault("reset", "breaks the connection off") from None
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError):
        raise EndpointFault("garbage", "answers what cannot be decoded") from None
