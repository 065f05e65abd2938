"""boto3 and obstore read the same and fail the same, on moto and on a real S3 server."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from parts import S3Part

from nanovllm.errors import (
    ConfigurationError,
    FetchFailed,
    ImageTooLarge,
    InvalidInput,
    ObjectChanged,
    ObjectNotFound,
    StoreUnreachable,
)
from nanovllm.messages.job import ImageRef
from nanovllm.objects.fetch import ObjectFetcher
from nanovllm.objects.reader import FetchedImage, SizeLimit
from nanovllm.settings.s3 import S3Settings

MIB = 1 << 20
KEYS = [
    "a b/50+ü &%日本.png",
    "a//b",
    "a/",
    "tab\there",
    "per%20cent%2F",
    "~tilde'quote\"",
    "back\\slash{brace}^`|<>[]",
    "query?x=1#fragment",
    "plus+plus=&;:@,$!*()",
    "e\u0301 decomposed",
    "x" * 1_024,
]
NO_FILE_NAMES = ("a//b", "a/", "x" * 1_024)


class Clients:
    """A bucket, and a fetcher of it by one client."""

    def __init__(self, s3: S3Part, client: str, *, versioned: bool = False, **settings: Any) -> None:
        self.s3 = s3
        self.client = client
        self.bucket = s3.make_bucket(versioned=versioned)
        self.fetcher = fetcher_of(s3.endpoint_url, client, f"s3://{self.bucket}", **settings)

    def put(self, body: bytes, key: str = "k", **more: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self.s3.client.put_object(Bucket=self.bucket, Key=key, Body=body, **more)
        return answer

    def ref(self, key: str = "k", **promises: Any) -> ImageRef:
        return ImageRef(uri=f"s3://{self.bucket}/{key}", **promises)

    async def read(self, key: str = "k", held: FetchedImage | None = None, **promises: Any) -> FetchedImage:
        return await self.fetcher.fetch(self.ref(key, **promises), held=held)


def fetcher_of(endpoint_url: str, client: str, *allow: str, max_bytes: int = 32 * MIB, **more: Any) -> ObjectFetcher:
    settings = {"endpoint_url": endpoint_url, "addressing_style": "path", "allow": allow, "client": client, **more}
    return ObjectFetcher(S3Settings.model_validate(settings), max_bytes=max_bytes)


@pytest.fixture(params=["moto", pytest.param("real", marks=pytest.mark.s3)])
def server(request: pytest.FixtureRequest) -> S3Part:
    part: S3Part = request.getfixturevalue("versity_s3" if request.param == "real" else "s3")
    return part


@pytest.fixture
def is_real(request: pytest.FixtureRequest, server: S3Part) -> bool:
    """Whether the test runs on the real server, and not on moto."""
    return bool(request.node.callspec.params["server"] == "real")


@pytest.fixture
def clients(server: S3Part, object_client: str) -> Iterator[Callable[..., Clients]]:
    made: list[Clients] = []

    def make(**settings: Any) -> Clients:
        made.append(Clients(server, object_client, **settings))
        return made[-1]

    yield make
    for one in made:
        one.fetcher.close()


async def test_bytes_digest_tag_and_metadata_of_an_object(clients: Callable[..., Clients]) -> None:
    store = clients()
    tag = store.put(b"bytes", Metadata={"made-by": "scanner", "sort": "x"}, ContentType="image/png")["ETag"]
    image = await store.read()
    assert (image.data, image.sha256) == (b"bytes", hashlib.sha256(b"bytes").hexdigest())
    assert (image.uri, image.etag, image.version_id) == (f"s3://{store.bucket}/k", tag, None)
    assert {name.lower(): value for name, value in image.metadata.items()} == {"made-by": "scanner", "sort": "x"}


async def test_an_empty_object_is_empty(clients: Callable[..., Clients]) -> None:
    store = clients()
    store.put(b"")
    assert (await store.read()).data == b""


async def test_keys_are_taken_literally(clients: Callable[..., Clients], is_real: bool) -> None:
    store = clients()
    # The real server keeps objects as files, whose names some are not.
    keys = [key for key in KEYS if not (is_real and key in NO_FILE_NAMES)]
    for key in keys:
        store.put(key.encode(), key)
    for key in keys:
        assert (await store.read(key)).data == key.encode()


async def test_a_missing_key_and_a_missing_bucket_are_not_found(clients: Callable[..., Clients]) -> None:
    store = clients(allow=["s3://no-such-bucket-here"])
    fetcher = fetcher_of(store.s3.endpoint_url, store.client, f"s3://{store.bucket}", "s3://no-such-bucket-here")
    with pytest.raises(ObjectNotFound, match="404 NoSuchKey"):
        await fetcher.fetch(store.ref("missing"))
    with pytest.raises(ObjectNotFound, match="404 NoSuchBucket"):
        await fetcher.fetch(ImageRef(uri="s3://no-such-bucket-here/k"))
    fetcher.close()


async def test_an_object_above_the_limit_is_refused_and_one_at_the_limit_is_read(
    clients: Callable[..., Clients],
) -> None:
    store = clients(max_bytes=10)
    store.put(b"x" * 11)
    with pytest.raises(ImageTooLarge, match="11 bytes or more, above the limit of 10"):
        await store.read()
    store.put(b"x" * 10)
    assert len((await store.read()).data) == 10


async def test_a_condition_is_met_or_the_object_has_changed(clients: Callable[..., Clients]) -> None:
    store = clients()
    tag = store.put(b"first")["ETag"]
    assert (await store.read(etag=tag)).data == b"first"
    store.put(b"second")
    with pytest.raises(ObjectChanged, match="412 PreconditionFailed"):
        await store.read(etag=tag)
    with pytest.raises(ObjectChanged, match="sha256"):
        await store.read(sha256=hashlib.sha256(b"first").hexdigest())


async def test_bytes_at_hand_are_given_back_while_the_store_says_that_they_are_its(
    clients: Callable[..., Clients],
) -> None:
    store = clients()
    store.put(b"first")
    held = await store.read()
    assert (await store.read(held=held)) is held
    store.put(b"second")
    assert (await store.read(held=held)).data == b"second"


async def test_each_version_is_read_by_its_name(clients: Callable[..., Clients]) -> None:
    store = clients(versioned=True)
    first, second = (store.put(body)["VersionId"] for body in (b"first", b"second"))
    old, new = await store.read(version_id=first), await store.read()
    assert (old.data, old.version_id, new.data, new.version_id) == (b"first", first, b"second", second)
    head = await store.fetcher.head(store.ref(version_id=first))
    assert (head.version_id, head.size) == (first, 5)
    store.s3.client.delete_object(Bucket=store.bucket, Key="k")
    with pytest.raises(ObjectNotFound):
        await store.read()


async def test_a_head_says_type_size_time_and_tag(clients: Callable[..., Clients]) -> None:
    store = clients()
    tag = store.put(b"bytes", ContentType="image/png")["ETag"]
    head = await store.fetcher.head(store.ref())
    assert (head.content_type, head.size, head.etag) == ("image/png", 5, tag.strip('"'))
    assert head.last_modified is not None
    assert head.last_modified.tzinfo is not None
    with pytest.raises(ObjectNotFound):
        await store.fetcher.head(store.ref("missing"))


async def test_an_object_replaced_between_its_head_and_its_body_is_read_as_it_was_or_again(
    clients: Callable[..., Clients],
) -> None:
    store = clients()
    tag = store.put(b"a" * 8 * MIB)["ETag"]

    class Replacing(SizeLimit):
        def check(self, nbytes: int, what: str = "the object") -> None:
            if not replaced.is_set():
                replaced.set()
                store.put(b"b" * 8 * MIB)

    replaced = threading.Event()
    reader = store.fetcher._readers["s3"]
    try:
        image = await reader.read(store.ref(), None, Replacing(32 * MIB, ImageTooLarge))
    except FetchFailed:
        return
    assert (image.data == b"a" * 8 * MIB, image.etag) == (True, tag)


async def test_many_objects_at_once_are_each_its_own(clients: Callable[..., Clients]) -> None:
    store = clients(max_connections=4)
    for number in range(12):
        store.put(b"%d" % number, f"k{number}")
    images = await asyncio.gather(*(store.read(f"k{number}") for number in range(12)))
    assert [image.data for image in images] == [b"%d" % number for number in range(12)]


@contextmanager
def speaking(speak: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that does with each connection, once it has a request, what ``speak`` does."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(65_536)
            speak(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def throttle(connection: socket.socket) -> None:
    body = b"<Error><Code>SlowDown</Code></Error>"
    connection.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    connection.recv(65_536)


def say_nothing(connection: socket.socket) -> None:
    connection.recv(65_536)


def break_off(connection: socket.socket) -> None:
    connection.sendall(b'HTTP/1.1 200 OK\r\nETag: "e"\r\nContent-Length: 1000\r\n\r\nhalf')
    reset(connection)


def fall_silent(connection: socket.socket) -> None:
    connection.sendall(b'HTTP/1.1 200 OK\r\nETag: "e"\r\nContent-Length: 1000\r\n\r\nhalf')
    connection.recv(65_536)


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("speak", [throttle, say_nothing, break_off, fall_silent, reset])
async def test_what_breaks_off_is_worth_another_attempt(
    object_client: str, speak: Callable[[socket.socket], None]
) -> None:
    with speaking(speak) as url:
        fetcher = fetcher_of(url, object_client, "s3://bucket", read_timeout_s=0.3, connect_timeout_s=0.3)
        with pytest.raises(FetchFailed) as caught:
            await fetcher.fetch(ImageRef(uri="s3://bucket/k"))
        assert url not in str(caught.value)
        fetcher.close()


@pytest.mark.usefixtures("s3")
async def test_a_store_that_takes_no_connection_is_unreachable(object_client: str) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        # The kernel answers no further connection while these wait to be accepted.
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        fetcher = fetcher_of(f"http://127.0.0.1:{port}", object_client, "s3://bucket", connect_timeout_s=0.3)
        with pytest.raises(StoreUnreachable):
            await fetcher.fetch(ImageRef(uri="s3://bucket/k"))
        fetcher.close()
        for one in waiting:
            one.close()


@pytest.mark.usefixtures("s3")
async def test_metadata_that_is_no_ascii_is_read_by_either(object_client: str) -> None:
    answer = b'HTTP/1.1 200 OK\r\nETag: "e"\r\nx-amz-meta-name: caf\xe9\r\nContent-Length: 5\r\n\r\nbytes'
    with speaking(lambda connection: connection.sendall(answer)) as url:
        fetcher = fetcher_of(url, object_client, "s3://bucket")
        assert (await fetcher.fetch(ImageRef(uri="s3://bucket/k"))).data == b"bytes"
        fetcher.close()


@pytest.mark.usefixtures("s3")
async def test_a_text_in_a_key_says_nothing_of_the_stores_answer(object_client: str) -> None:
    body = b"<html>gone</html>"
    answer = b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with speaking(lambda connection: connection.sendall(answer)) as url:
        fetcher = fetcher_of(url, object_client, "s3://bucket")
        with pytest.raises(ObjectNotFound):
            await fetcher.fetch(ImageRef(uri="s3://bucket/status: 503 kind: Connect TokenRequest { credential"))
        fetcher.close()


def test_obstore_that_is_not_installed_is_said_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nanovllm.objects.obstore_stores", None)
    for settings in (S3Settings(client="obstore"), S3Settings(allow=("gs://bucket",))):
        with pytest.raises(ConfigurationError, match=r"pip install 'nanovllm\[obstore\]'"):
            ObjectFetcher(settings, max_bytes=10)


@pytest.mark.usefixtures("s3")
async def test_a_bucket_that_no_store_can_have_is_the_jobs_mistake(object_client: str) -> None:
    fetcher = fetcher_of("http://127.0.0.1:1", object_client, "s3://a_bucket..of.none")
    with pytest.raises((InvalidInput, StoreUnreachable)):
        await fetcher.fetch(ImageRef(uri="s3://a_bucket..of.none/k"))
    fetcher.close()
