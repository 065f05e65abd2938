"""What a broker wrote on its disk, where its answers do not tell whose fault a repeated outcome is.

The coordinator of Apache Kafka 4.3.1 takes a partition whose leader is offline for one that was deleted, and ends a
transaction without the marker there (KAFKA-20734): so does a single node, killed after the decision to commit, with all
of them when it is back. The offsets of that transaction stay as invisible as its outputs, the next owner does the jobs
again, and the marker of its transaction makes both readable.
"""

from __future__ import annotations

import json
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from aiokafka.record.memory_records import MemoryRecords

_COMMIT = 1


def late_commits(data: Path, topics: Iterable[str]) -> Counter[str]:
    """How often an outcome of each job became readable by the marker of a later producer than the one that sent it.

    A transactional id's producers have one id and rising epochs, and each begins by ending what the one before left
    open. A marker of a later epoch that commits is a marker that was missing in between: nothing that a client does.
    """
    found: Counter[str] = Counter()
    for topic in topics:
        for partition in data.glob(f"{topic}-*"):
            found += late_in(batch for log in sorted(partition.glob("*.log")) for batch in _batches(log))
    return found


def late_in(batches: Iterable[Any]) -> Counter[str]:
    """The same of one partition's batches."""
    found: Counter[str] = Counter()
    open_jobs: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for batch in batches:
        records = list(batch)
        if batch.is_control_batch:
            ended = open_jobs.pop(batch.producer_id, [])
            if struct.unpack(">hh", records[0].key[:4])[1] == _COMMIT:
                found.update(job for epoch, job in ended if epoch < batch.producer_epoch)
        elif batch.is_transactional:
            open_jobs[batch.producer_id] += [(batch.producer_epoch, job_of(record)) for record in records]
    return found


def job_of(record: Any) -> str:
    """The job of a result or a dead letter."""
    name: bytes | None = dict(record.headers).get("nanovllm_job_id")
    return name.decode() if name is not None else str(json.loads(record.value)["job_id"])


def _batches(log: Path) -> Iterator[Any]:
    records = MemoryRecords(log.read_bytes())
    while records.has_next():
        yield records.next_batch()
