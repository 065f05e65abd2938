"""The backend `openai` in front of llama.cpp's own server, which this project's engine is compared with."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from bench import png
from jsonschema import Draft202012Validator
from llama_cpp_server import (
    CONTEXT,
    MODEL,
    SLOT_TOKENS,
    SLOTS,
    WHERE,
    LlamaServer,
    llama_server_program,
    make_checkpoint,
)
from openai_server import engine_of, options_of
from parts import eventually

from nanovllm.engine.backends.base import Request
from nanovllm.engine.backends.openai.backend import OpenAIEngine
from nanovllm.engine.backends.openai.faults import EndpointFault
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.outputs import RequestOutput
from nanovllm.errors import AnswerFailed, InvalidInput, PromptTooLong, UnsupportedConstraint
from nanovllm.sampling_params import SamplingParams
from nanovllm.vision.images.preprocess import ImageTransform, prepare_image

pytestmark = [
    pytest.mark.llamacpp,
    pytest.mark.proof,
    pytest.mark.skipif(llama_server_program() is None, reason=WHERE),
]

PROMPTS = ("What is the total?", "Describe this image:", "hello world", "the quick brown fox jumps over the lazy dog")
MOOD = ("--mirostat", "1", "--top-k", "2", "--min-p", "0.4", "--repeat-penalty", "1.7", "--dry-multiplier", "0.8")
"""Samplers that the server's command line turns on, as a GGUF file's metadata may."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_checkpoint(tmp_path_factory.mktemp("llama.cpp"))


@pytest.fixture(scope="module")
def server(checkpoint: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    server = LlamaServer(checkpoint[1], tmp_path_factory.mktemp("server"), *MOOD)
    server.start()
    asyncio.run(server.ready())
    yield server
    server.kill()


@pytest.fixture
async def engine(server: LlamaServer) -> AsyncIterator[OpenAIEngine]:
    async with engine_of(server.url, dialect="llamacpp", raw_prompts=True) as engine:
        yield engine


def ask(request_id: str, prompt: str = "hello world", *, raw_prompt: bool = False, **sampling: Any) -> Request:
    parameters = {"max_tokens": 24, "temperature": 0.0} | sampling
    return Request(request_id, prompt=prompt, raw_prompt=raw_prompt, sampling=SamplingParams(**parameters))


def native_outputs(checkpoint: Path, *requests: Request) -> list[RequestOutput]:
    """What this project's engine answers in float32."""
    prompts = [one.prompt if one.raw_prompt else [{"role": "user", "content": one.prompt}] for one in requests]
    with LLMEngine(str(checkpoint), dtype="float32", kv_cache_bytes=16 << 20) as engine:
        return engine.generate(prompts, [one.sampling for one in requests], use_tqdm=False)


async def test_greedy_texts_and_counts_are_those_of_this_projects_own_engine(
    engine: OpenAIEngine, checkpoint: tuple[Path, Path]
) -> None:
    requests = [ask(f"r{number}", prompt, ignore_eos=True) for number, prompt in enumerate(PROMPTS)]
    outputs = await asyncio.gather(*map(engine.submit, requests))
    expected = native_outputs(checkpoint[0], *requests)
    assert [output.text for output in outputs] == [output.text for output in expected]
    for output, other in zip(outputs, expected, strict=True):
        assert output.finish_reason == other.finish_reason == "length"
        assert (output.usage.input_tokens, output.usage.output_tokens) == (other.usage.input_tokens, 24)
        assert 0 < output.timings.time_to_first_token_ms <= output.timings.e2e_ms
    stats = engine.stats()
    assert stats.generation_tokens == 24 * len(PROMPTS)
    assert stats.prompt_tokens == sum(output.usage.input_tokens for output in expected)
    assert [(one.requests, one.faults) for one in stats.endpoints] == [(len(PROMPTS), ())]
    assert (engine.model_info.id, engine.capabilities.context) == (MODEL, SLOT_TOKENS)
    again = await engine.submit(ask("again", PROMPTS[-1], ignore_eos=True))
    assert again.text == expected[-1].text
    assert again.usage.cached_tokens > 0


async def test_chunks_come_while_it_runs_and_are_the_text(engine: OpenAIEngine) -> None:
    generation = engine.submit(ask("a", max_tokens=200, ignore_eos=True))
    chunks = []
    async for chunk in generation:
        if not chunks:
            assert engine.stats().num_requests_running == 1
        chunks.append(chunk)
    output = await generation
    assert len(generation.chunks) > 50
    assert "".join(chunk.text for chunk in chunks) == output.text
    assert output.usage.output_tokens == 200


async def test_a_raw_prompt_is_completed_as_it_is(engine: OpenAIEngine, checkpoint: tuple[Path, Path]) -> None:
    request = ask("raw", "the quick brown", raw_prompt=True, ignore_eos=True)
    (expected,) = native_outputs(checkpoint[0], request)
    output = await engine.submit(request)
    assert (output.text, output.usage.input_tokens) == (expected.text, expected.usage.input_tokens)


async def test_sampling_parameters_reach_the_sampler_and_its_own_defaults_do_not(
    engine: OpenAIEngine, server: LlamaServer
) -> None:
    asked = {"temperature": 0.75, "top_k": 7, "top_p": 0.5, "min_p": 0.25, "repetition_penalty": 1.5, "seed": 2**40 + 5}
    await engine.submit(ask("asked", presence_penalty=0.5, frequency_penalty=0.25, **asked))
    seen = [slot["params"] for slot in server.slots() if "params" in slot]
    wire = {"top_k": 7, "top_p": 0.5, "min_p": 0.25, "repeat_penalty": 1.5, "repeat_last_n": 2**20, "mirostat": 0}
    wire |= {"presence_penalty": 0.5, "frequency_penalty": 0.25, "seed": (2**40 + 5) % (2**32 - 1)}
    assert wire in [{name: one[name] for name in wire} for one in seen]
    await engine.submit(ask("plain"))
    seen = [slot["params"] for slot in server.slots() if "params" in slot]
    neutral = {
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repeat_penalty": 1.0,
        "mirostat": 0,
        "dry_multiplier": 0.0,
    }
    assert neutral in [{name: one[name] for name in neutral} for one in seen]


async def test_a_seed_repeats_a_text_and_penalties_and_biases_change_it(engine: OpenAIEngine) -> None:
    async def text(**sampling: Any) -> str:
        return (await engine.submit(ask("a", ignore_eos=True, **sampling))).text

    warm = {"temperature": 1.5}
    assert await text(seed=7, **warm) == await text(seed=7, **warm) != await text(seed=8, **warm)
    assert await text(seed=7, temperature=5.0, top_k=1) == await text()
    assert await text(repetition_penalty=1.8) != await text()
    a_letter = 68  # of 256 bytes behind three special tokens
    assert len(set(await text(logit_bias={a_letter: 100.0}))) == 1


async def test_stop_strings_end_the_text_before_them(engine: OpenAIEngine) -> None:
    whole = (await engine.submit(ask("whole", ignore_eos=True))).text
    stop = whole[10:13]
    output = await engine.submit(ask("cut", stop=[stop, "never there"], ignore_eos=True))
    assert (output.text, output.finish_reason) == (whole[: whole.index(stop)], "stop")


@pytest.mark.parametrize("raw_prompt", [False, True], ids=["chat", "raw prompt"])
async def test_constraints_hold(engine: OpenAIEngine, raw_prompt: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"paid": {"type": "boolean"}, "currency": {"enum": ["EUR", "USD"]}},
        "required": ["paid", "currency"],
        "additionalProperties": False,
    }
    written = await engine.submit(ask("s", json_schema=schema, max_tokens=200, raw_prompt=raw_prompt))
    value = json.loads(written.text)
    assert type(value["paid"]) is bool
    assert value["currency"] in ("EUR", "USD")
    assert written.is_constrained
    choices = ['say "a" \\', "line\nbreak", "日本"]
    for number in range(4):
        request = ask(f"c{number}", choice=choices, temperature=2.0, seed=number, raw_prompt=raw_prompt)
        assert (await engine.submit(request)).text in choices


SCHEMAS: tuple[dict[str, Any], ...] = (
    {"type": "integer", "minimum": -3, "exclusiveMaximum": 40},
    {"type": "array", "items": {"type": ["boolean", "null"]}, "minItems": 2, "maxItems": 3},
    {"type": "array", "prefixItems": [{"const": "a"}, {"type": "integer", "maximum": 9}]},
    {"type": "string", "pattern": "^[A-Z]{2,3}(?:x|\\.)+-[0-9]{4}$"},
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"oneOf": [{"type": "string", "format": "date"}, {"type": "string", "format": "uuid"}]},
    {
        "$defs": {"part": {"properties": {"n": {"enum": [1, 2.5, None]}, "next": {"$ref": "#/$defs/part"}}}},
        "type": "object",
        "properties": {"part": {"$ref": "#/$defs/part"}, "open": {"type": "boolean"}},
        "required": ["part"],
        "additionalProperties": {"type": "integer", "minimum": 0},
    },
)


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
async def test_whole_answers_conform_to_schemas_that_are_not_refused(
    engine: OpenAIEngine, schema: dict[str, Any]
) -> None:
    checks = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    warm = {"json_schema": schema, "temperature": 1.5, "max_tokens": 300}
    running = (engine.submit(ask(f"r{seed}", seed=seed, **warm)) for seed in range(8))
    ended = await asyncio.gather(*running, return_exceptions=True)
    outputs = [one for one in ended if isinstance(one, RequestOutput)]
    whole = [output for output in outputs if output.finish_reason == "stop"]
    assert whole
    # Bytes that are no UTF-8, which only a random model writes: the server's parser does not take them.
    assert {type(one) for one in ended} <= {RequestOutput, AnswerFailed}
    assert engine.stats().endpoints[0].faults == ()
    for output in whole:
        checks.validate(json.loads(output.text))


async def test_log_probabilities_are_those_of_this_projects_own_engine(
    engine: OpenAIEngine, checkpoint: tuple[Path, Path]
) -> None:
    request = ask("a", logprobs=3, ignore_eos=True)
    (expected,) = native_outputs(checkpoint[0], request)
    output = await engine.submit(request)
    assert output.text == expected.text
    assert output.logprobs is not None
    assert expected.logprobs is not None
    for token, mine, theirs in zip(expected.token_ids, output.logprobs, expected.logprobs, strict=True):
        assert mine.keys() == theirs.keys()  # llama.cpp says ids
        assert mine[token].rank == 1
        for name, one in theirs.items():
            assert mine[name].logprob == pytest.approx(one.logprob, abs=1e-3)
    assert output.outputs[0].text_ends == expected.outputs[0].text_ends


async def test_log_probabilities_are_missing_inside_a_character_and_not_where_a_stop_may_begin(
    engine: OpenAIEngine,
) -> None:
    output = await engine.submit(ask("a", choice=["日本"], logprobs=0))
    assert output.logprobs is not None
    assert output.usage.output_tokens > 4
    assert [place.text for position in output.logprobs for place in position.values()] == ["日", "本"]
    assert output.outputs[0].text_ends == (1, 2)
    stopped = await engine.submit(ask("b", choice=["a red fox"], stop=["a red cat", "x"], logprobs=0))
    assert stopped.text == "a red fo"
    assert stopped.logprobs is not None
    assert "".join(place.text for position in stopped.logprobs for place in position.values()) == "a red fo"


async def test_what_the_request_is_to_blame_for_is_refused_and_no_fault_of_the_server(engine: OpenAIEngine) -> None:
    with pytest.raises(PromptTooLong, match=f"available context size \\({SLOT_TOKENS} tokens\\)"):
        await engine.submit(ask("long", "total " * SLOT_TOKENS))
    with pytest.raises(InvalidInput, match="n above 1"):
        await engine.submit(ask("n", n=2, temperature=1.0))
    with pytest.raises(UnsupportedConstraint, match="regex"):
        await engine.submit(ask("regex", regex="a+"))
    with pytest.raises(UnsupportedConstraint, match="multipleOf at #"):
        await engine.submit(ask("multiples", json_schema={"type": "integer", "multipleOf": 5}))
    with pytest.raises(InvalidInput, match=r"the server refuses the request: .*#/nowhere"):
        await engine.submit(ask("nowhere", json_schema={"$ref": "#/nowhere"}))
    image = prepare_image(png(), ImageTransform.for_files("png"))
    with pytest.raises(InvalidInput, match="image input is not supported"):
        await asyncio.wait_for(engine.submit(Request("i", prompt="<|image|>", images=(image,))), 30)
    (endpoint,) = engine.stats().endpoints
    assert (endpoint.requests, endpoint.faults, endpoint.is_up) == (5, (), True)  # two of the worker's own among them
    assert (await engine.submit(ask("after"))).finish_reason in ("stop", "length")


async def test_an_aborted_request_frees_its_slot_and_others_wait_for_one(
    checkpoint: tuple[Path, Path], tmp_path: Path
) -> None:
    server = LlamaServer(checkpoint[1], tmp_path, slot_tokens=CONTEXT)
    server.start()
    try:
        async with engine_of(server.url, dialect="llamacpp") as engine:
            endless = {"max_tokens": CONTEXT - 64, "ignore_eos": True}
            running = [engine.submit(ask(f"r{number}", PROMPTS[number], **endless)) for number in range(SLOTS)]
            await eventually(lambda: server.busy_slots == SLOTS)
            waiting = engine.submit(ask("waiting"))
            running[0].abort()
            assert (await running[0]).finish_reason == "abort"
            assert (await waiting).text
            running[1].abort()
            await eventually(lambda: server.busy_slots == 0)
            assert engine.stats().num_requests_running == 0
    finally:
        server.kill()


async def test_a_server_killed_in_mid_answer_answers_the_request_once_it_is_back(
    checkpoint: tuple[Path, Path], tmp_path: Path
) -> None:
    server = LlamaServer(checkpoint[1], tmp_path, slot_tokens=4096)
    server.start()
    try:
        async with engine_of(server.url, dialect="llamacpp") as engine:  # waits while the model is loaded
            whole = await engine.submit(ask("whole", max_tokens=2000, ignore_eos=True))
            generation = engine.submit(ask("cut", max_tokens=2000, ignore_eos=True))
            async for _ in generation:
                server.kill()
                break
            await eventually(lambda: bool(engine.stats().endpoints[0].faults))
            server.start()
            output = await generation
            (endpoint,) = engine.stats().endpoints
        assert output.text == whole.text
        assert output.usage.output_tokens == 2000
        assert {kind for kind, _ in endpoint.faults} <= {"reset", "connect", "error"}
        assert endpoint.is_up
    finally:
        server.kill()


async def test_a_server_that_still_loads_is_waited_for(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    server = LlamaServer(checkpoint[1], tmp_path)
    waiting = OpenAIEngine(options_of([server.url], dialect="llamacpp"))
    said = ""
    server.start()
    try:
        while "503" not in said:
            (answer,) = (await waiting.listings()).values()
            assert isinstance(answer, EndpointFault), f"it serves, and never said that it loads, but {said}"
            said = str(answer)
        async with waiting as engine:
            assert (await engine.submit(ask("a"))).finish_reason in ("stop", "length")
    finally:
        server.kill()
