"""The line source: the lines of a file as records, for work without Kafka."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path

from nanovllm.errors import InvalidInput, InvalidJob
from nanovllm.messages.job import derive_job_id
from nanovllm.messages.openai_batch import is_request, request_id_in
from nanovllm.messages.validation import printable
from nanovllm.pipeline.consuming.ledger import PartitionLedger
from nanovllm.pipeline.consuming.partition import ConsumedRecord

MAX_POLL_BYTES = 4 << 20
_BOM = b"\xef\xbb\xbf"
_REST_BYTES = 1 << 20

NumberedLine = tuple[int, bytes]


def read_lines(path: Path, max_bytes: int) -> Iterator[NumberedLine]:
    """The lines of a file that are not blank, with their numbers from 0 on; of a longer one ``max_bytes`` + 1 bytes.

    Raises:
        InvalidInput: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(max_bytes + 1):
                if len(line) > max_bytes and not line.endswith(b"\n"):
                    while (rest := file.readline(_REST_BYTES)) and not rest.endswith(b"\n"):
                        pass
                line = line.removeprefix(_BOM) if number == 0 else line
                if not line.isspace():
                    yield number, line.rstrip(b"\r\n")
                number += 1
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror or type(error).__name__}") from None


class FinishedJobs:
    """The jobs of a file called ``name`` that need not be computed any more, by the ids of their lines."""

    def __init__(self, name: str, finished: Container[str] = frozenset()) -> None:
        self.name = printable(name)
        self._finished = finished

    def has(self, number: int, job_id: str | None) -> bool:
        """Whether the job of a line is among them, by the line's own id or by the one that its number gives it."""
        return job_id in self._finished or derive_job_id(self.name, 0, number) in self._finished

    def left(self, lines: Iterable[NumberedLine]) -> int:
        """How many of ``lines`` are to be computed."""
        first_lines: dict[str, int] = {}
        return sum(not self.has(number, own_id(number, id_in(line)[0], first_lines)) for number, line in lines)


class LineSource:
    """Lines as the records of one partition, whose topic is the file's name: a `RecordSource`.

    Lines whose job is finished are passed over, so that work goes on where it stopped. A line with the job id of an
    earlier one is an invalid record: two results with one id could not be told apart.
    """

    has_joined = True
    silence_s = 0.0
    missing_topics: tuple[str, ...] = ()
    has_put_off = False
    can_read_put_off = False

    def __init__(self, lines: Iterable[NumberedLine], finished: FinishedJobs) -> None:
        self._lines = iter(lines)
        self._name = finished.name
        self._finished = finished
        self._first_lines: dict[str, int] = {}
        # Nothing is committed, so nothing bounds what runs ahead of the oldest unfinished line.
        self._ledger = PartitionLedger(0, max_out_of_order=sys.maxsize)
        self._is_at_end = False
        self._takes_work = True

    @property
    def lags(self) -> Mapping[tuple[str, int], int]:
        """Not known."""
        return {}

    @property
    def watermarks(self) -> Mapping[tuple[str, int], int]:
        """The number of the oldest unfinished line."""
        return {(self._name, 0): self._ledger.watermark}

    async def poll(
        self, max_records: int | Mapping[int, int], timeout_ms: int, *, put_off: bool = False
    ) -> list[ConsumedRecord]:
        """At most ``max_records`` lines; at the end of the file it waits ``timeout_ms``.

        Raises:
            InvalidInput: the file cannot be read any more.
        """
        room = max_records if isinstance(max_records, int) else max(max_records.values(), default=0)
        if room <= 0 or self._is_at_end or not self._takes_work:
            await asyncio.sleep(timeout_ms / 1000)
            return []
        # In a thread: a line may have megabytes, and the file may lie on a network.
        records = await asyncio.to_thread(lambda: list(self._read(room)))
        for record in records:
            self._ledger.deliver(record.offset)
        return records if self._takes_work else []

    def put_off(self, last: ConsumedRecord, *, is_invalid: bool) -> None:
        """Invalid lines are read like others."""

    async def watch_topics(self) -> None:
        """Wait without end: a file has no topics."""
        await asyncio.Event().wait()

    def stop_taking(self) -> None:
        """Read no more lines."""
        self._takes_work = False

    async def commit(self) -> None:
        """Nothing: what is finished is in the output."""

    async def is_drained(self) -> bool:
        """Whether every line is read and finished."""
        return self._is_at_end and self._ledger.in_flight == 0

    async def stop(self) -> None:
        """Nothing."""

    def _read(self, room: int) -> Iterator[ConsumedRecord]:
        left = MAX_POLL_BYTES
        while left > 0 and room > 0:
            numbered = next(self._lines, None)
            if numbered is None:
                self._is_at_end = True
                return
            number, line = numbered
            job_id, is_of_request = id_in(line)
            if self._finished.has(number, own_id(number, job_id, self._first_lines)):
                continue
            yield ConsumedRecord(
                topic=self._name,
                partition=0,
                offset=number,
                timestamp_ms=None,
                key=None,
                value=line,
                refusal=self._refusal(number, job_id, is_of_request),
                ledger=self._ledger,
            )
            left, room = left - len(line), room - 1

    def _refusal(self, number: int, job_id: str | None, is_of_request: bool) -> InvalidJob | None:
        if job_id is None or (first := self._first_lines[job_id]) == number:
            return None
        refusal = InvalidJob(f"line {number + 1} has the id of line {first + 1}: their results could not be told apart")
        # A batch's output names each request by its id.
        refusal.job_id = job_id if is_of_request else None
        return refusal


def own_id(number: int, job_id: str | None, first_lines: dict[str, int]) -> str | None:
    """``job_id``, where the line ``number`` is the first with it; ``first_lines`` are those of the lines before."""
    return None if job_id is None or first_lines.setdefault(job_id, number) != number else job_id


def id_in(line: bytes) -> tuple[str | None, bool]:
    """The id that a line gives its job (``job_id``, or the ``custom_id`` of a request), and whether it is a request."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None, False
    if not isinstance(fields, dict):
        return None, False
    is_of_request = is_request(fields)
    found = request_id_in(fields) if is_of_request else fields.get("job_id")
    return (found if isinstance(found, str) else None), is_of_request
