"""Local images that are too large for a Kafka message: put into S3 under the digest of their bytes."""

from __future__ import annotations

import asyncio
import hashlib
import re
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from nanovllm.errors import ConfigurationError, SystemicError
from nanovllm.pipeline.job import ImageRef
from nanovllm.pipeline.settings import S3Settings

_TARGET = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9.\-_]{1,62})(?:/(.*))?", re.DOTALL)


class ImageUploader:
    """Puts images below ``target`` (``s3://bucket/prefix``); equal bytes get one key, however often they are sent.

    Raises:
        ConfigurationError: ``target`` is not of that form.
    """

    def __init__(self, target: str, s3: S3Settings) -> None:
        match = _TARGET.fullmatch(target)
        if match is None:
            raise ConfigurationError("the place for uploads must have the form s3://bucket or s3://bucket/prefix")
        self._bucket, self._prefix = match[1], (match[2] or "").strip("/")
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=s3.endpoint_url,
            region_name=s3.region,
            config=Config(
                signature_version="s3v4",
                connect_timeout=s3.connect_timeout_s,
                read_timeout=s3.read_timeout_s,
                retries={"max_attempts": s3.max_attempts, "mode": "standard"},
                s3={"addressing_style": s3.addressing_style},
            ),
        )

    async def upload(self, data: bytes) -> ImageRef:
        """Put ``data`` and return how a job names it.

        Raises:
            SystemicError: the object store cannot be reached, or refuses.
        """
        digest = hashlib.sha256(data).hexdigest()
        key = f"{self._prefix}/{digest}" if self._prefix else digest
        try:
            await asyncio.to_thread(self._client.put_object, Bucket=self._bucket, Key=key, Body=data)
        except (BotoCoreError, ClientError) as error:
            reason = error.response["Error"].get("Code") if isinstance(error, ClientError) else type(error).__name__
            raise SystemicError(f"the image could not be uploaded to bucket {self._bucket} ({reason})") from error
        return ImageRef(uri=f"s3://{self._bucket}/{key}", sha256=digest)
