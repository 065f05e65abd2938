"""The object fetcher: images and documents to bytes, with an allow-list, size limits and conditional requests."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import threading
from collections.abc import Callable, Sequence
from copy import copy
from types import ModuleType
from typing import Any, Self

from nanovllm.errors import (
    ConfigurationError,
    DocumentTooLarge,
    ForbiddenKey,
    ForbiddenUri,
    ImageTooLarge,
    ObjectChanged,
)
from nanovllm.messages.job import ImageRef
from nanovllm.messages.s3_uri import ObjectAddress, split_prefix
from nanovllm.objects.boto3_reader import Boto3Reader
from nanovllm.objects.http_images import HttpImages
from nanovllm.objects.reader import FetchedImage, ObjectHead, ObjectReader, SizeLimit, connection_within
from nanovllm.objects.s3_client import check_settings
from nanovllm.settings.http_images import HttpImageSettings
from nanovllm.settings.s3 import S3Settings


class AllowList:
    """Buckets and prefixes that jobs may read, from ``s3://bucket`` and ``s3://bucket/prefix`` entries; none: nothing.

    A prefix ends at a path boundary: ``s3://bucket/in`` allows ``in`` and ``in/…``, never ``internal/…``;
    ``s3://bucket/in/*`` is the same.
    """

    def __init__(self, uris: Sequence[str] = ()) -> None:
        # S3Settings refuses entries of another form.
        self._entries = list(filter(None, map(split_prefix, uris)))

    def __bool__(self) -> bool:
        return bool(self._entries)

    def check(self, address: ObjectAddress) -> None:
        """Return when a job may read the object.

        Raises:
            ForbiddenUri: it may not.
        """
        key = address.key
        # HTTP clients resolve dot segments: s3://bucket/in/../secret would be asked for as s3://bucket/secret.
        if any(segment in (".", "..") for segment in key.split("/")):
            raise ForbiddenKey("the key of an image has a '.' or '..' segment")
        for allowed in self._entries:
            prefix = allowed.key
            if address.store == allowed.store and (not prefix or key == prefix or key.startswith(prefix + "/")):
                return
        raise ForbiddenUri(f"s3.allow of this worker does not list {address.store}, or not with this prefix of the key")


def readers_of(
    settings: S3Settings, client_factory: Callable[[S3Settings], Any] | None = None
) -> dict[str, ObjectReader]:
    """The reader of each scheme that ``settings`` name.

    Raises:
        ConfigurationError: one of them takes obstore, which is not installed.
    """
    boto3 = Boto3Reader(settings, client_factory)
    readers: dict[str, ObjectReader] = {"s3": boto3}
    if settings.obstore_schemes:
        readers |= _obstore_stores(settings).obstore_readers(settings, boto3)
    return readers


def check_stores(settings: S3Settings) -> None:
    """Find out what can be known of the stores of ``settings`` without a request and without credentials of S3.

    Raises:
        ConfigurationError: the SDK can make no client for one of them, or obstore is not installed.
    """
    check_settings(settings)
    if settings.obstore_schemes - {"s3"}:
        _obstore_stores(settings).check_stores(settings)


def _obstore_stores(settings: S3Settings) -> ModuleType:
    try:
        return importlib.import_module("nanovllm.objects.obstore_stores")
    except ImportError as error:
        named = ", ".join(f"{scheme}://" for scheme in sorted(settings.obstore_schemes))
        raise ConfigurationError(
            f"{named} of s3.client or s3.allow takes obstore, which cannot be imported ({error}): pip install "
            "'nanovllm[obstore]'"
        ) from error


class ObjectFetcher:
    """Reads images by the reader of their URI's scheme, at most ``max_connections`` at a time, one attempt a call.

    Those over HTTP have limits and connections of their own.

    Raises:
        ConfigurationError: as `HttpImages` and `readers_of`.
    """

    def __init__(
        self,
        settings: S3Settings,
        *,
        max_bytes: int,
        http: HttpImageSettings | None = None,
        client_factory: Callable[[S3Settings], Any] | None = None,
    ) -> None:
        self._allow = AllowList(settings.allow)
        self._limit = SizeLimit(max_bytes, ImageTooLarge)
        self._http = HttpImages(http or HttpImageSettings(), self._limit)
        self._readers = readers_of(settings, client_factory)
        self._connections = asyncio.Semaphore(settings.max_connections)
        self._timeout_s = settings.object_timeout_s

    def for_documents(self, max_bytes: int, buckets: Sequence[str]) -> Self:
        """A fetcher of documents with the clients and the connections of this one.

        It reads what ``s3.allow`` names, or where that is unset the ``buckets`` of the routes.
        """
        documents = copy(self)
        documents._limit = SizeLimit(max_bytes, DocumentTooLarge)
        if not self._allow:
            documents._allow = AllowList([f"s3://{bucket}" for bucket in buckets])
        return documents

    def check(self, ref: ImageRef) -> None:
        """Refuse before anything is read what a job may not read.

        Raises:
            ForbiddenUri: its bucket, prefix or key is not allowed, or its host.
            ImageTooLarge: its bytes, given in the job itself, are too many.
        """
        if ref.data is not None:
            self._limit.check(len(ref.data), "an image in the job")
        elif ref.is_http:
            self._http.check(ref)
        else:
            self._allow.check(ref.address)

    async def fetch(self, ref: ImageRef, *, held: FetchedImage | None = None) -> FetchedImage:
        """The bytes of one image; those of ``held``, read from the same object before, where they are still its bytes.

        Raises:
            ForbiddenUri, ImageTooLarge, InvalidInput, ObjectNotFound, ObjectForbidden, ObjectArchived, ObjectChanged,
            UrlRefused: for good.
            FetchFailed, ObjectUnavailable, ObjectRefused: worth another attempt.
            CredentialsRefused, StoreUnreachable: nothing can be read until the configuration or the store is repaired.
        """
        self.check(ref)
        if ref.data is not None:
            return self.checked(ref, FetchedImage(ref.data, hashlib.sha256(ref.data).hexdigest()))
        if ref.is_http:
            return self.checked(ref, await self._http.fetch(ref, held=held))
        timed_out = f"the object was not read within {self._timeout_s:g} s"
        async with connection_within(self._connections, self._timeout_s, timed_out):
            return self.checked(ref, await self._reader(ref).read(ref, held, self._limit))

    async def head(self, ref: ImageRef) -> ObjectHead:
        """What the store says of an object now, whatever entity tag ``ref`` names. Raises as ``fetch``."""
        self.check(ref)
        timed_out = f"the store said nothing of the object within {self._timeout_s:g} s"
        async with connection_within(self._connections, self._timeout_s, timed_out):
            return await self._reader(ref).head(ref)

    def checked(self, ref: ImageRef, image: FetchedImage) -> FetchedImage:
        """``image``, if it is what the job has promised.

        Raises:
            ObjectChanged: it has another digest.
        """
        if ref.sha256 is not None and ref.sha256 != image.sha256:
            raise ObjectChanged(f"the image has sha256 {image.sha256}, the job promised {ref.sha256}")
        return image

    def begin_connecting(self) -> None:
        """Have a thread make the clients; a failure is told by the first use."""
        threading.Thread(target=self._prepare, name="nanovllm-objects", daemon=True).start()

    def close(self) -> None:
        """Close idle connections."""
        for reader in self._readers.values():
            reader.close()

    def _prepare(self) -> None:
        for reader in self._readers.values():
            reader.prepare()

    def _reader(self, ref: ImageRef) -> ObjectReader:
        return self._readers[ref.address.scheme]
