"""The log of the process: to standard error, the same warning at a falling rate."""

from __future__ import annotations

import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable

FORGET_S = 60.0
STARTING = "GroupCoordinatorNotAvailable"
"""A broker's answer while it makes the topic of committed offsets, for the first group of all: seconds."""
STARTING_S = 15.0
AT_MOST = 256


def log_to_stderr(level: str) -> None:
    """Set up the logging of the process; ``level`` is that of this package, and libraries are quieter."""
    logging.basicConfig(
        stream=sys.stderr, level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(RepeatedLines())
    # aiokafka tells every heartbeat and rebalance step; botocore every credential it looks for; httpx every request.
    for name in ("aiokafka", "botocore", "boto3", "urllib3", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
    # A traceback for each attempt at credentials; what failed is in CredentialsRefused.
    logging.getLogger("botocore.credentials").setLevel(logging.ERROR)


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
