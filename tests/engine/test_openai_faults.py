"""Servers that hang, break off, are busy or answer garbage: the request moves or waits, and is never at fault."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from contextlib import AsyncExitStack
from dataclasses import replace
from email.utils import formatdate
from typing import Any, cast

import pytest
from openai_server import Asked, Fault, OpenAIServer, engine_of, serving
from parts import FaultProxy, eventually, png
from scripted_server import ScriptedServer, failure

from nanovllm.demo.child_process import free_port
from nanovllm.engine.backends.base import Request
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.engine.backends.foreign_errors import shown
from nanovllm.engine.backends.openai import backend
from nanovllm.engine.backends.openai.answer import Answer
from nanovllm.engine.backends.openai.backend import OpenAIEngine
from nanovllm.engine.backends.openai.endpoint_breaker import Breaker
from nanovllm.engine.backends.openai.event_stream import MAX_ANSWER_BYTES, MAX_EVENT_BYTES, EventStream
from nanovllm.engine.backends.openai.faults import EndpointFault, fault_of_answer, retry_after
from nanovllm.errors import (
    AnswerFailed,
    AnswerWithheld,
    ApiKeyRefused,
    ConfigurationError,
    EndpointsUnavailable,
    InvalidInput,
    PromptTooLong,
    TransientError,
)
from nanovllm.sampling_params import SamplingParams
from nanovllm.vision.images.preprocess import prepare_image


def ask(request_id: str, prompt: str = "one two three four", **others: Any) -> Request:
    return Request(request_id, prompt=prompt, sampling=SamplingParams(max_tokens=64, temperature=0.0), **others)


def faults_of(engine: Any) -> dict[str, int]:
    return {kind: number for one in engine.stats().endpoints for kind, number in one.faults}


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("hang", "timeout"),
        ("silence", "timeout"),
        ("reset", "reset"),
        ("die", "reset"),
        ("unfinished", "reset"),
        ("error", "error"),
        ("html", "error"),
        ("garbage", "garbage"),
        ("no events", "garbage"),
        ("busy", "overloaded"),
        ("redirect", "error"),
        ("compressed", "garbage"),
        ("endless", "garbage"),
    ],
)
async def test_every_fault_of_a_server_moves_the_request(fault: Fault, kind: str) -> None:
    async with serving(OpenAIServer(), OpenAIServer()) as servers, engine_of(*servers, read_timeout_s=0.3) as engine:
        for server in servers:
            server.faults = [fault]
        # Whichever it meets first, the other one has it too: it comes back to a healthy server in the end.
        output = await engine.submit(ask("a"))
    assert output.text == "one two three four"
    assert set(faults_of(engine)) == {kind}
    assert sum(len(server.asked) for server in servers) >= 2


async def test_a_request_of_one_server_waits_for_it() -> None:
    async with OpenAIServer() as server, engine_of(server) as engine:
        server.faults = ["error", "reset"]
        assert (await engine.submit(ask("a"))).text == "one two three four"
        assert faults_of(engine) == {"error": 1, "reset": 1}


async def test_the_total_time_of_a_request_ends_at_one_server_and_goes_on_at_another() -> None:
    slow, quick = OpenAIServer(EchoEngine(delay_s=60)), OpenAIServer()
    async with serving(slow, quick), engine_of(slow, quick, request_timeout_s=0.3) as engine:
        outputs = await asyncio.gather(*(engine.submit(ask(f"{n}", f"{n} two three four")) for n in range(8)))
    assert [output.text[0] for output in outputs] == [f"{n}" for n in range(8)]
    assert faults_of(engine)["timeout"] == len(slow.asked) > 0


async def test_a_stream_that_begins_anew_tells_who_has_had_its_beginning() -> None:
    async with OpenAIServer() as server, engine_of(server) as engine:
        server.faults = ["silence"]
        generation = engine.submit(ask("a"))
        chunks = aiter(generation)
        assert (await anext(chunks)).text
        await server.kill()
        await server.start()
        with pytest.raises(TransientError, match="began anew"):
            async for _ in chunks:
                pass
        assert (await generation).text == "one two three four"
        assert "".join([chunk.text async for chunk in generation]) == "one two three four"


async def test_a_busy_server_gets_no_request_before_the_time_that_it_names() -> None:
    async with OpenAIServer() as server, engine_of(server) as engine:
        server.faults, server.retry_after = ["busy"], "1"
        begun = time.monotonic()
        await engine.submit(ask("a"))
        assert time.monotonic() - begun >= 1.0
        assert len(server.asked) == 2
        assert engine.stats().endpoints[0].is_up


@pytest.mark.parametrize("before", [["error"], ["error", "error"]], ids=["suspect", "left out"])
async def test_a_server_that_is_busy_when_it_is_tried_gets_no_request_before_the_time_that_it_names(
    before: list[Fault],
) -> None:
    async with OpenAIServer() as server, engine_of(server, breaker_requests=1) as engine:
        server.faults, server.retry_after = [*before, "busy"], "1"
        while True:
            try:
                await engine.submit(ask(f"{time.monotonic()}"))
                break
            except EndpointsUnavailable:
                await asyncio.sleep(0.1)
        busy, then = server.asked[len(before) :]
        assert then.at - busy.at >= 1.0
        assert faults_of(engine) == {"error": len(before), "overloaded": 1}


async def test_a_server_that_is_busy_at_the_start_is_asked_when_its_time_has_come() -> None:
    async with OpenAIServer() as server:
        server.busy_lists, server.retry_after = 1, "1"
        begun = time.monotonic()
        async with engine_of(server):
            assert time.monotonic() - begun >= 1.0
            assert server.lists == 1


@pytest.mark.parametrize("is_other_up", [True, False])
async def test_a_server_without_the_model_at_the_start_is_left_out_until_it_has_it(is_other_up: bool) -> None:
    server, other = OpenAIServer(), OpenAIServer(model="else")
    server._port = free_port()
    async with other, AsyncExitStack() as stack:
        if is_other_up:
            await stack.enter_async_context(server)
        starting = asyncio.create_task(stack.enter_async_context(engine_of(server, other, model="tiny")))
        if not is_other_up:
            await eventually(lambda: other.lists >= 2)
            await stack.enter_async_context(server)
        engine = await starting
        for number in range(8):
            assert (await engine.submit(ask(f"{number}", f"{number} x"))).text == f"{number} x"
        assert other.asked == []
        other.model = "tiny"
        async with asyncio.timeout(30):
            while not other.asked:
                await engine.submit(ask(f"{time.monotonic()}"))


async def test_a_redirection_is_not_followed_and_its_target_learns_no_key() -> None:
    async with serving(OpenAIServer(key="sk-hunter2"), OpenAIServer()) as (server, other), engine_of(server) as engine:
        server.faults, server.target = ["redirect"], f"{other.url}/chat/completions"
        assert (await engine.submit(ask("a"))).text == "one two three four"
        assert other.asked == []


@pytest.mark.parametrize(("fault", "kinds"), [("no images", {}), ("error", {"error": 1})])
async def test_an_image_that_a_server_cannot_fetch_goes_inside_the_request(fault: Fault, kinds: dict[str, int]) -> None:
    def sign(uri: str, version: str) -> str:
        return f"http://127.0.0.1:9/{version}"

    async with OpenAIServer() as server, engine_of(server, sign_url=sign) as engine:
        server.faults = [fault]
        assert engine.image_transform is not None
        image = replace(prepare_image(png((1, 2, 3)), engine.image_transform), stored_at=("s3://bucket/key", "1"))
        await engine.submit(ask("a", "see <|image|>", images=(image,)))
        assert faults_of(engine) == kinds
    first, second = (asked.image_urls[0] for asked in server.asked)
    assert first == "http://127.0.0.1:9/1"
    assert second.startswith("data:image/png;base64,")


@pytest.mark.parametrize("dialect", ["openai", "vllm"])
async def test_an_answer_of_another_model_is_the_servers_fault_where_its_dialect_names_models(dialect: str) -> None:
    servers = OpenAIServer(), OpenAIServer()
    async with serving(*servers), engine_of(*servers, dialect=dialect) as engine:
        servers[0].model = "other"
        outputs = await asyncio.gather(*(engine.submit(ask(f"{n}", f"{n} two three")) for n in range(8)))
        assert [output.text for output in outputs] == [f"{n} two three" for n in range(8)]
        assert servers[0].asked
        assert ("garbage" in faults_of(engine)) == (dialect == "vllm")


def test_a_name_that_the_server_lists_is_no_other_model() -> None:
    answer = Answer(SamplingParams(), models={"asked", "first-name"})
    assert list(answer.add({"model": "first-name", "choices": []})) == []
    with pytest.raises(EndpointFault, match="another model: else"):
        list(answer.add({"model": "else"}))


@pytest.mark.parametrize("max_tokens", [1, 1_000])
def test_an_answer_has_no_more_pieces_and_bytes_than_its_tokens_can_have(max_tokens: int) -> None:
    answer = Answer(SamplingParams(max_tokens=max_tokens))
    event = {"choices": [{"delta": {"content": "x"}}]}
    for _ in range(1_024 + 8 * max_tokens):
        assert len(list(answer.add(event))) == 1
    with pytest.raises(EndpointFault, match="more than it was asked for"):
        list(answer.add(event))
    assert answer.max_bytes <= MAX_EVENT_BYTES + 2_048 * max_tokens
    assert Answer(SamplingParams(max_tokens=None)).max_bytes == MAX_ANSWER_BYTES


async def test_a_busy_server_does_not_hold_up_the_others() -> None:
    async with serving(OpenAIServer(), OpenAIServer()) as servers, engine_of(*servers) as engine:
        for server in servers:
            server.retry_after = "300"
        servers[0].always = "busy"
        await asyncio.gather(*(engine.submit(ask(f"{n}", f"{n} x")) for n in range(8)))
        assert len(servers[0].asked) <= 8
        seen = len(servers[0].asked)
        await asyncio.gather(*(engine.submit(ask(f"again {n}", f"{n} x")) for n in range(8)))
        assert len(servers[0].asked) == seen > 0


def test_retry_after_is_a_number_or_a_date_and_bounded() -> None:
    assert retry_after("2.5") == 2.5
    assert 25 < cast(float, retry_after(formatdate(time.time() + 30, usegmt=True))) <= 30
    assert retry_after(formatdate(time.time() - 30, usegmt=True)) == 0.0
    assert retry_after("99999") == 300.0
    assert [retry_after(value) for value in (None, "soon", "nan")] == [None, None, None]


async def test_no_endpoint_has_more_requests_than_allowed_and_the_idlest_gets_the_next() -> None:
    servers = OpenAIServer(EchoEngine(delay_s=0.02)), OpenAIServer(EchoEngine(delay_s=0.02))
    async with serving(*servers), engine_of(*servers, max_concurrency=3, affinity_slack=0) as engine:
        await asyncio.gather(*(engine.submit(ask(f"{n}")) for n in range(24)))
        assert [server.most_at_once for server in servers] == [3, 3]
        assert engine.stats().num_requests_waiting == 0
    async with OpenAIServer(EchoEngine(delay_s=0.02)) as server, engine_of(server, max_num_seqs=4) as engine:
        await asyncio.gather(*(engine.submit(ask(f"{n}")) for n in range(24)))
        assert server.most_at_once == 4


async def test_equal_beginnings_and_images_meet_one_server_until_it_has_more_to_do_than_others() -> None:
    servers = [OpenAIServer() for _ in range(3)]
    async with serving(*servers), engine_of(*servers) as engine:
        for prefix in ("red", "green", "blue", "white", "black"):
            before = [len(server.asked) for server in servers]
            for number in range(4):
                await engine.submit(ask(f"{prefix} {number}", f"{prefix * 200} {number}"))
            came = [len(server.asked) - old for server, old in zip(servers, before, strict=True)]
            assert sorted(came) == [0, 0, 4]
        assert sum(bool(server.asked) for server in servers) >= 2
    servers = [OpenAIServer(EchoEngine(delay_s=0.1)) for _ in range(2)]
    async with serving(*servers), engine_of(*servers, affinity_slack=2) as engine:
        await asyncio.gather(*(engine.submit(ask(f"{n}")) for n in range(12)))
        assert min(len(server.asked) for server in servers) >= 4


async def test_a_dead_server_is_left_out_and_taken_back_when_it_lives() -> None:
    async with serving(OpenAIServer(), OpenAIServer()) as (first, second), engine_of(first, second) as engine:
        await first.kill()
        await asyncio.gather(*(engine.submit(ask(f"{n}", f"{n} x")) for n in range(16)))
        assert not first.asked
        assert [one.is_up for one in engine.stats().endpoints] == [False, True]
        await first.start()

        async def come_back() -> None:
            while not first.asked:
                await engine.submit(ask(f"{time.monotonic()}", f"{time.monotonic()}"))

        async with asyncio.timeout(30):
            await come_back()
        assert all(one.is_up for one in engine.stats().endpoints)
        assert first.lists >= 2  # asked for its model before a request tries it


async def test_idle_servers_that_die_and_come_back_are_known_without_a_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    servers = OpenAIServer(), OpenAIServer()

    def up(engine: OpenAIEngine) -> list[bool]:
        return [one.is_up for one in engine.stats().endpoints]

    async with serving(*servers), engine_of(*servers) as engine:
        assert engine.outage is None
        await servers[0].kill()
        await eventually(lambda: up(engine) == [False, True])
        assert engine.outage is None
        await servers[1].kill()
        await eventually(lambda: up(engine) == [False, False])
        assert "takes no connection" in str(engine.outage)
        for server in servers:
            await server.start()
        await eventually(lambda: up(engine) == [True, True])
        assert engine.outage is None
    for server in servers:
        assert f"{server.url} takes requests again, after 0 s" in caplog.text


async def test_an_idle_server_is_asked_for_its_models_alone_and_a_busy_one_for_nothing() -> None:
    async with OpenAIServer() as server, engine_of(server) as engine:
        await eventually(lambda: server.lists >= 4)
        assert not server.asked
        server.gate = asyncio.Event()
        generation = engine.submit(ask("a"))
        await eventually(lambda: bool(server.asked))
        seen = server.lists
        await asyncio.sleep(0.5)
        assert server.lists == seen
        server.gate.set()
        await generation
        server.model = "other"
        await eventually(lambda: not engine.stats().endpoints[0].is_up)
        assert "does not list the model any more" in str(engine.outage)


async def test_requests_end_with_what_each_server_did_where_none_is_left() -> None:
    async with OpenAIServer() as server, engine_of(server) as engine:
        await server.kill()
        running = [engine.submit(ask(f"{n}")) for n in range(4)]
        for generation in running:
            with pytest.raises(EndpointsUnavailable, match=rf"{server.url} takes no connection"):
                await generation
        await server.start()
        await asyncio.sleep(0.3)
        assert (await engine.submit(ask("later"))).text == "one two three four"


@pytest.mark.parametrize("fault", ["error", "die", "garbage", "unfinished", "no events"])
async def test_a_server_that_fails_with_everything_is_left_out_until_it_answers(fault: Fault) -> None:
    async with OpenAIServer() as server, engine_of(server) as engine:
        server.always = fault
        running = [engine.submit(ask(f"{number}")) for number in range(4)]
        for generation in running:
            with pytest.raises(EndpointsUnavailable):
                await generation
        assert not engine.stats().endpoints[0].is_up
        server.always = None
        await asyncio.sleep(0.3)
        assert (await engine.submit(ask("later"))).text == "one two three four"
        assert engine.stats().endpoints[0].is_up


@pytest.mark.parametrize("poisonous", [1, 5])
async def test_requests_that_a_server_cannot_answer_stop_no_endpoint_that_answers_others(poisonous: int) -> None:
    class Picky(EchoEngine):
        def submit(self, request: Request) -> Any:
            if "poison" in str(request.messages):
                raise RuntimeError("the tests' server breaks the connection off")
            return super().submit(request)

    async with OpenAIServer(Picky()) as server, engine_of(server) as engine:
        poison = [engine.submit(ask(f"p{number}", "poison")) for number in range(poisonous)]
        # Alone in the engine, as long as they like.
        await eventually(lambda: sum("poison" in str(asked.body) for asked in server.asked) >= 4 * poisonous)
        for number in range(8):
            assert (await engine.submit(ask(f"{number}"))).text == "one two three four"
        assert engine.stats().endpoints[0].is_up
        for generation in poison:
            assert not generation.is_finished
            generation.abort()
            assert (await generation).finish_reason == "abort"


async def test_a_limit_of_attempts_is_an_error_of_the_request() -> None:
    async with OpenAIServer() as server, engine_of(server, max_attempts=2) as engine:
        server.always = "error"
        with pytest.raises(AnswerFailed, match="2 failures; in the last one the server answers 500: CUDA error"):
            await engine.submit(ask("a"))


async def test_a_request_that_fails_again_and_again_is_named_in_the_log_with_the_way_out(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "LONGEST_PAUSE_S", 0.01)
    async with OpenAIServer() as server, engine_of(server) as engine:
        server.faults = cast(list[Fault], ["error"] * 12)
        assert (await engine.submit(ask("the-job"))).text == "one two three four"
    (named,) = [record.getMessage() for record in caplog.records if "the-job" in record.getMessage()]
    assert "failed 10 times" in named
    assert "answers 500: CUDA error" in named
    assert "remote.max_attempts" in named


async def test_a_server_that_finds_nothing_at_its_address_any_more_is_left_out_at_once() -> None:
    async with ScriptedServer(lambda _: failure(404, {"detail": "Not Found"})) as server, engine_of(server) as engine:
        with pytest.raises(EndpointsUnavailable, match="answers 404: Not Found"):
            await engine.submit(ask("a"))
        assert len(server.asked) == 2  # the job's, and one of the worker's own
        server.script = lambda _: None
        await asyncio.sleep(0.3)
        assert (await engine.submit(ask("b"))).text == "one two three four"


async def test_a_request_that_alone_finds_nothing_leaves_no_server_out() -> None:
    def script(asked: Asked) -> bytes | None:
        return failure(404, {"detail": "no such picture"}) if "poison" in str(asked.body) else None

    async with ScriptedServer(script) as server, engine_of(server, max_attempts=2) as engine:
        with pytest.raises(AnswerFailed, match="no such picture"):
            await engine.submit(ask("a", "poison"))
        assert engine.stats().endpoints[0].is_up


async def test_a_refused_key_is_said_without_the_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with OpenAIServer(key="sk-good") as server:
        async with engine_of(server) as engine:
            await engine.submit(ask("a"))
            server.key = "sk-rotated"
            with pytest.raises(ApiKeyRefused) as caught:
                await engine.submit(ask("b"))
            assert "refuses the API key" in str(caught.value)
            text = str(caught.value) + repr(engine._options) + repr(vars(engine)) + repr(engine.stats())
            assert "sk-good" not in text
        wrong = OpenAIServer(key="sk-other")
        wrong._port = server._port
        # A setting that must be changed: exit code 2.
        with pytest.raises(ConfigurationError, match=r"refuses the API key.* NANOVLLM_REMOTE__API_KEYS"):
            async with engine_of(wrong):
                pass
    assert "sk-" not in caplog.text


async def test_a_start_waits_for_the_first_server(caplog: pytest.LogCaptureFixture) -> None:
    server = OpenAIServer()
    server._port = free_port()

    async def begin() -> str:
        async with engine_of(server) as engine:
            return (await engine.submit(ask("a"))).text

    beginning = asyncio.create_task(begin())
    await eventually(lambda: "waiting for the engine" in caplog.text)
    async with server:
        assert await beginning == "one two three four"


async def test_a_server_behind_a_proxy_that_spoils_connections_answers_all() -> None:
    async with OpenAIServer() as server, FaultProxy(server.url, ["refuse", "cut", "unavailable"] * 4) as proxy:
        async with engine_of(f"{proxy.url}/v1", model="tiny", breaker_requests=1) as engine:
            texts: list[str] = []
            async with asyncio.timeout(60):
                while len(texts) < 8:
                    try:
                        texts.append((await engine.submit(ask(f"{time.monotonic()}"))).text)
                    except EndpointsUnavailable:
                        await asyncio.sleep(0.02)
        assert texts == ["one two three four"] * 8
        assert proxy.faults_left == 0


async def test_a_filtered_answer_is_the_jobs() -> None:
    class Filtered(OpenAIServer):
        def _events(self, *arguments: Any) -> Any:
            for event in super()._events(*arguments):
                for choice in event["choices"]:
                    if choice.get("finish_reason"):
                        choice["finish_reason"] = "content_filter"
                yield event

    async with Filtered() as server, engine_of(server) as engine:
        with pytest.raises(AnswerWithheld):
            await engine.submit(ask("a"))
        assert faults_of(engine) == {}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_read_however_they_are_cut_and_their_lines_end(end: str, size: int) -> None:
    lines = [
        '\ufeffdata: {"a": 1}',
        "",
        ": hello",
        "",
        "event: x",
        'data:{"b":',
        "data: 2}",
        "",
        "data: [DONE] ",
        "",
        "x",
    ]
    data = end.join(lines).encode()
    stream = EventStream()
    chunks = [data[start : start + size] for start in range(0, len(data), size)]
    assert [event for chunk in chunks for event in stream.add(chunk)] == [{"a": 1}, {"b": 2}]
    assert stream.is_done


def test_an_event_that_the_end_of_the_stream_completes_counts() -> None:
    stream = EventStream()
    assert list(stream.add(b'data: {"a": 1}')) == []
    assert list(stream.end()) == [{"a": 1}]


@pytest.mark.parametrize(
    ("piece", "max_bytes"),
    [(b"x" * 2**20, 2**30), (b"data: " + b"x" * 2**16 + b"\n", 2**30), (b'data: {"a": 1}\n\n', 1_000)],
    ids=["line", "event", "stream"],
)
def test_lines_events_and_streams_have_bounds(piece: bytes, max_bytes: int) -> None:
    stream, times = EventStream(max_bytes), min(max_bytes, MAX_EVENT_BYTES) // len(piece) + 1
    with pytest.raises(EndpointFault, match="more than a text has"):
        deque((event for _ in range(times) for event in stream.add(piece)), maxlen=0)


def test_the_work_of_a_stream_grows_with_its_bytes_however_they_come() -> None:
    def copied(chunks: list[bytes]) -> int:
        sizes: list[int] = []

        class Counted(bytearray):
            def __iadd__(self, other: Any) -> Any:
                sizes.append(len(other))
                return super().__iadd__(other)

        stream = EventStream()
        stream._line, stream._data = Counted(), Counted()
        deque((event for chunk in chunks for event in stream.add(chunk)), maxlen=0)
        return sum(sizes)

    assert copied([b"data:x\n"] * 1_000) <= 2 * 7_000
    assert copied([b"x"] * 10_000) <= 2 * 10_000


def test_a_breaker_is_suspect_by_different_requests_and_waits_longer_each_time() -> None:
    now = 0.0
    breaker = Breaker(threshold=2, first_wait_s=1.0, longest_wait_s=3.0, clock=lambda: now)
    for _ in range(5):
        breaker.fail("one")
    assert not breaker.is_suspect
    breaker.fail("two")
    assert breaker.is_suspect
    for wait_s in (1.0, 2.0, 3.0, 3.0):
        breaker.open()
        now += wait_s - 0.01
        assert breaker.is_open
        assert not breaker.may_try
        now += 0.02
        assert breaker.may_try
        breaker.is_trying = True
        assert not breaker.may_try
        breaker.is_trying = False
    breaker.succeed()
    assert not breaker.is_open
    breaker.fail("three")
    assert not breaker.is_suspect


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (400, {"message": "This model's maximum context length is 8 tokens"}, PromptTooLong),
        (400, {"message": "too long", "code": "context_length_exceeded"}, PromptTooLong),
        (400, {"message": "request (9 tokens) exceeds the available context size (8 tokens)"}, PromptTooLong),
        (400, {"message": "Field 'seed': no number"}, InvalidInput),
        (500, {"message": "image input is not supported - hint: provide the mmproj"}, InvalidInput),
        (500, {"message": "The model produced output that does not match the expected peg format"}, AnswerFailed),
        (500, {"message": "CUDA error"}, EndpointFault),
        (503, {"message": "Loading model", "type": "unavailable_error", "code": 503}, EndpointFault),
    ],
)
def test_a_servers_words_say_whether_the_request_is_to_blame(
    status: int, error: dict[str, Any], kind: type[Exception]
) -> None:
    assert type(fault_of_answer(status, {}, json.dumps({"error": error}).encode(), ())) is kind


def test_words_of_a_server_are_one_line_escaped_and_cut() -> None:
    assert shown("a\n\tb\x1b[0m \u202e key", ("key",)) == "a b\\x1b[0m \\u202e ***"
    assert len(shown("x" * 10_000, ())) == 300
