"""Image files for readers elsewhere: which files every reader sees alike, and encoding of pixels."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

from PIL import ExifTags, Image

MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
JPEG_QUALITY = 95


@dataclass(frozen=True)
class ImageFile:
    """An encoded image; ``is_original``: the file that the image came in."""

    data: bytes
    media_type: str
    is_original: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.data)


def is_plain(data: bytes) -> str | None:
    """Media type of a file in which every reader sees the pixels that `load_rgb` sees; None for any other.

    Readers differ in orientation, colour profiles, transparency, frames, 16-bit samples and CMYK.
    """
    try:
        with Image.open(io.BytesIO(data), formats=tuple(MEDIA_TYPES)) as image:
            is_readable_alike = (
                image.mode in ("RGB", "L")
                and getattr(image, "n_frames", 1) == 1
                and "transparency" not in image.info
                and not image.info.get("icc_profile")
                and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
            )
            return MEDIA_TYPES.get(str(image.format)) if is_readable_alike else None
    except Exception:  # Pillow's decoders raise what they like; the image itself was decoded before
        return None


def encode_image(rgb: Image.Image, file_format: Literal["png", "jpeg"]) -> ImageFile:
    """``rgb`` as a file: lossless as ``png``, smaller as ``jpeg``."""
    buffer = io.BytesIO()
    if file_format == "png":
        rgb.save(buffer, "PNG", compress_level=1)
    else:
        rgb.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return ImageFile(buffer.getvalue(), f"image/{file_format}")
