"""Image decoding to 8-bit RGB: limits first, then the file's orientation, colour profile and transparency."""

from __future__ import annotations

import importlib.util
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from nanovllm.errors import (
    ConfigurationError,
    ImageTooLarge,
    InvalidImage,
    TooManyFrames,
    TooManyPixels,
    UnsupportedImageFormat,
)

ImageSource = Image.Image | np.ndarray | str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes]
"""A PIL image, an array or tensor, the path of a file, its bytes, or a file open for reading bytes."""

DEFAULT_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

WHITE = (255, 255, 255)
MAX_FULL_SCANS = 16
"""Scans of the largest image that is allowed; encoders make about ten, and each costs as much as a whole image."""
_START_OF_SCAN = b"\xff\xda"
_TIFF_PHOTOMETRIC = 262
# Colour spaces of an ICC profile, each with a mode of image that it converts.
_PROFILED_MODES = {("RGB", "RGB"), ("RGB", "RGBA"), ("CMYK", "CMYK"), ("GRAY", "L"), ("GRAY", "LA")}
_HEIF_HINT = "reading HEIC takes the extra heic, and HEIF among the allowed formats"

_ACCEPTED = "a PIL image, an array or tensor, a path, the bytes of a file, or a file open for reading bytes"
_FILE = "the image file"
_URL = re.compile(r"data:|[A-Za-z][A-Za-z0-9+.-]*://")
_MAX_SHOWN_PATH = 200

# First bytes of common formats: a refusal names what it saw without running other decoders.
_SIGNATURES = {
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "JPEG": rb"\xff\xd8\xff",
    "GIF": rb"GIF8",
    "BMP": rb"BM",
    "TIFF": rb"II[*+]\x00|MM\x00[*+]",  # BigTIFF has a plus
    "WEBP": rb".{8}WEBP",
    "PDF": rb"%PDF",
    "AVIF": rb".{4}ftypavi[fs]",
    "HEIF": rb".{4}ftyp(he|mif1|msf1)",
    "MP4": rb".{4}ftyp",
    "PSD": rb"8BPS",
    "JPEG2000": rb".{4}jP  |\xff\x4f\xff\x51",
    "ICO": rb"\x00\x00\x01\x00",
    "SVG": rb"<svg|<\?xml",
}


@dataclass(frozen=True)
class ImageLimits:
    """Limits of an image, checked before its pixels are decoded.

    ``max_frames`` above 1 admits animations and multi-page files, of which the first frame is used. ``formats`` are
    Pillow's names; ``HEIF`` needs the extra ``heic``.

    Raises:
        ConfigurationError: a format that Pillow does not read, or HEIF without its extra.
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 50_000_000
    min_side: int = 1
    max_frames: int = 1
    formats: tuple[str, ...] = DEFAULT_FORMATS

    def __post_init__(self) -> None:
        if "HEIF" in self.formats and importlib.util.find_spec("pillow_heif") is None:
            raise ConfigurationError("images.formats: HEIF needs pillow-heif: pip install '.[heic]' in a clone")
        if unusual := set(self.formats) - {*DEFAULT_FORMATS, "HEIF"}:
            Image.init()
            if unknown := sorted(unusual - set(Image.OPEN)):
                known = ", ".join((*DEFAULT_FORMATS, "HEIF"))
                raise ConfigurationError(
                    f"images.formats: Pillow reads no format called {', '.join(unknown)}; usual ones are {known}"
                )


DEFAULT_LIMITS = ImageLimits()


def load_rgb(
    source: ImageSource, limits: ImageLimits = DEFAULT_LIMITS, check: Callable[[int, int], object] | None = None
) -> Image.Image:
    """Decode ``source`` to an RGB image of 8 bits a channel.

    EXIF orientation is applied, an embedded ICC profile is converted to sRGB, transparency is composited on white,
    16-bit samples are scaled. Arrays are ``[H, W]``, ``[H, W, 1]`` (grey), ``[H, W, 2]`` (grey, alpha),
    ``[H, W, 3]`` (RGB) or ``[H, W, 4]`` (RGBA). The type of an array's numbers says their range, black to white:
    bool and every float 0..1, uint16 0..65535, every other integer 0..255; numbers outside it are refused, never
    guessed at. PIL images of one number a pixel follow the same rule (modes ``1``, ``L``, ``I;16``, ``I`` and ``F``).

    ``check`` gets width and height of a file before its pixels are decoded, and may raise.

    Raises:
        ImageTooLarge, TooManyPixels, TooManyFrames: beyond a limit.
        UnsupportedImageFormat: a format that is not allowed.
        InvalidImage: not a readable image, or an array of another shape, type or range.
    """
    source = read_source(source, limits)
    if isinstance(source, np.ndarray):
        return _flatten(_from_array(source, limits))
    if isinstance(source, Image.Image):
        check_dimensions(source.width, source.height, limits)
        _check_frames(source, limits)
        return decode_image(source)
    return _from_bytes(source, limits, check)


def is_image_source(value: object) -> bool:
    """Whether ``value`` has the type of an `ImageSource`."""
    kinds = (Image.Image, np.ndarray, str, os.PathLike, bytes, bytearray, memoryview)
    return isinstance(value, kinds) or callable(getattr(value, "read", None)) or _is_tensor(value)


def _is_tensor(value: object) -> bool:
    """Whether ``value`` is an array of another library, such as torch, which this module does without."""
    return hasattr(value, "__array__") and getattr(value, "ndim", 0) > 0


def _as_array(tensor: Any) -> np.ndarray:
    try:
        if hasattr(tensor, "detach"):
            tensor = tensor.detach().cpu()
            tensor = tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor  # a type that numpy lacks
        return np.asarray(tensor)
    except (TypeError, ValueError, RuntimeError, NotImplementedError):  # quantised, sparse, without memory
        kind = f"{type(tensor).__name__} of type {getattr(tensor, 'dtype', 'unknown')}"
        raise InvalidImage(f"a {kind} cannot be read as an array of numbers: pass uint8 or float32") from None


def read_source(source: ImageSource, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image | np.ndarray | bytes:
    """A PIL image or array as it is, and of everything else the bytes of the file.

    An open file is read from its beginning, as Pillow does it, where it can be rewound.

    Raises:
        ImageTooLarge: above the limit in bytes.
        InvalidImage: it cannot be read, or is no source of an image.
    """
    if isinstance(source, (Image.Image, np.ndarray, bytes)):
        return source
    if isinstance(source, (bytearray, memoryview)):
        return bytes(source)
    if not is_image_source(source):
        raise InvalidImage(f"an image is {_ACCEPTED}, not {type(source).__name__}")
    if _is_tensor(source):
        return _as_array(source)
    if isinstance(source, str) and (url := _URL.match(source)):
        raise InvalidImage(f"an image is {_ACCEPTED}, not a {url[0]} URL; a message's image_url may be a data: URL")
    name = f"the image file {repr(str(source))[:_MAX_SHOWN_PATH]}" if isinstance(source, str | os.PathLike) else _FILE
    try:
        if isinstance(source, (str, os.PathLike)):
            with Path(source).open("rb") as file:
                data = file.read(limits.max_bytes + 1)
        else:
            with suppress(OSError, AttributeError):  # io.UnsupportedOperation is an OSError
                source.seek(0)
            data = source.read(limits.max_bytes + 1)
    except OSError as error:
        raise InvalidImage(f"{name} cannot be read: {error.strerror or type(error).__name__}") from error
    except UnicodeDecodeError:
        raise InvalidImage("the image file is open for reading text: open it with mode 'rb'") from None
    except ValueError:  # of a closed file, and of a path with a NUL
        raise InvalidImage(f"{name} cannot be read: it is closed, or its path holds a NUL") from None
    if not isinstance(data, bytes):
        raise InvalidImage(f"the image file gives {type(data).__name__}, not bytes: open it with mode 'rb'")
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(f"the image has more than the {limits.max_bytes} bytes allowed")
    return data


def _from_bytes(data: bytes, limits: ImageLimits, check: Callable[[int, int], object] | None) -> Image.Image:
    with open_image(data, limits) as image:
        check_dimensions(image.width, image.height, limits)
        _check_frames(image, limits)
        _check_scans(image, data, limits)
        if check is not None:
            check(image.width, image.height)
        return decode_image(image)


def open_image(data: bytes, limits: ImageLimits) -> Image.Image:
    """Identify an image of an allowed format, without decoding it; the limits in pixels and frames are not checked.

    Raises:
        ImageTooLarge, TooManyPixels: beyond a limit.
        UnsupportedImageFormat: a format that is not allowed.
        InvalidImage: not a readable image.
    """
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(f"the image has {len(data)} bytes; {limits.max_bytes} are allowed")
    if not data:
        raise InvalidImage("the image is empty: 0 bytes")
    webp_size = _webp_canvas(data)
    if webp_size is not None:
        # Image.open allocates the whole canvas of a WebP, before its size can be checked.
        check_dimensions(*webp_size, limits)
    if "HEIF" in limits.formats and sniffed_format(data) == "HEIF":
        _register_heif()
    try:
        return Image.open(io.BytesIO(data), formats=limits.formats)
    except UnidentifiedImageError:
        raise _unidentified(data, limits) from None
    except Image.DecompressionBombError:
        raise TooManyPixels(f"the image has more than the {limits.max_pixels} pixels allowed") from None
    except MemoryError:
        raise
    except Exception:
        raise InvalidImage("the image's header is corrupt") from None


def sniffed_format(data: bytes) -> str | None:
    """Format by the first bytes, also of some that are no images; None for unknown ones."""
    return next((name for name, mark in _SIGNATURES.items() if re.match(mark, data, re.DOTALL)), None)


def _register_heif() -> None:
    """Register HEIC with Pillow, when the first such bytes arrive."""
    try:
        import pillow_heif
    except ImportError:
        raise UnsupportedImageFormat(f"HEIF cannot be read here: {_HEIF_HINT}") from None
    # Each further thread takes address space, which RLIMIT_AS bounds in a decoder process.
    pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)


def _unidentified(data: bytes, limits: ImageLimits) -> InvalidImage:
    name = sniffed_format(data)
    if name is None:
        return InvalidImage(f"the {len(data)} bytes are no image in an allowed format ({', '.join(limits.formats)})")
    if name in limits.formats:
        return InvalidImage(f"the {name} image's header is corrupt, or of a variant that cannot be read")
    hint = f"; {_HEIF_HINT}" if name == "HEIF" else ""
    return UnsupportedImageFormat(f"{name} is not an allowed image format ({', '.join(limits.formats)}){hint}")


def _webp_canvas(data: bytes) -> tuple[int, int] | None:
    """Width and height in the header of a WebP; None for other data."""
    if len(data) < 30 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    chunk = data[12:16]
    if chunk == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None


def check_dimensions(width: int, height: int, limits: ImageLimits) -> None:
    """Refuse an image beyond the limits of its sides.

    Raises:
        TooManyPixels, InvalidImage: as said.
    """
    if width * height > limits.max_pixels:
        raise TooManyPixels(
            f"the image has {width}x{height} = {width * height} pixels; {limits.max_pixels} are allowed"
        )
    if min(width, height) < limits.min_side:
        raise InvalidImage(f"the image is {width}x{height} pixels; each side needs at least {limits.min_side}")


def _check_frames(image: Image.Image, limits: ImageLimits) -> None:
    # The second picture of a phone's JPEG (MPO) is a depth or gain map, not a frame.
    if image.format == "MPO":
        return
    with as_invalid_image(image.format):
        frames = getattr(image, "n_frames", 1)
    if frames > limits.max_frames:
        raise TooManyFrames(f"the image has {frames} frames or pages; {limits.max_frames} are allowed")


def _check_scans(image: Image.Image, data: bytes, limits: ImageLimits) -> None:
    """Refuse a progressive JPEG whose scans, each as large as the picture, exceed what ``max_pixels`` stands for."""
    if not image.info.get("progressive"):
        return
    scans = data.count(_START_OF_SCAN)  # in coded data 0xff is followed by 0x00 or a restart marker
    if scans * image.width * image.height > limits.max_pixels * MAX_FULL_SCANS:
        raise TooManyPixels(
            f"the progressive JPEG has {scans} scans of {image.width}x{image.height} pixels; together "
            f"{limits.max_pixels * MAX_FULL_SCANS} are allowed"
        )


def decode_image(image: Image.Image) -> Image.Image:
    """Decode the current frame of an opened image to RGB, as `load_rgb` does; the limits are not checked.

    Raises:
        InvalidImage: it is truncated or corrupt.
    """
    with as_invalid_image(image.format):
        frame = _first_frame_box(image)
        _scale_colour_key(image)
        image.load()
        # Integers of a file are 16-bit samples, also where Pillow's mode for them is I (PGM, TIFF).
        is_16_bit = image.mode.startswith("I;16") or image.format is not None
        rgb = _flatten(_to_srgb(_oriented(_upright_light(image))), is_16_bit=is_16_bit)
    if frame is None:
        return rgb
    canvas = Image.new("RGB", rgb.size, WHITE)
    canvas.paste(rgb.crop(frame), frame[:2])
    return canvas


def _first_frame_box(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Box of a GIF's first frame if it leaves some canvas free, which Pillow fills with an arbitrary colour."""
    tiles = getattr(image, "tile", None)
    if image.format != "GIF" or not tiles or image.tell():
        return None
    box = tiles[0][1]
    return None if box == (0, 0, *image.size) else box


def _scale_colour_key(image: Image.Image) -> None:
    """Scale a PNG's transparent colour to 8 bits: Pillow scales the samples, but not the key."""
    key, tiles = image.info.get("transparency"), getattr(image, "tile", None)
    if image.format != "PNG" or key is None or not tiles:
        return
    match tiles[0][3]:
        case "L;2":
            image.info["transparency"] = key * 85
        case "L;4":
            image.info["transparency"] = key * 17
        case "RGB;16B":
            image.info["transparency"] = tuple(sample >> 8 for sample in key)


def _upright_light(image: Image.Image) -> Image.Image:
    """Invert 16-bit TIFF samples of WhiteIsZero; Pillow does so for 8 bits only."""
    tags = getattr(image, "tag_v2", {})
    if not image.mode.startswith("I;16") or tags.get(_TIFF_PHOTOMETRIC) != 0:
        return image
    light = Image.fromarray(np.uint16(65535) - np.asarray(image).astype(np.uint16))
    light.info = image.info
    return light


@contextmanager
def as_invalid_image(name: str | None) -> Iterator[None]:
    """Replace a decoder's exception by one error: the originals contain addresses and library internals."""
    try:
        yield
    except (MemoryError, InvalidImage):
        raise
    except Exception:
        raise InvalidImage(f"the {name + ' ' if name else ''}image is truncated or corrupt") from None


def _oriented(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block counts as none
        return image


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert an image with an embedded ICC profile to sRGB; an unusable profile counts as none."""
    embedded = image.info.get("icc_profile")
    if not embedded:
        return image
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(embedded))
        if "sRGB" in (profile.profile.profile_description or ""):
            return image
        if (profile.profile.xcolor_space.strip(), image.mode) not in _PROFILED_MODES:
            return image
        colour = image.getchannel("L") if image.mode == "LA" else image
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        srgb = ImageCms.profileToProfile(colour, profile, ImageCms.createProfile("sRGB"), outputMode=mode)
        if srgb is not None and image.mode == "LA":
            srgb.putalpha(image.getchannel("A"))
        return srgb or image
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image


def _flatten(image: Image.Image, *, is_16_bit: bool = False) -> Image.Image:
    """Convert any mode to RGB, on white where it is transparent; ``is_16_bit`` is about integer samples."""
    if image.mode.startswith("I"):
        image = _integers_to_grey(image, is_16_bit=is_16_bit)
    elif image.mode == "F":
        image = Image.fromarray(_unit_to_bytes(np.asarray(image)))
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy() if image.readonly else image
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    flat = Image.new("RGB", image.size, WHITE)
    flat.paste(image, mask=image.getchannel("A"))
    return flat


def _integers_to_grey(image: Image.Image, *, is_16_bit: bool) -> Image.Image:
    samples = np.asarray(image)
    if is_16_bit and samples.size and (samples.min() < 0 or samples.max() > 65535):
        raise InvalidImage("the image's integer samples are not within 16 bits")
    grey = Image.fromarray(_wide_to_bytes(samples) if is_16_bit else _array_to_bytes(samples))
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey.putalpha(Image.fromarray(np.where(samples == key, 0, 255).astype(np.uint8)))
    return grey


def _from_array(array: np.ndarray, limits: ImageLimits) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4)):
        hint = ""
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            hint = "; channels come last: array.transpose(1, 2, 0)"
        elif array.ndim == 4:
            hint = "; pass the images one by one, list(array), not as a batch"
        raise InvalidImage(f"an image array has shape [H, W] or [H, W, 1..4], not {list(array.shape)}{hint}")
    height, width = array.shape[:2]
    if not height or not width:
        raise InvalidImage(f"the image array is empty: shape {list(array.shape)}")
    check_dimensions(width, height, limits)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(_array_to_bytes(array)))


def _array_to_bytes(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # of either byte order
        return _wide_to_bytes(array)
    if np.issubdtype(array.dtype, np.floating):
        return _unit_to_bytes(array)
    if np.issubdtype(array.dtype, np.integer):
        if array.min() < 0 or array.max() > 255:
            raise InvalidImage(
                f"an {array.dtype} image holds 0..255, not {array.min()}..{array.max()}; for 0..65535 pass uint16"
            )
        return array.astype(np.uint8)
    raise InvalidImage(f"an image array holds integers or floats, not {array.dtype}")


def _wide_to_bytes(samples: np.ndarray) -> np.ndarray:
    """0..65535 to 0..255, rounded: the exact inverse of repeating a byte."""
    return ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _unit_to_bytes(samples: np.ndarray) -> np.ndarray:
    # float16 has no room for the product of a number beyond 257.
    levels = np.rint(samples.astype(np.promote_types(samples.dtype, np.float32), copy=False) * 255.0)
    if not (levels.min() >= 0.0 and levels.max() <= 255.0):  # false for NaN
        low, high = float(samples.min()), float(samples.max())
        raise InvalidImage(
            f"a float image holds values in 0..1, not {low:g}..{high:g}; for 0..255 pass uint8, or divide by 255"
        )
    return levels.astype(np.uint8)
