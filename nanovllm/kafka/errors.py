"""What aiokafka's errors mean: transient, fatal for a producer, or the brokers' refusal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from aiokafka import errors
from aiokafka.errors import KafkaError

from nanovllm.errors import BrokersUnavailable, MessageTooLarge, NanoVLLMError, TransientError

_FATAL = (
    errors.InvalidProducerEpoch,
    errors.InvalidProducerIdMapping,
    errors.OutOfOrderSequenceNumber,
    errors.ProducerClosed,
    errors.ProducerFenced,
    errors.UnknownProducerId,
)


def is_fatal(error: KafkaError) -> bool:
    """Whether the producer that raised ``error`` can never send again: its numbers and the broker's have parted.

    aiokafka numbers a record before the broker has taken it; once one was refused, every later one is out of order. A
    plain KafkaError says that its sending task has died.
    """
    return isinstance(error, _FATAL) or type(error) is KafkaError


class FencedInstanceIdError(errors.BrokerResponseError):
    """Another member has joined with the same ``group.instance.id`` (KIP-345)."""

    errno = 82
    message = "FENCED_INSTANCE_ID"


# aiokafka 0.14 does not know the code, and calls it UnknownError.
errors.kafka_errors.setdefault(FencedInstanceIdError.errno, FencedInstanceIdError)


def is_fenced_instance(error: KafkaError) -> bool:
    """Whether another member has this one's ``group.instance.id``.

    aiokafka's coordinator puts a broker's error into a plain KafkaError, as its text.
    """
    return isinstance(error, FencedInstanceIdError) or (
        type(error) is KafkaError and FencedInstanceIdError.__name__ in str(error)
    )


# Retriable by their meaning, though aiokafka does not mark them so.
_TRANSIENT = (
    errors.KafkaTimeoutError,
    errors.KafkaUnavailableError,
    errors.BrokerNotAvailableError,
    errors.ReplicaNotAvailableError,
)


@contextmanager
def refusals_of(bootstrap_servers: str) -> Iterator[None]:
    """Raise BrokersUnavailable, which names the brokers, for a KafkaError inside."""
    try:
        yield
    except KafkaError as error:
        why = type(error).__name__
        raise BrokersUnavailable(f"the brokers at {bootstrap_servers} refuse or do not answer ({why})") from error


def publish_error(error: KafkaError, topic: str) -> NanoVLLMError:
    """What aiokafka's ``error`` at a send means for us."""
    name = type(error).__name__
    if isinstance(error, errors.MessageSizeTooLargeError):
        return MessageTooLarge(f"topic {topic} or the producer refuses a message of this size")
    if isinstance(error, errors.UnknownTopicOrPartitionError):
        return BrokersUnavailable(f"topic {topic} does not exist and is not created by itself ({name})")
    if is_fatal(error):
        return TransientError(f"the Kafka producer broke down at topic {topic} and is replaced ({name})")
    if error.retriable or isinstance(error, _TRANSIENT):
        return TransientError(f"topic {topic} could not be written ({name})")
    return BrokersUnavailable(f"the brokers refuse what is sent to topic {topic} ({name})")
