"""An assigned partition, and the records consumed from it."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanovllm.errors import InvalidJob
from nanovllm.pipeline.consuming.ledger import PartitionLedger
from nanovllm.pipeline.consuming.transactions import PartitionTransactions
from nanovllm.value_object import value_object


@value_object
class ConsumedRecord:
    """One record, delivered once during one assignment of its partition."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int | None
    key: bytes | None
    value: bytes
    headers: tuple[tuple[str, bytes], ...] = ()
    refusal: InvalidJob | None = None
    """Why it is no job, where its source knows: one that the Kafka client cannot parse (what could be read of it is in
    the other fields), or a line with the job id of an earlier one.
    """
    is_tombstone: bool = False
    """Whether it has no value, which deletes its key from a compacted topic; ``value`` is empty then."""
    ledger: PartitionLedger = field(kw_only=True, repr=False)
    transactions: PartitionTransactions | None = field(default=None, kw_only=True, repr=False)

    @property
    def is_current(self) -> bool:
        """Whether its partition is still assigned; if not, the next owner gets the record again."""
        return not self.ledger.is_fenced

    @property
    def original_value(self) -> bytes | None:
        """Its value as it lies in the topic: None for a tombstone."""
        return None if self.is_tombstone else self.value

    def complete(self) -> bool:
        """Mark its offset complete in the ledger; False where its partition has left meanwhile."""
        return self.ledger.complete(self.offset)


@dataclass(eq=False)
class AssignedPartition:
    """A partition's ledger, and what is known about its committed offset."""

    ledger: PartitionLedger
    committed: int | None
    # A commit whose answer never came may have happened or not.
    attempted: int | None = None
    # With exactly_once: what ends the partition's jobs, and knows what is committed.
    transactions: PartitionTransactions | None = None

    def is_done(self, end: int) -> bool:
        """Whether everything below ``end`` is finished and committed."""
        return self.ledger.in_flight == 0 and self.ledger.position >= end and self.committed == self.ledger.watermark

    async def commit_position(self) -> None:
        """With exactly_once: the jobs' own transactions commit what they end; here, what an idle partition has passed.

        Raises:
            NanoVLLMError: it was not committed.
        """
        if self.transactions is not None:
            if self.ledger.in_flight == 0 and self.transactions.committed != self.ledger.watermark:
                await self.transactions.commit_position(self.ledger)
            self.committed = self.transactions.committed
