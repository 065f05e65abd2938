"""Request bodies: prompts and messages as chat completions, with their images, sampling parameters and constraints.

Untrusted text stays the content of a message. How a server's chat template and tokenizer treat special tokens written
in it is the server's matter.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nanovllm.engine.backends.base import Request
from nanovllm.engine.backends.image_uuid import image_uuid
from nanovllm.engine.backends.openai.options import OpenAIOptions
from nanovllm.engine.text.chat_messages import Piece, Turn, read_turn, split_images
from nanovllm.errors import InvalidInput, PlaceholderMismatch, counted
from nanovllm.vision.images.preprocess import PreparedImage

CHAT, COMPLETIONS = "/chat/completions", "/completions"
PREFIX_CHARS = 256
"""Of the text by whose beginning requests without images are kept together."""


@dataclass(frozen=True)
class RequestBody:
    """A checked request: where it goes, its fields but the messages, and the messages; ``affinity``: see `Pool`."""

    path: str
    fields: dict[str, Any]
    turns: tuple[Turn, ...]
    images: tuple[PreparedImage, ...]
    affinity: bytes
    cache_salt: bytes = b""

    def has_urls(self, options: OpenAIOptions) -> bool:
        """Whether the server must fetch an image by a URL."""
        return options.sign_url is not None and any(image.stored_at is not None for image in self.images)

    def encode(self, options: OpenAIOptions) -> bytes:
        """The body. Signs URLs of images and encodes the others: may block. Raises SystemicError as ``sign_url``."""
        fields = self.fields
        if self.path == CHAT:
            images = iter(self.images)
            salt = self.cache_salt if options.dialect.image_uuid else b""
            fields = fields | {"messages": [_message(turn, images, salt, options) for turn in self.turns]}
        # Escaped: half a surrogate pair has no bytes in UTF-8.
        return json.dumps(fields, allow_nan=False, separators=(",", ":")).encode()


def request_body(request: Request, model: str, options: OpenAIOptions) -> RequestBody:
    """Check ``request`` and map its parameters.

    Raises:
        InvalidInput: it asks for what the dialect or the settings do not have, or its images and placeholders differ.
    """
    dialect, sampling = options.dialect, request.sampling
    options.check(sampling)
    fields: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    fields |= dialect.write(sampling)
    kwargs = options.chat_template_kwargs | dict(request.chat_template_kwargs or {})
    if kwargs and not dialect.template_kwargs:
        raise InvalidInput(f"chat_template_kwargs: {dialect.title} has none")
    if kwargs:
        fields["chat_template_kwargs"] = kwargs
    if request.cache_salt and dialect.cache_salt:
        # A digest: the salt itself keeps tenants apart elsewhere too.
        fields["cache_salt"] = hashlib.sha256(request.cache_salt).hexdigest()
    if request.raw_prompt:
        return _raw(request, fields, options)
    if request.prompt is not None:
        turns: tuple[Turn, ...] = (Turn("user", split_images(request.prompt), is_parts=False),)
    else:
        turns = tuple(read_turn(number, message) for number, message in enumerate(request.messages or ()))
    if not turns or not any(turn.pieces != ("",) for turn in turns):
        raise InvalidInput("the prompt is empty")
    places = sum(piece is None for turn in turns for piece in turn.pieces)
    if places != len(request.images):
        raise PlaceholderMismatch(
            f"the prompt has {counted(places, 'image placeholder')} for {counted(len(request.images), 'image')}"
        )
    if request.images and not options.images:
        raise InvalidInput(f"{counted(len(request.images), 'image')}, but remote.images says that {model} takes none")
    return RequestBody(CHAT, fields, turns, request.images, _affinity(request, turns), request.cache_salt)


def _raw(request: Request, fields: dict[str, Any], options: OpenAIOptions) -> RequestBody:
    if not options.raw_prompts:
        raise InvalidInput("a raw prompt is taken only where remote.raw_prompts allows it")
    if request.prompt is None or request.images or request.sampling.logprobs is not None:
        raise InvalidInput("a raw prompt is text, without images and logprobs")
    fields = fields | {"prompt": request.prompt}
    if "max_completion_tokens" in fields:
        fields["max_tokens"] = fields.pop("max_completion_tokens")
    turns = (Turn("user", (request.prompt,), is_parts=False),)
    return RequestBody(COMPLETIONS, fields, turns, (), _affinity(request, turns))


def _affinity(request: Request, turns: tuple[Turn, ...]) -> bytes:
    """What requests have in common that a server's caches may hold: the first image, or the beginning of the text."""
    key = hashlib.sha256(request.cache_salt)
    if request.images:
        key.update(request.images[0].digest)
    else:
        text = "".join(piece for turn in turns for piece in turn.pieces if piece is not None)
        key.update(text[:PREFIX_CHARS].encode(errors="replace"))
    return key.digest()


def _message(turn: Turn, images: Iterator[PreparedImage], salt: bytes, options: OpenAIOptions) -> dict[str, Any]:
    if not turn.is_parts and len(turn.pieces) == 1:
        return {"role": turn.role, "content": turn.pieces[0]}
    parts = [_part(piece, images, salt, options) for piece in turn.pieces if piece != ""]
    return {"role": turn.role, "content": parts or ""}


def _part(piece: Piece, images: Iterator[PreparedImage], salt: bytes, options: OpenAIOptions) -> dict[str, Any]:
    if piece is not None:
        return {"type": "text", "text": piece}
    image = next(images)
    part = {"type": "image_url", "image_url": {"url": image_url(image, options)}}
    # Without a salt the server's own digest: under a name that its other clients can compute they could store others.
    return part | {"uuid": image_uuid(image, salt)} if salt else part


def image_url(image: PreparedImage, options: OpenAIOptions) -> str:
    """URL of an image: presigned where settings and image allow it, else with the file inside.

    Raises:
        SystemicError: as ``sign_url``.
    """
    if options.sign_url is not None and image.stored_at is not None:
        return options.sign_url(*image.stored_at)
    if image.file is None:
        raise InvalidInput("an image was not prepared for this engine: prepare_image(source, engine.image_transform)")
    return f"data:{image.file.media_type};base64,{base64.b64encode(image.file.data).decode()}"
