"""Upload of images that are too large for a Kafka message, under the digest of their bytes."""

from __future__ import annotations

import asyncio
import hashlib
from functools import partial

from nanovllm.errors import ConfigurationError, InvalidInput, NanoVLLMError, ObjectNotFound, SystemicError
from nanovllm.messages.job import ImageRef
from nanovllm.messages.s3_uri import split_prefix_uri
from nanovllm.objects.s3_client import S3Client, check_settings, make_client
from nanovllm.settings.s3 import S3Settings


class ImageUploader:
    """Puts images below ``target`` (``s3://bucket/prefix``); equal bytes get one key, however often they are sent.

    Raises:
        ConfigurationError: ``target`` is not of that form, or the AWS SDK's settings make no client.
    """

    def __init__(self, target: str, s3: S3Settings) -> None:
        parts = split_prefix_uri(target)
        if parts is None:
            raise ConfigurationError("the target of uploads must have the form s3://bucket or s3://bucket/prefix")
        self._bucket, self._prefix = parts[0], parts[1].strip("/")
        check_settings(s3)
        self._client = S3Client(s3, partial(make_client, max_attempts=s3.max_attempts))

    async def upload(self, data: bytes) -> ImageRef:
        """Put ``data`` and return how a job names it.

        Raises:
            InvalidInput: there is no such bucket.
            SystemicError: the object store cannot be reached, or refuses.
        """
        digest = hashlib.sha256(data).hexdigest()
        key = f"{self._prefix}/{digest}" if self._prefix else digest
        put = partial(self._client.call, lambda client: client.put_object(Bucket=self._bucket, Key=key, Body=data))
        try:
            await asyncio.to_thread(put)
        except ObjectNotFound:
            raise InvalidInput(f"there is no bucket {self._bucket}: make it, or upload to another") from None
        except NanoVLLMError as error:
            raise SystemicError(f"the image could not be uploaded to bucket {self._bucket}: {error}") from error
        return ImageRef(uri=f"s3://{self._bucket}/{key}", sha256=digest)
