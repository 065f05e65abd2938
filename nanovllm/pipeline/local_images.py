"""Local images of the lines of a file: paths below one folder, read in place of the bytes that a message would hold."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from nanovllm.errors import InvalidInput, InvalidJob
from nanovllm.messages.job import image_name
from nanovllm.messages.validation import printable


class LocalImages:
    """Reads the images of jobs that are named by a path below ``folder``, or by a ``file://`` URL of one.

    A relative path begins at ``folder``. Links that lead out of it are refused. Of a file above ``max_bytes`` one byte
    more is read, so that the stages refuse it as they do others; a job's files have at most ``max_job_bytes``.

    Raises:
        InvalidInput: ``folder`` is no directory.
    """

    def __init__(self, folder: Path, *, max_bytes: int, max_job_bytes: int) -> None:
        if not folder.is_dir():
            raise InvalidInput(f"{folder}: no such directory")
        self._folder = folder.resolve()
        self._max_bytes, self._max_job_bytes = max_bytes, max_job_bytes

    def insert(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of a job, or the body of a request, with bytes where they named files.

        Raises:
            InvalidJob: a path leads out of the folder or to no file, or the files are too many bytes together.
        """
        self._left = self._max_job_bytes
        inserted = dict(fields)
        for name, insert in (("images", self._image), ("messages", self._message)):
            if isinstance(fields.get(name), list):
                inserted[name] = [insert(f"{name}.{number}", one) for number, one in enumerate(fields[name])]
        return inserted

    def _image(self, where: str, image: Any) -> Any:
        given: dict[str, Any] = image if isinstance(image, dict) else {"uri": image}
        path = _local_path(given.get("uri"), relative=True)
        if path is None or given.get("data") is not None:
            return image
        name = given.get("name") or image_name(given["uri"])
        return {**given, "uri": None, "data": self._read(where, path), "name": name}

    def _message(self, where: str, message: Any) -> Any:
        if not isinstance(message, dict) or not isinstance(message.get("content"), list):
            return message
        parts = [self._part(f"{where}.content.{number}", part) for number, part in enumerate(message["content"])]
        return {**message, "content": parts}

    def _part(self, where: str, part: Any) -> Any:
        image = part.get("image_url") if isinstance(part, dict) else None
        if not isinstance(image, dict):
            return part
        path = _local_path(image.get("url"), relative=False)
        if path is None:
            return part
        data = base64.b64encode(self._read(where, path)).decode("ascii")
        return {**part, "image_url": {**image, "url": f"data:image/file;base64,{data}"}}

    def _read(self, where: str, path: Path) -> bytes:
        try:
            file = (self._folder / path).resolve()
            if not file.is_relative_to(self._folder):
                raise InvalidJob(f"{where}: is not below the folder of local images")
            if not file.is_file():
                raise InvalidJob(f"{where}: there is no file {printable(path.name)}")
            with file.open("rb") as opened:
                data = opened.read(min(self._max_bytes, self._left) + 1)
        except (OSError, ValueError) as error:
            if isinstance(error, InvalidJob):
                raise
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise InvalidJob(f"{where}: the file cannot be read ({reason})") from None
        if len(data) > self._left:
            raise InvalidJob(f"{where}: the local images of a job have more than {self._max_job_bytes} bytes")
        self._left -= len(data)
        return data


def _local_path(uri: Any, *, relative: bool) -> Path | None:
    """The path that ``uri`` is: of a ``file://`` URL of this machine, or one without a scheme."""
    if not isinstance(uri, str) or not uri:
        return None
    if uri.lower().startswith("file://"):
        try:
            parts = urlsplit(uri)
        except ValueError:
            return None
        return Path(unquote(parts.path)) if parts.netloc in ("", "localhost") and parts.path else None
    return Path(uri) if relative and "://" not in uri and not uri.startswith("data:") else None
