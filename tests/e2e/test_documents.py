"""Documents put into a bucket become records: real notifications, late and doubled ones, and pages that are shared."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import boto3
import jsonschema_rs
import pytest
import yaml
from aiokafka import AIOKafkaProducer
from document_files import SCHEMA, drawn, receipts_pdf, receipts_route, shared_pages
from document_world import DocumentWorld, records_in
from parts import create_topic, eventually, unique_name
from world import PARTITIONS, World

from nanovllm.cli.main import main
from nanovllm.demo.child_process import LocalProcess
from nanovllm.messages.document_record import DocumentRecord
from nanovllm.pipeline.events.envelope import parse_events
from nanovllm.training.synthetic import Receipt

BRIDGE_PROGRAM = Path(__file__).resolve().parents[1] / "pipeline" / "bridge_program.py"
DOCUMENTS = 200
REPLACED = 10
SHARE = 0.4
FIRST_RECEIPT = 40_000
"""The receipts of no other test."""
SETTINGS = {"NANOVLLM_DELIVERY": "exactly_once", "NANOVLLM_ENGINE__MAX_NUM_SEQS": "16"}
STRICT_SCHEMA = {
    **SCHEMA,
    "properties": {
        "vendor": {"type": "string", "pattern": "^[A-Z& ]{1,17}$"},
        "number": {"type": "string", "pattern": "^[A-Z]{0,2}-?[0-9-]{4,7}$"},
        "date": {"type": "string", "pattern": "^[0-9A-Z./ -]{8,11}$"},
        "total": {"type": "string", "pattern": "^([$]|EUR )?[0-9,]{1,9}[.][0-9]{2}$"},
    },
}


class Corpus:
    """Documents of 1 to 12 pages, most of them short.

    ``pages`` are the receipts of each, ``older`` those that the first ones had in the version before.
    """

    def __init__(self, random: Random) -> None:
        lengths = [1, 12, *random.choices(range(1, 13), weights=[2**-n for n in range(12)], k=DOCUMENTS - 2)]
        numbers = shared_pages(random, [*lengths, *random.choices((1, 2), k=REPLACED)], share=SHARE)
        receipts = {number: drawn(1, first=FIRST_RECEIPT + number)[0] for pages in numbers for number in pages}
        self.numbers = numbers[:DOCUMENTS]
        self.pages = [[receipts[number] for number in pages] for pages in numbers[:DOCUMENTS]]
        self.older = [[receipts[number] for number in pages] for pages in numbers[DOCUMENTS:]]
        self.distinct_pages = len(receipts)

    @property
    def shared(self) -> float:
        """Share of the pages that stand in another document too."""
        documents = Counter(number for pages in self.numbers for number in set(pages))
        slots = [number for pages in self.numbers for number in pages]
        return sum(documents[number] > 1 for number in slots) / len(slots)


@pytest.mark.kafka
@pytest.mark.s3
@pytest.mark.slow
async def test_notified_documents_have_one_record_a_version_and_another_schema_encodes_nothing(kafka_broker, tmp_path):
    random = Random(21)
    corpus = Corpus(random)
    assert corpus.shared >= SHARE
    async with DocumentWorld.on(kafka_broker, tmp_path, SETTINGS) as documents:
        world = documents.world
        documents.write_routes(
            receipts_route(world.bucket),
            receipts_route(world.bucket, "again/**/*.pdf", name="strict", response_schema=STRICT_SCHEMA),
        )
        keys = [f"in/{number % 7}/scan {number:03d}+ü.pdf" for number in range(DOCUMENTS)]
        copies = [key.replace("in/", "again/", 1) for key in keys]
        worker = documents.worker("worker")
        worker.start()
        try:
            shown = [*corpus.older, *corpus.pages[REPLACED:]]
            etags = [documents.put(key, pdf_of(pages)) for key, pages in zip(keys, shown, strict=True)]
            # Of these, some have a record by now, and some are gone before they are read.
            etags[:REPLACED] = [documents.put(keys[n], pdf_of(corpus.pages[n])) for n in range(REPLACED)]
            await resend(documents, random, share=0.3)
            await until_done(documents, worker)
            await resend(documents, random, share=0.2)
            await until_done(documents, worker)
            after_first = documents.metrics()
            for key, copy in zip(keys, copies, strict=True):
                source = {"Bucket": world.bucket, "Key": key}
                world.s3.client.copy_object(Bucket=world.bucket, Key=copy, CopySource=source)
            await until_done(documents, worker)
            after_second = documents.metrics()
        finally:
            exit_code = await asyncio.to_thread(worker.stop, 30.0)
        assert exit_code == 0, worker.tail(30)

        assert not await documents.read(world.topics.dead_letters)
        found = await documents.records()
        times = Counter((record.document.uri, record.document.etag) for record in found)
        assert [version for version, count in times.items() if count > 1] == []
        records = {(record.document.uri, record.document.etag): record for record in found}
        uris = [[f"s3://{world.bucket}/{key}" for key in some] for some in (keys, copies)]
        firsts, seconds = ([records[version] for version in zip(some, etags, strict=True)] for some in uris)
        for some, schema, names in ((firsts, SCHEMA, keys), (seconds, STRICT_SCHEMA, copies)):
            validator = jsonschema_rs.validator_for({"type": "array", "items": schema})
            for record, name in zip(some, names, strict=True):
                assert record.status == "complete"
                assert record.constrained
                assert validator.is_valid(record.value)
                assert documents.sidecar(name) == record
        for some in (firsts, seconds):
            right, total = right_pages(some, corpus.pages)
            assert right >= 0.9 * total, f"{right} of {total} pages are right"
        encoded = after_first["nanovllm_encoder_images_total"]
        assert 0 < encoded <= corpus.distinct_pages
        assert after_second["nanovllm_encoder_images_total"] == encoded

        coverage = evaluate(tmp_path, firsts, corpus.pages)["metrics"]["coverage"]
        assert (coverage["count"], coverage["total"]) == (DOCUMENTS, DOCUMENTS)


@pytest.mark.kafka
@pytest.mark.slow
async def test_documents_of_a_queue_whose_bridge_is_killed_in_mid_batch_have_a_record_each(kafka_broker, s3, tmp_path):
    world = World(kafka_broker, s3, tmp_path, {"NANOVLLM_DOCUMENTS__ROUTES": str(tmp_path / "routes.yaml")})
    (tmp_path / "routes.yaml").write_text(yaml.safe_dump({"version": 1, "routes": [receipts_route(world.bucket)]}))
    await world.create_topics()
    await create_topic(kafka_broker, world.topics.events, partitions=PARTITIONS)
    sqs = boto3.client("sqs", endpoint_url=s3.endpoint_url, region_name=s3.region)
    url = sqs.create_queue(QueueName=unique_name("queue"))["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    s3.client.put_bucket_notification_configuration(
        Bucket=world.bucket,
        NotificationConfiguration={"QueueConfigurations": [{"QueueArn": arn, "Events": ["s3:ObjectCreated:*"]}]},
    )
    pages = drawn(25, first=FIRST_RECEIPT)
    uris = {s3.put(world.bucket, f"in/{n} +%.pdf", pdf_of([page])): page for n, page in enumerate(pages)}

    def bridge(*program: str) -> LocalProcess:
        return world.process("bridge", *program, "bridge", "sqs", url, "--visibility", "2", "--receivers", "1")

    def is_empty() -> bool:
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        counts = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"]
        return not any(int(counts[name]) for name in names)

    killed = bridge(str(BRIDGE_PROGRAM), "publish")
    killed.start()
    await eventually(lambda: not killed.is_running)
    assert killed.exit_code == -signal.SIGKILL, killed.tail()
    again = bridge("-m", "nanovllm.cli.main")
    again.start()
    await eventually(is_empty, why="messages are left in the queue")
    assert again.stop() == 0, again.tail()
    await world.drain("worker")
    records = await records_in(kafka_broker, world.topics.results)
    assert {record.document.uri for record in records} == uris.keys()
    assert len(records) == len(uris)


def pdf_of(pages: Sequence[Receipt]) -> bytes:
    return receipts_pdf([one.image for one in pages])


async def resend(documents: DocumentWorld, random: Random, *, share: float) -> None:
    """A second producer sends copies of some of the notifications, late, in another order, to any partition."""
    topic = documents.world.topics.events
    copies = [record.value for record in await documents.read(topic) if is_of_document(record.value)]
    copies = random.sample(copies, round(share * len(copies)))
    async with AIOKafkaProducer(bootstrap_servers=documents.world.bootstrap_servers) as producer:
        for value in copies:
            await producer.send_and_wait(topic, value, partition=random.randrange(PARTITIONS))


def is_of_document(value: bytes) -> bool:
    return any(event.key.endswith(".pdf") for event in parse_events(value))


async def until_done(documents: DocumentWorld, worker: LocalProcess) -> None:
    """Return when the worker has ended every notification, those of its own writes too."""
    events, quiet = documents.world.topics.events, 0
    async with asyncio.timeout(240):
        while quiet < 3:
            assert worker.is_running, worker.tail(30)
            quiet = quiet + 1 if await documents.world.lag(events) == 0 else 0
            await asyncio.sleep(0.3)


def right_pages(records: Sequence[DocumentRecord], pages: Sequence[Sequence[Receipt]]) -> tuple[int, int]:
    """Pages whose every field is exactly as printed, and all pages."""
    shown = [
        (found, one.fields)
        for record, some in zip(records, pages, strict=True)
        for found, one in zip(record.value, some, strict=True)
    ]
    return sum(all(fields[name] == value for name, value in found.items()) for found, fields in shown), len(shown)


def evaluate(folder: Path, records: Sequence[DocumentRecord], pages: Sequence[Sequence[Receipt]]) -> Any:
    """The report of ``nanovllm evaluate``."""
    truth, results, report = (folder / name for name in ("truth.jsonl", "records.jsonl", "report.json"))
    results.write_text("".join(f"{record.model_dump_json()}\n" for record in records))
    truths = (
        {"uri": record.document.uri, "value": [dict(one.fields) for one in some], "pages": len(some)}
        for record, some in zip(records, pages, strict=True)
    )
    truth.write_text("".join(f"{json.dumps(one)}\n" for one in truths))
    assert main(["evaluate", str(truth), str(results), "-o", str(report), "--fail-under", "coverage=1"]) == 0
    return json.loads(report.read_text())
