"""Reading images from S3: what is allowed, how much, and what each failure means."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from bench import eventually
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from nanovllm.errors import (
    CredentialsRefused,
    FetchFailed,
    ForbiddenUri,
    ImageTooLarge,
    InvalidInput,
    NanoVLLMError,
    ObjectArchived,
    ObjectChanged,
    ObjectForbidden,
    ObjectNotFound,
    ObjectUnavailable,
    StoreUnreachable,
)
from nanovllm.messages.job import ImageRef
from nanovllm.messages.s3_uri import ObjectAddress
from nanovllm.objects import boto3_reader
from nanovllm.objects.boto3_reader import Boto3Reader
from nanovllm.objects.daemon_threads import DaemonThreads
from nanovllm.objects.errors import classify
from nanovllm.objects.fetch import AllowList, ObjectFetcher
from nanovllm.settings.s3 import S3Settings


def fetcher_for(endpoint_url: str, *allow: str, max_bytes: int = 1_000_000, **settings: Any) -> ObjectFetcher:
    return ObjectFetcher(
        S3Settings(endpoint_url=endpoint_url, addressing_style="path", allow=allow, **settings), max_bytes=max_bytes
    )


@pytest.mark.parametrize(
    ("entry", "key", "is_allowed"),
    [
        ("s3://in", "any/key.png", True),
        ("s3://in/", "any/key.png", True),
        ("s3://in/a", "a/key.png", True),
        ("s3://in/a/", "a/key.png", True),
        ("s3://in/a", "a", True),
        ("s3://in/*", "any/key.png", True),
        ("s3://in/a/*", "a/b/key.png", True),
        ("s3://in/a/**", "a/key.png", True),
        ("s3://in/a/**/*", "a/key.png", True),
        ("s3://in/a/*", "apart/key.png", False),
        ("s3://in/a", "apart/key.png", False),
        ("s3://in/a", "b/a/key.png", False),
        ("s3://other", "key.png", False),
        ("s3://in/a", "a/../secret.png", False),
        ("s3://in", "./key.png", False),
        ("s3://in/a", "a/x..y/key.png", True),
    ],
)
def test_a_prefix_ends_at_a_path_boundary(entry: str, key: str, is_allowed: bool) -> None:
    allow, address = AllowList([entry]), ObjectAddress("s3", "in", key)
    if is_allowed:
        allow.check(address)
    else:
        with pytest.raises(ForbiddenUri):
            allow.check(address)


def test_an_empty_allow_list_allows_nothing() -> None:
    with pytest.raises(ForbiddenUri):
        AllowList([]).check(ObjectAddress("s3", "in", "key.png"))


def test_a_forbidden_object_is_refused_before_anything_is_read() -> None:
    def never(_: S3Settings) -> Any:
        raise AssertionError("a client was made")

    fetcher = ObjectFetcher(S3Settings(allow=("s3://in",)), max_bytes=10, client_factory=never)
    with pytest.raises(ForbiddenUri):
        fetcher.check(ImageRef(uri="s3://elsewhere/key.png"))
    fetcher.close()


async def test_reads_an_object_with_its_digest(s3: Any, object_client: str) -> None:
    bucket = s3.make_bucket()
    uri = s3.put(bucket, "a key with ümlaut & %20.png", b"bytes")
    fetcher = fetcher_for(s3.endpoint_url, f"s3://{bucket}", client=object_client)
    image = await fetcher.fetch(ImageRef(uri=uri))
    assert (image.data, image.uri, image.version_id) == (b"bytes", uri, None)
    assert image.sha256 == hashlib.sha256(b"bytes").hexdigest()
    fetcher.close()


async def test_reads_the_version_that_the_job_names(s3: Any, object_client: str) -> None:
    bucket = s3.make_bucket(versioned=True)
    first = s3.client.put_object(Bucket=bucket, Key="k", Body=b"first")["VersionId"]
    second = s3.client.put_object(Bucket=bucket, Key="k", Body=b"second")["VersionId"]
    fetcher = fetcher_for(s3.endpoint_url, f"s3://{bucket}", client=object_client)
    old = await fetcher.fetch(ImageRef(uri=f"s3://{bucket}/k", version_id=first))
    new = await fetcher.fetch(ImageRef(uri=f"s3://{bucket}/k"))
    assert (old.data, old.version_id) == (b"first", first)
    assert (new.data, new.version_id) == (b"second", second)
    fetcher.close()


async def test_bytes_in_the_job_need_no_store() -> None:
    fetcher = ObjectFetcher(S3Settings(), max_bytes=4)
    assert (await fetcher.fetch(ImageRef(data=b"1234"))).data == b"1234"
    with pytest.raises(ImageTooLarge, match="5 bytes or more, above the limit of 4"):
        await fetcher.fetch(ImageRef(data=b"12345"))
    fetcher.close()


async def test_what_the_job_promised_must_be_there(s3: Any, object_client: str) -> None:
    bucket = s3.make_bucket()
    uri = s3.put(bucket, "k", b"other")
    fetcher = fetcher_for(s3.endpoint_url, f"s3://{bucket}", client=object_client)
    with pytest.raises(ObjectChanged):
        await fetcher.fetch(ImageRef(uri=uri, sha256=hashlib.sha256(b"promised").hexdigest()))
    with pytest.raises(ObjectNotFound):
        await fetcher.fetch(ImageRef(uri=f"s3://{bucket}/missing"))
    fetcher.close()


async def test_an_object_above_the_limit_is_not_read(s3: Any, object_client: str) -> None:
    bucket = s3.make_bucket()
    uri = s3.put(bucket, "k", b"x" * 11)
    fetcher = fetcher_for(s3.endpoint_url, f"s3://{bucket}", max_bytes=10, client=object_client)
    with pytest.raises(ImageTooLarge, match="11 bytes or more, above the limit of 10"):
        await fetcher.fetch(ImageRef(uri=uri))
    fetcher.close()


@contextmanager
def answering(response: bytes | Callable[[], bytes]) -> Iterator[str]:
    """A server that reads a request, says ``response`` and hangs up, again and again."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(response if isinstance(response, bytes) else response())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


def http(status: str, body: bytes = b"", length: int | None = None) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Length: {len(body) if length is None else length}\r\n"
        'ETag: "tag"\r\nConnection: close\r\n\r\n'
    )
    return head.encode() + body


def s3_error(status: str, code: str) -> bytes:
    return http(status, f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode())


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (http("200 OK", b"half", length=8), FetchFailed),
        (http("500 Internal Server Error"), FetchFailed),
        (s3_error("501 Not Implemented", "NotImplemented"), FetchFailed),
        (s3_error("400 Bad Request", "RequestTimeout"), FetchFailed),
        (s3_error("429 Too Many Requests", "TooManyRequests"), FetchFailed),
        (s3_error("409 Conflict", "OperationAborted"), FetchFailed),
        (s3_error("400 Bad Request", "ACodeOfTomorrow"), FetchFailed),
        (http("400 Bad Request", b"<html>not S3</html>"), FetchFailed),
        (http("421 Misdirected Request"), FetchFailed),
        (s3_error("503 Slow Down", "SlowDown"), FetchFailed),
        (b"", FetchFailed),
        (s3_error("403 Forbidden", "AccessDenied"), ObjectForbidden),
        (s3_error("403 Forbidden", "AllAccessDisabled"), ObjectForbidden),
        (s3_error("403 Forbidden", "InvalidObjectState"), ObjectArchived),
        *(
            (s3_error("400 Bad Request", code), ObjectUnavailable)
            for code in (
                "KMS.DisabledException",
                "KMS.KMSInvalidStateException",
                "KMS.NotFoundException",
                "KMS.ACodeOfTomorrow",
                "InvalidRequest",
            )
        ),
        (s3_error("301 Moved Permanently", "PermanentRedirect"), ObjectUnavailable),
        (s3_error("307 Temporary Redirect", "TemporaryRedirect"), ObjectUnavailable),
        (http("301 Moved Permanently", b"<html>https, please</html>"), StoreUnreachable),
        (http("308 Permanent Redirect"), StoreUnreachable),
        (s3_error("403 Forbidden", "RequestExpired"), CredentialsRefused),
        (s3_error("400 Bad Request", "RequestExpired"), CredentialsRefused),
        (s3_error("403 Forbidden", "RequestTimeTooSkewed"), CredentialsRefused),
        (s3_error("403 Forbidden", "InvalidTokenId"), CredentialsRefused),
        (s3_error("403 Forbidden", "AccountProblem"), CredentialsRefused),
        (s3_error("403 Forbidden", "UserSuspended"), CredentialsRefused),
        (s3_error("400 Bad Request", "AuthorizationHeaderMalformed"), CredentialsRefused),
        (s3_error("400 Bad Request", "InvalidArgument"), InvalidInput),
        (s3_error("400 Bad Request", "KeyTooLongError"), InvalidInput),
        (s3_error("405 Method Not Allowed", "MethodNotAllowed"), ObjectNotFound),
        (s3_error("412 Precondition Failed", "PreconditionFailed"), ObjectChanged),
        (s3_error("403 Forbidden", "InvalidAccessKeyId"), CredentialsRefused),
        (s3_error("400 Bad Request", "ExpiredToken"), CredentialsRefused),
        (s3_error("404 Not Found", "NoSuchBucket"), ObjectNotFound),
    ],
)
async def test_each_failure_of_the_store_has_its_class(
    s3: Any, object_client: str, response: bytes, expected: type[NanoVLLMError]
) -> None:
    with answering(response) as endpoint_url:
        fetcher = fetcher_for(endpoint_url, "s3://bucket", client=object_client)
        with pytest.raises(expected) as caught:
            await fetcher.fetch(ImageRef(uri="s3://bucket/k"))
        assert type(caught.value) is expected
        assert endpoint_url not in str(caught.value)
        # Only what the job itself says wrong, or an object that was replaced, can never succeed as it is.
        assert caught.value.retryable or expected in (InvalidInput, ObjectChanged)
        fetcher.close()


async def test_a_redirect_to_nowhere_is_not_followed_for_ever(s3: Any, object_client: str) -> None:
    answers = [http("301 Moved Permanently")] * 10
    with answering(answers.pop) as endpoint_url:
        fetcher = fetcher_for(endpoint_url, "s3://bucket", client=object_client)
        with pytest.raises(StoreUnreachable, match="answered 301"):
            await fetcher.fetch(ImageRef(uri="s3://bucket/k"))
        fetcher.close()
    # boto3 asks twice each for the object and for the probe, obstore once before it leaves both to boto3.
    assert len(answers) >= 5


async def test_a_bucket_of_another_region_is_read_there(s3: Any, object_client: str) -> None:
    moved = b"<Error><Code>PermanentRedirect</Code><Message>m</Message></Error>"
    head = b"HTTP/1.1 301 Moved Permanently\r\nx-amz-bucket-region: eu-central-1\r\nConnection: close\r\n"
    answers = [head + b"Content-Length: %d\r\n\r\n" % len(moved) + moved, http("200 OK", b"bytes")]
    with answering(lambda: answers.pop(0)) as endpoint_url:
        fetcher = fetcher_for(endpoint_url, "s3://bucket", client=object_client)
        assert (await fetcher.fetch(ImageRef(uri="s3://bucket/k"))).data == b"bytes"
        fetcher.close()
    assert not answers


async def test_a_store_that_is_not_there_is_nobodys_fault(s3: Any, object_client: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    fetcher = fetcher_for(f"http://127.0.0.1:{port}", "s3://bucket", client=object_client)
    with pytest.raises(StoreUnreachable):
        await fetcher.fetch(ImageRef(uri="s3://bucket/k"))
    fetcher.close()


async def test_a_cancelled_fetch_gives_its_place_to_the_next(s3: Any, object_client: str) -> None:
    bucket = s3.make_bucket()
    uri = s3.put(bucket, "k", b"bytes")
    fetcher = fetcher_for(s3.endpoint_url, f"s3://{bucket}", max_connections=1, client=object_client)
    first = asyncio.create_task(fetcher.fetch(ImageRef(uri=uri)))
    await asyncio.sleep(0)
    first.cancel()
    assert (await asyncio.wait_for(fetcher.fetch(ImageRef(uri=uri)), 30)).data == b"bytes"
    fetcher.close()


async def test_refused_credentials_are_read_anew_at_the_next_attempt(s3: Any) -> None:
    bucket = s3.make_bucket()
    uri = s3.put(bucket, "k", b"bytes")
    clients = [_Refusing(), s3.client]
    fetcher = ObjectFetcher(
        S3Settings(allow=(f"s3://{bucket}",)), max_bytes=10, client_factory=lambda _: clients.pop(0)
    )
    with pytest.raises(CredentialsRefused):
        await fetcher.fetch(ImageRef(uri=uri))
    assert (await fetcher.fetch(ImageRef(uri=uri))).data == b"bytes"


class _Refusing:
    def get_object(self, **_: Any) -> Any:
        raise NoCredentialsError


@pytest.mark.parametrize("operation", ["AssumeRole", "GetRoleCredentials", "CreateToken", "CreateOAuth2Token"])
@pytest.mark.parametrize("code", ["AccessDenied", "NoSuchKey", "InvalidArgument", "Throttling", "InternalFailure"])
def test_what_another_operation_answered_is_no_objects_fault(operation: str, code: str) -> None:
    error = ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": 404}}, operation)  # type: ignore[typeddict-item]
    assert type(classify(error)) is CredentialsRefused


def test_the_session_of_a_directory_bucket_is_its_buckets_answer() -> None:
    error = ClientError({"Error": {"Code": "NoSuchBucket"}}, "CreateSession")
    assert type(classify(error)) is ObjectNotFound


def test_nothing_secret_is_repeated() -> None:
    error = EndpointConnectionError(endpoint_url="http://user:secret@host")
    assert "secret" not in str(classify(error))
    for operation in ("GetObject", "AssumeRole"):
        said = ClientError({"Error": {"Code": "AccessDenied", "Message": "secret"}}, operation)
        assert "secret" not in str(classify(said))


async def test_what_answers_without_an_entity_tag_is_no_store_and_no_objects_fault(s3: Any, object_client: str) -> None:
    """A console, a proxy or a captive portal says 200 to everything."""

    class Portal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>login</html>")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Portal)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        fetcher = fetcher_for(f"http://127.0.0.1:{server.server_address[1]}", "s3://images", client=object_client)
        with pytest.raises(StoreUnreachable, match="no S3 server"):
            await fetcher.fetch(ImageRef(uri="s3://images/a.png"))
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def dribbling(head: bytes) -> Iterator[str]:
    """A server that answers ``head`` and then a byte every 50 ms, to any number of clients."""
    listener = socket.create_server(("127.0.0.1", 0))

    def dribble(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(head)
            while True:
                connection.sendall(b"x")
                time.sleep(0.05)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=dribble, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()


OBJECT = b'HTTP/1.1 200 OK\r\nETag: "e"\r\nContent-Length: 500000\r\n\r\n'
ERROR = b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\nContent-Length: 500000\r\n\r\n"


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("head", [OBJECT, ERROR], ids=["object", "error"])
async def test_a_body_that_dribbles_is_given_up_and_gives_its_slot_back(head: bytes, object_client: str) -> None:
    with dribbling(head) as url:
        fetcher = fetcher_for(url, "s3://bucket", max_connections=1, object_timeout_s=0.5, client=object_client)
        ref = ImageRef(uri="s3://bucket/k")
        # Both wait for the one slot: the second has it as soon as the first is given up.
        outcomes = await asyncio.gather(fetcher.fetch(ref), fetcher.fetch(ref), return_exceptions=True)
        assert [str(error) for error in outcomes] == ["the object was not read within 0.5 s"] * 2
        assert all(isinstance(error, FetchFailed) for error in outcomes)
        fetcher.close()


@pytest.mark.usefixtures("s3")
async def test_the_thread_of_an_object_that_nothing_waits_for_ends() -> None:
    with dribbling(OBJECT) as url:
        fetcher, others = fetcher_for(url, "s3://bucket"), reading_threads()
        reader = fetcher._readers["s3"]
        assert isinstance(reader, Boto3Reader)
        reader._threads = DaemonThreads("nanovllm-fetch", idle_s=0.01)  # a thread that reads no more is soon gone
        with pytest.MonkeyPatch.context() as patch:
            began = threading.Event()
            begin = boto3_reader._Body.begin
            patch.setattr(boto3_reader._Body, "begin", lambda self, body: (begin(self, body), began.set()))
            reading = asyncio.create_task(fetcher.fetch(ImageRef(uri="s3://bucket/k")))
            await eventually(began.is_set)
        assert reading_threads() - others
        reading.cancel()
        await eventually(lambda: not reading_threads() - others)
        fetcher.close()


def reading_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "nanovllm-fetch"}
