"""What a store answers strangely for some objects is those jobs' trouble; for all objects it is the store's."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from bench import Bench, eventually, png

from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import CredentialsRefused, FetchFailed, NanoVLLMError, ObjectRefused, StoreUnreachable
from nanovllm.messages.job import ImageRef
from nanovllm.objects.fetch import ObjectFetcher
from nanovllm.objects.reader import PROBE_KEY
from nanovllm.settings.s3 import S3Settings

Answer = tuple[int, str | None, dict[str, str]]
"""Status, code and headers; without a code the body is an image."""

GOOD: Answer = (200, None, {"ETag": '"e"'})
REDIRECT: Answer = (302, "", {"Location": "http://127.0.0.1:1/"})
NO_ENTITY_TAG: Answer = (200, None, {})
BAD_SIGNATURE: Answer = (403, "SignatureDoesNotMatch", {})
MISSING: Answer = (404, "NoSuchKey", {})
FORBIDDEN: Answer = (403, "AccessDenied", {})
CLIENT_ERRORS: list[Answer] = [
    (400, "RequestHeaderSectionTooLarge", {}),
    (400, "ACodeOfTomorrow", {}),
    (405, "", {}),
    (409, "OperationAborted", {}),
    (410, "", {}),
    (413, "EntityTooLarge", {}),
    (414, "", {}),
    (416, "InvalidRange", {}),
    (431, "", {}),
    (451, "UnavailableForLegalReasons", {}),
    (501, "NotImplemented", {}),
]


@contextmanager
def lying(answer: Callable[[str], Answer]) -> Iterator[str]:
    """An HTTP server that answers each key as told."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, code, headers = answer(self.path.split("?")[0].split("/", 2)[2])
            body = png() if code is None else f"<Error><Code>{code}</Code></Error>".encode() if code else b""
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


async def failure_of(bad: Answer, probe: Answer, client: str) -> NanoVLLMError:
    with lying(lambda key: probe if key == PROBE_KEY else bad) as url:
        settings = S3Settings.model_validate(
            {"endpoint_url": url, "addressing_style": "path", "allow": ["s3://images"], "client": client}
        )
        fetcher = ObjectFetcher(settings, max_bytes=100_000)
        try:
            with pytest.raises(NanoVLLMError) as caught:
                await fetcher.fetch(ImageRef(uri="s3://images/bad"))
        finally:
            fetcher.close()
    return caught.value


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize(
    ("bad", "probe"),
    [
        *((bad, MISSING) for bad in (REDIRECT, NO_ENTITY_TAG, BAD_SIGNATURE, *CLIENT_ERRORS)),
        (NO_ENTITY_TAG, GOOD),
        (REDIRECT, FORBIDDEN),
    ],
)
async def test_what_another_object_is_not_answered_concerns_one_object(
    bad: Answer, probe: Answer, object_client: str
) -> None:
    error = await failure_of(bad, probe, object_client)
    assert type(error) is ObjectRefused
    assert "this object alone" in str(error)


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (REDIRECT, StoreUnreachable),
        (NO_ENTITY_TAG, StoreUnreachable),
        (BAD_SIGNATURE, CredentialsRefused),
        *((answer, FetchFailed) for answer in CLIENT_ERRORS),
    ],
)
async def test_what_another_object_is_answered_too_is_the_stores_fault(
    answer: Answer, expected: type[NanoVLLMError], object_client: str
) -> None:
    assert type(await failure_of(answer, answer, object_client)) is expected


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("bad", [NO_ENTITY_TAG, BAD_SIGNATURE, CLIENT_ERRORS[0]])
async def test_a_probe_that_breaks_off_leaves_it_to_the_circuit_breaker(bad: Answer, object_client: str) -> None:
    assert type(await failure_of(bad, (503, "SlowDown", {}), object_client)) is FetchFailed


@pytest.mark.parametrize("bad", [REDIRECT, NO_ENTITY_TAG, CLIENT_ERRORS[0], (416, "InvalidRange", {})])
async def test_jobs_with_strange_objects_stop_no_others(
    bench: Bench, bad: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = bench.settings.retries.breaker_objects + 2
    with lying(lambda key: bad if key.startswith("bad") else GOOD) as url:
        s3 = bench.settings.s3.model_copy(update={"endpoint_url": url})
        for number in range(jobs):
            uri = f"s3://images/bad{number}"
            await bench.send({"job_id": f"bad{number}", "prompt": "<|image|>", "images": [uri]}, partition=0)
        await bench.send({"job_id": "image", "prompt": "<|image|>", "images": ["s3://images/good"]}, partition=1)
        await bench.send({"job_id": "text", "prompt": "text"}, partition=1)
        async with bench.working(EchoEngine(), s3=s3):
            assert set(await bench.results(2)) == {"image", "text"}
            letters = await bench.dead_letters(jobs)
    assert {headers["nanovllm_code"] for headers, _ in letters} == {"object_refused"}
    assert {headers["nanovllm_attempts"] for headers, _ in letters} == {str(s3.max_attempts)}
    assert "taking no work" not in caplog.text


async def test_a_store_that_answers_everything_strangely_costs_no_job(bench: Bench) -> None:
    answers = {"now": REDIRECT}
    with lying(lambda _: answers["now"]) as url:
        s3 = bench.settings.s3.model_copy(update={"endpoint_url": url})
        await bench.send({"job_id": "j", "prompt": "<|image|>", "images": ["s3://images/a"]})
        async with bench.working(EchoEngine(), s3=s3):
            await eventually(lambda: "answered 302" in (bench.health.systemic or ""))
            answers["now"] = GOOD
            assert set(await bench.results(1)) == {"j"}
