"""The claim check: a result that is too large for a message is put into S3, and the message says where it lies."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any

from nanovllm.errors import ConfigurationError, NanoVLLMError, StoreUnreachable, SystemicError
from nanovllm.messages.encoding import CONTENT_TYPES, MessageFormat
from nanovllm.messages.result import StoredResult
from nanovllm.messages.s3_uri import split_prefix_uri
from nanovllm.objects.conditional_put import put_if_absent


class S3ResultStore:
    """Puts encoded results below ``target`` (``s3://bucket/prefix``), each once: what is stored under a name stays.

    ``call`` runs an operation with a boto3 S3 client in the calling thread, and raises what fails as NanoVLLMError.

    Raises:
        ConfigurationError: ``target`` is not of that form.
    """

    def __init__(self, target: str, call: Callable[[Callable[[Any], StoredResult]], StoredResult]) -> None:
        parts = split_prefix_uri(target)
        if parts is None:
            raise ConfigurationError("s3.large_results must have the form s3://bucket or s3://bucket/prefix")
        self._bucket, self._prefix = parts[0], parts[1].strip("/")
        self._call = call

    async def put(self, name: str, body: bytes, fmt: MessageFormat) -> StoredResult:
        """Store ``body`` and return where it is. What an earlier delivery has stored stays, and is what is returned.

        Args:
            name: of the result; equal for deliveries of one record and for no others.

        Raises:
            SystemicError: the store does not take it now. No job can be the cause: nothing is dropped for it.
        """
        try:
            return await asyncio.to_thread(self._call, lambda client: self._put(client, name, body, fmt))
        except SystemicError:
            raise
        except NanoVLLMError as error:
            raise StoreUnreachable(f"bucket {self._bucket} does not take a large result: {error}") from error

    def _put(self, client: Any, name: str, body: bytes, fmt: MessageFormat) -> StoredResult:
        key = "/".join(filter(None, (self._prefix, f"{name}.{fmt}")))
        digest, size = hashlib.sha256(body).hexdigest(), len(body)
        metadata, content_type = {"sha256": digest}, CONTENT_TYPES[fmt]
        if not put_if_absent(
            client, Bucket=self._bucket, Key=key, Body=body, ContentType=content_type, Metadata=metadata
        ):
            # Read, not asked with HeadObject: not every store keeps metadata, and the digest must be of what is there.
            there = client.get_object(Bucket=self._bucket, Key=key)["Body"].read()
            digest, size = hashlib.sha256(there).hexdigest(), len(there)
        return StoredResult(uri=f"s3://{self._bucket}/{key}", sha256=digest, size=size)
