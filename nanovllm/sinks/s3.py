"""The claim check: a result that is too large for a message is put into S3, and the message says where it lies."""

from __future__ import annotations

import asyncio
import hashlib
import re
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from nanovllm.errors import ConfigurationError, StoreUnreachable
from nanovllm.sinks.encoding import CONTENT_TYPES, MessageFormat
from nanovllm.sinks.messages import StoredResult

_TARGET = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9.\-_]{1,62})(?:/(.*))?", re.DOTALL)
_EXISTS = frozenset({"PreconditionFailed", "412"})


class S3ResultStore:
    """Puts encoded results below ``target`` (``s3://bucket/prefix``), each once: its key is its ``result_id``.

    ``client`` is a boto3 S3 client.

    Raises:
        ConfigurationError: ``target`` is not of that form.
    """

    def __init__(self, target: str, client: Any) -> None:
        match = _TARGET.fullmatch(target)
        if match is None:
            raise ConfigurationError("s3.large_results must have the form s3://bucket or s3://bucket/prefix")
        self._bucket, self._prefix = match[1], (match[2] or "").strip("/")
        self._client = client

    async def put(self, result_id: str, body: bytes, fmt: MessageFormat) -> StoredResult:
        """Store ``body`` and return where it is. What an earlier delivery has stored stays, and is what is returned.

        Raises:
            StoreUnreachable: the store does not take it now. No job can be the cause: nothing is dropped for it.
        """
        return await asyncio.to_thread(self._put, result_id, body, fmt)

    def _put(self, result_id: str, body: bytes, fmt: MessageFormat) -> StoredResult:
        name = f"{result_id}.{fmt}"
        key = f"{self._prefix}/{name}" if self._prefix else name
        digest, size = hashlib.sha256(body).hexdigest(), len(body)
        try:
            try:
                self._client.put_object(
                    Bucket=self._bucket,
                    Key=key,
                    Body=body,
                    ContentType=CONTENT_TYPES[fmt],
                    Metadata={"sha256": digest},
                    IfNoneMatch="*",
                )
            except ClientError as error:
                if error.response["Error"].get("Code") not in _EXISTS:
                    raise
                there = self._client.head_object(Bucket=self._bucket, Key=key)
                digest, size = there["Metadata"]["sha256"], there["ContentLength"]
        except (BotoCoreError, ClientError, KeyError) as error:
            reason = error.response["Error"].get("Code") if isinstance(error, ClientError) else type(error).__name__
            raise StoreUnreachable(f"bucket {self._bucket} does not take a large result ({reason})") from error
        return StoredResult(uri=f"s3://{self._bucket}/{key}", sha256=digest, size=size)
