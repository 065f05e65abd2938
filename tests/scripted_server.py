"""A server of OpenAI's protocol whose answers are written out, byte by byte, on a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from openai_server import Asked, OpenAIServer, engine_of

from nanovllm.engine.backends.base import Request
from nanovllm.engine.backends.openai.backend import OpenAIEngine
from nanovllm.engine.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

Script = bytes | tuple[bytes, ...]
"""An answer as it goes over the wire, in one piece or several with pauses between."""


class ScriptedServer(OpenAIServer):
    """Answers each request as ``script`` says, or as the tests' server does where that is None.

    ``models`` is the whole answer to the question for models; None: the model ``tiny``. ``connections`` counts them.
    """

    def __init__(self, script: Script | Callable[[Asked], Script | None], models: bytes | None = None) -> None:
        super().__init__()
        self.script = script
        self.models = models
        self.connections = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        await super()._serve(reader, writer)

    async def _json(self, writer: asyncio.StreamWriter, status: int, value: object, headers: Any = None) -> None:
        is_list = isinstance(value, dict) and value.get("object") == "list"
        if is_list and self.models is not None:
            await self._write(writer, self.models)
        else:
            await super()._json(writer, status, value, headers)

    async def _complete(self, asked: Asked, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        script = self.script(asked) if callable(self.script) else self.script
        if script is None:
            return await super()._complete(asked, reader, writer)
        await self._write(writer, script)
        return True

    async def _write(self, writer: asyncio.StreamWriter, script: Script) -> None:
        for piece in (script,) if isinstance(script, bytes) else script:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.001)


def http(status: int, body: bytes, media_type: str = "application/json", **headers: str) -> bytes:
    """A whole answer."""
    lines = [f"HTTP/1.1 {status} X", f"content-type: {media_type}", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def failure(status: int, value: object) -> bytes:
    """An answer in JSON."""
    return http(status, json.dumps(value).encode())


def stream(*events: object, done: str = "data: [DONE]\n\n", **headers: str) -> bytes:
    """Events that answer a request; text goes as it is, and anything else as JSON."""
    data = [one if isinstance(one, str) else json.dumps(one) for one in events]
    body = "".join(f"data: {one}\n\n" for one in data).encode() + done.encode()
    return http(200, body, "text/event-stream", **headers)


def choice(text: Any = None, reason: Any = None, **others: Any) -> dict[str, Any]:
    """An event of one choice."""
    one = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": reason}
    return {"object": "chat.completion.chunk", "choices": [one | others]}


END = choice(reason="stop")
GOOD = stream(choice("hello"), END)


def ask(request_id: str = "a", prompt: str = "one two", **sampling: Any) -> Request:
    """A request."""
    return Request(request_id, prompt=prompt, sampling=SamplingParams(**({"max_tokens": 64} | sampling)))


async def answered(answer: Script, **sampling: Any) -> RequestOutput:
    """What becomes of a request that gets ``answer``, once."""
    async with ScriptedServer(answer) as server, engine_of(server, max_attempts=1) as engine:
        return await engine.submit(ask(**sampling))


def faults_of(engine: OpenAIEngine) -> dict[str, int]:
    """Faults of all servers by kind."""
    return {kind: number for one in engine.stats().endpoints for kind, number in one.faults}
