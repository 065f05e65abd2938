"""Why the engine waited: seconds by reason, with a clock of its own, and at workers of which one stage is slow."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from bench import Bench, GatedEngine, eventually, png
from parts import S3Part

from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import BrokersUnavailable
from nanovllm.metrics import Metrics
from nanovllm.objects.fetch import ObjectFetcher
from nanovllm.pipeline.operations.engine_idle import EngineIdle
from nanovllm.pipeline.stages.context import Progress
from nanovllm.pipeline.worker import Worker
from nanovllm.settings.s3 import S3Settings
from nanovllm.statistics import EngineStats


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Idle:
    """An `EngineIdle` with a clock that is set by hand."""

    def __init__(self) -> None:
        self.clock, self.metrics = Clock(), Metrics()
        self.idle = EngineIdle(self.metrics, clock=self.clock)

    def passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @property
    def seconds(self) -> dict[str, float]:
        self.idle.observe(EngineStats())
        return idle_seconds(self.metrics)


def idle_seconds(metrics: Metrics) -> dict[str, float]:
    """The seconds of each reason that has any."""
    name = "nanovllm_engine_idle_seconds_total"
    samples = [sample for family in metrics.registry.collect() for sample in family.samples if sample.name == name]
    return {sample.labels["reason"]: sample.value for sample in samples if sample.value}


def test_a_worker_without_records_has_an_empty_topic_and_one_behind_its_topic_waits_for_the_broker() -> None:
    world = Idle()
    world.passes(1)
    world.idle.records_wait = True
    world.passes(2)
    world.idle.records_wait = False
    world.passes(4)
    assert world.seconds == {"empty": 5, "broker": 2}


def test_an_engine_with_a_request_is_not_idle_whatever_else_waits() -> None:
    world = Idle()
    with world.idle.request:
        world.passes(1)
        with world.idle.waits["decode"], world.idle.request:
            world.passes(2)
        world.passes(4)
    assert world.seconds == {}
    world.passes(8)
    assert world.seconds == {"empty": 8}


def test_time_counts_for_what_is_nearest_to_the_engine() -> None:
    world = Idle()
    fetched, admitted = Progress(0.0, idle=world.idle), Progress(0.0, idle=world.idle)
    with admitted.stage("admit"):
        world.passes(1)
        with fetched.stage("fetch"):
            world.passes(2)
            with world.idle.waits["decode"]:
                world.passes(4)
                with world.idle.waits["broker"]:
                    world.passes(8)
            world.passes(16)
        with fetched.stage("publish"), fetched.stage("infer"):
            world.passes(32)
    assert world.seconds == {"admission": 33, "fetch": 18, "decode": 4, "broker": 8}


def test_a_stage_that_fails_is_left() -> None:
    world = Idle()
    with pytest.raises(ValueError, match="no"), Progress(0.0, idle=world.idle).stage("fetch"):
        raise ValueError("no")
    world.passes(3)
    assert world.seconds == {"empty": 3}


def test_time_with_images_and_without_text_is_the_engines_own_figure() -> None:
    world = Idle()
    with world.idle.request:
        world.idle.observe(EngineStats(image_seconds=1.5))
        world.idle.observe(EngineStats(image_seconds=4.0))
    assert world.seconds == {"encode": 4.0}


class GatedFetcher(ObjectFetcher):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gate = asyncio.Event()

    async def fetch(self, ref: Any, **held: Any) -> Any:
        await self.gate.wait()
        return await super().fetch(ref, **held)


def seconds_of(worker: Worker, reason: str) -> float:
    worker.idle.observe(worker.engine.stats())
    return idle_seconds(worker.metrics).get(reason, 0.0)


async def counts_alone(worker: Worker, reason: str) -> bool:
    """Whether the time that passes counts for ``reason``, and for nothing else."""
    seconds_of(worker, reason)
    before = idle_seconds(worker.metrics)
    await asyncio.sleep(0.01)
    grown = seconds_of(worker, reason) - before.get(reason, 0.0)
    others = {name: value for name, value in idle_seconds(worker.metrics).items() if name != reason}
    return grown > 0 and others == {name: value for name, value in before.items() if name != reason}


def image_job(s3: S3Part) -> dict[str, Any]:
    bucket = s3.make_bucket()
    return {"job_id": "j", "prompt": "<|image|>?", "images": [s3.put(bucket, "in.png", png("#123456"))]}


def reading(bench: Bench, job: dict[str, Any]) -> S3Settings:
    """The settings of an object store of which the job's bucket may be read."""
    return bench.settings.s3.model_copy(update={"allow": (job["images"][0].rpartition("/")[0],)})


async def test_an_object_that_does_not_come_is_the_reason(bench: Bench, s3: S3Part) -> None:
    job = image_job(s3)
    fetcher = GatedFetcher(reading(bench, job), max_bytes=10**6)
    async with EchoEngine() as engine, bench.working(engine, fetcher) as (worker, _):
        await bench.send(job)
        await eventually(lambda: worker.idle.reason == "fetch")
        assert await counts_alone(worker, "fetch")
        fetcher.gate.set()
        await bench.results(1)
        await eventually(lambda: worker.idle.reason == "empty")


async def test_an_image_that_is_being_decoded_is_the_reason(
    bench: Bench, s3: S3Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, gate, exchange = image_job(s3), asyncio.Event(), bench.decoders._exchange

    async def gated(*arguments: Any) -> Any:
        await gate.wait()
        return await exchange(*arguments)

    monkeypatch.setattr(bench.decoders, "_exchange", gated)
    async with EchoEngine() as engine, bench.working(engine, s3=reading(bench, job)) as (worker, _):
        await bench.send(job)
        await eventually(lambda: worker.idle.reason == "decode")
        assert await counts_alone(worker, "decode")
        gate.set()
        await bench.results(1)
        await eventually(lambda: worker.idle.reason == "empty")


async def test_brokers_that_give_no_records_are_the_reason(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async with EchoEngine() as engine, bench.working(engine) as (worker, _):
        assert bench.source is not None
        await eventually(lambda: worker.idle.reason == "empty")

        async def refuse(*_: Any, **__: Any) -> Any:
            raise BrokersUnavailable("no broker answers")

        with monkeypatch.context() as patch:
            patch.setattr(bench.source, "poll", refuse)
            await eventually(lambda: worker.idle.reason == "broker")
            assert await counts_alone(worker, "broker")
        await eventually(lambda: worker.idle.reason == "empty")


async def test_an_engine_at_work_waits_for_nothing(bench: Bench) -> None:
    engine = GatedEngine()
    async with engine, bench.working(engine) as (worker, _):
        await bench.send({"job_id": "j", "prompt": "a"})
        await engine.submitted("j")
        seconds_of(worker, "empty")
        before = idle_seconds(worker.metrics)
        await asyncio.sleep(0.01)
        seconds_of(worker, "empty")
        assert idle_seconds(worker.metrics) == before
        engine.open("j")
        await bench.results(1)
