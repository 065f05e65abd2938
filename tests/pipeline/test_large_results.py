"""Results that no message takes: they lie in S3, are said where, and are never dropped."""

from __future__ import annotations

import hashlib
import json

import pytest
from bench import Bench, eventually, reached
from parts import S3Part, VersityNode

from nanovllm.engine.echo import EchoEngine
from nanovllm.errors import ConfigurationError, StoreUnreachable
from nanovllm.pipeline.s3_client import S3Client
from nanovllm.pipeline.settings import S3Settings, Settings
from nanovllm.sinks.kafka import KafkaSink
from nanovllm.sinks.messages import Result, result_id_for
from nanovllm.sinks.s3 import S3ResultStore

LARGE = {"job_id": "large", "prompt": "word " * 2_000, "sampling": {"max_tokens": 4096}, "metadata": {"k": "v" * 3_000}}


def with_store(bench: Bench, s3: S3Part, bucket: str, **more: object) -> S3Settings:
    where = {"endpoint_url": s3.endpoint_url, "addressing_style": "path", "large_results": f"s3://{bucket}/results"}
    return S3Settings.model_validate({**bench.settings.s3.model_dump(), **where, **more})


async def test_a_result_too_large_for_its_topic_lies_in_s3_whole(bench: Bench, s3: S3Part) -> None:
    bucket = s3.make_bucket()
    sink = KafkaSink(bench.producer, {bench.settings.topics.results: 3_000})
    await bench.send(LARGE, {"job_id": "small", "prompt": "p"})
    async with bench.working(EchoEngine(), sink=sink, s3=with_store(bench, s3, bucket)):
        results = await bench.results(2)
        await eventually(lambda: reached(bench, 2))
    assert "stored" not in results["small"]
    sent = Result.model_validate(results["large"])
    assert sent.stored is not None
    assert (sent.text, sent.metadata, sent.status, sent.usage.output_tokens) == ("", {}, "ok", 2_001)
    assert sent.stored.uri == f"s3://{bucket}/results/{result_id_for('large')}.json"
    body = s3.client.get_object(Bucket=bucket, Key=sent.stored.uri.split("/", 3)[3])["Body"].read()
    assert (hashlib.sha256(body).hexdigest(), len(body)) == (sent.stored.sha256, sent.stored.size)
    whole = Result.model_validate(json.loads(body))
    assert whole.text == LARGE["prompt"]
    assert whole.metadata == LARGE["metadata"]
    assert whole.result_id == sent.result_id


async def test_the_settings_may_send_less_than_the_topic_takes(bench: Bench, s3: S3Part) -> None:
    bucket = s3.make_bucket()
    await bench.send(LARGE)
    async with bench.working(EchoEngine(), s3=with_store(bench, s3, bucket, large_result_bytes=2_000)):
        assert "stored" in (await bench.results(1))["large"]


async def test_without_its_store_a_large_result_waits_and_no_more_work_is_taken(bench: Bench, s3: S3Part) -> None:
    await bench.send(LARGE)
    bucket = "no-such-bucket-yet"
    settings = with_store(bench, s3, bucket, large_result_bytes=2_000)
    async with bench.working(EchoEngine(), s3=settings):
        await eventually(lambda: bench.health.systemic is not None)
        assert "NoSuchBucket" in (bench.health.systemic or "")
        assert await bench.committed() in (None, 0)
        s3.client.create_bucket(Bucket=bucket)
        assert "stored" in (await bench.results(1))["large"]


@pytest.mark.s3
async def test_what_was_stored_once_stays_on_a_real_server(versity_node: VersityNode, versity_s3: S3Part) -> None:
    bucket = versity_s3.make_bucket()
    settings = S3Settings(endpoint_url=versity_node.endpoint_url, addressing_style="path")
    store = S3ResultStore(f"s3://{bucket}/a/b", S3Client(settings).call)
    first = await store.put("id", b"one", "json")
    again = await store.put("id", b"another text", "json")
    assert again == first
    assert first.sha256 == hashlib.sha256(b"one").hexdigest()
    with pytest.raises(StoreUnreachable, match="no-such-bucket"):
        await S3ResultStore("s3://no-such-bucket", S3Client(settings).call).put("id", b"x", "json")


def test_a_place_for_results_has_its_form() -> None:
    for wrong in ("http://bucket/x", "bucket", "file:///etc"):
        with pytest.raises(ConfigurationError):
            S3ResultStore(wrong, None)
        with pytest.raises(ValueError, match="s3://bucket"):
            Settings.model_validate({"s3": {"large_results": wrong}})
    with pytest.raises(ValueError, match="large_results"):
        Settings.model_validate({"s3": {"large_result_bytes": 5}})


async def test_reply_to_reaches_an_allowed_topic_and_no_other(bench: Bench) -> None:
    topics = bench.settings.topics
    allowed = topics.model_copy(update={"reply_to": (topics.metrics,)})
    await bench.send(
        {"job_id": "mine", "prompt": "p", "reply_to": topics.metrics},
        {"job_id": "theirs", "prompt": "p", "reply_to": "somebody-elses"},
    )
    async with bench.working(EchoEngine(), topics=allowed):
        records = await bench.read(topics.metrics, 2)
        ((headers, _),) = await bench.dead_letters(1)
    events = {dict(record.headers)["ce_type"] for record in records}
    assert events == {b"nanovllm.result.v1", b"nanovllm.metrics.v1"}
    assert (headers["nanovllm_job_id"], headers["nanovllm_code"]) == ("theirs", "forbidden_uri")
