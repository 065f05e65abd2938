"""Prompts for vLLM: token ids with one placeholder an image, and the check of what vLLM makes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from nanovllm.engine.backends.image_uuid import image_uuid
from nanovllm.errors import UnsupportedModel
from nanovllm.vision.images.preprocess import PreparedImage


def vllm_prompt(token_ids: Sequence[int], images: Sequence[PreparedImage], salt: bytes) -> dict[str, Any]:
    """A prompt of vLLM: images decoded, under names by which its caches find them, apart for each ``salt``."""
    prompt: dict[str, Any] = {"prompt_token_ids": list(token_ids)}
    if images:
        pixels = [image.pixels for image in images if image.pixels is not None]
        prompt["multi_modal_data"] = {"image": [Image.fromarray(one) for one in pixels]}
        prompt["multi_modal_uuids"] = {"image": [image_uuid(image, salt) for image in images]}
    if salt:
        prompt["cache_salt"] = hashlib.sha256(salt).hexdigest()
    return prompt


@dataclass(frozen=True)
class ImageRun:
    """The tokens of one image in an expanded prompt: where they begin, and how many there are."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """Behind the last one."""
        return self.start + self.length


def image_runs(token_ids: Sequence[int], image_token_id: int | None, rendered: dict[str, Any]) -> tuple[ImageRun, ...]:
    """Where the images are in ``rendered``, vLLM's form of the prompt ``token_ids``.

    Raises:
        UnsupportedModel: vLLM has changed other tokens than the placeholders. Where it does not find a placeholder it
            writes the prompt as text and reads it anew, and an untrusted text could then hold special tokens.
    """
    ranges = rendered.get("mm_placeholders", {}).get("image", ())
    runs = tuple(ImageRun(one.offset, one.length) for one in sorted(ranges, key=lambda one: one.offset))
    expanded = rendered["prompt_token_ids"]
    if list(_expanded(token_ids, image_token_id, runs, expanded)) != expanded:
        raise UnsupportedModel("vLLM rewrites this model's prompts around images: take another backend for it")
    return runs


def _expanded(
    token_ids: Sequence[int], image_token_id: int | None, runs: Sequence[ImageRun], tokens: Sequence[int]
) -> Iterator[int]:
    """``token_ids`` with each placeholder replaced by its run of ``tokens``."""
    waiting = iter(runs)
    for token in token_ids:
        run = next(waiting, None) if token == image_token_id else None
        if run is None:
            yield token
        else:
            yield from tokens[run.start : run.end]
