from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from nanovllm.errors import (
    ConfigurationError,
    ImageTooLarge,
    InvalidImage,
    TooManyFrames,
    TooManyPixels,
    UnsupportedImageFormat,
)
from nanovllm.vision.images.decode import ImageLimits, load_rgb
from nanovllm.vision.images.digest import pixel_digest


def noise(height: int = 20, width: int = 30, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(source: object, limits: ImageLimits | None = None) -> np.ndarray:
    rgb = load_rgb(source, limits or ImageLimits())
    assert rgb.mode == "RGB"
    return np.asarray(rgb)


def test_one_image_is_the_same_from_pil_array_path_and_bytes(tmp_path: Path) -> None:
    array = noise()
    image = Image.fromarray(array)
    path = tmp_path / "image.png"
    path.write_bytes(encoded(image))
    data = path.read_bytes()
    behind = io.BytesIO(data)
    behind.seek(0, io.SEEK_END)
    sources = [image, array, path, str(path), data, Image.open(path), bytearray(data), memoryview(data), behind]
    digests = set()
    for source in sources:
        assert np.array_equal(pixels(source), array)
        digests.add(pixel_digest(load_rgb(source)))
    assert len(digests) == 1


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_formats_keep_every_pixel(format: str) -> None:
    array = noise()
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.array_equal(pixels(encoded(Image.fromarray(array), format, **options)), array)


@pytest.mark.parametrize("format", ["JPEG", "GIF"])
def test_lossy_formats_are_read(format: str) -> None:
    flat = np.full((16, 16, 3), (200, 40, 40), np.uint8)
    assert np.abs(pixels(encoded(Image.fromarray(flat), format)).astype(int) - flat).max() < 6


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.float32, torch.float16, torch.bfloat16, torch.bool])
def test_a_tensor_is_the_picture_of_its_array(kind: torch.dtype) -> None:
    corners = torch.zeros(20, 30, 3)
    corners[::2] = 1.0
    tensor = (corners if kind.is_floating_point or kind is torch.bool else corners * 255).to(kind)
    expected = pixels((corners.numpy() * 255).astype(np.uint8))
    assert np.array_equal(pixels(tensor), expected)
    if kind.is_floating_point:
        assert np.array_equal(pixels(tensor.requires_grad_()), expected)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(3, 20, 30), r"channels come last"),
        (torch.zeros(1, 20, 30, 3), r"one by one"),
        (torch.full((20, 30), 255.0), r"0\.\.1"),
        (torch.zeros(20, 30, device="meta"), r"Tensor of type torch\.float32"),
        (torch.zeros(20, 30).to(torch.float8_e4m3fn), r"Tensor of type torch\.float8"),
    ],
)
def test_a_tensor_that_is_no_picture_is_refused_as_its_array(tensor: torch.Tensor, said: str) -> None:
    with pytest.raises(InvalidImage, match=said):
        pixels(tensor)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, kind: Callable[[Path], object]) -> None:
    for path, reason in ((tmp_path / "none.png", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InvalidImage, match=f"{path.name}.*{reason}"):
            pixels(kind(path))


@pytest.mark.parametrize(
    "url", ["data:image/png;base64," + "A" * 5000, "https://example.com/a.png", "s3://bucket/a.png", "file:///a.png"]
)
def test_a_url_in_place_of_an_image_is_told_what_is_one(url: str) -> None:
    with pytest.raises(InvalidImage, match=r"an image is a PIL image, .*, not a [a-z0-9]+:(//)? URL") as caught:
        pixels(url)
    assert len(str(caught.value)) < 300


def test_arrays_of_every_kind_mean_the_same_picture() -> None:
    rgb = noise()
    grey = noise(channels=1)
    grey_as_rgb = np.repeat(grey, 3, axis=2)
    opaque = np.full((20, 30, 1), 255, np.uint8)
    assert np.array_equal(pixels(rgb / 255.0), rgb)
    assert np.array_equal(pixels((rgb / 255.0).astype(np.float32)), rgb)
    assert np.array_equal(pixels(rgb.astype(np.int64)), rgb)
    assert np.array_equal(pixels(rgb.astype(np.uint16) * 257), rgb)
    assert np.array_equal(pixels(np.concatenate([rgb, opaque], axis=2)), rgb)
    assert np.array_equal(pixels(grey), grey_as_rgb)
    assert np.array_equal(pixels(grey[:, :, 0]), grey_as_rgb)
    assert np.array_equal(pixels(np.concatenate([grey, opaque], axis=2)), grey_as_rgb)
    assert np.array_equal(pixels(grey[:, :, 0] > 127), np.where(grey_as_rgb > 127, 255, 0))
    assert np.array_equal(pixels(np.asfortranarray(rgb)), rgb)
    assert np.array_equal(pixels(rgb[::2, ::-1]), rgb[::2, ::-1])


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((3, 20, 30), np.uint8), r"\[3, 20, 30\]; channels come last"),
        (np.zeros((2, 20, 30, 3), np.uint8), "one by one"),
        (np.zeros((20,), np.uint8), r"not \[20\]"),
        (np.zeros((20, 30, 5), np.uint8), r"not \[20, 30, 5\]"),
        (np.zeros((0, 30, 3), np.uint8), r"empty: shape \[0, 30, 3\]"),
        (np.full((4, 4, 3), 200.0), "0..1, not 200..200"),
        (np.full((4, 4, 3), np.nan), "0..1, not nan"),
        (np.full((4, 4, 3), -1), "holds 0..255, not -1..-1"),
        (np.full((4, 4, 3), "a"), "integers or floats"),
    ],
)
def test_an_array_that_is_no_image_is_refused_with_what_is_wrong(array: np.ndarray, says: str) -> None:
    with pytest.raises(InvalidImage, match=says):
        load_rgb(array)


@pytest.mark.parametrize(
    "numbers",
    [
        *(noise(6, 9, 1)[..., 0].astype(kind) for kind in ("u1", "i2", ">i2", "i4", ">i4", "i8", "u4", "u8")),
        np.arange(54, dtype="i1").reshape(6, 9),
        *((noise(6, 9, 1)[..., 0] * np.uint16(200)).astype(kind) for kind in ("u2", ">u2")),
        *((noise(6, 9, 1)[..., 0] / 255).astype(kind) for kind in ("f4", ">f4", "f8")),
        noise(6, 9, 1)[..., 0] > 99,
    ],
    ids=lambda array: array.dtype.str,
)
def test_a_pil_image_and_an_array_of_the_same_numbers_give_the_same_pixels(numbers: np.ndarray) -> None:
    if numbers.dtype.itemsize < 8:  # Pillow has no 8-byte integers
        image = Image.fromarray(numbers)
        assert np.array_equal(np.asarray(image), numbers)
        assert np.array_equal(pixels(image), pixels(numbers))
        assert np.array_equal(pixels(image), pixels(np.asarray(image)))
    assert np.array_equal(pixels(numbers), pixels(numbers[..., None]))
    assert np.array_equal(pixels(numbers), pixels(np.repeat(numbers[..., None], 3, axis=2)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "I", "I;16"])
def test_a_pil_image_of_every_mode_is_the_picture_of_its_numbers(mode: str) -> None:
    image = Image.fromarray(noise()).convert("L" if mode == "I;16" else "RGB").convert(mode)
    assert image.mode == mode
    assert np.array_equal(pixels(image), pixels(np.asarray(image)))
    if mode == "I":
        assert np.array_equal(pixels(image), pixels(Image.fromarray(noise()).convert("L"))), "not 257 times as dark"


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "g", ">f4"])
def test_floats_of_any_width_are_0_to_1_up_to_rounding(kind: str) -> None:
    rgb = noise()
    assert np.array_equal(pixels((rgb / 255).astype(kind)), rgb)
    assert np.all(pixels(np.full((4, 4, 3), 1.001).astype(kind)) == 255)
    assert np.all(pixels(np.full((4, 4, 3), -0.001).astype(kind)) == 0)
    for beyond in (1.01, -0.01, 255.0, np.nan, np.inf):
        with pytest.raises(InvalidImage, match=r"0..1, not .*; for 0..255 pass uint8, or divide by 255"):
            load_rgb(np.full((4, 4, 3), beyond).astype(kind))


@pytest.mark.parametrize("format", ["PPM", "TIFF"])
def test_integers_of_a_file_are_16_bit_samples_whatever_mode_they_open_in(format: str) -> None:
    samples = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(samples.astype(np.int32) if format == "TIFF" else samples).save(buffer, format)
    limits = ImageLimits(formats=("PPM", "TIFF"))
    opened = Image.open(buffer)
    assert pixels(buffer, limits)[..., 0].tolist() == pixels(opened, limits)[..., 0].tolist() == [[0, 1, 128, 255]]


@pytest.mark.parametrize("numbers", [np.full((4, 4), 256, np.int32), np.full((4, 4), 65535, np.int64)])
def test_wider_integers_beyond_a_byte_are_refused_with_the_type_to_pass(numbers: np.ndarray) -> None:
    for source in (numbers, Image.fromarray(numbers.astype(np.int32))):
        with pytest.raises(InvalidImage, match=r"holds 0..255, not .*; for 0..65535 pass uint16"):
            load_rgb(source)


def test_a_file_that_gives_no_bytes_is_refused_with_the_way_to_open_it(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(noise())))
    (tmp_path / "a.txt").write_text("no picture")
    for name in ("a.png", "a.txt"):
        with (tmp_path / name).open(encoding="utf-8") as file, pytest.raises(InvalidImage, match="mode 'rb'"):
            load_rgb(file)  # type: ignore[arg-type]
    with pytest.raises(InvalidImage, match="closed"):
        load_rgb(file)  # type: ignore[arg-type]


def test_a_file_is_read_no_further_than_the_limit() -> None:
    file = io.BytesIO(bytes(10_000))
    with pytest.raises(ImageTooLarge, match="100 bytes"):
        load_rgb(file, ImageLimits(max_bytes=100))
    assert file.tell() == 101


def test_other_types_are_refused_without_their_representation() -> None:
    with pytest.raises(InvalidImage, match=r"not object$") as caught:
        load_rgb(object())  # type: ignore[arg-type]
    assert "0x" not in str(caught.value)


def test_transparency_is_composited_on_white() -> None:
    half_red = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert np.all(pixels(half_red) == (255, 127, 127))
    assert np.all(pixels(np.asarray(half_red)) == (255, 127, 127))
    assert np.all(pixels(encoded(half_red)) == (255, 127, 127))
    assert np.all(pixels(Image.new("RGBA", (4, 4), (0, 0, 0, 0))) == 255)
    assert np.all(pixels(Image.new("LA", (4, 4), (0, 0))) == 255)
    assert np.all(pixels(Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert("RGBa")) == 255)


def test_palettes_keep_their_colours_and_their_transparent_entry_turns_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert pixels(encoded(palette)).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert pixels(encoded(palette, transparency=0)).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    assert pixels(encoded(palette, "GIF", transparency=0)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_a_colour_key_turns_white() -> None:
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert pixels(encoded(image, transparency=(1, 2, 3))).tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_sixteen_bit_samples_are_scaled_not_clipped() -> None:
    samples = np.array([[0, 257, 128 * 257, 65535, 300]], np.uint16)
    for format in ("PNG", "TIFF"):
        grey = pixels(encoded(Image.fromarray(samples), format))
        assert grey[0, :, 0].tolist() == [0, 1, 128, 255, 1]
        assert np.array_equal(grey[..., 0], grey[..., 1])


def test_a_sixteen_bit_colour_key_turns_white() -> None:
    header = struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0)
    row = b"\0" + struct.pack(">HH", 1000, 30000)
    chunks = [(b"IHDR", header), (b"tRNS", struct.pack(">H", 1000)), (b"IDAT", zlib.compress(row)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(name, body) for name, body in chunks)
    assert pixels(png)[0, :, 0].tolist() == [255, 117]


@pytest.mark.parametrize("mode", ["1", "L", "I", "F", "CMYK", "YCbCr", "HSV", "P", "PA", "RGBX", "LAB"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert pixels(Image.new(mode, (3, 2))).shape == (2, 3, 3)


def test_cmyk_jpegs_are_not_inverted() -> None:
    white_with_cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    red, green, blue = pixels(encoded(white_with_cyan, "JPEG"))[8, 8]
    assert red < 10
    assert green > 245
    assert blue > 245


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    image = Image.fromarray(noise(4, 6))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = pixels(encoded(image, exif=exif))
    assert upright.shape == ((4, 6, 3) if orientation <= 4 else (6, 4, 3))
    turns = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90,
    }
    assert np.array_equal(upright, turns[orientation](np.asarray(image)))


def test_a_broken_exif_block_is_as_none() -> None:
    array = noise()
    assert np.array_equal(pixels(encoded(Image.fromarray(array), exif=b"Exif\0\0MM\0*broken")), array)


def test_an_embedded_profile_is_converted_to_srgb() -> None:
    # Linear light: the byte 128 is about half the light, which sRGB writes as 188.
    grey = Image.new("RGB", (4, 4), (128, 128, 128))
    converted = pixels(encoded(grey, icc_profile=linear_rgb_profile()))
    assert abs(int(converted[0, 0, 0]) - 188) <= 2
    half_transparent = Image.new("RGBA", (4, 4), (128, 128, 128, 128))
    converted = pixels(encoded(half_transparent, icc_profile=linear_rgb_profile()))
    assert abs(int(converted[0, 0, 0]) - (188 * 128 + 255 * 127) // 255) <= 2


def test_an_srgb_profile_changes_nothing_and_a_broken_one_is_as_none() -> None:
    array = noise()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(pixels(encoded(Image.fromarray(array), icc_profile=srgb)), array)
    assert np.array_equal(pixels(encoded(Image.fromarray(array), icc_profile=b"no profile at all")), array)


def test_the_first_picture_of_a_phones_jpeg_is_taken() -> None:
    main, gain_map = Image.fromarray(noise(16, 16)), Image.new("RGB", (8, 8))
    data = encoded(main, "MPO", save_all=True, append_images=[gain_map])
    assert pixels(data).shape == (16, 16, 3)


def test_animations_and_pages_are_refused_or_their_first_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for format in ("GIF", "TIFF", "WEBP", "PNG"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        with pytest.raises(TooManyFrames, match=r"has 3 frames or pages; 1 are allowed"):
            load_rgb(data)
        with pytest.raises(TooManyFrames, match="3 frames"):
            load_rgb(Image.open(io.BytesIO(data)))
        assert pixels(data, ImageLimits(max_frames=3))[0, 0].tolist() == [255, 0, 0]


def test_bytes_beyond_the_limit_are_refused_before_they_are_parsed(tmp_path: Path) -> None:
    with pytest.raises(ImageTooLarge, match="100 bytes; 99 are allowed"):
        load_rgb(b"x" * 100, ImageLimits(max_bytes=99))
    path = tmp_path / "large"
    path.write_bytes(b"x" * 100)
    with pytest.raises(ImageTooLarge, match="more than the 99 bytes"):
        load_rgb(path, ImageLimits(max_bytes=99))


def test_pixels_beyond_the_limit_are_refused_from_the_header_alone() -> None:
    # The image data is missing altogether: whoever tried to decode would say that it is truncated.
    for side, says in (
        (8000, "8000x8000 = 64000000 pixels; 50000000 are allowed"),
        (60_000, "than the 50000000 pixels"),
    ):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        png = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"")
        with pytest.raises(TooManyPixels, match=says):
            load_rgb(png)


@pytest.mark.parametrize("header_only", [False, True])
def test_a_webps_canvas_is_checked_before_pillow_allocates_it(header_only: bool) -> None:
    for options in ({}, {"lossless": True}, {"save_all": True, "append_images": [Image.new("RGB", (40, 30), "red")]}):
        data = encoded(Image.new("RGB", (40, 30)), "WEBP", **options)
        with pytest.raises(TooManyPixels, match="40x30 = 1200 pixels; 1000 are allowed"):
            load_rgb(data[:32] if header_only else data, ImageLimits(max_pixels=1000))


def test_limits_hold_for_arrays_and_pil_images_too() -> None:
    for source in (noise(20, 30), Image.fromarray(noise(20, 30))):
        with pytest.raises(TooManyPixels, match="30x20 = 600 pixels; 599 are allowed"):
            load_rgb(source, ImageLimits(max_pixels=599))
        with pytest.raises(InvalidImage, match="30x20 pixels; each side needs at least 21"):
            load_rgb(source, ImageLimits(min_side=21))


def test_a_format_that_is_not_allowed_is_named() -> None:
    with pytest.raises(UnsupportedImageFormat, match=r"GIF is not an allowed image format \(PNG\)"):
        load_rgb(encoded(Image.new("L", (4, 4)), "GIF"), ImageLimits(formats=("PNG",)))
    with pytest.raises(UnsupportedImageFormat, match="PDF"):
        load_rgb(b"%PDF-1.7\n")
    with pytest.raises(UnsupportedImageFormat, match="HEIF"):
        load_rgb(b"\0\0\0\x18ftypheic" + bytes(20))


def test_formats_are_pillows_names_and_others_are_refused_at_once() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PPM")
    assert pixels(buffer.getvalue(), ImageLimits(formats=("PPM",)))[0, 0].tolist() == [255, 0, 0]
    with pytest.raises(ConfigurationError, match="no format called JPG"):
        ImageLimits(formats=("PNG", "JPG"))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty: 0 bytes"),
        (b"<html>not found</html>", "22 bytes are no image"),
        (b"\x89PNG\r\n\x1a\n", "PNG image's header is corrupt"),
        (b"\xff\xd8\xff\xe0", "JPEG image's header is corrupt"),
    ],
)
def test_bytes_that_are_no_image_are_refused_plainly(data: bytes, says: str) -> None:
    with pytest.raises(InvalidImage, match=says) as caught:
        load_rgb(data)
    assert "0x" not in str(caught.value)
    assert "BytesIO" not in str(caught.value)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_a_truncated_file_is_refused(format: str) -> None:
    data = encoded(Image.fromarray(noise(64, 64)), format)
    with pytest.raises(InvalidImage, match=r"truncated or corrupt|header is corrupt") as caught:
        load_rgb(data[: len(data) // 2])
    assert "bytes not processed" not in str(caught.value)


def test_random_damage_never_raises_anything_but_our_errors() -> None:
    generator = np.random.default_rng(7)
    originals = [
        encoded(Image.fromarray(noise(24, 24)), format) for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
    ]
    messages = []
    for _ in range(300):
        data = bytearray(originals[generator.integers(len(originals))])
        for at in generator.integers(0, len(data), 4):
            data[at] = generator.integers(256)
        try:
            load_rgb(bytes(data), ImageLimits(max_pixels=1_000_000))
        except InvalidImage as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert not any("0x" in message or "/" in message for message in messages)


def test_a_missing_file_says_so_without_its_path(tmp_path: Path) -> None:
    with pytest.raises(InvalidImage, match=r"cannot be read: No such file or directory$"):
        load_rgb(tmp_path / "missing.png")


def test_text_bombs_in_metadata_are_refused() -> None:
    metadata = PngImagePlugin.PngInfo()
    metadata.add_text("comment", "x" * 100_000_000, zip=True)
    with pytest.raises(InvalidImage):
        load_rgb(encoded(Image.new("L", (4, 4)), pnginfo=metadata))


def test_digests_tell_apart_equal_bytes_of_another_shape() -> None:
    array = noise(6, 10)
    assert pixel_digest(load_rgb(array)) != pixel_digest(load_rgb(array.reshape(10, 6, 3)))
    assert pixel_digest(load_rgb(array)) != pixel_digest(load_rgb(array.reshape(60, 1, 3)))
    assert len(pixel_digest(load_rgb(array))) == 32


def test_files_that_look_alike_have_one_digest_and_others_have_their_own() -> None:
    picture = Image.fromarray(noise(6, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    decoded = Image.open(io.BytesIO(encoded(picture, "JPEG", quality=95)))
    alike = {
        "png": encoded(picture),
        "bmp": encoded(picture, "BMP"),
        "tiff": encoded(picture, "TIFF"),
        "webp": encoded(picture, "WEBP", lossless=True),
        "with opaque alpha": encoded(picture.convert("RGBA")),
        "turned by EXIF": encoded(turned, exif=exif),
    }
    digests = {name: pixel_digest(load_rgb(data)) for name, data in alike.items()}
    assert len(set(digests.values())) == 1, digests
    assert pixel_digest(load_rgb(encoded(decoded))) == pixel_digest(load_rgb(encoded(picture, "JPEG", quality=95)))
    turned_jpeg = encoded(turned, "JPEG", quality=95, exif=exif)
    upright = Image.open(io.BytesIO(turned_jpeg)).transpose(Image.Transpose.ROTATE_270)
    assert pixel_digest(load_rgb(turned_jpeg)) == pixel_digest(load_rgb(encoded(upright)))

    one_pixel = noise(6, 10)
    one_pixel[0, 0, 0] ^= 1
    clear = picture.convert("RGBA")
    clear.putpixel((0, 0), (*picture.getpixel((0, 0)), 0))  # type: ignore[misc]
    others = [
        encoded(Image.fromarray(one_pixel)),
        encoded(picture.crop((0, 0, 9, 6))),
        encoded(turned),
        encoded(picture.convert("L")),
        encoded(clear),
    ]
    assert len({pixel_digest(load_rgb(data)) for data in others} | set(digests.values())) == len(others) + 1


def test_the_digest_does_not_depend_on_how_the_pixels_are_read() -> None:
    import hashlib

    array = noise(700, 2000)  # more than one strip
    expected = hashlib.sha256(b"RGB" + struct.pack(">II", 2000, 700) + array.tobytes()).digest()
    assert pixel_digest(load_rgb(array)) == expected


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def linear_rgb_profile() -> bytes:
    """A matrix profile with sRGB's primaries and a gamma of 1, written by hand: no library here makes one."""

    def fixed(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(x: float, y: float, z: float) -> bytes:
        return b"XYZ \0\0\0\0" + fixed(x) + fixed(y) + fixed(z)

    text = "linear".encode("utf-16-be")
    description = b"mluc" + bytes(4) + struct.pack(">II", 1, 12) + b"enUS" + struct.pack(">II", len(text), 28) + text
    curve = b"curv\0\0\0\0" + struct.pack(">I", 0)
    tags = {
        b"desc": description,
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.4361, 0.2225, 0.0139),
        b"gXYZ": xyz(0.3851, 0.7169, 0.0971),
        b"bXYZ": xyz(0.1431, 0.0606, 0.7141),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    table, body = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        table += name + struct.pack(">II", start + len(body), len(value))
        body += value
    header = bytearray(128)
    header[0:4] = struct.pack(">I", start + len(body))
    header[8:12] = b"\x04\x30\0\0"
    header[12:24] = b"mntrRGB XYZ "
    header[36:40] = b"acsp"
    header[68:80] = fixed(0.9642) + fixed(1.0) + fixed(0.8249)
    return bytes(header) + struct.pack(">I", len(tags)) + table + body
