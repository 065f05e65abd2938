"""What a job costs its worker, counted in calls and tasks; and the bytes of its records, which no saving changes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import re
import sys
import uuid
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from types import FrameType
from typing import Any

import aiokafka
import msgpack
import prometheus_client
import pydantic
import pytest
from bench import Bench, eventually

import nanovllm
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.kafka.keyed_producer import KeyedProducer
from nanovllm.sinks.kafka import KafkaSink

JOBS = 200
MAX_CALLS_A_JOB = 360
"""Of functions in Python, the resumption of a coroutine among them: about 310 here, and 457 at commit 57b782f."""

COUNTED = (
    *(str(Path(package.__file__).parent) for package in (nanovllm, prometheus_client, pydantic)),
    *(str(module.__file__) for module in (contextlib, dataclasses, functools, uuid)),
    str(Path(aiokafka.__file__).parent / "producer" / "producer.py"),
    str(Path(aiokafka.__file__).parent / "partitioner.py"),
    "<string>",
)


async def test_a_job_takes_one_task_and_few_calls(bench: Bench) -> None:
    calls: Counter[str] = Counter()
    tasks: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            calls[frame.f_code.co_filename] += 1

    def make_task(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:
        tasks[work.__qualname__.partition(".")[0]] += 1
        return asyncio.Task(work, loop=loop, **options)

    for number in range(JOBS):
        job = {"job_id": f"j-{number}", "prompt": f"what is on page {number} of it?"}
        await bench.producer.send(bench.settings.topics.jobs, msgpack.packb(job), partition=0)
    await bench.producer.flush()
    asyncio.get_running_loop().set_task_factory(make_task)
    async with (
        KeyedProducer(bootstrap_servers=bench.bootstrap_servers, linger_ms=5) as producer,
        bench.working(EchoEngine(), sink=KafkaSink(producer)),
    ):
        sys.setprofile(count)
        try:
            await eventually(lambda: bench.metrics.jobs.labels("result")._value.get() == JOBS)
        finally:
            sys.setprofile(None)
    assert tasks["process_job"] == JOBS
    assert not tasks["EchoEngine"] + tasks["KafkaSink"] + tasks["RecoveringProducer"]
    assert sum(number for name, number in calls.items() if name.startswith(COUNTED)) <= MAX_CALLS_A_JOB * JOBS


JOB = {"job_id": "j-ä-1", "prompt": 'say "é\u2028"\n and <b>', "metadata": {"page": 7, "half": 0.5, "none": None}}
RESULT_ID = "3fb7bc3e-98a5-534b-8fdc-7263a85aeb8d"
SOURCE = '"source":{"topic":"TOPIC","partition":0,"offset":0,"timestamp_ms":TIME}'
RESULT = (
    '{"version":1,"job_id":"j-ä-1","result_id":"' + RESULT_ID + '","status":"ok",'
    '"text":"say \\"é\u2028\\"\\n and <b>","token_ids":[0,1,2,3,4],"finish_reason":"stop",'
    '"usage":{"input_tokens":5,"output_tokens":5,"image_tokens":0,"cached_tokens":0},'
    '"model":{"id":"echo","revision":"1","parameter_digest":"' + "0" * 64 + '"},"inputs":[],'
    '"timings_ms":{"admit":T,"fetch":0.0,"prepare":T,"queue":T,"encode":0.0,"time_to_first_token":T,"generation":0.0,'
    '"total":T},' + SOURCE + ',"worker":"w-1","metadata":{"page":7,"half":0.5,"none":null}}'
)
METRICS = (
    '{"version":1,"job_id":"j-ä-1","result_id":"' + RESULT_ID + '","worker":"w-1","model":"echo",' + SOURCE + ","
    '"finish_reason":"stop","num_prompt_tokens":5,"num_generation_tokens":5,"num_cached_tokens":0,'
    '"num_image_tokens":0,"queue_time_ms":T,"time_to_first_token_ms":T,"generation_time_ms":0.0,"mean_itl_ms":0.0,'
    '"e2e_time_ms":T,"tokens_per_second":0.0,"fetch_time_ms":0.0,"prepare_time_ms":T,"encode_time_ms":0.0,'
    '"engine_seconds_spent":T,"engine_seconds_saved":0.0,"images":[]}'
)
MEASURED = "admit|prepare|queue|total|time_to_first_token|(?:queue_time|time_to_first_token|e2e_time|prepare_time)_ms"


def masked(text: str, topic: str) -> str:
    """``text`` of a message without what differs from run to run."""
    measured = re.compile(rf'"({MEASURED}|engine_seconds_spent)":[0-9.e-]+')
    text = measured.sub(r'"\1":T', text.replace(topic, "TOPIC"))
    return re.sub(r'"timestamp_ms":\d+', '"timestamp_ms":TIME', text)


@pytest.mark.parametrize("fmt", ["json", "msgpack"])
async def test_the_records_of_an_answer_keep_every_byte(bench: Bench, fmt: str) -> None:
    await bench.send(
        msgpack.packb(JOB) if fmt == "msgpack" else json.dumps(JOB).encode(),
        headers=[("Traceparent", b"00-ab-cd-01"), ("secret", b"s")],
        key=b"k",
    )
    topics = bench.settings.topics
    async with bench.working(EchoEngine(), worker_id="w-1"):
        for topic, kind, expected in (topics.results, "result", RESULT), (topics.metrics, "metrics", METRICS):
            (record,) = await bench.read(topic, 1)
            text = record.value.decode() if fmt == "json" else plain_json(msgpack.unpackb(record.value))
            assert masked(text, topics.jobs) == expected
            if fmt == "msgpack":
                assert msgpack.packb(msgpack.unpackb(record.value)) == record.value
            headers = dict(record.headers)
            assert re.fullmatch(rb"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", headers.pop("ce_time"))
            assert list(headers.items()) == [
                ("ce_specversion", b"1.0"),
                ("ce_id", RESULT_ID.encode()),
                ("ce_type", f"nanovllm.{kind}.v1".encode()),
                ("ce_source", f"/nanovllm/{topics.jobs}/0".encode()),
                ("ce_subject", "j-ä-1".encode()),
                ("content-type", f"application/{fmt}".encode()),
                ("traceparent", b"00-ab-cd-01"),
            ]
            assert record.key == "j-ä-1".encode()


def plain_json(message: Any) -> str:
    return json.dumps(message, ensure_ascii=False, separators=(",", ":"))
