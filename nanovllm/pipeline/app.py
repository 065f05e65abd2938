"""The worker process: what it starts, in the order in which the parts need one another, and its exit code."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from glob import glob
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

from nanovllm.confinement import forbid_debugging
from nanovllm.errors import BrokersUnavailable, ConfigurationError, InvalidRoutes, NanoVLLMError
from nanovllm.pipeline.operations import yielding_loop
from nanovllm.pipeline.operations.loading_thread import is_loading
from nanovllm.pipeline.operations.log import log_to_stderr
from nanovllm.pipeline.operations.stop_signals import DONE, FAILED, StopSignals, end_at_once
from nanovllm.pipeline.operations.ticking import tick
from nanovllm.settings.worker import Settings
from nanovllm.start_phases import START, Phase

if TYPE_CHECKING:
    from nanovllm.pipeline.operations.health import Health
    from nanovllm.pipeline.routing.routes import Routes

logger = logging.getLogger("nanovllm.worker")

T = TypeVar("T")
MISUSE = 2

GPU_DEVICES = ("/dev/nvidia[0-9]*", "/dev/nvidia-caps/*", "/dev/dxg", "/dev/kfd")
"""Device files of which a machine or a container with a GPU has one: of NVIDIA's driver, of WSL's, of AMD's."""
TICK_S = 1.0
COLLECT_AFTER_OBJECTS = 5_000
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0


def run_worker(settings: Settings, *, exit_when_drained: bool = False) -> int:
    """Run one worker until it is told to stop; returns the exit code of the process.

    SIGTERM and SIGINT drain: jobs at work are finished within ``admission.drain_timeout_s``, the rest goes back to
    Kafka. Before the first job is taken they end the process within two seconds; a second signal ends it at once. 0:
    stopped or drained; 1: a second signal, or a failure, with the offsets of what was at work uncommitted; 2: settings
    that cannot work, found before the model is loaded, or a topic that is missing, found meanwhile at the latest.
    Brokers that cannot be reached at the start are waited for.
    """
    START.add(Phase.IMPORTS, START.age_s())  # of the command line
    signals = StopSignals()
    forbid_debugging()
    prepare_threads()
    if settings.engine.loads_model:
        leave_out_triton()
    log_to_stderr(settings.log_level, settings.log_format, settings.worker_id)
    code = _run_to_the_end(settings, signals, exit_when_drained)
    if is_loading():
        end_at_once(code)
    return code


def _run_to_the_end(settings: Settings, signals: StopSignals, exit_when_drained: bool) -> int:
    """The exit code of a worker that has ended; logs why it failed."""
    try:
        yielding_loop.run(_run(settings, signals, exit_when_drained), beside_engine=settings.engine.loads_model)
    except InvalidRoutes as error:
        for refusal in error.refusals:
            logger.error("%s", refusal)
        return MISUSE
    except ConfigurationError as error:
        logger.error("%s", error.in_one_line)
        return MISUSE
    except NanoVLLMError as error:
        logger.error("%s: %s", error.code, error.in_one_line)
        return FAILED
    except Exception:
        logger.exception("the worker failed")
        return FAILED
    return DONE


def prepare_threads() -> None:
    """Before torch is imported: OpenMP threads that spin while others work make a step up to ten times slower."""
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "torch" in sys.modules:
        logger.warning("torch was imported before its threads could be set up")


def leave_out_triton() -> None:
    """Before transformers is imported: it makes torch import Triton, which has no use on a machine without a GPU, and
    whose bindings print their leaks when the process ends.
    """
    has_gpu = sys.platform != "linux" or any(map(glob, GPU_DEVICES))
    if not has_gpu and os.environ.get("TRITON_INTERPRET") != "1" and "triton" not in sys.modules:
        sys.modules["triton"] = None  # type: ignore[assignment]  # as if it were not installed


async def _run(settings: Settings, signals: StopSignals, exit_when_drained: bool) -> None:
    from nanovllm.metrics import Metrics
    from nanovllm.pipeline.operations.health import Health, HealthServer

    asyncio.get_running_loop().set_exception_handler(_report)
    brokers = settings.kafka.bootstrap_servers
    metrics, health = Metrics(), Health(brokers)
    async with AsyncExitStack() as stack:
        try:
            server = HealthServer(health, metrics, host=settings.http.host, port=settings.http.port)
        except OSError as error:
            where = f"http.port {settings.http.port} of http.host {settings.http.host}"
            raise ConfigurationError(f"{where} cannot be listened on: {error.strerror}; 0 takes a free port") from error
        stack.callback(server.close)
        server.start()
        logger.info("health and metrics on port %d", server.port)
        ticking = asyncio.create_task(tick(health.tick, TICK_S), name="tick")
        stack.callback(ticking.cancel)

        # The probes answer by now: these imports take seconds.
        with START.timed(Phase.IMPORTS):
            from nanovllm.kafka.admin import message_limits
            from nanovllm.kafka.client import client_kwargs
            from nanovllm.kafka.topic_limits import TopicLimits
            from nanovllm.pipeline import build
            from nanovllm.pipeline.route_checks import check_routes
            from nanovllm.pipeline.topic_checks import too_small_for_dead_letters
            from nanovllm.pipeline.worker_status import worker_status
            from nanovllm.sinks.kafka import KafkaSink

        if not settings.s3.allow:
            logger.warning(
                "s3.allow is not set: jobs that name objects in S3 become dead letters (forbidden_uri)%s",
                "; documents are read from the buckets of the routes" if settings.documents.routes else "",
            )
        if schemes := settings.s3.obstore_schemes:
            logger.info("obstore reads %s", ", ".join(f"{scheme}://" for scheme in sorted(schemes)))
        # What a user must change is told first: what can be known without a broker (certificates, keys, the signer of
        # a login, image formats, the device), then the topics. The brokers are asked while torch is imported and the
        # model is loaded, which take seconds to minutes.
        client_kwargs(settings.kafka)
        tracing = build.build_tracing(settings)
        routes = await asyncio.to_thread(_read_routes, settings)
        asking = asyncio.create_task(_ask_brokers(settings, routes, health), name="brokers")
        asking.add_done_callback(lambda task: task.cancelled() or task.exception())  # another error may end the start
        stack.callback(asking.cancel)
        build.begin_digest(settings)
        await asyncio.to_thread(_check_model, settings, routes)

        if asking.done():
            asking.result()
        # The model comes before the group: a member that loads for minutes holds partitions and answers nothing.
        logger.info("loading the model")
        with _told("the model is loaded and the decoders are started"):
            parts = await _unless_failed(asking, stack.enter_async_context(build.started_parts(settings)))
        health.is_model_loaded = True
        model = parts.engine.model_info
        metrics.worker.info(
            {
                "version": version("nanovllm"),
                "model": model.id,
                "revision": model.revision,
                "backend": parts.engine.name,
            }
        )
        logger.info("model %s (%s) is loaded", model.id, model.parameter_digest[:12])
        if routes is not None and not settings.engine.loads_model:
            # The context of servers, and of vLLM, is known only now.
            await asyncio.to_thread(check_routes, routes, settings, context=parts.engine.capabilities.context)

        read_limits = partial(message_limits, settings.kafka, build.written_topics(settings, routes))
        limits = TopicLimits(await asking, read=read_limits)
        dead_letters = settings.topics.dead_letters
        if small := too_small_for_dead_letters(dead_letters, limits.record_bytes(dead_letters)):
            logger.error("topic %s %s", small.topic, small.what)
        producer = build.build_producer(settings, limits)
        stack.push_async_callback(producer.stop)
        await producer.start()
        guard = build.build_crash_guard(settings, producer)
        sink = KafkaSink(producer, limits)
        if tracing is not None:
            stack.push_async_callback(tracing.close)
        worker = build.build_worker(
            settings, parts, sink, metrics, health, routes=routes, crash_guard=guard, tracing=tracing
        )
        source = build.build_source(worker, limits, guard)
        metrics.watch_engine(lambda: worker.engine_stats)
        server.status = partial(worker_status, worker)
        if settings.kubernetes.pod_deletion_cost:
            from nanovllm.pipeline.operations.pod_deletion_cost import OwnPod, keep_deletion_cost

            pod, every_s = OwnPod(settings.kubernetes), settings.kubernetes.pod_deletion_cost_every_s
            keeping = keep_deletion_cost(pod.set_deletion_cost, lambda: worker.admission.jobs, every_s)
            telling = asyncio.create_task(keeping, name="deletion-cost")
            stack.callback(telling.cancel)
        # These objects stay: the collector need not look through them again and again while jobs pass.
        gc.collect()
        gc.freeze()
        # Jobs leave few cycles: at CPython's 700 objects the collector takes a fourteenth of a small job's time.
        gc.set_threshold(COLLECT_AFTER_OBJECTS)
        # From here on the worker leaves the group before anything above is closed.
        joining_since = time.monotonic()
        joining = asyncio.create_task(source.start(health.wait_for), name="join")
        signals.hand_to(
            lambda: worker.stop() if joining.done() else joining.cancel(), has_taken=lambda: worker.has_taken
        )
        try:
            await joining
        except asyncio.CancelledError:
            if signals.is_stopping:
                return
            raise
        health.wait_for(None)
        START.add(Phase.GROUP, time.monotonic() - joining_since)
        for phase, seconds in START.seconds().items():
            metrics.start_seconds.labels(phase).set(seconds)
        logger.info("start: %.2f s since the process began (%s)", START.age_s(), START)
        logger.info(
            "consuming %s as %s in group %s, which took %.2f s to join",
            ", ".join(source.topics),
            settings.worker_id,
            settings.kafka.group_id,
            time.monotonic() - joining_since,
        )
        await worker.run(source, exit_when_drained=exit_when_drained)
        logger.info("stopped: what has ended is committed, the rest goes to the group's other members")


def _read_routes(settings: Settings) -> Routes | None:
    """The worker's routes; finds out what can be known of the parts without torch.

    Raises:
        ConfigurationError: as `check_surroundings`, or the routes cannot be read.
    """
    from nanovllm.pipeline.build import check_surroundings
    from nanovllm.pipeline.routing.routes import read_routes

    check_surroundings(settings)
    path = settings.documents.routes
    return None if path is None else read_routes(path)


def _check_model(settings: Settings, routes: Routes | None) -> None:
    """Find out what can be known of device and routes before a model is loaded or asked.

    It imports torch where this process computes, for seconds.

    Raises:
        ConfigurationError: as `check_device` and, with its InvalidRoutes, `check_routes`.
    """
    from nanovllm.pipeline.build import check_device

    with START.timed(Phase.IMPORTS):
        check_device(settings)
    if routes is not None:
        from nanovllm.pipeline.route_checks import check_routes

        with _told(f"the routes of {settings.documents.routes} hold"), START.timed(Phase.ROUTES):
            check_routes(routes, settings)


async def _ask_brokers(settings: Settings, routes: Routes | None, health: Health) -> dict[str, int]:
    """Wait for the brokers and their topics, and return the largest message of each topic that is written.

    Raises:
        MissingTopic, ConfigurationError: as `require_topics`.
    """
    from nanovllm.kafka.admin import message_limits
    from nanovllm.kafka.topic_presence import require_topics
    from nanovllm.pipeline.build import required_topics, written_topics

    health.wait_for(f"the brokers {settings.kafka.bootstrap_servers}")
    started = time.monotonic()
    with _told("the brokers and topics are there"):
        await _until_reachable(
            partial(require_topics, settings.kafka, required_topics(settings, routes), may_be_created=False)
        )
    limits = await _until_reachable(partial(message_limits, settings.kafka, written_topics(settings, routes)))
    START.add(Phase.BROKERS, time.monotonic() - started)
    health.wait_for(None)
    return limits


async def _unless_failed(asking: asyncio.Task[Any], work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` returns; it is given up where ``asking`` fails first, whose error is raised."""
    working = asyncio.create_task(work, name="loading")
    await asyncio.wait((asking, working), return_when=asyncio.FIRST_COMPLETED)
    if asking.done() and asking.exception() is not None and not working.done():
        working.cancel()
        await asyncio.wait((working,))
        asking.result()
    return await working


async def _until_reachable(ask: Callable[[], Awaitable[T]]) -> T:
    """What ``ask`` returns, asked again with pauses for as long as it raises BrokersUnavailable."""
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return await ask()
        except BrokersUnavailable as error:
            logger.warning("waiting for the brokers: %s", error.in_one_line)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Log ``what`` with its seconds when the block has ended."""
    started = time.monotonic()
    yield
    logger.info("%s: %.1f s", what, time.monotonic() - started)


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what no task was told. aiokafka shields its commits: one that was given up fails later, and unheard."""
    from aiokafka.errors import KafkaError

    error = context.get("exception")
    if isinstance(error, KafkaError):
        logger.warning("a request to Kafka that was given up has failed: %s", type(error).__name__)
    else:
        loop.default_exception_handler(context)
