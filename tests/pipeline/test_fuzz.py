"""Whatever bytes come as a job: no exception escapes, and every refusal is a dead letter."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import hypothesis
import msgpack
import pytest
from bench import Bench, eventually, reached
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import ErrorClass, NanoVLLMError
from nanovllm.messages.base import Source
from nanovllm.messages.codec import decode_job
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.job import ChatMessage, ImageRef, Job
from nanovllm.pipeline.stages.context import dead_letter_class
from nanovllm.sampling_params import SamplingParams
from nanovllm.sinks.dead_letter_record import dead_letter_record, read_dead_letter

SOURCE = Source(topic="jobs", partition=0, offset=7)
NOW = datetime(2030, 1, 1, tzinfo=UTC)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        [
            "<|image|>",
            "s3://bucket/key",
            "s3://b/../x",
            "file:///etc/passwd",
            "data:image/png;base64,QQ==",
            "\x00",
            "1e9",
        ]
    ),
)
NAMES = sorted(
    {name for model in (Job, SamplingParams, ImageRef, ChatMessage) for name in model.model_fields} | {"type"}
)
names = st.sampled_from(NAMES) | st.text(max_size=6)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=5),
    max_leaves=15,
)
images = st.one_of(scalars, st.dictionaries(st.sampled_from([*ImageRef.model_fields, "x"]), scalars))
parts = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "image_url", "video"])},
    optional={"text": scalars, "image_url": st.one_of(scalars, st.fixed_dictionaries({"url": scalars}))},
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "root"]), "content": st.one_of(scalars, st.lists(parts))}
)
almost_jobs = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(Job.model_fields, scalars)
    | {
        "version": st.one_of(st.just(1), scalars),
        "messages": st.one_of(scalars, st.lists(messages, max_size=3)),
        "images": st.one_of(scalars, st.lists(images, max_size=3)),
        "sampling": st.one_of(scalars, st.dictionaries(st.sampled_from(sorted(SamplingParams.model_fields)), anything)),
        "deadline": scalars | st.datetimes().map(str),
        "metadata": anything,
        "later_field": anything,
    },
)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode(errors="surrogatepass")


def as_msgpack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, unicode_errors="surrogatepass")
    return packed


@st.composite
def damaged(draw: st.DrawFn, values: st.SearchStrategy[bytes]) -> bytes:
    """A message with some bytes changed, cut out or doubled."""
    value = bytearray(draw(values))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(value)))
        end = min(len(value), start + draw(st.integers(0, 4)))
        value[start:end] = draw(st.sampled_from([b"", bytes(value[start:end]) * 2, draw(st.binary(max_size=3))]))
    return bytes(value)


encoded = st.one_of(
    almost_jobs.map(as_json), almost_jobs.map(as_msgpack), anything.map(as_json), anything.map(as_msgpack)
)
inputs = st.one_of(encoded, damaged(encoded), st.binary(max_size=200))


def refusal_of(value: bytes) -> NanoVLLMError | None:
    """Why ``value`` is no job that can be worked with."""
    try:
        job = decode_job(value)
        job.image_refs()
        job.message_dicts()
        assert job.text_chars >= 0
        job.model_copy(update={"job_id": "jobs:0:7"}).sampling_params(SamplingParams(), 4_096)
    except NanoVLLMError as refusal:
        return refusal
    return None


def ends_well(value: bytes) -> None:
    """``value`` is a job, or its refusal makes a dead letter that holds it and can be read again."""
    refusal = refusal_of(value)
    if refusal is None:
        return
    assert refusal.error_class is ErrorClass.INVALID
    letter = DeadLetter(
        job_id="jobs:0:7",
        code=refusal.code,
        error_class=dead_letter_class(refusal),
        stage="receive",
        message=str(refusal),
        source=SOURCE,
        worker="w",
        received_at=NOW,
        failed_at=NOW,
    )
    record = dead_letter_record(letter, "dead", key=None, value=value)
    assert record.value == value
    read = read_dead_letter(record.headers)
    assert (read.code, read.error_class, read.source) == (refusal.code, "invalid", SOURCE)
    assert read.message
    assert read.message.isprintable()


@given(inputs)
@examples(2_000, suppress_health_check=list(hypothesis.HealthCheck))
def test_any_bytes_are_a_job_or_a_dead_letter(value: bytes) -> None:
    ends_well(value)


@pytest.mark.proof
@given(inputs)
@hypothesis.settings(max_examples=100_000, suppress_health_check=list(hypothesis.HealthCheck), database=None)
def test_a_hundred_thousand_inputs_are_jobs_or_dead_letters(value: bytes) -> None:
    ends_well(value)


@given(almost_jobs)
@examples(500, suppress_health_check=list(hypothesis.HealthCheck))
def test_json_and_msgpack_say_the_same_of_the_same_fields(fields: dict[str, Any]) -> None:
    def verdict(value: bytes) -> Job | str:
        try:
            return decode_job(value)
        except NanoVLLMError as error:
            return error.code

    assert verdict(as_json(fields)) == verdict(as_msgpack(fields))


async def test_a_worker_that_is_fed_nonsense_ends_every_record_once(bench: Bench) -> None:
    values: list[bytes] = []

    @given(inputs)
    @hypothesis.settings(max_examples=200, database=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.seed(7)
    def collect(value: bytes) -> None:
        values.append(value)

    collect()
    await bench.send(*values)
    async with bench.working(EchoEngine()) as (_, running):
        await eventually(lambda: reached(bench, len(values)))
        assert not running.done()
    ended = bench.metrics.exposition().decode()
    results, buried = (count_of(ended, outcome) for outcome in ("result", "dead_letter"))
    assert results + buried == len(values)
    letters = await bench.dead_letters(buried)
    assert {int(headers["nanovllm_source_offset"]) for headers, _ in letters} <= set(range(len(values)))
    assert all(values[int(headers["nanovllm_source_offset"])] == value for headers, value in letters)
    assert not any(headers["nanovllm_code"] == "internal" for headers, _ in letters)


def count_of(exposition: str, outcome: str) -> int:
    for line in exposition.splitlines():
        if line.startswith(f'nanovllm_jobs_total{{outcome="{outcome}"}}'):
            return int(float(line.split()[-1]))
    return 0
