"""Sidecars on moto and on a real S3 server: which record stays, whoever writes first."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from botocore.exceptions import ClientError
from hypothesis import given
from hypothesis import strategies as st
from parts import S3Part

from nanovllm.errors import FetchFailed, InvalidInput, ObjectNotFound, SidecarTaken
from nanovllm.objects import conditional_put
from nanovllm.objects.s3_client import S3Client
from nanovllm.settings.s3 import S3Settings
from nanovllm.sinks.sidecar import (
    CONTENT_TYPES,
    MAX_REPLACEMENTS,
    Sidecar,
    SidecarMetadata,
    SourceVersion,
    is_sidecar,
    sidecar_uri,
)

BESIDE = "s3://{bucket}/{key}.json"
KEY = "in/50+ü &%日本.pdf"


@pytest.fixture(
    params=[
        "s3",
        pytest.param("versity_s3", marks=pytest.mark.s3),
        pytest.param("minio_s3", marks=pytest.mark.minio),
    ]
)
def store(request: pytest.FixtureRequest) -> S3Part:
    part: S3Part = request.getfixturevalue(request.param)
    return part


def call_of(store: S3Part) -> Callable[[Callable[[Any], Any]], Any]:
    return S3Client(S3Settings(endpoint_url=store.endpoint_url, addressing_style="path")).call


def by_number(one: SourceVersion, other: SourceVersion) -> bool | None:
    """Sequencers that are numbers; None where one has none, as after a reconciliation."""
    if one.sequencer is None or other.sequencer is None:
        return None
    return int(one.sequencer) > int(other.sequencer)


def sidecar_of(store: S3Part) -> Sidecar:
    return Sidecar(call_of(store), by_number)


def metadata_of(bucket: str, sequencer: int | None, *, etag: str | None = None, route: str = "r1") -> SidecarMetadata:
    source = SourceVersion(
        bucket,
        KEY,
        etag=etag or f"etag-{sequencer}",
        sequencer=None if sequencer is None else str(sequencer),
        event_time=datetime(2026, 1, 1, tzinfo=UTC),
        dialect="aws",
    )
    return SidecarMetadata("job", "model@1", route, source)


def there(store: S3Part, bucket: str) -> tuple[str, SidecarMetadata | None]:
    answer = store.client.get_object(Bucket=bucket, Key=f"{KEY}.json")
    return answer["Body"].read().decode().strip(), SidecarMetadata.of(answer["Metadata"], bucket, KEY)


class Spoiled:
    """A client whose ``put_object`` is preceded by one of ``before`` each."""

    def __init__(self, client: Any, before: list[Callable[[], None]]) -> None:
        self._client, self._before = client, before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def put_object(self, **request: Any) -> Any:
        if self._before:
            self._before.pop(0)()
        return self._client.put_object(**request)


def spoiled_sidecar(store: S3Part, *before: Callable[[], None]) -> Sidecar:
    client, call = Spoiled(store.client, list(before)), call_of(store)
    return Sidecar(lambda operation: call(lambda _: operation(client)), by_number)


def conflict() -> None:
    answer = {"Error": {"Code": "ConditionalRequestConflict"}, "ResponseMetadata": {"HTTPStatusCode": 409}}
    raise ClientError(answer, "PutObject")  # type: ignore[arg-type]


async def test_a_record_is_written_once_for_a_version_and_a_route(store: S3Part) -> None:
    bucket = store.make_bucket()
    uri, sidecar = sidecar_uri(BESIDE, bucket, KEY), sidecar_of(store)
    one = metadata_of(bucket, 1)
    assert await sidecar.put(uri, b'{"n":1}', one, "json") == "written"
    assert await sidecar.put(uri, b'{"n":"again"}', replace(one, job_id="another"), "json") == "same"
    assert there(store, bucket) == ('{"n":1}', one)
    assert await sidecar.read(uri, bucket, KEY) == one
    answer = store.client.head_object(Bucket=bucket, Key=f"{KEY}.json")
    assert answer["ContentType"] == "application/json"
    assert is_sidecar(answer["Metadata"])
    assert not is_sidecar({"owner": "x"})


async def test_a_newer_version_replaces_and_an_older_one_is_superseded(store: S3Part) -> None:
    bucket = store.make_bucket()
    uri, sidecar = sidecar_uri(BESIDE, bucket, KEY), sidecar_of(store)
    outcomes = [await sidecar.put(uri, b'{"n":%d}' % n, metadata_of(bucket, n), "json") for n in (5, 4, 6, 6, 5)]
    assert outcomes == ["written", "superseded", "written", "same", "superseded"]
    assert there(store, bucket) == ('{"n":6}', metadata_of(bucket, 6))


async def test_another_route_digest_replaces_the_record_of_the_same_version(store: S3Part) -> None:
    bucket = store.make_bucket()
    uri, sidecar = sidecar_uri(BESIDE, bucket, KEY), sidecar_of(store)
    await sidecar.put(uri, b"{}", metadata_of(bucket, 5), "json")
    changed = metadata_of(bucket, 5, route="r2")
    assert await sidecar.put(uri, b"[]", changed, "json") == "written"
    assert await sidecar.put(uri, b"0", metadata_of(bucket, 4, route="r2"), "json") == "superseded"
    assert there(store, bucket) == ("[]", changed)


async def test_of_many_writers_at_once_the_newest_version_stays(store: S3Part) -> None:
    bucket = store.make_bucket()
    uri, sidecar = sidecar_uri(BESIDE, bucket, KEY), sidecar_of(store)
    numbers = [*range(8), *range(8)]
    random.Random(1).shuffle(numbers)
    puts = (sidecar.put(uri, b'{"n":%d}' % n, metadata_of(bucket, n), "json") for n in numbers)
    outcomes = await asyncio.gather(*puts)
    assert there(store, bucket) == ('{"n":7}', metadata_of(bucket, 7))
    newest = [outcome for number, outcome in zip(numbers, outcomes, strict=True) if number == 7]
    assert sorted(newest) == ["same", "written"]


async def test_the_sequencer_moves_on_when_content_comes_back(store: S3Part) -> None:
    """A, B, A: the late record of B must not replace that of the second A."""
    bucket = store.make_bucket()
    uri, sidecar = sidecar_uri(BESIDE, bucket, KEY), sidecar_of(store)
    assert await sidecar.put(uri, b"A", metadata_of(bucket, 1, etag="a"), "json") == "written"
    assert await sidecar.put(uri, b"A", metadata_of(bucket, 3, etag="a"), "json") == "written"
    assert await sidecar.put(uri, b"B", metadata_of(bucket, 2, etag="b"), "json") == "superseded"


async def test_if_match_tells_records_of_equal_text_apart(store: S3Part) -> None:
    bucket = store.make_bucket()
    uri, sidecar = sidecar_uri(BESIDE, bucket, KEY), sidecar_of(store)
    await sidecar.put(uri, b"A", metadata_of(bucket, 1, etag="a"), "json")

    def write_third() -> None:
        asyncio.run(sidecar_of(store).put(uri, b"A", metadata_of(bucket, 3, etag="a"), "json"))

    late = spoiled_sidecar(store, lambda: None, write_third)
    assert await late.put(uri, b"B", metadata_of(bucket, 2, etag="b"), "json") == "superseded"
    assert there(store, bucket) == ("A", metadata_of(bucket, 3, etag="a"))


async def test_a_writer_that_comes_between_is_read_again(store: S3Part) -> None:
    bucket = store.make_bucket()
    uri, other = sidecar_uri(BESIDE, bucket, KEY), sidecar_of(store)

    def write(number: int) -> Callable[[], None]:
        return lambda: void(asyncio.run(other.put(uri, b"%d" % number, metadata_of(bucket, number), "json")))

    def void(_: object) -> None: ...

    def delete() -> None:
        store.client.delete_object(Bucket=bucket, Key=f"{KEY}.json")

    raced = spoiled_sidecar(store, write(1), write(2), lambda: None, delete)
    assert await raced.put(uri, b"5", metadata_of(bucket, 5), "json") == "written"
    assert there(store, bucket)[0] == "5"
    raced = spoiled_sidecar(store, lambda: None, write(7))
    assert await raced.put(uri, b"6", metadata_of(bucket, 6), "json") == "superseded"
    assert there(store, bucket)[0] == "7"


async def test_where_events_do_not_tell_the_source_itself_does(store: S3Part) -> None:
    bucket = store.make_bucket()
    uri, sidecar = sidecar_uri(BESIDE, bucket, KEY), sidecar_of(store)
    old = store.client.put_object(Bucket=bucket, Key=KEY, Body=b"old")["ETag"].strip('"')
    now = store.client.put_object(Bucket=bucket, Key=KEY, Body=b"new")["ETag"].strip('"')
    late, current = metadata_of(bucket, None, etag=old), metadata_of(bucket, None, etag=now)
    assert await sidecar.put(uri, b"late", late, "json") == "written"
    assert await sidecar.put(uri, b"now", current, "json") == "written"
    assert await sidecar.put(uri, b"late", late, "json") == "superseded"
    assert there(store, bucket) == ("now", current)
    store.client.delete_object(Bucket=bucket, Key=KEY)
    assert await sidecar.put(uri, b"late", late, "json") == "superseded"


async def test_what_is_no_record_of_this_source_is_not_overwritten(store: S3Part) -> None:
    bucket, sidecar = store.make_bucket(), sidecar_of(store)
    store.put(bucket, f"{KEY}.json", b"a user's own")
    uri = sidecar_uri(BESIDE, bucket, KEY)
    with pytest.raises(SidecarTaken, match="another object"):
        await sidecar.put(uri, b"{}", metadata_of(bucket, 1), "json")
    assert await sidecar.read(uri, bucket, KEY) is None
    assert store.client.get_object(Bucket=bucket, Key=f"{KEY}.json")["Body"].read() == b"a user's own"


async def test_siblings_have_records_of_their_own_and_a_shared_place_is_noticed(store: S3Part) -> None:
    bucket, sidecar = store.make_bucket(), sidecar_of(store)
    keys = ["a.pdf", "a", "a.pdf.json", "sub/a.pdf"]
    for key in keys:
        source = SourceVersion(bucket, key, etag="e", sequencer="1")
        one = SidecarMetadata("j", "m", "r", source)
        assert await sidecar.put(sidecar_uri(BESIDE, bucket, key), key.encode(), one, "json") == "written"
    for key in keys:
        found = await sidecar.read(sidecar_uri(BESIDE, bucket, key), bucket, key)
        assert found is not None
        assert found.source.key == key
    template = f"s3://{bucket}/records/{{key}}.json"
    for other in ("other", "another"):
        one = SidecarMetadata("j", "m", "r", SourceVersion(other, "x.pdf", etag="e", sequencer="1"))
        put = sidecar.put(sidecar_uri(template, other, "x.pdf"), b"{}", one, "json")
        if other == "other":
            assert await put == "written"
        else:
            with pytest.raises(SidecarTaken, match=r"x\.pdf"):
                await put


@pytest.mark.parametrize("fmt", ["json", "jsonl", "markdown"])
async def test_each_format_has_its_content_type_and_its_text(s3: S3Part, fmt: Any) -> None:
    bucket = s3.make_bucket()
    uri = f"s3://{bucket}/out"
    text = '{"a": 1}\n{"a": 2}\n'
    await sidecar_of(s3).put(uri, text.encode(), metadata_of(bucket, 1), fmt)
    answer = s3.client.get_object(Bucket=bucket, Key="out")
    assert answer["ContentType"] == CONTENT_TYPES[fmt]
    body = answer["Body"].read().decode()
    assert [line.rstrip() for line in body.splitlines()] == text.splitlines()
    await sidecar_of(s3).put(f"s3://{bucket}/empty", b"", metadata_of(bucket, 1), fmt)
    assert s3.client.get_object(Bucket=bucket, Key="empty")["Body"].read() == b""


async def test_409_is_tried_again_and_is_transient_at_last(s3: S3Part, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditional_put, "_FIRST_WAIT_S", 0.0)
    bucket = s3.make_bucket()
    uri, one = sidecar_uri(BESIDE, bucket, KEY), metadata_of(bucket, 1)
    tries = conditional_put.MAX_CONFLICTS
    with pytest.raises(FetchFailed, match="ConditionalRequestConflict"):
        await spoiled_sidecar(s3, *[conflict] * tries).put(uri, b"{}", one, "json")
    assert await spoiled_sidecar(s3, *[conflict] * (tries - 1)).put(uri, b"{}", one, "json") == "written"
    two = metadata_of(bucket, 2)
    assert await spoiled_sidecar(s3, conflict, conflict).put(uri, b"{}", two, "json") == "written"


async def test_writers_that_always_come_between_are_a_transient_failure(s3: S3Part) -> None:
    bucket = s3.make_bucket()
    uri, other = sidecar_uri(BESIDE, bucket, KEY), sidecar_of(s3)
    number = iter(range(1, 1_000))

    def write() -> None:
        n = next(number)
        asyncio.run(other.put(uri, b"%d" % n, metadata_of(bucket, n), "json"))

    raced = spoiled_sidecar(s3, *[write] * (2 * MAX_REPLACEMENTS))
    with pytest.raises(FetchFailed, match="other writers"):
        await raced.put(uri, b"x", metadata_of(bucket, 5_000), "json")


async def test_a_missing_bucket_and_a_wrong_place_are_named(store: S3Part) -> None:
    with pytest.raises(ObjectNotFound):
        await sidecar_of(store).put("s3://no-such-bucket-here/a.json", b"{}", metadata_of("b", 1), "json")
    with pytest.raises(InvalidInput, match="not the URI"):
        await sidecar_of(store).put("s3://bucket", b"{}", metadata_of("b", 1), "json")
    with pytest.raises(InvalidInput, match="too long"):
        sidecar_uri(BESIDE, "bucket", "x" * 1_020)


async def test_long_and_strange_values_fit_the_metadata_of_a_real_server(store: S3Part) -> None:
    bucket = store.make_bucket()
    uri, sidecar = sidecar_uri(BESIDE, bucket, KEY), sidecar_of(store)
    long = "ü\n日" * 500
    source = SourceVersion(bucket, KEY, "v" * 1_024, long, "9" * 1_024, datetime.now(UTC), long)
    one = SidecarMetadata(long, long, long, source)
    assert await sidecar.put(uri, b"{}", one, "json") == "written"
    assert await Sidecar(call_of(store), lambda *_: None).put(uri, b"{}", one, "json") == "same"
    other = replace(one, source=replace(source, version_id="w" * 1_024))
    assert await Sidecar(call_of(store), lambda *_: False).put(uri, b"{}", other, "json") == "superseded"


@given(st.builds(SourceVersion, *[st.text()] * 2, *[st.none() | st.text()] * 3, st.none(), st.none() | st.text()))
def test_metadata_is_ascii_bounded_and_says_the_same_when_read(source: SourceVersion) -> None:
    headers = SidecarMetadata(source.key, source.bucket, source.key, source).to_headers()
    assert sum(len(name) + len(value) for name, value in headers.items()) < 2_048
    assert all(value.isascii() and value.isprintable() and " " not in value for value in headers.values())
    read = SidecarMetadata.of(headers, source.bucket, source.key)
    assert read is not None
    assert SidecarMetadata.of(read.to_headers(), source.bucket, source.key) == read
    assert SidecarMetadata.of(headers, source.bucket, source.key + "x") is None
    assert read.is_done_by(SidecarMetadata(source.key, source.bucket, source.key, source)) == (
        source.has_content_of(source)
    )


def test_a_place_takes_the_keys_own_braces_as_they_are() -> None:
    assert sidecar_uri("s3://out/{bucket}/{key}.md", "in", "{bucket}/{key}") == "s3://out/in/{bucket}/{key}.md"


async def test_304_is_a_failed_condition_too(s3: S3Part) -> None:
    bucket = s3.make_bucket()
    uri, one = sidecar_uri(BESIDE, bucket, KEY), metadata_of(bucket, 1)
    await sidecar_of(s3).put(uri, b"{}", one, "json")

    def not_modified() -> None:
        answer = {"Error": {"Code": "304"}, "ResponseMetadata": {"HTTPStatusCode": 304}}
        raise ClientError(answer, "PutObject")  # type: ignore[arg-type]

    assert await spoiled_sidecar(s3, not_modified).put(uri, b"{}", one, "json") == "same"
