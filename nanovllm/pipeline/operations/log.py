"""The log of the process: to standard error, as text or as JSON, the same warning at a falling rate."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

FORGET_S = 60.0
STARTING = "GroupCoordinatorNotAvailable"
"""A broker's answer while it makes the topic of committed offsets, for the first group of all: seconds."""
STARTING_S = 15.0
AT_MOST = 256


LogFormat = Literal["text", "json"]

_job: ContextVar[tuple[str, str, int, int] | None] = ContextVar("job", default=None)
_JOB_FIELDS = ("job_id", "topic", "partition", "offset")


class log_fields:  # noqa: N801  # a context manager that is called as a function; a generator's takes thrice as long
    """Names a job, and where its record is, in the lines in JSON of the tasks that are made inside."""

    def __init__(self, job_id: str, topic: str, partition: int, offset: int) -> None:
        self._fields = job_id, topic, partition, offset

    def __enter__(self) -> None:
        self._token = _job.set(self._fields)

    def __exit__(self, *_: object) -> None:
        _job.reset(self._token)


def log_to_stderr(level: str, format: LogFormat = "text", worker_id: str | None = None) -> None:
    """Set up the logging of the process; ``level`` is that of this package, and libraries are quieter.

    Lines in JSON have ``worker_id``.
    """
    logging.basicConfig(
        stream=sys.stderr, level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(RepeatedLines())
        if format == "json":
            handler.setFormatter(JsonLines(worker_id))
    # aiokafka tells every heartbeat and rebalance step; botocore every credential it looks for; httpx every request.
    for name in ("aiokafka", "botocore", "boto3", "urllib3", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
    # A traceback for each attempt at credentials; what failed is in CredentialsRefused.
    logging.getLogger("botocore.credentials").setLevel(logging.ERROR)
    # Each attempt at a receiver of traces, with the receiver's own words; that spans are lost is told by tracing.
    for name in ("proto.http.trace_exporter", "common"):
        logging.getLogger(f"opentelemetry.exporter.otlp.{name}").setLevel(logging.CRITICAL)


class JsonLines(logging.Formatter):
    """An object a line: time (RFC 3339), level, logger, message, and what `log_fields` and an exception add."""

    def __init__(self, worker_id: str | None = None) -> None:
        super().__init__()
        self._own = {} if worker_id is None else {"worker_id": worker_id}

    def format(self, record: logging.LogRecord) -> str:
        """``record`` as one line of JSON."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._own,
            **dict(zip(_JOB_FIELDS, _job.get() or (), strict=False)),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        return json.dumps(line)


class RepeatedLines(logging.Filter):
    """Passes a warning or error the first, second, fourth, eighth, … time, until it has been silent for ``FORGET_S``.

    aiokafka logs each attempt at a broker or topic that is not there: hundreds of lines a minute. One of ``STARTING``
    passes once it has come for ``STARTING_S``.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._seen: OrderedDict[tuple[str, str], tuple[int, float]] = OrderedDict()
        self._starting = (float("-inf"), float("-inf"))  # the first of its row, and the last

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether ``record`` is shown; one that repeats says how often it has come."""
        if record.levelno < logging.WARNING or record.exc_info:
            return True
        now, key = self._clock(), (record.name, record.getMessage())
        if STARTING in key[1]:
            first, last = self._starting
            self._starting = (first if now - last < FORGET_S else now), now
            if now - self._starting[0] < STARTING_S:
                return False
        count, last = self._seen.pop(key, (0, now))
        count = count + 1 if now - last < FORGET_S else 1
        self._seen[key] = count, now
        if len(self._seen) > AT_MOST:
            self._seen.popitem(last=False)
        if count > 2 and count.bit_count() == 1:
            record.msg, record.args = f"{key[1]} ({count} times so far)", None
        return count.bit_count() == 1
