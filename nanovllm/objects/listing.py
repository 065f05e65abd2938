"""Listing of objects: what lies below a prefix, what a glob matches, or what one URI names."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from nanovllm.errors import InvalidInput, PermanentError
from nanovllm.messages.s3_uri import split_object_uri, split_s3_uri
from nanovllm.objects.s3_client import S3Client, make_client
from nanovllm.settings.s3 import S3Settings

MAX_PAGE_KEYS = 1_000
_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class ListedObject:
    """An object as a listing names it; ``etag`` without quotes."""

    uri: str
    etag: str
    size: int
    last_modified: datetime | None = None


@dataclass(frozen=True)
class ObjectPattern:
    """The objects that an ``s3://`` URI with a wildcard, or with a slash at its end, names."""

    bucket: str
    pattern: str

    @classmethod
    def of(cls, uri: str) -> ObjectPattern | None:
        """The pattern that ``uri`` is: ``s3://bucket``, ``s3://bucket/prefix/``, or a glob; None for one object's URI.

        A glob is Python's: ``*`` stays within one level of the key, ``**`` is any number of levels.
        """
        parts = split_s3_uri(uri)
        if parts is None:
            return None
        bucket, key = parts
        is_pattern = not key or key.endswith("/") or _WILDCARD.search(key) is not None
        return cls(bucket, key) if is_pattern else None

    @property
    def is_prefix(self) -> bool:
        """Whether it names all that lies below a prefix."""
        return _WILDCARD.search(self.pattern) is None

    @property
    def prefix(self) -> str:
        """What the keys of all of its objects begin with."""
        return _WILDCARD.split(self.pattern, maxsplit=1)[0]

    def matches(self, key: str) -> bool:
        """Whether the object ``key``, which begins with ``prefix``, is one of them; markers of folders are none."""
        if key.endswith("/"):
            return False
        # An object may be called by the pattern's own characters, as a file on a disk may.
        return self.is_prefix or key == self.pattern or _glob_matches(key.split("/"), self.pattern.split("/"))


def list_objects(
    settings: S3Settings, pattern: ObjectPattern, *, page_keys: int = MAX_PAGE_KEYS
) -> Iterator[ListedObject]:
    """The objects of ``pattern``, in the order of the store, a page of keys at a time.

    Raises:
        InvalidInput: the bucket is not there, or may not be listed.
        SystemicError, TransientError: the object store cannot be reached, or refuses the credentials.
    """
    client = S3Client(settings, partial(make_client, max_attempts=settings.max_attempts))
    page: dict[str, Any] = {"Bucket": pattern.bucket, "Prefix": pattern.prefix, "MaxKeys": page_keys}
    while True:
        try:
            answer = client.call(lambda s3, page=page: s3.list_objects_v2(**page))  # type: ignore[misc]
        except PermanentError as error:
            raise InvalidInput(
                f"s3://{pattern.bucket}/{pattern.prefix} cannot be listed ({error}): the bucket must exist, and "
                "listing needs s3:ListBucket on it"
            ) from error
        for one in answer.get("Contents", ()):
            if pattern.matches(one["Key"]):
                uri, etag = f"s3://{pattern.bucket}/{one['Key']}", one["ETag"].strip('"')
                yield ListedObject(uri, etag, one["Size"], one.get("LastModified"))
        if not answer.get("IsTruncated"):
            return
        page = page | {"ContinuationToken": answer["NextContinuationToken"]}


def find_object(client: S3Client, uri: str) -> ListedObject:
    """The object that ``uri`` names.

    Raises:
        InvalidInput: it is no URI of an object.
        NanoVLLMError: as ``S3Client.call``.
    """
    parts = split_object_uri(uri)
    if parts is None:
        raise InvalidInput(f"{uri} is not the URI of an object")
    bucket, key = parts
    answer = client.call(lambda s3: s3.head_object(Bucket=bucket, Key=key))
    return ListedObject(uri, answer["ETag"].strip('"'), answer["ContentLength"], answer.get("LastModified"))


def _glob_matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether the levels of a key match those of a glob; ``positions`` are all places reached in the pattern."""
    positions = _with_skipped({0}, pattern)
    for part in parts:
        stay = {at for at in positions if at < len(pattern) and pattern[at] == "**"}
        move = {at + 1 for at in positions if at < len(pattern) and fnmatch.fnmatchcase(part, pattern[at])}
        positions = _with_skipped(stay | move, pattern)
    return len(pattern) in positions


def _with_skipped(positions: set[int], pattern: list[str]) -> set[int]:
    """``positions``, and those behind each ``**`` at them, which may be no level at all."""
    reached = set(positions)
    for at in range(len(pattern)):
        if at in reached and pattern[at] == "**":
            reached.add(at + 1)
    return reached
