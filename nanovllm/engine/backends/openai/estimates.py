"""Estimates of tokens where servers alone can count them: of texts by characters, of images by pixels.

They are high for the tokenizers and towers of document models, and no bounds.
"""

from __future__ import annotations

from math import ceil

from nanovllm.engine.backends.base import Request
from nanovllm.image_placeholder import IMAGE_PLACEHOLDER

LETTERS_A_TOKEN = 3
"""ASCII letters and spaces; a digit, a sign or any other character counts as a token of its own."""
PIXELS_A_SIDE = 28
"""Sides of the square that is a token of an image, as in Qwen2.5-VL; each row of squares has one token more."""
TEMPLATE_TOKENS = 32
"""What a chat template puts around a prompt."""


def text_tokens(text: str) -> int:
    """About how many tokens ``text`` has, without the placeholders of its images."""
    text = text.replace(IMAGE_PLACEHOLDER, "")
    letters = sum(char == " " or (char.isascii() and char.isalpha()) for char in text)
    return ceil(letters / LETTERS_A_TOKEN) + len(text) - letters


def image_tokens(width: int, height: int) -> int:
    """About how many tokens an image of so many pixels has."""
    return ceil(height / PIXELS_A_SIDE) * (ceil(width / PIXELS_A_SIDE) + 1)


def request_tokens(request: Request) -> int:
    """About how many tokens of prompt and answer ``request`` has; its answer is as long as ``max_tokens`` allows."""
    texts = [request.prompt or "", *map(str, request.messages or ())]
    images = sum(image_tokens(one.width, one.height) for one in request.images)
    return TEMPLATE_TOKENS + sum(map(text_tokens, texts)) + images + (request.sampling.max_tokens or 0)
