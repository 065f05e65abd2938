"""What a prompt's images become: placeholders to tokens, pictures to embeddings through the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.errors import ConfigurationError, PlaceholderMismatch
from nanovllm.vision.cache import CacheOutcome, EmbeddingCache, embedding_key
from nanovllm.vision.encoder import VisionEncoder
from nanovllm.vision.images import DEFAULT_LIMITS, ImageLimits, ImageSource
from nanovllm.vision.transform import PreparedImage, prepare_image

IMAGE_TOKEN = "<|image|>"  # noqa: S105 (a token of text)


class VisionProcessor:
    """Images and their placeholders for one encoder.

    Args:
        encoder: makes the embeddings.
        tokenizer: a Hugging Face tokenizer, asked for the image token's id where ``image_token_id`` is not given.
        image_token: the text that stands for an image.
        image_token_id: its token.
        cache: shared embeddings; unset, nothing is kept between calls.
        limits: what an image may cost.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        *,
        tokenizer: Any = None,
        image_token: str = IMAGE_TOKEN,
        image_token_id: int | None = None,
        cache: EmbeddingCache | None = None,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        if image_token_id is None and tokenizer is not None:
            image_token_id = tokenizer.get_vocab().get(image_token)
        self.encoder = encoder
        self.image_token = image_token
        self.image_token_id = image_token_id
        self.cache = cache if cache is not None else EmbeddingCache(0)
        self.limits = limits

    def process_images(self, images: Sequence[ImageSource | PreparedImage]) -> tuple[Tensor, int]:
        """Embed images: features ``[len(images) × tokens, hidden_size]`` and the number of tokens an image."""
        embedded = [embedding for embedding, _ in self.embed([self.prepare(image) for image in images])]
        if not embedded:
            return torch.empty(0, self.encoder.hidden_size, dtype=self.encoder.dtype), self.encoder.num_vision_tokens
        return torch.cat(embedded), self.encoder.num_vision_tokens

    def replace_image_placeholders(
        self, text: str, images: Sequence[ImageSource | PreparedImage]
    ) -> tuple[str, list[int]]:
        """Write every placeholder as often as its image has tokens.

        Returns the new text and, for each image, the character at which its first token starts there.

        Raises:
            PlaceholderMismatch: there are more or fewer placeholders than images.
        """
        parts = text.split(self.image_token)
        self.check_placeholders(len(parts) - 1, len(images))
        repeated = self.image_token * self.encoder.num_vision_tokens
        positions: list[int] = []
        modified = parts[0]
        for part in parts[1:]:
            positions.append(len(modified))
            modified += repeated + part
        return modified, positions

    def get_image_token_ids(self, num_images: int) -> list[int]:
        """The image token, once for every position that ``num_images`` images take.

        Raises:
            ConfigurationError: the processor knows neither ``image_token_id`` nor a tokenizer with the image token.
        """
        if self.image_token_id is None:
            raise ConfigurationError(f"the processor needs image_token_id=, or a tokenizer that has {self.image_token}")
        return [self.image_token_id] * (num_images * self.encoder.num_vision_tokens)

    def check_placeholders(self, num_placeholders: int, num_images: int) -> None:
        """Raise `PlaceholderMismatch`, naming both numbers, unless they are equal."""
        if num_placeholders != num_images:
            raise PlaceholderMismatch(
                f"the prompt has {num_placeholders} {self.image_token} placeholders for {num_images} images"
            )

    def prepare(self, source: ImageSource | PreparedImage) -> PreparedImage:
        """Decode and transform an image for this encoder; one that is prepared already is taken as it is."""
        if isinstance(source, PreparedImage):
            return source
        return prepare_image(source, self.encoder.transform, self.limits)

    def num_image_tokens(self, image: PreparedImage) -> int:
        """Positions in the sequence that ``image`` takes."""
        return self.encoder.num_vision_tokens

    def embed(self, images: Sequence[PreparedImage], salt: bytes = b"") -> list[tuple[Tensor, CacheOutcome]]:
        """Embeddings ``[tokens, hidden_size]`` and how the cache served them; each distinct image is encoded once."""
        keys = [embedding_key(image, self.encoder.revision, salt) for image in images]
        return self.cache.get_or_compute(
            keys, lambda indices: list(self.encoder.encode(np.stack([images[index].pixels for index in indices])))
        )
