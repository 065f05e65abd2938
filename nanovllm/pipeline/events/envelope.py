"""Envelopes around event notifications, told by content: SNS, SQS, CloudEvents, lists, JSON inside a string of JSON."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from typing import Any

from nanovllm.errors import InvalidEvent, InvalidJob
from nanovllm.messages.codec import decode_json
from nanovllm.messages.validation import printable
from nanovllm.pipeline.events.event import ObjectEvent
from nanovllm.pipeline.events.notification import is_notification, read_notification

MAX_MESSAGE_BYTES = 1 << 20
"""Largest message that is parsed: SQS's own limit. S3's notifications have up to 64 KiB."""
MAX_TEXTS = 8
"""Most texts of JSON inside one another (SQS's body, SNS's Message, …). An inner one is shorter than the one around it,
so that no more than so many times the message is parsed; inside one text `messages.encoding.MAX_DEPTH` is the bound."""
MAX_EVENTS = 1_000
"""Most events of one message."""
MAX_NAMES = 5


def parse_events(value: bytes) -> list[ObjectEvent]:
    """The events of an untrusted message, in its order; at least one.

    Raises:
        InvalidEvent: it is too large or nested too deeply, no JSON, or holds something that is no event of S3.
    """
    return [event for event, _ in split_events(value)]


def split_events(value: bytes) -> list[tuple[ObjectEvent, bytes]]:
    """As ``parse_events``, each event with its own notification as a message, without envelopes."""
    if len(value) > MAX_MESSAGE_BYTES:
        raise InvalidEvent(f"the message has {len(value)} bytes, above the limit of {MAX_MESSAGE_BYTES}")
    found: list[tuple[ObjectEvent, bytes]] = []
    for notification in _notifications(value):
        if len(found) == MAX_EVENTS:
            raise InvalidEvent(f"the message holds more than {MAX_EVENTS} events")
        is_record = "eventName" in notification and "detail-type" not in notification
        alone = json.dumps({"Records": [notification]} if is_record else notification, ensure_ascii=False)
        found.append((read_notification(notification), alone.encode()))
    if not found:
        raise InvalidEvent("the message holds no event")
    return found


def _notifications(value: bytes) -> Iterator[Mapping[str, Any]]:
    # A stack of our own, and the first on top: the sender chooses the depth.
    left: list[tuple[Any, int]] = [(value, 0)]
    while left:
        part, texts = left.pop()
        if isinstance(part, (bytes, str)):
            if texts == MAX_TEXTS:
                raise InvalidEvent(f"the message has more than {MAX_TEXTS} texts of JSON inside one another")
            left.append((_parse(part), texts + 1))
        elif isinstance(part, list):
            left += [(item, texts) for item in reversed(part)]
        elif isinstance(part, dict) and is_notification(part):
            yield part
        elif isinstance(part, dict):
            left.append((_contents(part), texts))
        else:
            raise InvalidEvent("the message holds a number, true, false or null in the place of an event")


def _parse(text: bytes | str) -> Any:
    try:
        return decode_json(text if isinstance(text, bytes) else text.encode())
    except InvalidJob as error:
        raise InvalidEvent(str(error)) from None


def _contents(envelope: Mapping[str, Any]) -> Any:
    """What ``envelope`` is around."""
    if "specversion" in envelope:  # CloudEvents, structured mode
        return _from_base64(envelope["data_base64"]) if "data_base64" in envelope else envelope.get("data")
    if isinstance(envelope.get("Records"), list):  # S3 itself; SQS and SNS as Lambda gets them
        return envelope["Records"]
    if envelope.get("Type") in ("SubscriptionConfirmation", "UnsubscribeConfirmation"):
        raise InvalidEvent("SNS asks to confirm a subscription: confirm it where it was made (sns:ConfirmSubscription)")
    for name, inner in (
        ("TopicArn", "Message"),  # SNS
        ("EventSource", "Sns"),  # a record of SNS
        ("messageId", "body"),  # a record of SQS
        ("MessageId", "Body"),  # a message as SQS's API gives it
        ("Messages", "Messages"),  # the API's whole answer
    ):
        if name in envelope and inner in envelope:
            return envelope[inner]
    names = ", ".join(printable(name) for name in sorted(envelope)[:MAX_NAMES]) or "no names at all"
    raise InvalidEvent(f"the message is no S3 event and no known envelope of one: it has {names}")


def _from_base64(data: Any) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise InvalidEvent("data_base64 is no base64") from None
