"""Towers of any image-text model of transformers: its own processor and its own features, one image at a time."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanovllm.errors import InvalidImage, UnsupportedModel
from nanovllm.vision.encoders.base import ImageEncoder, ImageLayout, to_device, tower_fields
from nanovllm.vision.encoders.generic_processor import OneImageProcessor, image_token_of
from nanovllm.vision.images.preprocess import AS_DECODED, PreparedImage

_KNOWN_SIZES = 4096  # whose layouts are kept
_USUAL_SIDE = 1024  # pixels of the square that tells how many tokens an image takes
_MAX_WAITING_BYTES = 512 << 20  # of images that are preprocessed and wait for the tower
_TEXT_BEFORE = 2  # tokens, where positions are learnt


Inputs = dict[str, Tensor]
"""What a processor makes of an image, by the names of the model's arguments."""


class GenericEncoder(ImageEncoder):
    """The parts of a model of transformers that make features of images.

    Images come as they are decoded; the model's processor sees one at a time, so that an image's tokens and features
    depend on it alone. Raises UnsupportedModel where the model has no such features.
    """

    batch_size = 1
    preprocesses = True

    def __init__(
        self, model: Any, processor: OneImageProcessor, *, name: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        """``model`` has its weights; it keeps the parts that compute on text."""
        super().__init__()
        base = model.base_model
        if not hasattr(base, "get_image_features"):
            raise UnsupportedModel(f"{type(model).__name__} has no features of images")
        self._of_model = (base, model.config)  # a tuple: not registered as a module of this one
        self._processor = processor
        self._takes = inspect.signature(base.get_image_features).parameters
        self._image_token_id = image_token_of(model.config)
        self._layouts: dict[tuple[int, int], ImageLayout] = {}
        self._inputs: dict[bytes, Inputs] = {}  # of images that are preprocessed, by their digests
        self._lock = Lock()
        text = {id(module) for module in (*model.get_decoder().modules(), model.get_input_embeddings())}
        towers = [child for child in base.children() if not text.intersection(map(id, child.modules()))]
        self.tower = nn.ModuleList(towers)
        self.separators = nn.ParameterList(base.parameters(recurse=False))  # some have such between rows and views
        self.transform = AS_DECODED
        self.hidden_size = int(model.config.get_text_config().hidden_size)
        self.num_vision_tokens = self.num_tokens((_USUAL_SIDE, _USUAL_SIDE))
        self._finish(name, True, dtype, device)
        try:
            _, inputs = processor(np.zeros((_USUAL_SIDE // 8, _USUAL_SIDE // 8, 3), np.uint8))
            self.width = self._features(inputs).shape[1]
        except Exception as error:  # a tower of transformers raises whatever it likes
            why = f"{type(error).__name__}: {error}"
            raise UnsupportedModel(f"{type(model).__name__} makes no features of an image: {why}") from error

    def layout(self, size: tuple[int, int]) -> ImageLayout:
        """See ImageEncoder; processors look at the size of an image alone."""
        known = self._layouts.get(size)
        return known or self._learn(size, *self._processor(np.zeros((*size, 3), np.uint8)))

    def preprocess(self, image: PreparedImage) -> None:
        """See ImageEncoder: the model's processor, which may take a page a tenth of a second and more."""
        if image.pixels is None or image.digest in self._inputs:
            return
        ids, inputs = self._processor(image.pixels)
        layout = self._layouts.get(image.size) or self._learn(image.size, ids, inputs)
        if layout.token_ids != tuple(ids):
            raise InvalidImage("the model's processor gives this image other tokens than others of its size")
        with self._lock:
            self._inputs[image.digest] = inputs
            while sum(map(_nbytes, self._inputs.values())) > _MAX_WAITING_BYTES:
                del self._inputs[next(iter(self._inputs))]

    @torch.no_grad()
    def embed(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        """See ImageEncoder."""
        embeddings = []
        for image in images:
            with self._lock:
                inputs = self._inputs.pop(image.digest, None)
            with self._counted(1):
                if inputs is None:
                    assert image.pixels is not None
                    _, inputs = self._processor(image.pixels)
                embeddings.append(self._features(inputs))
        return embeddings

    def num_tokens(self, size: tuple[int, int]) -> int:
        """Tokens of an image, those between its embeddings included."""
        return len(self.layout(size).token_ids)

    def accepts(self, size: tuple[int, int]) -> bool:
        """Whether an image has pixels."""
        return min(size) > 0

    def _architecture(self) -> dict[str, Any]:
        model = tower_fields(self._of_model[1])
        model.pop("_name_or_path", None)  # where it lies
        return {"model": model, "processor": self._processor.fingerprint()}

    def _learn(self, size: tuple[int, int], ids: list[int], inputs: Inputs) -> ImageLayout:
        places = tuple(place for place, token in enumerate(ids) if token == self._image_token_id)
        offsets, advance = self._positions(ids, inputs)
        if len(self._layouts) >= _KNOWN_SIZES:
            self._layouts.clear()
        self._layouts[size] = layout = ImageLayout(tuple(ids), places, offsets, advance)
        return layout

    def _positions(self, ids: list[int], inputs: Inputs) -> tuple[tuple[tuple[int, ...], ...] | None, int]:
        """Positions of an image's tokens relative to the first's, and of the token behind; None: they count on."""
        rope_index = getattr(self._of_model[0], "get_rope_index", None)
        if rope_index is None:
            return None, len(ids)
        around, image = [0] * _TEXT_BEFORE, self._image_token_id or 0
        tokens = torch.tensor([[*around, *ids, 0]])
        grids = {name: value for name, value in inputs.items() if name.endswith("_grid_thw")}
        found = rope_index(tokens, mm_token_type_ids=torch.eq(tokens, image).int(), **grids)[0][:, 0]
        relative = (found[:, _TEXT_BEFORE:] - _TEXT_BEFORE).T.tolist()
        return tuple(map(tuple, relative[:-1])), int(max(relative[-1]))

    def embed_largest(self, max_tokens: int) -> list[Tensor]:
        """See ImageEncoder; none where the model's processor refuses the image."""
        try:
            return super().embed_largest(max_tokens)
        except InvalidImage:
            return []

    def _largest_pass(self, max_tokens: int) -> tuple[tuple[int, int], int]:
        # What a processor makes of an image has no bound that is known here: as of a page in high resolution.
        return (2 * _USUAL_SIDE, 2 * _USUAL_SIDE), 1

    def _embed(self, images: Sequence[np.ndarray]) -> list[Tensor]:
        return [self._features(self._processor(image)[1]) for image in images]

    @torch.no_grad()
    def _features(self, inputs: Inputs) -> Tensor:
        """Features [places, width] of one image: the tower's, then those for further layers."""
        device = next(self.tower.parameters()).device
        taken = {
            name: to_device(value, device).to(self.dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
            if name in self._takes
        }
        output = self._of_model[0].get_image_features(**taken, return_dict=True)
        levels = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
        return torch.cat([_rows(level) for level in levels], -1)


def _nbytes(inputs: Inputs) -> int:
    return sum(value.nbytes for value in inputs.values())


def _rows(features: Any) -> Tensor:
    """Features of tiles, a list or [tiles, n, width], as rows [tiles * n, width]."""
    if isinstance(features, (list, tuple)):
        return torch.cat([_rows(part) for part in features])
    rows: Tensor = features.flatten(0, -2)
    return rows
