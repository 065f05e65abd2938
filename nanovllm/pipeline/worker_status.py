"""The status of a worker as JSON: what its page shows. No text of a job, no secret, no value of a setting."""

from __future__ import annotations

import time
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from nanovllm.metrics import totals_by
from nanovllm.start_phases import START

if TYPE_CHECKING:
    from nanovllm.pipeline.worker import Worker

SHOWN_JOBS = 50
JOBS_OF_A_PRICE = 1_000


def worker_status(worker: Worker) -> dict[str, Any]:
    """What ``GET /stats`` answers; may be called in any thread."""
    settings, health, stats, recent = worker.settings, worker.health, worker.engine_stats, worker.recent
    lags = worker.lags
    idle = totals_by(worker.metrics.engine_idle_seconds, "reason")
    return {
        "now": time.time(),
        "worker": {
            "id": settings.worker_id,
            "version": version("nanovllm"),
            "model": worker.engine.model_info.id,
            "revision": worker.engine.model_info.revision,
            "backend": worker.engine.name,
            "age_s": START.age_s(),
            "state": "draining" if health.is_draining else "ready" if not health.unready else "not ready",
            "reasons": health.unready,
            "notes": health.notes,
        },
        "queue": {
            "group": settings.kafka.group_id,
            "lag": sum(lags.values()),
            "in_flight": worker.admission.jobs,
            "admitted_bytes": worker.admission.bytes,
            "engine_running": stats.num_requests_running,
            "engine_waiting": stats.num_requests_waiting,
            "kv_cache_usage": stats.kv_cache_usage,
            "partitions": [
                {"topic": topic, "partition": partition, "lag": lag} for (topic, partition), lag in sorted(lags.items())
            ],
        },
        "rates": recent.rates(),
        "latency_s": recent.latencies(),
        "idle": {"now": worker.idle.current, "seconds": idle},
        "caches": _caches(worker),
        "dead_letters": {code: int(total) for code, total in totals_by(worker.metrics.dead_letters, "code").items()},
        "routes": _routes(worker, idle),
        "recent": [_shown(asdict(job)) for job in recent.last(SHOWN_JOBS)],
    }


def _caches(worker: Worker) -> dict[str, Any]:
    stats = worker.engine_stats
    caches: dict[str, Any] = {
        "prefix": {"hits": stats.prefix_cache_hits, "queries": stats.prefix_cache_queries, "unit": "tokens"}
    }
    if (cache := stats.embedding_cache) is not None:
        asked = cache.hits + cache.misses + cache.joined
        caches["embeddings"] = {
            "hits": cache.hits + cache.joined,
            "queries": asked,
            "unit": "images",
            "bytes": cache.bytes,
            "max_bytes": cache.max_bytes,
            "seconds_saved": cache.seconds_saved,
        }
    return caches


def _routes(worker: Worker, idle: dict[str, float]) -> dict[str, Any]:
    """Seconds of a worker for a thousand jobs of each route, and their cost where a worker's hour has a price.

    The time in which there was work is divided among routes as their jobs' time at the engine is.
    """
    totals, price = worker.recent.routes, worker.settings.http.cost_per_hour
    worked_s = max(0.0, time.monotonic() - worker.began - idle.get("empty", 0.0))
    at_engine = sum(one.infer_s for one in totals.values())
    shown = {}
    for route, one in totals.items():
        seconds = worked_s * one.infer_s / at_engine / one.jobs * JOBS_OF_A_PRICE if at_engine else 0.0
        shown[route] = {
            "jobs": one.jobs,
            "seconds_a_thousand": seconds,
            "cost_a_thousand": None if price is None else seconds * price / 3600,
        }
    return shown


def _shown(job: dict[str, Any]) -> dict[str, Any]:
    return job | {"seconds": {stage: round(seconds, 4) for stage, seconds in job["seconds"].items()}}
