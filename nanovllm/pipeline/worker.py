"""The worker: polls records, starts a task for each job, commits what is complete, and leaves the group in order."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any

from nanovllm.engine.backends.base import EngineBackend
from nanovllm.errors import BrokersUnavailable, EngineDead
from nanovllm.metrics import Metrics
from nanovllm.pipeline.admission.admission import Admission, Reservation
from nanovllm.pipeline.admission.key_order import KeyOrder
from nanovllm.pipeline.consuming.ledger import PartitionLedger
from nanovllm.pipeline.consuming.partition import ConsumedRecord
from nanovllm.pipeline.consuming.record_source import RecordSource
from nanovllm.pipeline.consuming.retry_topics import RetryTopics
from nanovllm.pipeline.failure.backoff import Backoff
from nanovllm.pipeline.failure.faults import ActiveFaults
from nanovllm.pipeline.operations.engine_idle import EngineIdle
from nanovllm.pipeline.operations.health import Health
from nanovllm.pipeline.operations.idle_loop import idle_loop
from nanovllm.pipeline.operations.log import log_fields
from nanovllm.pipeline.operations.recent_jobs import RecentJobs
from nanovllm.pipeline.stages.admit import AfterKeyTurn
from nanovllm.pipeline.stages.context import JobContext
from nanovllm.pipeline.stages.infer import ENGINE_ENDPOINTS
from nanovllm.pipeline.stages.invalid_records import InvalidRecord
from nanovllm.pipeline.stages.process import Stages, process_job
from nanovllm.pipeline.stages.process_events import EventStages, process_events
from nanovllm.pipeline.stages.receive import Received, ReceivedEvents
from nanovllm.settings.worker import Settings

logger = logging.getLogger(__name__)

POLL_MS = 250
SHORT_POLL_MS = 20
COMMIT_INTERVAL_S = 1.0
TICK_S = 0.25
LEAVE_TIMEOUT_S = 5.0
SILENCE_S = 2.0
"""Brokers answer a fetch within half a second, with records or without; an engine that is idle waits for them then."""
MAX_DECODE_S = 0.005
"""Longest decoding without yielding to the event loop: a large message takes some 100 ms, and heartbeats share it."""

# Records of one poll of a partition whose last record was invalid: decoding and refusing them holds the event loop for
# about 0.2 ms beside jobs, and for about 0.4 ms without.
INVALID_POLL_RECORDS = 8
INVALID_POLL_RECORDS_IDLE = 16


@dataclass(eq=False)
class Worker:
    """Polls a source and takes each record to exactly one outcome.

    A record ends as a result, a dead letter or a delayed retry, or goes back to Kafka: its offset is not committed, and
    it is delivered again. ``lanes``: the priority of each topic.
    """

    settings: Settings
    _: KW_ONLY
    stages: Stages
    event_stages: EventStages | None
    admission: Admission
    engine: EngineBackend
    idle: EngineIdle
    recent: RecentJobs
    faults: ActiveFaults
    backoff: Backoff
    metrics: Metrics
    health: Health
    lanes: Mapping[str, int]
    key_order: KeyOrder | None
    written_topics: Sequence[str]

    def __post_init__(self) -> None:
        self._at_work: dict[asyncio.Task[None], ConsumedRecord] = {}
        self._stop = asyncio.Event()
        self._is_polling = True
        self._is_draining = False
        self._reads_invalid_next = False
        self.has_taken = False
        self._tombstones = 0
        self._left_at: float | None = None
        self._is_out = False
        # Fails with the error of a record that came to no outcome.
        self._breach: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.engine_stats = self.engine.stats()
        self.began = time.monotonic()
        self.lags: Mapping[tuple[str, int], int] = {}
        """Unfinished records by topic and partition, as they were a second ago at most."""
        self._delayed_topics = frozenset(RetryTopics.of(self.settings).delays_s)

    def stop(self) -> None:
        """Take no more jobs, finish those at work within the drain's budget, and let ``run`` return."""
        self._stop.set()

    async def run(self, source: RecordSource, *, exit_when_drained: bool = False) -> None:
        """Work until ``stop`` is called, or until nothing is left with ``exit_when_drained``.

        Raises:
            EngineDead: the engine can answer nothing any more; what was at work goes back to Kafka.
            Exception: a record could not be taken to an outcome; the same.
        """
        polling = asyncio.create_task(self._consume(source), name="poll")
        others: list[asyncio.Future[Any]] = [
            asyncio.create_task(self._commit_and_observe(source), name="commit"),
            asyncio.create_task(source.watch_topics(), name="topics"),
            asyncio.create_task(self._stop.wait(), name="stop"),
            asyncio.create_task(self.engine.dead.wait(), name="engine"),
            self._breach,
        ]
        if exit_when_drained:
            others.append(asyncio.create_task(self._wait_until_drained(source), name="drained"))
        try:
            done, _ = await asyncio.wait([polling, *others], return_when=asyncio.FIRST_COMPLETED)
            if self.engine.dead.is_set():
                raise self.engine.death or EngineDead("the engine stopped")
            for task in done:
                task.result()
            self._stop_taking(source)
            await self.drain()
            if self._breach.done():
                self._breach.result()  # a record came to no outcome while the worker drained
        finally:
            self._stop_taking(source)
            await self._give_back()
            self._is_polling = False
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
            await asyncio.wait(list(self._at_work), timeout=self.settings.admission.drain_timeout_s)
            if not self._at_work:
                logger.info("drained: all of them have ended")

    def drop(self, ledger: PartitionLedger) -> None:
        """A partition has left: cancel its jobs, which its next owner gets."""
        for task, record in list(self._at_work.items()):
            if record.ledger is ledger:
                task.cancel()

    async def _consume(self, source: RecordSource) -> None:
        failures = 0
        while self._is_polling:
            takes_work = not (self.faults.are_present or self._is_draining)
            rooms = self.admission.rooms if takes_work else {}
            try:
                records = await self._poll(source, rooms, takes_work)
            except BrokersUnavailable as error:
                failures += 1
                self.idle.records_wait = True  # for all that is known
                self.faults.report("kafka consumer", error)
                await asyncio.sleep(self.backoff.wait_s(failures))
                continue
            failures = 0
            self.faults.clear("kafka consumer")
            await self._begin(records, source)
            if any(rooms.values()) and not records and not self._may_have_records(source):
                self.idle.records_wait = False
            if takes_work:
                await self.admission.wait_for_room(POLL_MS / 1000)

    async def _poll(self, source: RecordSource, rooms: dict[int, int], takes_work: bool) -> list[ConsumedRecord]:
        has_room = any(rooms.values())
        if not (has_room and source.has_put_off):
            # Without a free slot it polls without waiting, then waits for a slot.
            timeout_ms = POLL_MS if has_room or not takes_work else 0
            return await source.poll(rooms, timeout_ms if all(rooms.values()) else min(timeout_ms, SHORT_POLL_MS))
        if not source.can_read_put_off:
            return await source.poll(rooms, SHORT_POLL_MS)
        self._reads_invalid_next = not self._reads_invalid_next
        if not self._reads_invalid_next:
            return await source.poll(rooms, 0)
        await idle_loop()
        at_most = INVALID_POLL_RECORDS if self.admission.jobs else INVALID_POLL_RECORDS_IDLE
        return await source.poll({lane: min(room, at_most) for lane, room in rooms.items()}, 0, put_off=True)

    async def _begin(self, records: list[ConsumedRecord], source: RecordSource) -> None:
        """Start a task for each job; partitions whose last record was invalid are read when the event loop is idle."""
        self.has_taken |= bool(records)
        for topic, count in Counter(record.topic for record in records).items():
            self.metrics.consumed.labels(topic).inc(count)
        invalid: dict[PartitionLedger, list[InvalidRecord]] = defaultdict(list)
        yield_at = time.monotonic() + MAX_DECODE_S
        for record in records:
            if time.monotonic() >= yield_at:
                await asyncio.sleep(0)
                yield_at = time.monotonic() + MAX_DECODE_S
            if self._is_draining:
                break  # a record without a task is not complete, and so not committed
            if not record.is_current:
                continue
            if self._passes_over(record):
                continue
            received = await self.stages.receive(record)
            if not record.is_current or self._is_draining:
                continue
            source.put_off(record, is_invalid=isinstance(received, InvalidRecord))
            if isinstance(received, InvalidRecord):
                invalid[record.ledger].append(received)
            elif isinstance(received, ReceivedEvents):
                self._begin_events(received)
            else:
                self._begin_job(received)
        for ledger, some in invalid.items():
            self._begin_invalid(ledger, some)

    def _passes_over(self, record: ConsumedRecord) -> bool:
        """Whether ``record`` is a tombstone that is no job; it is complete then."""
        if not record.is_tombstone:
            return False
        self.metrics.tombstones.labels(record.topic).inc()
        if self.settings.dead_letters.tombstones:
            return False
        self._tombstones += 1
        if self._tombstones.bit_count() == 1:  # the first, second, fourth, …
            where = f"{record.topic}-{record.partition} offset {record.offset}"
            logger.warning("%s has no value and is passed over; %d such records so far", where, self._tombstones)
        record.complete()
        return True

    def _begin_job(self, received: Received) -> None:
        context, stages = received.context, self.stages
        ends: list[Callable[[], None]] = []
        record = context.record
        if self.key_order is not None and record.key is not None:
            turn = self.key_order.join((record.topic, record.partition, record.key))
            stages = replace(stages, admit=AfterKeyTurn(turn, stages.admit))
            ends.append(turn.end)
        self._begin_record(context, lambda reservation: process_job(received.job, context, reservation, stages), *ends)

    def _begin_events(self, received: ReceivedEvents) -> None:
        assert self.event_stages is not None  # without routes no topic of events is read
        self._begin_record(received.context, partial(process_events, received, stages=self.event_stages))

    def _begin_record(
        self,
        context: JobContext,
        process: Callable[[Reservation], Coroutine[Any, Any, None]],
        *ends: Callable[[], None],
    ) -> None:
        """Admit a record and process it with its reservation; ``ends`` are called when it has ended."""
        record = context.record
        reservation = self.admission.admit(len(record.value), self.lanes.get(record.topic, 0))

        def close(is_cut_short: bool) -> int:
            reservation.release()
            if (trace := context.progress.trace) is not None:
                trace.close(is_cut_short=is_cut_short)
            for end in ends:
                end()
            return 1

        with log_fields(context.job_id, record.topic, record.partition, record.offset):
            self._start(process(reservation), record, close)

    def _begin_invalid(self, ledger: PartitionLedger, invalid: list[InvalidRecord]) -> None:
        held = sum(len(one.record.value) for one in invalid)
        reservation = self.admission.admit(held, self.lanes.get(invalid[0].record.topic, 0))
        reservation.release_slot(held)  # the window of jobs is for jobs
        pending = self.stages.invalid_records
        if pending.add(ledger, invalid, reservation):
            self._start(
                pending.work_off(ledger),
                invalid[0].record,
                lambda is_cut_short: pending.drop(ledger) if is_cut_short else 0,
            )

    def _start(self, work: Coroutine[Any, Any, None], record: ConsumedRecord, close: Callable[[bool], int]) -> None:
        """``close`` is told whether the work was cut short, and returns how many records it had."""
        task = asyncio.create_task(work)
        self._at_work[task] = record
        # Not inside the coroutine: a task that is cancelled before its first step never runs a line of it.
        task.add_done_callback(lambda ended: self._end(ended, close))

    def _end(self, task: asyncio.Task[None], close: Callable[[bool], int]) -> None:
        del self._at_work[task]
        error = None if task.cancelled() else task.exception()
        is_cut_short = task.cancelled() or error is not None
        records = close(is_cut_short)
        if is_cut_short:
            self.metrics.jobs.labels("returned").inc(records)
        if error is not None and not self._breach.done():
            # A record without an outcome would hold its partition's watermark for ever: the worker ends instead.
            self._breach.set_exception(error)

    def _stop_taking(self, source: RecordSource) -> None:
        self._is_draining = self.health.is_draining = True
        source.stop_taking()

    async def _give_back(self) -> None:
        if tasks := list(self._at_work):
            logger.warning("%d jobs go back to Kafka", len(tasks))
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=LEAVE_TIMEOUT_S)

    async def _leave(self, source: RecordSource) -> None:
        try:
            async with asyncio.timeout(LEAVE_TIMEOUT_S):
                await source.stop()
        except TimeoutError:
            logger.warning("the consumer group was not left in time")

    async def _commit_and_observe(self, source: RecordSource) -> None:
        committed_at = time.monotonic()
        while True:
            planned = time.monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            self.metrics.event_loop_lag_seconds.set(max(0.0, time.monotonic() - planned))
            self._observe_membership(source.has_joined)
            missing = ", ".join(source.missing_topics)
            self.health.wait_for(f"topic {missing}, which the brokers do not list" if missing else None)
            self.health.is_engine_alive = not self.engine.dead.is_set()
            self.engine_stats = self.engine.stats()
            self.idle.observe(self.engine_stats)
            self._observe_outage()
            self.faults.observe()
            self.metrics.jobs_in_flight.set(self.admission.jobs)
            self.metrics.admitted_bytes.set(self.admission.bytes)
            if time.monotonic() - committed_at >= COMMIT_INTERVAL_S:
                try:
                    await source.commit()
                    self.faults.clear("offset commits")
                except BrokersUnavailable as error:
                    self.faults.report("offset commits", error)
                committed_at = time.monotonic()
                self.lags = source.lags
                self.metrics.consumer_lag.show(self.lags)
                due = sum(lag for (topic, _), lag in self.lags.items() if topic not in self._delayed_topics)
                self.idle.records_wait = due > self.admission.jobs or self._may_have_records(source)
                self.metrics.watermark.show(source.watermarks)

    @staticmethod
    def _may_have_records(source: RecordSource) -> bool:
        """Whether brokers may have records that they do not hand out."""
        return not source.has_joined or source.silence_s > SILENCE_S

    def _observe_outage(self) -> None:
        outage = self.engine.outage
        if outage is not None:
            self.faults.report(ENGINE_ENDPOINTS, outage)
        elif self._is_out:  # jobs that wait report what concerns them alone
            self.faults.clear(ENGINE_ENDPOINTS)
        self._is_out = outage is not None

    def _observe_membership(self, has_joined: bool) -> None:
        if self.health.has_joined and not has_joined:
            self._left_at = time.monotonic()
        elif has_joined and self._left_at is not None:
            # aiokafka logs each attempt at brokers that are away, and nothing when they are back.
            logger.info("in the consumer group again, after %.0f s", time.monotonic() - self._left_at)
            self._left_at = None
        self.health.has_joined = has_joined

    async def _wait_until_drained(self, source: RecordSource) -> None:
        idle_since: float | None = None
        while idle_since is None or time.monotonic() - idle_since < self.settings.admission.idle_exit_s:
            await asyncio.sleep(TICK_S)
            is_busy = self._at_work or self.faults.are_present or not await source.is_drained()
            idle_since = None if is_busy else idle_since or time.monotonic()
        logger.info("nothing is left to do")
