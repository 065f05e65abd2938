"""Vision towers of Qwen-VL: every image at its own resolution, a token for each square of patches.

Qwen2.5-VL (arXiv 2502.13923) attends within windows in most layers. Qwen3-VL (arXiv 2511.21631) interpolates learnt
positions, and has features of intermediate layers too, which the language model adds to its first layers (DeepStack,
arXiv 2406.04334): an embedding is the tower's output and these features, concatenated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen3VLConfig, Qwen3VLVisionModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from nanovllm.checkpoints.config_fields import reading_config
from nanovllm.checkpoints.resolve import checkpoint_name, read_config
from nanovllm.errors import ConfigurationError, UnsupportedModel
from nanovllm.vision.encoders.base import ImageEncoder, to_device, tower_fields
from nanovllm.vision.encoders.packed_attention import is_packed
from nanovllm.vision.images.preprocess import ImageTransform

_TOWERS: dict[str, tuple[Any, Any]] = {
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VisionTransformerPretrainedModel),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLVisionModel),
}


def vision_config(fields: dict[str, Any]) -> Any:
    """The tower's part of a checkpoint's configuration."""
    return _TOWERS[fields["model_type"]][0].from_dict(fields).vision_config


def native_transform(
    directory: Path,
    config: Any,
    *,
    min_pixels: int | None,
    max_pixels: int | None,
    max_image_size: int | None,
    max_image_tokens: int | None,
) -> ImageTransform:
    """The preprocessing of a checkpoint with this configuration of a tower, within bounds; as `NativeEncoder`'s."""
    transform = ImageTransform.from_preprocessor_config(directory)
    multiple = config.patch_size * config.spatial_merge_size
    if transform.resize != "pixel_budget" or transform.size[2] != multiple:
        name = checkpoint_name(directory)
        raise UnsupportedModel(f"the preprocessor of {name!r} makes no multiples of {multiple} pixels")
    smallest, largest = min_pixels or transform.size[0], max_pixels or transform.size[1]
    if max_image_size is not None:
        largest = min(largest, max_image_size**2)
    if max_image_tokens is not None:
        largest = min(largest, max_image_tokens * multiple**2)
    if largest < multiple**2 or (smallest > largest and min_pixels is not None):
        raise ConfigurationError(
            f"no image has between {smallest} and {largest} pixels in squares of {multiple}: "
            "see min_pixels, max_pixels, max_image_size, max_image_tokens and num_vision_tokens"
        )
    return replace(transform, size=(min(smallest, largest), largest, multiple))


def most_tokens(transform: ImageTransform) -> int:
    """The most tokens of an image under a pixel budget."""
    _, largest, multiple = transform.size
    return largest // multiple**2


def native_tokens(transform: ImageTransform, size: tuple[int, int]) -> int:
    """The tokens of an image of this (height, width) after the transform: one for each square of patches."""
    return (size[0] // transform.size[2]) * (size[1] // transform.size[2])


class NativeEncoder(ImageEncoder):
    """Tower and merger of a Qwen2.5-VL or Qwen3-VL checkpoint, with its own preprocessing.

    ``min_pixels`` and ``max_pixels`` replace the checkpoint's; ``max_image_size`` lowers the second to the area of a
    square of that many pixels a side, and ``max_image_tokens`` to the area that takes as many tokens.

    Raises:
        ModelNotFound: the directory lacks a file or tensors.
        UnsupportedModel: another kind of checkpoint, or another preprocessing than its family's.
        ConfigurationError: bounds between which no image fits.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_image_size: int | None = None,
        max_image_tokens: int | None = None,
        freeze_vision_weights: bool = True,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        directory = Path(directory)
        name, fields = checkpoint_name(directory), read_config(directory)
        if fields.get("model_type") not in _TOWERS:
            raise UnsupportedModel(f"{name} is a {fields.get('model_type')!r} checkpoint, not a Qwen-VL one")
        with reading_config(fields, name):
            config = vision_config(fields)
            self.tower = _TOWERS[fields["model_type"]][1](config)
        self._load(self.tower, directory, ("model.visual.", "visual."))
        self.tower.patch_embed.proj = _PatchProjection(self.tower.patch_embed.proj)
        self.transform = native_transform(
            directory,
            config,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            max_image_size=max_image_size,
            max_image_tokens=max_image_tokens,
        )
        self.num_vision_tokens = most_tokens(self.transform)
        self.hidden_size = int(config.out_hidden_size)
        # The tower's output, and each of its deep features.
        self.width = self.hidden_size * (1 + len(getattr(config, "deepstack_visual_indexes", ())))
        self._finish(name, freeze_vision_weights, dtype, device)

    def num_tokens(self, size: tuple[int, int]) -> int:
        """A token for each square of patches."""
        return native_tokens(self.transform, size)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of an image's tokens."""
        multiple = self.transform.size[2]
        return size[0] // multiple, size[1] // multiple

    def accepts(self, size: tuple[int, int]) -> bool:
        """Whether both sides are multiples, and no larger than the transform makes them."""
        _, largest, multiple = self.transform.size
        return min(size) > 0 and size[0] % multiple == size[1] % multiple == 0 and size[0] * size[1] <= largest

    def _largest_pass(self, max_tokens: int) -> tuple[tuple[int, int], int]:
        _, largest, multiple = self.transform.size
        side = isqrt(min(largest, max_tokens * multiple**2)) // multiple * multiple
        count = self.batch_patches // (side // self.tower.config.patch_size) ** 2
        return (side, side), min(self.batch_size, max(1, count))

    def _architecture(self) -> dict[str, Any]:
        return {"tower": tower_fields(self.tower.config)}

    def _embed(self, images: Sequence[np.ndarray]) -> list[Tensor]:
        return [embedding for batch in self._batches(images) for embedding in self._run(batch)]

    def _batches(self, images: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
        batch: list[np.ndarray] = []
        budget = self.batch_patches
        for image in images:
            patches = image.shape[0] * image.shape[1] // self.tower.config.patch_size**2
            if batch and patches > budget:
                yield batch
                batch, budget = [], self.batch_patches
            batch.append(image)
            budget -= patches
        yield batch

    def _run(self, images: Sequence[np.ndarray]) -> Sequence[Tensor]:
        patch = self.tower.config.patch_size
        grids = torch.tensor([[1, image.shape[0] // patch, image.shape[1] // patch] for image in images])
        sent = self._send(images).split([image.size for image in images])
        values = torch.cat([self._patches(part.view(image.shape)) for part, image in zip(sent, images, strict=True)])
        inputs = self._packed_inputs(grids) if is_packed(self.tower) else {"grid_thw": grids.to(values.device)}
        outputs = self.tower(values, **inputs)
        # Only Qwen3-VL's tower has deep features.
        levels = [outputs.pooler_output, *(getattr(outputs, "deepstack_features", None) or ())]
        return torch.cat(levels, -1).split([self.num_tokens(image.shape[:2]) for image in images])

    def _packed_inputs(self, grids: Tensor) -> dict[str, Any]:
        """What the tower would compute of ``grids`` on the device, and wait for: computed here and sent."""
        config, merge = self.tower.config, self.tower.config.spatial_merge_size
        starts = get_vision_cu_seqlens(grids)
        numbers: dict[str, Any] = {"max_seqlen": int(starts.diff().max())}
        tensors = {"cu_seqlens": starts, "position_ids": get_vision_position_ids(grids, merge)}
        if hasattr(config, "window_size"):
            order, windows = get_vision_window_index(grids, merge, config.window_size, config.patch_size)
            numbers["max_window_seqlen"] = int(windows.diff().max())
            tensors |= {"window_index": order, "cu_window_seqlens": windows}
        if hasattr(config, "num_position_embeddings"):
            places, weights = get_vision_interpolation_indices_and_weights(
                grids,
                num_grid_per_side=self.tower.num_grid_per_side,
                mode=self.tower.interpolation_mode,
                align_corners=self.tower.interpolation_align_corners,
                spatial_merge_size=merge,
            )
            tensors |= {"interp_indices": places, "interp_weights": weights}
        sent = {name: to_device(tensor, self._levels.device) for name, tensor in tensors.items()}
        return {"grid_thw": grids, **numbers, **sent}

    def _patches(self, pixels: Tensor) -> Tensor:
        """Normalised patches ``[patches, 3 × frames × area]`` of uint8 ``[H, W, 3]``, those of each square together."""
        config = self.tower.config
        patch, merge, frames = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
        (values,) = self.normalise(pixels[None])
        rows, columns = pixels.shape[0] // (patch * merge), pixels.shape[1] // (patch * merge)
        squares = values.view(3, rows, merge, patch, columns, merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
        # The temporal patch of a still image repeats its frame.
        repeated = squares.unsqueeze(5).expand(-1, -1, -1, -1, -1, frames, -1, -1)
        return repeated.reshape(rows * columns * merge**2, -1)


class _PatchProjection(nn.Module):
    """Convolution over patches that do not overlap, as one matrix product: torch's ``Conv3d`` is slow."""

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        self.weight = nn.Parameter(convolution.weight.detach().flatten(1))
        bias = convolution.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach())

    def forward(self, patches: Tensor) -> Tensor:
        """Project ``[N, 3, frames, patch, patch]`` to ``[N, width]``."""
        return F.linear(patches.flatten(1), self.weight, self.bias)
