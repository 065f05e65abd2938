"""The composition root: every object of a worker, from the settings and the parts that have connections or processes.

The process, the tests and the benchmarks build their workers here. What is optional is absent when it is off: crash
guard, response cache, claim check, key order, retry topics, traces.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nanovllm.checkpoints import digest
from nanovllm.checkpoints.resolve import register_alias, resolve_checkpoint, weight_files
from nanovllm.engine.backends.base import EngineBackend
from nanovllm.engine.backends.capabilities import SAMPLING_NAMES
from nanovllm.errors import ConfigurationError, NanoVLLMError
from nanovllm.kafka.recovering_producer import RecoveringProducer
from nanovllm.kafka.topic_limits import TopicLimits
from nanovllm.metrics import Metrics
from nanovllm.objects.fetch import ObjectFetcher, check_stores
from nanovllm.objects.http_images import tls_context
from nanovllm.objects.s3_client import S3Client
from nanovllm.pipeline.admission.admission import Admission
from nanovllm.pipeline.admission.engine_queue import EngineQueue
from nanovllm.pipeline.admission.fetch_shares import FetchShares
from nanovllm.pipeline.admission.key_order import KeyOrder
from nanovllm.pipeline.admission.tenant_shares import FairShares, TokenRates
from nanovllm.pipeline.build_documents import (
    DocumentParts,
    build_event_stages,
    check_extra,
    document_limits,
)
from nanovllm.pipeline.build_remote import build_remote_engine, check_remote
from nanovllm.pipeline.consuming.assignments import Assignments
from nanovllm.pipeline.consuming.crash_guard import CrashGuard
from nanovllm.pipeline.consuming.retry_topics import RetryTopics
from nanovllm.pipeline.consuming.source import JobSource
from nanovllm.pipeline.consuming.start_offset import StartOffsets
from nanovllm.pipeline.consuming.topic_watch import TopicWatch
from nanovllm.pipeline.documents.model_profile import heeded_sampling, model_profile, profile_rows, served_profile
from nanovllm.pipeline.failure.backoff import Backoff
from nanovllm.pipeline.failure.bucket_holds import BucketHolds, WatchedFetcher
from nanovllm.pipeline.failure.circuit_breaker import CircuitBreaker
from nanovllm.pipeline.failure.faults import ActiveFaults
from nanovllm.pipeline.operations.engine_idle import EngineIdle
from nanovllm.pipeline.operations.health import Health
from nanovllm.pipeline.operations.loading_thread import in_loading_thread
from nanovllm.pipeline.operations.recent_jobs import RecentJobs
from nanovllm.pipeline.routing.routes import Routes
from nanovllm.pipeline.stages.admit import Admit, decoded_bytes, sampling_defaults
from nanovllm.pipeline.stages.caches import ImageCache
from nanovllm.pipeline.stages.failure import DeadLetterLimit, Failure
from nanovllm.pipeline.stages.fetch import OBJECT_STORE, Fetch
from nanovllm.pipeline.stages.infer import (
    AwaitServers,
    CallEngine,
    GuardCrashes,
    Infer,
    MeterTokens,
    ReuseResponses,
    TimeStage,
    WaitForSlot,
)
from nanovllm.pipeline.stages.invalid_records import InvalidRecords
from nanovllm.pipeline.stages.job_sampling import JobSampling
from nanovllm.pipeline.stages.observe import observe
from nanovllm.pipeline.stages.prepare import Prepare
from nanovllm.pipeline.stages.process import Stages
from nanovllm.pipeline.stages.publish import Answer, AnswerByClaimCheck, Publish
from nanovllm.pipeline.stages.receive import DecodeJob, GuardReceive, Receive, ReceiveByTopic, TraceReceive
from nanovllm.pipeline.stages.record_builder import RecordBuilder
from nanovllm.pipeline.stages.retry import Retry
from nanovllm.pipeline.stages.trace import TraceOutcome
from nanovllm.pipeline.worker import Worker
from nanovllm.settings.engine import DEFAULT_MODEL, EngineSettings
from nanovllm.settings.images import ImageSettings
from nanovllm.settings.worker import Settings
from nanovllm.sinks.base import Sink
from nanovllm.sinks.claim_check import S3ResultStore
from nanovllm.start_phases import START, Phase
from nanovllm.vision.images.decode import ImageLimits
from nanovllm.vision.images.pool import DecoderPool

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine
    from nanovllm.pipeline.operations.tracing import Tracing

logger = logging.getLogger("nanovllm.worker")

WORKER_OPTIONS = {"backend", "model", "model_aliases", "step_timeout_s", "profile", "job_chat_template_kwargs"}
"""Settings of ``engine`` that are no options of the engine itself."""


class Parts(NamedTuple):
    """What a worker does its work with, started; ``decoders`` is None for an engine that takes no images."""

    engine: EngineBackend
    decoders: DecoderPool | None
    fetcher: ObjectFetcher


@asynccontextmanager
async def started_parts(settings: Settings) -> AsyncIterator[Parts]:
    """The parts that ``settings`` ask for, which are closed at the end.

    Raises:
        ConfigurationError: one cannot be made.
    """
    async with AsyncExitStack() as stack:
        fetcher = ObjectFetcher(settings.s3, max_bytes=settings.images.max_bytes, http=settings.http_images)
        stack.callback(fetcher.close)
        if settings.s3.allow or settings.documents.routes is not None:
            fetcher.begin_connecting()
        begin_digest(settings)
        engine = await load_engine(settings)
        stack.push_async_callback(engine.close)
        await engine.start()
        decoders = build_decoders(settings, engine)
        if decoders is not None:
            stack.push_async_callback(decoders.close)
            started = time.monotonic()
            await decoders.start()
            START.add(Phase.DECODERS, time.monotonic() - started)
        yield Parts(engine, decoders, fetcher)


def build_worker(
    settings: Settings,
    parts: Parts,
    sink: Sink,
    metrics: Metrics,
    health: Health,
    *,
    routes: Routes | None,
    crash_guard: CrashGuard | None = None,
    backoff: Backoff | None = None,
    decode: DecodeJob | None = None,
    tracing: Tracing | None = None,
) -> Worker:
    """A worker without a source, which is not started; its parts and whatever the sink needs are.

    ``routes`` are those of ``documents.routes``. ``backoff`` is between attempts in place. ``decode`` in place of
    `decode_job` makes jobs of records.
    """
    engine, decoders, fetcher = parts
    backoff = backoff or Backoff()
    retry_topics = RetryTopics.of(settings)
    lanes = retry_topics.lanes
    faults = ActiveFaults(health, metrics, lapse_s=2 * backoff.cap_s + 5.0)
    retry = Retry(faults, backoff, metrics)
    limit = DeadLetterLimit(settings.dead_letters.poison_limit)
    builder = RecordBuilder(settings, engine.model_info, sink.max_record_bytes, retry_topics)
    idle, recent = EngineIdle(metrics), RecentJobs()
    if decoders is not None:
        decoders.while_at_work = idle.waits["decode"]
    receive, failure = Receive(settings, retry_topics, idle, decode), Failure(builder, limit)
    rates = TokenRates(settings.tenants.tokens_per_minute, settings.tenants.limits)
    holds = BucketHolds(health.set_held_buckets)
    watched = WatchedFetcher(fetcher, holds)
    images = ImageCache(watched, decoders, engine.find_image, metrics, max_bytes=settings.reuse.image_bytes)
    breaker = CircuitBreaker(
        threshold=settings.retries.breaker_objects,
        waits=Backoff(settings.retries.breaker_wait_s, settings.retries.breaker_max_wait_s),
        opened=lambda error, wait_s: faults.report(OBJECT_STORE, error, lapse_s=wait_s),
    )

    # A quarter more slots than run at once: a finished job's successor is in the engine's very next step.
    slots = engine.max_num_seqs + max(1, engine.max_num_seqs // 4)
    queue = EngineQueue(slots, FairShares(settings.tenants.weights, are_configured=settings.tenants.are_configured))
    infer: Infer = CallEngine(engine, idle)
    if settings.engine.backend == "openai":
        infer = AwaitServers(infer, retry, idle)
    infer_part = infer
    if crash_guard is not None:
        infer = GuardCrashes(infer, crash_guard, retry, idle)
        infer_part = GuardCrashes(infer_part, crash_guard, retry, idle, is_whole=False)
    infer = WaitForSlot(infer, queue)
    if settings.reuse.answer_bytes:
        infer = ReuseResponses(infer, engine.model_info, metrics, max_bytes=settings.reuse.answer_bytes)

    answer, large_results = Answer(builder, engine, limit), None
    if settings.s3.large_results:
        large_results = S3ResultStore(settings.s3.large_results, S3Client(settings.s3).call)
        answer = AnswerByClaimCheck(builder, engine, limit, large_results, retry)

    publish = Publish(sink, retry, failure, metrics)
    of_profile = heeded_sampling(model_profile(settings.engine).profile, engine.capabilities.sampling)
    defaults = sampling_defaults(settings, engine.generation_defaults, of_profile)
    sampling = JobSampling(defaults, settings.admission.max_tokens)
    admit = Admit(settings, sampling, engine=engine, fetcher=fetcher, rates=rates, lanes=lanes, metrics=metrics)
    make_fetch = partial(
        Fetch,
        breaker=breaker,
        holds=holds,
        retry=retry,
        engine=engine,
        max_attempts=settings.s3.max_attempts,
        shares=_fetch_shares(settings, engine),
    )
    event_stages = None
    if routes is not None:
        event_stages = build_event_stages(
            settings,
            routes,
            DocumentParts(
                engine=engine,
                decoders=decoders,
                fetcher=fetcher,
                breaker=breaker,
                holds=holds,
                admit=admit,
                rates=rates,
                infer=MeterTokens(WaitForSlot(infer_part, queue), queue, rates),
                builder=builder,
                sink=sink,
                large_results=large_results,
                limit=limit,
                retry=retry,
                failure=failure,
                publish=publish,
                metrics=metrics,
                health=health,
                recent=recent,
                crash_guard=crash_guard,
                make_fetch=make_fetch,
            ),
        )

    received = receive if routes is None else ReceiveByTopic(receive, retry_topics.with_retries(settings.topics.events))
    stages = Stages(
        receive=received if crash_guard is None else GuardReceive(received, crash_guard, receive.context_of),
        invalid_records=InvalidRecords(builder, sink, metrics, limit, retry, receive.context_of),
        admit=admit,
        fetch=make_fetch(images, max_bytes=settings.images.max_bytes),
        prepare=Prepare(images, retry),
        infer=TimeStage(MeterTokens(infer, queue, rates)),
        answer=answer,
        failure=failure,
        publish=publish,
        observe=partial(observe, metrics, health, recent),
    )
    if tracing is not None:
        model = engine.model_info.id
        stages = replace(
            stages,
            receive=TraceReceive(stages.receive, tracing, receive.context_of),
            observe=TraceOutcome(stages.observe, model),
        )
        if event_stages is not None:
            event_stages = replace(event_stages, observe=TraceOutcome(event_stages.observe, model))
    return Worker(
        settings,
        stages=stages,
        event_stages=event_stages,
        admission=Admission(
            max_jobs=settings.max_admitted_jobs(engine.max_num_seqs),
            max_bytes=settings.admission.max_bytes,
            lanes=set(lanes.values()),
        ),
        engine=engine,
        idle=idle,
        recent=recent,
        faults=faults,
        backoff=backoff,
        metrics=metrics,
        health=health,
        lanes=lanes,
        key_order=KeyOrder() if settings.admission.per_key_order else None,
        written_topics=written_topics(settings, routes),
    )


def build_source(worker: Worker, limits: TopicLimits, crash_guard: CrashGuard | None = None) -> JobSource:
    """The consumer group member that is the source of ``worker``, not started; ``limits``: as `build_producer`."""
    settings, metrics = worker.settings, worker.metrics
    retry_topics = RetryTopics.of(settings)
    assignments = Assignments(
        settings.kafka,
        StartOffsets(settings.kafka.auto_offset_reset, metrics, read_in_full=retry_topics.delays_s),
        max_out_of_order=settings.admission.max_out_of_order,
        lost=worker.drop,
        exactly_once=settings.delivery == "exactly_once",
        crash_guard=crash_guard,
        limits=limits,
    )
    return JobSource(
        settings.kafka,
        worker.lanes,
        assignments,
        drain=worker.drain,
        drain_timeout_s=settings.admission.drain_timeout_s,
        delays_s=retry_topics.delays_s,
        watch=TopicWatch(worker.lanes, worker.written_topics, metrics),
    )


def _fetch_shares(settings: Settings, engine: EngineBackend) -> FetchShares | None:
    """Shares of the connections that can be at work at once, where jobs are told apart by tenant."""
    if not settings.tenants.are_configured:
        return None
    # Each object that is read has reserved the most bytes that it may have, as a file and as pixels.
    with_bytes = settings.admission.max_bytes // (settings.images.max_bytes + decoded_bytes(engine.image_transform, 1))
    return FetchShares(max(1, min(settings.s3.max_connections, with_bytes)), settings.admission.max_bytes)


def written_topics(settings: Settings, routes: Routes | None) -> list[str]:
    """The topics that a worker with ``routes`` writes results, metrics, dead letters and delayed retries to."""
    topics = settings.topics
    written = [
        topics.results,
        topics.metrics,
        topics.dead_letters,
        *topics.reply_to,
        *(routes.topics if routes else []),
    ]
    return list(dict.fromkeys([*written, *RetryTopics.of(settings).delays_s]))


def required_topics(settings: Settings, routes: Routes | None) -> list[str]:
    """The topics that must be there before a worker with ``routes`` starts."""
    in_flight = [settings.topics.in_flight] if settings.dead_letters.crash_limit else []
    return list(dict.fromkeys([*RetryTopics.of(settings).lanes, *written_topics(settings, routes), *in_flight]))


def build_producer(settings: Settings, limits: TopicLimits) -> RecoveringProducer:
    """The producer of a worker, not started; ``limits``: those of the topics that it writes."""
    return RecoveringProducer.within(settings.kafka, limits)


def build_tracing(settings: Settings) -> Tracing | None:
    """The traces of a worker, where ``tracing.enabled`` asks for them.

    Raises:
        ConfigurationError: the extra ``otel`` is not installed, or as `Tracing.of`.
    """
    if not settings.tracing.enabled:
        return None
    try:
        from nanovllm.pipeline.operations.tracing import Tracing
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"tracing.enabled needs {error.name}, which is not installed: pip install '.[otel]' in a clone"
        ) from error
    return Tracing.of(settings)


def build_crash_guard(settings: Settings, producer: RecoveringProducer) -> CrashGuard | None:
    """The crash guard, where ``dead_letters.crash_limit`` asks for one."""
    limit = settings.dead_letters.crash_limit
    return None if limit is None else CrashGuard(settings.topics.in_flight, settings.kafka, producer, limit=limit)


def build_decoders(settings: Settings, engine: EngineBackend) -> DecoderPool | None:
    """The decoder processes, not started; None for an engine that takes no images."""
    images = settings.images
    if engine.image_transform is None:
        return None
    return DecoderPool(
        engine.image_transform,
        image_limits(images),
        workers=images.decoders,
        timeout_s=images.decode_timeout_s,
        memory_bytes=images.decoder_memory_bytes,
        document_limits=document_limits(settings.documents),
    )


def image_limits(images: ImageSettings) -> ImageLimits:
    """The limits of an image. Raises ConfigurationError: a format that cannot be read here."""
    return ImageLimits(**{limit.name: getattr(images, limit.name) for limit in fields(ImageLimits)})


def check_parts(settings: Settings) -> None:
    """Find out what can be known of the parts before weights are read; it imports torch, for seconds.

    Raises:
        ConfigurationError, ModelNotFound: as `check_surroundings`, or the device is not there.
    """
    check_surroundings(settings)
    check_device(settings)


def check_surroundings(settings: Settings) -> None:
    """Find out what can be known without torch.

    Raises:
        ConfigurationError, ModelNotFound: S3 or hosts of images cannot be spoken to so, or what reads documents, an
            image format or the model are not there.
    """
    if settings.documents.routes is not None:
        check_extra({"openai": "remote", "vllm": "vllm"}.get(settings.engine.backend, "worker"))
    if settings.s3.allow or settings.s3.large_results or settings.documents.routes is not None:
        check_stores(settings.s3)
    if settings.http_images.allow:
        tls_context(settings.http_images)
    image_limits(settings.images)
    engine = settings.engine
    if engine.backend == "echo":
        return
    if engine.backend == "openai":
        check_remote(settings)
        return
    directory = checkpoint_directory(engine)
    if engine.backend == "vllm":
        from nanovllm.pipeline.build_vllm import check_vllm

        check_vllm(settings, directory)


def check_device(settings: Settings) -> None:
    """Raise ConfigurationError where the device is not there that an engine of ours would use; it imports torch."""
    if settings.engine.loads_model:
        from nanovllm.engine.execution.loading import choose_device

        choose_device(settings.engine.device)


def begin_digest(settings: Settings) -> None:
    """Have a thread compute the digest of the weights, which loading them does not need, and results do."""
    if settings.engine.loads_model:
        with suppress(NanoVLLMError):  # files that are missing are told by what loads them
            digest.begin_digest(weight_files(checkpoint_directory(settings.engine)))


async def load_engine(settings: Settings) -> EngineBackend:
    """The backend that ``settings`` name, not started. Raises as `build_engine`."""
    options = settings.engine
    if options.backend == "echo":
        from nanovllm.engine.backends.echo import EchoEngine

        return EchoEngine(max_num_seqs=options.seats_elsewhere)
    if options.backend == "openai":
        logger.info("%s: %s (%s)", *next(profile_rows(served_profile(settings))))
        return build_remote_engine(settings)
    if options.backend == "vllm":
        from nanovllm.pipeline.build_vllm import build_vllm_engine

        return await asyncio.to_thread(build_vllm_engine, settings, checkpoint_directory(options))
    from nanovllm.engine.backends.native import AsyncEngine
    from nanovllm.engine.diagnostics import describe

    def load() -> LLMEngine:
        engine = build_engine(options)
        _ = engine.model_info  # waits for the digest, which results have
        return engine

    engine = await in_loading_thread(load)
    model = model_profile(options)
    defaults = sampling_defaults(settings, engine.generation_defaults, heeded_sampling(model.profile, SAMPLING_NAMES))
    for finding in describe(engine, defaults):
        logger.info("%s: %s%s", finding.subject, finding.value, f" ({finding.note})" if finding.note else "")
    logger.info("%s: %s (%s)", *next(profile_rows(model)))
    return AsyncEngine(engine, step_timeout_s=options.step_timeout_s)


def build_engine(settings: EngineSettings) -> LLMEngine:
    """The engine in this process that the settings ask for; it imports torch and reads weights, for seconds to minutes.

    Raises:
        ConfigurationError, UnsupportedModel, ModelNotFound: it cannot be made.
    """
    with START.timed(Phase.IMPORTS):
        from nanovllm.engine.llm_engine import LLMEngine

    _register_aliases(settings)
    return LLMEngine(settings.model or DEFAULT_MODEL, **engine_options(settings))


def engine_options(settings: EngineSettings) -> dict[str, Any]:
    """The engine's own options among the settings of one that loads a model."""
    model = model_profile(settings)
    template = {"chat_template_kwargs": model.template_kwargs(model.profile)}
    return {**settings.model_dump(exclude=WORKER_OPTIONS), "backend": settings.backend, **template}


def checkpoint_directory(settings: EngineSettings) -> Path:
    """Where the checkpoint is that the settings name. Raises ModelNotFound."""
    _register_aliases(settings)
    return resolve_checkpoint(settings.model or DEFAULT_MODEL)


def _register_aliases(settings: EngineSettings) -> None:
    for name, directory in settings.model_aliases.items():
        register_alias(name, Path(directory))
