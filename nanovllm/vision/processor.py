"""Vision processor: placeholders to tokens, images to embeddings through the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from nanovllm.errors import ConfigurationError, InvalidInput, PlaceholderMismatch, counted
from nanovllm.image_placeholder import IMAGE_PLACEHOLDER
from nanovllm.vision.embedding_cache import CacheOutcome, EmbeddingCache, embedding_key
from nanovllm.vision.encoders.base import ImageEncoder
from nanovllm.vision.images.decode import DEFAULT_LIMITS, ImageLimits, ImageSource, is_image_source, read_source
from nanovllm.vision.images.preprocess import PreparedImage, prepare_image

OneImage = ImageSource | PreparedImage
PromptImages = OneImage | Iterable[OneImage] | None
"""Images of one prompt: a flat sequence, an image alone, or nothing."""


def is_image(value: object) -> TypeGuard[OneImage]:
    """Whether ``value`` has the type of an image."""
    return isinstance(value, PreparedImage) or is_image_source(value)


def as_list(values: Any) -> list[Any] | None:
    """Items of a sequence or iterator; None for an image and other values without an order of items."""
    if is_image(values) or not isinstance(values, (Sequence, Iterator)):
        return None
    return list(values)


def image_list(images: PromptImages, num_placeholders: int | None = None) -> list[OneImage]:
    """Images of one prompt, in the order of their placeholders.

    Raises:
        InvalidInput: neither an image nor a flat sequence of images; shows the list that fits ``num_placeholders``.
    """
    if images is None or is_image(images):
        return [] if images is None else [images]
    listed = as_list(images)
    if listed is None or not all(map(is_image, listed)):
        wanted = "[image, …]" if num_placeholders is None else written(num_placeholders)
        raise InvalidInput(
            f"the images of one prompt are a flat list: images={wanted}, not {shape_of(listed or images)}"
        )
    return listed


def written(num_images: int) -> str:
    """List of a prompt's images as a caller writes it."""
    return f"[{', '.join(['image'] * num_images)}]"


def shape_of(value: object) -> str:
    """Lists and types within a value, such as ``[ndarray, [str, str]]``, for messages."""
    if not isinstance(value, (list, tuple)):
        return type(value).__name__
    return f"[{', '.join([shape_of(item) for item in value[:4]] + ['…'] * (len(value) > 4))}]"


class VisionProcessor:
    """Images and their placeholders for one encoder.

    ``image_token_id`` unset is ``image_token``'s of the Hugging Face ``tokenizer``. Without a ``cache`` nothing is kept
    between calls.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        *,
        tokenizer: Any = None,
        image_token: str = IMAGE_PLACEHOLDER,
        image_token_id: int | None = None,
        cache: EmbeddingCache[PreparedImage] | None = None,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        if image_token_id is None and tokenizer is not None:
            image_token_id = tokenizer.get_vocab().get(image_token)
        self.encoder = encoder
        self.image_token = image_token
        self.image_token_id = image_token_id
        self.cache: EmbeddingCache[PreparedImage] = cache if cache is not None else EmbeddingCache(0)
        self.limits = limits

    def process_images(self, images: PromptImages) -> tuple[Tensor, int]:
        """Embed images: features ``[len(images) × tokens, hidden_size]`` and the number of tokens an image.

        Where images keep their own size, each has its own number of features, and the second value is the most.
        """
        embedded = [embedding for embedding, _ in self.embed([self.prepare(image) for image in image_list(images)])]
        if not embedded:
            return torch.empty(0, self.encoder.hidden_size, dtype=self.encoder.dtype), self.encoder.num_vision_tokens
        return torch.cat(embedded), self.encoder.num_vision_tokens

    def replace_image_placeholders(self, text: str, images: PromptImages) -> tuple[str, list[int]]:
        """Repeat every placeholder as often as its image has tokens.

        Returns the new text and, for each image, the character in it at which its first token starts.

        Raises:
            PlaceholderMismatch: there are more or fewer placeholders than images.
        """
        parts = text.split(self.image_token)
        pictures = image_list(images, len(parts) - 1)
        self.check_placeholders(len(parts) - 1, len(pictures))
        positions: list[int] = []
        modified = parts[0]
        for part, image in zip(parts[1:], pictures, strict=True):
            positions.append(len(modified))
            modified += self.image_token * self.encoder.num_tokens(self.prepare(image).size) + part
        return modified, positions

    def get_image_token_ids(self, num_images: int) -> list[int]:
        """Image token, once for every position of ``num_images`` images.

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
                f"the prompt has {counted(num_placeholders, f'{self.image_token} placeholder')} "
                f"for {counted(num_images, 'image')}"
            )

    def prepare(self, source: OneImage, salt: bytes = b"") -> PreparedImage:
        """Decode and transform an image for this encoder, unless the embedding of the same file is cached.

        Raises:
            InvalidInput: an image that was prepared for another encoder.
            InvalidImage: as `nanovllm.vision.images.decode.load_rgb`.
        """
        if isinstance(source, PreparedImage):
            if not self.encoder.accepts(source.size):
                raise InvalidInput(f"an image was prepared as {source.size} pixels, which this model does not take")
            return source
        source = read_source(source, self.limits)
        if not isinstance(source, bytes):
            return prepare_image(source, self.encoder.transform, self.limits)
        digest = hashlib.sha256(source).digest()
        found = self.find(digest, salt)
        return found or replace(prepare_image(source, self.encoder.transform, self.limits), file_digest=digest)

    def preprocess(self, images: Sequence[PreparedImage], salt: bytes = b"") -> None:
        """Do what the encoder can do beforehand for images without an embedding at hand; in any thread.

        Raises InvalidImage for an image that the model does not take.
        """
        for image in images:
            if image.embedding is None and not self.cache.holds(self.key(image, salt)):
                self.encoder.preprocess(image)

    def find(self, file_digest: bytes, salt: bytes = b"") -> PreparedImage | None:
        """Image of the file with this SHA-256, with its embedding where the cache has it; waits for no device."""
        found = self.cache.find(embedding_key(file_digest, self.encoder.revision, salt, kind="file"))
        return None if found is None else replace(found[1], embedding=found[0])

    def key(self, image: PreparedImage, salt: bytes = b"") -> bytes:
        """Key of the image's embedding: pixels, size, encoder, tenant."""
        return embedding_key(image.digest, self.encoder.revision, salt)

    def embed(self, images: Sequence[PreparedImage], salt: bytes = b"") -> list[tuple[Tensor, CacheOutcome]]:
        """Embeddings ``[tokens, width]`` with the cache's outcome; each distinct image is encoded once."""
        wanted = {place: image for place, image in enumerate(images) if image.embedding is None}
        places, keys = list(wanted), [self.key(image, salt) for image in wanted.values()]
        found = self.cache.get_or_compute(
            keys, lambda indices: self.encoder.embed([wanted[places[index]] for index in indices])
        )
        for image, key in zip(wanted.values(), keys, strict=True):
            if image.file_digest is not None:
                name = embedding_key(image.file_digest, self.encoder.revision, salt, kind="file")
                self.cache.name(name, key, replace(image, pixels=None))
        computed = dict(zip(places, found, strict=True))
        return [
            computed[place]
            if image.embedding is None
            else (self.cache.on_device(self.key(image, salt), image.embedding), "hit")
            for place, image in enumerate(images)
        ]
