"""Kafka records of results and metrics: CloudEvents in binary mode.

The event's attributes are ``ce_*`` headers, the value is the message itself.
"""

from __future__ import annotations

from functools import lru_cache

from nanovllm.kafka.records import Headers, OutgoingRecord
from nanovllm.messages.document_record import DocumentRecord
from nanovllm.messages.encoding import CONTENT_TYPES, MessageFormat, encode
from nanovllm.messages.job_metrics import JobMetrics
from nanovllm.messages.result import Result
from nanovllm.sinks.kept_headers import TRACE_HEADERS, kept_headers, rfc3339_now


def event_record(
    message: Result | JobMetrics | DocumentRecord, topic: str, fmt: MessageFormat, original_headers: Headers = ()
) -> OutgoingRecord:
    """``message`` as a CloudEvent, keyed by its job. Raises ValueError where no Kafka record asked for it."""
    source = message.source
    if source is None:
        raise ValueError(f"the record of {message.job_id} has no source in Kafka")
    key = message.job_id.encode()
    headers: Headers = (
        ("ce_specversion", b"1.0"),
        ("ce_id", message.result_id.encode()),
        ("ce_type", f"nanovllm.{message.schema_name}".encode()),
        ("ce_source", _source_name(source.topic, source.partition)),
        ("ce_subject", key),
        ("ce_time", rfc3339_now().encode()),
        ("content-type", CONTENT_TYPES[fmt].encode()),
    )
    if original_headers:
        headers += tuple((name.lower(), value) for name, value in kept_headers(original_headers, TRACE_HEADERS))
    return OutgoingRecord(topic, key, encode(message, fmt), headers)


@lru_cache(1_024)
def _source_name(topic: str, partition: int) -> bytes:
    return f"/nanovllm/{topic}/{partition}".encode()
