"""Headers of a job that its results and dead letters keep, and how many bytes of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from functools import lru_cache
from time import time_ns

from nanovllm.kafka.records import Headers

# What may travel on from a job's own headers; everything else stays behind (tokens and internal names hide in headers)
# unless the settings name it.
TRACE_HEADERS = ("traceparent", "tracestate")
OWN_PREFIX = "nanovllm_"
REPLAYS_HEADER = f"{OWN_PREFIX}replays"
MAX_REPLAYS = 9_999
MAX_HEADER_BYTES = 1_024
MAX_HEADERS = 32
MAX_HEADERS_BYTES = 8_192


def kept_headers(headers: Headers, names: Collection[str]) -> Iterable[tuple[str, bytes]]:
    """Those of ``names``, in their order, as long as they are at most ``MAX_HEADERS`` in ``MAX_HEADERS_BYTES``."""
    count, left = 0, MAX_HEADERS_BYTES
    for name, value in headers:
        is_own = name.lower().startswith(OWN_PREFIX)
        if name.lower() not in names or is_own or value is None or len(value) > MAX_HEADER_BYTES:
            continue
        count, left = count + 1, left - len(name.encode()) - len(value)
        if count > MAX_HEADERS or left < 0:
            return
        yield name, value


def rfc3339_now() -> str:
    """The time as `rfc3339` writes it."""
    seconds, milliseconds = divmod(time_ns() // 1_000_000, 1_000)
    return f"{_whole_second(seconds)}.{milliseconds:03d}Z"


@lru_cache(8)
def _whole_second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def rfc3339(time: datetime) -> str:
    """``time`` in UTC with milliseconds, as RFC 3339 writes it."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
