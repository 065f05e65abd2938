"""The JSON lines sink: one message a line in a file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from nanovllm.errors import InvalidInput
from nanovllm.messages.encoding import encode

CHUNK_BYTES = 1 << 16


class JsonLinesSink:
    """Appends messages to the file ``path``; each line is complete in the file when ``write`` returns, or not there.

    A context manager: on entry the file is opened and locked, its directories are created, and the part of a line that
    a process left which was killed is removed.

    Raises:
        InvalidInput: the file cannot be opened, or another process writes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def __enter__(self) -> JsonLinesSink:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise InvalidInput(f"{self.path} cannot be written: {error.strerror}") from None
        if self._is_regular:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.__exit__()
                raise InvalidInput(f"{self.path} is being written by another process") from None
            except OSError:
                pass  # a file system without locks
            os.ftruncate(self._file, self._end_of_lines())
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @property
    def is_open(self) -> bool:
        """Whether lines can be appended."""
        return self._file is not None

    def lines(self) -> Iterator[bytes]:
        """The lines that are in the file, without their ends."""
        with self.path.open("rb") as file:
            yield from (line.rstrip(b"\n") for line in file if self._is_regular)

    def write(self, message: BaseModel) -> None:
        """Append ``message``, as ``append`` does."""
        self.append(encode(message, "json"))

    def append(self, line: bytes) -> None:
        """Append ``line``.

        Raises:
            ValueError: the sink is not open.
            OSError: the file takes no more; nothing of the line is in it.
        """
        if self._file is None:
            raise ValueError("the sink is not open: use it as a context manager")
        end, rest = os.lseek(self._file, 0, os.SEEK_END) if self._is_regular else None, line + b"\n"
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            if end is not None:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, end)
            raise

    @property
    def _is_regular(self) -> bool:
        return self._file is not None and stat.S_ISREG(os.fstat(self._file).st_mode)

    def _end_of_lines(self) -> int:
        """The position behind the last line that has an end."""
        assert self._file is not None
        end = os.fstat(self._file).st_size
        while end:
            start = max(0, end - CHUNK_BYTES)
            if (at := os.pread(self._file, end - start, start).rfind(b"\n")) >= 0:
                return start + at + 1
            end = start
        return 0
