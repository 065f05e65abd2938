"""Images over HTTP: which hosts and addresses are asked, what of their answers is taken, what each failure means."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from bench import Bench, eventually, png, reached
from certificates import write_certificate
from http_host import INTERNAL, NAMES, PUBLIC, Answer, ImageHost, Resolver, send, send_raw, serving

from nanovllm.client.dead_letters import DeadLetterRecord
from nanovllm.engine.backends.base import Request
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import (
    ConfigurationError,
    FetchFailed,
    ForbiddenHost,
    ImageTooLarge,
    NanoVLLMError,
    ObjectChanged,
    ObjectForbidden,
    ObjectNotFound,
    UrlRefused,
)
from nanovllm.messages.http_uri import HttpUri, parse_http_uri, without_secrets
from nanovllm.messages.input_names import input_names
from nanovllm.messages.job import ImageRef
from nanovllm.metrics import Metrics
from nanovllm.objects.fetch import ObjectFetcher
from nanovllm.objects.http_images import MAX_RETRY_AFTER_S
from nanovllm.objects.public_addresses import is_allowed
from nanovllm.objects.reader import FetchedImage
from nanovllm.pipeline.failure.backoff import Backoff
from nanovllm.pipeline.failure.faults import ActiveFaults
from nanovllm.pipeline.operations.health import Health
from nanovllm.pipeline.stages.context import Progress
from nanovllm.pipeline.stages.retry import Retry
from nanovllm.settings.http_images import AllowedHost, HttpImageSettings
from nanovllm.settings.s3 import S3Settings

THREADS = "nanovllm-http"


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    """Every name of the tests is the public stand-in, until a test says another thing."""
    resolver = Resolver({name: [[PUBLIC]] for name in NAMES})
    resolver.install(monkeypatch)
    return resolver


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_certificate(tmp_path_factory.mktemp("tls") / "host.crt", address=PUBLIC, names=NAMES)


@pytest.fixture
def host(resolver: Resolver) -> Iterator[ImageHost]:
    """A host without TLS at the stand-in of a public address."""
    with serving() as host:
        yield host


@pytest.fixture
def secure_host(resolver: Resolver, certificate: Path) -> Iterator[ImageHost]:
    with serving(certificate) as host:
        yield host


def settings_for(*hosts: ImageHost, **settings: Any) -> HttpImageSettings:
    entries = tuple(f"{host.scheme}://{name}:{host.port}" for host in hosts for name in NAMES)
    return HttpImageSettings(**{"allow": entries, "allow_networks": (f"{PUBLIC}/32",), **settings})


def fetcher_for(*hosts: ImageHost, max_bytes: int = 1_000_000, **settings: Any) -> ObjectFetcher:
    return ObjectFetcher(S3Settings(), max_bytes=max_bytes, http=settings_for(*hosts, **settings))


async def fetch(fetcher: ObjectFetcher, uri: str, **ref: Any) -> FetchedImage:
    return await fetcher.fetch(ImageRef(uri=uri, **ref))


async def test_reads_an_image_over_tls_and_names_it_without_its_query(
    secure_host: ImageHost, certificate: Path
) -> None:
    secure_host.answers["/in/a%20b.png"] = send(body=b"bytes", headers={"ETag": '"tag"', "Set-Cookie": "id=1"})
    fetcher = fetcher_for(secure_host, ca_file=certificate)
    for _ in range(2):
        image = await fetch(fetcher, secure_host.uri("/in/a%20b.png?X-Amz-Signature=hunter2"))
    assert (image.data, image.sha256) == (b"bytes", hashlib.sha256(b"bytes").hexdigest())
    assert (image.uri, image.etag) == (secure_host.uri("/in/a%20b.png"), '"tag"')
    (path, first), (_, second) = secure_host.asked
    assert path == "/in/a%20b.png?X-Amz-Signature=hunter2"
    assert (
        first
        == second
        == {
            "host": f"images.test:{secure_host.port}",
            "accept": "*/*",
            "accept-encoding": "identity",
            "connection": "close",
            "user-agent": "nanovllm",
        }
    ), "no cookie, no referrer, no credentials"
    assert secure_host.server_names == ["images.test"] * 2


@pytest.mark.parametrize(
    ("entry", "uri", "is_allowed"),
    [
        ("images.test", "https://images.test/a.png", True),
        ("images.test", "https://IMAGES.test./a.png", True),
        ("IMAGES.test.", "https://images.test:443/a.png", True),
        ("images.test", "https://images.test:8443/a.png", False),
        ("images.test:8443", "https://images.test:8443/a.png", True),
        ("images.test:8443", "https://images.test/a.png", False),
        ("images.test", "http://images.test/a.png", False),
        ("images.test", "http://images.test:443/a.png", False),
        ("http://images.test", "http://images.test/a.png", True),
        ("http://images.test", "https://images.test:80/a.png", False),
        ("images.test", "https://a.images.test/a.png", False),
        ("images.test", "https://images.test.evil.test/a.png", False),
        ("images.test", "https://evilimages.test/a.png", False),
        ("*.images.test", "https://a.images.test/a.png", True),
        ("*.images.test", "https://a.b.images.test/a.png", True),
        ("*.images.test", "https://images.test/a.png", False),
        ("*.images.test", "https://evilimages.test/a.png", False),
        ("*.images.test:8443", "https://a.images.test:8443/a.png", True),
        ("198.51.100.7", "https://198.51.100.7/a.png", True),
        ("[2001:DB8::7]", "https://[2001:db8:0::7]/a.png", True),
        ("xn--bcher-kva.test", "https://XN--BCHER-KVA.test/a.png", True),
    ],
)
def test_a_host_is_allowed_with_its_scheme_and_port(entry: str, uri: str, is_allowed: bool) -> None:
    assert AllowedHost.of(entry).allows(parse_http_uri(uri)) is is_allowed


@pytest.mark.parametrize(
    "entry",
    [
        *("*", "*.com", "*.*.test", "a.*.test", "*.127.0.0.1", "", "a.test:x", "a.test:99999", "a test", "büro.test"),
        *("https://a.test/path", "https://a.test?x=hunter2", "user:hunter2@a.test", "ftp://a.test", "[::1"),
    ],
)
def test_an_entry_that_is_no_host_is_refused_and_not_repeated(entry: str) -> None:
    with pytest.raises(ValueError, match=r"number 2 ") as caught:
        HttpImageSettings(allow=("images.test", entry))
    assert "hunter2" not in "".join(error["msg"] for error in caught.value.errors(include_input=False))  # type: ignore[attr-defined]


@pytest.mark.parametrize("network", ["10.0.0.1/8", "10.0.0.0/33", "cluster"])
def test_a_network_that_is_none_is_refused(network: str) -> None:
    with pytest.raises(ValueError, match=r"10\.0\.0\.0/8 or"):
        HttpImageSettings(allow_networks=(network,))


async def test_no_host_is_allowed_unless_the_settings_say_so(host: ImageHost) -> None:
    for settings in (None, HttpImageSettings()):
        fetcher = ObjectFetcher(S3Settings(), max_bytes=10, http=settings)
        with pytest.raises(ForbiddenHost, match=r"http_images\.allow of this worker does not list http://images\.test"):
            fetcher.check(ImageRef(uri=host.uri("/a.png")))
    assert host.asked == []


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.8.8.8", "169.254.169.254", "172.16.0.1", "172.31.9.9"),
        *("192.0.0.1", "192.0.0.10", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1"),
        *("203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254"),
        *("64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1"),
        *("2002:7f00:1::1", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%lo", "fec0::1"),
        *("ff02::1", "ff0e::1"),
    ],
)
def test_an_address_that_is_not_public_is_refused(address: str) -> None:
    assert not is_allowed(address, [])


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "100.63.255.255", "172.32.0.1", "192.0.1.1", "::ffff:8.8.8.8", "2606:4700::1111"]
)
def test_a_public_address_is_allowed(address: str) -> None:
    assert is_allowed(address, [])


def test_networks_are_allowed_on_purpose_and_link_local_ones_never() -> None:
    def allowed(address: str, *networks: str) -> bool:
        return is_allowed(address, [ip_network(network) for network in networks])

    assert allowed("10.1.2.3", "10.0.0.0/8")
    assert allowed("::ffff:10.1.2.3", "10.0.0.0/8")
    assert allowed("fd00::7", "fd00::/8")
    assert allowed("64:ff9b::808:808", "64:ff9b::/96")
    assert not allowed("192.168.0.1", "10.0.0.0/8")
    everything = ("0.0.0.0/0", "::/0")
    for address in ("169.254.169.254", "::ffff:169.254.169.254", "fe80::1", "224.0.0.1", "ff02::1", "0.0.0.0", "::"):
        assert not allowed(address, *everything)


@pytest.mark.parametrize("address", [INTERNAL, "10.0.0.1", "169.254.169.254", "::1", "fd00:ec2::254"])
async def test_a_name_of_an_address_inside_is_refused_without_a_connection(
    host: ImageHost, resolver: Resolver, address: str
) -> None:
    resolver.answers["images.test"] = [[address]]
    with serving(address=INTERNAL, port=host.port) as internal:
        with pytest.raises(ForbiddenHost, match="not public") as caught:
            await fetch(fetcher_for(host), host.uri("/a.png"))
        assert internal.asked == []
    assert address not in str(caught.value), "a job could learn the addresses of names inside"


async def test_one_address_inside_refuses_the_name_with_all_its_others(host: ImageHost, resolver: Resolver) -> None:
    host.answers["/a.png"] = send(body=b"bytes")
    resolver.answers["images.test"] = [[PUBLIC, INTERNAL]]
    with pytest.raises(ForbiddenHost):
        await fetch(fetcher_for(host), host.uri("/a.png"))
    assert host.asked == []


async def test_a_rebinding_name_is_resolved_once_and_connected_where_it_was_checked(
    host: ImageHost, resolver: Resolver
) -> None:
    """The second answer, which a client that resolves again would connect to, is an address inside."""
    host.answers["/a.png"] = send(body=b"public")
    resolver.answers["images.test"] = [[PUBLIC], [INTERNAL]]
    fetcher = fetcher_for(host)
    with serving(address=INTERNAL, port=host.port) as internal:
        internal.answers["/a.png"] = send(body=b"secret")
        assert (await fetch(fetcher, host.uri("/a.png"))).data == b"public"
        assert resolver.asked == ["images.test"]
        with pytest.raises(ForbiddenHost):
            await fetch(fetcher, host.uri("/a.png"))
        assert internal.asked == []


async def test_an_address_of_this_machine_by_its_number_is_refused(host: ImageHost) -> None:
    fetcher = fetcher_for(host, allow=(f"http://127.0.0.1:{host.port}", f"http://[::1]:{host.port}", "[::ffff:7f00:1]"))
    with serving(address=INTERNAL, port=host.port) as internal:
        for uri in (f"http://127.0.0.1:{host.port}/", f"http://[::1]:{host.port}/", "https://[::FFFF:127.0.0.1]/"):
            with pytest.raises(ForbiddenHost, match="not public"):
                await fetch(fetcher, uri)
        assert internal.asked == []


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("http://2130706433/", "four decimal numbers"),
        ("http://0x7f000001/", "four decimal numbers"),
        ("http://0x7f.0.0.1/", "four decimal numbers"),
        ("http://0177.0.0.1/", "four decimal numbers"),
        ("http://127.1/", "four decimal numbers"),
        ("http://127.0.0.1.2/", "four decimal numbers"),
        ("http://[::1/", "host"),
        ("http://[127.0.0.1]/", "IPv6"),
        ("http://[fe80::1%25eth0]/", "IPv6"),
        ("https://user:pw@images.test/", "user or a password"),
        ("https://images.test@127.0.0.1/", "user or a password"),
        ("https://images.test/#x", "fragment"),
        ("https://images.test\\@127.0.0.1/", "characters"),
        ("https://images.test/a b.png", "characters"),
        ("https://images.test/\r\nHost: x", "characters"),
        ("https://images.te\tst/", "characters"),
        ("https://bücher.test/", "xn--"),
        ("https://images。test/", "xn--"),
        ("https://images%2etest/", "no host's name"),
        ("https://-images.test/", "no host's name"),
        ("https://images..test/", "no host's name"),
        ("https:///a.png", "no host"),
        ("https://:443/a.png", "no host"),
        ("https://images.test:/a.png", "no host"),
        ("https://images.test:0/a.png", "port"),
        ("https://images.test:65536/a.png", "port"),
        ("https://images.test:4x/a.png", "port"),
        ("https:/images.test/a.png", "is no http"),
        ("https://" + "a" * 64 + ".test/", "no host's name"),
        ("https://" + "a." * 127 + "test/", "no host's name"),
        ("https://images.test/" + "a" * 8_192, "more than 8192 characters"),
    ],
)
def test_a_uri_that_two_programs_could_read_differently_is_refused(uri: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        parse_http_uri(uri)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "meant"),
    [
        ("HTTPS://Images.Test./A%20b?x=/?y", HttpUri("https", "images.test", 443, "/A%20b?x=/?y")),
        ("https://images.test", HttpUri("https", "images.test", 443, "/")),
        ("https://images.test?x", HttpUri("https", "images.test", 443, "/?x")),
        ("http://[2001:DB8:0::1]:8080//a/../b", HttpUri("http", "2001:db8::1", 8080, "//a/../b")),
        ("http://10.0.0.1:80/", HttpUri("http", "10.0.0.1", 80, "/")),
    ],
)
def test_a_uri_is_host_port_and_target(uri: str, meant: HttpUri) -> None:
    assert parse_http_uri(uri) == meant
    assert "x=/?y" not in repr(parse_http_uri(uri))


async def test_a_redirect_is_followed_to_a_host_on_the_list_and_is_checked_anew(
    host: ImageHost, resolver: Resolver
) -> None:
    host.answers["/a.png"] = send(302, headers={"Location": host.uri("/b.png?sig=2#part", "other.test")})
    host.answers["/b.png"] = send(307, headers={"Location": "/c.png"})
    host.answers["/c.png"] = send(body=b"bytes")
    image = await fetch(fetcher_for(host), host.uri("/a.png?sig=1"))
    assert (image.data, image.uri) == (b"bytes", host.uri("/a.png"))
    assert host.paths == ["/a.png?sig=1", "/b.png?sig=2", "/c.png"]
    assert [headers["host"] for _, headers in host.asked[1:]] == [f"other.test:{host.port}"] * 2
    assert not any("referer" in headers for _, headers in host.asked)
    assert resolver.asked == ["images.test", "other.test", "other.test"]


@pytest.mark.parametrize(
    ("location", "error", "why"),
    [
        ("http://elsewhere.test/a.png", ForbiddenHost, "does not list http://elsewhere.test"),
        ("//elsewhere.test/a.png", ForbiddenHost, "does not list http://elsewhere.test"),
        ("http://inside.test:{port}/a.png", ForbiddenHost, "not public"),
        ("http://127.0.0.1:{port}/a.png", ForbiddenHost, "does not list"),
        ("http://169.254.169.254/latest/meta-data", ForbiddenHost, "does not list"),
        ("http://user:hunter2@images.test:{port}/b.png", UrlRefused, "user or a password"),
        ("http://2130706433:{port}/a.png", UrlRefused, "four decimal numbers"),
        ("file:///etc/passwd", UrlRefused, "is no http"),
        ("gopher://127.0.0.1/", UrlRefused, "is no http"),
        ("s3://private/a.png", UrlRefused, "is no http"),
        ("http://[::1", UrlRefused, "redirects to what is no URL"),
        ("", UrlRefused, "has no Location"),
    ],
)
async def test_a_redirect_out_of_the_list_is_refused_before_anything_is_asked(
    host: ImageHost, resolver: Resolver, location: str, error: type[NanoVLLMError], why: str
) -> None:
    host.answers["/a.png"] = send(302, headers={"Location": location.format(port=host.port)})
    resolver.answers["inside.test"] = [[INTERNAL]]
    allow = tuple(f"http://{name}:{host.port}" for name in (*NAMES, "inside.test"))
    with serving(address=INTERNAL, port=host.port) as internal:
        with pytest.raises(error, match=why) as caught:
            await fetch(fetcher_for(host, allow=allow), host.uri("/a.png"))
        assert internal.asked == []
    assert host.paths == ["/a.png"]
    assert "hunter2" not in str(caught.value)
    assert "elsewhere.test" not in resolver.asked


async def test_a_redirect_from_https_to_http_is_refused(
    host: ImageHost, secure_host: ImageHost, certificate: Path
) -> None:
    secure_host.answers["/a.png"] = send(301, headers={"Location": host.uri("/a.png")})
    host.answers["/a.png"] = send(body=b"bytes")
    fetcher = fetcher_for(host, secure_host, ca_file=certificate)
    assert (await fetch(fetcher, host.uri("/a.png"))).data == b"bytes", "the host itself is allowed"
    with pytest.raises(ForbiddenHost, match="from https to http"):
        await fetch(fetcher, secure_host.uri("/a.png"))
    assert len(host.asked) == 1


async def test_three_redirects_are_followed_and_no_fourth(host: ImageHost) -> None:
    for number in range(4):
        host.answers[f"/{number}"] = send(303, headers={"Location": f"/{number + 1}"})
    host.answers["/4"] = send(body=b"bytes")
    fetcher = fetcher_for(host)
    assert (await fetch(fetcher, host.uri("/1"))).data == b"bytes"
    host.asked.clear()
    with pytest.raises(UrlRefused, match="redirect number 4"):
        await fetch(fetcher, host.uri("/0"))
    assert host.paths == ["/0", "/1", "/2", "/3"]


@pytest.mark.parametrize("name", ["wrong.test", "images.test"])
async def test_a_host_that_proves_another_identity_is_not_believed(
    secure_host: ImageHost, resolver: Resolver, certificate: Path, tmp_path: Path, name: str
) -> None:
    """A name that the certificate has not, and a certificate of another authority."""
    secure_host.answers["/a.png"] = send(body=b"bytes")
    resolver.answers["wrong.test"] = [[PUBLIC]]
    other = write_certificate(tmp_path / "other.crt", address=PUBLIC, names=NAMES)
    ca = certificate if name == "wrong.test" else other
    fetcher = fetcher_for(secure_host, allow=(f"{name}:{secure_host.port}",), ca_file=ca)
    with pytest.raises(FetchFailed, match="proves no identity"):
        await fetch(fetcher, secure_host.uri("/a.png", name))
    assert secure_host.asked == []


def test_an_authority_that_cannot_be_read_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").touch()
    for name in ("nope.pem", "empty.pem"):
        with pytest.raises(ConfigurationError, match=r"http_images\.ca_file .* cannot be read"):
            ObjectFetcher(S3Settings(), max_bytes=1, http=HttpImageSettings(allow=("a.test",), ca_file=tmp_path / name))


async def test_proxies_of_the_environment_are_not_heeded(host: ImageHost, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
        monkeypatch.setenv(name.lower(), "http://127.0.0.1:1")
    host.answers["/a.png"] = send(body=b"bytes")
    assert (await fetch(fetcher_for(host), host.uri("/a.png"))).data == b"bytes"


@pytest.mark.parametrize("body", [b"", b"x" * 11])
async def test_an_image_above_the_limit_is_refused_by_its_length_or_while_it_is_read(
    host: ImageHost, body: bytes
) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    host.answers["/announced"] = send(body=body, length=11)
    host.answers["/chunked"] = send_raw(head, b"6\r\nxxxxxx\r\n" * 2, b"0\r\n\r\n")
    host.answers["/endless"] = send_raw(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 1_000)
    fetcher = fetcher_for(host, max_bytes=10)
    for path in ("/announced", "/chunked", "/endless"):
        with pytest.raises(ImageTooLarge, match=r"the image has 1\d+ bytes or more, above the limit of 10"):
            await fetch(fetcher, host.uri(path))


@pytest.mark.parametrize(
    "answer",
    [
        send(body=b"xx", length=10),
        send_raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nxxx"),
        send_raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n" + b"x" * 100),
        send_raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 70_000),
        send_raw(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n"),
        send_raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
        send_raw(b""),
    ],
    ids=["short", "cut chunk", "negative chunk", "endless chunk line", "too many headers", "no HTTP", "nothing"],
)
async def test_a_broken_answer_is_worth_another_attempt(host: ImageHost, answer: Answer) -> None:
    host.answers["/a.png"] = answer
    with pytest.raises(FetchFailed, match=r"images\.test:\d+ broke off") as caught:
        await fetch(fetcher_for(host), host.uri("/a.png?sig=hunter2"))
    assert "hunter2" not in repr(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip"])
async def test_a_compressed_body_is_refused(host: ImageHost, encoding: str) -> None:
    host.answers["/a.png"] = send(body=b"\x1f\x8b", headers={"Content-Encoding": encoding})
    with pytest.raises(UrlRefused, match="Content-Encoding"):
        await fetch(fetcher_for(host), host.uri("/a.png"))


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (204, UrlRefused),
        (206, UrlRefused),
        (304, UrlRefused),
        (400, UrlRefused),
        (401, ObjectForbidden),
        (403, ObjectForbidden),
        (404, ObjectNotFound),
        (410, ObjectNotFound),
        (412, ObjectChanged),
        (415, UrlRefused),
        (408, FetchFailed),
        (425, FetchFailed),
        (429, FetchFailed),
        (500, FetchFailed),
        (503, FetchFailed),
    ],
)
async def test_each_status_is_the_jobs_fault_or_worth_another_attempt(
    host: ImageHost, status: int, error: type[NanoVLLMError]
) -> None:
    host.answers["/a.png"] = send(status)
    with pytest.raises(error, match=rf"http://images\.test:{host.port} answered {status}$") as caught:
        await fetch(fetcher_for(host), host.uri("/a.png?sig=hunter2"))
    assert type(caught.value) is error


@pytest.mark.parametrize("address", ["127.0.0.3", None])
async def test_a_host_that_is_not_there_is_worth_another_attempt(
    host: ImageHost, resolver: Resolver, address: str | None
) -> None:
    resolver.answers["images.test"] = [[address] if address else []]
    fetcher = fetcher_for(host, allow_networks=("127.0.0.0/8",))
    with pytest.raises(FetchFailed, match="broke off: ConnectionRefusedError" if address else "cannot be resolved"):
        await fetch(fetcher, host.uri("/a.png"))


async def test_the_next_address_is_tried_where_one_does_not_answer(host: ImageHost, resolver: Resolver) -> None:
    host.answers["/a.png"] = send(body=b"bytes")
    resolver.answers["images.test"] = [["127.0.0.3", PUBLIC]]
    fetcher = fetcher_for(host, allow_networks=("127.0.0.2/31",))
    assert (await fetch(fetcher, host.uri("/a.png"))).data == b"bytes"


@pytest.mark.parametrize(
    ("retry_after", "least_s", "most_s"),
    [
        ("7", 7, 7),
        ("999999", MAX_RETRY_AFTER_S, MAX_RETRY_AFTER_S),
        (format_datetime(datetime.now(UTC) + timedelta(days=1), usegmt=True), MAX_RETRY_AFTER_S, MAX_RETRY_AFTER_S),
        (format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True), 0, 0),
        ("-5", 0, 0),
        ("soon", 0, 0),
        ("Fri, 31 Dec 9999 23:59:59 +99999999999", 0, 0),
        ("", 0, 0),
    ],
)
async def test_a_host_may_ask_for_a_wait_within_a_bound(
    host: ImageHost, retry_after: str, least_s: float, most_s: float
) -> None:
    host.answers["/a.png"] = send(429, headers={"Retry-After": retry_after})
    with pytest.raises(FetchFailed) as caught:
        await fetch(fetcher_for(host), host.uri("/a.png"))
    assert least_s <= caught.value.retry_after_s <= most_s


async def test_the_wait_that_was_asked_for_is_kept_before_another_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("nanovllm.pipeline.stages.retry.asyncio.sleep", sleep)
    asked = FetchFailed("429")
    asked.retry_after_s = 7.0
    failures = [asked, FetchFailed("503")]

    async def attempt() -> str:
        if failures:
            raise failures.pop(0)
        return "read"

    retry = Retry(ActiveFaults(Health(), Metrics(), lapse_s=1.0), Backoff(0.001, 0.001), Metrics())
    assert await retry(attempt, "image host", Progress(time.monotonic()), max_attempts=3) == "read"
    assert slept[0] == 7.0
    assert slept[1] <= 0.001


def threads_at_work() -> int:
    """Threads of the fetcher that run a call: those that wait for one stand in ``SimpleQueue.get``."""
    frames = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    working = 0
    for ident, frame in frames.items():
        if names.get(ident) == THREADS:
            one: Any = frame
            while one is not None and one.f_code.co_name != "_read":
                one = one.f_back
            working += one is not None
    return working


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: ", b""])
async def test_a_host_that_sends_byte_by_byte_is_left_and_its_thread_ends(host: ImageHost, head: bytes) -> None:
    over = threading.Event()
    host.answers["/slow"] = send_raw(head, b"x", until=over)
    try:
        with pytest.raises(FetchFailed, match=r"not read within 0\.3 s"):
            await fetch(fetcher_for(host, image_timeout_s=0.3), host.uri("/slow"))
        await eventually(lambda: threads_at_work() == 0)
    finally:
        over.set()


async def test_a_host_that_never_ends_its_handshake_is_left_and_its_thread_ends(host: ImageHost) -> None:
    """What listens speaks no TLS: it waits for a line that ends."""
    settings = {"allow": (f"images.test:{host.port}",), "image_timeout_s": 0.3, "connect_timeout_s": 60.0}
    with pytest.raises(FetchFailed):
        await fetch(fetcher_for(host, **settings), f"https://images.test:{host.port}/")
    await eventually(lambda: threads_at_work() == 0)


async def test_a_silent_host_is_left(host: ImageHost) -> None:
    over = threading.Event()
    host.answers["/silent"] = lambda _: over.wait(30) and None
    try:
        with pytest.raises(FetchFailed, match="broke off: TimeoutError"):
            await fetch(fetcher_for(host, read_timeout_s=0.2), host.uri("/silent"))
    finally:
        over.set()


async def test_a_job_that_ends_leaves_no_thread_behind(host: ImageHost) -> None:
    over = threading.Event()
    host.answers["/slow"] = send_raw(b"HTTP/1.1 200 OK\r\n\r\n", b"x", until=over)
    try:
        reading = asyncio.create_task(fetch(fetcher_for(host), host.uri("/slow")))
        await eventually(lambda: bool(host.asked))
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await eventually(lambda: threads_at_work() == 0)
    finally:
        over.set()


async def test_an_entity_tag_that_the_job_names_must_be_the_images(host: ImageHost) -> None:
    host.answers["/a.png"] = send(body=b"bytes", headers={"ETag": '"tag"'})
    fetcher = fetcher_for(host)
    assert (await fetch(fetcher, host.uri("/a.png"), etag="tag")).data == b"bytes"
    assert host.asked[0][1]["if-match"] == '"tag"'
    with pytest.raises(ObjectChanged, match="another entity tag"):
        await fetch(fetcher, host.uri("/a.png"), etag="other")
    with pytest.raises(ObjectChanged, match="promised"):
        await fetch(fetcher, host.uri("/a.png"), sha256="0" * 64)


async def test_an_image_that_is_held_is_sent_again_only_where_it_has_changed(host: ImageHost) -> None:
    host.answers["/a.png"] = send(body=b"bytes", headers={"ETag": '"tag"'})
    fetcher, ref = fetcher_for(host), ImageRef(uri=host.uri("/a.png"))
    held = await fetcher.fetch(ref)
    host.answers["/a.png"] = send(304)
    assert await fetcher.fetch(ref, held=held) is held
    assert host.asked[1][1]["if-none-match"] == '"tag"'


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://images.test/a.png?X-Amz-Signature=s", "https://images.test/a.png"),
        ("https://user:s@images.test/a.png#s", "https://images.test/a.png"),
        ("HTTPS://images.test?s", "HTTPS://images.test"),
        (" https:/images.test/a.png?s\n?", " https:/images.test/a.png"),
        ("https:\\\\images.test?s", "https:\\\\images.test"),
        ("s3://bucket/a?b#c", "s3://bucket/a?b#c"),
    ],
)
def test_a_uri_is_shown_without_what_can_be_a_secret(uri: str, shown: str) -> None:
    assert without_secrets(uri) == shown
    letter = {"images": [uri, {"uri": uri}], "messages": [{"content": [{"image_url": {"url": uri}}]}]}
    names = input_names(json.dumps(letter).encode())
    assert set(names) == {shown}


async def test_a_job_with_an_image_over_https_is_answered(
    bench: Bench, secure_host: ImageHost, certificate: Path
) -> None:
    secure_host.answers["/a.png"] = send(body=png())
    uri = secure_host.uri("/a.png?X-Amz-Signature=hunter2")
    chat = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri}}]}]
    await bench.send({"job_id": "named", "prompt": "<|image|>", "images": [uri]}, {"job_id": "chat", "messages": chat})
    http = settings_for(secure_host, ca_file=certificate)
    async with bench.working(EchoEngine(), http_images=http):
        results = await bench.results(2)
    for result in results.values():
        (used,) = result["inputs"]
        assert (used["uri"], used["width"], used["height"]) == (secure_host.uri("/a.png"), 8, 6)
        assert used["sha256"] == hashlib.sha256(png()).hexdigest()


async def test_what_a_signed_url_holds_comes_out_nowhere(
    bench: Bench, host: ImageHost, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(request: Request) -> BaseException | None:
        return RuntimeError("fault") if request.request_id.startswith("internal") else None

    secret = "hunter2"
    host.answers["/a.png"] = send(body=png())
    host.answers["/broken.png"] = send(body=b"no image")
    host.answers["/away"] = send(302, headers={"Location": f"http://elsewhere.test/?token={secret}"})
    host.answers["/loop"] = send(302, headers={"Location": f"/loop?token={secret}"})
    host.answers["/busy"] = send(503)
    query = f"?X-Amz-Signature={secret}"
    uris = {
        "answered": host.uri(f"/a.png{query}"),
        "internal": host.uri(f"/a.png{query}"),
        "missing": host.uri(f"/none{query}"),
        "broken": host.uri(f"/broken.png{query}"),
        "away": host.uri(f"/away{query}"),
        "loop": host.uri(f"/loop{query}"),
        "busy": host.uri(f"/busy{query}"),
        "forbidden": f"https://elsewhere.test/{query}",
        "user": f"https://user:{secret}@images.test/",
        "invalid": f"https://images.test:x/{query}",
    }
    expected = {
        "internal": "internal",
        "missing": "object_not_found",
        "broken": "invalid_image",
        "away": "forbidden_uri",
        "loop": "url_refused",
        "busy": "fetch_failed",
        "forbidden": "forbidden_uri",
        "user": "invalid_job",
        "invalid": "invalid_job",
        "several": "object_not_found",
    }
    jobs = [{"job_id": name, "prompt": "<|image|>", "images": [uri]} for name, uri in uris.items()]
    jobs.append({"job_id": "several", "prompt": "<|image|>" * 2, "images": [uris["answered"], uris["missing"]]})
    with caplog.at_level(logging.DEBUG, logger="nanovllm"):
        await bench.send(*jobs)
        async with bench.working(EchoEngine(fault=fault), http_images=settings_for(host)):
            records = await bench.read(bench.settings.topics.dead_letters, len(expected))
            results = await bench.read(bench.settings.topics.results, 1)
            metrics = await bench.read(bench.settings.topics.metrics, 1)
            await eventually(lambda: reached(bench, len(jobs)))
    letters = {
        dict(record.headers)["nanovllm_job_id"].decode(): dict(record.headers)["nanovllm_code"].decode()
        for record in records
    }
    assert letters == expected
    named = [DeadLetterRecord.from_record(record).inputs for record in records]
    told = {
        "results": repr([(one.key, one.value, one.headers) for one in (*results, *metrics)]),
        "dead letters": repr([(one.key, one.headers) for one in records]),
        "names in dead letters": repr(named),
        "logs": caplog.text,
        "metrics": bench.metrics.exposition().decode(),
    }
    assert [where for where, text in told.items() if secret in text] == []
    assert "/none" in told["names in dead letters"]


async def test_a_host_that_fails_stops_neither_the_store_nor_other_hosts(
    bench: Bench, host: ImageHost, images: Any
) -> None:
    """Neither the circuit of the store nor its held buckets count what a host answers."""
    host.answers["/a.png"] = send(body=png())
    number = 25  # more than the different objects that open the circuit, or hold a bucket back
    for n in range(number):
        host.answers[f"/busy{n}"], host.answers[f"/denied{n}"] = send(503), send(403)
    bad = [host.uri(f"/{kind}{n}") for kind in ("busy", "denied") for n in range(number)]
    good = {"s3": images("good.png", png("blue")), "http": host.uri("/a.png")}
    await bench.send(*({"prompt": "<|image|>", "images": [uri]} for uri in bad))
    async with bench.working(EchoEngine(), http_images=settings_for(host)):
        await bench.dead_letters(len(bad))
        assert bench.health.systemic is None
        await bench.send(*({"job_id": name, "prompt": "<|image|>", "images": [uri]} for name, uri in good.items()))
        assert set(await bench.results(2)) == {"s3", "http"}
