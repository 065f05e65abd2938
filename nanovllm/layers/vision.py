"""The vision encoder and processor, where the user's guide imports them from."""

from nanovllm.vision.encoders.clip import VisionEncoder
from nanovllm.vision.processor import VisionProcessor

__all__ = ["VisionEncoder", "VisionProcessor"]
