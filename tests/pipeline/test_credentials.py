"""Credentials that cannot be had are nobody's job's fault: real boto3, an STS that refuses, and the queue behind it."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from bench import Bench, eventually, png, reached
from parts import S3Part
from prometheus_client import Counter
from world import World

from nanovllm.client.producer import JobProducer
from nanovllm.client.upload import ImageUploader
from nanovllm.demo.child_process import free_port
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import ConfigurationError, CredentialsRefused, SystemicError
from nanovllm.messages.job import ImageRef
from nanovllm.objects.fetch import ObjectFetcher
from nanovllm.objects.s3_client import S3Client, check_settings
from nanovllm.settings.s3 import S3Settings
from nanovllm.sinks.claim_check import S3ResultStore

ROLE = "arn:aws:iam::123456789012:role/secret-role"
MISSING_SCHEME = "secret-host:9000"


class TokenService:
    """What STS answers to AssumeRoleWithWebIdentity: ``code`` as an error, or else credentials."""

    def __init__(self) -> None:
        self.code: str | None = None
        self.status = 400
        self.lasts_s = 86_400
        self.refused_at: list[float] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                status, body = service.answer()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self) -> tuple[int, bytes]:
        self.refused_at += [time.monotonic()] if self.code is not None else []
        namespace = 'xmlns="https://sts.amazonaws.com/doc/2011-06-15/"'
        if self.code is not None:
            said = f"<Type>Sender</Type><Code>{self.code}</Code><Message>{ROLE} may not</Message>"
            return self.status, f"<ErrorResponse {namespace}><Error>{said}</Error></ErrorResponse>".encode()
        expires = (datetime.now(UTC) + timedelta(seconds=self.lasts_s)).strftime("%Y-%m-%dT%H:%M:%SZ")
        credentials = (
            "<AccessKeyId>test</AccessKeyId><SecretAccessKey>testsecret</SecretAccessKey>"
            f"<SessionToken>token</SessionToken><Expiration>{expires}</Expiration>"
        )
        result = (
            f"<AssumeRoleWithWebIdentityResult><Credentials>{credentials}</Credentials>"
            f"<AssumedRoleUser><Arn>{ROLE}</Arn><AssumedRoleId>id:s</AssumedRoleId></AssumedRoleUser>"
            "</AssumeRoleWithWebIdentityResult>"
        )
        name = "AssumeRoleWithWebIdentityResponse"
        return 200, f"<{name} {namespace}>{result}</{name}>".encode()


@pytest.fixture
def sts() -> Iterator[TokenService]:
    service = TokenService()
    thread = threading.Thread(target=service.server.serve_forever, daemon=True)
    thread.start()
    yield service
    service.server.shutdown()
    service.server.server_close()
    thread.join(5)


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Replaces the AWS SDK's variables; its configuration file is ``config`` in the test's own directory."""

    def replace(variables: Mapping[str, str], config: str = "") -> None:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        (tmp_path / "config").write_text(config)
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return replace


def web_identity(sts: TokenService, directory: Path) -> dict[str, str]:
    (directory / "token").write_text("a-web-identity-token")
    return {
        "AWS_ROLE_ARN": ROLE,
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(directory / "token"),
        "AWS_ENDPOINT_URL_STS": sts.url,
    }


def settings_for(s3: S3Part, **more: Any) -> S3Settings:
    return S3Settings(endpoint_url=s3.endpoint_url, addressing_style="path", allow=("s3://images",), **more)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "ExpiredTokenException"),
        (400, "InvalidIdentityToken"),
        (400, "IDPCommunicationError"),
        (403, "AccessDenied"),
        (400, "ValidationError"),
        (404, "NoSuchKey"),
        (403, "RegionDisabledException"),
        (429, "Throttling"),
        (503, "ServiceUnavailable"),
    ],
)
async def test_what_the_token_service_answers_is_no_objects_fault(
    s3: S3Part,
    object_client: str,
    images: Callable[[str, bytes], str],
    aws: Callable[..., None],
    sts: TokenService,
    tmp_path: Path,
    status: int,
    code: str,
) -> None:
    uri = images("k", b"bytes")
    aws(web_identity(sts, tmp_path))
    fetcher = ObjectFetcher(settings_for(s3, client=object_client), max_bytes=10)
    sts.status, sts.code = status, code
    for key in ("k", "missing"):
        with pytest.raises(CredentialsRefused, match=f"AssumeRoleWithWebIdentity answered {status} {code}$") as caught:
            await fetcher.fetch(ImageRef(uri=f"s3://images/{key}"))
        assert_says_no_secret(caught.value, sts.url)
    sts.code = None
    assert (await fetcher.fetch(ImageRef(uri=uri))).data == b"bytes", "credentials are fetched anew"
    fetcher.close()


async def test_credentials_that_end_and_cannot_be_renewed_are_no_objects_fault_either(
    s3: S3Part,
    images: Callable[[str, bytes], str],
    aws: Callable[..., None],
    sts: TokenService,
    tmp_path: Path,
) -> None:
    uri = images("k", b"bytes")
    aws(web_identity(sts, tmp_path))
    # The SDK renews what ends within ten minutes before it uses it.
    sts.lasts_s = 300
    fetcher = ObjectFetcher(settings_for(s3), max_bytes=10)
    assert (await fetcher.fetch(ImageRef(uri=uri))).data == b"bytes"
    sts.code = "InvalidIdentityToken"
    with pytest.raises(CredentialsRefused, match="InvalidIdentityToken"):
        await fetcher.fetch(ImageRef(uri=uri))
    sts.code = None
    (tmp_path / "token").unlink()
    with pytest.raises(CredentialsRefused, match="FileNotFoundError"):
        await fetcher.fetch(ImageRef(uri=uri))
    web_identity(sts, tmp_path)
    assert (await fetcher.fetch(ImageRef(uri=uri))).data == b"bytes"
    fetcher.close()


CHAINS = {
    "a profile that is not there": ({"AWS_PROFILE": "absent"}, ""),
    "a role that is too short": (
        {"AWS_PROFILE": "p"},
        "[profile p]\nrole_arn=x\nsource_profile=b\n[profile b]\naws_access_key_id=a\naws_secret_access_key=b\n",
    ),
    "a source profile that is not there": ({"AWS_PROFILE": "p"}, f"[profile p]\nrole_arn={ROLE}\nsource_profile=b\n"),
    "SSO without a login": (
        {"AWS_PROFILE": "p"},
        "[profile p]\nsso_session=s\nsso_account_id=1\nsso_role_name=r\n"
        "[sso-session s]\nsso_region=us-east-1\nsso_start_url=https://secret.example/start\n",
    ),
    "a process that fails": ({"AWS_PROFILE": "p"}, "[profile p]\ncredential_process=/bin/false secret-argument\n"),
    "a process that says no JSON": ({"AWS_PROFILE": "p"}, "[profile p]\ncredential_process=/bin/echo secret\n"),
    "half a key": ({"AWS_ACCESS_KEY_ID": "secret-id"}, ""),
    "a key with its line break": ({"AWS_ACCESS_KEY_ID": "secret-id\n", "AWS_SECRET_ACCESS_KEY": "b"}, ""),
    "a token with its line break": (
        {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_SESSION_TOKEN": "secret\n"},
        "",
    ),
    "a token file that is not there": ({"AWS_ROLE_ARN": ROLE, "AWS_WEB_IDENTITY_TOKEN_FILE": "/secret/token"}, ""),
    "an empty token file": ({"AWS_ROLE_ARN": ROLE, "AWS_WEB_IDENTITY_TOKEN_FILE": "/dev/null"}, ""),
    "a token service that is not there": (
        {
            "AWS_ROLE_ARN": ROLE,
            "AWS_WEB_IDENTITY_TOKEN_FILE": __file__,
            "AWS_ENDPOINT_URL_STS": "http://secret:x@127.0.0.1:9",
        },
        "",
    ),
    "a metadata service that is not there": ({"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://127.0.0.1:9/secret"}, ""),
    "a metadata service elsewhere": ({"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://secret.example/"}, ""),
    "a configuration file that is none": ({}, "secret ["),
    "nothing at all": ({}, ""),
}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())
async def test_a_broken_chain_is_systemic_and_is_tried_anew(
    s3: S3Part,
    object_client: str,
    images: Callable[[str, bytes], str],
    aws: Callable[..., None],
    chain: tuple[dict[str, str], str],
) -> None:
    variables, config = chain
    uri = images("k", b"bytes")
    aws(variables, config)
    settings = settings_for(s3, client=object_client)
    fetcher = ObjectFetcher(settings, max_bytes=10)
    store = S3ResultStore("s3://images/results", S3Client(settings).call)
    with pytest.raises(CredentialsRefused) as caught:
        await fetcher.fetch(ImageRef(uri=uri))
    assert_says_no_secret(caught.value)
    with pytest.raises(CredentialsRefused) as refused:
        await store.put("name", b"text", "json")
    assert_says_no_secret(refused.value)
    aws(s3.environment)
    assert (await fetcher.fetch(ImageRef(uri=uri))).data == b"bytes"
    assert (await store.put("name", b"text", "json")).size == 4
    fetcher.close()


WRONG = {
    "no profile": ({"AWS_PROFILE": "absent"}, {}, "no AWS profile 'absent'"),
    "no scheme": ({}, {"endpoint_url": MISSING_SCHEME}, "no URL such as http://minio:9000"),
    "no scheme in the environment": ({"AWS_ENDPOINT_URL_S3": MISSING_SCHEME}, {"endpoint_url": None}, "no URL such as"),
    "another scheme": ({}, {"endpoint_url": f"ftp://{MISSING_SCHEME}"}, "no URL such as"),
    "no region": ({}, {"region": "eu west"}, "'eu west' is no region"),
    "no region in the environment": ({"AWS_DEFAULT_REGION": "eu_west!"}, {}, "'eu_west!' is no region"),
    "no retry mode": ({"AWS_DEFAULTS_MODE": "bogus"}, {}, "InvalidDefaultsMode"),
}


@pytest.mark.parametrize(("variables", "settings", "says"), WRONG.values(), ids=WRONG.keys())
async def test_what_can_never_work_is_known_before_a_job_comes_and_is_systemic_later(
    s3: S3Part,
    object_client: str,
    aws: Callable[..., None],
    variables: dict[str, str],
    settings: dict[str, Any],
    says: str,
) -> None:
    aws({"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", **variables})
    wrong = S3Settings.model_validate({**settings_for(s3, client=object_client).model_dump(), **settings})
    with pytest.raises(ConfigurationError, match=says) as caught:
        check_settings(wrong)
    assert_says_no_secret(caught.value)
    with pytest.raises(ConfigurationError, match=says):
        ImageUploader("s3://images", wrong)
    fetcher = ObjectFetcher(wrong, max_bytes=10)
    with pytest.raises(SystemicError) as later:
        await fetcher.fetch(ImageRef(uri="s3://images/k"))
    assert_says_no_secret(later.value)


def test_what_may_work_later_does_not_keep_a_worker_from_its_start(s3: S3Part, aws: Callable[..., None]) -> None:
    for variables, config in CHAINS.values():
        if variables != {"AWS_PROFILE": "absent"} and config != "secret [":
            aws(variables, config)
            check_settings(settings_for(s3))


async def test_an_upload_says_why_it_has_no_credentials(s3: S3Part, aws: Callable[..., None]) -> None:
    aws({})
    uploader = ImageUploader("s3://images", settings_for(s3))
    with pytest.raises(SystemicError, match=r"bucket images: .*NoCredentialsError"):
        await uploader.upload(b"x")


@pytest.mark.parametrize("large_results", [False, True], ids=["images", "large results"])
async def test_no_job_is_buried_while_no_credentials_can_be_had_and_all_are_answered_afterwards(
    bench: Bench,
    s3: S3Part,
    images: Callable[[str, bytes], str],
    aws: Callable[..., None],
    sts: TokenService,
    tmp_path: Path,
    large_results: bool,
) -> None:
    uri = images("k.png", png())
    aws(web_identity(sts, tmp_path))
    sts.code = "ExpiredTokenException"
    settings = bench.settings.s3
    asked: dict[str, Any] = {"prompt": "<|image|>", "images": [uri]}
    if large_results:
        settings = settings.model_copy(update={"large_results": "s3://images/results", "large_result_bytes": 1})
        asked = {"prompt": "p"}
    await bench.send(*({"job_id": f"j{number}", **asked} for number in range(30)))
    async with bench.working(EchoEngine(), s3=settings):
        await eventually(lambda: any("ExpiredTokenException" in reason for reason in bench.health.unready))
        first = total(bench.metrics.retries)
        await eventually(lambda: total(bench.metrics.retries) > first + 60)
        assert any("AssumeRoleWithWebIdentity" in reason for reason in bench.health.unready)
        assert await bench.committed() in (None, 0)
        sts.code = None
        assert len(await bench.results(30)) == 30
        await eventually(lambda: reached(bench, 30))
        await eventually(lambda: bench.health.systemic is None)
    assert total(bench.metrics.dead_letters) == 0


async def test_a_worker_process_without_credentials_says_so_and_answers_all_once_it_has_some(
    embedded_broker: str, s3: S3Part, sts: TokenService, tmp_path: Path
) -> None:
    port = free_port()
    static = {name: "" for name in s3.environment if "KEY" in name}
    settings = {"NANOVLLM_ENGINE__BACKEND": "echo", "NANOVLLM_HTTP__PORT": str(port), "NANOVLLM_IMAGES__DECODERS": "1"}
    world = World(embedded_broker, s3, tmp_path, {**settings, **static, **web_identity(sts, tmp_path)})
    await world.create_topics()
    sts.code = "InvalidIdentityToken"
    uri = s3.put(world.bucket, "k.png", png())
    async with world.producer() as producer:
        for number in range(30):
            await producer.send("<|image|>", images=[uri], job_id=f"j{number}")
    worker = world.worker("worker")
    worker.start()
    try:
        async with world.reader() as reader:
            await eventually(lambda: "InvalidIdentityToken" in unready(port), 120)
            await asyncio.sleep(3)
            assert "InvalidIdentityToken" in unready(port)
            await world.read(reader)
            assert not world.results
            assert not world.dead_letters
            sts.code = None

            async def all_are_answered() -> bool:
                await world.read(reader)
                return len(world.results) == 30

            await eventually(all_are_answered, 120)
            assert not world.dead_letters
            await eventually(lambda: unready(port) == "", 60)
    finally:
        worker.kill()
    assert ROLE not in worker.tail(10_000)


@pytest.mark.kafka
@pytest.mark.proof
@pytest.mark.timeout(900)
async def test_a_token_service_that_dies_three_times_costs_no_job_and_readiness_follows(
    kafka_broker: str, s3: S3Part, sts: TokenService, tmp_path: Path
) -> None:
    """2,000 jobs, credentials that live for 30 s: not ready within 5 s of a refusal, ready within 10 s of its end."""
    port, jobs = free_port(), 2_000
    static = {name: "" for name in s3.environment if "KEY" in name}
    settings = {"NANOVLLM_ENGINE__BACKEND": "echo", "NANOVLLM_HTTP__PORT": str(port), "NANOVLLM_IMAGES__DECODERS": "1"}
    world = World(kafka_broker, s3, tmp_path, {**settings, **static, **web_identity(sts, tmp_path)})
    await world.create_topics()
    sts.lasts_s = 30
    uris = [s3.put(world.bucket, f"{number}.png", png()) for number in range(40)]
    changes: list[tuple[float, str]] = []  # of readiness

    async def watch() -> None:
        while True:
            said = await asyncio.to_thread(unready, port)
            if not changes or bool(changes[-1][1]) != bool(said):
                changes.append((time.monotonic(), said))
            await asyncio.sleep(0.1)

    async def send(producer: JobProducer, first: int, last: int) -> None:
        for number in range(first, last):
            await producer.send("<|image|>", images=[uris[number % len(uris)]], job_id=f"j{number}", reuse="none")
            await asyncio.sleep(0.02)

    worker = world.worker("worker")
    worker.start()
    watching = asyncio.create_task(watch())
    delays: list[tuple[float, float]] = []
    try:
        async with world.producer() as producer, world.reader() as reader:
            await eventually(lambda: unready(port) == "", 120)
            for outage in range(3):
                sending = asyncio.create_task(send(producer, outage * jobs // 3, (outage + 1) * jobs // 3))
                await asyncio.sleep(4)
                sts.refused_at.clear()
                begun = len(changes)
                sts.code = "ExpiredTokenException"
                await asyncio.sleep(15)
                sts.code, ended = None, time.monotonic()
                await eventually(lambda begun=begun: len(changes) >= begun + 2, 60)
                (fell, said), (rose, _) = changes[begun : begun + 2]
                assert "ExpiredTokenException" in said
                delays.append((fell - sts.refused_at[0], rose - ended))
                await sending

            async def all_are_answered() -> bool:
                await world.read(reader)
                return len(world.results) + len(world.dead_letters) >= jobs

            await eventually(all_are_answered, 300)
    finally:
        watching.cancel()
        worker.kill()
    assert not world.dead_letters
    assert len(world.results) == jobs
    assert max(fell for fell, _ in delays) < 5, delays
    assert max(rose for _, rose in delays) < 10, delays


def unready(port: int) -> str:
    """What ``/readyz`` gives as reasons; nothing where it answers 200, a line of its own where it does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10):
            return ""
    except urllib.error.HTTPError as error:
        return error.read().decode()
    except OSError:
        return "no answer"


def total(counter: Counter) -> float:
    return sum(sample.value for sample in counter.collect()[0].samples if sample.name.endswith("_total"))


def assert_says_no_secret(error: Exception, *more: str) -> None:
    said = str(error)
    for secret in ("secret", "127.0.0.1", "example", ROLE, "/dev", *more):
        assert secret not in said, said
