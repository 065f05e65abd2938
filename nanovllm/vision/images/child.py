"""The decoder process: ``python -m nanovllm.vision.images.child``, fed by `nanovllm.vision.images.pool`.

It runs image libraries and PDFium on untrusted bytes, with bounded memory and without credentials, model or files to
write. Frames: a length (4 bytes, big-endian) and that many bytes. On stdin the settings as JSON, then requests; on
stdout answers. A request and an answer are a JSON header in a frame, then as many bytes of payload as it says.

Documents that were used last stay open, and every answer says which: their bytes need not be sent again.
"""

from __future__ import annotations

import json
import resource
import signal
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from nanovllm.confinement import confine, take_over_streams
from nanovllm.errors import DecoderFailed, NanoVLLMError
from nanovllm.vision.documents.pages import Document, DocumentLimits, open_document
from nanovllm.vision.images.decode import ImageLimits
from nanovllm.vision.images.preprocess import ImageTransform, PreparedImage, prepare_image, prepare_rgb

LENGTH = struct.Struct(">I")
MAX_OPEN_DOCUMENTS = 4
MAX_OPEN_BYTES = 64 * 2**20
"""Of the documents that stay open; a larger one stays open alone."""


def frame(body: bytes) -> bytes:
    """Frame of ``body``: its length, then itself."""
    return LENGTH.pack(len(body)) + body


def message(header: dict[str, Any], payload: bytes = b"") -> tuple[bytes, bytes]:
    """Request or answer: the frame of its header, and its payload."""
    return frame(json.dumps({**header, "payload_bytes": len(payload)}).encode()), payload


def settings_frame(
    transform: ImageTransform,
    limits: ImageLimits,
    document_limits: DocumentLimits,
    memory_bytes: int,
    timeout_s: float,
) -> bytes:
    """First frame to a decoder process."""
    bounds = {"limits": asdict(limits), "document_limits": asdict(document_limits)}
    settings = {"transform": transform.to_json(), **bounds, "memory_bytes": memory_bytes, "timeout_s": timeout_s}
    return frame(json.dumps(settings).encode())


def main() -> None:
    """Serve until stdin ends."""
    requests, answers = take_over_streams()
    settings = json.loads(_read_frame(requests) or b"{}")
    decoder = _Decoder(settings)
    # The limits are checked on every header; Pillow's own global bound would refuse larger ones.
    Image.MAX_IMAGE_PIXELS = None
    confine(settings["memory_bytes"])
    _answer(answers, {"ready": True})
    is_usable = True
    while is_usable and (request := _read_request(requests)) is not None:
        # The parent kills after timeout_s; the alarm ends a process whose parent was killed.
        signal.setitimer(signal.ITIMER_REAL, 2 * settings["timeout_s"])
        is_usable = decoder.serve(*request, answers)
        signal.setitimer(signal.ITIMER_REAL, 0)


class _Decoder:
    """What a decoder process does with requests, and the documents that are open in it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._transform = ImageTransform.from_json(settings["transform"])
        limits = settings["limits"]
        self._limits = ImageLimits(**{**limits, "formats": tuple(limits["formats"])})
        self._document_limits = DocumentLimits(**settings["document_limits"])
        self._memory_bytes: int = settings["memory_bytes"]
        self._documents: dict[str, tuple[Document, int]] = {}  # with their bytes, the one used last at the end

    def serve(self, request: dict[str, Any], payload: bytes, answers: BinaryIO) -> bool:
        """Answer one request; false where the process must not take another."""
        try:
            header, body = self._work(request, payload)
        except NanoVLLMError as error:
            header, body = {"error": error.code, "message": str(error)}, b""
        except MemoryError:
            reason = f"decoding needs more than the {self._memory_bytes} bytes of memory allowed"
            _answer(answers, {"error": DecoderFailed.code, "message": reason, "is_last": True})
            return False
        # PDFium keeps what pages of a document share, and aborts where memory ends: replace a process that has grown.
        is_last = bool(self._documents) and _address_space() > self._memory_bytes // 2
        _answer(answers, {**header, "documents": [*self._documents], "is_last": is_last}, body)
        return not is_last

    def _work(self, request: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
        if request["kind"] == "image":
            return _image_answer(prepare_image(payload, self._transform, self._limits))
        document = self._document(request["document"], payload)
        if request["kind"] == "open":
            return {"media_type": document.info.media_type}, document.info.sizes()
        if request["kind"] == "text":
            return {}, document.text(request["page"]).to_json().encode()
        options = {name: request[name] for name in ("dpi", "rotation", "max_pixels")}
        return _image_answer(prepare_rgb(document.render(request["page"], **options), self._transform))

    def _document(self, key: str, data: bytes) -> Document:
        document, size = self._documents.pop(key, (None, len(data)))
        if document is None:
            document = open_document(data, self._document_limits, self._limits)
        while self._documents and (
            len(self._documents) >= MAX_OPEN_DOCUMENTS
            or size + sum(other for _, other in self._documents.values()) > MAX_OPEN_BYTES
        ):
            self._documents.pop(next(iter(self._documents)))[0].close()
        self._documents[key] = document, size
        return document


def _image_answer(image: PreparedImage) -> tuple[dict[str, Any], bytes]:
    header = {"digest": image.digest.hex(), "width": image.width, "height": image.height}
    if image.file is not None:
        # The parent has the original.
        body = b"" if image.file.is_original else image.file.data
        return {**header, "media_type": image.file.media_type, "is_original": image.file.is_original}, body
    assert image.pixels is not None  # only an image of the cache has none
    return {**header, "shape": image.pixels.shape}, image.pixels.tobytes()


def _address_space() -> int:
    """Bytes of this process's address space, which `confine` bounds; 0 where there is no ``/proc``."""
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    except OSError:
        return 0
    return pages * resource.getpagesize()


def _read_request(requests: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    header = _read_frame(requests)
    if header is None:
        return None
    request = json.loads(header)
    payload = requests.read(request["payload_bytes"])
    return (request, payload) if len(payload) == request["payload_bytes"] else None


def _read_frame(requests: BinaryIO) -> bytes | None:
    length = requests.read(LENGTH.size)
    if len(length) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(length)
    body = requests.read(size)
    return body if len(body) == size else None


def _answer(answers: BinaryIO, header: dict[str, Any], payload: bytes = b"") -> None:
    for part in message(header, payload):
        answers.write(part)
    answers.flush()


if __name__ == "__main__":
    main()
