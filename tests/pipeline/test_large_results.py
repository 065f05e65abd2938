"""Results that no message takes: they lie in S3, are said where, and are never dropped."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from bench import Bench, FaultyFetcher, eventually, png, reached
from parts import S3Part, VersityNode, create_topic

from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import ConfigurationError, FetchFailed, StoreUnreachable
from nanovllm.messages.result import Result, result_id_for
from nanovllm.metrics import Metrics
from nanovllm.objects.s3_client import S3Client
from nanovllm.pipeline.consuming.ledger import PartitionLedger
from nanovllm.pipeline.consuming.partition import ConsumedRecord
from nanovllm.pipeline.consuming.retry_topics import RetryTopics
from nanovllm.pipeline.operations.engine_idle import EngineIdle
from nanovllm.pipeline.stages.receive import Receive
from nanovllm.pipeline.stages.record_builder import RecordBuilder
from nanovllm.settings.failures import RetrySettings
from nanovllm.settings.s3 import S3Settings
from nanovllm.settings.worker import Settings
from nanovllm.sinks.claim_check import S3ResultStore
from nanovllm.sinks.kafka import KafkaSink

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
    assert sent.result_id == result_id_for("large")
    assert sent.stored.uri.startswith(f"s3://{bucket}/results/-/{bench.settings.topics.jobs}/0/0-")
    body = s3.client.get_object(Bucket=bucket, Key=sent.stored.uri.split("/", 3)[3])["Body"].read()
    assert (hashlib.sha256(body).hexdigest(), len(body)) == (sent.stored.sha256, sent.stored.size)
    whole = Result.model_validate(json.loads(body))
    assert whole.text == LARGE["prompt"]
    assert whole.metadata == LARGE["metadata"]
    assert whole.result_id == sent.result_id


async def test_a_job_id_that_another_tenant_has_used_gives_none_of_its_text(bench: Bench, s3: S3Part) -> None:
    bucket = s3.make_bucket()
    tenants = bench.settings.tenants.model_copy(update={"header": "tenant"})
    senders = {b"one": "text of one", b"two": "text of two", b"../one/": "text of three", None: "text of none"}
    for tenant, prompt in senders.items():
        headers = [("tenant", tenant)] if tenant is not None else []
        await bench.send({"job_id": "same", "prompt": prompt}, headers=headers)
    await bench.send({"job_id": "same", "prompt": "again"}, headers=[("tenant", b"one")])
    stored = with_store(bench, s3, bucket, large_result_bytes=1)
    async with bench.working(EchoEngine(), s3=stored, tenants=tenants):
        records = await bench.read(bench.settings.topics.results, 5)
    results = [Result.model_validate_json(record.value) for record in records]
    texts = {result.source.offset: read_stored(s3, result).text for result in results}
    assert texts == dict(enumerate([*senders.values(), "again"]))
    assert {record.key for record in records} == {b"same"}
    assert {result.result_id for result in results} == {result_id_for("same")}
    folders = {uri.split("/")[4] for result in results if result.stored for uri in [result.stored.uri]}
    assert len(folders) == len(senders)
    assert {"one", "two", "-"} < folders


async def test_a_job_that_was_delayed_has_the_object_of_its_first_record(
    bench: Bench, s3: S3Part, images: Callable[[str, bytes], str]
) -> None:
    bucket, uri = s3.make_bucket(), images("large.png", png())
    retries = RetrySettings(delays_s=(1,))
    bench.settings = bench.settings.model_copy(update={"retries": retries})
    (topic,) = RetryTopics.of(bench.settings).delays_s
    await create_topic(bench.bootstrap_servers, topic, partitions=1)
    settings = with_store(bench, s3, bucket, large_result_bytes=1, max_attempts=1)
    fetcher = FaultyFetcher(bench.settings, FetchFailed("the object store answered 503 SlowDown"), failures=1)
    await bench.send({"job_id": "j", "prompt": "<|image|>", "images": [uri]})
    async with bench.working(EchoEngine(), fetcher, s3=settings):
        ((_, sent),) = (await bench.results(1)).items()
        assert await bench.read(topic, 1)
    assert Result.model_validate(sent).stored is not None
    assert f"/-/{bench.settings.topics.jobs}/0/0-" in sent["stored"]["uri"]


def read_stored(s3: S3Part, result: Result) -> Result:
    assert result.stored is not None
    bucket, key = result.stored.uri.removeprefix("s3://").split("/", 1)
    body = s3.client.get_object(Bucket=bucket, Key=key)["Body"].read()
    assert hashlib.sha256(body).hexdigest() == result.stored.sha256
    return Result.model_validate_json(body)


NAMES = ["", "a", "A", "-", "~", ".", "..", "a/b", "a\\b", "a%2Fb", "a b", "a\nb", "a\0b", "é", "\ufffd"]
NAMES += ["x" * 300, "x" * 301]


def stored_name(tenant: str = "", *, group_id: str = "group", via: str = "jobs", **record: Any) -> str:
    """The name for one record, read from ``via``: the jobs topic, or its retry topic."""
    settings = Settings.model_validate({"kafka": {"group_id": group_id}, "retries": {"delays_s": [60]}})
    fields = {"topic": "jobs", "partition": 1, "offset": 2, "timestamp_ms": 3, "key": None, "value": b"v", **record}
    ledger = PartitionLedger(0, max_out_of_order=1)
    retry_topics = RetryTopics({"jobs": 0}, (60,))
    consumed = ConsumedRecord(**fields, ledger=ledger)
    if via != "jobs":
        headers = retry_topics.origin_of(consumed).retry_headers(4, datetime.now(UTC), FetchFailed("503"))
        later = {"topic": via, "partition": 0, "offset": 77, "timestamp_ms": 88, "headers": headers}
        consumed = ConsumedRecord(**{**fields, **later}, ledger=ledger)
    context = replace(Receive(settings, retry_topics, EngineIdle(Metrics())).context_of(consumed), tenant=tenant)
    return RecordBuilder(settings, EchoEngine().model_info, lambda _: 1_000, retry_topics).stored_name(context)


def test_deliveries_of_one_record_have_one_name_and_no_others_have_it() -> None:
    name = stored_name()
    assert name == stored_name() == stored_name(via="jobs.retry-60s")
    others = [
        *map(stored_name, NAMES[1:]),
        stored_name(group_id="another"),
        stored_name(topic="other"),
        stored_name(topic="../jobs"),
        stored_name(partition=2),
        stored_name(offset=3),
        stored_name(timestamp_ms=4),
        stored_name(timestamp_ms=None),
        stored_name(value=b"w"),
    ]
    assert len({name, *others}) == 1 + len(others)


def test_no_tenants_name_leaves_its_folder_or_takes_anothers() -> None:
    names = {tenant: stored_name(tenant) for tenant in NAMES}
    assert len({name.split("/")[0] for name in names.values()}) == len(NAMES)
    for name in names.values():
        assert re.fullmatch(r"[A-Za-z0-9._~-]{1,249}/jobs/1/2-[0-9a-f]{64}", name), name
        assert not {".", ".."} & set(name.split("/"))


@pytest.mark.s3
async def test_a_real_server_keeps_what_each_name_was_given(versity_s3: S3Part) -> None:
    bucket = versity_s3.make_bucket()
    settings = S3Settings(endpoint_url=versity_s3.endpoint_url, addressing_style="path")
    store = S3ResultStore(f"s3://{bucket}/results", S3Client(settings).call)
    for tenant in NAMES:
        body = tenant.encode() + b"'s"
        stored = await store.put(stored_name(tenant, topic="t" * 249), body, "msgpack")
        assert stored.sha256 == hashlib.sha256(body).hexdigest()
        key = stored.uri.removeprefix(f"s3://{bucket}/")
        assert versity_s3.client.get_object(Bucket=bucket, Key=key)["Body"].read() == body


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
    key = first.uri.removeprefix(f"s3://{bucket}/")
    versity_s3.client.put_object(Bucket=bucket, Key=key, Body=b"by other means, without metadata")
    there = await store.put("id", b"one", "json")
    assert there.sha256 == hashlib.sha256(b"by other means, without metadata").hexdigest()
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
