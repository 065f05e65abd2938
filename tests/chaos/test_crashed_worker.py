"""One job that takes the whole process down, among good ones on three workers."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from random import Random

import pytest
import yaml
from chaos.faulty_worker import HUNGER, POISON, UNDECODABLE
from chaos.fleet import Fleet
from parts import create_topic
from pdf_files import text_pdf
from world import World, reader_settings

from nanovllm.client.results import ResultReader
from nanovllm.messages.document_record import DocumentRecord
from nanovllm.messages.job import Job

pytestmark = pytest.mark.kafka

GOOD = 200
LIMIT = 2
SETTINGS = {
    "NANOVLLM_ENGINE__BACKEND": "echo",
    "NANOVLLM_DEAD_LETTERS__CRASH_LIMIT": str(LIMIT),
    "NANOVLLM_KAFKA__SESSION_TIMEOUT_MS": "1500",
    "NANOVLLM_KAFKA__HEARTBEAT_INTERVAL_MS": "300",
    "NANOVLLM_ADMISSION__DRAIN_TIMEOUT_S": "3",
}


@pytest.mark.parametrize(
    ("delivery", "prompt", "exit_code"),
    [
        ("at_least_once", POISON, -11),
        ("exactly_once", POISON, -11),
        ("at_least_once", HUNGER, -9),
        ("at_least_once", UNDECODABLE, -11),
        ("exactly_once", UNDECODABLE, -11),
    ],
    ids=["segfault", "segfault exactly_once", "out of memory", "decoding", "decoding exactly_once"],
)
async def test_the_culprit_is_buried_the_innocent_are_answered_and_the_fleet_lives(
    kafka_broker, s3, tmp_path, delivery: str, prompt: str, exit_code: int
):
    world = World(kafka_broker, s3, tmp_path, {**SETTINGS, "NANOVLLM_DELIVERY": delivery})
    await world.create_topics()
    await create_topic(
        kafka_broker, world.topics.in_flight, partitions=2, settings={"cleanup.policy": "compact"}
    )  # fmt: skip
    jobs = [Job(job_id=f"job-{number:03d}", prompt=f"Say {number}") for number in range(GOOD)]
    jobs.insert(GOOD // 2, Job(job_id="culprit", prompt=prompt))
    async with world.producer() as producer, world.reader() as reader:
        await asyncio.gather(*(producer.send_job(job) for job in jobs))
        async with Fleet(world, 3, Random(1)) as fleet:
            async with asyncio.timeout(200):
                while len(world.results) < GOOD or not world.dead_letters:
                    await world.read(reader)
            exit_codes = await fleet.drain()
        await world.read(reader)
    assert world.results.keys() == {f"job-{number:03d}" for number in range(GOOD)}
    ((culprit, letters),) = world.dead_letters.items()
    assert [letter.code for letter in letters] == ["crashed_worker"]
    assert culprit == "culprit"
    # The first death, among others, makes suspects; each of the next ones is counted.
    assert fleet.exit_codes == [exit_code] * (1 + LIMIT)
    assert exit_codes == [0, 0, 0]


@pytest.mark.slow
async def test_a_document_of_which_one_page_ends_workers_is_buried_and_the_others_have_records(
    kafka_broker, s3, tmp_path
):
    world = World(kafka_broker, s3, tmp_path, {**SETTINGS, "NANOVLLM_ENGINE__BACKEND": "native"})
    events, routes = f"{world.topics.results}.events", tmp_path / "routes.yaml"
    await world.create_topics()
    await create_topic(kafka_broker, events, partitions=2)
    await create_topic(
        kafka_broker, world.topics.in_flight, partitions=2, settings={"cleanup.policy": "compact"}
    )  # fmt: skip
    route = {
        "name": "letters",
        "match": {"bucket": world.bucket, "key": "in/*.pdf"},
        "prompt": "Read: <|image|>",
        "text": "hint",
        "hint_tokens": 64,
        "sampling": {"max_tokens": 8},
        "sidecar": {},
    }
    content = {"page_store": f"s3://{world.bucket}/kept", "routes": [route]}
    routes.write_text(yaml.safe_dump(content))
    world.worker_settings |= {"NANOVLLM_TOPICS__EVENTS": events, "NANOVLLM_DOCUMENTS__ROUTES": str(routes)}
    pages = [[f"This is page {number} of a letter."] for number in range(3)]
    documents = {f"in/{number}.pdf": text_pdf(*pages, [f"Letter {number}"]) for number in range(6)}
    documents["in/culprit.pdf"] = text_pdf(pages[0], [POISON], pages[2])
    async with world.producer() as producer, world.reader() as reader:
        for number, (key, body) in enumerate(documents.items()):
            world.s3.put(world.bucket, key, body)
            event = {
                "eventSource": "aws:s3",
                "eventName": "ObjectCreated:Put",
                "s3": {"bucket": {"name": world.bucket}, "object": {"key": key}},
            }
            value = json.dumps({"Records": [event]}).encode()
            await producer._producer.send_and_wait(events, value, partition=number % 2)
        async with ResultReader(reader_settings(world), from_beginning=True, documents=True) as records:
            found: dict[str, list[DocumentRecord]] = defaultdict(list)
            async with Fleet(world, 2, Random(1)) as fleet:
                async with asyncio.timeout(250):
                    while len(found) < len(documents) - 1 or not world.dead_letters:
                        await world.read(reader)
                        for outcome in await records.read():
                            if isinstance(outcome, DocumentRecord):
                                found[outcome.document.uri.rpartition("/")[2]].append(outcome)
                exit_codes = await fleet.drain()
    assert found.keys() == {key.partition("/")[2] for key in documents} - {"culprit.pdf"}
    assert {len({one.result_id for one in some}) for some in found.values()} == {1}
    ((_, letters),) = world.dead_letters.items()
    assert [letter.code for letter in letters] == ["crashed_worker"]
    assert fleet.exit_codes == [-11] * (1 + LIMIT)
    assert exit_codes == [0, 0]
