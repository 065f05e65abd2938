"""Connections to servers: bytes and their bounds, reuse, cookies, proxies, and lists of models."""

from __future__ import annotations

import asyncio
import gzip
from contextlib import suppress
from typing import Any

import pytest
from openai_server import engine_of, serving
from scripted_server import END, GOOD, ScriptedServer, answered, ask, choice, failure, faults_of, http, stream

from nanovllm.errors import (
    ModelNotFound,
    PromptTooLong,
)

CONTEXT = "This model's maximum context length is 8 tokens"


BOMB = gzip.compress(gzip.compress(b"\0" * 2**20))


@pytest.mark.parametrize("encoding", ["gzip", "gzip, gzip", "br", "zstd", "x-unknown"])
async def test_a_compressed_answer_is_a_fault_and_never_unpacked(encoding: str) -> None:
    answers = [
        http(200, BOMB, "text/event-stream", content_encoding=encoding),
        http(400, BOMB, content_encoding=encoding),
        stream(choice("hello"), END, content_encoding="identity"),
    ]
    async with ScriptedServer(lambda asked: answers.pop(0)) as server, engine_of(server) as engine:
        assert (await engine.submit(ask())).text == "hello"
        assert faults_of(engine) == {"garbage": 1, "error": 1}


async def test_a_compressed_list_of_models_is_a_fault_and_never_unpacked() -> None:
    odd = ScriptedServer(GOOD, http(200, BOMB, content_encoding="gzip, gzip"))
    async with serving(odd, ScriptedServer(GOOD)) as servers, engine_of(*servers) as engine:
        assert faults_of(engine) == {"garbage": 1}


CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENTS = GOOD.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        CHUNKED + f"{len(EVENTS):x}\r\n".encode() + EVENTS + b"\r\n0\r\n\r\n",
        (CHUNKED + f"{len(EVENTS):x}\r\n".encode() + EVENTS + b"\r\n", b"0\r\n\r\n"),
        failure(400, {"error": {"message": CONTEXT}}),
    ],
    ids=["length", "chunks", "end later", "refused"],
)
async def test_requests_one_after_the_other_share_a_connection(answer: bytes | tuple[bytes, ...]) -> None:
    async with ScriptedServer(answer) as server, engine_of(server) as engine:
        for number in range(8):
            with suppress(PromptTooLong):
                await engine.submit(ask(f"{number}"))
        assert server.connections == 1


async def test_a_connection_that_goes_on_after_the_answer_is_closed() -> None:
    endless = CHUNKED + f"{len(EVENTS):x}\r\n".encode() + EVENTS + b"\r\n" + b"10000\r\n" + b"x" * 2**16 + b"\r\n5\r\n"
    async with ScriptedServer(endless) as server, engine_of(server) as engine:
        for number in range(2):
            assert (await engine.submit(ask(f"{number}"))).text == "hello"
        assert server.connections >= 2


async def test_cookies_are_not_kept() -> None:
    answer = stream(choice("hello"), END, set_cookie="a=b; Path=/")
    async with ScriptedServer(answer) as server, engine_of(server) as engine:
        for number in range(3):
            await engine.submit(ask(f"{number}"))
    assert not any("cookie" in asked.headers for asked in server.asked)


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "ftp://user:hunter2@x:1"])
async def test_proxies_of_the_environment_are_not_asked(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy)
    async with ScriptedServer(GOOD) as server, engine_of(server) as engine:
        assert (await engine.submit(ask())).text == "hello"


async def test_a_proxy_of_the_settings_is_asked_for_all_endpoints_but_those_of_this_machine() -> None:
    class Proxy(ScriptedServer):
        async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
            head = await reader.readuntil(b"\r\n\r\n")
            passed = asyncio.StreamReader()
            passed.feed_data(head.replace(b" http://models.test/", b" /", 1))
            length = int(next((line[15:] for line in head.lower().split(b"\r\n") if line[:14] == b"content-length"), 0))
            passed.feed_data(await reader.readexactly(length))
            return await super()._serve_one(passed, writer)

    async with Proxy(GOOD) as proxy, ScriptedServer(GOOD) as near:
        async with engine_of("http://models.test/v1", proxy=proxy.url.removesuffix("/v1")) as engine:
            assert (await engine.submit(ask())).text == "hello"
        async with engine_of(near, proxy="http://127.0.0.1:9") as engine:
            assert (await engine.submit(ask())).text == "hello"
    assert [asked.headers["host"] for asked in proxy.asked] == ["models.test"]


@pytest.mark.parametrize(
    ("listed", "model"),
    [
        ({"data": [None, {"name": "x"}, {"id": "tiny"}]}, "tiny"),
        ({"data": [{"id": "evil\x1b[31m\nline"}, {"id": "x" * 2_000_000}, {"id": "\ud83d"}, {"id": "tiny"}]}, None),
    ],
)
async def test_entries_of_a_list_without_a_name_are_not_there(listed: Any, model: str | None) -> None:
    async with ScriptedServer(GOOD, failure(200, listed)) as server, engine_of(server, model=model) as engine:
        assert engine.model_info.id == "tiny"


async def test_names_of_models_are_cut_where_messages_show_them() -> None:
    listed = {"data": [{"id": f"{number}" * 256} for number in range(8)]}
    async with ScriptedServer(GOOD, failure(200, listed)) as server:
        with pytest.raises(ModelNotFound) as caught:
            async with engine_of(server, model="tiny"):
                pass
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "answer",
    [
        stream(choice("hello"), END, done="data: [DONE] \n\n"),
        stream(choice("hello"), END, done=""),
        http(200, b"\xef\xbb\xbf" + EVENTS, "Text/Event-Stream"),
        http(200, EVENTS.replace(b"\n", b"\r"), "text/event-stream"),
        tuple(GOOD[at : at + 1] for at in range(len(GOOD))),
    ],
    ids=["end with a space", "no end", "byte-order mark", "carriage returns", "byte by byte"],
)
async def test_streams_in_harmless_forms_are_read(answer: bytes | tuple[bytes, ...]) -> None:
    assert (await answered(answer)).text == "hello"
