"""The name under which vLLM caches an image. No torch."""

from __future__ import annotations

import hashlib

from nanovllm.vision.images.preprocess import PreparedImage


def image_uuid(image: PreparedImage, salt: bytes) -> str:
    """SHA-256 (hex) of ``salt`` and the image's digest: equal pictures share caches where their salts are equal."""
    return hashlib.sha256(salt + image.digest).hexdigest()
