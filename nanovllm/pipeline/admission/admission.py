"""Admission control: a bound on jobs, and on bytes of records and images."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable, Iterator

from nanovllm.pipeline.admission.lanes import LaneTurns


class Admission:
    """Bounds ``jobs`` and the ``bytes`` they hold; a poll asks for ``rooms`` first: Kafka keeps what does not fit.

    A record is in memory when it is admitted, so ``admit`` never waits. What it makes the worker download does:
    ``Reservation.acquire_bytes`` waits, first come first served. A job reserves all it needs at once: jobs that
    held a part each and waited for the rest would wait for ever. A reservation above the whole bound is
    granted alone, when no other one is held.

    With several ``lanes`` a share of both is kept for each, so that none fills the window for all: a quarter of it
    between them. Of those that wait the lane goes first whose turn it is.
    """

    def __init__(self, *, max_jobs: int, max_bytes: int, lanes: Iterable[int] = (0,)) -> None:
        self._lanes = {lane: _LaneUse() for lane in sorted(lanes)}
        if max_jobs < len(self._lanes) or max_bytes < 1:
            raise ValueError(f"max_jobs {max_jobs} or max_bytes {max_bytes} is too small")
        self._max_jobs = max_jobs
        self._max_bytes = max_bytes
        shares = 4 * len(self._lanes)
        is_shared = len(self._lanes) > 1
        self._kept_jobs = max(1, max_jobs // shares) if is_shared else 0
        self._kept_bytes = max_bytes // shares if is_shared else 0
        self.jobs = 0
        self.bytes = 0
        self._admitted = 0
        self._reservations = 0
        self._turns = LaneTurns()
        self._changed = asyncio.Event()

    @property
    def room(self) -> int:
        """How many more records of whichever lane may be taken from Kafka now."""
        return max(self.rooms.values())

    @property
    def rooms(self) -> dict[int, int]:
        """How many more records of each lane may be taken from Kafka now."""
        return {lane: self._room_of(lane) for lane in self._lanes}

    def admit(self, record_bytes: int, lane: int = 0) -> Reservation:
        """Take in one job whose record holds ``record_bytes``; leave its reservation when it ends."""
        use = self._lanes[lane]
        self._admitted += 1
        self._take(use, record_bytes, jobs=1)
        return Reservation(self, use, record_bytes)

    async def wait_for_room(self, timeout_s: float) -> bool:
        """Wait until there is room, at most ``timeout_s``; returns whether there is."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.room <= 0:
                    self._changed.clear()
                    await self._changed.wait()
        return self.room > 0

    def audit(self) -> None:
        """Assert what always holds."""
        assert self.jobs >= 0, "more jobs left than came"
        assert self.bytes >= 0, "more bytes were given back than taken"
        assert self.jobs > 0 or self._reservations == 0, "a reservation is held by no job"
        assert self._admitted > 0 or self.bytes == 0, "bytes are held by no job"

    def _room_of(self, lane: int) -> int:
        use = self._lanes[lane]
        others = [other for other in self._lanes.values() if other is not use]
        if self.bytes + sum(max(0, self._kept_bytes - other.bytes) for other in others) >= self._max_bytes:
            return 0
        kept = sum(max(0, self._kept_jobs - other.jobs) for other in others)
        return max(0, self._max_jobs - self.jobs - kept)

    async def _reserve(self, use: _LaneUse, nbytes: int) -> None:
        turn = asyncio.get_running_loop().create_future()
        use.waiting.append((nbytes, turn))
        self._wake()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._wake()
            else:
                # Granted in the iteration in which the job was cancelled.
                self._give_back(use, nbytes, reservations=1)
            raise

    def _fits(self, use: _LaneUse, nbytes: int) -> bool:
        if self._reservations == 0:
            return True
        kept = sum(max(0, self._kept_bytes - other.bytes) for other in self._lanes.values() if other is not use)
        return self.bytes + kept + nbytes <= self._max_bytes

    def _take(self, use: _LaneUse, nbytes: int, *, jobs: int = 0, reservations: int = 0) -> None:
        self.bytes += nbytes
        self.jobs += jobs
        self._reservations += reservations
        use.bytes += nbytes
        use.jobs += jobs

    def _give_back(self, use: _LaneUse, nbytes: int, *, jobs: int = 0, reservations: int = 0) -> None:
        self._take(use, -nbytes, jobs=-jobs, reservations=-reservations)
        self._wake()

    def _wake(self) -> None:
        while waiting := {lane: use for lane, use in self._lanes.items() if use.next_waiting() is not None}:
            lane = self._turns.next(waiting)
            nbytes = waiting[lane].waiting[0][0]
            if not self._fits(waiting[lane], nbytes):
                is_granted_alone = nbytes > self._max_bytes - (len(self._lanes) - 1) * self._kept_bytes
                if is_granted_alone and self._turns.is_owed(lane):
                    break  # until no other reservation is held
                # What is kept for another one is no use to it.
                within = [other for other, use in waiting.items() if use.bytes + use.waiting[0][0] <= self._kept_bytes]
                if not within:
                    break
                lane = self._turns.next(within)
            nbytes, turn = waiting[lane].waiting.popleft()
            self._take(waiting[lane], nbytes, reservations=1)
            self._turns.serve(lane, waiting)
            turn.set_result(None)
        self._changed.set()


class _LaneUse:
    """What the jobs of one lane hold, and what they wait for."""

    def __init__(self) -> None:
        self.jobs = 0
        self.bytes = 0
        self.waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def next_waiting(self) -> tuple[int, asyncio.Future[None]] | None:
        while self.waiting and self.waiting[0][1].cancelled():
            self.waiting.popleft()
        return self.waiting[0] if self.waiting else None


class Reservation:
    """One job's reservation of a slot and of bytes."""

    def __init__(self, admission: Admission, use: _LaneUse, record_bytes: int) -> None:
        self._admission = admission
        self._use = use
        self._record_bytes = record_bytes
        self._reserved_bytes: int | None = None
        self._has_slot = True
        self._is_released = False

    @contextlib.contextmanager
    def without_slot(self) -> Iterator[None]:
        """Give the job's slot up inside, while it waits for what no other job waits for. Its record stays.

        The slot is taken again at once behind it, so there may be more jobs than slots for a while.
        """
        self._admission._give_back(self._use, 0, jobs=1)
        try:
            yield
        finally:
            self._admission._take(self._use, 0, jobs=1)

    async def acquire_bytes(self, nbytes: int) -> None:
        """Wait until ``nbytes`` more may be held, by a job that has reserved none.

        Raises:
            RuntimeError: the job holds reserved bytes, or has ended.
        """
        if self._reserved_bytes is not None or self._is_released:
            raise RuntimeError("a job reserves all its bytes at once")
        await self._admission._reserve(self._use, nbytes)
        self._reserved_bytes = nbytes

    def give_bytes_back(self) -> None:
        """Give the reserved bytes back, to wait for what other jobs do not; they are acquired again behind it."""
        reserved, self._reserved_bytes = self._reserved_bytes, None
        if reserved is not None:
            self._admission._give_back(self._use, reserved, reservations=1)

    def hold(self, nbytes: int) -> None:
        """Count ``nbytes`` of output, which are in memory already and cannot wait, until the job has ended."""
        if not self._is_released:
            self._record_bytes += nbytes
            self._admission._take(self._use, nbytes)

    def resize(self, nbytes: int) -> None:
        """Change the reserved bytes to ``nbytes``: less gives bytes back, more is in memory already and cannot wait."""
        if self._reserved_bytes is None or self._is_released:
            return
        given_back, self._reserved_bytes = self._reserved_bytes - nbytes, nbytes
        self._admission._give_back(self._use, given_back)

    def release_slot(self, nbytes: int) -> None:
        """Release the job's slot; ``nbytes`` of output that waits for its transaction stay reserved."""
        if self._has_slot:
            self._end(nbytes)

    def release(self) -> None:
        """The job ended: give back all that it holds. Again does nothing."""
        if not self._is_released:
            self._is_released = True
            self._admission._admitted -= 1
            self._end(0)

    def _end(self, kept_bytes: int) -> None:
        """Give back the slot, the reservation, and all bytes but ``kept_bytes``."""
        reservations, jobs = int(self._reserved_bytes is not None), int(self._has_slot)
        given_back = self._record_bytes + (self._reserved_bytes or 0) - kept_bytes
        self._record_bytes, self._reserved_bytes, self._has_slot = kept_bytes, None, False
        self._admission._give_back(self._use, given_back, jobs=jobs, reservations=reservations)
