"""The worker: takes records, starts the work on each, commits what has ended, and leaves in order."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine
from typing import Any

from nanovllm.engine.backends.base import EngineBackend
from nanovllm.errors import EngineDead, SystemicError
from nanovllm.metrics import Metrics
from nanovllm.objects.fetch import ObjectFetcher
from nanovllm.pipeline.admission.admission import Admission
from nanovllm.pipeline.admission.key_order import KeyOrder
from nanovllm.pipeline.consuming.crash_guard import CrashGuard
from nanovllm.pipeline.consuming.ledger import PartitionLedger
from nanovllm.pipeline.consuming.partition import ConsumedRecord
from nanovllm.pipeline.consuming.retry_topics import RetryTopics
from nanovllm.pipeline.consuming.source import JobSource
from nanovllm.pipeline.failure.backoff import Backoff
from nanovllm.pipeline.failure.faults import ActiveFaults
from nanovllm.pipeline.operations.health import Health
from nanovllm.pipeline.stages.invalid_records import InvalidRecord
from nanovllm.pipeline.stages.process import Received, Stages
from nanovllm.pipeline.stages.spare_time import spare_time
from nanovllm.settings.worker import Settings
from nanovllm.sinks.claim_check import S3ResultStore
from nanovllm.sinks.kafka import KafkaSink
from nanovllm.vision.images.pool import DecoderPool

logger = logging.getLogger(__name__)

POLL_MS = 250
SHORT_POLL_MS = 20
COMMIT_INTERVAL_S = 1.0
TICK_S = 0.25
LEAVE_TIMEOUT_S = 5.0
TURN_S = 0.005
"""Time for which records are read in a row: a large message takes some 100 ms, and the heartbeats share the loop."""

# Records that are read at once from a partition whose last ones were no jobs: reading and refusing that many holds the
# event loop for about 0.2 ms beside jobs, and for about 0.4 ms alone.
BESIDE_JOBS = 8
ALONE = 16


class Worker:
    """Takes jobs from a source and sees to it that each delivery ends in exactly one way.

    A delivery ends as a result, as a dead letter, or back in Kafka: its offset is not committed, and it comes again.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        engine: EngineBackend,
        decoders: DecoderPool | None,
        fetcher: ObjectFetcher,
        sink: KafkaSink,
        metrics: Metrics,
        health: Health,
        result_store: S3ResultStore | None = None,
        in_flight: CrashGuard | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._metrics = metrics
        self._health = health
        self._backoff = backoff or Backoff()
        self._lanes = RetryTopics.of(settings).lanes
        self._admission = Admission(
            max_jobs=settings.max_admitted_jobs,
            max_bytes=settings.admission.max_bytes,
            lanes=set(self._lanes.values()),
        )
        self._faults = ActiveFaults(health, metrics, lapse_s=2 * self._backoff.cap_s + 5.0)
        self._stages = Stages(
            settings,
            engine=engine,
            decoders=decoders,
            fetcher=fetcher,
            sink=sink,
            metrics=metrics,
            faults=self._faults,
            backoff=self._backoff,
            result_store=result_store,
            in_flight=in_flight,
        )
        self._order = KeyOrder()
        self._at_work: dict[asyncio.Task[None], ConsumedRecord] = {}
        self._stop = asyncio.Event()
        self._is_draining = False
        self._is_spare_turn = False
        self.has_taken = False
        self._broken = asyncio.Event()
        self._breach: BaseException | None = None
        self.engine_stats = engine.stats()

    def stop(self) -> None:
        """Take no more jobs, finish those at work within the drain's budget, and let ``run`` return."""
        self._stop.set()

    async def run(self, source: JobSource, *, exit_when_drained: bool = False) -> None:
        """Work until ``stop`` is called, or until nothing is left with ``exit_when_drained``.

        Raises:
            EngineDead: the engine can answer nothing any more; what was at work goes back to Kafka.
            Exception: a delivery could not be ended in any of the three ways; the same.
        """
        is_polling = asyncio.Event()
        is_polling.set()
        polling = asyncio.create_task(self._take(source, is_polling), name="poll")
        others = [
            asyncio.create_task(self._commit_and_observe(source), name="commit"),
            asyncio.create_task(self._stop.wait(), name="stop"),
            asyncio.create_task(self._engine.dead.wait(), name="engine"),
            asyncio.create_task(self._broken.wait(), name="broken"),
        ]
        if exit_when_drained:
            others.append(asyncio.create_task(self._wait_until_drained(source), name="drained"))
        try:
            done, _ = await asyncio.wait([polling, *others], return_when=asyncio.FIRST_COMPLETED)
            if self._engine.dead.is_set():
                raise self._engine.death or EngineDead("the engine stopped")
            if self._breach is not None:
                raise self._breach
            for task in done:
                task.result()
            self._stop_taking(source)
            await self.drain()
        finally:
            self._stop_taking(source)
            await self._give_back(list(self._at_work))
            is_polling.clear()
            for task in others:
                task.cancel()
            await asyncio.wait([polling, *others], timeout=2 * POLL_MS / 1000)
            await self._leave(source)
            # Only a poll that a rebalance holds is still there; once the consumer has stopped, cancelling does no harm.
            polling.cancel()
            await asyncio.gather(polling, *others, return_exceptions=True)

    async def drain(self) -> None:
        """Wait until the jobs at work have ended, at most ``admission.drain_timeout_s``."""
        if self._at_work:
            logger.info("draining %d jobs", len(self._at_work))
            await asyncio.wait(list(self._at_work), timeout=self._settings.admission.drain_timeout_s)

    def drop(self, ledger: PartitionLedger) -> None:
        """A partition has left: end its jobs, for somebody else gets them now."""
        for task, delivery in list(self._at_work.items()):
            if delivery.ledger is ledger:
                task.cancel()

    async def _take(self, source: JobSource, is_polling: asyncio.Event) -> None:
        failures = 0
        while is_polling.is_set():
            takes_work = not (self._faults.are_present or self._is_draining)
            rooms = self._admission.rooms if takes_work else {}
            try:
                deliveries = await self._poll(source, rooms, takes_work)
            except SystemicError as error:
                failures += 1
                self._faults.report("kafka consumer", error)
                await asyncio.sleep(self._backoff.wait_s(failures))
                continue
            failures = 0
            self._faults.clear("kafka consumer")
            await self._begin(deliveries, source)
            if takes_work:
                await self._admission.wait_for_room(POLL_MS / 1000)

    async def _poll(self, source: JobSource, rooms: dict[int, int], takes_work: bool) -> list[ConsumedRecord]:
        has_room = any(rooms.values())
        if not (has_room and source.has_put_off):
            # With its hands full it waits afterwards, for room; otherwise here, for records.
            timeout_ms = POLL_MS if has_room or not takes_work else 0
            return await source.poll(rooms, timeout_ms if all(rooms.values()) else min(timeout_ms, SHORT_POLL_MS))
        if not source.can_read_put_off:
            return await source.poll(rooms, SHORT_POLL_MS)
        self._is_spare_turn = not self._is_spare_turn
        if not self._is_spare_turn:
            return await source.poll(rooms, 0)
        await spare_time()
        at_most = BESIDE_JOBS if self._admission.jobs else ALONE
        return await source.poll({lane: min(room, at_most) for lane, room in rooms.items()}, 0, put_off=True)

    async def _begin(self, deliveries: list[ConsumedRecord], source: JobSource) -> None:
        """Start the work on each; those that are no jobs are refused, and their partition waits for spare time."""
        self.has_taken |= bool(deliveries)
        for topic, count in Counter(delivery.topic for delivery in deliveries).items():
            self._metrics.consumed.labels(topic).inc(count)
        refused: dict[PartitionLedger, list[InvalidRecord]] = defaultdict(list)
        last: dict[PartitionLedger, Received | InvalidRecord] = {}
        turn_ends = time.monotonic() + TURN_S
        for delivery in deliveries:
            if time.monotonic() >= turn_ends:
                await asyncio.sleep(0)
                turn_ends = time.monotonic() + TURN_S
            if self._is_draining:
                break  # what is not begun is not settled, and so not committed
            if not delivery.is_current:
                continue
            received = last[delivery.ledger] = self._stages.receive(delivery)
            if isinstance(received, InvalidRecord):
                refused[delivery.ledger].append(received)
            else:
                self._begin_job(received)
        for received in last.values():
            if isinstance(received, InvalidRecord):
                source.put_off(received.delivery)
            else:
                source.take_up(received.context.delivery)
        for ledger, some in refused.items():
            self._refuse(ledger, some)

    def _begin_job(self, received: Received) -> None:
        context = received.context
        delivery = context.delivery
        reservation = self._admission.admit(len(delivery.value), self._lanes.get(delivery.topic, 0))
        turn = None
        if self._settings.admission.per_key_order and delivery.key is not None:
            turn = self._order.join((delivery.topic, delivery.partition, delivery.key))

        def close(_: bool) -> int:
            reservation.release()
            if turn is not None:
                turn.end()
            return 1

        self._start(self._stages.work(context, received.job, reservation, turn), delivery, close)

    def _refuse(self, ledger: PartitionLedger, refused: list[InvalidRecord]) -> None:
        held = sum(len(one.delivery.value) for one in refused)
        reservation = self._admission.admit(held, self._lanes.get(refused[0].delivery.topic, 0))
        reservation.release_slot(held)  # nobody works on them: the window is for jobs
        refusals = self._stages.refusals
        if refusals.add(ledger, refused, reservation):
            work, delivery = refusals.work_off(ledger), refused[0].delivery
            self._start(work, delivery, lambda is_cut_short: refusals.drop(ledger) if is_cut_short else 0)

    def _start(self, work: Coroutine[Any, Any, None], delivery: ConsumedRecord, close: Callable[[bool], int]) -> None:
        """``close`` is told whether the work was cut short, and returns how many deliveries it had."""
        task = asyncio.create_task(work)
        self._at_work[task] = delivery
        # Not inside the coroutine: a task that is cancelled before its first step never runs a line of it.
        task.add_done_callback(lambda ended: self._end(ended, close))

    def _end(self, task: asyncio.Task[None], close: Callable[[bool], int]) -> None:
        del self._at_work[task]
        error = None if task.cancelled() else task.exception()
        is_cut_short = task.cancelled() or error is not None
        deliveries = close(is_cut_short)
        if is_cut_short:
            self._metrics.jobs.labels("returned").inc(deliveries)
        if error is not None:
            # A delivery that has not ended would hold its partition's watermark for ever: the worker ends instead.
            self._breach = error
            self._broken.set()

    def _stop_taking(self, source: JobSource) -> None:
        self._is_draining = self._health.is_draining = True
        source.stop_taking()

    async def _give_back(self, tasks: list[asyncio.Task[None]]) -> None:
        if not tasks:
            return
        logger.warning("%d jobs go back to Kafka", len(tasks))
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=LEAVE_TIMEOUT_S)

    async def _leave(self, source: JobSource) -> None:
        try:
            async with asyncio.timeout(LEAVE_TIMEOUT_S):
                await source.stop()
        except TimeoutError:
            logger.warning("the consumer group was not left in time")

    async def _commit_and_observe(self, source: JobSource) -> None:
        committed_at = time.monotonic()
        while True:
            planned = time.monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            self._metrics.event_loop_lag_seconds.set(max(0.0, time.monotonic() - planned))
            self._health.has_joined = source.has_joined
            self._health.is_engine_alive = not self._engine.dead.is_set()
            self.engine_stats = self._engine.stats()
            self._faults.observe()
            self._metrics.jobs_in_flight.set(self._admission.jobs)
            self._metrics.admitted_bytes.set(self._admission.bytes)
            if time.monotonic() - committed_at >= COMMIT_INTERVAL_S:
                await source.commit()
                committed_at = time.monotonic()
                self._observe_partitions(source)

    def _observe_partitions(self, source: JobSource) -> None:
        # Cleared first: partitions that left must not go on showing their last lag.
        self._metrics.consumer_lag.clear()
        self._metrics.watermark.clear()
        for (topic, partition), lag in source.lags.items():
            self._metrics.consumer_lag.labels(topic, partition).set(lag)
        for (topic, partition), offset in source.watermarks.items():
            self._metrics.watermark.labels(topic, partition).set(offset)

    async def _wait_until_drained(self, source: JobSource) -> None:
        idle_since: float | None = None
        while True:
            await asyncio.sleep(TICK_S)
            if self._at_work or self._faults.are_present or not await source.is_drained():
                idle_since = None
                continue
            idle_since = idle_since or time.monotonic()
            if time.monotonic() - idle_since >= self._settings.admission.idle_exit_s:
                logger.info("nothing is left to do")
                return
