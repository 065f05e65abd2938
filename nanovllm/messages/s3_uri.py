"""The parser of S3 URIs: ``s3://bucket``, ``s3://bucket/key`` and ``s3://bucket/prefix``."""

from __future__ import annotations

import re

MAX_KEY_BYTES = 1_024
"""S3's own limit on a key, in UTF-8; each of its bytes can take three in a URL."""

_S3_URI = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9.\-_]{1,62})(?:/(.*))?", re.DOTALL)


def split_s3_uri(uri: str) -> tuple[str, str] | None:
    """The bucket, and the key or prefix (empty where there is none); None where ``uri`` is no S3 URI."""
    match = _S3_URI.fullmatch(uri)
    return (match[1], match[2] or "") if match else None


def split_object_uri(uri: str) -> tuple[str, str] | None:
    """As ``split_s3_uri``, for the URI of an object: its key has 1 to ``MAX_KEY_BYTES`` bytes and no NUL."""
    parts = split_s3_uri(uri)
    if parts is None or "\0" in parts[1]:
        return None
    return parts if 0 < len(parts[1].encode("utf-8", "surrogatepass")) <= MAX_KEY_BYTES else None
