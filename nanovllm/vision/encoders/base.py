"""Image encoder interface: pixels in, embeddings out, counted, and identified by a digest."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanovllm.checkpoints.tensors import load_module, module_files
from nanovllm.vision.encoders.recorded_batches import Recorder
from nanovllm.vision.images.preprocess import ImageTransform, PreparedImage
from nanovllm.vision.timing import TotalTime, begin


@dataclass(frozen=True)
class ImageLayout:
    """The tokens of an image, where they are more than embeddings in a row.

    Attributes:
        token_ids: image tokens, and those of structure before, between and behind them.
        places: where among them embeddings stand, ascending.
        offsets: their positions, on each axis, relative to that of the first; None where they count on by one.
        advance: from the position of the first token to that of the token behind the image.
    """

    token_ids: tuple[int, ...]
    places: tuple[int, ...]
    offsets: tuple[tuple[int, ...], ...] | None
    advance: int


class ImageEncoder(nn.Module, ABC):
    """Vision tower with its projection into the language model's space."""

    vision_model: str  # the tower's name as it was given
    transform: ImageTransform
    num_vision_tokens: int  # embeddings, and positions in the sequence, of one image; the most, where images differ
    hidden_size: int  # width of the language model
    width: int  # columns of an embedding: hidden_size, and more where it has features for further layers
    dtype: torch.dtype  # of the parameters and the embeddings
    batch_size = 32  # most images in one pass of the tower
    batch_patches: int  # most patches in one pass
    preprocesses = False  # whether `preprocess` spares the encoder's thread work
    tower: Any
    weight_files: tuple[Path, ...] = ()  # that the parameters were read from

    def _load(self, module: nn.Module, path: Path, prefixes: tuple[str, ...], left_out: Collection[str] = ()) -> None:
        """Read a part of the encoder; see `load_module`."""
        load_module(module, path, prefixes, left_out)
        self.weight_files += tuple(module_files(path))

    def _finish(self, name: str, freeze: bool, dtype: torch.dtype, device: str | torch.device) -> None:
        """Set what all encoders have, once the attributes of images are set and the parameters are loaded."""
        self.vision_model = name
        self.dtype = dtype
        self.reset_statistics()
        self.to(dtype=dtype, device=device).eval()
        # On a CPU larger activations are memory that the system maps anew in every layer: 16% of the time of ViT-B/16.
        self.batch_patches = 16_384 if torch.device(device).type == "cuda" else 2048
        levels = torch.from_numpy(self.transform.lookup_table()).to(device, dtype)
        self.register_buffer("_levels", levels.flatten(), persistent=False)
        self._levels: Tensor  # [3 * 256]
        first = torch.arange(0, 3 * 256, 256, dtype=torch.int32, device=device)
        self.register_buffer("_first_levels", first.view(3, 1, 1), persistent=False)
        self._first_levels: Tensor
        if freeze:
            self.tower.requires_grad_(False)

    def reset_statistics(self) -> None:
        """Count images and times anew."""
        self.images_encoded = 0
        self._time = TotalTime()

    @property
    def encode_seconds(self) -> float:
        """What passes of the tower have taken; on CUDA those that are done."""
        return self._time.seconds

    def num_tokens(self, size: tuple[int, int]) -> int:
        """Positions of an image of this (height, width) after the transform."""
        return self.num_vision_tokens

    def grid(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """Rows and columns of such an image's tokens, where positions are two-dimensional."""
        return None

    def layout(self, size: tuple[int, int]) -> ImageLayout | None:
        """Tokens of such an image; None where all of them are embeddings.

        Raises InvalidImage for a size that the model does not take.
        """
        return None

    def preprocess(self, image: PreparedImage) -> None:
        """Do the part of `embed` that needs no tower, in any thread; the next `embed` of the image takes it.

        Raises InvalidImage for an image that the model does not take.
        """

    def record(self, recorder: Recorder) -> None:
        """Record passes of batches of a few sizes, where images have one size, at the ``batch_size`` of now.

        From then on `embed` is for one thread.
        """

    def accepts(self, size: tuple[int, int]) -> bool:
        """Whether the transform makes images of this (height, width)."""
        return size == self.transform.output_size

    @abstractmethod
    def _embed(self, images: Sequence[np.ndarray]) -> list[Tensor]:
        """One pass of at most ``batch_size`` images."""

    @abstractmethod
    def _architecture(self) -> dict[str, Any]:
        """Options beside parameters and preprocessing that determine an embedding."""

    @property
    def identity(self) -> str:
        """What determines an embedding beside the parameters."""
        return json.dumps(self._architecture(), sort_keys=True, default=str) + self.transform.fingerprint()

    @cached_property
    def revision(self) -> str:
        """SHA-256 (hex) over architecture, parameters and preprocessing: equal revisions embed an image equally.

        Computed at the first access; parameters must not change afterwards.
        """
        digest = hashlib.sha256(self.identity.encode())
        for name, parameter in sorted(self.named_parameters()):
            digest.update(f"{name}:{parameter.dtype}:{list(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @torch.no_grad()
    def embed(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        """Embeddings ``[tokens, width]`` of prepared images with pixels; those of one pass are views of one tensor."""
        embeddings: list[Tensor] = []
        for first in range(0, len(images), self.batch_size):
            batch = images[first : first + self.batch_size]
            with self._counted(len(batch)):
                embeddings += self._embed([image.pixels for image in batch if image.pixels is not None])
        return embeddings

    @torch.no_grad()
    def embed_largest(self, max_tokens: int) -> list[Tensor]:
        """Embed black images that take as much memory as any pass does, of up to ``max_tokens`` each; uncounted."""
        size, count = self._largest_pass(max_tokens)
        return self._embed([np.zeros((*size, 3), np.uint8)] * count)

    def _largest_pass(self, max_tokens: int) -> tuple[tuple[int, int], int]:
        """Height and width of the largest images of up to ``max_tokens`` each, and how many go in one pass."""
        size = self.transform.output_size
        assert size is not None  # else another encoder's
        return size, self.batch_size

    @contextmanager
    def _counted(self, images: int) -> Iterator[None]:
        interval = begin(self._levels.device)
        yield
        interval.end()
        self.images_encoded += images
        self._time.add(interval)

    def _send(self, images: Sequence[np.ndarray]) -> Tensor:
        """Bytes of uint8 images ``[H, W, 3]``, one behind the other, on the device; does not wait for it."""
        # Copied: a decoder's array is read-only, and torch has no read-only tensors.
        host = torch.empty(sum(image.size for image in images), dtype=torch.uint8, pin_memory=self._levels.is_cuda)
        np.concatenate([image.reshape(-1) for image in images], out=host.numpy())
        return to_device(host, self._levels.device)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Rescale and normalise uint8 ``[N, H, W, 3]`` to the tower's ``pixel_values`` ``[N, 3, H, W]``."""
        channels = pixels.to(self._levels.device).permute(0, 3, 1, 2).contiguous()
        # By a table, because no two devices round alike; int32, because uint8 is taken for a mask.
        indices = channels.int() + self._first_levels
        return self._levels.index_select(0, indices.flatten()).view(channels.shape)


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``; the host does not wait for CUDA, as it would from pageable memory."""
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def tower_fields(config: Any) -> dict[str, Any]:
    """A transformers configuration without the release's version."""
    return {key: value for key, value in config.to_dict().items() if key != "transformers_version"}
