"""The way of a job through the worker: real broker, real S3 server, real decoder processes, an engine that echoes."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import msgpack
import pytest
from aiokafka import AIOKafkaProducer
from bench import Bench, FaultyFetcher, FaultySink, GatedEngine, eventually, png, reached

from nanovllm.engine.backends.base import Generation, Request
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import CredentialsRefused, EngineDead, FetchFailed, MessageTooLarge, ObjectNotFound, TransientError
from nanovllm.kafka.records import OutgoingRecord
from nanovllm.messages.result import Result
from nanovllm.objects.fetch import ObjectFetcher
from nanovllm.pipeline.consuming.partition import ConsumedRecord
from nanovllm.pipeline.stages import record_builder
from nanovllm.pipeline.stages.receive import Receive
from nanovllm.pipeline.worker import INVALID_POLL_RECORDS_IDLE
from nanovllm.sinks.dead_letter_record import read_dead_letter
from nanovllm.sinks.kafka import KafkaSink


async def test_the_log_says_once_that_the_group_is_joined_again(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "nanovllm")
    async with bench.working(EchoEngine()):
        await eventually(lambda: bench.health.has_joined)
        bench.source._has_joined = False
        await eventually(lambda: not bench.health.has_joined)
        bench.source._has_joined = True
        await eventually(lambda: bench.health.has_joined)
    assert caplog.text.count("in the consumer group again") == 1


async def test_every_record_ends_once_and_bad_ones_do_not_hold_up_the_rest(
    bench: Bench, images: Callable[[str, bytes], str]
) -> None:
    good = images("good.png", png())
    broken = images("broken.png", png()[:-30])
    huge = images("huge.png", b"x" * 100_001)
    await bench.send(
        {"job_id": "first", "prompt": "what is <|image|>", "images": [good], "metadata": {"k": [1]}},
        b"{not json",
        {"job_id": "unknown-sampling", "prompt": "p", "sampling": {"temprature": 1}},
        {"job_id": "broken", "prompt": "<|image|>", "images": [broken]},
        {"job_id": "huge", "prompt": "<|image|>", "images": [huge]},
        {"job_id": "forbidden", "prompt": "<|image|>", "images": ["s3://private/key.png"]},
        {"job_id": "missing", "prompt": "<|image|>", "images": ["s3://images/nowhere.png"]},
        {"job_id": "mismatch", "prompt": "<|image|> <|image|>", "images": [good]},
        {"job_id": "greedy", "prompt": "p", "sampling": {"max_tokens": 1_000_000}},
        {"job_id": "reply", "prompt": "p", "reply_to": "somebody-elses-topic"},
        {"job_id": "late", "prompt": "p", "deadline": "2020-01-01T00:00:00Z"},
        {"job_id": "last", "prompt": "no image"},
    )
    async with bench.working(EchoEngine()):
        results = await bench.results(2)
        letters = await bench.dead_letters(10)
        await eventually(lambda: reached(bench, 12))
    assert set(results) == {"first", "last"}
    first = results["first"]
    assert first["text"].startswith("what is <|image|>")
    assert first["status"] == "ok"
    assert first["metadata"] == {"k": [1]}
    assert first["source"]["offset"] == 0
    assert [(i["uri"], i["width"], i["height"], i["cache"]) for i in first["inputs"]] == [(good, 8, 6, "miss")]
    reasons = {
        headers["nanovllm_job_id"]: (headers["nanovllm_class"], headers["nanovllm_code"], headers["nanovllm_stage"])
        for headers, _ in letters
    }
    malformed = f"{bench.settings.topics.jobs}:0:1"
    assert reasons == {
        malformed: ("invalid", "invalid_job", "receive"),
        "unknown-sampling": ("invalid", "invalid_job", "receive"),
        "broken": ("invalid", "invalid_image", "prepare"),
        "huge": ("invalid", "image_too_large", "fetch"),
        "forbidden": ("invalid", "forbidden_uri", "admit"),
        "missing": ("permanent", "object_not_found", "fetch"),
        "mismatch": ("invalid", "placeholder_mismatch", "admit"),
        "greedy": ("invalid", "invalid_job", "admit"),
        "reply": ("invalid", "forbidden_uri", "receive"),
        "late": ("expired", "deadline_exceeded", "admit"),
    }
    assert b"{not json" in {value for _, value in letters}
    metrics = await bench.read(bench.settings.topics.metrics, 2)
    assert {record.key for record in metrics} == {b"first", b"last"}
    text = bench.metrics.exposition().decode()
    assert 'nanovllm_jobs_total{outcome="result"} 2.0' in text
    assert 'nanovllm_jobs_total{outcome="dead_letter"} 10.0' in text


async def test_a_job_sets_variables_of_the_chat_template_only_where_the_settings_allow_them(bench: Bench) -> None:
    asked: list[Any] = []

    class Recording(EchoEngine):
        def submit(self, request: Request) -> Generation:
            asked.append(request.chat_template_kwargs)
            return super().submit(request)

    allowed, refused = ({"prompt": "p", "chat_template_kwargs": {name: False}} for name in ("enable_thinking", "other"))
    engine = bench.settings.engine.model_copy(update={"job_chat_template_kwargs": ("enable_thinking",)})
    bench.settings = bench.settings.model_copy(update={"engine": engine})
    await bench.send({"job_id": "allowed", **allowed}, {"job_id": "refused", **refused})
    async with bench.working(Recording()):
        assert (await bench.results(1)).keys() == {"allowed"}
        ((headers, _),) = await bench.dead_letters(1)
    assert asked == [{"enable_thinking": False}]
    assert (headers["nanovllm_job_id"], headers["nanovllm_code"]) == ("refused", "invalid_job")


async def test_every_outcome_has_its_jobs_id_and_the_names_of_its_images(
    bench: Bench, images: Callable[[str, bytes], str]
) -> None:
    good, missing = images("good.png", png()), "s3://images/nowhere.png"
    local = {"data": base64.b64encode(png("blue")).decode(), "name": "scans/local.png"}
    named = {"uri": good, "name": "invoice 7"}
    chat = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": missing}}]}]
    await bench.send(
        {"job_id": "answered", "prompt": "<|image|>" * 4, "images": [good, local, named, {"data": local["data"]}]},
        {"job_id": "misspelt", "prompt": "<|image|>", "images": [good], "samplng": {}},
        {"job_id": "mismatch", "prompt": "none", "images": [local]},
        {"job_id": "missing", "messages": chat},
        {"prompt": "<|image|>", "images": [good], "sampling": {"x": 1}},
        b'{"job_id": "cut", "images": ["' + good.encode(),
        b'{"prompt": NaN}',
    )
    async with bench.working(EchoEngine()):
        result = Result.model_validate((await bench.results(1))["answered"])
        records = await bench.read(bench.settings.topics.dead_letters, 6)
    letters = [read_dead_letter(record.headers, record.value) for record in records]
    assert [(use.uri, use.name) for use in result.inputs] == [
        (good, None),
        (None, "scans/local.png"),
        (good, "invoice 7"),
        (None, None),
    ]
    assert result.input_names == (good, "scans/local.png", "invoice 7")
    jobs = bench.settings.topics.jobs
    assert {letter.job_id: letter.inputs for letter in letters} == {
        "misspelt": (good,),
        "mismatch": ("scans/local.png",),
        "missing": (missing,),
        f"{jobs}:0:4": (good,),
        "cut": (),
        f"{jobs}:0:6": (),
    }
    says = {letter.job_id: letter.message for letter in letters}
    assert says["misspelt"] == "job: unknown name samplng: did you mean sampling?"


async def test_bad_records_in_a_row_go_out_together_and_the_log_names_a_few(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    published: list[int] = []

    async def count(records: Sequence[OutgoingRecord]) -> None:
        published.append(len(records))

    await bench.send({"job_id": "before", "prompt": "p"}, *[b"{no job"] * 200, {"job_id": "behind", "prompt": "p"})
    async with bench.working(EchoEngine(), sink=FaultySink(bench.producer, count)):
        assert set(await bench.results(2)) == {"before", "behind"}
        letters = await bench.dead_letters(200)
        await eventually(lambda: reached(bench, 202))
        await eventually(lambda: bench.metrics.registry.get_sample_value("nanovllm_jobs_in_flight") == 0)
    assert len({headers["nanovllm_source_offset"] for headers, _ in letters}) == 200
    assert max(published) > 3
    told = [record.getMessage() for record in caplog.records if "dead letter" in record.getMessage()]
    assert 0 < len(told) < 200
    counts = [int(text.split()[0]) if text[0].isdigit() else 1 for text in told]
    assert sum(counts) == 200
    assert bench.metrics.registry.get_sample_value("nanovllm_jobs_total", {"outcome": "dead_letter"}) == 200


async def test_a_failure_of_one_of_several_images_says_which(
    bench: Bench, images: Callable[[str, bytes], str], caplog: pytest.LogCaptureFixture
) -> None:
    good, broken, gone = images("good.png", png()), images("in/broken.png", png()[:-30]), "s3://images/in/gone.png"
    inside, truncated = {"data": base64.b64encode(png()).decode()}, {"data": base64.b64encode(png()[:-30]).decode()}
    signed = "s3://images/https://user:hunter2@store/" + 300 * "k" + "end.png?X-Amz-Signature=hunter3"
    failing: dict[str, tuple[list[Any], str]] = {
        "gone": ([good, inside, gone], "image 3 of 3 (s3://images/in/gone.png): "),
        "broken": ([good, broken], "image 2 of 2 (s3://images/in/broken.png): "),
        "inside": ([{**truncated, "name": "private name"}, good], "image 1 of 2: "),
        "forbidden": ([good, "s3://private/key.png"], "image 2 of 2 (s3://private/key.png): "),
        "promised": ([good, {"uri": good, "sha256": "0" * 64}], "image 2 of 2 (s3://images/good.png): "),
        "signed": ([signed, good], "image 1 of 2 (s3://images/https://store/kkk"),
        "alone": ([gone], "the object store answered"),
    }
    for job_id, (given, _) in failing.items():
        await bench.send({"job_id": job_id, "prompt": "<|image|>" * len(given), "images": given})
    async with bench.working(EchoEngine()):
        letters = await bench.dead_letters(len(failing))
    texts = {headers["nanovllm_job_id"]: headers["nanovllm_message"] for headers, _ in letters}
    for job_id, (_, beginning) in failing.items():
        assert texts[job_id].startswith(beginning)
        assert texts[job_id][:100] in caplog.text
    assert "end.png): " in texts["signed"]
    assert len(texts["signed"]) < 300
    told = repr([headers for headers, _ in letters]) + caplog.text
    assert not any(secret in told for secret in ("hunter", "private name"))
    causes = {headers["nanovllm_job_id"]: headers["nanovllm_cause"] for headers, _ in letters}
    assert causes["promised"] == "ObjectChanged"
    assert causes["gone"] == causes["alone"]


async def test_jobs_that_share_a_read_are_told_their_own_positions(
    bench: Bench, images: Callable[[str, bytes], str]
) -> None:
    good, shared = images("good.png", png()), "s3://images/shared.png"
    fetcher = ObjectFetcher(bench.settings.s3, max_bytes=100_000)
    fetch = fetcher.fetch

    async def only_the_shared_one(ref: Any, **held: Any) -> Any:
        if ref.uri != shared:
            return await fetch(ref, **held)
        await asyncio.sleep(0.5)
        raise ObjectNotFound("is not there")

    fetcher.fetch = only_the_shared_one  # type: ignore[method-assign]
    await bench.send(
        {"job_id": "first", "prompt": "<|image|>" * 2, "images": [shared, good]},
        {"job_id": "third", "prompt": "<|image|>" * 3, "images": [good, good, shared]},
    )
    async with bench.working(EchoEngine(), fetcher):
        letters = await bench.dead_letters(2)
    texts = {headers["nanovllm_job_id"]: headers["nanovllm_message"] for headers, _ in letters}
    assert texts == {
        "first": f"image 1 of 2 ({shared}): is not there",
        "third": f"image 3 of 3 ({shared}): is not there",
    }


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
@pytest.mark.parametrize("broken", ["dead_letter_record", "DeadLetter", "root_cause"])
async def test_a_dead_letter_that_cannot_be_built_is_an_envelope(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, delivery: str, broken: str
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("hunter2")

    monkeypatch.setattr(record_builder, broken, fails)
    monkeypatch.setattr(record_builder, "dead_letter_like", fails)
    tenants = bench.settings.tenants.model_copy(update={"header": "tenant"})
    values = [b"{no job", b"{no job", b'{"job_id": "forbidden", "prompt": "<|image|>", "images": ["s3://private/k"]}']
    await bench.send(*values, {"job_id": "good", "prompt": "p"}, key=b"k", headers=[("Tenant", b"acme"), ("a", b"b")])
    async with bench.working(EchoEngine(), delivery=delivery, tenants=tenants):
        assert set(await bench.results(1)) == {"good"}
        records = await bench.read(bench.settings.topics.dead_letters, 3)
        await eventually(lambda: reached(bench, 4))
    for record in records:
        letter, headers = read_dead_letter(record.headers), dict(record.headers)
        value = values[letter.source.offset]
        assert (letter.source.topic, letter.source.partition) == (bench.settings.topics.jobs, 0)
        assert (letter.code, letter.error_class, letter.worker) == ("internal", "permanent", bench.settings.worker_id)
        assert letter.stage == ("admit" if b"images" in value else "receive")
        assert "RuntimeError" in letter.message
        assert headers["nanovllm_value_sha256"] == hashlib.sha256(value).hexdigest().encode()
        assert headers["nanovllm_value_size"] == str(len(value)).encode()
        assert (record.value, headers["Tenant"], "a" in headers) == (b"", b"acme", False)
        assert b"hunter2" not in b"".join(headers.values())
    assert {read_dead_letter(record.headers).source.offset for record in records} == {0, 1, 2}
    text = bench.metrics.exposition().decode()
    assert 'code="internal"' in text
    assert 'code="forbidden_uri"' not in text


async def test_bad_records_in_a_row_end_in_order_and_once_with_exactly_once(bench: Bench) -> None:
    engine = GatedEngine()
    await bench.send({"job_id": "slow", "prompt": "p"}, *[b"{no job"] * 300, {"job_id": "behind", "prompt": "p"})
    async with bench.working(engine, delivery="exactly_once"):
        await engine.submitted("slow", "behind")
        assert await bench.committed() in (None, 0)
        engine.open("slow", "behind")
        letters = await bench.dead_letters(300)
        assert set(await bench.results(2)) == {"slow", "behind"}
        await eventually(lambda: reached(bench, 302))
    assert sorted(int(headers["nanovllm_source_offset"]) for headers, _ in letters) == list(range(1, 301))


async def test_jobs_of_other_partitions_pass_while_bad_records_wait_for_their_dead_letters(bench: Bench) -> None:
    is_open = asyncio.Event()

    async def hold(records: Sequence[OutgoingRecord]) -> None:
        if any(record.topic == bench.settings.topics.dead_letters for record in records):
            await is_open.wait()

    # More than the window holds: invalid records must take no job's slot.
    await bench.send(*[b"{no job"] * 50)
    await bench.send(*({"job_id": f"j{i}", "prompt": "p"} for i in range(20)), partition=1)
    async with bench.working(EchoEngine(), sink=FaultySink(bench.producer, hold)):
        assert set(await bench.results(20)) == {f"j{i}" for i in range(20)}
        is_open.set()
        assert len(await bench.dead_letters(50)) == 50


async def test_bad_records_that_their_topic_takes_only_one_by_one_are_sent_so(bench: Bench) -> None:
    async def refuse_batches(records: Sequence[OutgoingRecord]) -> None:
        if len(records) > 1 and records[0].topic == bench.settings.topics.dead_letters:
            raise MessageTooLarge("together they are too large")

    await bench.send(*[b"{no job"] * 20)
    async with bench.working(EchoEngine(), sink=FaultySink(bench.producer, refuse_batches)):
        assert len(await bench.dead_letters(20)) == 20
        await eventually(lambda: reached(bench, 20))


async def test_bad_records_in_a_row_are_read_while_the_loop_is_idle_and_the_jobs_behind_them_are_not(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused_so_far: list[int] = []

    async def idle_loop() -> None:
        sample = bench.metrics.registry.get_sample_value
        refused_so_far.append(int(sample("nanovllm_jobs_total", {"outcome": "dead_letter"}) or 0))
        await asyncio.sleep(0)

    monkeypatch.setattr("nanovllm.pipeline.worker.idle_loop", idle_loop)
    await bench.send(*[b"{no job"] * 200, *({"job_id": f"j{n}", "prompt": "p"} for n in range(100)))
    async with bench.working(EchoEngine()):
        assert len(await bench.results(100)) == 100
        await eventually(lambda: reached(bench, 300))
    # A few at a time; and none of the turns is spent on the jobs, of which there are as many.
    assert len(refused_so_far) >= 200 / INVALID_POLL_RECORDS_IDLE - 2
    assert len(refused_so_far) <= 60


async def test_bad_records_that_cannot_be_sent_yet_keep_their_offsets(bench: Bench) -> None:
    is_down, refused = True, 0

    async def refuse(records: Sequence[OutgoingRecord]) -> None:
        nonlocal refused
        if is_down and records[0].topic == bench.settings.topics.dead_letters:
            refused += 1
            raise TransientError("not now")

    engine = GatedEngine()
    await bench.send({"job_id": "other", "prompt": "p"}, partition=1)
    async with bench.working(engine, sink=FaultySink(bench.producer, refuse)):
        await engine.submitted("other")
        await bench.send(*[b"{no job"] * 20)
        await eventually(lambda: refused > 0)
        engine.open("other")
        await eventually(lambda: reached(bench, 1, partition=1))  # so offsets were committed meanwhile
        assert not await bench.committed()
        is_down = False
        assert len(await bench.dead_letters(20)) == 20
        await eventually(lambda: reached(bench, 20))


async def test_a_slow_job_holds_the_watermark_and_not_the_jobs_behind_it(bench: Bench) -> None:
    engine = GatedEngine()
    await bench.send(*({"job_id": f"j{i}", "prompt": f"p{i}"} for i in range(5)))
    async with bench.working(engine):
        await engine.submitted("j1", "j2", "j3", "j4", "j0")
        engine.open("j0", "j2", "j4")
        assert set(await bench.results(3)) == {"j0", "j2", "j4"}
        await eventually(lambda: reached(bench, 1))
        engine.open("j1")
        await eventually(lambda: reached(bench, 3))
        engine.open("j3")
        await eventually(lambda: reached(bench, 5))


async def test_the_lag_of_an_idle_and_an_empty_partition_reaches_zero(bench: Bench) -> None:
    await bench.send({"prompt": "p"}, {"prompt": "q"})
    async with bench.working(EchoEngine()):
        await bench.results(2)
        await eventually(lambda: reached(bench, 2))
        await eventually(lambda: reached(bench, 0, partition=1))
    assert await bench.ends() == 2


async def test_stopping_finishes_what_is_at_work_and_commits_it(bench: Bench) -> None:
    engine = GatedEngine()
    await bench.send({"job_id": "j0", "prompt": "p"})
    async with bench.working(engine) as (worker, running):
        await engine.submitted("j0")
        worker.stop()
        await bench.send({"job_id": "j1", "prompt": "later"})
        await bench.polled()
        assert not running.done()
        engine.open("j0", "j1")
        await running
    assert set(await bench.results(1)) == {"j0"}
    assert await bench.committed() == 1


async def test_what_the_drain_cannot_finish_goes_back_to_kafka(bench: Bench) -> None:
    admission = bench.settings.admission.model_copy(update={"drain_timeout_s": 0.2})
    engine = GatedEngine()
    await bench.send({"job_id": "j0", "prompt": "p"})
    async with bench.working(engine, admission=admission) as (worker, running):
        await engine.submitted("j0")
        worker.stop()
        await running
    assert await bench.committed() == 0
    async with bench.working(EchoEngine()):
        assert set(await bench.results(1)) == {"j0"}


async def test_a_dead_engine_ends_the_worker_with_nothing_committed_or_buried(bench: Bench) -> None:
    engine = GatedEngine()
    await bench.send({"job_id": "j0", "prompt": "p"})
    async with bench.working(engine) as (_, running):
        await engine.submitted("j0")
        engine.kill()
        with pytest.raises(EngineDead):
            await running
    assert await bench.committed() == 0
    async with bench.working(EchoEngine()):
        assert set(await bench.results(1)) == {"j0"}


async def test_a_job_whose_deadline_passes_at_work_is_aborted_and_buried(bench: Bench) -> None:
    engine = GatedEngine()
    deadline = datetime.now(UTC) + timedelta(seconds=10)
    await bench.send({"job_id": "slow", "prompt": "p", "deadline": deadline.isoformat()})
    async with bench.working(engine):
        await engine.submitted("slow")
        ((headers, _),) = await bench.dead_letters(1)
        assert (headers["nanovllm_class"], headers["nanovllm_stage"]) == ("expired", "infer")
        assert engine.stats().num_requests_running == 0
        await eventually(lambda: reached(bench, 1))


async def test_a_fault_that_passes_costs_only_attempts(bench: Bench, images: Callable[[str, bytes], str]) -> None:
    uri = images("a.png", png())
    fetcher = FaultyFetcher(bench.settings, FetchFailed("the store hiccupped"), failures=3)
    await bench.send({"job_id": "j", "prompt": "<|image|>", "images": [uri]})
    async with bench.working(EchoEngine(), fetcher):
        assert set(await bench.results(1)) == {"j"}
    assert fetcher.attempts == 4


async def test_a_fault_that_stays_is_buried_after_the_last_attempt(
    bench: Bench, images: Callable[[str, bytes], str]
) -> None:
    uri = images("a.png", png())
    fetcher = FaultyFetcher(bench.settings, FetchFailed("the store is down"))
    await bench.send({"job_id": "j", "prompt": "<|image|>", "images": [uri]}, {"job_id": "k", "prompt": "text"})
    async with bench.working(EchoEngine(), fetcher):
        ((headers, _),) = await bench.dead_letters(1)
        assert set(await bench.results(1)) == {"k"}
    assert headers["nanovllm_class"] == "retries_exhausted"
    assert headers["nanovllm_attempts"] == str(bench.settings.s3.max_attempts)


async def test_refused_credentials_stop_the_intake_and_lose_nothing(
    bench: Bench, images: Callable[[str, bytes], str]
) -> None:
    uri = images("a.png", png())
    fetcher = FaultyFetcher(bench.settings, CredentialsRefused("the object store answered 403 InvalidAccessKeyId"))
    await bench.send({"job_id": "j", "prompt": "<|image|>", "images": [uri]})
    async with bench.working(EchoEngine(), fetcher):
        bench.health.is_model_loaded = True
        await eventually(lambda: bench.health.systemic is not None)
        assert any("InvalidAccessKeyId" in reason for reason in bench.health.unready)
        await bench.send({"job_id": "k", "prompt": "text"})
        await eventually(lambda: fetcher.attempts > bench.settings.s3.max_attempts + 3)
        fetcher.heal()
        assert set(await bench.results(2)) == {"j", "k"}
        await eventually(lambda: bench.health.systemic is None)


async def test_results_follow_the_format_of_the_job(bench: Bench) -> None:
    packed = msgpack.packb({"job_id": "m", "prompt": "<|image|>", "images": [{"data": png()}]})
    await bench.send(packed)
    async with bench.working(EchoEngine()):
        (record,) = await bench.read(bench.settings.topics.results, 1)
    headers = dict(record.headers)
    assert headers["content-type"] == b"application/msgpack"
    assert headers["ce_type"] == b"nanovllm.result.v1"
    assert msgpack.unpackb(record.value)["job_id"] == "m"


async def test_a_chat_takes_its_images_from_its_parts_in_order(
    bench: Bench, images: Callable[[str, bytes], str]
) -> None:
    red, blue = images("red.png", png("red")), images("blue.png", png("blue"))
    content = [
        {"type": "image"},
        {"type": "text", "text": "and <|image|> as text, then"},
        {"type": "image_url", "image_url": {"url": blue}},
    ]
    await bench.send({"job_id": "c", "messages": [{"role": "user", "content": content}], "images": [red]})
    async with bench.working(EchoEngine()):
        result = (await bench.results(1))["c"]
    assert [image["uri"] for image in result["inputs"]] == [red, blue]


async def test_two_deliveries_of_one_job_are_answered_under_one_result_id(bench: Bench) -> None:
    engine = GatedEngine()
    await bench.send({"job_id": "twice", "prompt": "p"}, {"job_id": "twice", "prompt": "p"})
    async with bench.working(engine):
        await eventually(lambda: len(engine.requests) == 2)
        engine.open("twice")
        records = await bench.read(bench.settings.topics.results, 2)
    first, second = (json.loads(record.value)["result_id"] for record in records)
    assert first == second


async def test_a_result_that_no_topic_takes_is_buried(bench: Bench) -> None:
    await bench.send({"job_id": "large", "prompt": "word " * 20_000, "sampling": {"max_tokens": 4096}})
    worker_sink = KafkaSink(bench.producer, {bench.settings.topics.results: 5_000})
    async with bench.working(EchoEngine(), sink=worker_sink):
        ((headers, _),) = await bench.dead_letters(1)
        await eventually(lambda: reached(bench, 1))
    assert (headers["nanovllm_code"], headers["nanovllm_stage"]) == ("message_too_large", "publish")


async def test_the_seed_of_a_sampled_job_depends_on_its_id_alone(bench: Bench) -> None:
    engine = GatedEngine()
    sampled = {"prompt": "p", "sampling": {"temperature": 1.0}}
    await bench.send({"job_id": "a", **sampled}, {"job_id": "a", **sampled}, {"job_id": "b", **sampled})
    async with bench.working(engine):
        await eventually(lambda: len(engine.requests) == 3)
        first, again, other = (request.sampling.seed for request in engine.requests)
        assert first == again is not None
        assert other != first
        engine.open("a", "b")
        await bench.results(3)


async def test_the_window_is_bounded_and_the_rest_stays_in_kafka(bench: Bench) -> None:
    engine = GatedEngine()
    await bench.send(*({"job_id": f"j{i}", "prompt": "p"} for i in range(40)))
    async with bench.working(engine):
        await eventually(lambda: len(engine.requests) == 16)
        await bench.polled()
        assert len(engine.requests) == 16
        engine.open(*(f"j{i}" for i in range(40)))
        await bench.results(40)


async def test_a_partition_out_of_order_by_the_bound_is_read_no_further(bench: Bench) -> None:
    admission = bench.settings.admission.model_copy(update={"max_out_of_order": 4})
    engine = GatedEngine()
    await bench.send(*({"job_id": f"j{i}", "prompt": "p"} for i in range(12)))
    await bench.send({"job_id": "other", "prompt": "p"}, partition=1)
    async with bench.working(engine, admission=admission):
        engine.open(*(f"j{i}" for i in range(1, 12)), "other")
        assert set(await bench.results(5)) == {"j1", "j2", "j3", "j4", "other"}
        await bench.polled()
        assert len(engine.requests) == 6
        engine.open("j0")
        await bench.results(13)


@pytest.mark.kafka
@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
async def test_headers_beyond_measure_hold_up_neither_answers_nor_dead_letters(
    kafka_bench: Bench, delivery: str
) -> None:
    # Together they are larger than any message may be: only compressed do they get into the topic.
    bench = kafka_bench
    headers = [("traceparent", b"%01000d" % number) for number in range(1_100)]
    async with AIOKafkaProducer(
        bootstrap_servers=bench.bootstrap_servers, compression_type="gzip", max_request_size=8 << 20
    ) as producer:
        for value in (b"{not json", json.dumps({"job_id": "good", "prompt": "p"}).encode()):
            await producer.send_and_wait(bench.settings.topics.jobs, value, partition=0, headers=headers)
    async with bench.working(EchoEngine(), delivery=delivery):
        ((envelope, value),) = await bench.dead_letters(1)
        assert set(await bench.results(1)) == {"good"}
        await eventually(lambda: reached(bench, 2))
    assert value == b"{not json"
    assert envelope["nanovllm_headers_left_out"] == "1092"


async def test_the_event_loop_turns_between_records_that_take_long_to_read(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.send(*[json.dumps({"messages": [{"role": "user", "content": []}] * 4_000}).encode()] * 40)
    turns = 0
    received_in: list[int] = []
    receive = Receive.__call__

    def noting(stage: Receive, record: ConsumedRecord) -> object:
        received_in.append(turns)
        return receive(stage, record)

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    monkeypatch.setattr(Receive, "__call__", noting)
    counting = asyncio.create_task(count_turns())
    async with bench.working(EchoEngine()):
        await bench.dead_letters(40)
    counting.cancel()
    assert len(set(received_in)) == len(received_in) == 40


async def test_a_fault_of_the_worker_while_it_drains_is_not_a_clean_end(bench: Bench) -> None:
    engine = GatedEngine()

    async def broken(*_: Any) -> Any:
        raise RuntimeError("a fault of ours")

    async with bench.working(engine) as (worker, running):
        worker.stages = replace(worker.stages, publish=broken)
        await bench.send({"job_id": "j", "prompt": "p"})
        await engine.submitted("j")
        worker.stop()
        engine.open("j")
        with pytest.raises(RuntimeError, match="a fault of ours"):
            await running
    assert await bench.committed() in (None, 0)


async def test_a_result_says_whether_its_constraint_was_enforced(bench: Bench) -> None:
    await bench.send(
        {"job_id": "free", "prompt": "p"}, {"job_id": "asked", "prompt": "p", "sampling": {"choice": ["yes", "no"]}}
    )
    async with bench.working(EchoEngine()):
        results = await bench.results(2)
    assert results["asked"]["constrained"] is False, "the echo engine confines nothing"
    assert "constrained" not in results["free"]
