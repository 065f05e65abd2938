"""Cache of packed weights: files in the user's cache, bounded in bytes; the least recently used are removed first."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from nanovllm.engine import kernels
from nanovllm.engine.layers.packed_file import DamagedFile, PackedFileWriter, PackedTensors, read_packed
from nanovllm.engine.layers.panel_forms import panel_forms

logger = logging.getLogger(__name__)

Write = Callable[[PackedFileWriter], Mapping[str, str]]
"""Writes tensors, and returns the notes of the file."""

_PREFIX, _SUFFIX = "weights-", ".safetensors"
_UNFINISHED = ".weights-"
_MIB = 1 << 20
_ROOM = 2  # times what a file is expected to have must be free: what is written is not known before


class PackedCache:
    """Files of packed weights, ``most_bytes`` of them together at most.

    It is an acceleration: a folder that cannot be written or read is told once, and weights are packed in memory.
    """

    def __init__(self, most_bytes: int, folder: Path | None = None) -> None:
        self._most_bytes = most_bytes
        self._folder = folder or kernels.cache_folder()

    def open(
        self, key: str, expected_bytes: int, write: Callable[[PackedFileWriter], Mapping[str, str]]
    ) -> PackedTensors | None:
        """The file of ``key``, which ``write`` makes where it is not there, or is damaged; None where it cannot be had.

        ``write`` returns the file's notes; ``expected_bytes`` is about what it writes. While one process writes, the
        others wait for it.
        """
        path = self._folder / f"{_PREFIX}{key}{_SUFFIX}"
        try:
            with self._locked() as is_alone:
                if (kept := self._read(path)) is not None:
                    logger.info("packed weights are mapped from %s", path)
                    return kept
                if is_alone:
                    self._remove_unfinished()
                free = shutil.disk_usage(self._folder).free
                if expected_bytes > self._most_bytes or _ROOM * expected_bytes > free:
                    logger.info(
                        "packed weights are not kept: they have about %d bytes, of which engine.packed_weights_bytes "
                        "allows %d, and %d are free in %s", expected_bytes, self._most_bytes, free, self._folder,
                    )  # fmt: skip
                    return None
                self._write(path, write)
                self._remove_old(path)
                size = path.stat().st_size
                logger.info("packed weights are written to %s, which later starts map: %d MiB", path, size // _MIB)
                return read_packed(path)
        except (OSError, DamagedFile) as error:
            logger.warning("packed weights cannot be kept in %s: %s", self._folder, error)
            return None

    def _read(self, path: Path) -> PackedTensors | None:
        """The tensors of a file; None where there is none or a damaged one."""
        kernels.check_ownership(path)
        if not path.exists():
            return None
        try:
            kept = read_packed(path)
        except DamagedFile as error:
            logger.warning("%s is damaged and is made anew: %s", path, error)
            return None
        with suppress(OSError):
            os.utime(path)  # the least recently used are removed first
        return kept

    def _write(self, path: Path, write: Write) -> None:
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=_UNFINISHED, delete=False) as file:
            try:
                writer = PackedFileWriter(file.file)
                writer.finish(write(writer))
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise

    def _remove_unfinished(self) -> None:
        """Remove what processes that were killed have left: while the lock is held, no other process writes."""
        for path in self._folder.glob(f"{_UNFINISHED}*"):
            path.unlink(missing_ok=True)

    def _remove_old(self, newest: Path) -> None:
        """Remove files beyond the limit, those used longest ago first; processes that have them mapped keep them."""
        files = sorted(self._folder.glob(f"{_PREFIX}*{_SUFFIX}"), key=lambda path: path.stat().st_mtime, reverse=True)
        total = newest.stat().st_size
        for path in files:
            if path == newest:
                continue
            total += path.stat().st_size
            if total > self._most_bytes:
                path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """Let one process at a time look for a file and write it; where only reading is possible, all may.

        Yields whether no other process does.
        """
        with suppress(OSError):
            self._folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        kernels.check_ownership(self._folder)
        is_alone = False
        with ExitStack() as stack:
            with suppress(OSError):
                lock = stack.enter_context((self._folder / "weights.lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
                is_alone = True
            yield is_alone


def key_of(files: Iterable[Path], **parts: Any) -> str:
    """The name of packed weights: of the files that they come from, the kernels, and ``parts``.

    The time of the last change counts beside that of the last write, which whoever copies a file may set.
    """
    stats = [(str(path.resolve()), path.stat()) for path in files]
    identity = [(name, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino) for name, found in stats]
    library = kernels.kept(kernels.kind()).name
    everything = [identity, library, dict(panel_forms()), parts]
    return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()[:32]
