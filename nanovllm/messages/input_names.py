"""The names of a job's images, or of an event's objects, in a message that need not be valid: as dead letters are.

A URI over HTTP is named without its query, which can be a signature.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nanovllm.errors import InvalidJob
from nanovllm.messages.codec import decode_fields
from nanovllm.messages.http_uri import is_http_uri, without_secrets
from nanovllm.messages.job import MAX_ITEMS, MAX_URI_CHARS
from nanovllm.messages.s3_uri import is_object_uri


def input_names(value: bytes | None) -> tuple[str, ...]:
    """What the sender calls each image: its name, or else its URI; none of a message that cannot be read."""
    try:
        fields = decode_fields(value or b"")
    except InvalidJob:
        return ()
    events = [*_of_events(fields.get("Records")), *_of_bridge_event(fields.get("detail"))]
    found = [*_of_images(fields.get("images")), *_of_messages(fields.get("messages")), *events]
    return tuple(name for name in found if isinstance(name, str) and 0 < len(name) <= MAX_URI_CHARS)


def _of_images(images: Any) -> Iterator[Any]:
    for image in _items(images):
        name, uri = (image.get("name"), image.get("uri")) if isinstance(image, dict) else (None, image)
        yield name or (without_secrets(uri) if isinstance(uri, str) else None)


def _of_messages(messages: Any) -> Iterator[Any]:
    for message in _items(messages):
        for part in _items(message.get("content") if isinstance(message, dict) else None):
            image = part.get("image_url") if isinstance(part, dict) else None
            url = image.get("url") if isinstance(image, dict) else None
            if isinstance(url, str) and (is_object_uri(url) or is_http_uri(url)):  # others hold the image itself
                yield without_secrets(url)


def _of_events(records: Any) -> Iterator[str]:
    """Objects as the notification spells them: which stores encode their keys is not known here."""
    for record in _items(records):
        s3 = record.get("s3") if isinstance(record, dict) else None
        yield from _of_bridge_event(s3)


def _of_bridge_event(detail: Any) -> Iterator[str]:
    bucket, subject = (detail.get(name) for name in ("bucket", "object")) if isinstance(detail, dict) else (None, None)
    if isinstance(bucket, dict) and isinstance(subject, dict):
        yield f"s3://{bucket.get('name')}/{subject.get('key')}"


def _items(value: Any) -> list[Any]:
    return value[:MAX_ITEMS] if isinstance(value, list) else []
