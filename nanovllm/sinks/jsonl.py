"""The JSON lines sink: one message a line in a file."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from pydantic import BaseModel

from nanovllm.messages.encoding import encode


class JsonLinesSink:
    """Appends messages to the file ``path``; each line is complete on disk when ``write`` returns.

    A context manager: the file is opened on entry, its directories created, and closed at the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None

    def __enter__(self) -> JsonLinesSink:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def write(self, message: BaseModel) -> None:
        """Append ``message``.

        Raises:
            ValueError: the sink is not open.
        """
        if self._file is None:
            raise ValueError("the sink is not open: use it as a context manager")
        # One write for the line and its end: a reader that follows the file never sees half a line of ours.
        self._file.write(encode(message, "json") + b"\n")
        self._file.flush()
