"""Conditional writes: PutObject with If-None-Match or If-Match, of which one of several writers wins."""

from __future__ import annotations

import random
import time
from typing import Any

from botocore.exceptions import ClientError

from nanovllm.objects.errors import status_of

MAX_CONFLICTS = 8
"""Answers 409 after which the store's answer is raised."""
_FIRST_WAIT_S = 0.05
_CONFLICT = 409
# 304: MinIO before 2024 answered a failed If-None-Match as GET does.
_FAILED = frozenset({304, 412})


def put_if_absent(client: Any, **request: Any) -> bool:
    """Put an object where its key has none; False where it has one.

    Raises:
        ClientError: the store refuses, or answered 409 ``MAX_CONFLICTS`` times.
    """
    return _put(client, _FAILED, request | {"IfNoneMatch": "*"})


def put_if_unchanged(client: Any, etag: str, **request: Any) -> bool:
    """Replace an object that has the entity tag ``etag``; False where it has another one or is gone.

    Raises:
        ClientError: as ``put_if_absent``.
    """
    return _put(client, _FAILED | {404}, request | {"IfMatch": etag})


def _put(client: Any, failed: frozenset[int], request: dict[str, Any]) -> bool:
    for conflicts in range(MAX_CONFLICTS):
        try:
            client.put_object(**request)
        except ClientError as error:
            status = status_of(error)
            # 404 is also the answer where there is no bucket, which no other attempt changes.
            if status in failed and error.response["Error"].get("Code") != "NoSuchBucket":
                return False
            if status != _CONFLICT or conflicts + 1 == MAX_CONFLICTS:
                raise
            # ConditionalRequestConflict: another write of the key was under way, and nothing is known of its end.
            time.sleep(_FIRST_WAIT_S * 2**conflicts * random.uniform(0.5, 1.0))
        else:
            return True
    raise AssertionError("the last conflict is raised")
