"""The span of a job's sending, in services that have OpenTelemetry set up."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nanovllm.errors import NanoVLLMError
from nanovllm.kafka.records import Headers


@dataclass(frozen=True)
class SendSpan:
    """The ``headers`` by which the worker continues the trace; ``sent`` is told the partition and the offset."""

    headers: Headers = ()
    sent: Callable[[int, int], None] = lambda partition, offset: None


@contextmanager
def send_span(topic: str) -> Iterator[SendSpan]:
    """A span around the sending of one job to ``topic``, of the service's own tracer provider.

    Without one it is the service's current trace that the headers continue, if there is any. A service that has not
    imported OpenTelemetry pays nothing, and this does not import it.
    """
    if "opentelemetry.trace" not in sys.modules:
        yield SendSpan()
        return
    from opentelemetry.trace import SpanKind, Status, StatusCode, get_tracer
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    attributes = {
        "messaging.system": "kafka",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": topic,
    }
    with get_tracer("nanovllm.client").start_as_current_span(
        f"send {topic}",
        kind=SpanKind.PRODUCER,
        attributes=attributes,
        # An error's text may repeat what the job says; its code does not.
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier)

        def sent(partition: int, offset: int) -> None:
            span.set_attribute("messaging.destination.partition.id", str(partition))
            span.set_attribute("messaging.kafka.offset", offset)

        try:
            yield SendSpan(tuple((name, value.encode()) for name, value in carrier.items()), sent)
        except Exception as error:
            code = error.code if isinstance(error, NanoVLLMError) else type(error).__name__
            span.set_attribute("error.type", code)
            span.set_status(Status(StatusCode.ERROR, code))
            raise
