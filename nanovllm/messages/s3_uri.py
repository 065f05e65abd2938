"""The parser of S3 URIs: ``s3://bucket``, ``s3://bucket/key`` and ``s3://bucket/prefix``."""

from __future__ import annotations

import re

_S3_URI = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9.\-_]{1,62})(?:/(.*))?", re.DOTALL)


def split_s3_uri(uri: str) -> tuple[str, str] | None:
    """The bucket, and the key or prefix (empty where there is none); None where ``uri`` is no S3 URI."""
    match = _S3_URI.fullmatch(uri)
    return (match[1], match[2] or "") if match else None


def split_object_uri(uri: str) -> tuple[str, str] | None:
    """As ``split_s3_uri``, for the URI of an object: its key is not empty and has no NUL."""
    parts = split_s3_uri(uri)
    return parts if parts and parts[1] and "\0" not in parts[1] else None
