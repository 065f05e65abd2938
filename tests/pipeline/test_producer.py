from __future__ import annotations

import asyncio
import hashlib
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRecord
from parts import S3Part

from nanovllm import JobProducer, SamplingParams
from nanovllm.client.producer import SyncJobProducer
from nanovllm.errors import BrokersUnavailable, InvalidInput, InvalidJob, MessageTooLarge, PlaceholderMismatch
from nanovllm.kafka.admin import create_topics, message_limits
from nanovllm.messages.codec import decode_job, message_format
from nanovllm.messages.encoding import MessageFormat
from nanovllm.settings.kafka import KafkaSettings
from nanovllm.settings.s3 import S3Settings

PNG = b"\x89PNG not really" * 10


async def read(broker: str, topic: str, count: int) -> list[ConsumerRecord]:
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=broker, auto_offset_reset="earliest")
    await consumer.start()
    try:
        records: list[ConsumerRecord] = []
        while len(records) < count:
            for batch in (await consumer.getmany(timeout_ms=500)).values():
                records += batch
        return records
    finally:
        await consumer.stop()


@pytest.fixture
def topic(unique: Callable[[str], str]) -> str:
    return unique("jobs")


async def test_a_job_that_was_sent_is_the_job_that_is_read(embedded_broker: str, topic: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    async with JobProducer(bootstrap_servers=embedded_broker, topic=topic) as producer:
        job_id = await producer.send(
            "Compare <|image|> <|image|> <|image|>",
            images=["s3://bucket/a.png", tmp_path / "a.png", PNG],
            sampling=SamplingParams(temperature=0.0, stop=("\n",)),
            job_id="r-1",
            deadline="2030-01-31T12:00:00Z",
            metadata={"tenant": "a"},
        )
    assert job_id == "r-1"
    (record,) = await read(embedded_broker, topic, 1)
    job = decode_job(record.value)
    assert job.sampling == {"temperature": 0.0, "stop": ("\n",)}, "only what was set is sent"
    assert [image.data for image in job.images] == [None, PNG, PNG]
    assert record.key == b"s3://bucket/a.png"
    assert ("content-type", b"application/json") in record.headers


Files = tuple[IO[bytes], IO[str], IO[bytes]]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Files]:
    """``a.png`` open for bytes and for text, and its bytes in memory, read to their end."""
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(PNG)
    behind = io.BytesIO(PNG)
    behind.seek(0, io.SEEK_END)
    with Path("a.png").open("rb") as file, Path("a.png").open(encoding="utf-8") as text:
        yield file, text, behind


async def test_a_local_image_is_sent_under_the_name_that_it_was_given(
    embedded_broker: str, topic: str, files: Files
) -> None:
    file, text, behind = files
    async with JobProducer(bootstrap_servers=embedded_broker, topic=topic) as producer:
        images = ["a.png", Path("a.png"), file, behind, bytearray(PNG), memoryview(PNG), "s3://bucket/a.png"]
        await producer.send("<|image|>" * 7, images=images)
        for alone in ("a.png", PNG, io.BytesIO(PNG), "s3://bucket/a.png"):
            await producer.send("<|image|>", images=alone, job_id="alone")
        with pytest.raises(InvalidInput, match=r"a\.png cannot be read"):
            await producer.send("<|image|>", images=text)  # type: ignore[arg-type]
    jobs = [decode_job(record.value) for record in await read(embedded_broker, topic, 5)]
    (listed,) = [job for job in jobs if job.job_id is None]
    assert [image.data for image in listed.images] == [PNG] * 6 + [None]
    assert [image.name for image in listed.images] == ["a.png", "a.png", "a.png", None, None, None, None]
    alone = [job.images for job in jobs if job.job_id]
    assert sorted(str(image.name or image.uri) for (image,) in alone) == ["None", "None", "a.png", "s3://bucket/a.png"]


async def test_without_an_id_the_job_has_the_one_that_the_worker_derives(embedded_broker: str, topic: str) -> None:
    async with JobProducer(bootstrap_servers=embedded_broker, topic=topic) as producer:
        job_ids = await asyncio.gather(*(producer.send(f"question {n}") for n in range(8)))
    records = await read(embedded_broker, topic, 8)
    assert sorted(job_ids) == sorted(f"{topic}:{record.partition}:{record.offset}" for record in records)


@pytest.mark.parametrize(
    ("key", "expected"),
    [("image", b"sha256:" + hashlib.sha256(PNG).hexdigest().encode()), ("job_id", b"r-1"), ("none", None)],
)
async def test_the_key_is_what_was_asked_for(
    embedded_broker: str, topic: str, key: str, expected: bytes | None
) -> None:
    async with JobProducer(bootstrap_servers=embedded_broker, topic=topic, key=key) as producer:  # type: ignore[arg-type]
        await producer.send("<|image|>", images=[PNG], job_id="r-1")
    (record,) = await read(embedded_broker, topic, 1)
    assert record.key == expected


async def test_msgpack_is_sent_where_asked(embedded_broker: str, topic: str) -> None:
    async with JobProducer(bootstrap_servers=embedded_broker, topic=topic, fmt="msgpack") as producer:
        await producer.send("<|image|>", images=[PNG])
    (record,) = await read(embedded_broker, topic, 1)
    assert message_format(record.value) == "msgpack"
    assert decode_job(record.value).images[0].data == PNG


@pytest.mark.parametrize("fmt", ["json", "msgpack"])
@pytest.mark.parametrize("sampling", [SamplingParams(logit_bias={5: 1.0}), {"logit_bias": {5: 1.0}}])
async def test_token_ids_with_a_bias_are_sent_as_python_writes_them(
    embedded_broker: str, topic: str, fmt: MessageFormat, sampling: SamplingParams | dict[str, Any]
) -> None:
    async with JobProducer(bootstrap_servers=embedded_broker, topic=topic, fmt=fmt) as producer:
        await producer.send("a", sampling=sampling)
    (record,) = await read(embedded_broker, topic, 1)
    assert decode_job(record.value).sampling == {"logit_bias": {5: 1.0}}


async def test_an_image_too_large_for_a_message_is_refused_with_the_way_out(embedded_broker: str, topic: str) -> None:
    async with JobProducer(bootstrap_servers=embedded_broker, topic=topic) as producer:
        with pytest.raises(MessageTooLarge, match="--upload"):
            await producer.send("<|image|>", images=[bytes(1_000_000)])
        await producer.send("the producer goes on")
    assert len(await read(embedded_broker, topic, 1)) == 1


async def test_an_image_too_large_for_a_message_goes_to_s3(embedded_broker: str, topic: str, s3: S3Part) -> None:
    bucket, large = s3.make_bucket(), bytes(1_000_000)
    settings = S3Settings(endpoint_url=s3.endpoint_url, addressing_style="path")
    async with JobProducer(
        bootstrap_servers=embedded_broker, topic=topic, upload=f"s3://{bucket}/inbox", s3=settings
    ) as producer:
        await producer.send("<|image|>", images=[large])
        await producer.send("<|image|>", images=[PNG])
    first, second = sorted(
        (decode_job(record.value) for record in await read(embedded_broker, topic, 2)),
        key=lambda job: job.images[0].uri is None,
    )
    image, digest = first.images[0], hashlib.sha256(large).hexdigest()
    assert (image.uri, image.sha256) == (f"s3://{bucket}/inbox/{digest}", digest)
    assert s3.client.get_object(Bucket=bucket, Key=f"inbox/{digest}")["Body"].read() == large
    assert second.images[0].data == PNG, "what fits stays in the message"


async def test_mistakes_are_refused_before_anything_is_sent(embedded_broker: str, topic: str, tmp_path: Path) -> None:
    async with JobProducer(bootstrap_servers=embedded_broker, topic=topic) as producer:
        with pytest.raises(PlaceholderMismatch):
            await producer.send("no place", images=[PNG])
        with pytest.raises(InvalidJob, match="max_tokenz"):
            await producer.send("a", sampling={"max_tokenz": 1})
        with pytest.raises(InvalidJob, match="uri"):
            await producer.send("<|image|>", images=["ftp://example.com/a.png"])
        with pytest.raises(InvalidInput, match="cannot be read"):
            await producer.send("<|image|>", images=[tmp_path / "nope.png"])
    with pytest.raises(InvalidInput, match="not started"):
        await producer.send("a")


def test_a_service_without_an_event_loop_sends_too(embedded_broker: str, topic: str) -> None:
    with SyncJobProducer(bootstrap_servers=embedded_broker, topic=topic) as producer:
        assert producer.send("a", job_id="r-1") == "r-1"
    assert len(asyncio.run(read(embedded_broker, topic, 1))) == 1


async def test_absent_brokers_are_an_error_of_their_own() -> None:
    with pytest.raises(BrokersUnavailable, match=r"127\.0\.0\.1:1"):
        async with JobProducer(bootstrap_servers="127.0.0.1:1"):
            pass


def test_producing_jobs_imports_no_torch() -> None:
    program = (
        "import sys; from nanovllm import JobProducer, Job, Result, DeadLetter; import nanovllm.cli.main;"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL', 'moto'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


async def test_topics_are_created_once(embedded_broker: str, unique: Callable[[str], str]) -> None:
    kafka, names = KafkaSettings(bootstrap_servers=embedded_broker), [unique("a"), unique("b")]
    assert await create_topics(kafka, names[:1]) == names[:1]
    assert await create_topics(kafka, names, partitions=2) == names[1:]
    assert await create_topics(kafka, names) == []
    assert await message_limits(kafka, names) == dict.fromkeys(names, kafka.max_request_bytes)
