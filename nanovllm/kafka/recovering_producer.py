"""Recovering producer: an idempotent producer that is replaced after a fatal error."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, ProducerClosed

from nanovllm.errors import BrokersUnavailable
from nanovllm.kafka.batch_send import send_batches
from nanovllm.kafka.client import producer_kwargs
from nanovllm.kafka.errors import is_fatal
from nanovllm.kafka.keyed_producer import KeyedProducer
from nanovllm.kafka.paced_metadata import pace_metadata

if TYPE_CHECKING:
    from nanovllm.kafka.records import OutgoingRecord
    from nanovllm.kafka.topic_limits import TopicLimits
    from nanovllm.settings.kafka import KafkaSettings

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0


class RecoveringProducer:
    """Sends through one AIOKafkaProducer, and replaces it when it breaks down.

    What was being sent when it broke fails with the error; sent again, it goes through the new producer.
    """

    def __init__(self, connect: Callable[[], AIOKafkaProducer]) -> None:
        """``connect`` makes a producer that is not started; called once in ``start`` and once a breakdown."""
        self._connect = connect
        self._producer: AIOKafkaProducer | None = None
        self._renewal = asyncio.Lock()

    @classmethod
    def within(cls, kafka: KafkaSettings, limits: TopicLimits) -> Self:
        """One whose batches fit the topics of ``limits``, also of those that are lowered later."""
        options = producer_kwargs(kafka)

        def connect() -> AIOKafkaProducer:
            # A topic's limit is one for whole batches: small records that exceed it together are refused together.
            batch_bytes = min(options["max_batch_size"], limits.for_new_producer())
            return KeyedProducer(**{**options, "max_batch_size": batch_bytes})

        return cls(connect)

    async def start(self) -> None:
        """Connect. Raises BrokersUnavailable when no broker answers."""
        try:
            self._producer = await self._started()
        except KafkaError as error:
            raise BrokersUnavailable(f"the brokers refuse or do not answer ({type(error).__name__})") from error

    async def stop(self) -> None:
        """Send what is left, and disconnect; records that no broker takes are given up after ``STOP_TIMEOUT_S``."""
        if self._producer is None:
            return
        try:
            # aiokafka repeats what an idempotent producer has to send for as long as its broker is away.
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._producer.stop()
        except TimeoutError:
            logger.warning("the brokers did not take what was left to send: its jobs go back to Kafka")

    async def send_and_wait(
        self, topic: str, value: bytes | None, *, key: bytes | None, headers: Sequence[tuple[str, bytes]] = ()
    ) -> None:
        """Return when all replicas have the record.

        Raises:
            KafkaError: they have not, as far as is known; after a breakdown the next call uses another producer.
        """
        await (await self.send(topic, value, key=key, headers=headers))

    async def send(
        self, topic: str, value: bytes | None, *, key: bytes | None, headers: Sequence[tuple[str, bytes]] = ()
    ) -> Awaitable[None]:
        """Put the record into its batch, in the order of the calls; what is returned ends as ``send_and_wait`` does.

        Raises:
            KafkaError: it could not be put there.
        """
        producer = self._producer
        if producer is None:
            raise ProducerClosed()
        try:
            sent = await producer.send(topic, value, key=key, headers=list(headers))
        except KafkaError as error:
            await self.replace_after(error, producer)
            raise
        return _Acknowledgement(self, producer, sent)

    async def send_batches(
        self, topic: str, records: Sequence[OutgoingRecord], max_bytes: int
    ) -> list[KafkaError | None]:
        """As ``nanovllm.kafka.batch_send.send_batches``."""
        producer = self._producer
        if producer is None:
            raise ProducerClosed()
        try:
            errors = await send_batches(producer, topic, records, max_bytes)
        except KafkaError as error:
            await self.replace_after(error, producer)
            raise
        if any(error is not None and is_fatal(error) for error in errors):
            await self._replace(producer, logging.ERROR)
        return errors

    async def replace(self) -> None:
        """Use another producer from now on: aiokafka has counted a record that a broker then refused as too large.

        Without it the next send to the same partition fails, and only the one after that goes through.

        Raises:
            KafkaError: the brokers do not take another one.
        """
        if self._producer is not None:
            await self._replace(self._producer, logging.DEBUG)

    async def replace_after(self, error: KafkaError, producer: AIOKafkaProducer) -> None:
        """Replace ``producer`` if ``error`` is fatal, unless that has been done already."""
        if is_fatal(error):
            await self._replace(producer, logging.ERROR)

    async def _replace(self, broken: AIOKafkaProducer, level: int) -> None:
        async with self._renewal:
            is_in_use = self._producer is broken
            if is_in_use:
                logger.log(level, "the Kafka producer broke down and is replaced")
                self._producer = await self._started()
                await broken.stop()

    async def _started(self) -> AIOKafkaProducer:
        producer = self._connect()
        pace_metadata(producer.client)
        try:
            await producer.start()
        except BaseException:
            await producer.stop()
            raise
        return producer


@dataclass(slots=True, eq=False)
class _Acknowledgement:
    """Awaitable of one record; what is never awaited leaves no coroutine that never ran."""

    owner: RecoveringProducer
    producer: AIOKafkaProducer
    sent: Awaitable[object]

    def __await__(self) -> Generator[Any, None, None]:
        try:
            yield from self.sent.__await__()
        except KafkaError as error:
            yield from self.owner.replace_after(error, self.producer).__await__()
            raise
