"""Results for services: a reader that iterates, and a producer that waits for what it has sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from bench import Bench, png
from sample_messages import document_record, result

from nanovllm import DeadLetter, JobProducer, Result, ResultReader
from nanovllm.client.producer import SyncJobProducer
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import InvalidInput
from nanovllm.messages.document_record import DocumentRecord
from nanovllm.sinks.cloud_events import event_record


async def test_a_reader_iterates_over_what_comes(bench: Bench) -> None:
    async with ResultReader(bench.settings, dead_letters=True) as reader, bench.working(EchoEngine()):
        await bench.send({"job_id": "a", "prompt": "p"}, b"broken", {"job_id": "b", "prompt": "p"})
        seen = []
        async for outcome in reader:
            seen.append(outcome)
            if len(seen) == 3:
                break
    assert {outcome.job_id for outcome in seen if isinstance(outcome, Result)} == {"a", "b"}
    assert [outcome.code for outcome in seen if isinstance(outcome, DeadLetter)] == ["invalid_job"]


async def test_records_of_documents_in_the_topic_of_results_are_read_where_asked_for(bench: Bench) -> None:
    topic = bench.settings.topics.results
    for message in (document_record(), result()):
        record = event_record(message, topic, "json")
        await bench.producer.send_and_wait(topic, record.value, key=record.key, headers=list(record.headers))
    for documents, seen in ((False, {Result}), (True, {Result, DocumentRecord})):
        async with ResultReader(bench.settings, from_beginning=True, documents=documents) as reader:
            found: set[type] = set()
            async with asyncio.timeout(60):
                while found != seen:
                    found |= {type(outcome) for outcome in await reader.read()}
            assert reader.unreadable == 0


def producer(bench: Bench) -> JobProducer:
    return JobProducer(bench.settings.kafka, topic=bench.settings.topics.jobs, results=bench.settings.topics)


async def test_a_producer_waits_for_the_results_of_its_jobs_in_any_order(
    bench: Bench, images: Callable[[str, bytes], str]
) -> None:
    broken = images("broken.png", png()[:40])
    async with producer(bench) as jobs, bench.working(EchoEngine()):
        job_ids = [await jobs.send(f"question {number}") for number in range(5)]
        bad = await jobs.send("<|image|>", images=[broken])
        failed = await jobs.result(bad, timeout_s=60)
        outcomes = [await jobs.result(job_id, timeout_s=60) for job_id in reversed(job_ids)]
        assert isinstance(failed, DeadLetter)
        assert failed.code == "invalid_image"
        assert [outcome.text for outcome in outcomes if isinstance(outcome, Result)] == [
            f"question {number}" for number in reversed(range(5))
        ]
        with pytest.raises(InvalidInput, match="gave it out"):
            await jobs.result(bad)


async def test_a_wait_that_ends_early_may_be_repeated(bench: Bench) -> None:
    async with producer(bench) as jobs:
        job_id = await jobs.send("question")
        with pytest.raises(TimeoutError):
            await jobs.result(job_id, timeout_s=0.01)
        async with bench.working(EchoEngine()):
            assert (await jobs.result(job_id, timeout_s=60)).job_id == job_id


async def test_a_producer_that_reads_no_results_says_how(bench: Bench) -> None:
    async with JobProducer(bench.settings.kafka, topic=bench.settings.topics.jobs) as jobs:
        with pytest.raises(InvalidInput, match="results=True"):
            await jobs.result(await jobs.send("question"))


async def test_a_service_without_an_event_loop_waits_too(bench: Bench) -> None:
    def ask() -> str:
        topics = bench.settings.topics
        with SyncJobProducer(bench.settings.kafka, topic=topics.jobs, results=topics) as jobs:
            outcome = jobs.result(jobs.send("question"), timeout_s=60)
            assert isinstance(outcome, Result)
            return outcome.text

    async with bench.working(EchoEngine()):
        assert await asyncio.to_thread(ask) == "question"
