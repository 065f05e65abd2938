"""The real worker process on real parts: what becomes of jobs, good and bad."""

from __future__ import annotations

import hashlib
import time

import pytest
from aiokafka import AIOKafkaProducer
from parts import FaultProxy, png
from world import World

from nanovllm.kafka.client import producer_kwargs
from nanovllm.messages.job import ImageRef

ECHO = {"NANOVLLM_ENGINE__BACKEND": "echo"}
READ_S = 120.0


async def read_all(world: World, *, outcomes: int) -> None:
    deadline = time.monotonic() + READ_S
    async with world.reader() as reader:
        while len(world.results) + len(world.dead_letters) < outcomes:
            await world.read(reader)
            assert time.monotonic() < deadline, f"only {sorted(world.results)}, dead {sorted(world.dead_letters)}"


@pytest.mark.kafka
@pytest.mark.s3
async def test_versions_digests_and_permissions_are_kept_on_real_servers(kafka_broker, versity_s3, tmp_path):
    bucket = versity_s3.make_bucket(versioned=True)
    old, new = png((255, 0, 0)), png((0, 0, 255), (30, 20))
    version = versity_s3.client.put_object(Bucket=bucket, Key="a b+ü.png", Body=old)["VersionId"]
    uri = versity_s3.put(bucket, "a b+ü.png", new)
    elsewhere = versity_s3.put(versity_s3.make_bucket(), "secret.png", new)
    world = World(kafka_broker, versity_s3, tmp_path, ECHO, bucket=bucket)
    await world.create_topics()
    images: dict[str, str | bytes | ImageRef] = {
        "newest": uri,
        "versioned": ImageRef(uri=uri, version_id=version, sha256=hashlib.sha256(old).hexdigest()),
        "inside": new,
        "changed": ImageRef(uri=uri, sha256=hashlib.sha256(old).hexdigest()),
        "missing": f"s3://{bucket}/none.png",
        "forbidden": elsewhere,
        "no-image": b"%PDF-1.7 and no image",
    }
    async with world.producer() as producer:
        for job_id, image in images.items():
            await producer.send("See <|image|>", images=[image], job_id=job_id)
    async with AIOKafkaProducer(**producer_kwargs(world.kafka)) as plain:
        await plain.send_and_wait(world.topics.jobs, b"\x93not a job", partition=0)
    await world.drain("worker")
    await read_all(world, outcomes=len(images) + 1)

    answers = {job_id: result.inputs[0] for job_id, (result,) in world.results.items()}
    assert answers.keys() == {"newest", "versioned", "inside"}
    assert (answers["newest"].width, answers["versioned"].width, answers["inside"].width) == (30, 64, 30)
    assert answers["versioned"].version_id == version
    assert answers["inside"].uri is None
    codes = {job_id: letter.code for job_id, (letter,) in world.dead_letters.items() if job_id in images}
    assert codes == {
        "changed": "object_changed",
        "missing": "object_not_found",
        "forbidden": "forbidden_uri",
        "no-image": "unsupported_image_format",
    }
    (malformed,) = (letter for job_id, (letter,) in world.dead_letters.items() if job_id not in images)
    assert (malformed.code, malformed.error_class, malformed.source.partition) == ("invalid_job", "invalid", 0)
    assert await world.lag() == 0


async def test_an_object_store_that_fails_for_a_while_costs_no_job(embedded_broker, s3, tmp_path):
    world = World(embedded_broker, s3, tmp_path, dict(ECHO))
    await world.create_topics()
    uris = [world.s3.put(world.bucket, f"{number}.png", png((number, 0, 0))) for number in range(20)]
    async with FaultProxy(s3.endpoint_url, ["refuse", "cut", "refuse", "unavailable"] * 3) as proxy:
        world.worker_settings |= {"NANOVLLM_S3__ENDPOINT_URL": proxy.url, "NANOVLLM_S3__MAX_ATTEMPTS": "15"}
        async with world.producer() as producer:
            for uri in uris:
                await producer.send("See <|image|>", images=[uri], job_id=uri)
        await world.drain("worker")
        assert proxy.faults_left == 0
    await read_all(world, outcomes=len(uris))
    assert world.results.keys() == set(uris)
    assert not world.dead_letters
