"""Digest of a checkpoint's weight files, which a thread may compute while they are loaded."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from nanovllm.start_phases import START, Phase

_BEGUN: dict[tuple[Path, ...], Future[str]] = {}


def digest_of(files: Sequence[Path]) -> str:
    """SHA-256 (hex) over ``files``, one behind the other; waits for what `begin_digest` has begun.

    Raises:
        OSError: a file cannot be read.
    """
    begun = _BEGUN.pop(tuple(files), None)
    return _compute(files) if begun is None else begun.result()


def begin_digest(files: Sequence[Path]) -> None:
    """Compute the digest of ``files`` in a thread, for the next `digest_of`; nothing where that has begun."""
    if tuple(files) in _BEGUN:
        return
    result: Future[str] = Future()

    def run() -> None:
        try:
            result.set_result(_compute(files))
        except OSError as error:
            result.set_exception(error)

    _BEGUN[tuple(files)] = result
    # A daemon: the end of a start that has failed does not wait for gigabytes to be read.
    threading.Thread(target=run, name="nanovllm-digest", daemon=True).start()


def _compute(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    with START.timed(Phase.DIGEST):
        for file in files:
            with file.open("rb") as stream:
                hashlib.file_digest(stream, lambda: digest)  # the interpreter's lock is free while it computes
    return digest.hexdigest()
