"""Results and metrics as Kafka records: CloudEvents in Kafka binary mode.

The event's attributes are ``ce_*`` headers, the value is the message itself.
"""

from __future__ import annotations

from datetime import UTC, datetime

from nanovllm.kafka.records import Headers, OutgoingRecord
from nanovllm.messages.encoding import CONTENT_TYPES, MessageFormat, encode
from nanovllm.messages.job_metrics import JobMetrics
from nanovllm.messages.result import Result
from nanovllm.sinks.kept_headers import TRACE_HEADERS, kept_headers, rfc3339


def result_record(result: Result, topic: str, fmt: MessageFormat, original_headers: Headers = ()) -> OutgoingRecord:
    """``result`` as a CloudEvent, keyed by its job."""
    headers = _event_headers("nanovllm.result.v1", result.result_id, result, fmt, original_headers)
    return OutgoingRecord(topic, result.job_id.encode(), encode(result, fmt), headers)


def metrics_record(
    metrics: JobMetrics, topic: str, fmt: MessageFormat, original_headers: Headers = ()
) -> OutgoingRecord:
    """``metrics`` as a CloudEvent, keyed by its job."""
    headers = _event_headers("nanovllm.metrics.v1", metrics.result_id, metrics, fmt, original_headers)
    return OutgoingRecord(topic, metrics.job_id.encode(), encode(metrics, fmt), headers)


def _event_headers(
    event_type: str, event_id: str, message: Result | JobMetrics, fmt: MessageFormat, original_headers: Headers
) -> Headers:
    source = message.source
    attributes = {
        "ce_specversion": "1.0",
        "ce_id": event_id,
        "ce_type": event_type,
        "ce_source": f"/nanovllm/{source.topic}/{source.partition}",
        "ce_subject": message.job_id,
        "ce_time": rfc3339(datetime.now(UTC)),
        "content-type": CONTENT_TYPES[fmt],
    }
    own = tuple((name, value.encode()) for name, value in attributes.items())
    return (*own, *((name.lower(), value) for name, value in kept_headers(original_headers, TRACE_HEADERS)))
