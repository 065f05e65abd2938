"""A server of OpenAI's protocol for the tests, on a real socket, over any engine backend; its faults can be ordered."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import json
import ssl
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

from pydantic import SecretStr

from nanovllm.engine.backends.base import EngineBackend, Request
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.engine.backends.openai.backend import OpenAIEngine
from nanovllm.engine.backends.openai.dialects import DIALECTS
from nanovllm.engine.backends.openai.options import EndpointOptions, OpenAIOptions
from nanovllm.engine.outputs import Completion, RequestOutput
from nanovllm.errors import InvalidInput, PromptTooLong
from nanovllm.sampling_params import SamplingParams
from nanovllm.vision.images.preprocess import PreparedImage, prepare_image

Fault = Literal[
    "hang", "reset", "busy", "error", "garbage", "no events", "die", "silence", "unfinished", "bad", "html",
    "redirect", "compressed", "endless", "no images",
]  # fmt: skip
"""What a request meets in place of an answer.

``hang`` and ``silence`` go quiet before and in the middle of an answer; ``reset``, ``die`` and ``unfinished`` close
before it, in its middle, and in its middle as if it were whole; ``busy`` is 429; ``error`` 500; ``garbage`` an event
that is none; ``no events`` 200 with HTML; ``bad`` a 400 of the protocol and ``html`` one of a proxy; ``redirect``
307 to ``target``; ``compressed`` gzip that nobody asked for; ``endless`` text without end; ``no images`` refuses
requests with URLs of images, which it cannot fetch.
"""

_SAME_NAMES = (
    *("temperature", "top_p", "min_p", "seed", "stop", "n", "min_tokens", "ignore_eos", "stop_token_ids"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "skip_special_tokens", "bad_words"),
    "include_stop_str_in_output",
)


@dataclass(frozen=True)
class Asked:
    """One request as it came."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]
    at: float = field(default_factory=time.monotonic)

    @property
    def image_urls(self) -> list[str]:
        contents = [message["content"] for message in self.body["messages"]]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        return [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]


class OpenAIServer:
    """Serves ``engine`` under the name ``model``; None echoes.

    ``faults`` are met by requests in their order; then by none. ``always`` is met by every request that none of them
    meets, while it is set. ``key`` is the API key that it asks for. ``tells_token_ids`` as vLLM does.
    ``certificate``: a PEM file with its key, for TLS. ``port`` 0 takes a free one.
    """

    def __init__(
        self,
        engine: EngineBackend | None = None,
        *,
        model: str = "tiny",
        key: str | None = None,
        context: int | None = None,
        tells_token_ids: bool = False,
        lists_models: bool = True,
        certificate: Path | None = None,
        port: int = 0,
    ) -> None:
        self.engine = engine or EchoEngine()
        self.model = model
        self.key = key
        self.context = context
        self.faults: list[Fault] = []
        self.always: Fault | None = None
        self.retry_after: str | None = None
        self.target = ""
        self.busy_lists = 0
        """So many questions for the models are answered 429."""
        self.asked: list[Asked] = []
        self.lists = 0
        self.at_once = self.most_at_once = 0
        self.disconnects = 0
        self.tells_token_ids = tells_token_ids
        self.lists_models = lists_models
        self._tls: ssl.SSLContext | None = None
        if certificate is not None:
            self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._tls.load_cert_chain(certificate)
        self.gate: asyncio.Event | None = None
        """Where set, requests wait for it before they are answered."""
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()
        self._numbers = count()
        self._port = port

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._port}/v1"

    async def start(self) -> None:
        """Listen, at the same port as before where it was stopped."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, ssl=self._tls)
        self._port = self._server.sockets[0].getsockname()[1]

    async def kill(self) -> None:
        """Refuse connections and break off those that there are."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in tuple(self._connections):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def __aenter__(self) -> OpenAIServer:
        await self.engine.start()
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()
        await self.engine.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            while await self._serve_one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        data = await reader.readexactly(int(headers.get("content-length", 0)))
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            said = f"Incorrect API key provided: {headers.get('authorization')}"
            await self._json(writer, 401, {"error": {"message": said, "code": "invalid_api_key"}})
            return True
        if method == "GET" and self.busy_lists:
            self.busy_lists -= 1
            await self._busy(writer)
            return True
        if method == "GET" and path == "/v1/models" and self.lists_models:
            self.lists += 1
            entry = {"id": self.model, "object": "model", "max_model_len": self.context}
            await self._json(writer, 200, {"object": "list", "data": [entry]})
            return True
        if method != "POST" or path not in ("/v1/chat/completions", "/v1/completions"):
            await self._json(writer, 404, {"detail": "Not Found"})
            return True
        asked = Asked(path, headers, json.loads(data))
        self.asked.append(asked)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self._complete(asked, reader, writer)
        finally:
            self.at_once -= 1

    async def _complete(self, asked: Asked, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        fault = self.faults.pop(0) if self.faults else self.always
        match fault:
            case "hang":
                await reader.read()  # until the client gives up
                return False
            case "reset":
                return False
            case "busy":
                await self._busy(writer)
                return True
            case "error":
                await self._json(writer, 500, {"error": {"message": "CUDA error"}})
                return True
            case "bad":
                await self._json(
                    writer, 400, {"error": {"message": f"no\n\x1b[31m such thing {self.key}", "code": 400}}
                )
                return True
            case "redirect":
                await self._json(writer, 307, {}, {"location": self.target})
                return True
            case "no images" if any(url.startswith("http") for url in asked.image_urls):
                await self._json(writer, 400, {"error": {"message": "Cannot fetch the image", "code": 400}})
                return True
            case "compressed":
                body = gzip.compress(b"data: [DONE]\n\n")
                await self._send(writer, 200, body, "text/event-stream", {"content-encoding": "gzip"})
                return True
            case "html" | "no events":
                await self._send(writer, 400 if fault == "html" else 200, b"<html>proxy</html>", "text/html")
                return True
        if self.gate is not None:
            await self.gate.wait()
        closed = asyncio.create_task(reader.read(1))
        answering = asyncio.create_task(self._answer(asked, writer, fault))
        await asyncio.wait((closed, answering), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            self.disconnects += 1
            answering.cancel()
        closed.cancel()
        await asyncio.gather(closed, answering, return_exceptions=True)
        if not answering.cancelled() and (error := answering.exception()) is not None:
            if not isinstance(error, InvalidInput):
                raise error
            said = f"This model's maximum context length: {error}" if isinstance(error, PromptTooLong) else str(error)
            await self._json(writer, 400, {"error": {"message": said, "code": 400}})
            return True
        return not answering.cancelled() and answering.result()

    async def _answer(self, asked: Asked, writer: asyncio.StreamWriter, fault: Fault | None) -> bool:
        """Whether the connection may serve another request."""
        request = await asyncio.to_thread(self._request, asked)
        generation = self.engine.submit(request)
        try:
            output = await generation
        finally:
            generation.abort()
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        events = list(self._events(asked, output))
        while fault == "endless":
            # The event in the middle has text.
            await self._chunk(writer, b"data: " + json.dumps(events[len(events) // 2]).encode() + b"\n\n")
        for number, event in enumerate(events):
            if number == max(1, len(events) // 2) and fault in ("die", "silence", "garbage", "unfinished"):
                if fault == "die":
                    writer.transport.abort()
                elif fault == "silence":
                    await asyncio.Event().wait()
                elif fault == "garbage":
                    await self._chunk(writer, b"data: {not json\n\n")
                else:
                    await self._chunk(writer, b"")
                return False
            await self._chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")
        await self._chunk(writer, b": a comment\n\ndata: [DONE]\n\n")
        await self._chunk(writer, b"")
        return True

    def _events(self, asked: Asked, output: RequestOutput) -> Iterator[dict[str, Any]]:
        common = {"id": f"chatcmpl-{next(self._numbers)}", "object": "chat.completion.chunk", "model": self.model}
        is_chat = asked.path.endswith("/chat/completions")
        if is_chat:
            for one in output.outputs:
                yield common | {"choices": [{"index": one.index, "delta": {"role": "assistant", "content": ""}}]}
        for one in output.outputs:
            for text, token_ids, logprobs in _pieces(one, asked.body, self.tells_token_ids):
                choice: dict[str, Any] = {"index": one.index, "finish_reason": None}
                choice |= {"delta": {"content": text}} if is_chat else {"text": text}
                if self.tells_token_ids:
                    choice["token_ids"] = token_ids
                if logprobs is not None:
                    choice["logprobs"] = {"content": logprobs}
                yield common | {"choices": [choice]}
            end = {"index": one.index, "finish_reason": one.finish_reason}
            yield common | {"choices": [end | ({"delta": {}} if is_chat else {"text": ""})]}
        usage = {
            "prompt_tokens": output.usage.input_tokens,
            "completion_tokens": output.usage.output_tokens,
            "total_tokens": output.usage.input_tokens + output.usage.output_tokens,
            "prompt_tokens_details": {"cached_tokens": output.usage.cached_tokens},
        }
        yield common | {"choices": [], "usage": usage}

    def _request(self, asked: Asked) -> Request:
        body, request_id = asked.body, f"r{next(self._numbers)}"
        assert body["stream"], "the tests' server streams alone"
        sampling = _sampling(body)
        if asked.path == "/v1/completions":
            return Request(request_id, prompt=body["prompt"], raw_prompt=True, sampling=sampling)
        images = tuple(self._image(url) for url in asked.image_urls)
        messages = tuple(
            message
            | {"content": [{"type": "image"} if part["type"] == "image_url" else part for part in message["content"]]}
            if isinstance(message["content"], list)
            else message
            for message in body["messages"]
        )
        return Request(request_id, messages=messages, images=images, sampling=sampling)

    def _image(self, url: str) -> PreparedImage:
        if url.startswith("data:"):
            data = base64.b64decode(url.partition(",")[2])
        else:
            with urllib.request.urlopen(url, timeout=10) as answer:
                data = answer.read()
        assert self.engine.image_transform is not None
        return prepare_image(data, self.engine.image_transform)

    async def _busy(self, writer: asyncio.StreamWriter) -> None:
        more = {} if self.retry_after is None else {"retry-after": self.retry_after}
        await self._json(writer, 429, {"error": {"message": "slow down"}}, more)

    async def _json(
        self, writer: asyncio.StreamWriter, status: int, value: object, headers: Mapping[str, str] | None = None
    ) -> None:
        await self._send(writer, status, json.dumps(value).encode(), "application/json", headers)

    async def _send(
        self,
        writer: asyncio.StreamWriter,
        status: int,
        body: bytes,
        media_type: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        lines = [f"HTTP/1.1 {status} X", f"content-type: {media_type}", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await writer.drain()

    async def _chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        await writer.drain()


def _sampling(body: Mapping[str, Any]) -> SamplingParams:
    fields = {name: body[name] for name in _SAME_NAMES if name in body}
    fields["max_tokens"] = body.get("max_completion_tokens", body.get("max_tokens"))
    if body.get("top_k") is not None:
        fields["top_k"] = body["top_k"]
    if body.get("logprobs"):
        fields["logprobs"] = body["top_logprobs"]
    if "response_format" in body:
        fields["json_schema"] = body["response_format"]["json_schema"]["schema"]
    fields |= body.get("structured_outputs", {})
    if "regex" in body:
        fields["regex"] = body["regex"]
    return SamplingParams.model_validate(fields)


def _pieces(
    one: Completion, body: Mapping[str, Any], taken_first: bool
) -> Iterator[tuple[str, list[int], list[dict[str, Any]] | None]]:
    """Text, token ids and log probabilities of each event: a token an event where probabilities are asked for.

    As vLLM does where ``taken_first``: the token taken stands before the best ones, as one of these.
    """
    if not body.get("logprobs") or one.logprobs is None or one.text_ends is None:
        middle = len(one.text) // 2
        yield one.text[:middle], [*one.token_ids], None
        yield one.text[middle:], [], None
        return
    begin = 0
    for token, end, place in zip(one.token_ids, one.text_ends, one.logprobs, strict=True):
        best = [{"token": it.text, "bytes": [*it.text.encode()], "logprob": it.logprob} for it in place.values()]
        taken = best[0]
        ranked = sorted(best, key=lambda entry: (taken_first and entry is not taken, -float(str(entry["logprob"]))))
        ranked = ranked[: body["top_logprobs"]]
        yield one.text[begin:end], [token], [taken | {"top_logprobs": ranked}]
        begin = end


def options_of(servers: Sequence[OpenAIServer | str], **options: Any) -> OpenAIOptions:
    """Options of a backend in front of ``servers``; waits are short."""
    urls = [one if isinstance(one, str) else one.url for one in servers]
    keys = [None if isinstance(one, str) else one.key for one in servers]
    dialect = options.pop("dialect", "openai")
    endpoints = tuple(
        EndpointOptions(url, SecretStr(key) if key else None) for url, key in zip(urls, keys, strict=True)
    )
    quick = {"breaker_wait_s": 0.05, "breaker_max_wait_s": 0.2, "connect_timeout_s": 5.0, "read_timeout_s": 20.0}
    return OpenAIOptions(endpoints=endpoints, dialect=DIALECTS[dialect], **(quick | options))


@asynccontextmanager
async def engine_of(*servers: OpenAIServer | str, **options: Any) -> AsyncIterator[OpenAIEngine]:
    """A started backend in front of ``servers``."""
    async with OpenAIEngine(options_of(servers, **options)) as engine:
        yield engine


@asynccontextmanager
async def serving(*servers: OpenAIServer) -> AsyncIterator[tuple[OpenAIServer, ...]]:
    """All ``servers``, started, and killed at the end."""
    async with contextlib.AsyncExitStack() as stack:
        for server in servers:
            await stack.enter_async_context(server)
        yield servers
