"""Upload of images that are too large for a Kafka message, under the digest of their bytes."""

from __future__ import annotations

import asyncio
import hashlib
from functools import partial
from pathlib import PurePosixPath

from nanovllm.errors import ConfigurationError, InvalidInput, NanoVLLMError, ObjectNotFound, SystemicError
from nanovllm.messages.job import ImageRef
from nanovllm.messages.s3_uri import split_prefix_uri
from nanovllm.objects.s3_client import S3Client, check_settings, make_client
from nanovllm.settings.s3 import S3Settings

IMAGE_HEAD_BYTES = 12
# First bytes, suffix and media type.
_TYPES = (
    (b"\x89PNG", ".png", "image/png"),
    (b"\xff\xd8\xff", ".jpg", "image/jpeg"),
    (b"GIF8", ".gif", "image/gif"),
    (b"BM", ".bmp", "image/bmp"),
    (b"II*\0", ".tiff", "image/tiff"),
    (b"MM\0*", ".tiff", "image/tiff"),
    (b"\0\0\0\x0cjP", ".jp2", "image/jp2"),
    (b"\xff\x4f\xff\x51", ".j2k", "image/jp2"),
)


def image_type(head: bytes) -> tuple[str, str] | None:
    """Suffix and media type of an image by its first ``IMAGE_HEAD_BYTES`` bytes; None for what is no image."""
    if (head[:4], head[8:12]) == (b"RIFF", b"WEBP"):
        return ".webp", "image/webp"
    if head[4:8] == b"ftyp":
        return (".avif", "image/avif") if head[8:11] == b"avi" else (".heic", "image/heic")
    return next(((suffix, media) for first, suffix, media in _TYPES if head.startswith(first)), None)


class ImageUploader:
    """Puts images below ``target`` (``s3://bucket/prefix``); equal bytes get one key, however often they are sent.

    The key ends in the suffix of the image's type, so that a prefix with uploads can be submitted as any other.

    Raises:
        ConfigurationError: ``target`` is not of that form, or the AWS SDK's settings make no client.
    """

    def __init__(self, target: str, s3: S3Settings) -> None:
        parts = split_prefix_uri(target)
        if parts is None:
            raise ConfigurationError("the target of uploads must have the form s3://bucket or s3://bucket/prefix")
        self._bucket, self._prefix = parts[0], parts[1].strip("/")
        self.example = f"s3://{self._bucket}/{self._key('image.png')}"
        """A URI as its objects have."""
        check_settings(s3)
        self._client = S3Client(s3, partial(make_client, max_attempts=s3.max_attempts))

    async def upload(self, data: bytes, name: str | None = None) -> ImageRef:
        """Put ``data`` and return how a job names it. ``name``: the file's, for the suffix of an unknown type.

        Raises:
            InvalidInput: there is no such bucket.
            SystemicError: the object store cannot be reached, or refuses.
        """
        digest = hashlib.sha256(data).hexdigest()
        unknown = PurePosixPath(name or "").suffix.lower(), "application/octet-stream"
        suffix, media = image_type(data[:IMAGE_HEAD_BYTES]) or unknown
        key = self._key(digest + suffix)
        about = {"Bucket": self._bucket, "Key": key, "ContentType": media}
        put = partial(self._client.call, lambda client: client.put_object(**about, Body=data))
        try:
            await asyncio.to_thread(put)
        except ObjectNotFound:
            raise InvalidInput(f"there is no bucket {self._bucket}: make it, or upload to another") from None
        except NanoVLLMError as error:
            raise SystemicError(f"the image could not be uploaded to bucket {self._bucket}: {error}") from error
        return ImageRef(uri=f"s3://{self._bucket}/{key}", sha256=digest)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name
