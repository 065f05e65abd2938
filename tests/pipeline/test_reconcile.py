"""Reconciliation: what has no record is found by listing or inventory, submitted, and told by the exit code."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import pytest
from inventories import put_inventory
from parts import S3Part, create_topic, unique_name

from nanovllm.cli.main import MISUSE, main
from nanovllm.client.connection import connected_consumer
from nanovllm.client.reconcile import Reconciler, created_event
from nanovllm.errors import InvalidInput
from nanovllm.objects.inventory import list_inventory, read_manifest
from nanovllm.objects.listing import ListedObject, ObjectPattern, list_objects
from nanovllm.objects.s3_client import S3Client
from nanovllm.pipeline.routing.routes import load_routes
from nanovllm.settings.kafka import KafkaSettings
from nanovllm.settings.s3 import S3Settings
from nanovllm.sinks.sidecar import Sidecar, SidecarMetadata, SourceVersion, sidecar_uri

BESIDE = "s3://{bucket}/{key}.json"
KEYS = ("in/a.pdf", "in/a b+c%41.pdf", "in/ü/日本:1.pdf", "in/a.pdf-2", "in/own.json")


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


def settings_of(store: S3Part) -> S3Settings:
    return S3Settings(endpoint_url=store.endpoint_url, addressing_style="path")


def put_sources(store: S3Part, keys: Iterable[str] = KEYS, *, versioned: bool = False) -> str:
    bucket = store.make_bucket(versioned=versioned)
    for key in keys:
        store.put(bucket, key, key.encode())
    return bucket


def record(store: S3Part, bucket: str, key: str, *, template: str = BESIDE, route: str = "r1", etag: str = "") -> None:
    """Write the record of an object as it is now, or as it was with ``etag``."""
    etag = etag or store.client.head_object(Bucket=bucket, Key=key)["ETag"].strip('"')
    metadata = SidecarMetadata("job", "model", route, SourceVersion(bucket, key, etag=etag, sequencer="1"))
    sidecar = Sidecar(S3Client(settings_of(store)).call, lambda *_: True)
    asyncio.run(sidecar.put(sidecar_uri(template, bucket, key), b"{}", metadata, "json"))


def states(
    store: S3Part, bucket: str, *, template: str = BESIDE, prefix: str = "in/", **options: Any
) -> dict[str, str]:
    reconciler = Reconciler(S3Client(settings_of(store)), template, **options)
    listed = list_objects(settings_of(store), ObjectPattern(bucket, prefix))
    found = {one.object.uri.removeprefix(f"s3://{bucket}/"): one.state for one in reconciler.unfinished(listed)}
    assert reconciler.tally.is_complete == (not found)
    return dict(found)


def test_objects_without_a_record_of_what_they_are_now_are_found(store: S3Part) -> None:
    bucket = put_sources(store)
    assert states(store, bucket) == dict.fromkeys(KEYS, "missing")
    for key in KEYS:
        record(store, bucket, key)
    assert states(store, bucket) == {}
    assert states(store, bucket, window_objects=2) == {}
    store.put(bucket, KEYS[0], b"replaced")
    store.client.delete_object(Bucket=bucket, Key=f"{KEYS[1]}.json")
    assert states(store, bucket) == {KEYS[0]: "outdated", KEYS[1]: "missing"}
    assert states(store, bucket, route_digest="r1") == {KEYS[0]: "outdated", KEYS[1]: "missing"}
    record(store, bucket, KEYS[0])
    record(store, bucket, KEYS[1])
    assert states(store, bucket, route_digest="r2") == dict.fromkeys(KEYS, "other_route")


def test_versions_of_a_bucket_count_by_their_content(store: S3Part) -> None:
    bucket = put_sources(store, ["in/a.pdf"], versioned=True)
    record(store, bucket, "in/a.pdf")
    assert states(store, bucket) == {}
    store.put(bucket, "in/a.pdf", b"second version")
    assert states(store, bucket) == {"in/a.pdf": "outdated"}


def test_records_below_another_prefix_are_no_sources_and_are_found(store: S3Part) -> None:
    bucket = put_sources(store)
    template = f"s3://{bucket}/in/records/{{bucket}}/{{key}}.json"
    for key in KEYS[1:]:
        record(store, bucket, key, template=template)
    assert states(store, bucket, template=template) == {KEYS[0]: "missing"}


def test_what_no_event_would_help_is_told_apart(store: S3Part) -> None:
    bucket = put_sources(store, ["in/a.pdf", "in/a.pdf.json", "in/" + "x" * 240 + "/" + "y" * 240])
    assert states(store, bucket)["in/a.pdf"] == "taken"
    template = f"s3://{bucket}/" + "p/" * 300 + "{key}.json"
    assert states(store, bucket, template=template)["in/" + "x" * 240 + "/" + "y" * 240] == "no_place"


def test_an_object_that_was_deleted_or_recorded_after_the_listing_is_not_reported(store: S3Part) -> None:
    bucket = put_sources(store, ["in/a.pdf", "in/b.pdf"])
    listed = [ListedObject(f"s3://{bucket}/in/{name}", "old", 1) for name in ("a.pdf", "b.pdf", "c.pdf")]
    record(store, bucket, "in/a.pdf")
    store.client.delete_object(Bucket=bucket, Key="in/b.pdf")
    reconciler = Reconciler(S3Client(settings_of(store)), BESIDE)
    assert list(reconciler.unfinished(listed)) == []
    assert (reconciler.tally.complete, reconciler.tally.gone) == (1, 2)


def test_memory_holds_one_window_of_an_endless_listing(s3: S3Part) -> None:
    taken = 0

    def endless() -> Iterator[ListedObject]:
        nonlocal taken
        while True:
            taken += 1
            yield ListedObject(f"s3://{bucket}/in/a.pdf", "", 0)

    bucket = put_sources(s3, ["in/a.pdf"])
    found = Reconciler(S3Client(settings_of(s3)), BESIDE, window_objects=4).unfinished(endless())
    for _ in range(5):
        next(found)
    assert taken == 8


def test_an_event_has_the_form_and_the_key_of_aws() -> None:
    for key in (*KEYS, "a&b=c", "%2B+ "):
        one = created_event("events", ListedObject(f"s3://bucket/{key}", "etag", 7))
        assert one.key == f"bucket/{key}".encode()
        (event,) = json.loads(one.value or b"")["Records"]
        assert (event["eventSource"], event["eventName"]) == ("aws:s3", "ObjectCreated:Put")
        part = event["s3"]["object"]
        assert (unquote_plus(part["key"]), part["eTag"], part["size"]) == (key, "etag", 7)
        assert part["key"].isascii()
        assert event["s3"]["bucket"]["name"] == "bucket"


def listed_by(store: S3Part, bucket: str, manifest: str, prefix: str = "in/") -> list[ListedObject]:
    client = S3Client(settings_of(store))
    return list(list_inventory(client, read_manifest(client, manifest), ObjectPattern(bucket, prefix)))


def test_an_inventory_names_what_a_listing_names(store: S3Part) -> None:
    bucket = put_sources(store)
    manifest = put_inventory(store, bucket, [*KEYS, "other/x.pdf", "in/folder/"])
    assert {(one.uri, one.etag) for one in listed_by(store, bucket, manifest)} == {
        (one.uri, one.etag) for one in list_objects(settings_of(store), ObjectPattern(bucket, "in/"))
    }
    without = put_inventory(store, bucket, KEYS, schema="Bucket, Key")
    record(store, bucket, KEYS[0])
    reconciler = Reconciler(S3Client(settings_of(store)), BESIDE)
    found = {one.object.uri for one in reconciler.unfinished(listed_by(store, bucket, without))}
    assert found == {f"s3://{bucket}/{key}" for key in KEYS[1:]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spoil": "manifest"}, "MD5"),
        ({"spoil": "checksum"}, "manifest.checksum"),
        ({"spoil": "list"}, "MD5"),
        ({"form": "ORC"}, "ORC: configure one with CSV"),
        ({"schema": "Bucket, Size"}, "no column Key"),
    ],
)
def test_an_inventory_that_is_incomplete_or_of_another_form_is_refused(
    s3: S3Part, options: dict[str, str], message: str
) -> None:
    bucket = s3.make_bucket()
    with pytest.raises(InvalidInput, match=message):
        listed_by(s3, bucket, put_inventory(s3, bucket, KEYS, **options))


def test_an_inventory_of_another_bucket_or_none_at_all_is_refused(s3: S3Part) -> None:
    bucket = s3.make_bucket()
    with pytest.raises(InvalidInput, match="not of another"):
        listed_by(s3, "another", put_inventory(s3, bucket, KEYS))
    for body in (b"[]", b"{", b'{"fileFormat":"CSV","fileSchema":1}'):
        s3.put(bucket, "manifest.checksum", hashlib.md5(body).hexdigest().encode())
        with pytest.raises(InvalidInput, match="no manifest"):
            listed_by(s3, bucket, s3.put(bucket, "manifest.json", body))
    with pytest.raises(InvalidInput, match=r"manifest\.json"):
        listed_by(s3, bucket, f"s3://{bucket}/data.csv")


async def events_of(broker: str, topic: str, count: int) -> list[str]:
    async with connected_consumer(KafkaSettings(bootstrap_servers=broker), topic) as consumer:
        values = [(await consumer.getone()).value for _ in range(count)]
    return sorted(unquote_plus(json.loads(value)["Records"][0]["s3"]["object"]["key"]) for value in values)


def test_the_command_checks_submits_and_is_complete_afterwards(
    store: S3Part, embedded_broker: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOVLLM_S3__ENDPOINT_URL", store.endpoint_url)
    monkeypatch.setenv("NANOVLLM_S3__ADDRESSING_STYLE", "path")
    monkeypatch.setenv("NANOVLLM_KAFKA__BOOTSTRAP_SERVERS", embedded_broker)
    bucket, topic = put_sources(store), unique_name("events")
    asyncio.run(create_topic(embedded_broker, topic, partitions=2))
    record(store, bucket, KEYS[0])

    assert main(["reconcile", f"s3://{bucket}/in", "--check", "--json"]) == 1
    *rows, summary = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["uri"]: row["state"] for row in rows} == {f"s3://{bucket}/{key}": "missing" for key in KEYS[1:]}
    assert summary["summary"]["missing"] == 4
    assert (summary["summary"]["complete"], summary["summary"]["submitted"]) == (1, 0)

    assert main(["reconcile", f"s3://{bucket}/in/", "--topic", topic]) == 0
    assert "4 submitted" in capsys.readouterr().err
    assert asyncio.run(events_of(embedded_broker, topic, 4)) == sorted(KEYS[1:])

    for key in KEYS[1:]:
        record(store, bucket, key)
    assert main(["reconcile", f"s3://{bucket}/in", "--check"]) == 0
    manifest = put_inventory(store, bucket, KEYS)
    assert main(["reconcile", f"s3://{bucket}", "--inventory", manifest, "--check"]) == 0
    assert main(["reconcile", f"s3://{bucket}/in", "--route-digest", "r2", "--check"]) == 1


ROUTES = """
routes:
- name: letters
  match: {bucket: BUCKET, key: "in/**", exclude: "**/*.txt", content_type: application/pdf, min_bytes: 3}
  prompt: Who writes?
  sidecar: {place: "s3://BUCKET/records/{key}.json"}
- {name: silent, prompt: "Who writes?", match: {bucket: BUCKET, key: "out/**"}}
"""


def test_objects_of_one_route_are_compared_with_the_records_that_it_makes(
    store: S3Part,
    embedded_broker: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    topic = unique_name("events")
    asyncio.run(create_topic(embedded_broker, topic, partitions=1))
    bucket = store.make_bucket()
    routes = tmp_path / "routes.yaml"
    routes.write_text(ROUTES.replace("BUCKET", bucket))
    (letters, _) = (entry.route for entry in load_routes(routes).entries)
    assert letters.sidecar is not None
    for name, content_type in (
        *((name, "application/pdf") for name in ("a.pdf", "b.pdf", "c.pdf", "note.txt")),
        ("picture", "image/png"),
    ):
        store.client.put_object(Bucket=bucket, Key=f"in/{name}", Body=b"text", ContentType=content_type)
    store.client.put_object(Bucket=bucket, Key="in/small", Body=b"2b", ContentType="application/pdf")
    record(store, bucket, "in/a.pdf", template=letters.sidecar.template, route=letters.digest)
    record(store, bucket, "in/b.pdf", template=letters.sidecar.template, route="another")

    monkeypatch.setenv("NANOVLLM_S3__ENDPOINT_URL", store.endpoint_url)
    monkeypatch.setenv("NANOVLLM_S3__ADDRESSING_STYLE", "path")
    monkeypatch.setenv("NANOVLLM_KAFKA__BOOTSTRAP_SERVERS", embedded_broker)
    monkeypatch.setenv("NANOVLLM_TOPICS__EVENTS", topic)
    compare = ["reconcile", f"s3://{bucket}", "--route", "letters"]
    assert main([*compare, "--routes", str(routes), "--check", "--json"]) == 1
    *rows, summary = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["uri"].rpartition("/")[2]: row["state"] for row in rows} == {"b.pdf": "other_route", "c.pdf": "missing"}
    counts = {"complete": 1, "other_route": 1, "missing": 1, "not_taken": 2, "submitted": 0}
    assert {name: number for name, number in summary["summary"].items() if number or name in counts} == counts

    # The routes and the topic are those of the worker's settings.
    monkeypatch.setenv("NANOVLLM_DOCUMENTS__ROUTES", str(routes))
    assert main(compare) == 0
    assert "2 submitted" in capsys.readouterr().err
    assert asyncio.run(events_of(embedded_broker, topic, 2)) == ["in/b.pdf", "in/c.pdf"]
    for key in ("in/b.pdf", "in/c.pdf"):
        record(store, bucket, key, template=letters.sidecar.template, route=letters.digest)
    assert main([*compare, "--check"]) == 0

    for objects, options, message in (
        (f"s3://{bucket}/out", ["--route", "letters", "--check"], "names no object that route letters takes"),
        (f"s3://{bucket}/in/pict*", ["--route", "letters", "--check"], "names no object that route letters takes"),
        (f"s3://{bucket}", ["--route", "silent"], "route silent has no sidecar"),
        (f"s3://{bucket}", ["--route", "others"], "--route others is none of letters, silent"),
        (f"s3://{bucket}", ["--routes", str(routes)], "--routes needs --route"),
        (f"s3://{bucket}", ["--route", "letters", "--sidecars", BESIDE], "leave out --sidecars"),
    ):
        assert main(["reconcile", objects, *options]) == MISUSE
        assert message in " ".join(capsys.readouterr().err.split())
    monkeypatch.delenv("NANOVLLM_DOCUMENTS__ROUTES")
    assert main([*compare, "--check"]) == MISUSE
    assert "--routes" in capsys.readouterr().err


def test_an_object_that_the_route_does_not_take_needs_no_place(s3: S3Part) -> None:
    long = "in/" + "x" * 240 + "/" + "y" * 240
    bucket = put_sources(s3, [long])
    template = f"s3://{bucket}/" + "p/" * 300 + "{key}.json"
    assert states(s3, bucket, template=template, takes=lambda *known: False) == {}
    assert states(s3, bucket, template=template, takes=lambda *known: True) == {long: "no_place"}


def test_misuse_of_the_command_is_named(s3: S3Part, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["bucket/in", "--check"], "s3://bucket/prefix"),
        (["s3://bucket/in", "--check", "--sidecars", "s3://out/record.json"], "{key}"),
    ):
        assert main(["reconcile", *arguments]) == MISUSE
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("objects", ["out", "in[1]", "in/*.png"])
def test_nothing_to_compare_proves_nothing(
    s3: S3Part, objects: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOVLLM_S3__ENDPOINT_URL", s3.endpoint_url)
    bucket = put_sources(s3, ["in/a.pdf", "in[1]/b.pdf"])
    assert main(["reconcile", f"s3://{bucket}/{objects}", "--check"]) == MISUSE
    assert "names no object" in capsys.readouterr().err
    assert main(["reconcile", f"s3://{bucket}/in[[]1]/**", "--check"]) == 1
    assert "1 missing" in capsys.readouterr().err
