"""Files as people really send them: each gives the right pixels, or the right refusal; none hangs or fills the memory.

What is right is never asked of our converter: the pixels are the generator's own, written by small encoders of this
file or by Pillow's, and composited or turned by numpy.
"""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from nanovllm.errors import InvalidImage, NanoVLLMError, TooManyFrames, TooManyPixels, UnsupportedImageFormat
from nanovllm.vision.images.decode import DEFAULT_FORMATS, ImageLimits, load_rgb
from nanovllm.vision.images.pool import DecoderPool
from nanovllm.vision.images.preprocess import ImageTransform, pixel_digest

Pixels = np.ndarray  # uint8 [H, W, 3]

RNG = np.random.default_rng(20261124)
RGB: Pixels = RNG.integers(0, 256, (9, 13, 3), dtype=np.uint8)
GREY = RGB[:, :, 0]
ALPHA = RNG.integers(0, 256, (9, 13), dtype=np.uint8)
_X, _Y = np.meshgrid(np.arange(32) * 7, np.arange(24) * 9)
RAMP: Pixels = np.stack((_X, _Y, np.full_like(_X, 90)), -1).astype(np.uint8)
LOSSY = 12  # levels that a codec may miss by on a smooth picture
TRUNCATED = 0.6
BOMB_BYTES = 48 * 2**20  # memory that refusing any bomb may take


@dataclass(frozen=True)
class File:
    """A file with what must come of it: pixels within ``tolerance``, or an error of the kind ``refused``."""

    name: str
    data: bytes
    pixels: Pixels | None = None
    tolerance: int = 0
    refused: type[NanoVLLMError] | None = None
    formats: tuple[str, ...] = DEFAULT_FORMATS
    max_frames: int = 1


def saved(pixels: Pixels | Image.Image, format: str, **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def on_white(colour: np.ndarray, alpha: np.ndarray) -> Pixels:
    share = alpha.astype(float)[..., None] / 255
    return np.round(colour.astype(float) * share + 255 * (1 - share)).astype(np.uint8)


def grey_rgb(levels: np.ndarray) -> Pixels:
    return np.repeat(levels.astype(np.uint8)[..., None], 3, -1)


def chunk(kind: bytes, body: bytes, *, crc: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes, interlace: int = 0) -> bytes:
    """``rows`` with their filter bytes; ``more`` are chunks between header and data (PNG, 3rd edition)."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))
    body = b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def png_rows(samples: np.ndarray, depth: int) -> bytes:
    """Rows of samples, packed to ``depth`` bits, each after the filter byte 0."""
    rows = []
    for row in samples.reshape(len(samples), -1):
        if depth == 16:
            packed = row.astype(">u2").tobytes()
        else:
            bits = "".join(f"{int(sample):0{depth}b}" for sample in row)
            bits += "0" * (-len(bits) % 8)
            packed = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))
        rows.append(b"\0" + packed)
    return b"".join(rows)


def plain_png(samples: np.ndarray, depth: int, colour: int, *more: bytes) -> bytes:
    return png(samples.shape[1], samples.shape[0], depth, colour, png_rows(samples, depth), *more)


def interlaced_png(pixels: Pixels) -> bytes:
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    parts = [pixels[y::down, x::right] for x, y, right, down in passes]
    rows = b"".join(png_rows(part, 8) for part in parts if part.size)
    return png(pixels.shape[1], pixels.shape[0], 8, 2, rows, interlace=1)


def tiff(samples: np.ndarray, *, order: str, photometric: int) -> bytes:
    """One uncompressed strip, ``order`` < or > (TIFF 6.0, section 2)."""
    bits = samples.dtype.itemsize * 8
    data = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    channels = samples.shape[2] if samples.ndim == 3 else 1
    tags = [(256, 4, samples.shape[1]), (257, 4, samples.shape[0]), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    tags += [(273, 4, 8), (277, 3, channels), (278, 4, samples.shape[0]), (279, 4, len(data))]
    if channels > 1:
        tags[2] = (258, 3, 8 + len(data))  # the place of the three depths
    entries = b""
    for number, kind, value in tags:
        count = channels if number == 258 else 1
        inline = struct.pack(f"{order}HH", value, 0) if kind == 3 and count == 1 else struct.pack(f"{order}I", value)
        entries += struct.pack(f"{order}HHI", number, kind, count) + inline
    depths = struct.pack(f"{order}{channels}H", *[bits] * channels) if channels > 1 else b""
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(data) + len(depths))
    return head + data + depths + struct.pack(f"{order}H", len(tags)) + entries + b"\0\0\0\0"


def small_framed_gif() -> tuple[bytes, Pixels]:
    """A first frame of 2x1 at (1, 1) on a canvas of 4x3; what it leaves free is nothing, so white."""
    table = bytes((255, 0, 0, 0, 0, 255))
    head = b"GIF89a" + struct.pack("<HHBBB", 4, 3, 0x80, 0, 0) + table
    frame = b"," + struct.pack("<HHHHB", 1, 1, 2, 1, 0)
    # Codes of 3 bits: clear (4), the pixels 0 and 1, end (5).
    codes = 4 | 0 << 3 | 1 << 6 | 5 << 9
    data = head + frame + bytes((2, 2)) + struct.pack("<H", codes) + b"\0;"
    expected = np.full((3, 4, 3), 255, np.uint8)
    expected[1, 1:3] = ((255, 0, 0), (0, 0, 255))
    return data, expected


def turned(pixels: Pixels, orientation: int) -> Pixels:
    """What a viewer shows of stored ``pixels`` (EXIF 2.32, tag 274)."""
    turns: dict[int, Callable[[Pixels], Pixels]] = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: p.transpose(1, 0, 2)[:, ::-1],
        7: lambda p: p.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda p: p.transpose(1, 0, 2)[::-1],
    }
    return turns[orientation](pixels)


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def cut(data: bytes, share: float = TRUNCATED) -> bytes:
    return data[: int(len(data) * share)]


def jpegs() -> list[File]:
    ramp = saved(RAMP, "JPEG", quality=95)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    files = [
        File("jpeg baseline", ramp, RAMP, LOSSY),
        File("jpeg progressive", saved(RAMP, "JPEG", quality=95, progressive=True), RAMP, LOSSY),
        File("jpeg 4:2:0", saved(RAMP, "JPEG", quality=95, subsampling=2), RAMP, LOSSY),
        File("jpeg grey", saved(RAMP[..., 0], "JPEG", quality=95), grey_rgb(RAMP[..., 0]), LOSSY),
        File("jpeg cmyk", saved(red, "JPEG", quality=95), np.full((8, 8, 3), (255, 0, 0), np.uint8), LOSSY),
        File("jpeg with sRGB profile", saved(RAMP, "JPEG", quality=95, icc_profile=srgb), RAMP, LOSSY),
        File("jpeg with text behind it", ramp + b"trailing" * 99, RAMP, LOSSY),
        File("jpeg truncated", cut(ramp), refused=InvalidImage),
        File("jpeg header alone", ramp[:24], refused=InvalidImage),
    ]
    for number in range(1, 9):
        data = saved(RAMP, "JPEG", quality=95, exif=oriented(number))
        files.append(File(f"jpeg orientation {number}", data, turned(RAMP, number), LOSSY))
    return files


def pngs() -> list[File]:
    indices = RNG.integers(0, 4, (9, 13), dtype=np.uint8)
    palette = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 8, 7)], np.uint8)
    table = chunk(b"PLTE", palette.tobytes())
    wide = RNG.integers(0, 65536, (9, 13, 3), dtype=np.uint16)
    key = wide[4, 5]
    keyed = (wide >> 8).astype(np.uint8)
    keyed[(wide == key).all(-1)] = 255
    black_key = np.where((RGB[2, 3] == RGB).all(-1)[..., None], np.uint8(255), RGB)
    two_bit = RNG.integers(0, 4, (9, 13))
    four_bit = RNG.integers(0, 16, (9, 13))
    bits = RNG.integers(0, 2, (9, 13))
    whole = saved(RGB, "PNG")
    broken = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 13, 9, 8, 2, 0, 0, 0), crc=0)
    broken += chunk(b"IDAT", zlib.compress(png_rows(RGB, 8))) + chunk(b"IEND", b"")
    half = RNG.integers(0, 256, (9, 13, 4), dtype=np.uint8)
    other = Image.fromarray(255 - RGB)
    return [
        File("png rgb", whole, RGB),
        File("png grey", saved(GREY, "PNG"), grey_rgb(GREY)),
        File("png rgba", saved(half, "PNG"), on_white(half[..., :3], half[..., 3]), 1),
        File("png grey and alpha", saved(np.stack([GREY, ALPHA], -1), "PNG"), on_white(grey_rgb(GREY), ALPHA), 1),
        File("png palette", plain_png(indices, 8, 3, table), palette[indices]),
        File("png palette of 2 bits", plain_png(indices, 2, 3, table), palette[indices]),
        File(
            "png palette with alpha",
            plain_png(indices, 8, 3, table, chunk(b"tRNS", bytes((0, 128, 255)))),
            on_white(palette[indices], np.array((0, 128, 255, 255))[indices]),
            1,
        ),
        File("png 1 bit", plain_png(bits, 1, 0), grey_rgb(bits * 255)),
        File("png grey of 2 bits", plain_png(two_bit, 2, 0), grey_rgb(two_bit * 85)),
        File("png grey of 4 bits", plain_png(four_bit, 4, 0), grey_rgb(four_bit * 17)),
        File(
            "png grey of 2 bits, one level clear",
            plain_png(two_bit, 2, 0, chunk(b"tRNS", struct.pack(">H", 1))),
            grey_rgb(np.where(two_bit == 1, 255, two_bit * 85)),
        ),
        File(
            "png grey of 4 bits, one level clear",
            plain_png(four_bit, 4, 0, chunk(b"tRNS", struct.pack(">H", 6))),
            grey_rgb(np.where(four_bit == 6, 255, four_bit * 17)),
        ),
        File("png grey of 16 bits", plain_png(wide[..., 0], 16, 0), grey_rgb(wide[..., 0] // 257), 1),
        File("png rgb of 16 bits", plain_png(wide, 16, 2), (wide // 257).astype(np.uint8), 1),
        File(
            "png rgb of 16 bits, one colour clear",
            plain_png(wide, 16, 2, chunk(b"tRNS", struct.pack(">HHH", *map(int, key)))),
            keyed,
            1,
        ),
        File(
            "png rgb, one colour clear",
            plain_png(RGB, 8, 2, chunk(b"tRNS", struct.pack(">HHH", *map(int, RGB[2, 3])))),
            black_key,
        ),
        File("png interlaced", interlaced_png(RGB), RGB),
        File("png orientation 6", saved(RGB, "PNG", exif=oriented(6)), turned(RGB, 6)),
        File("png with an archive behind it", whole + b"PK\x03\x04" + bytes(400), RGB),
        File("png with a broken checksum", broken, refused=InvalidImage),
        File("png truncated", cut(whole), refused=InvalidImage),
        File("png of no width", png(0, 9, 8, 2, b""), refused=InvalidImage),
        File("png of an impossible depth", png(13, 9, 3, 2, b""), refused=InvalidImage),
        File("png animated", saved(RGB, "PNG", save_all=True, append_images=[other]), refused=TooManyFrames),
    ]


def other_allowed_formats() -> list[File]:
    half = RNG.integers(0, 256, (9, 13, 4), dtype=np.uint8)
    half[..., 3] |= 1  # a lossless WebP forgets the colour of what cannot be seen at all
    other = Image.fromarray(255 - RGB)
    indices = RNG.integers(0, 4, (9, 13), dtype=np.uint8)
    palette = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 8, 7)], np.uint8)
    paletted = Image.fromarray(indices, "P")
    paletted.putpalette(palette.tobytes())
    clear = np.where((indices == 2)[..., None], np.uint8(255), palette[indices])
    framed, frame = small_framed_gif()
    wide = RNG.integers(0, 65536, (9, 13), dtype=np.uint16)
    gif, webp = saved(paletted, "GIF"), saved(RGB, "WEBP", lossless=True)
    animated: dict[str, Any] = {"save_all": True, "append_images": [other]}
    ink = Image.new("CMYK", (8, 8), (255, 0, 255, 0))
    return [
        File("webp lossless", webp, RGB),
        File("webp lossless with alpha", saved(half, "WEBP", lossless=True), on_white(half[..., :3], half[..., 3]), 1),
        File("webp lossy", saved(RAMP, "WEBP", quality=95), RAMP, LOSSY),
        File("webp animated", saved(RGB, "WEBP", **animated, lossless=True), refused=TooManyFrames),
        File("webp animated, first", saved(RGB, "WEBP", **animated, lossless=True), RGB, max_frames=2),
        File("webp truncated", cut(webp), refused=InvalidImage),
        File("gif", gif, palette[indices]),
        File("gif with a clear colour", saved(paletted, "GIF", transparency=2), clear),
        File("gif with a small first frame", framed, frame),
        File("gif animated", saved(RGB, "GIF", **animated), refused=TooManyFrames),
        File("gif truncated", cut(gif, 0.9), refused=InvalidImage),
        *(
            File(f"tiff {name}", saved(RGB, "TIFF", compression=name), RGB)
            for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits")
        ),
        File("tiff cmyk", saved(ink, "TIFF"), np.full((8, 8, 3), (0, 255, 0), np.uint8), 1),
        File("tiff big-endian", tiff(RGB, order=">", photometric=2), RGB),
        File("tiff little-endian", tiff(RGB, order="<", photometric=2), RGB),
        File("tiff, 0 is white", tiff(GREY, order="<", photometric=0), grey_rgb(255 - GREY)),
        File("tiff of 16 bits", tiff(wide, order="<", photometric=1), grey_rgb(wide // 257), 1),
        File("tiff of 16 bits, big-endian", tiff(wide, order=">", photometric=1), grey_rgb(wide // 257), 1),
        File("tiff of 16 bits, 0 is white", tiff(wide, order="<", photometric=0), grey_rgb((65535 - wide) // 257), 1),
        File("tiff orientation 8", saved(RGB, "TIFF", exif=oriented(8)), turned(RGB, 8)),
        File("tiff of two pages", saved(RGB, "TIFF", **animated), refused=TooManyFrames),
        File("tiff of two pages, first", saved(RGB, "TIFF", **animated), RGB, max_frames=2),
        File("tiff truncated", cut(saved(RGB, "TIFF"), 0.3), refused=InvalidImage),
        File("bmp", saved(RGB, "BMP"), RGB),
        File("bmp with a palette", saved(paletted, "BMP"), palette[indices]),
        File("bmp truncated", cut(saved(RGB, "BMP")), refused=InvalidImage),
    ]


def what_is_no_image_here() -> list[File]:
    files = [
        File("empty", b"", refused=InvalidImage),
        File("text", b"a plain text", refused=InvalidImage),
        File("html", b"<!doctype html><img src=x>", refused=InvalidImage),
        File("noise", RNG.bytes(4_000), refused=InvalidImage),
        File("an archive", b"PK\x03\x04" + bytes(400), refused=InvalidImage),
        File("pdf", b"%PDF-1.7\n%%EOF", refused=UnsupportedImageFormat),
        File("svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", refused=UnsupportedImageFormat),
        File("ico", saved(RAMP, "ICO", sizes=[(16, 16)]), refused=UnsupportedImageFormat),
        File("heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), refused=UnsupportedImageFormat),
        File("mp4", b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + bytes(99), refused=UnsupportedImageFormat),
    ]
    for format, options in (("JPEG2000", {}), ("AVIF", {"quality": 95})):
        if format in Image.SAVE:
            data = saved(RAMP, format, **options)
            files.append(File(f"{format} by default", data, refused=UnsupportedImageFormat))
            files.append(File(f"{format} where allowed", data, RAMP, LOSSY, formats=(*DEFAULT_FORMATS, format)))
    return files


def sizes() -> list[File]:
    shapes = ((1, 1), (1, 700), (700, 1), (1, 30_000), (3, 2), (2, 3))
    pictures = [RNG.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    return [File(f"png of {pixels.shape[1]}x{pixels.shape[0]}", saved(pixels, "PNG"), pixels) for pixels in pictures]


def bombs() -> list[File]:
    """Few bytes that say of themselves that they are very many pixels."""
    side = 60_000
    rows = zlib.compress(bytes(1 << 20))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    jpeg = bytearray(saved(RAMP, "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    webp = b"RIFF" + struct.pack("<I", 100) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4)
    webp += (16_383).to_bytes(3, "little") * 2 + bytes(80)
    gif = b"GIF89a" + struct.pack("<HHBBB", side, side, 0, 0, 0)
    gif += b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\2\1\0;"
    bmp = bytearray(saved(RGB, "BMP"))
    bmp[18:26] = struct.pack("<ii", side, side)
    flat = bytearray(tiff(GREY, order="<", photometric=1))
    for tag in (256, 257):
        at = flat.index(struct.pack("<HHI", tag, 4, 1)) + 8
        flat[at : at + 4] = struct.pack("<I", side)
    return [
        File("png bomb", b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows), refused=TooManyPixels),
        File("jpeg bomb", bytes(jpeg), refused=TooManyPixels),
        File("webp bomb", webp, refused=TooManyPixels),
        File("gif bomb", gif, refused=TooManyPixels),
        File("bmp bomb", bytes(bmp), refused=TooManyPixels),
        File("tiff bomb", bytes(flat), refused=TooManyPixels),
    ]


BOMBS = bombs()
CORPUS = [*jpegs(), *pngs(), *other_allowed_formats(), *what_is_no_image_here(), *sizes(), *BOMBS]


def test_the_corpus_is_as_large_as_it_says() -> None:
    assert len({file.name for file in CORPUS}) == len(CORPUS) >= 60


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.name)
def test_every_file_gives_its_pixels_or_its_refusal(file: File, tmp_path: Path) -> None:
    limits = ImageLimits(formats=file.formats, max_frames=file.max_frames)
    if file.refused is not None:
        with pytest.raises(file.refused) as caught:
            load_rgb(file.data, limits)
        assert "0x" not in str(caught.value)
        return
    assert file.pixels is not None
    lying = tmp_path / "picture.jpg.txt"  # names are not believed
    lying.write_bytes(file.data)
    for source in (file.data, lying):
        pixels = np.asarray(load_rgb(source, limits))
        assert pixels.shape == file.pixels.shape
        assert np.abs(pixels.astype(int) - file.pixels).max() <= file.tolerance


async def test_heic_is_read_where_it_is_allowed_and_installed() -> None:
    heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    heif.from_pillow(Image.fromarray(RAMP)).save(buffer, quality=95)
    limits = ImageLimits(formats=(*DEFAULT_FORMATS, "HEIF"))
    pixels = np.asarray(load_rgb(buffer.getvalue(), limits))
    assert np.abs(pixels.astype(int) - RAMP).max() <= LOSSY
    transform = ImageTransform(resize=None, crop=None)
    async with decoders(transform, limits) as pool:
        assert (await pool.prepare(buffer.getvalue())).digest == pixel_digest(Image.fromarray(pixels))
        with pytest.raises(InvalidImage):
            await pool.prepare(cut(buffer.getvalue()))
    with pytest.raises(UnsupportedImageFormat, match=r"the extra heic"):
        load_rgb(buffer.getvalue())


@asynccontextmanager
async def decoders(transform: ImageTransform, limits: ImageLimits) -> AsyncIterator[DecoderPool]:
    pool = DecoderPool(transform, limits, workers=1)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


def test_equal_pictures_share_a_digest_and_a_pixel_or_a_side_tells_others_apart() -> None:
    stored = np.ascontiguousarray(turned(RGB, 8))
    equal = [saved(RGB, name) for name in ("PNG", "BMP", "TIFF")] + [saved(RGB, "WEBP", lossless=True)]
    equal += [saved(stored, "PNG", exif=oriented(6)), interlaced_png(RGB), tiff(RGB, order=">", photometric=2)]
    assert len({pixel_digest(load_rgb(data)) for data in equal}) == 1
    changed = [RGB.copy() for _ in range(3)]
    changed[0][0, 0, 0] ^= 1
    changed[1][-1, -1, 2] ^= 128
    changed[2][4, 6] = changed[2][4, 7]
    others = [*changed, RGB.reshape(13, 9, 3), RGB[:, ::-1], RGB[:-1], 255 - RGB]
    digests = [pixel_digest(load_rgb(saved(np.ascontiguousarray(pixels), "PNG"))) for pixels in (RGB, *others)]
    assert len(set(digests)) == len(digests)


def test_a_bomb_is_refused_within_bounded_memory(tmp_path: Path) -> None:
    for number, file in enumerate(BOMBS):
        (tmp_path / f"{number}.bomb").write_bytes(file.data)
    program = """
import resource, sys
from pathlib import Path
from nanovllm.errors import TooManyPixels
from nanovllm.vision.images.decode import load_rgb
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for file in sorted(Path(sys.argv[1]).glob("*.bomb")):
    try:
        load_rgb(file.read_bytes())
    except TooManyPixels:
        continue
    sys.exit(f"{file} was read")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < BOMB_BYTES
