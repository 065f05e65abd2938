"""The guide's path to the image transform; the code is in `nanovllm.vision.images.preprocess`."""

from nanovllm.vision.images.preprocess import ImageTransform, PreparedImage, prepare_image

__all__ = ["ImageTransform", "PreparedImage", "prepare_image"]
