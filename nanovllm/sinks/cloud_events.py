"""Kafka records of results and metrics: CloudEvents in binary mode.

The event's attributes are ``ce_*`` headers, the value is the message itself.
"""

from __future__ import annotations

from datetime import UTC, datetime

from nanovllm.kafka.records import Headers, OutgoingRecord
from nanovllm.messages.document_record import DocumentRecord
from nanovllm.messages.encoding import CONTENT_TYPES, MessageFormat, encode
from nanovllm.messages.job_metrics import JobMetrics
from nanovllm.messages.result import Result
from nanovllm.sinks.kept_headers import TRACE_HEADERS, kept_headers, rfc3339


def event_record(
    message: Result | JobMetrics | DocumentRecord, topic: str, fmt: MessageFormat, original_headers: Headers = ()
) -> OutgoingRecord:
    """``message`` as a CloudEvent, keyed by its job. Raises ValueError where no Kafka record asked for it."""
    source = message.source
    if source is None:
        raise ValueError(f"the record of {message.job_id} has no source in Kafka")
    attributes = {
        "ce_specversion": "1.0",
        "ce_id": message.result_id,
        "ce_type": f"nanovllm.{message.schema_name}",
        "ce_source": f"/nanovllm/{source.topic}/{source.partition}",
        "ce_subject": message.job_id,
        "ce_time": rfc3339(datetime.now(UTC)),
        "content-type": CONTENT_TYPES[fmt],
    }
    own = ((name, value.encode()) for name, value in attributes.items())
    kept = ((name.lower(), value) for name, value in kept_headers(original_headers, TRACE_HEADERS))
    return OutgoingRecord(topic, message.job_id.encode(), encode(message, fmt), (*own, *kept))
