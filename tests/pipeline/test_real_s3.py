"""What the fetch makes of a real S3 server's answers: versions, conditions, rights, names, large objects."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import threading
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import escape

import pytest
from bench import watched
from boto3.s3.transfer import TransferConfig
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from parts import S3Part, unique_name

from nanovllm.cli.sending import finder_of
from nanovllm.cli.sources import plan_submissions
from nanovllm.client.producer import _image_ref
from nanovllm.errors import (
    CredentialsRefused,
    InvalidInput,
    ObjectChanged,
    ObjectForbidden,
    ObjectNotFound,
    PermanentError,
    SystemicError,
)
from nanovllm.messages.job import ImageRef, Job
from nanovllm.metrics import Metrics
from nanovllm.objects.fetch import ObjectFetcher
from nanovllm.objects.listing import ListedObject
from nanovllm.objects.s3_client import make_client
from nanovllm.pipeline.stages.caches import ImageCache
from nanovllm.settings.s3 import S3Settings

pytestmark = pytest.mark.s3

NAME = "a b/50+ü &%日本.png"
MIB = 1 << 20


class Store:
    """A bucket on the real server, and the worker's own way of reading it."""

    def __init__(
        self, s3: S3Part, client: str = "boto3", *, versioned: bool = False, bucket: str | None = None
    ) -> None:
        self.s3 = s3
        self.bucket = bucket or s3.make_bucket(versioned=versioned)
        self.settings = S3Settings.model_validate(
            {
                "endpoint_url": s3.endpoint_url,
                "allow": [f"s3://{self.bucket}"],
                "addressing_style": "path",
                "client": client,
            }
        )
        self.metrics = Metrics()
        self.fetcher = ObjectFetcher(self.settings, max_bytes=32 * MIB)
        self.images = ImageCache(
            watched(self.fetcher),
            None,
            lambda *_: None,
            self.metrics,
            max_bytes=64 * MIB,
        )

    def put(self, body: bytes, key: str = "k") -> dict[str, Any]:
        answer: dict[str, Any] = self.s3.client.put_object(Bucket=self.bucket, Key=key, Body=body)
        return answer

    def ref(self, key: str = "k", **promises: Any) -> ImageRef:
        return ImageRef(uri=f"s3://{self.bucket}/{key}", **promises)

    async def read(self, ref: ImageRef) -> bytes:
        return (await self.images.fetch(ref, b"")).data

    @property
    def downloads(self) -> int:
        return int(self.metrics.fetched_objects._value.get())


async def test_a_version_is_read_after_the_object_was_replaced_and_the_newest_without_one(
    versity_s3: S3Part, object_client: str
) -> None:
    store = Store(versity_s3, object_client, versioned=True)
    old = store.put(b"old")["VersionId"]
    assert await store.read(store.ref()) == b"old"
    new = store.put(b"new")["VersionId"]
    assert await store.read(store.ref(version_id=old)) == b"old"
    newest = await store.images.fetch(store.ref(), b"")
    assert (newest.data, newest.version_id) == (b"new", new)
    store.s3.client.delete_object(Bucket=store.bucket, Key="k")
    with pytest.raises(ObjectNotFound):
        await store.read(store.ref())
    assert await store.read(store.ref(version_id=old)) == b"old"
    with pytest.raises(InvalidInput):
        await store.read(store.ref(version_id="no-such-version"))


async def test_an_entity_tag_that_the_job_names_is_a_condition_and_a_version(
    versity_s3: S3Part, object_client: str
) -> None:
    store = Store(versity_s3, object_client)
    tag = store.put(b"first")["ETag"]
    for written in (tag, tag.strip('"')):
        assert await store.read(store.ref(etag=written)) == b"first"
    store.put(b"second")
    assert await store.read(store.ref(etag=tag)) == b"first", "what is at hand under this tag needs no request"
    fresh = Store(versity_s3, object_client, bucket=store.bucket)
    with pytest.raises(ObjectChanged, match="412 PreconditionFailed: the object has another entity tag"):
        await fresh.read(fresh.ref(etag=tag))
    assert await fresh.read(fresh.ref()) == b"second"


async def test_a_wrong_secret_is_systemic_and_stands_in_no_error(
    versity_s3: S3Part, object_client: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(versity_s3, object_client)
    store.put(b"bytes")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    for key in ("k", "missing"):
        with pytest.raises(CredentialsRefused, match="403 SignatureDoesNotMatch") as caught:
            await store.read(store.ref(key))
        assert isinstance(caught.value, SystemicError)
        assert "not-the-secret" not in str(caught.value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", versity_s3.secret_key)
    assert await store.read(store.ref()) == b"bytes", "credentials are read anew after a refusal"


async def test_an_object_that_may_not_be_read_is_permanent_and_its_neighbour_is_read(
    versity_s3: S3Part, object_client: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(versity_s3, object_client)
    store.put(b"open", "open/k")
    store.put(b"closed", "closed/k")
    user = unique_name("worker")
    make_user(versity_s3, user, "worker-secret")
    statement = {
        "Effect": "Allow",
        "Principal": [user],
        "Action": "s3:GetObject",
        "Resource": f"arn:aws:s3:::{store.bucket}/open/*",
    }
    store.s3.client.put_bucket_policy(
        Bucket=store.bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    )
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", user)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "worker-secret")
    with pytest.raises(ObjectForbidden) as caught:
        await store.read(store.ref("closed/k"))
    assert isinstance(caught.value, PermanentError)
    assert "closed" not in str(caught.value)
    assert await store.read(store.ref("open/k")) == b"open"


async def test_a_name_with_spaces_signs_and_other_scripts_is_read_as_it_is_written(
    versity_s3: S3Part, object_client: str
) -> None:
    store = Store(versity_s3, object_client)
    store.put(b"right", NAME)
    store.put(b"wrong", quote(NAME))
    store.put(b"wrong", NAME.replace("+", " "))
    job = Job.model_validate({"prompt": "<|image|>", "images": [f"s3://{store.bucket}/{NAME}"]})
    again = Job.model_validate_json(job.model_dump_json(exclude_unset=True))
    for ref in (*job.images, *again.images):
        assert await store.read(ref) == b"right"


async def test_a_large_object_of_many_parts_is_read_whole_and_once(versity_s3: S3Part, object_client: str) -> None:
    store = Store(versity_s3, object_client)
    body = b"".join(hashlib.sha256(number.to_bytes(4, "big")).digest() for number in range(20 * MIB // 32))
    part = TransferConfig(multipart_threshold=5 * MIB, multipart_chunksize=5 * MIB)
    store.s3.client.upload_fileobj(io.BytesIO(body), store.bucket, "large", Config=part)
    tag = store.s3.client.head_object(Bucket=store.bucket, Key="large")["ETag"].strip('"')
    assert tag != hashlib.md5(body, usedforsecurity=False).hexdigest()
    digest = hashlib.sha256(body).hexdigest()
    for _ in range(3):
        assert await store.read(store.ref("large", sha256=digest)) == body
    assert store.downloads == 1
    assert await store.read(store.ref("large", etag=tag)) == body
    with pytest.raises(ObjectChanged, match="sha256"):
        await store.read(store.ref("large", sha256="0" * 64))


@pytest.mark.parametrize("versioned", [False, True])
async def test_who_comes_after_a_replacement_takes_no_bytes_of_a_download_under_way(
    versity_s3: S3Part, versioned: bool
) -> None:
    store = Store(versity_s3, versioned=versioned)
    store.put(b"old")
    answered, go_on = threading.Event(), threading.Event()

    def stand_still() -> None:
        if not answered.is_set():
            answered.set()
            go_on.wait(30)

    answered_then(store, stand_still)
    early = asyncio.create_task(store.read(store.ref()))
    await asyncio.to_thread(answered.wait, 30)
    store.put(b"new")
    late = asyncio.create_task(store.read(store.ref()))
    await asyncio.sleep(0.01)
    assert not late.done()
    go_on.set()
    assert (await early, await late) == (b"old", b"new")


@pytest.mark.parametrize("versioned", [False, True])
async def test_an_object_replaced_while_its_body_is_read_is_read_whole_as_it_was(
    versity_s3: S3Part, versioned: bool
) -> None:
    store = Store(versity_s3, versioned=versioned)
    first = store.put(b"a" * 20 * MIB)
    answered_then(store, lambda: store.put(b"b" * 20 * MIB) and None)
    image = await store.images.fetch(store.ref(), b"")
    assert (image.data, image.etag, image.version_id) == (b"a" * 20 * MIB, first["ETag"], first.get("VersionId"))


async def test_submit_names_an_object_as_it_was_typed(versity_s3: S3Part) -> None:
    store = Store(versity_s3)
    store.put(b"right", NAME)
    uri = f"s3://{store.bucket}/{NAME}"
    (submission,) = plan_submissions([uri], "p", {})
    assert await store.read(ImageRef(uri=await _image_ref(submission.images[0]))) == b"right"
    (found,) = plan_submissions([uri], "p", {}, find_objects=finder_of(store.settings))[0].images
    assert isinstance(found, ListedObject)
    assert await store.read(ImageRef(uri=found.uri, etag=found.etag)) == b"right"
    with pytest.raises(InvalidInput, match="no such object"):
        plan_submissions([f"{uri}x"], "p", {}, find_objects=finder_of(store.settings))


async def test_a_store_that_ignores_the_condition_gives_no_other_object(versity_s3: S3Part) -> None:
    store = Store(versity_s3)
    tag = store.put(b"first")["ETag"]
    store.put(b"second")
    answered_then(store, lambda: None, without="IfMatch")
    with pytest.raises(ObjectChanged):
        await store.read(store.ref(etag=tag))


@pytest.mark.parametrize("tag", ["*", '"', '""'])
async def test_a_tag_that_every_object_has_names_no_version(versity_s3: S3Part, object_client: str, tag: str) -> None:
    store = Store(versity_s3, object_client)
    store.put(b"first")
    with pytest.raises((ValueError, ObjectChanged)):
        await store.read(store.ref(etag=tag))


@pytest.mark.parametrize(
    ("key", "promises"), [("k", {"etag": "a\nb"}), ("a\0b", {})], ids=["a line break in the tag", "a null in the key"]
)
async def test_what_no_store_can_be_asked_for_is_the_jobs_mistake(
    versity_s3: S3Part, object_client: str, key: str, promises: dict[str, str]
) -> None:
    store = Store(versity_s3, object_client)
    store.put(b"bytes")
    with pytest.raises(ValueError):
        await store.read(store.ref(key, **promises))


async def test_equal_bytes_written_again_are_not_called_by_the_older_version(
    versity_s3: S3Part, object_client: str
) -> None:
    store = Store(versity_s3, object_client, versioned=True)
    store.put(b"same")
    await store.read(store.ref())
    newest = store.put(b"same")["VersionId"]
    assert (await store.images.fetch(store.ref(), b"")).version_id in (newest, None)


def answered_then(store: Store, then: Callable[[], None], *, without: str = "") -> None:
    """``then`` runs after each answer's head and before its body is read; the condition ``without`` is not sent."""

    class Client:
        def __init__(self, settings: S3Settings) -> None:
            self._client = make_client(settings)

        def get_object(self, **request: Any) -> Any:
            request.pop(without, None)
            answer = self._client.get_object(**request)
            then()
            return answer

        def close(self) -> None:
            self._client.close()

    store.fetcher = ObjectFetcher(store.settings, max_bytes=32 * MIB, client_factory=Client)
    store.images._fetcher = watched(store.fetcher)


def make_user(s3: S3Part, access: str, secret: str) -> None:
    """A user of the server with no rights of its own."""
    fields = {"Access": access, "Secret": secret, "Role": "user"}
    body = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in fields.items())
    url = f"{s3.endpoint_url}/create-user"
    request = AWSRequest("PATCH", url, data=f"<Account>{body}</Account>".encode())
    S3SigV4Auth(Credentials(s3.access_key, s3.secret_key), "s3", s3.region).add_auth(request)
    prepared = urllib.request.Request(url, request.data, dict(request.headers), method="PATCH")
    with urllib.request.urlopen(prepared, timeout=10) as answer:
        assert answer.status in (200, 201)
