"""Checkpoints copied from a prefix of moto and of a real S3 server: whole or not there, only what has changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from parts import REPOSITORY, S3Part

from nanovllm.checkpoints.resolve import resolve_checkpoint
from nanovllm.cli.main import main
from nanovllm.errors import FetchFailed, InvalidInput, ObjectNotFound, SystemicError
from nanovllm.objects import checkpoint_copy
from nanovllm.objects.checkpoint_copy import RECORD, copy_checkpoint
from nanovllm.settings.s3 import S3Settings

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b'{"a": 1}',
    "additional_chat_templates/tools.jinja": b"{{ messages }}",
    "model-00001-of-00002.safetensors": os.urandom(70_000),
    "model-00002-of-00002.safetensors": os.urandom(9 << 20),  # in parts
}
NOT_COPIED = {
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"code",
    "README.md": b"text",
    ".hidden.json": b"{}",
    "x/.git/config.json": b"{}",
}


@pytest.fixture(params=["s3", pytest.param("versity_s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest) -> S3Part:
    part: S3Part = request.getfixturevalue(request.param)
    return part


@pytest.fixture
def bucket(store: S3Part) -> str:
    return store.make_bucket()


@pytest.fixture
def settings(store: S3Part) -> S3Settings:
    return S3Settings(endpoint_url=store.endpoint_url, region=store.region, addressing_style="path", max_attempts=1)


@pytest.fixture
def uri(store: S3Part, bucket: str) -> str:
    """``s3://bucket/models/small``, with a checkpoint and what is no part of one; another one beside it."""
    for name, data in (FILES | NOT_COPIED).items():
        store.put(bucket, f"models/small/{name}", data)
    store.put(bucket, "models/small-2/config.json", b"other")
    return f"s3://{bucket}/models/small"


def contents(directory: Path) -> dict[str, bytes]:
    """The files below ``directory`` without the record."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != RECORD]
    return {file.relative_to(directory).as_posix(): file.read_bytes() for file in files}


def test_the_files_of_a_checkpoint_are_copied_and_pickles_and_code_are_not(
    settings: S3Settings, uri: str, tmp_path: Path
) -> None:
    told: list[int] = []
    copy = copy_checkpoint(settings, f"{uri}/", tmp_path / "small", told.append)
    assert contents(tmp_path / "small") == FILES
    assert copy.files == len(FILES)
    assert copy.read_bytes == sum(map(len, FILES.values()))
    assert set(copy.passed_over) == NOT_COPIED.keys()
    assert told == [1, 2, 3, 4, 5]
    assert [path.name for path in tmp_path.iterdir() if path.name != "small"] == [".small.lock"]


def test_what_jobs_may_read_says_nothing_about_the_model(settings: S3Settings, uri: str, tmp_path: Path) -> None:
    narrow = settings.model_copy(update={"allow": ("s3://another",)})
    assert copy_checkpoint(narrow, uri, tmp_path / "small").files == len(FILES)


def test_a_copy_that_is_there_is_not_read_again(settings: S3Settings, uri: str, tmp_path: Path) -> None:
    copy_checkpoint(settings, uri, tmp_path / "small")
    before = (tmp_path / "small" / "config.json").stat()
    again = copy_checkpoint(settings, uri, tmp_path / "small")
    assert again.read_bytes == 0
    assert (tmp_path / "small" / "config.json").stat() == before


def test_only_what_has_changed_is_read(
    store: S3Part, settings: S3Settings, bucket: str, uri: str, tmp_path: Path
) -> None:
    copy_checkpoint(settings, uri, tmp_path / "small")
    kept = (tmp_path / "small" / "model-00002-of-00002.safetensors").stat().st_ino
    store.put(bucket, "models/small/tokenizer.json", b'{"a": 2}')
    store.client.delete_object(Bucket=bucket, Key="models/small/additional_chat_templates/tools.jinja")
    copy = copy_checkpoint(settings, uri, tmp_path / "small")
    assert copy.read_bytes == 8
    left = dict(FILES, **{"tokenizer.json": b'{"a": 2}'})
    del left["additional_chat_templates/tools.jinja"]
    assert contents(tmp_path / "small") == left
    assert (tmp_path / "small" / "model-00002-of-00002.safetensors").stat().st_ino == kept


def test_a_file_that_was_cut_or_removed_here_is_read_again(settings: S3Settings, uri: str, tmp_path: Path) -> None:
    copy_checkpoint(settings, uri, tmp_path / "small")
    (tmp_path / "small" / "model-00001-of-00002.safetensors").write_bytes(b"cut")
    (tmp_path / "small" / "config.json").unlink()
    assert copy_checkpoint(settings, uri, tmp_path / "small").read_bytes == 70_002
    assert contents(tmp_path / "small") == FILES


def test_a_copy_that_was_broken_off_goes_on_and_is_not_seen_before_it_is_whole(
    store: S3Part, settings: S3Settings, bucket: str, uri: str, tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def end_after_two(files: int) -> None:
        if files == 2:
            raise Killed

    with pytest.raises(Killed):
        copy_checkpoint(settings, uri, tmp_path / "small", end_after_two)
    assert not (tmp_path / "small").exists()
    whole = json.loads((tmp_path / ".small.partial" / RECORD).read_text())
    assert len(whole) == 2
    copy = copy_checkpoint(settings, uri, tmp_path / "small")
    assert copy.read_bytes == sum(len(data) for name, data in FILES.items() if name not in whole)
    assert contents(tmp_path / "small") == FILES


def test_a_checkpoint_that_changes_meanwhile_is_not_taken_for_one(
    store: S3Part, settings: S3Settings, bucket: str, uri: str, tmp_path: Path
) -> None:
    def change(files: int) -> None:
        if files == 1:
            store.put(bucket, "models/small/config.json", b"[]")

    with pytest.raises(FetchFailed, match="changed while they were copied: copy them again"):
        copy_checkpoint(settings, uri, tmp_path / "small", change)
    assert not (tmp_path / "small").exists()
    copy_checkpoint(settings, uri, tmp_path / "small")
    assert (tmp_path / "small" / "config.json").read_bytes() == b"[]"


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("https://a/b", "is no prefix: give s3://bucket/prefix"),
        ("s3://bucket/*.safetensors", "is no prefix"),
    ],
)
def test_what_is_no_prefix_is_refused(tmp_path: Path, uri: str, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        copy_checkpoint(S3Settings(), uri, tmp_path / "small")


def test_what_holds_no_checkpoint_is_refused_with_what_it_lacks(
    store: S3Part, settings: S3Settings, bucket: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=r"it has no config\.json"):
        copy_checkpoint(settings, f"s3://{bucket}/none", tmp_path / "small")
    store.put(bucket, "old/config.json", b"{}")
    store.put(bucket, "old/pytorch_model.bin", b"pickle")
    with pytest.raises(InvalidInput, match=r"it has no safetensors; 1 object there are not copied|1 object there"):
        copy_checkpoint(settings, f"s3://{bucket}/old", tmp_path / "small")
    with pytest.raises((InvalidInput, ObjectNotFound), match="cannot be listed"):
        copy_checkpoint(settings, "s3://there-is-no-such-bucket/a", tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_directory_of_someone_elses_stays_as_it_is(settings: S3Settings, uri: str, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    copy_checkpoint(settings, uri, tmp_path / "small")  # an empty one is taken
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InvalidInput, match="no copy of a checkpoint: name a directory that is not"):
        copy_checkpoint(settings, uri, tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"letter.txt": b"dear"}


def test_a_disk_without_room_is_told_before_anything_is_read(
    settings: S3Settings, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1_000})
    monkeypatch.setattr(checkpoint_copy.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InvalidInput, match="has 1,000 bytes left, the checkpoint takes 9,5"):
        copy_checkpoint(settings, uri, tmp_path / "small")


def test_a_prefix_of_a_whole_bucket_is_refused(
    settings: S3Settings, uri: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_copy, "MAX_OBJECTS", 3)
    with pytest.raises(InvalidInput, match="has more than 3 objects: name the prefix of one checkpoint"):
        copy_checkpoint(settings, f"s3://{bucket}", tmp_path / "small")


def test_refused_credentials_are_systemic(
    settings: S3Settings, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(SystemicError, match="no usable credentials"):
        copy_checkpoint(settings, uri, tmp_path / "small")


def test_pods_that_start_together_copy_once(settings: S3Settings, uri: str, tmp_path: Path) -> None:
    read: list[int] = []

    def copy() -> None:
        read.append(copy_checkpoint(settings, uri, tmp_path / "small").read_bytes)

    threads = [threading.Thread(target=copy) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read) == [0, 0, sum(map(len, FILES.values()))]
    assert contents(tmp_path / "small") == FILES


def test_the_command_makes_a_directory_that_the_engine_reads(
    store: S3Part, settings: S3Settings, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = resolve_checkpoint("tiny-receipts")
    for file in tiny.iterdir():
        if file.is_file():
            store.put(bucket, f"tiny/{file.name}", file.read_bytes())
    environment = {
        "NANOVLLM_S3__ENDPOINT_URL": store.endpoint_url,
        "NANOVLLM_S3__ADDRESSING_STYLE": "path",
        # Of the worker's settings, which the init container gets too.
        "NANOVLLM_KAFKA__BOOTSTRAP_SERVERS": "kafka:9092",
    }
    command = [sys.executable, "-m", "nanovllm.cli.main", "fetch-model", f"s3://{bucket}/tiny", str(tmp_path / "tiny")]
    ended = subprocess.run(
        command, env={**os.environ, **environment, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert f"6 files in {tmp_path / 'tiny'}" in ended.stdout
    assert "not copied: README.md" in ended.stdout
    assert resolve_checkpoint(tmp_path / "tiny") == tmp_path / "tiny"


def test_a_mistake_on_the_command_line_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["fetch-model", "models/a", str(tmp_path / "a")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "nanovllm: models/a is no prefix: give s3://bucket/prefix, below which config.json lies"
