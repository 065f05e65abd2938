"""The forms in which callers write prompts, as vLLM takes them, and the images that come inside them."""

from __future__ import annotations

import base64
import binascii
from collections import abc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from os import PathLike
from typing import Any

from nanovllm.errors import InvalidInput, PlaceholderMismatch, counted
from nanovllm.vision.processor import OneImage, image_list, is_image, shape_of

ACCEPTED = (
    "a prompt is a string, a list of token ids, a list of messages ({'role': 'user', 'content': …}), or "
    "{'prompt': string} or {'prompt_token_ids': list}, which may have 'multi_modal_data': {'image': image or list}; "
    "many prompts are a list of these"
)
ACCEPTED_IMAGES = "there an image is a PIL image, an array or tensor, bytes, an open file, or a data:image/…;base64 URL"
_WRITTEN = (type(None), str, PathLike, Real)  # URLs, paths, options such as `detail`, and nothing


@dataclass(frozen=True, eq=False)
class ReadPrompt:
    """A prompt without its form: text, token ids, or messages whose image parts are ``{"type": "image"}``.

    ``own_images`` are the images that came inside it, in the order of their places; None is the place of the next one
    that comes beside it. ``is_elsewhere`` tells that a message names one by a path or URL.
    """

    content: str | abc.Sequence[int] | abc.Sequence[Mapping[str, Any]]
    own_images: tuple[OneImage | None, ...] = ()
    is_elsewhere: bool = False

    def images_with(self, beside: list[OneImage]) -> list[OneImage]:
        """All images in the order of their places, ``beside`` those that came beside the prompt.

        Raises:
            InvalidInput: the prompt has its images inside it, or names some by path or URL, which is not opened.
            PlaceholderMismatch: messages have more or fewer places than images beside them.
        """
        free = sum(image is None for image in self.own_images)
        if self.is_elsewhere and len(beside) < free:
            raise InvalidInput(
                "a message names an image by a path or URL, which is not opened: give the image itself there "
                "({'type': 'image', 'image': image}), a data:image/…;base64 URL, or the images in order as images=[…]"
            )
        if free == len(self.own_images):
            return beside
        if not free and beside:
            raise InvalidInput("the prompt has its images inside it: give no images= beside them")
        if free != len(beside):
            raise PlaceholderMismatch(
                f"the messages have {counted(free, 'image part')} without an image for {counted(len(beside), 'image')}"
            )
        waiting = iter(beside)
        return [next(waiting) if image is None else image for image in self.own_images]


def read_prompts(prompts: Any) -> list[ReadPrompt]:
    """The prompts of a list or iterator, where one may stand alone; InvalidInput says what is accepted."""
    prompts = _as_list(prompts)
    if isinstance(prompts, (str, Mapping, ReadPrompt)):
        return [read_prompt(prompts)]
    if isinstance(prompts, (bytes, bytearray, memoryview, abc.Set)) or not isinstance(prompts, Iterable):
        raise refusal(prompts)
    listed = list(prompts)
    is_alone = bool(listed) and (isinstance(listed[0], Integral) or _is_message(listed[0]))
    return [read_prompt(listed)] if is_alone else [read_prompt(prompt) for prompt in listed]


def read_prompt(prompt: Any) -> ReadPrompt:
    """One prompt. Token ids and messages are checked when they are encoded."""
    prompt = _as_list(prompt)
    if isinstance(prompt, ReadPrompt):
        return prompt
    if isinstance(prompt, str):
        return ReadPrompt(prompt)
    if isinstance(prompt, Mapping):
        return _from_mapping(prompt)
    if not _is_list(prompt):
        raise refusal(prompt)
    return _from_messages(prompt) if prompt and isinstance(prompt[0], Mapping) else ReadPrompt(prompt)


def read_conversations(messages: Any) -> list[ReadPrompt]:
    """One list of messages, or a list of such lists."""
    if not _is_list(messages) or not all(isinstance(one, Mapping) or _is_list(one) for one in messages):
        raise InvalidInput(
            "chat takes a list of messages ({'role': 'user', 'content': …}), or a list of such lists, "
            f"not {shape_of(messages)}"
        )
    conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
    return [_from_messages(conversation) for conversation in conversations]


def _as_list(value: Any) -> Any:
    """An array or tensor as the list of its items."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, abc.Sequence) else value


def _is_list(value: Any) -> bool:
    return isinstance(value, abc.Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "content" in value)


def refusal(given: object) -> InvalidInput:
    """The error for what is no prompt."""
    shape = shape_of(given)
    if isinstance(given, Mapping):
        shape = f"{{{', '.join(f'{name!r}: {shape_of(value)}' for name, value in given.items())}}}"
    return InvalidInput(f"{ACCEPTED}; not {shape[:200]}")


def _from_mapping(prompt: Mapping[str, Any]) -> ReadPrompt:
    fields = {str(name): value for name, value in prompt.items() if value is not None}
    data = fields.pop("multi_modal_data", {})
    text, token_ids = fields.pop("prompt", None), _as_list(fields.pop("prompt_token_ids", None))
    if fields:
        raise InvalidInput(f"a prompt has fields that are not supported ({', '.join(fields)[:200]}): {ACCEPTED}")
    # With both, the text is what the tokens came from, as in vLLM.
    content = text if token_ids is None else token_ids
    if not isinstance(text, (str, type(None))) or not (content is text or _is_list(content)) or content is None:
        raise refusal(prompt)
    if not isinstance(data, Mapping) or any(value is not None for name, value in data.items() if name != "image"):
        raise InvalidInput("multi_modal_data is {'image': image} or {'image': [image, …]}: no other data is taken")
    return ReadPrompt(content, tuple(image_list(data.get("image"))))


def _from_messages(messages: abc.Sequence[Any]) -> ReadPrompt:
    """Messages with the images inside them taken out; what is no message or part is left to the encoder's checks."""
    images: list[OneImage | None] = []
    is_elsewhere = False
    plain = []
    for message in messages:
        content: Any = message.get("content") if isinstance(message, Mapping) else None
        if not _is_list(content):
            plain.append(message)
            continue
        parts = []
        for part in content:
            found = _image_values(part)
            if found is None:
                parts.append(part)
                continue
            own = next((image for value in found if (image := _own_image(value)) is not None), None)
            if own is None and (others := [value for value in found if not isinstance(value, _WRITTEN)]):
                raise InvalidInput(f"a message holds an image as {shape_of(others[0])[:200]}: {ACCEPTED_IMAGES}")
            is_elsewhere = is_elsewhere or (own is None and any(value is not None for value in found))
            images.append(own)
            parts.append({"type": "image"})
        plain.append({**message, "content": parts})
    return ReadPrompt(plain, tuple(images), is_elsewhere)


def _image_values(part: Any) -> list[Any] | None:
    """What an image part holds besides its type: an image, a URL, a path, nothing; None for another part."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("image", "image_url", "image_pil"):
        return None
    values = [value for name, value in part.items() if name != "type"]
    return [value.get("url") if isinstance(value, Mapping) else value for value in values]


def _own_image(value: Any) -> OneImage | None:
    """The image itself, or that of a data: URL. Paths are not opened: messages may come from elsewhere."""
    if not isinstance(value, str):
        return value if is_image(value) and not hasattr(value, "__fspath__") else None
    header, found, data = value.partition(";base64,")
    if not found or not header.lower().startswith("data:image/"):
        return None
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidInput("a message holds a data: URL that is not valid base64") from None
