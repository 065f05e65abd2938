"""Pool of decoder processes: one image or page at a time each, killed and replaced when one hangs or dies."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np

from nanovllm.confinement import environment
from nanovllm.errors import DecoderFailed, ImageTooLarge, InvalidDocument, InvalidImage, NanoVLLMError, SystemicError
from nanovllm.vision.documents.pages import (
    DEFAULT_DOCUMENT_LIMITS,
    DEFAULT_DPI,
    DocumentInfo,
    DocumentLimits,
    check_bytes,
    check_rendering,
)
from nanovllm.vision.documents.text_layer import TextLayer
from nanovllm.vision.images.child import LENGTH, message, settings_frame
from nanovllm.vision.images.decode import DEFAULT_LIMITS, ImageLimits
from nanovllm.vision.images.digest import DIGEST_BYTES
from nanovllm.vision.images.fair_turns import FairTurns
from nanovllm.vision.images.image_file import MEDIA_TYPES, ImageFile
from nanovllm.vision.images.preprocess import MAX_RESIZED_PIXELS, ImageTransform, PreparedImage

START_TIMEOUT_S = 60.0
MAX_HEADER_BYTES = 64 << 10
MAX_MESSAGE_CHARS = 1_000
DYING_TIMEOUT_S = 5.0

MAX_TEXT_BYTES = 64 << 20

T = TypeVar("T")


def _by_code(*roots: type[NanoVLLMError]) -> dict[str, type[NanoVLLMError]]:
    inner = (_by_code(*root.__subclasses__()) for root in roots)
    return {root.code: root for root in roots} | {code: error for errors in inner for code, error in errors.items()}


_ERRORS = _by_code(InvalidImage, InvalidDocument, DecoderFailed)


@dataclass(frozen=True)
class _Request(Generic[T]):
    """One request to a decoder process, and the reading of its answer; ``subject`` names what it works on.

    ``document`` is the key of the document in ``payload``, which is sent only to a process that has it not open.
    """

    subject: str
    header: dict[str, Any]
    payload: bytes
    parse: Callable[[dict[str, Any], bytes], T]
    max_payload_bytes: int
    document: str | None = None


class DecoderPool:
    """Decodes and transforms images and pages of documents in child processes without credentials.

    Each of the ``workers`` has ``memory_bytes`` of address space, and ``timeout_s`` of wall-clock time for one image or
    page. Documents stay open in the processes that worked on them last: a page of one costs its bytes only where
    another process takes it.
    """

    def __init__(
        self,
        transform: ImageTransform,
        limits: ImageLimits = DEFAULT_LIMITS,
        *,
        workers: int = 2,
        timeout_s: float = 20.0,
        memory_bytes: int = 1 << 30,
        document_limits: DocumentLimits = DEFAULT_DOCUMENT_LIMITS,
    ) -> None:
        self._limits = limits
        self._document_limits = document_limits
        self._timeout_s = timeout_s
        settings = settings_frame(transform, limits, document_limits, memory_bytes, timeout_s)
        raw_bytes = 3 * max(limits.max_pixels, document_limits.max_pixels, MAX_RESIZED_PIXELS)
        self._max_image_bytes = raw_bytes + raw_bytes // 64  # noise takes more room as a PNG than raw
        self._decoders = [_Decoder(settings) for _ in range(workers)]
        self._turns: FairTurns[_Decoder] = FairTurns()
        self._exchanges: set[asyncio.Task[Any]] = set()
        self._is_open = False
        self.while_at_work: AbstractContextManager[None] = nullcontext()
        """Entered for each image or page that waits for a process or is in one; any number at once."""

    async def start(self) -> None:
        """Start all processes.

        Raises:
            SystemicError: a process does not come up.
        """
        self._turns = FairTurns()
        self._is_open = True
        try:
            await asyncio.gather(*(decoder.ensure_started() for decoder in self._decoders))
        except BaseException:
            await self.close()
            raise
        for decoder in self._decoders:
            self._turns.add(decoder)

    async def prepare(self, data: bytes, tenant: str = "") -> PreparedImage:
        """Decode and transform one encoded image, waiting for a free process.

        A cancelled call gives up its answer only: the process finishes the image and is then free.

        Raises:
            ImageTooLarge, UnsupportedImageFormat, InvalidImage: as `nanovllm.vision.images.decode.load_rgb`.
            DecoderFailed: the image exhausts time or memory, or killed two processes.
            SystemicError: no process could be started.
        """
        if len(data) > self._limits.max_bytes:
            raise ImageTooLarge(f"the image has {len(data)} bytes; {self._limits.max_bytes} are allowed")
        request = _Request("image", {"kind": "image"}, data, partial(_prepared, data), self._max_image_bytes)
        return await self._run(request, tenant)

    async def open_document(self, data: bytes, tenant: str = "") -> DocumentInfo:
        """Open a document, a PDF or an image file by its first bytes, and tell the sizes of its pages.

        Raises:
            DocumentTooLarge, TooManyPages, DocumentEncrypted, UnsupportedDocumentFormat, InvalidDocument, InvalidImage:
                as `nanovllm.vision.documents.pages.open_document`.
            DecoderFailed: the document exhausts time or memory, or killed two processes.
            SystemicError: no process could be started.
        """
        check_bytes(data, self._document_limits)
        digest = (await asyncio.to_thread(hashlib.sha256, data)).digest()

        def parse(header: dict[str, Any], payload: bytes) -> DocumentInfo:
            return DocumentInfo.from_sizes(str(header["media_type"]), payload, digest)

        most = 16 * self._document_limits.max_pages
        return await self._run(_document_request({"kind": "open"}, data, digest, parse, most), tenant)

    async def render_page(
        self,
        data: bytes,
        page: int,
        *,
        dpi: float = DEFAULT_DPI,
        rotation: int = 0,
        max_pixels: int | None = None,
        digest: bytes | None = None,
        tenant: str = "",
    ) -> PreparedImage:
        """Render page ``page`` (from 1), turned clockwise by ``rotation`` degrees, and transform it as an image.

        Its digest is of the rendered pixels: equal pages of different documents have equal ones. ``max_pixels`` bounds
        it before the transform; a larger page has fewer ``dpi``. ``digest`` is the document's of `open_document`, which
        is computed again where it is not given.

        Raises:
            PageTooLarge, InvalidPage, InvalidPageRange: the page cannot be rendered, or is not there.
            NanoVLLMError: as `open_document`.
        """
        check_bytes(data, self._document_limits)
        bound = self._document_limits.max_pixels if max_pixels is None else max_pixels
        check_rendering(dpi, rotation, bound)
        header = {"kind": "render", "page": page, "dpi": float(dpi), "rotation": rotation, "max_pixels": bound}
        digest = digest or (await asyncio.to_thread(hashlib.sha256, data)).digest()
        return await self._run(
            _document_request(header, data, digest, partial(_prepared, b""), self._max_image_bytes), tenant
        )

    async def page_text(self, data: bytes, page: int, *, digest: bytes | None = None, tenant: str = "") -> TextLayer:
        """Text layer of page ``page`` (from 1), with the measures that decide what it is worth.

        Raises:
            NanoVLLMError: as `render_page`.
        """
        check_bytes(data, self._document_limits)
        header = {"kind": "text", "page": page}
        digest = digest or (await asyncio.to_thread(hashlib.sha256, data)).digest()
        return await self._run(_document_request(header, data, digest, _text_layer, MAX_TEXT_BYTES), tenant)

    async def close(self) -> None:
        """Kill all processes; calls under way are cancelled."""
        self._is_open = False
        self._turns.refuse_all(_closed())
        for exchange in self._exchanges:
            exchange.cancel()
        await asyncio.gather(*self._exchanges, return_exceptions=True)
        await asyncio.gather(*(decoder.kill() for decoder in self._decoders))

    async def _run(self, request: _Request[T], tenant: str) -> T:
        if not self._is_open:
            raise _closed()
        with self.while_at_work:
            decoder = await self._turns.take(tenant, lambda decoder: request.document in decoder.documents)
            exchange = asyncio.create_task(self._exchange(decoder, request))
            self._exchanges.add(exchange)
            exchange.add_done_callback(self._forget)
            return await asyncio.shield(exchange)

    async def _exchange(self, decoder: _Decoder, request: _Request[T]) -> T:
        subject = request.subject
        try:
            for is_last_try in (False, True):
                await decoder.ensure_started()
                try:
                    async with asyncio.timeout(self._timeout_s):
                        return await decoder.exchange(request)
                except TimeoutError:
                    await decoder.kill()
                    raise DecoderFailed(f"decoding the {subject} took longer than {self._timeout_s:g} s") from None
                except NanoVLLMError:
                    raise
                except (ValueError, KeyError, TypeError, RecursionError):  # the last one of nested JSON
                    await decoder.kill()
                    raise DecoderFailed(f"the {subject} made a decoder process answer what is no {subject}") from None
                except (asyncio.IncompleteReadError, ConnectionError):
                    # One death may have another cause (out of memory, a node that drains): it gets a second try.
                    cause = await decoder.reap()
                    if is_last_try:
                        raise DecoderFailed(f"the {subject} ended two decoder processes ({cause})") from None
        finally:
            self._turns.give_back(decoder)
        raise AssertionError("unreachable: the second try returns or raises")

    def _forget(self, exchange: asyncio.Task[Any]) -> None:
        self._exchanges.discard(exchange)
        if not exchange.cancelled():
            # Marks the error as retrieved: the caller may have been cancelled.
            exchange.exception()


def _closed() -> RuntimeError:
    return RuntimeError("the decoder pool is not started, or closed")


class _Decoder:
    """One decoder process and its pipes; started when it is needed."""

    def __init__(self, settings: bytes) -> None:
        self._settings = settings
        self.process: asyncio.subprocess.Process | None = None
        self.starts = 0
        self.documents: frozenset[str] = frozenset()
        """Keys of the documents that are open in the process."""

    async def ensure_started(self) -> None:
        if self.process is not None and self.process.returncode is None:
            return
        await self.kill()
        self.starts += 1
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "nanovllm.vision.images.child"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # Image libraries print parts of the image's data, which must not reach a log.
            stderr=asyncio.subprocess.DEVNULL,
            env=environment(),
            cwd="/",
            # Ctrl-C goes to the whole process group: the worker needs its decoders until it has drained. A session of
            # its own would get as large a share of the CPUs as the worker (sched_autogroup).
            process_group=0,
        )
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._send(self._settings)
                await self._receive(0)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError) as error:
            cause = await (self.kill() if isinstance(error, TimeoutError) else self.reap())
            raise SystemicError(f"a decoder process does not come up ({cause})") from None
        except BaseException:
            await self.kill()
            raise

    async def exchange(self, request: _Request[T]) -> T:
        is_open = request.document in self.documents
        for part in message(request.header, b"" if is_open else request.payload):
            await self._send(part)
        header, payload = await self._receive(request.max_payload_bytes)
        self.documents = frozenset(header.get("documents", ()))
        if header.get("is_last"):
            await self.kill()
        if "error" in header:
            raise _ERRORS[header["error"]](str(header["message"])[:MAX_MESSAGE_CHARS])
        return request.parse(header, payload)

    async def reap(self) -> str:
        """Wait for the end of a process whose pipes broke, and say how it ended.

        `Popen.kill` polls first: it may reap a dying process before asyncio's child watcher, which loses the status.
        """
        if self.process is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), DYING_TIMEOUT_S)
        return await self.kill()

    async def kill(self) -> str:
        """End the process, if there is one, and say how it ended."""
        process, self.process = self.process, None
        self.documents = frozenset()
        if process is None:
            return "not started"
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        if process.stdin is not None:
            process.stdin.close()
        code = await process.wait()
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    async def _send(self, data: bytes) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        await self.process.stdin.drain()

    async def _receive(self, max_payload_bytes: int) -> tuple[dict[str, Any], bytes]:
        assert self.process is not None
        assert self.process.stdout is not None
        (length,) = LENGTH.unpack(await self.process.stdout.readexactly(LENGTH.size))
        if length > MAX_HEADER_BYTES:
            raise _WrongAnswer
        header = json.loads(await self.process.stdout.readexactly(length))
        if not 0 <= header["payload_bytes"] <= max_payload_bytes:
            raise _WrongAnswer
        return header, await self.process.stdout.readexactly(header["payload_bytes"])


def _document_request(
    header: dict[str, Any],
    data: bytes,
    digest: bytes,
    parse: Callable[[dict[str, Any], bytes], T],
    max_payload_bytes: int,
) -> _Request[T]:
    key = digest.hex()
    return _Request("document", {**header, "document": key}, data, parse, max_payload_bytes, key)


class _WrongAnswer(ValueError):
    """An answer that no decoder process of ours gives: what an image has done to it is unknown."""


def _prepared(original_file: bytes, header: dict[str, Any], payload: bytes) -> PreparedImage:
    """The image of an answer; the process that gave it has worked on foreign bytes, and is not trusted."""
    digest = bytes.fromhex(header["digest"])
    original = header["width"], header["height"]
    if len(digest) != DIGEST_BYTES or not all(type(side) is int and side > 0 for side in original):
        raise _WrongAnswer
    if "media_type" in header:
        if header["media_type"] not in MEDIA_TYPES.values() or bool(payload) == header["is_original"]:
            raise _WrongAnswer
        data = original_file if header["is_original"] else payload
        if not data:
            raise _WrongAnswer  # a page has no file of its own
        file = ImageFile(data, header["media_type"], is_original=bool(header["is_original"]))
        return PreparedImage(None, digest, *original, (original[1], original[0]), file=file)
    height, width, channels = header["shape"]
    is_sound = (
        all(type(side) is int and side > 0 for side in (height, width))
        and channels == 3
        and len(payload) == height * width * channels
    )
    if not is_sound:
        raise _WrongAnswer
    pixels = np.frombuffer(payload, np.uint8).reshape(height, width, channels)
    return PreparedImage(pixels, digest, *original, (height, width))


def _text_layer(header: dict[str, Any], payload: bytes) -> TextLayer:
    return TextLayer.from_json(payload)
