"""Pages of documents in the decoder processes: confined, bounded, killed and replaced; documents stay open in them."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filings import FILINGS, needs_filings
from pdf_files import (
    PROSE,
    content_bomb_pdf,
    encrypted,
    filled_form_pdf,
    image_bomb_pdf,
    image_pdf,
    many_pages_pdf,
    noise,
    raw_pdf,
    scan,
    text_pdf,
    tiff,
)

from nanovllm.errors import (
    ConfigurationError,
    DecoderFailed,
    DocumentEncrypted,
    DocumentTooLarge,
    InvalidDocument,
    InvalidImage,
    InvalidPageRange,
    NanoVLLMError,
    PageTooLarge,
    TooManyPages,
    UnsupportedDocumentFormat,
)
from nanovllm.vision.documents.pages import DocumentInfo, DocumentLimits, PageInfo, open_document
from nanovllm.vision.documents.text_layer import PageKind
from nanovllm.vision.images.child import MAX_OPEN_DOCUMENTS
from nanovllm.vision.images.pool import DecoderPool
from nanovllm.vision.images.preprocess import ImageTransform, prepare_rgb

TRANSFORM = ImageTransform.for_clip(32)
LARGE = text_pdf(*[PROSE] * 3) + b"%" + bytes(500_000)


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[DecoderPool]:
    pool = DecoderPool(TRANSFORM, **{"workers": 1, "timeout_s": 60.0, **options})
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


@pytest.fixture
def sent_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every message to a decoder process, in their order."""
    from nanovllm.vision.images.pool import _Decoder

    sizes: list[int] = []
    send = _Decoder._send

    async def counted(decoder: _Decoder, data: bytes) -> None:
        sizes.append(len(data))
        await send(decoder, data)

    monkeypatch.setattr(_Decoder, "_send", counted)
    return sizes


def pids_of(pool: DecoderPool) -> list[int]:
    return [decoder.process.pid for decoder in pool._decoders if decoder.process is not None]


def proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def starts_of(pool: DecoderPool) -> int:
    return sum(decoder.starts for decoder in pool._decoders)


async def test_pages_and_text_are_those_that_this_process_would_give() -> None:
    for data in (text_pdf(PROSE, ("two",)), tiff(noise(1), noise(2))):
        document = open_document(data)
        async with running() as pool:
            info = await pool.open_document(data)
            assert (info.media_type, info.pages) == (document.info.media_type, document.info.pages)
            for page in (1, 2):
                image = await pool.render_page(data, page, dpi=100, rotation=90, digest=info.digest)
                expected = prepare_rgb(document.render(page, dpi=100, rotation=90, max_pixels=10**7), TRANSFORM)
                assert np.array_equal(image.pixels, expected.pixels)
                assert (image.digest, image.width, image.height) == (expected.digest, expected.width, expected.height)
                assert await pool.page_text(data, page) == document.text(page)


async def test_a_page_and_an_image_of_equal_pixels_have_one_digest() -> None:
    picture = tiff(noise(1))
    async with running() as pool:
        assert (await pool.render_page(picture, 1)).digest == (await pool.prepare(picture)).digest


async def test_the_bytes_of_a_document_are_sent_once(sent_bytes: list[int]) -> None:
    async with running() as pool:
        info = await pool.open_document(LARGE)
        for page in (1, 2, 3):
            await pool.render_page(LARGE, page, digest=info.digest)
            await pool.page_text(LARGE, page)
        with pytest.raises(InvalidPageRange):
            await pool.page_text(LARGE, 4)
        await pool.render_page(LARGE, 1)
        assert sum(size > 400_000 for size in sent_bytes) == 1


async def test_an_idle_process_that_has_the_document_open_is_preferred(sent_bytes: list[int]) -> None:
    other = LARGE + b"%other"
    async with running(workers=2) as pool:
        await asyncio.gather(pool.open_document(LARGE), pool.open_document(other))
        for page in (1, 2, 3):
            await pool.page_text(LARGE, page)
            await pool.page_text(other, page)
        assert sum(size > 400_000 for size in sent_bytes) == 2


async def test_only_a_few_documents_stay_open_those_used_last(sent_bytes: list[int]) -> None:
    documents = [LARGE + b"%d" % number for number in range(MAX_OPEN_DOCUMENTS + 1)]
    async with running() as pool:
        for data in documents:
            await pool.open_document(data)
            await pool.page_text(documents[0], 1)
        (decoder,) = pool._decoders
        assert len(decoder.documents) == MAX_OPEN_DOCUMENTS
        assert sum(size > 400_000 for size in sent_bytes) == len(documents)
        await pool.page_text(documents[1], 1)
        assert sum(size > 400_000 for size in sent_bytes) == len(documents) + 1


async def test_a_process_killed_between_pages_costs_no_page(sent_bytes: list[int]) -> None:
    async with running() as pool:
        first = await pool.render_page(LARGE, 1)
        (pid,) = pids_of(pool)
        os.kill(pid, signal.SIGKILL)
        assert (await pool.render_page(LARGE, 2)).digest == first.digest
        assert sum(size > 400_000 for size in sent_bytes) >= 2
        assert starts_of(pool) == 2


async def test_a_page_that_takes_too_long_is_given_up_and_the_process_replaced() -> None:
    async with running(timeout_s=1.0) as pool:
        (pid,) = pids_of(pool)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(DecoderFailed, match="decoding the document took longer than 1 s"):
            await pool.render_page(LARGE, 1)
        assert pid not in pids_of(pool)


async def test_a_page_that_exhausts_memory_is_given_up_and_the_next_document_is_read() -> None:
    bomb = content_bomb_pdf(320 * 2**20)
    assert len(bomb) < 4 * 2**20
    async with running(memory_bytes=1 << 28) as pool:
        assert len((await pool.open_document(bomb)).pages) == 1
        with pytest.raises(DecoderFailed):
            await pool.render_page(bomb, 1)
        assert (await pool.page_text(LARGE, 1)).kind == PageKind.CLEAN


async def test_a_page_that_has_no_room_is_no_broken_page() -> None:
    async with running(memory_bytes=220 * 2**20) as pool:
        with pytest.raises(DecoderFailed, match="more than the 230686720 bytes of memory allowed"):
            await pool.render_page(LARGE, 1, dpi=800)


async def test_a_picture_of_a_gigabyte_is_rendered_in_half_of_it_or_given_up() -> None:
    bomb = image_bomb_pdf(18_000)
    assert len(bomb) < 8 * 2**20
    async with running(memory_bytes=1 << 29) as pool:
        with suppress(DecoderFailed):
            assert (await pool.render_page(bomb, 1)).width == 1275
        assert (await pool.page_text(LARGE, 1)).kind == PageKind.CLEAN


async def test_a_process_that_has_grown_is_replaced_between_pages() -> None:
    async with running(memory_bytes=220 * 2**20) as pool:
        digests = {(await pool.render_page(LARGE, page, dpi=72)).digest for page in (1, 2, 3)}
        assert len(digests) == 1
        assert starts_of(pool) == 3


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (b"", InvalidDocument, "0 bytes"),
        (b"%PDF-1.7", InvalidDocument, "truncated or corrupt"),
        (encrypted(text_pdf(PROSE), "secret"), DocumentEncrypted, "encrypted"),
        (b"PK\x03\x04", UnsupportedDocumentFormat, "ZIP"),
        (b"\x89PNG\r\n\x1a\n", InvalidImage, "PNG"),
        (bytes(10_001), DocumentTooLarge, "10001 bytes; 10000 are allowed"),
        (text_pdf(*[()] * 5), TooManyPages, "5 pages or more; 4 are allowed"),
        (raw_pdf(b"", page="/MediaBox [0 0 14400 14400]"), PageTooLarge, "200x200 inches"),
    ],
)
async def test_a_refused_document_raises_its_own_error_and_the_process_goes_on(
    data: bytes, error: type[NanoVLLMError], says: str
) -> None:
    async with running(document_limits=DocumentLimits(max_bytes=10_000, max_pages=4)) as pool:
        with pytest.raises(error, match=says) as caught:
            await pool.render_page(data, 1)
        assert type(caught.value) is error
        assert (await pool.page_text(text_pdf(PROSE), 1)).kind == PageKind.CLEAN
        assert starts_of(pool) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rotation": 45}, "not by 45"),
        ({"dpi": float("inf")}, "not at inf"),
        ({"dpi": 0}, "not at 0"),
        ({"max_pixels": 0}, "not 0"),
    ],
)
async def test_a_rendering_that_is_none_is_refused_before_a_process_is_asked(
    options: dict[str, Any], says: str, sent_bytes: list[int]
) -> None:
    async with running() as pool:
        before = len(sent_bytes)
        with pytest.raises(ConfigurationError, match=says):
            await pool.render_page(LARGE, 1, **options)
        assert len(sent_bytes) == before


async def test_ten_thousand_pages_pass_through_one_process() -> None:
    data = many_pages_pdf(10_000)
    async with running() as pool:
        info = await pool.open_document(data)
        assert info.pages[-1] == PageInfo(10_000, 200, 100)
        for page in range(1, 10_001, 500):
            assert (await pool.page_text(data, page, digest=info.digest)).text == f"Page number {page}"
        assert starts_of(pool) == 1


async def test_the_process_has_no_more_than_it_has_for_images() -> None:
    async with running() as pool:
        await pool.render_page(LARGE, 1)
        (pid,) = pids_of(pool)
        assert "libpdfium" in proc(pid, "maps")
        assert "libtorch" not in proc(pid, "maps")
        limits = proc(pid, "limits")
        assert "1073741824" in next(line for line in limits.splitlines() if line.startswith("Max address space"))
        assert len(os.listdir(f"/proc/{pid}/fd")) <= 5


async def test_damaged_documents_give_pages_or_an_error_with_a_code() -> None:
    rng = np.random.default_rng(21)
    whole = [text_pdf(PROSE, PROSE), image_pdf(scan()), filled_form_pdf("1.00"), tiff(noise(1), noise(2))]
    async with running(workers=2) as pool:
        for number in range(80):
            data = bytearray(whole[number % len(whole)])
            for place in rng.integers(0, len(data), 1 + number // 4):
                data[place] = rng.integers(0, 256)
            damaged = bytes(data[: rng.integers(len(data) // 2, len(data))] if number % 8 > 5 else data)
            with suppress(InvalidDocument, InvalidImage, DecoderFailed):
                info = await pool.open_document(damaged)
                for page in info.pages[:3]:
                    await pool.page_text(damaged, page.number, digest=info.digest)
                    await pool.render_page(damaged, page.number, dpi=50, digest=info.digest)
        assert (await pool.page_text(LARGE, 1)).kind == PageKind.CLEAN


@pytest.mark.parametrize("sizes", [b"", b"1", bytes(16), struct.pack(">dd", math.nan, 1)])
def test_an_answer_with_impossible_pages_is_none(sizes: bytes) -> None:
    with pytest.raises(ValueError):
        DocumentInfo.from_sizes("application/pdf", sizes, b"")


@pytest.mark.slow
@pytest.mark.documents
@needs_filings
@pytest.mark.parametrize("path", FILINGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
async def test_the_text_layer_of_a_public_filing_is_clean_on_every_page(path: Path) -> None:
    data = path.read_bytes()  # noqa: ASYNC240 (nothing else runs on this loop)
    async with running(workers=2) as pool:
        info = await pool.open_document(data)
        assert 43 <= len(info.pages) <= 126
        layers = await asyncio.gather(*(pool.page_text(data, page.number, digest=info.digest) for page in info.pages))
        assert {layer.kind for layer in layers} == {PageKind.CLEAN}
        assert min(layer.score for layer in layers) > 0.9
        assert starts_of(pool) == 2
