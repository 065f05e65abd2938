from __future__ import annotations

import asyncio
import io
import os
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nanovllm.errors import (
    DecoderFailed,
    ImageTooLarge,
    InvalidImage,
    SystemicError,
    TooManyPixels,
    UnsupportedImageFormat,
)
from nanovllm.vision.images import pool as pool_module
from nanovllm.vision.images.decode import ImageLimits
from nanovllm.vision.images.pool import DecoderPool
from nanovllm.vision.images.preprocess import ImageTransform, prepare_image

TRANSFORM = ImageTransform.for_clip(32)


def png(seed: int = 0, side: int = 40) -> bytes:
    array = np.random.default_rng(seed).integers(0, 256, (side, side + 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


@asynccontextmanager
async def running(limits: ImageLimits | None = None, **options: Any) -> AsyncIterator[DecoderPool]:
    pool = DecoderPool(TRANSFORM, limits or ImageLimits(), **{"workers": 1, "timeout_s": 60.0, **options})
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


async def test_a_child_prepares_files_as_this_process_would_and_sends_no_original_back() -> None:
    transform = ImageTransform.for_files("png")
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png())).convert("RGBA").save(buffer, "PNG")
    pool = DecoderPool(transform, workers=1, timeout_s=60.0)
    await pool.start()
    try:
        for data, is_original in ((png(), True), (buffer.getvalue(), False)):
            image, expected = await pool.prepare(data), prepare_image(data, transform)
            assert image.file == expected.file
            assert image.file is not None
            assert (image.pixels, image.file.is_original) == (None, is_original)
            assert (image.digest, image.width, image.height) == (expected.digest, expected.width, expected.height)
        page = await pool.render_page(png(), 1)
        assert page.file is not None
        assert not page.file.is_original
        assert prepare_image(page.file.data, transform).digest == prepare_image(png(), transform).digest
    finally:
        await pool.close()


@pytest.mark.parametrize(
    "header",
    [
        {"media_type": "text/html", "is_original": True},
        {"media_type": "image/png", "is_original": False},
        {"media_type": "image/png"},
    ],
)
def test_an_answer_that_is_no_file_is_refused(header: dict[str, Any]) -> None:
    sound = {"digest": "00" * 32, "width": 1, "height": 1}
    with pytest.raises((ValueError, KeyError)):
        pool_module._prepared(b"original", sound | header, b"")
    with pytest.raises(ValueError):
        pool_module._prepared(b"", sound | {"media_type": "image/png", "is_original": True}, b"")


async def test_a_child_prepares_exactly_what_this_process_would() -> None:
    async with running(workers=2) as pool:
        images = [png(seed) for seed in range(8)]
        prepared = await asyncio.gather(*(pool.prepare(data) for data in images))
        for data, image in zip(images, prepared, strict=True):
            expected = prepare_image(data, TRANSFORM)
            assert np.array_equal(image.pixels, expected.pixels)
            assert (image.digest, image.width, image.height) == (expected.digest, expected.width, expected.height)
        assert starts_of(pool) == 2


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (b"not an image", InvalidImage, "12 bytes are no image"),
        (png()[:-400], InvalidImage, "PNG image is truncated or corrupt"),
        (b"%PDF-1.4", UnsupportedImageFormat, "PDF"),
        (b"", InvalidImage, "empty"),
    ],
)
async def test_a_refused_image_raises_the_same_error_and_the_child_goes_on(
    data: bytes, error: type[Exception], says: str
) -> None:
    async with running() as pool:
        with pytest.raises(error, match=says) as caught:
            await pool.prepare(data)
        assert type(caught.value) is error
        assert (await pool.prepare(png())).pixels.shape == (32, 32, 3)
        assert starts_of(pool) == 1


async def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    assert len(png_bomb()) < 200_000
    async with running() as pool:
        with pytest.raises(TooManyPixels, match="12000x12000 = 144000000 pixels; 50000000 are allowed"):
            await pool.prepare(png_bomb())


async def test_a_bomb_within_the_pixel_limit_meets_the_memory_limit_and_the_next_image_is_decoded() -> None:
    async with running(ImageLimits(max_pixels=10**9), memory_bytes=1 << 28) as pool:
        with pytest.raises(DecoderFailed, match="more than the 268435456 bytes of memory"):
            await pool.prepare(png_bomb())
        assert (await pool.prepare(png())).pixels.shape == (32, 32, 3)
        assert starts_of(pool) == 2


async def test_the_largest_allowed_image_fits_into_the_default_memory() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (10_000, 5_000), (9, 9, 9, 128)).save(buffer, "PNG", compress_level=1)
    async with running() as pool:
        assert (await pool.prepare(buffer.getvalue())).width == 10_000


async def test_bytes_beyond_the_limit_never_reach_a_child() -> None:
    async with running(ImageLimits(max_bytes=99)) as pool:
        with pytest.raises(ImageTooLarge, match="100 bytes; 99 are allowed"):
            await pool.prepare(b"x" * 100)


async def test_a_hanging_child_is_killed_in_time_and_replaced() -> None:
    async with running(timeout_s=1.0) as pool:
        (pid,) = pids_of(pool)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(DecoderFailed, match="took longer than 1 s"):
            await pool.prepare(png())
        assert not is_alive(pid)


async def test_after_a_hang_the_next_image_is_decoded_by_a_new_child() -> None:
    async with running(timeout_s=2.0) as pool:
        (stopped,) = pids_of(pool)
        os.kill(stopped, signal.SIGSTOP)
        with pytest.raises(DecoderFailed):
            await pool.prepare(png())
        await prepare_patiently(pool, png())
        assert pids_of(pool) != [stopped]


async def test_a_child_killed_while_idle_costs_no_image() -> None:
    async with running() as pool:
        (pid,) = pids_of(pool)
        os.kill(pid, signal.SIGKILL)
        assert (await pool.prepare(png())).pixels.shape == (32, 32, 3)
        assert starts_of(pool) == 2


async def test_a_child_killed_at_its_image_costs_no_image_either() -> None:
    async with running() as pool:
        (pid,) = pids_of(pool)
        os.kill(pid, signal.SIGSTOP)
        prepared = asyncio.create_task(pool.prepare(png()))
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        assert (await prepared).pixels.shape == (32, 32, 3)
        assert starts_of(pool) == 2


async def test_an_image_whose_children_die_twice_is_given_up() -> None:
    async with running(ImageLimits(max_pixels=10**9), memory_bytes=1 << 32) as pool:
        prepared = asyncio.create_task(pool.prepare(png_bomb()))
        for _ in range(2):
            pid = await decoding_child(pool)
            os.kill(pid, signal.SIGKILL)
            await until(lambda pid=pid: not is_alive(pid))
        with pytest.raises(DecoderFailed, match=r"ended two decoder processes \(signal SIGKILL\)"):
            await prepared
        assert (await pool.prepare(png())).pixels.shape == (32, 32, 3)
        assert starts_of(pool) == 3


async def test_a_child_that_cannot_start_is_nobodys_images_fault() -> None:
    async with running() as pool:
        (idle,) = pids_of(pool)
        os.kill(idle, signal.SIGKILL)
        prepared = asyncio.create_task(pool.prepare(png()))
        await until(lambda: pids_of(pool) not in ([], [idle]))
        os.kill(pids_of(pool)[0], signal.SIGKILL)
        with pytest.raises(SystemicError, match=r"does not come up \(signal SIGKILL\)"):
            await prepared
        assert (await pool.prepare(png())).pixels.shape == (32, 32, 3)


async def test_a_cancelled_call_leaves_the_stream_in_order() -> None:
    async with running() as pool:
        (pid,) = pids_of(pool)
        for seed in range(5):
            os.kill(pid, signal.SIGSTOP)
            abandoned = asyncio.create_task(pool.prepare(png(seed, side=400)))
            await asyncio.sleep(0.02)
            abandoned.cancel()
            with pytest.raises(asyncio.CancelledError):
                await abandoned
            os.kill(pid, signal.SIGCONT)
            wanted = png(100 + seed)
            assert (await pool.prepare(wanted)).digest == prepare_image(wanted, TRANSFORM).digest
        assert starts_of(pool) == 1


async def test_a_call_cancelled_while_it_waits_for_a_child_takes_none_away() -> None:
    async with running() as pool:
        (pid,) = pids_of(pool)
        os.kill(pid, signal.SIGSTOP)
        busy = asyncio.create_task(pool.prepare(png(1)))
        waiting = asyncio.create_task(pool.prepare(png(2)))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGCONT)
        assert (await busy).digest == prepare_image(png(1), TRANSFORM).digest
        assert (await pool.prepare(png(3))).digest == prepare_image(png(3), TRANSFORM).digest


async def test_children_have_no_credentials_no_settings_and_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("NANOVLLM_KAFKA__SASL_PASSWORD", "hunter2")
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    async with running() as pool:
        (pid,) = pids_of(pool)
        environment = proc(pid, "environ")
        names = {entry.split("=")[0] for entry in environment.split("\0") if entry}
        assert names <= {"LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
        assert "hunter2" not in environment
        maps = proc(pid, "maps")
        assert "libtorch" not in maps
        limits = proc(pid, "limits")
        assert "1073741824" in next(line for line in limits.splitlines() if line.startswith("Max address space"))
        assert len(os.listdir(f"/proc/{pid}/fd")) <= 5
        assert os.getpgid(pid) == pid


async def test_closing_ends_every_child_and_every_call() -> None:
    pool = DecoderPool(TRANSFORM, workers=2, timeout_s=60.0)
    await pool.start()
    pids = pids_of(pool)
    assert len(set(pids)) == 2
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    calls = [asyncio.create_task(pool.prepare(png(seed))) for seed in range(4)]
    await asyncio.sleep(0.05)
    await pool.close()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, (asyncio.CancelledError, RuntimeError)) for result in results)
    assert not any(is_alive(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="not started, or closed"):
        await pool.prepare(png())


def test_children_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(
        "import asyncio, sys, time\n"
        "from nanovllm.vision.images.pool import DecoderPool\n"
        "from nanovllm.vision.images.preprocess import ImageTransform\n"
        "async def main():\n"
        "    pool = DecoderPool(ImageTransform())\n"
        "    await pool.start()\n"
        "    print(*(decoder.process.pid for decoder in pool._decoders), flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    root = Path(__file__).resolve().parents[2]
    owner = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(pids) == 2
    owner.kill()
    owner.wait()
    owner.stdout.close()
    for _ in range(600):
        if not any(is_alive(pid) for pid in pids):
            return
        signal.sigtimedwait([], 0.1)
    raise AssertionError("a decoder outlived its owner")


def pids_of(pool: DecoderPool) -> list[int]:
    """Process ids of the decoders that run."""
    return [decoder.process.pid for decoder in pool._decoders if decoder.process is not None]


def starts_of(pool: DecoderPool) -> int:
    """Processes started so far, replacements included."""
    return sum(decoder.starts for decoder in pool._decoders)


async def until(is_true: Callable[[], bool]) -> None:
    while not is_true():  # noqa: ASYNC110 (nothing announces what another process does)
        await asyncio.sleep(0.001)


def proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_bytes().decode()


async def decoding_child(pool: DecoderPool) -> int:
    """Wait until a child is at work on a bomb, which shows in its memory; its process id."""
    while True:
        for pid in pids_of(pool):
            if is_alive(pid) and resident_bytes(pid) > 80 * 2**20:
                return pid
        await asyncio.sleep(0.001)


def resident_bytes(pid: int) -> int:
    return int(proc(pid, "statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def prepare_patiently(pool: DecoderPool, data: bytes) -> None:
    """On a machine under load even a healthy child may take longer than a short limit."""
    for _ in range(10):
        try:
            await pool.prepare(data)
        except DecoderFailed:
            continue
        return
    raise AssertionError("no child answers")


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody reaped yet does not."""
    try:
        status = proc(pid, "stat")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@cache
def png_bomb(side: int = 12_000) -> bytes:
    """A valid grey PNG of ``side`` × ``side`` zeros, about a thousandth of its pixels in bytes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    compressor = zlib.compressobj(6)
    rows = bytes((side + 1) * 100)
    body = b"".join(compressor.compress(rows) for _ in range(side // 100)) + compressor.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
