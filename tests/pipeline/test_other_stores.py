"""Objects of Google Cloud Storage and Azure; a server that answers as their documentation says plays the stores."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from nanovllm.errors import (
    ConfigurationError,
    CredentialsRefused,
    FetchFailed,
    ForbiddenUri,
    ImageTooLarge,
    InvalidInput,
    ObjectArchived,
    ObjectChanged,
    ObjectForbidden,
    ObjectNotFound,
)
from nanovllm.messages.job import ImageRef, Job
from nanovllm.messages.s3_uri import ObjectAddress, split_object, split_prefix
from nanovllm.objects.fetch import ObjectFetcher
from nanovllm.pipeline.build import check_surroundings
from nanovllm.settings.s3 import S3Settings
from nanovllm.settings.worker import Settings

pytest.importorskip("obstore", reason="obstore: pip install 'nanovllm[obstore]'")

KEY = "a b/50+ü &%日本.png"
ACCOUNT = "account"


@dataclass
class PlayedStore:
    """Objects by ``/bucket/key``, each version in its order; ``failure`` is answered instead: status and code."""

    scheme: str
    version_header: str
    version_parameter: str
    objects: dict[str, list[bytes]] = field(default_factory=dict)
    failure: tuple[int, str] | None = None
    asked: list[dict[str, str]] = field(default_factory=list)

    def put(self, path: str, body: bytes) -> str:
        """The object's URI."""
        self.objects.setdefault(path, []).append(body)
        return f"{self.scheme}:/{path}"

    def answer(self, target: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        self.asked.append(headers)
        parts = urlsplit(target)
        path = unquote(parts.path).removeprefix(f"/{ACCOUNT}" if self.scheme == "az" else "")
        versions = self.objects.get(path)
        if self.failure is not None:
            return self._error(*self.failure)
        if versions is None:
            return self._error(404, "BlobNotFound" if self.scheme == "az" else "NoSuchKey")
        number = int(parse_qs(parts.query).get(self.version_parameter, [str(len(versions))])[0])
        body = versions[number - 1]
        tag = f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
        if headers.get("if-match", tag) != tag:
            return self._error(412, "ConditionNotMet" if self.scheme == "az" else "PreconditionFailed")
        described = {
            "ETag": tag,
            "Last-Modified": "Mon, 30 Nov 2026 10:00:00 GMT",
            "Content-Type": "image/png",
            self.version_header: str(number),
        }
        return (304, described, b"") if headers.get("if-none-match") == tag else (200, described, body)

    def _error(self, status: int, code: str) -> tuple[int, dict[str, str], bytes]:
        return status, {"Content-Type": "application/xml"}, f"<Error><Code>{code}</Code></Error>".encode()


@pytest.fixture(params=["gs", "az"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[PlayedStore]:
    played = (
        PlayedStore("gs", "x-goog-generation", "generation")
        if request.param == "gs"
        else PlayedStore("az", "x-ms-version-id", "versionid")
    )

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = played.answer(self.path, {k.lower(): v for k, v in self.headers.items()})
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    if request.param == "gs":
        account = {"gcs_base_url": url, "disable_oauth": True, "client_email": "", "private_key": ""}
        (tmp_path / "gcs.json").write_text(json.dumps(account | {"private_key_id": ""}))
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "gcs.json"))
    else:
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", base64.b64encode(b"a secret key").decode())
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"{url}/{ACCOUNT}")
    yield played
    server.shutdown()
    server.server_close()


def fetcher_of(store: PlayedStore, *, max_bytes: int = 1_000) -> ObjectFetcher:
    return ObjectFetcher(S3Settings(allow=(f"{store.scheme}://bucket/in",)), max_bytes=max_bytes)


async def test_an_object_is_read_with_its_version_and_its_tag(store: PlayedStore) -> None:
    fetcher = fetcher_of(store)
    uri = store.put(f"/bucket/in/{KEY}", b"first")
    image = await fetcher.fetch(ImageRef(uri=uri))
    assert (image.data, image.uri, image.version_id) == (b"first", uri, "1")
    store.put(f"/bucket/in/{KEY}", b"second")
    assert (await fetcher.fetch(ImageRef(uri=uri))).data == b"second"
    assert (await fetcher.fetch(ImageRef(uri=uri, version_id="1"))).data == b"first"
    with pytest.raises(ObjectChanged, match="412"):
        await fetcher.fetch(ImageRef(uri=uri, etag=image.etag))
    head = await fetcher.head(ImageRef(uri=uri))
    assert (head.content_type, head.size, head.version_id) == ("image/png", 6, "2")


async def test_bytes_at_hand_are_given_back_while_they_are_the_stores(store: PlayedStore) -> None:
    fetcher, uri = fetcher_of(store), store.put("/bucket/in/k", b"bytes")
    held = await fetcher.fetch(ImageRef(uri=uri))
    again = await fetcher.fetch(ImageRef(uri=uri), held=held)
    assert (again.data, again.sha256, again.etag) == (held.data, held.sha256, held.etag)
    assert store.asked[-1]["if-none-match"] == held.etag


async def test_a_request_is_signed_where_there_are_credentials(store: PlayedStore) -> None:
    await fetcher_of(store).fetch(ImageRef(uri=store.put("/bucket/in/k", b"bytes")))
    assert store.asked[-1].get("authorization", "").startswith("SharedKey account:") is (store.scheme == "az")
    assert "secret" not in str(store.asked)


async def test_what_is_not_allowed_missing_or_too_large_is_refused(store: PlayedStore) -> None:
    fetcher = fetcher_of(store, max_bytes=10)
    for uri in ("other/in/k", "bucket/internal/k", "bucket/in/../k"):
        with pytest.raises(ForbiddenUri):
            fetcher.check(ImageRef(uri=f"{store.scheme}://{uri}"))
    with pytest.raises(ForbiddenUri, match=r"s3\.allow"):
        fetcher.check(ImageRef(uri="s3://bucket/in/k"))
    with pytest.raises(ObjectNotFound, match="404"):
        await fetcher.fetch(ImageRef(uri=f"{store.scheme}://bucket/in/missing"))
    with pytest.raises(ImageTooLarge):
        await fetcher.fetch(ImageRef(uri=store.put("/bucket/in/k", b"x" * 11)))
    with pytest.raises(InvalidInput, match="empty segment"):
        await fetcher.fetch(ImageRef(uri=f"{store.scheme}://bucket/in//k"))


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "AccessDenied", ObjectForbidden),
        (403, "AuthorizationPermissionMismatch", ObjectForbidden),
        (403, "AuthenticationFailed", CredentialsRefused),
        (401, "InvalidAuthenticationInfo", CredentialsRefused),
        (409, "BlobArchived", ObjectArchived),
        (503, "ServerBusy", FetchFailed),
        (429, "TooManyRequests", FetchFailed),
    ],
)
async def test_each_failure_has_its_class(
    store: PlayedStore, status: int, code: str, expected: type[Exception]
) -> None:
    fetcher, uri = fetcher_of(store), store.put("/bucket/in/k", b"bytes")
    store.failure = status, code
    with pytest.raises(expected) as caught:
        await fetcher.fetch(ImageRef(uri=uri))
    assert type(caught.value) is expected
    assert "127.0.0.1" not in str(caught.value)
    store.failure = None
    assert (await fetcher.fetch(ImageRef(uri=uri))).data == b"bytes"


def test_a_store_that_variables_allow_no_client_for_is_told_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    settings = Settings.model_construct(s3=S3Settings(allow=("s3://bucket", "az://container-1/in")))
    with pytest.raises(ConfigurationError, match=r"s3\.allow names az://container-1, and .* AZURE_"):
        check_surroundings(settings)


async def test_variables_that_are_none_are_systemic(store: PlayedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", "/secret/file")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(CredentialsRefused, match="_…") as caught:
        await fetcher_of(store).fetch(ImageRef(uri=f"{store.scheme}://bucket/in/k"))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("gs://bucket/a/b", ObjectAddress("gs", "bucket", "a/b")),
        ("az://container-1/a b", ObjectAddress("az", "container-1", "a b")),
        ("s3://bucket/k", ObjectAddress("s3", "bucket", "k")),
        ("gs://Bucket/k", None),
        ("gs://b/k", None),
        ("az://two--hyphens/k", None),
        ("az://a_b/k", None),
        ("az://account@host/k", None),
        ("az://container", None),
        ("gs://bucket/" + "x" * 1_025, None),
        ("gs://bucket/a\0b", None),
        ("GS://bucket/k", None),
        ("gcs://bucket/k", None),
        ("file:///etc/passwd", None),
    ],
)
def test_the_uri_of_an_object_is_parsed_strictly(uri: str, address: ObjectAddress | None) -> None:
    assert split_object(uri) == address
    if address is None:
        with pytest.raises(ValueError):
            Job.model_validate({"prompt": "<|image|>", "images": [uri]})
    else:
        assert Job.model_validate({"prompt": "<|image|>", "images": [uri]}).images[0].address == address


def test_prefixes_of_other_stores_are_allowed_and_are_no_place_for_results() -> None:
    assert split_prefix("gs://bucket/in/*") == ObjectAddress("gs", "bucket", "in")
    assert S3Settings(allow=("gs://bucket/in/", "az://container")).obstore_schemes == {"gs", "az"}
    for wrong in ({"allow": ("gs://bucket/*/x",)}, {"large_results": "gs://bucket"}, {"allow": ("ftp://bucket",)}):
        with pytest.raises(ValueError, match="wildcard elsewhere"):
            S3Settings.model_validate(wrong)
