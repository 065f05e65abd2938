"""Inventories as S3 publishes them, for the tests."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Iterable
from urllib.parse import quote_plus

from parts import S3Part

SCHEMA = "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, ETag"


def put_inventory(
    store: S3Part, bucket: str, keys: Iterable[str], *, schema: str = SCHEMA, form: str = "CSV", spoil: str = ""
) -> str:
    """Publish an inventory of ``keys`` as S3 does; returns the manifest's URI."""
    target = store.make_bucket()
    folder = f"inventories/{bucket}/all/2026-01-01T00-00Z"
    files = []
    for number, half in enumerate((list(keys)[::2], list(keys)[1::2])):
        text = io.StringIO()
        writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
        for key in half:
            etag = hashlib.md5(key.encode()).hexdigest()
            values = {"Bucket": bucket, "Key": quote_plus(key, safe="/"), "Size": "3", "ETag": etag}
            values |= {"VersionId": "v", "IsLatest": "true", "IsDeleteMarker": "false"}
            old = {"IsLatest": "false", "Key": "in/older-version.pdf"}
            marker = {"IsDeleteMarker": "true", "Key": "in/deleted.pdf"}
            for row in (values, values | old, values | marker):
                writer.writerow([row[name] for name in schema.split(", ")])
        data = gzip.compress(text.getvalue().encode())
        md5 = hashlib.md5(data).hexdigest()
        key = f"inventories/{bucket}/all/data/{number}.csv.gz"
        store.put(target, key, data[:-9] if spoil == "list" else data)
        files.append({"key": key, "size": len(data), "MD5checksum": md5})
    manifest = {"sourceBucket": bucket, "destinationBucket": f"arn:aws:s3:::{target}", "version": "2016-11-30"}
    data = json.dumps(manifest | {"fileFormat": form, "fileSchema": schema, "files": files}).encode()
    if spoil != "checksum":
        md5 = hashlib.md5(data).hexdigest()
        store.put(target, f"{folder}/manifest.checksum", md5.encode() + b"\n")
    return store.put(target, f"{folder}/manifest.json", data + b" " * (spoil == "manifest"))
