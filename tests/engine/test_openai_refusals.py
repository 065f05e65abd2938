"""Refusals with 400, 413 and 422: the request's fault only where its server takes others."""

from __future__ import annotations

import asyncio

import pytest
from openai_server import Asked, engine_of, serving
from scripted_server import GOOD, ScriptedServer, ask, failure, faults_of, http

from nanovllm.engine.backends.openai.endpoint import PROBE_SAMPLING
from nanovllm.errors import (
    ApiKeyRefused,
    ConfigurationError,
    EndpointsUnavailable,
    InvalidInput,
)

PROBE = PROBE_SAMPLING.max_tokens


async def test_a_body_that_is_too_large_for_a_proxy_is_the_requests_where_it_takes_others() -> None:
    def script(asked: Asked) -> bytes:
        return GOOD if len(str(asked.body)) < 2_000 else http(413, b"<html>", "text/html")

    async with ScriptedServer(script) as server, engine_of(server) as engine:
        with pytest.raises(InvalidInput, match="413"):
            await engine.submit(ask(prompt="x" * 5_000))
        assert (await engine.submit(ask("b"))).text == "hello"


async def test_refusals_at_one_time_share_a_request_of_the_workers_own() -> None:
    def script(asked: Asked) -> bytes:
        return GOOD if asked.body["max_completion_tokens"] == PROBE else failure(400, {"error": {"message": "bad"}})

    async with ScriptedServer(script) as server, engine_of(server) as engine:
        running = [engine.submit(ask(f"{number}")) for number in range(16)]
        for generation in running:
            with pytest.raises(InvalidInput, match="bad"):
                await generation
        assert 17 <= len(server.asked) < 24
        assert faults_of(engine) == {}


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("API key not valid. Please pass a valid API key.", ApiKeyRefused),
        ("Unsupported parameter: 'max_tokens' (request id: 2026{})", EndpointsUnavailable),
        ("model 'tiny' not loaded", EndpointsUnavailable),
    ],
)
@pytest.mark.parametrize("is_known", [False, True], ids=["at once", "later"])
async def test_what_a_server_says_to_every_request_costs_none_of_them(
    said: str, kind: type[Exception], is_known: bool
) -> None:
    broken = False

    def script(asked: Asked) -> bytes:
        return failure(400, {"error": {"message": said.format(len(server.asked))}}) if broken else GOOD

    async with ScriptedServer(script) as server, engine_of(server) as engine:
        if is_known:
            assert (await engine.submit(ask("known"))).text == "hello"
        broken = True
        for number in range(3):
            with pytest.raises(kind):
                await engine.submit(ask(f"{number}"))
        assert not engine.stats().endpoints[0].is_up
        broken = False
        await asyncio.sleep(0.3)
        assert (await engine.submit(ask("later"))).text == "hello"
        assert engine.stats().endpoints[0].is_up


async def test_a_server_that_takes_no_request_of_the_workers_own_refuses_others_for_what_they_are() -> None:
    def script(asked: Asked) -> bytes:
        if asked.body["max_completion_tokens"] == PROBE:
            return failure(400, {"error": {"message": "an image is required"}})
        is_bad = asked.body["max_completion_tokens"] == 1
        return failure(400, {"error": {"message": "the image is too small"}}) if is_bad else GOOD

    async with ScriptedServer(script) as server, engine_of(server) as engine:
        for number in range(4):
            with pytest.raises(InvalidInput, match="too small"):
                await engine.submit(ask(f"{number}", max_tokens=1))
        assert (await engine.submit(ask("good"))).text == "hello"
        assert engine.stats().endpoints[0].is_up


async def test_jobs_of_a_server_that_refuses_all_are_answered_by_the_others() -> None:
    refusing = ScriptedServer(failure(400, {"error": {"message": "model 'tiny' not loaded"}}))
    async with serving(refusing, ScriptedServer(GOOD)) as servers, engine_of(*servers) as engine:
        running = [engine.submit(ask(f"{number}", f"{number} x")) for number in range(16)]
        assert {(await generation).text for generation in running} == {"hello"}
        assert refusing.asked
        assert [one.is_up for one in engine.stats().endpoints] == [False, True]


async def test_a_server_that_refused_all_is_tried_by_requests_of_any_kind() -> None:
    def script(asked: Asked) -> bytes:
        is_text = asked.body["max_completion_tokens"] in (PROBE, 1)
        return failure(400, {"error": {"message": "an image is required"}}) if is_text else GOOD

    async with ScriptedServer(script) as server, engine_of(server) as engine:
        with pytest.raises(EndpointsUnavailable, match="an image is required"):
            await engine.submit(ask("text", max_tokens=1))
        await asyncio.sleep(0.3)
        assert (await engine.submit(ask("image"))).text == "hello"
        assert engine.stats().endpoints[0].is_up


async def test_a_server_that_refused_all_and_is_gone_then_waits_as_long_as_any_other() -> None:
    async with ScriptedServer(failure(400, {"error": {"message": "no"}})) as server, engine_of(server) as engine:
        with pytest.raises(EndpointsUnavailable):
            await engine.submit(ask("a"))
        await server.kill()
        await asyncio.sleep(0.3)
        for number in range(2):
            with pytest.raises(EndpointsUnavailable, match="takes no connection"):
                await engine.submit(ask(f"{number}"))
        assert faults_of(engine) == {"error": 1, "connect": 1}


async def test_a_key_that_the_list_of_models_refuses_with_400_ends_the_start() -> None:
    said = [{"error": {"code": 400, "message": "API key not valid. Please pass a valid API key."}}]
    async with ScriptedServer(GOOD, failure(400, said)) as server:
        with pytest.raises(ConfigurationError, match="NANOVLLM_REMOTE__API_KEYS"):
            async with engine_of(server):
                pass


async def test_one_request_at_a_time_finds_out_whether_a_server_still_refuses_all() -> None:
    async with ScriptedServer(failure(400, {"error": {"message": "no"}})) as server, engine_of(server) as engine:
        for number, asked in ((1, 2), (8, 4)):
            running = [engine.submit(ask(f"{number} {one}")) for one in range(number)]
            for generation in running:
                with pytest.raises(EndpointsUnavailable):
                    await generation
            assert len(server.asked) == asked
            await asyncio.sleep(0.1)


async def test_a_server_that_has_answered_a_request_of_the_workers_own_and_refuses_it_then_refuses_all() -> None:
    words = iter(("bad", "gone", "lost", "away"))
    is_broken = False

    def script(asked: Asked) -> bytes:
        is_own = asked.body["max_completion_tokens"] == PROBE
        return GOOD if is_own and not is_broken else failure(400, {"error": {"message": next(words)}})

    async with ScriptedServer(script) as server, engine_of(server) as engine:
        with pytest.raises(InvalidInput, match="bad"):
            await engine.submit(ask("a"))
        is_broken = True
        with pytest.raises(EndpointsUnavailable, match="lost"):
            await engine.submit(ask("b"))
