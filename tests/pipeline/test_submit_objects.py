"""``nanovllm submit`` of objects and files: what is sent, counted, uploaded and sent again."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from parts import S3Part

from nanovllm.cli import sending
from nanovllm.cli.journal import Journal, SentJob
from nanovllm.cli.main import main
from nanovllm.cli.sources import plan_submissions
from nanovllm.errors import InvalidInput, ObjectForbidden
from nanovllm.messages.codec import decode_job
from nanovllm.messages.job import Job
from nanovllm.objects.listing import ListedObject, list_objects
from nanovllm.settings.s3 import S3Settings

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def topic(embedded_broker: str, unique: Callable[[str], str], s3: S3Part, monkeypatch: pytest.MonkeyPatch) -> str:
    name = unique("jobs")
    monkeypatch.setenv("NANOVLLM_TOPICS__JOBS", name)
    monkeypatch.setenv("NANOVLLM_KAFKA__BOOTSTRAP_SERVERS", embedded_broker)
    monkeypatch.setenv("NANOVLLM_S3__ENDPOINT_URL", s3.endpoint_url)
    monkeypatch.setenv("NANOVLLM_S3__ADDRESSING_STYLE", "path")
    return name


def jobs_in(broker: str, topic: str) -> list[Job]:
    """All jobs of a topic."""

    async def read() -> list[Job]:
        consumer = AIOKafkaConsumer(bootstrap_servers=broker, enable_auto_commit=False)
        async with consumer:
            await consumer._client._wait_on_metadata(topic)
            partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()]
            consumer.assign(partitions)
            ends = await consumer.end_offsets(partitions)
            jobs = []
            for partition, end in ends.items():
                consumer.seek(partition, 0)
                while await consumer.position(partition) < end:
                    for records in (await consumer.getmany(partition, timeout_ms=500)).values():
                        jobs += [decode_job(record.value) for record in records]
            return jobs

    return asyncio.run(read())


def put(s3: S3Part, count: int, bucket: str | None = None) -> str:
    bucket = bucket or s3.make_bucket()
    for number in range(count):
        s3.put(bucket, f"in/{number:03}.png", f"picture {number}".encode())
    return bucket


def test_each_object_below_a_prefix_becomes_a_job_for_the_version_that_was_listed(
    topic: str, embedded_broker: str, s3: S3Part, capsys: Capture
) -> None:
    bucket = put(s3, 5)
    s3.put(bucket, "in/notes.txt", b"no image")
    assert main(["submit", f"s3://{bucket}/in/", "-p", "Total?"]) == 0
    shown = capsys.readouterr()
    assert "1 object without an image's suffix left out" in shown.err
    jobs = {job.images[0].uri: job for job in jobs_in(embedded_broker, topic)}
    assert jobs.keys() == {f"s3://{bucket}/in/{number:03}.png" for number in range(5)}
    assert {job.job_id for job in jobs.values()} == set(shown.out.split())
    first = jobs[f"s3://{bucket}/in/000.png"]
    tag = s3.client.head_object(Bucket=bucket, Key="in/000.png")["ETag"]
    assert first.images[0].etag == tag.strip('"')
    assert (first.job_id or "").startswith("000.png-")


def test_a_jobs_id_derives_from_object_version_and_question(s3: S3Part) -> None:
    bucket = put(s3, 2)

    def ids(prompt: str = "Total?", **sampling: Any) -> list[str | None]:
        settings = S3Settings(endpoint_url=s3.endpoint_url, addressing_style="path")
        plan = plan_submissions(
            [f"s3://{bucket}/in/*"], prompt, sampling, lambda pattern: list_objects(settings, pattern)
        )
        return [one.job_id for one in plan]

    first, second = ids()
    assert ids() == [first, second]
    assert first != second
    assert not {*ids("Date?"), *ids(max_tokens=3)} & {first, second}
    s3.put(bucket, "in/001.png", b"another picture")
    assert ids()[0] == first
    assert ids()[1] != second


def test_one_object_by_its_uri_has_the_id_that_its_prefix_gives_it(
    topic: str, embedded_broker: str, s3: S3Part, capsys: Capture
) -> None:
    bucket = put(s3, 2)
    first, second = f"s3://{bucket}/in/000.png", f"s3://{bucket}/in/001.png"
    for source in (first, f"s3://{bucket}/in/", first):
        assert main(["submit", source, "-p", "Total?"]) == 0
    s3.put(bucket, "in/000.png", b"another picture")
    assert main(["submit", first, second, "-p", "Total?"]) == 0
    jobs = jobs_in(embedded_broker, topic)
    ids = {uri: [job.job_id for job in jobs if job.images[0].uri == uri] for uri in (first, second)}
    assert [len(ids[uri]) for uri in (first, second)] == [4, 2]
    assert len(set(ids[first][:3])) == 1, "one version"
    assert ids[first][3] not in ids[first][:3], "another version"
    assert len(set(ids[second])) == 1
    assert all(job.images[0].etag for job in jobs)


def test_an_object_that_is_not_there_is_named_before_anything_is_sent(
    topic: str, embedded_broker: str, s3: S3Part, capsys: Capture
) -> None:
    bucket = put(s3, 1)
    assert main(["submit", f"s3://{bucket}/in/000.png", f"s3://{bucket}/in/nope.png", "-p", "Total?"]) == 2
    assert f"s3://{bucket}/in/nope.png: there is no such object" in capsys.readouterr().err
    assert main(["submit", f"s3://{bucket}-none/a.png", "-p", "Total?"]) == 2


def test_objects_whose_version_cannot_be_known_are_sent_and_that_is_said(
    topic: str, embedded_broker: str, s3: S3Part, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    bucket = put(s3, 3)
    uris = [f"s3://{bucket}/in/{number:03}.png" for number in range(3)]
    find = sending.find_object

    def refused(client: Any, uri: str) -> ListedObject:
        if uri == uris[0]:
            raise ObjectForbidden("the object store answered 403")
        return find(client, uri)

    with monkeypatch.context() as patched:
        patched.setattr(sending, "find_object", refused)
        assert main(["submit", *uris, "-p", "Total?"]) == 0
    assert "the version of 1 object is not known (the object store answered 403)" in capsys.readouterr().err
    monkeypatch.setenv("NANOVLLM_S3__ENDPOINT_URL", "http://127.0.0.1:1")
    assert main(["submit", *uris, "-p", "Total?"]) == 0
    shown = capsys.readouterr()
    assert "the version of 3 objects is not known (the object store cannot be reached" in shown.err
    tags = [
        [job.images[0].etag is None for job in jobs_in(embedded_broker, topic) if job.images[0].uri == uri]
        for uri in uris
    ]
    assert tags == [[True, True], [False, True], [False, True]]
    assert len(set(shown.out.split())) == 3


@pytest.mark.parametrize("name", ["ü\n\x1b.png", "x" * 900 + ".png", "日本.png"])
def test_whatever_an_object_is_called_its_job_has_a_valid_id(name: str) -> None:
    (one,) = plan_submissions(["s3://bucket/"], "p", {}, lambda _: [ListedObject(f"s3://bucket/{name}", "e", 1)])
    assert Job(job_id=one.job_id, prompt="p").job_id == one.job_id


def test_a_dry_run_counts_jobs_and_bytes_and_sends_nothing(
    topic: str, s3: S3Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("NANOVLLM_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1")
    bucket = put(s3, 3)
    (tmp_path / "a.png").write_bytes(b"12345")
    command = ["submit", f"s3://{bucket}/**/*.png", str(tmp_path / "a.png"), "-p", "Total?", "--dry-run"]
    assert main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan == {"jobs": 4, "images": 4, "bytes": 3 * len(b"picture 0") + 5, "unknown_sizes": 0, "sent_before": 0}
    assert main([*command, f"s3://{bucket}/in/000.png"]) == 0
    assert "5 jobs, 5 images, 41 bytes" in capsys.readouterr().out
    monkeypatch.setenv("NANOVLLM_S3__ENDPOINT_URL", "http://127.0.0.1:1")
    assert main(["submit", f"s3://{bucket}/in/000.png", "-p", "Total?", "--dry-run"]) == 0
    assert "not counted: the bytes of 1 job with objects of unknown size" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keys", "source", "said"),
    [((), "in/", "no object"), (("in/a.txt",), "in/", "/in/** takes all"), (("in/a.txt",), "in/*.png", "no object")],
)
def test_a_prefix_without_images_is_a_mistake_that_is_named(
    topic: str, s3: S3Part, capsys: Capture, keys: tuple[str, ...], source: str, said: str
) -> None:
    bucket = s3.make_bucket()
    for key in keys:
        s3.put(bucket, key, b"x")
    assert main(["submit", f"s3://{bucket}/{source}", "-p", "Total?"]) == 2
    assert said in capsys.readouterr().err


def test_an_interrupted_command_goes_on_where_it_stopped(
    topic: str, embedded_broker: str, s3: S3Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    bucket = put(s3, 12)
    monkeypatch.setattr(sending, "MAX_IN_FLIGHT", 4)
    handler = signal.getsignal(signal.SIGINT)
    record, recorded = Journal.record, list[str]()

    def interrupted(self: Journal, fingerprint: str, job_id: str) -> None:
        record(self, fingerprint, job_id)
        recorded.append(job_id)
        if len(recorded) == 6:
            assert threading.current_thread() is threading.main_thread()
            os.kill(os.getpid(), signal.SIGINT)

    command = ["submit", f"s3://{bucket}/in/", "-p", "Total?", "--journal", str(tmp_path / "sent.jsonl")]
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "record", interrupted)
        assert main(command) == 1
    assert "interrupted: 4 jobs not sent; run it again" in capsys.readouterr().err
    assert main([*command, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sent_before"] == 8
    assert main(command) == 0
    assert "4 jobs sent" in capsys.readouterr().err
    ids = [job.job_id for job in jobs_in(embedded_broker, topic)]
    assert len(ids) == len(set(ids)) == 12
    assert main(command) == 0
    assert "0 jobs sent" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_journal_counts_equal_jobs_one_by_one_and_forgets_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "sent.jsonl"
    with Journal(path) as journal:
        journal.record("a", "1")
        journal.record("a", "2")
    whole = path.read_bytes()
    path.write_bytes(whole + SentJob(fingerprint="b", job_id="3").model_dump_json().encode())
    with Journal(path) as journal:
        assert path.read_bytes() == whole
        assert [journal.passes_over(one) for one in ("a", "b", "a", "a")] == [True, False, True, False]
        with pytest.raises(InvalidInput, match="another process"), Journal(path):
            pass
    path.write_bytes(b"{}\n")
    with pytest.raises(InvalidInput, match="line 1"), Journal(path):
        pass


def test_uploads_are_images_of_their_prefix_with_suffix_and_type(
    topic: str, embedded_broker: str, s3: S3Part, tmp_path: Path, capsys: Capture
) -> None:
    bucket = s3.make_bucket()
    (tmp_path / "scan").write_bytes(b"\xff\xd8\xff and more")
    (tmp_path / "b.png").write_bytes(b"no known type")
    sources = [str(tmp_path / "scan"), str(tmp_path / "b.png")]
    assert main(["submit", *sources, "-p", "Total?", "--upload", f"s3://{bucket}/inbox"]) == 0
    keys = [one["Key"] for one in s3.client.list_objects_v2(Bucket=bucket)["Contents"]]
    types = {Path(key).suffix: s3.client.head_object(Bucket=bucket, Key=key)["ContentType"] for key in keys}
    assert types == {".jpg": "image/jpeg", ".png": "application/octet-stream"}
    capsys.readouterr()
    assert main(["submit", f"s3://{bucket}/inbox/", "-p", "Total?", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "2 jobs" in shown.out
    assert "left out" not in shown.err


def test_objects_that_no_worker_may_read_are_said_before_anything_is_sent(
    topic: str, s3: S3Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "a.png").write_bytes(b"12345")
    command = ["submit", str(tmp_path / "a.png"), "-p", "Total?", "--dry-run"]
    bucket = put(s3, 2)
    assert main([*command, "--upload", "s3://receipts/elsewhere"]) == 0
    assert capsys.readouterr().err == "", "what the workers allow is not known"
    monkeypatch.setenv("NANOVLLM_S3__ALLOW", "s3://receipts/inbox")
    assert main([*command, "--upload", "s3://receipts/elsewhere"]) == 0
    assert "s3.allow of these settings does not list s3://receipts/elsewhere/" in capsys.readouterr().err
    assert main([*command, f"s3://{bucket}/in/"]) == 0
    assert f"does not list s3://{bucket}/in/000.png, nor 1 more" in capsys.readouterr().err
    assert main([*command, "--upload", "s3://receipts/inbox/deeper"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("prompt", "hint"), [("x <image>", "<image> in the prompt is sent as text"), ("[IMG] x", "[IMG]"), ("x <b>", "")]
)
def test_placeholders_of_other_programs_are_pointed_at(
    topic: str, tmp_path: Path, capsys: Capture, prompt: str, hint: str
) -> None:
    (tmp_path / "a.png").write_bytes(b"12345")
    assert main(["submit", str(tmp_path), "-p", prompt, "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert hint in said
    assert bool(hint) == bool(said)
    assert main(["submit", str(tmp_path), "-p", f"{prompt} <|image|>", "--dry-run"]) == 0
    assert capsys.readouterr().err == ""


def test_numbers_of_jobs_are_written_in_one_way(topic: str, tmp_path: Path, capsys: Capture) -> None:
    lines = tmp_path / "jobs.jsonl"
    lines.write_text('{"prompt": "a"}\n' * 1_100)
    journal = tmp_path / "sent.jsonl"
    (one,) = {job.fingerprint for job in plan_submissions([str(lines)], None, {})}
    journal.write_text(SentJob(fingerprint=one, job_id="a").model_dump_json().join(["", "\n"]) * 1_090)
    assert main(["submit", str(lines), "--journal", str(journal)]) == 0
    assert f"10 jobs sent to {topic}, 1,090 were sent before" in capsys.readouterr().err
    assert main(["submit", str(lines), "--dry-run"]) == 0
    assert "1,100 jobs" in capsys.readouterr().out


def test_upload_puts_every_file_into_the_bucket_and_says_where(
    topic: str, embedded_broker: str, s3: S3Part, tmp_path: Path, capsys: Capture
) -> None:
    bucket, small = s3.make_bucket(), b"a small picture"
    (tmp_path / "a.png").write_bytes(small)
    target = f"s3://{bucket}/inbox/{hashlib.sha256(small).hexdigest()}.png"
    assert main(["submit", str(tmp_path / "a.png"), "-p", "Total?", "--upload", f"s3://{bucket}/inbox"]) == 0
    assert f"a.png uploaded to {target}" in capsys.readouterr().err
    (job,) = jobs_in(embedded_broker, topic)
    assert (job.images[0].uri, job.images[0].data) == (target, None)
    key = target.removeprefix(f"s3://{bucket}/")
    assert s3.client.get_object(Bucket=bucket, Key=key)["Body"].read() == small
    assert main(["submit", str(tmp_path), "-p", "Total?", "--upload", f"s3://{bucket}/inbox/*", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["uploads"] == {str(tmp_path / "a.png"): target}
