"""Work without Kafka: the stages of a worker between a source of lines and whatever takes the outcomes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from nanovllm.confinement import forbid_debugging
from nanovllm.metrics import Metrics
from nanovllm.pipeline import build
from nanovllm.pipeline.app import prepare_threads
from nanovllm.pipeline.consuming.line_source import LineSource
from nanovllm.pipeline.operations import yielding_loop
from nanovllm.pipeline.operations.health import Health
from nanovllm.pipeline.operations.log import log_to_stderr
from nanovllm.pipeline.operations.stop_signals import FAILED, StopSignals
from nanovllm.pipeline.operations.ticking import tick
from nanovllm.pipeline.stages.receive import DecodeJob
from nanovllm.settings.worker import Settings
from nanovllm.sinks.base import Sink

TICK_S = 0.25
IDLE_EXIT_S = 0.01
# They name each dead letter, and so does the output.
LOGGERS_OF_DEAD_LETTERS = ("nanovllm.pipeline.stages.failure", "nanovllm.pipeline.stages.invalid_records")


def run_lines(
    settings: Settings,
    source: LineSource,
    sink: Sink,
    *,
    decode: DecodeJob | None = None,
    on_tick: Callable[[], object] = lambda: None,
) -> bool:
    """Take every line of ``source`` to its outcome; False where a signal ended the run before the end.

    The engine, the limits and the retries are those that ``settings`` give a worker. SIGINT and SIGTERM drain: jobs at
    work are finished within ``admission.drain_timeout_s``; before the first job, and at a second signal, they end the
    process with exit code 1. ``on_tick`` is called a few times a second once the engine is there.

    Raises:
        ConfigurationError: the engine cannot be made.
        EngineDead: it can answer nothing any more.
        InvalidInput: the lines cannot be read any more.
    """
    signals = StopSignals(code_before_work=FAILED)
    forbid_debugging()
    prepare_threads()
    log_to_stderr("warning" if settings.log_level == "info" else settings.log_level, settings.log_format)
    for name in LOGGERS_OF_DEAD_LETTERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    work = _run(without_kafka(settings), source, sink, decode, on_tick, signals)
    return yielding_loop.run(work, beside_engine=settings.engine.loads_model)


def without_kafka(settings: Settings) -> Settings:
    """``settings`` without what is done by topics: lanes, events, delayed retries, transactions, crash records."""
    return settings.model_copy(
        update={
            "delivery": "at_least_once",
            "result_format": "json",
            "topics": settings.topics.model_copy(update={"lanes": {}}),
            "documents": settings.documents.model_copy(update={"routes": None}),
            "retries": settings.retries.model_copy(update={"delays_s": ()}),
            "dead_letters": settings.dead_letters.model_copy(update={"crash_limit": None}),
            # The end of a file is known, other than that of a topic.
            "admission": settings.admission.model_copy(update={"idle_exit_s": IDLE_EXIT_S, "per_key_order": False}),
        }
    )


async def _run(
    settings: Settings,
    source: LineSource,
    sink: Sink,
    decode: DecodeJob | None,
    on_tick: Callable[[], object],
    signals: StopSignals,
) -> bool:
    await asyncio.to_thread(build.check_parts, settings)
    async with build.started_parts(settings) as parts:
        worker = build.build_worker(settings, parts, sink, Metrics(), Health(), routes=None, decode=decode)
        signals.hand_to(worker.stop, has_taken=lambda: worker.has_taken)
        ticking = asyncio.create_task(tick(on_tick, TICK_S), name="tick")
        try:
            await worker.run(source, exit_when_drained=True)
        finally:
            ticking.cancel()
    return await source.is_drained()
