"""The content digest of a picture: SHA-256 of its pixels and size, whatever file they came in."""

from __future__ import annotations

import hashlib
import struct

from PIL import Image

_DIGEST_STRIP_PIXELS = 1 << 20


def pixel_digest(rgb: Image.Image) -> bytes:
    """SHA-256 (32 bytes) over mode, size and pixels, so that equal bytes of another shape differ."""
    digest = hashlib.sha256(rgb.mode.encode() + struct.pack(">II", rgb.width, rgb.height))
    rows = max(1, _DIGEST_STRIP_PIXELS // rgb.width)
    for top in range(0, rgb.height, rows):
        digest.update(rgb.crop((0, top, rgb.width, min(top + rows, rgb.height))).tobytes())
    return digest.digest()
