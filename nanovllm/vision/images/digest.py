"""Content digest of an image: equal pictures have equal digests, whatever file each came in."""

from __future__ import annotations

import hashlib
import struct

from PIL import Image

DIGEST_BYTES = 32
_STRIP_PIXELS = 1 << 20


def pixel_digest(rgb: Image.Image) -> bytes:
    """Pixel digest of an image: SHA-256 (32 bytes) over mode, size and pixels."""
    digest = hashlib.sha256(rgb.mode.encode() + struct.pack(">II", rgb.width, rgb.height))
    rows = max(1, _STRIP_PIXELS // rgb.width)
    for top in range(0, rgb.height, rows):
        digest.update(rgb.crop((0, top, rgb.width, min(top + rows, rgb.height))).tobytes())
    return digest.digest()
