"""Partition ledger: which delivered offsets are finished. Pure: it knows no Kafka and never waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from itertools import islice


class PartitionLedger:
    """The offsets delivered from one partition during one assignment, and how far they may be committed.

    Jobs finish out of order; the watermark moves over what is finished without a gap, so that a crash repeats work and
    never loses any. It runs over *delivered* offsets: compacted and transactional topics have offsets that no consumer
    ever sees. One object belongs to one assignment: when the partition leaves, the ledger is fenced, and a completion
    that comes later moves nothing.

    ``max_out_of_order``: most offsets delivered above the oldest unfinished one; bounds what a crash repeats.
    """

    def __init__(self, position: int, *, max_out_of_order: int) -> None:
        if position < 0 or max_out_of_order < 1:
            raise ValueError(f"position {position} or max_out_of_order {max_out_of_order} is out of range")
        self.position = position  # the lowest offset that may be delivered next
        self._max_out_of_order = max_out_of_order
        # Delivered offsets from the oldest unfinished one on, in order; the finished ones among them.
        self._span: deque[int] = deque()
        self._finished: set[int] = set()
        self.is_fenced = False  # True: the partition has left, and nothing moves this ledger any more

    @property
    def watermark(self) -> int:
        """The offset to commit: everything below it is finished."""
        return self._span[0] if self._span else self.position

    @property
    def in_flight(self) -> int:
        """How many delivered offsets are not finished."""
        return len(self._span) - len(self._finished)

    @property
    def room(self) -> int:
        """How many more offsets may be delivered now."""
        return max(0, self._max_out_of_order + 1 - len(self._span))

    def deliver(self, offset: int) -> None:
        """Note that the record at ``offset`` was taken to work on.

        Raises:
            ValueError: an offset at or below one that was delivered already.
        """
        if offset < self.position:
            raise ValueError(f"offset {offset} was delivered before; the next is {self.position} or above")
        self._span.append(offset)
        self.position = offset + 1

    def advance(self, position: int) -> None:
        """Note that the consumer stands at ``position``: no record will ever come from below it."""
        self.position = max(self.position, position)

    def complete(self, offset: int) -> bool:
        """Note that the record at ``offset`` ended; False when the ledger is fenced or the offset ended before.

        Raises:
            ValueError: an offset that was never delivered here.
        """
        if self.is_fenced:
            return False
        if offset >= self.position:
            raise ValueError(f"offset {offset} was never delivered")
        if not self.is_open(offset):
            return False
        self._finished.add(offset)
        while self._span and self._span[0] in self._finished:
            self._finished.remove(self._span.popleft())
        return True

    def is_open(self, offset: int) -> bool:
        """Whether ``offset``, which was delivered, is not settled."""
        return offset >= self.watermark and offset not in self._finished

    def leading(self, ready: Container[int], at_most: int) -> tuple[list[int], int]:
        """The open offsets from the watermark on that are all in ``ready``, and the watermark behind them."""
        run: list[int] = []
        for offset in islice(self._span, at_most):
            if offset not in ready:
                return run, offset
            run.append(offset)
        return run, self._span[len(run)] if len(run) < len(self._span) else self.position

    def fence(self) -> None:
        """The partition has left for good."""
        self.is_fenced = True

    def audit(self) -> None:
        """Assert what always holds."""
        span = list(self._span)
        assert span == sorted(set(span)), "delivered offsets are not in order"
        assert self._finished <= set(span), "a finished offset was never delivered"
        assert not span or span[0] not in self._finished, "the watermark stands on a finished offset"
        assert not span or span[-1] < self.position, "the position is below a delivered offset"
        assert self.watermark <= self.position, "the watermark is above the position"
