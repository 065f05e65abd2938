"""Copy of a checkpoint from a prefix of a bucket into a directory: whole or not there, and only what has changed.

Configuration, tokenizer, chat templates and safetensors are copied. Pickles, code and whatever else lies there are not.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from s3transfer.manager import TransferConfig, TransferManager

from nanovllm.errors import FetchFailed, InvalidInput, counted
from nanovllm.messages.s3_uri import split_prefix_uri
from nanovllm.objects.listing import ObjectPattern, list_objects
from nanovllm.objects.s3_client import S3Client, make_client
from nanovllm.settings.s3 import S3Settings

SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".model", ".tiktoken", ".jinja"})
MAX_OBJECTS = 10_000
RECORD = ".copied.json"
"""The file of a copy that says which objects it has, by their entity tags and sizes."""

Version = tuple[str, int]
"""Entity tag and bytes of an object."""


@dataclass(frozen=True)
class CheckpointCopy:
    """What a call did: files of the checkpoint, bytes read from the store, keys below the prefix that stay there."""

    directory: Path
    files: int
    read_bytes: int
    passed_over: tuple[str, ...]


def copy_checkpoint(
    settings: S3Settings, uri: str, directory: Path, show: Callable[[int], None] = lambda _: None
) -> CheckpointCopy:
    """Make ``directory`` the checkpoint below ``uri`` (``s3://bucket/prefix``), and return what was done.

    It appears under its name when it is complete. One that is there is compared by entity tags and sizes; files that
    are equal are not read again, nor are those that an interrupted call has finished. While one process copies, others
    wait for it. ``s3.allow``, which names what jobs may read, does not count here. ``show`` gets the files that are
    there so far.

    Raises:
        InvalidInput: ``uri`` names no prefix, no checkpoint with safetensors lies there, the directory was not made
            by this function, or its disk has not enough room.
        FetchFailed: the objects changed meanwhile, or the store broke off: another call goes on from there.
        SystemicError, TransientError: the object store cannot be reached, or refuses the credentials.
        OSError: the directory's parent cannot be written.
    """
    pattern = _pattern_of(uri)
    with _one_process(directory):
        wanted, passed_over = _listed(settings, pattern)
        held = _recorded(directory)
        if held == wanted:
            return CheckpointCopy(directory, len(wanted), 0, passed_over)
        if held is None and directory.exists() and any(directory.iterdir()):
            raise InvalidInput(f"{directory} is there, and no copy of a checkpoint: name a directory that is not")
        staging = directory.with_name(f".{directory.name}.partial")
        staging.mkdir(exist_ok=True)
        missing = _keep_equal(staging, directory, wanted, held or {})
        _check_room(directory, sum(wanted[name][1] for name in missing))
        _download(settings, pattern, staging, wanted, missing, show)
        if _listed(settings, pattern)[0] != wanted:
            raise FetchFailed(f"the objects below {uri} changed while they were copied: copy them again")
        _exchange(staging, directory)
        return CheckpointCopy(directory, len(wanted), sum(wanted[name][1] for name in missing), passed_over)


def _pattern_of(uri: str) -> ObjectPattern:
    parts = split_prefix_uri(uri)
    if parts is None:
        raise InvalidInput(f"{uri} is no prefix: give s3://bucket/prefix, below which config.json lies")
    bucket, prefix = parts
    return ObjectPattern(bucket, f"{prefix}/" if prefix else "")


def _listed(settings: S3Settings, pattern: ObjectPattern) -> tuple[dict[str, Version], tuple[str, ...]]:
    """The files of the checkpoint by their names below the prefix, and the keys that are none of its files."""
    start, place = len(f"s3://{pattern.bucket}/{pattern.prefix}"), f"s3://{pattern.bucket}/{pattern.prefix}"
    wanted: dict[str, Version] = {}
    passed_over: list[str] = []
    for one in list_objects(settings, pattern):
        if len(wanted) + len(passed_over) == MAX_OBJECTS:
            raise InvalidInput(f"{place} has more than {MAX_OBJECTS:,} objects: name the prefix of one checkpoint")
        name = one.uri[start:]
        if _is_file_of_a_checkpoint(name):
            wanted[name] = (one.etag, one.size)
        else:
            passed_over.append(name)
    if "config.json" not in wanted or not any(name.endswith(".safetensors") for name in wanted):
        lacks = "safetensors" if "config.json" in wanted else "config.json"
        more = f"; {counted(len(passed_over), 'object')} there are not copied" if passed_over else ""
        raise InvalidInput(f"no checkpoint with safetensors lies at {place}: it has no {lacks}{more}")
    return wanted, tuple(passed_over)


def _is_file_of_a_checkpoint(name: str) -> bool:
    # A key is a foreign name: it must not lead out of the directory, nor be a hidden file there.
    parts = name.split("/")
    return PurePosixPath(name).suffix in SUFFIXES and "\0" not in name and all(p and p[0] != "." for p in parts)


def _recorded(directory: Path) -> dict[str, Version] | None:
    """The objects whose files a directory has, by its record; None where it has none."""
    try:
        files = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        return {name: (etag, size) for name, (etag, size) in files.items() if _has(directory / name, size)}
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _has(file: Path, size: int) -> bool:
    try:
        return file.stat().st_size == size
    except OSError:
        return False


def _record(directory: Path, files: Mapping[str, Version]) -> None:
    written = directory / f"{RECORD}.new"
    written.write_text(json.dumps(files), encoding="utf-8")
    os.replace(written, directory / RECORD)


def _keep_equal(
    staging: Path, directory: Path, wanted: Mapping[str, Version], held: Mapping[str, Version]
) -> list[str]:
    """Leave in ``staging`` what is equal, take from ``directory`` what is; returns the names that neither has."""
    staged = _recorded(staging) or {}
    for file in [path for path in staging.rglob("*") if path.is_file()]:
        name = file.relative_to(staging).as_posix()
        if name != RECORD and (name not in wanted or staged.get(name) != wanted[name]):
            file.unlink()
    kept = {name: version for name, version in staged.items() if wanted.get(name) == version}
    for name, version in wanted.items():
        if name not in kept and held.get(name) == version:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # a file system without links: it is read again
                os.link(directory / name, staging / name)
                kept[name] = version
    _record(staging, kept)
    return [name for name in wanted if name not in kept]


def _check_room(directory: Path, needed: int) -> None:
    if (free := shutil.disk_usage(directory.parent).free) < needed:
        raise InvalidInput(f"{directory.parent} has {free:,} bytes left, the checkpoint takes {needed:,}: enlarge it")


def _download(
    settings: S3Settings,
    pattern: ObjectPattern,
    staging: Path,
    wanted: Mapping[str, Version],
    missing: list[str],
    show: Callable[[int], None],
) -> None:
    """Read ``missing`` into ``staging``, in parts side by side; each file that is whole is recorded."""
    done = {name: version for name, version in wanted.items() if name not in set(missing)}
    client = S3Client(settings, partial(make_client, max_attempts=settings.max_attempts))

    def read(s3: Any) -> None:
        # Ends what is left on an exception. Each file has another name until it is whole.
        with TransferManager(s3, TransferConfig(max_request_concurrency=settings.max_connections)) as transfers:
            begun = []
            for name in missing:
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                begun.append(transfers.download(pattern.bucket, pattern.prefix + name, str(staging / name)))
            for name, transfer in zip(missing, begun, strict=True):
                transfer.result()
                if not _has(staging / name, wanted[name][1]):
                    raise FetchFailed(f"{name} is no longer as it was listed: copy the checkpoint again")
                done[name] = wanted[name]
                _record(staging, done)
                show(len(done))

    try:
        client.call(read)
    finally:
        client.close()


def _exchange(staging: Path, directory: Path) -> None:
    """Give ``staging`` the name ``directory``. Processes that have files of an earlier copy open keep them."""
    earlier = directory.with_name(f".{directory.name}.earlier")
    shutil.rmtree(earlier, ignore_errors=True)
    if directory.exists():
        os.rename(directory, earlier)
    os.rename(staging, directory)
    shutil.rmtree(earlier, ignore_errors=True)


@contextmanager
def _one_process(directory: Path) -> Iterator[None]:
    """Let one process at a time make ``directory``; where its file system has no locks, each goes on."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        lock = stack.enter_context(directory.with_name(f".{directory.name}.lock").open("w"))
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
