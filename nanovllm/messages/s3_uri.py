"""The parser of S3 URIs: ``s3://bucket``, ``s3://bucket/key`` and ``s3://bucket/prefix``."""

from __future__ import annotations

import re

_ALL_BELOW = re.compile(r"((^|/)\*{1,2})+$")
MAX_KEY_BYTES = 1_024
"""S3's own limit on a key, in UTF-8; each of its bytes can take three in a URL."""

_S3_URI = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9.\-_]{1,62})(?:/(.*))?", re.DOTALL)


def split_s3_uri(uri: str) -> tuple[str, str] | None:
    """The bucket, and the key or prefix (empty where there is none); None where ``uri`` is no S3 URI."""
    match = _S3_URI.fullmatch(uri)
    return (match[1], match[2] or "") if match else None


def split_prefix_uri(uri: str) -> tuple[str, str] | None:
    """The bucket and the prefix, without a slash at its end, of what names everything below a prefix.

    ``s3://bucket/prefix``, ``s3://bucket/prefix/``, ``s3://bucket/prefix/*`` and ``s3://bucket/prefix/**`` are the
    same; None where ``uri`` is no S3 URI, or has a wildcard (``*``, ``?``) elsewhere, which would match nothing.
    """
    parts = split_s3_uri(uri)
    if parts is None:
        return None
    prefix = _ALL_BELOW.sub("", parts[1]).rstrip("/")
    return None if "*" in prefix or "?" in prefix else (parts[0], prefix)


def split_object_uri(uri: str) -> tuple[str, str] | None:
    """As ``split_s3_uri``, for the URI of an object: its key has 1 to ``MAX_KEY_BYTES`` bytes and no NUL."""
    parts = split_s3_uri(uri)
    if parts is None or "\0" in parts[1]:
        return None
    return parts if 0 < len(parts[1].encode("utf-8", "surrogatepass")) <= MAX_KEY_BYTES else None
