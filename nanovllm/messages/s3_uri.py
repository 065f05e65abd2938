"""The parser of object URIs: ``s3://bucket/key``, ``gs://bucket/key`` and ``az://container/key``.

A container of Azure is called a bucket here. The functions named after S3 take no other scheme: results, sidecars,
listings and events are S3's alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

_ALL_BELOW = re.compile(r"((^|/)\*{1,2})+$")
MAX_KEY_BYTES = 1_024
"""The stores' own limit on a key, in UTF-8; each of its bytes can take three in a URL."""

_BUCKETS: Mapping[str, str] = {
    "s3": r"[A-Za-z0-9][A-Za-z0-9.\-_]{1,62}",
    "gs": r"[a-z0-9][a-z0-9.\-_]{1,220}[a-z0-9]",
    "az": r"(?!-)(?:[a-z0-9]|-(?=[a-z0-9])){3,63}",
}
OBJECT_SCHEMES = tuple(_BUCKETS)
_FORMS = {scheme: re.compile(rf"{scheme}://({bucket})(?:/(.*))?", re.DOTALL) for scheme, bucket in _BUCKETS.items()}


class ObjectAddress(NamedTuple):
    """Where an object is; as the address of a prefix, ``key`` is what keys begin with, or empty."""

    scheme: str
    bucket: str
    key: str

    @property
    def store(self) -> str:
        """The bucket with its scheme: buckets of two stores may have one name."""
        return f"{self.scheme}://{self.bucket}"


def is_object_uri(text: str) -> bool:
    """Whether ``text`` begins as the URI of an object does."""
    return text.partition("://")[0] in OBJECT_SCHEMES and "://" in text


def split_uri(uri: str) -> ObjectAddress | None:
    """The address of an object or a prefix; None where ``uri`` is no object URI."""
    form = _FORMS.get(uri.partition("://")[0])
    match = form.fullmatch(uri) if form else None
    return ObjectAddress(uri.partition("://")[0], match[1], match[2] or "") if match else None


@lru_cache(maxsize=256)  # asked for several times while an object is read
def split_object(uri: str) -> ObjectAddress | None:
    """As ``split_uri``, for the URI of one object: its key has 1 to ``MAX_KEY_BYTES`` bytes and no NUL."""
    address = split_uri(uri)
    if address is None or "\0" in address.key:
        return None
    return address if 0 < len(address.key.encode("utf-8", "surrogatepass")) <= MAX_KEY_BYTES else None


def split_prefix(uri: str) -> ObjectAddress | None:
    """The address, its key without a slash at its end, of what names everything below a prefix.

    ``s3://bucket/prefix``, ``s3://bucket/prefix/``, ``s3://bucket/prefix/*`` and ``s3://bucket/prefix/**`` are the
    same; None where ``uri`` is no object URI, or has a wildcard (``*``, ``?``) elsewhere, which would match nothing.
    """
    address = split_uri(uri)
    if address is None:
        return None
    prefix = _ALL_BELOW.sub("", address.key).rstrip("/")
    return None if "*" in prefix or "?" in prefix else address._replace(key=prefix)


def split_s3_uri(uri: str) -> tuple[str, str] | None:
    """The bucket, and the key or prefix (empty where there is none); None where ``uri`` is no S3 URI."""
    return _in_s3(split_uri(uri))


def split_object_uri(uri: str) -> tuple[str, str] | None:
    """The bucket and the key of an object in S3, as ``split_object``."""
    return _in_s3(split_object(uri))


def split_prefix_uri(uri: str) -> tuple[str, str] | None:
    """The bucket and the prefix of what names everything below a prefix in S3, as ``split_prefix``."""
    return _in_s3(split_prefix(uri))


def _in_s3(address: ObjectAddress | None) -> tuple[str, str] | None:
    return (address.bucket, address.key) if address is not None and address.scheme == "s3" else None
