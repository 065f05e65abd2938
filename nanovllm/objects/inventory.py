"""S3 Inventory: the objects of a bucket from the lists that S3 publishes daily or weekly (CSV, gzip)."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import IO, Any
from urllib.parse import unquote_plus

from nanovllm.errors import InvalidInput, PermanentError
from nanovllm.messages.s3_uri import split_object_uri
from nanovllm.objects.listing import ListedObject, ObjectPattern
from nanovllm.objects.s3_client import S3Client

MAX_MANIFEST_BYTES = 64 * 1024 * 1024
CHECKSUM_NAME = "manifest.checksum"
CHUNK_BYTES = 1024 * 1024
_MD5_LENGTH = 32


@dataclass(frozen=True)
class InventoryFile:
    """One list of a manifest."""

    key: str
    md5: str


@dataclass(frozen=True)
class Inventory:
    """A manifest: which bucket it tells of, the columns of its lists, and the lists."""

    bucket: str
    source_bucket: str
    columns: tuple[str, ...]
    files: tuple[InventoryFile, ...]


def read_manifest(client: S3Client, uri: str) -> Inventory:
    """The manifest at ``uri`` (``…/manifest.json``), compared with ``manifest.checksum`` beside it.

    Raises:
        InvalidInput: it is not there, is no manifest of CSV lists, or has another MD5 than its checksum says.
        SystemicError, TransientError: the object store cannot be reached, or refuses the credentials.
    """
    parts = split_object_uri(uri)
    if parts is None or not parts[1].endswith(".json"):
        raise InvalidInput(f"{uri} is no manifest of S3 Inventory: give the URI of its manifest.json")
    bucket, key = parts
    folder = key.rpartition("/")[0]
    data = _small_object(client, bucket, key)
    checksum = _small_object(client, bucket, f"{folder}/{CHECKSUM_NAME}" if folder else CHECKSUM_NAME)
    _check_md5(uri, _md5(data), checksum.decode("ascii", "replace").strip())
    try:
        return _parsed(bucket, json.loads(data))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{uri} is no manifest of S3 Inventory: {type(error).__name__}") from None


def list_inventory(client: S3Client, inventory: Inventory, pattern: ObjectPattern) -> Iterator[ListedObject]:
    """The objects of ``pattern`` in the lists, current versions only, one list on disk at a time.

    A list is published hours after it was begun, and may lack the entity tag (then ""): the objects themselves say
    what holds now.

    Raises:
        InvalidInput: the inventory is of another bucket, or a list is missing, broken, or not what the manifest says.
        SystemicError, TransientError: as ``read_manifest``.
    """
    if inventory.source_bucket != pattern.bucket:
        raise InvalidInput(f"the inventory is of bucket {inventory.source_bucket}, not of {pattern.bucket}")
    for file in inventory.files:
        uri = f"s3://{inventory.bucket}/{file.key}"
        with tempfile.TemporaryFile() as copy:
            _download(client, inventory.bucket, file, copy)
            try:
                yield from _rows(copy, inventory, pattern)
            except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError, KeyError) as error:
                raise InvalidInput(f"{uri} is no list of the manifest's columns: {type(error).__name__}") from None


def _rows(copy: IO[bytes], inventory: Inventory, pattern: ObjectPattern) -> Iterator[ListedObject]:
    with gzip.open(copy, "rt", encoding="utf-8", newline="") as text:
        for values in csv.reader(text):
            row = dict(zip(inventory.columns, values, strict=False))
            if row.get("IsLatest") == "false" or row.get("IsDeleteMarker") == "true":
                continue
            # Keys are form-encoded in CSV lists.
            key = unquote_plus(row["Key"], errors="strict")
            if row["Bucket"] == pattern.bucket and key.startswith(pattern.prefix) and pattern.matches(key):
                size = row.get("Size") or ""
                etag = (row.get("ETag") or "").strip('"')
                yield ListedObject(f"s3://{pattern.bucket}/{key}", etag, int(size) if size.isdecimal() else 0)


def _parsed(bucket: str, manifest: Mapping[str, Any]) -> Inventory:
    if (form := manifest["fileFormat"]) != "CSV":
        raise InvalidInput(f"the inventory's lists are {form}: configure one with CSV lists")
    columns = tuple(name.strip() for name in manifest["fileSchema"].split(","))
    if missing := {"Bucket", "Key"} - set(columns):
        raise InvalidInput(f"the inventory has no column {min(missing)}")
    # Its lists lie in the manifest's own bucket, also where both were copied to another one.
    files = tuple(InventoryFile(str(one["key"]), str(one["MD5checksum"])) for one in manifest["files"])
    return Inventory(bucket, str(manifest["sourceBucket"]), columns, files)


def _small_object(client: S3Client, bucket: str, key: str) -> bytes:
    def read(s3: Any) -> bytes:
        answer = s3.get_object(Bucket=bucket, Key=key)
        with closing(answer["Body"]) as body:
            if answer["ContentLength"] > MAX_MANIFEST_BYTES:
                raise InvalidInput(f"s3://{bucket}/{key} has more than {MAX_MANIFEST_BYTES} bytes: it is no manifest")
            return bytes(body.read())

    return _read(client, f"s3://{bucket}/{key}", read)


def _download(client: S3Client, bucket: str, file: InventoryFile, copy: IO[bytes]) -> None:
    def read(s3: Any) -> bytes:
        digest = hashlib.md5(usedforsecurity=False)
        copy.seek(0)
        copy.truncate()
        with closing(s3.get_object(Bucket=bucket, Key=file.key)["Body"]) as body:
            while chunk := body.read(CHUNK_BYTES):
                digest.update(chunk)
                copy.write(chunk)
        copy.seek(0)
        return digest.hexdigest().encode()

    uri = f"s3://{bucket}/{file.key}"
    _check_md5(uri, _read(client, uri, read).decode(), file.md5)


def _read(client: S3Client, uri: str, read: Any) -> bytes:
    try:
        data: bytes = client.call(read)
    except PermanentError as error:
        raise InvalidInput(f"{uri}, a part of the inventory, cannot be read: {error}") from error
    return data


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _check_md5(uri: str, has: str, said: str) -> None:
    if len(said) != _MD5_LENGTH or has != said.lower():
        raise InvalidInput(f"{uri} has MD5 {has}, not {said[:64]!r} as the inventory says: it is incomplete or changed")
