"""The worker's books against what they hold: ledger, engine queue, tenants, in-flight record, caches, partitions."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import torch
from aiokafka import TopicPartition

from benchmarks.growth.tree import Row, best, find, method, once, rows_of

WINDOW_RECORDS = 128


def measure(is_tiny: bool) -> list[Row]:
    """CPU time of each."""
    few = (10, 100)
    return [
        *rows_of(_ledger, "open offsets", few if is_tiny else (1_000, 100_000, 1_000_000)),
        *rows_of(_queue, "jobs that want a slot", few if is_tiny else (128, 512, 2_048)),
        *rows_of(_tenants, "remembered tenants", few if is_tiny else (10, 1_000, 10_000)),
        *rows_of(_record, "jobs at work of a partition", few if is_tiny else (16, 128, 10_000)),
        *rows_of(_reuse, "kept entries", few if is_tiny else (1_000, 100_000)),
        *rows_of(_embeddings, "kept embeddings", few if is_tiny else (1_000, 100_000)),
        *rows_of(_polls, "partitions", (1, 12) if is_tiny else (1, 100, 1_000)),
    ]


def _ledger(count: int) -> dict[tuple[str, str], float]:
    Ledger = find("pipeline.consuming.ledger:PartitionLedger", "pipeline.ledger:PartitionLedger")
    ledger = Ledger(0, max_out_of_order=count)
    for offset in range(count):
        ledger.deliver(offset)
    order = list(range(count))
    random.Random(0).shuffle(order)
    complete = method(ledger, "complete", "settle")
    return {("an offset completed, in any order", "µs"): 1e6 * once(lambda: [complete(one) for one in order]) / count}


def _queue(count: int) -> dict[tuple[str, str], float]:
    Queue = find("pipeline.admission.engine_queue:EngineQueue", "pipeline.dispatch:Dispatch")
    Job = find("pipeline.admission.engine_queue:QueuedJob", "pipeline.dispatch:Claim")

    async def hand_out() -> float:
        queue = Queue(8, _shares())
        slot = method(queue, "slot", "place")

        async def job(number: int) -> None:
            async with slot(Job(100, tenant=f"t{number % 16}")):
                await asyncio.sleep(0)

        began = time.process_time()
        await asyncio.gather(*(job(number) for number in range(count)))
        return time.process_time() - began

    return {("a slot of the engine, 16 tenants", "µs"): 1e6 * asyncio.run(hand_out()) / count}


def _shares() -> Any:
    return find("pipeline.admission.tenant_shares:FairShares", "pipeline.tenants:FairShares")()


def _tenants(count: int) -> dict[tuple[str, str], float]:
    shares = _shares()

    def job(tenant: str) -> None:
        shares.join(tenant)
        shares.charge(tenant, 1)
        shares.leave(tenant)

    for number in range(count):
        job(f"t{number}")
    return {("a job of one tenant", "µs"): 1e6 * best(lambda: [job("t0") for _ in range(50)]) / 50}


def _record(count: int) -> dict[tuple[str, str], float]:
    State = find("pipeline.consuming.suspect_state:SuspectState", "pipeline.suspects:PartitionRecord")
    state = State()
    for offset in range(count):
        state.start(offset)
    return {("in-flight record encoded", "µs"): 1e6 * best(state.encode)}


def _reuse(count: int) -> dict[tuple[str, str], float]:
    Cache = find("pipeline.stages.caches:SingleFlightCache", "pipeline.reuse:SharedWork")

    async def evict() -> float:
        cache = Cache(100 * count)

        async def make() -> tuple[object, int]:
            return object(), 100

        for number in range(count):
            await cache.get(number, make)
        further = min(count, 2_000)
        began = time.process_time()
        for number in range(count, count + further):
            await cache.get(number, make)
        return (time.process_time() - began) / further

    return {("a miss of a full cache of shared work", "µs"): 1e6 * asyncio.run(evict())}


def _embeddings(count: int) -> dict[tuple[str, str], float]:
    cache = find("vision.embedding_cache:EmbeddingCache", "vision.cache:EmbeddingCache")(count * 256)
    keys = [number.to_bytes(32, "big") for number in range(count)]
    embedding = torch.zeros(64)
    for key in keys:
        cache.get_or_compute([key], lambda wanted: [embedding] * len(wanted))
    few = keys[:100]
    return {
        ("a hit of the embedding cache", "µs"): 1e6
        * best(lambda: [cache.get_or_compute([key], lambda _: []) for key in few])
        / len(few),
        ("its statistics", "µs"): 1e6 * best(cache.stats),
    }


def _polls(partitions: int) -> dict[tuple[str, str], float]:
    """Records at hand in every partition, and room for a window of jobs."""
    tps = [TopicPartition("jobs", number) for number in range(partitions)]

    async def poll() -> tuple[float, float]:
        take = _fair_poll(tps) if _has_fair_poll() else _rounds(tps)
        polls, records = 100, 0
        began = time.process_time()
        for _ in range(polls):
            records += sum(map(len, (await take()).values()))
        return (time.process_time() - began) / max(1, records), records / polls

    seconds, records = asyncio.run(poll())
    return {("a polled record", "µs"): 1e6 * seconds, ("records a poll", "records"): records}


def _has_fair_poll() -> bool:
    try:
        find("pipeline.consuming.fair_poll:FairPoll")
    except LookupError:
        return False
    return True


class _Fetched:
    """Stands for aiokafka's fetched records: every partition always has more."""

    def __init__(self, tps: list[TopicPartition]) -> None:
        self.partitions = dict.fromkeys(tps)

    def is_error(self, _: TopicPartition) -> bool:
        return False

    def take(self, tp: TopicPartition, most: int) -> list[int]:
        del self.partitions[tp]
        self.partitions[tp] = None  # its next turn is the last
        return [0] * most

    async def getmany(
        self, *wanted: TopicPartition, timeout_ms: int = 0, max_records: int = 1
    ) -> dict[TopicPartition, list[int]]:
        for tp in list(self.partitions):
            if tp in wanted:
                return {tp: self.take(tp, max_records)}
        return {}


def _fair_poll(tps: list[TopicPartition]) -> Any:
    poll = find("pipeline.consuming.fair_poll:FairPoll")({"jobs": 0})
    fetched = _Fetched(tps)
    return lambda: poll.take(fetched, lambda _: WINDOW_RECORDS, {0: WINDOW_RECORDS})


def _rounds(tps: list[TopicPartition]) -> Any:
    rounds = find("pipeline.rounds:Rounds")({"jobs": 0})
    fetched, free = _Fetched(tps), dict.fromkeys(tps, WINDOW_RECORDS)
    return lambda: rounds.take(fetched, rounds.rooms(free, {0: WINDOW_RECORDS}, put_off=False), 0)
