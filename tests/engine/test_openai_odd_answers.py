"""Answers in odd forms, written out byte by byte: read where they make sense, else the server's own fault."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from openai_server import Asked, engine_of
from scripted_server import END, GOOD, ScriptedServer, answered, ask, choice, failure, stream

from nanovllm.engine.backends.openai.answer import Answer
from nanovllm.engine.backends.openai.endpoint import PROBE_SAMPLING
from nanovllm.engine.backends.openai.faults import EndpointFault, fault_of_answer
from nanovllm.errors import (
    AnswerFailed,
    AnswerWithheld,
    InvalidInput,
    NanoVLLMError,
    PromptTooLong,
)
from nanovllm.sampling_params import SamplingParams

PROBE = PROBE_SAMPLING.max_tokens


def logprob(value: Any, token: str = "hi", **others: Any) -> dict[str, Any]:
    entry = {"token": token, "logprob": value, "bytes": None}
    return {"logprobs": {"content": [entry | {"top_logprobs": [entry]} | others]}}


async def test_halves_of_a_surrogate_pair_in_two_events_are_one_character() -> None:
    halves = [r'{"choices":[{"delta":{"content":"a\ud83d"}}]}', r'{"choices":[{"delta":{"content":"\ude00b"}}]}']
    async with ScriptedServer(stream(*halves, END)) as server, engine_of(server) as engine:
        generation = engine.submit(ask())
        assert (await generation).text == "a\U0001f600b"
        assert [chunk.text for chunk in generation.chunks] == ["a", "\U0001f600b", ""]


@pytest.mark.parametrize(
    "odd",
    [
        [r'{"choices":[{"delta":{"content":"a\ud83d"}}]}'],
        [r'{"choices":[{"delta":{"content":"\ude00"}}]}'],
        [choice("a", reason=[])],
        [choice("a", reason={})],
        [choice("a", reason=3)],
        [choice("a", token_ids=[10**40])],
        [choice("a", token_ids=[-1])],
        [choice("a", **logprob(10**400))],
        [choice("a", **logprob(math.nan))],
        [choice("a", **logprob(-math.inf))],
        [choice("a", **logprob(-1.0, id=10**40))],
        [choice({"text": "a"})],
        [{"choices": [{"delta": {}}] * 2_000}],
        ['{"choices":[{"index":' + "9" * 5_000 + "}]}"],
        ["[" * 100_000],
    ],
    ids=lambda odd: str(odd)[:60],
)
async def test_what_makes_no_sense_is_the_servers_fault(odd: list[Any]) -> None:
    with pytest.raises(AnswerFailed, match=r"answers (what is not of the protocol|an event that is no JSON)"):
        await answered(stream(*odd, END), logprobs=1)


ODD = (None, True, 0, -1, 10**40, 10**400, 1.5, math.nan, math.inf, "", "x", "\ud83d", [], [None], {}, {"a": 1})


def variants(value: Any) -> Iterator[Any]:
    """``value`` with each of its parts, at any depth, replaced by each odd value."""
    yield from ODD
    for key in range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ():
        for inner in variants(value[key]):
            changed = copy.copy(value)
            changed[key] = inner
            yield changed


def test_every_part_of_an_event_may_be_odd() -> None:
    event = choice("hi", "stop", token_ids=[1], usage={"prompt_tokens": 1}, **logprob(-1.0, id=1))
    event |= {
        "model": "m",
        "usage": {"completion_tokens": 1, "prompt_tokens_details": {"multimodal_tokens": {"image": 1}}},
    }
    event["choices"][0]["delta"] |= {"refusal": "no", "tool_calls": [{}]}
    event |= {"error": {"message": "m", "code": 1, "innererror": {"code": "c"}}}
    seen = 0
    for base in (event, {name: part for name, part in event.items() if name != "error"}):
        for odd in filter(lambda value: isinstance(value, dict), variants(base)):
            answer = Answer(SamplingParams(logprobs=1))
            try:
                texts = [chunk.text for chunk in answer.add(odd)]
                done = answer.completions() if answer.is_finished else ()
            except (EndpointFault, NanoVLLMError):
                continue
            seen += 1
            "".join(texts).encode()
            assert answer.usage().output_tokens < 2**31
            for place in done[0].logprobs or () if done else ():
                "".join(one.text for one in place.values()).encode()
                assert all(abs(key) < 2**31 and math.isfinite(one.logprob) for key, one in place.items())
    assert seen > 100


@pytest.mark.parametrize(
    "answer",
    [
        stream(choice("hi"), END, {"choices": None, "usage": {"prompt_tokens": 1}}),
        stream(choice("h", ""), choice("i", ""), END),
        *(
            stream(choice("hi"), choice(reason=reason))
            for reason in ("eos_token", "stop_sequence", "tool_calls", "STOP")
        ),
        stream({"choices": [{"index": None, "delta": {"content": "hi"}, "finish_reason": "stop"}]}),
        stream({"choices": [{"index": 0, "message": {"content": "hi"}, "finish_reason": "stop"}]}),
        stream({"choices": [{"index": 0, "delta": None}]}, choice("hi"), END),
        stream(choice([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]), END),
        stream({"choices": [{"delta": {"reasoning_content": "hm", "content": None}}]}, choice("hi"), END),
    ],
)
async def test_harmless_forms_are_read(answer: bytes) -> None:
    output = await answered(answer)
    assert (output.text, output.finish_reason) == ("hi", "stop")


async def test_an_answer_that_the_limit_ends_is_so_under_each_name_of_it() -> None:
    assert (await answered(stream(choice("hi", "max_tokens")))).finish_reason == "length"
    assert (await answered(stream(choice("hi", "MAX_TOKENS")))).finish_reason == "length"


async def test_tokens_that_cannot_come_are_left_out_and_parts_of_characters_replaced() -> None:
    top = [{"token": "hi", "logprob": -1.0}, {"token": "no", "logprob": None}, {"token": "\ud83d", "logprob": -2}]
    output = await answered(stream(choice("hi", **logprob(-1.0, top_logprobs=top)), END), logprobs=3)
    assert output.logprobs is not None
    assert [one.text for one in output.logprobs[0].values()] == ["hi", "\ufffd"]


async def test_usage_inside_a_choice_counts() -> None:
    output = await answered(stream(choice("hi", "stop", usage={"prompt_tokens": 9, "completion_tokens": 2})))
    assert (output.usage.input_tokens, output.usage.output_tokens) == (9, 2)


async def test_thoughts_alone_are_an_empty_text() -> None:
    output = await answered(stream({"choices": [{"delta": {"reasoning_content": "hm"}}]}, choice(reason="length")))
    assert (output.text, output.finish_reason) == ("", "length")


async def test_a_refusal_of_the_model_and_a_filter_of_prompts_withhold_the_answer() -> None:
    refusal = [{"choices": [{"delta": {"refusal": part}}]} for part in ("I cannot", " do that\x1b")]
    with pytest.raises(AnswerWithheld, match=r"the model refuses: I cannot do that\\x1b"):
        await answered(stream(*refusal, END))
    with pytest.raises(AnswerWithheld, match="content_filter"):
        await answered(stream(choice("hi"), choice(reason="content_filter")))
    filtered = {"error": {"message": "the content management policy", "code": "content_filter", "status": 400}}
    with pytest.raises(AnswerWithheld, match="content management policy"):
        await answered(failure(400, filtered))


async def test_a_call_of_a_tool_that_no_request_has_is_no_answer() -> None:
    call = {"choices": [{"delta": {"tool_calls": [{"function": {"name": "f"}}]}}]}
    with pytest.raises(AnswerFailed, match="calls a tool"):
        await answered(stream(call, choice(reason="tool_calls")))


CONTEXT = "This model's maximum context length is 8 tokens"


@pytest.mark.parametrize(
    ("status", "value", "kind"),
    [
        (
            400,
            {"object": "error", "message": "The input (9 tokens) is longer than the model's context length (8)"},
            PromptTooLong,
        ),
        (400, {"error": {"message": "try increasing it", "type": "exceed_context_size_error"}}, PromptTooLong),
        (500, {"error": {"message": "Context size has been exceeded.", "type": "server_error"}}, PromptTooLong),
        (400, {"error": {"message": "Input tokens exceed the configured limit of 8 tokens."}}, PromptTooLong),
        (422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 8"}, PromptTooLong),
        (422, {"error": "Input validation error: `inputs` must have less than 8 tokens"}, PromptTooLong),
        (400, {"error": {"message": "litellm.ContextWindowExceededError: too much", "code": "400"}}, PromptTooLong),
        (
            400,
            [{"error": {"message": "The input token count (9) exceeds the maximum number of tokens allowed (8)."}}],
            PromptTooLong,
        ),
        (400, {"errors": [{"message": "bad"}]}, InvalidInput),
        (400, {"errors": ["bad"]}, InvalidInput),
        (400, {"error": ["bad"]}, InvalidInput),
        (400, {"title": "Bad", "status": 400}, InvalidInput),
        (422, {"detail": [{"msg": "bad"}]}, InvalidInput),
        (413, "<html>", InvalidInput),
        (
            413,
            {"error": {"message": "Request too large: tokens per minute", "code": "rate_limit_exceeded"}},
            EndpointFault,
        ),
        (400, {"error": {"message": "no", "code": "invalid_api_key"}}, EndpointFault),
        (400, {"error": {"message": "no", "code": "model_not_found"}}, EndpointFault),
        (400, {"error": {}}, EndpointFault),
        (400, [], EndpointFault),
        (400, None, EndpointFault),
    ],
)
def test_errors_of_all_servers_say_whose_fault_they_are(status: int, value: Any, kind: type[Exception]) -> None:
    assert type(fault_of_answer(status, {}, json.dumps(value).encode(), ())) is kind


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"message": "bad", "code": "400"}, InvalidInput),
        ({"message": "no", "code": "context_length_exceeded"}, PromptTooLong),
        ({"message": CONTEXT, "code": 500}, PromptTooLong),
        ({"message": "too large", "code": 413}, InvalidInput),
        ("bad", AnswerFailed),
        ({"message": "CUDA error", "code": "500"}, AnswerFailed),
    ],
)
async def test_errors_in_mid_answer_say_whose_fault_they_are(error: Any, kind: type[Exception]) -> None:
    def script(asked: Asked) -> bytes:
        return GOOD if asked.body["max_completion_tokens"] == PROBE else stream(choice("h"), {"error": error})

    async with ScriptedServer(script) as server, engine_of(server, max_attempts=1) as engine:
        with pytest.raises(kind):
            await engine.submit(ask())
