"""Tensors of safetensors files, read one at a time and copied into a model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nanovllm.checkpoints.resolve import checkpoint_name, weight_files
from nanovllm.errors import ConfigurationError, ModelNotFound, UnsupportedModel, counted

_LFS = b"version https://git-lfs"


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """A safetensors file, opened for reading.

    Raises:
        ModelNotFound: the file is cut, damaged, or only a Git LFS pointer to one.
    """
    try:
        tensors = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        with file.open("rb") as start:
            is_pointer = start.read(len(_LFS)) == _LFS
        why = "is a Git LFS pointer: `git lfs pull` gets the file" if is_pointer else "is cut or damaged: get it again"
        raise ModelNotFound(f"{file.name} of checkpoint {checkpoint_name(file.parent)!r} {why}") from error
    with tensors:
        yield tensors


def read_tensors(files: Iterable[Path], rename: Callable[[str], str | None]) -> Iterator[tuple[str, str, Tensor]]:
    """Stored name, new name and tensor, on the CPU in the stored type, where ``rename`` gives a name."""
    for file in files:
        with open_tensors(file) as tensors:
            for stored in tensors.keys():  # noqa: SIM118 (not a mapping)
                name = rename(stored)
                if name is not None:
                    yield stored, name, tensors.get_tensor(stored)


@torch.no_grad()
def load_parameters(
    files: Iterable[Path], places: Mapping[str, Sequence[Tensor]], rename: Callable[[str], str | None]
) -> None:
    """Copy all stored tensors to their ``places``, except those that ``rename`` gives no name.

    Raises:
        UnsupportedModel: a tensor is missing, is unknown, or has another shape.
    """
    missing = set(places)
    for stored, name, tensor in read_tensors(files, rename):
        if name not in places:
            raise UnsupportedModel(f"checkpoint tensor {stored!r} has no place in this model")
        for place in places[name]:
            if place.shape != tensor.shape:
                raise UnsupportedModel(
                    f"checkpoint tensor {stored!r} is {list(tensor.shape)}, expected {list(place.shape)}"
                )
            place.copy_(tensor)
        missing.discard(name)
    if missing:
        raise UnsupportedModel(f"the checkpoint lacks {counted(len(missing), 'tensor')}, among them {min(missing)!r}")


@torch.no_grad()
def load_module(module: nn.Module, path: Path, prefixes: tuple[str, ...]) -> None:
    """Copy the tensors under the first of ``prefixes`` that fits into all parameters of a tower or projector.

    ``path`` is a safetensors file or the directory of a checkpoint, whose other tensors are not read.

    Raises:
        ModelNotFound: a file or tensor is missing.
        ConfigurationError: a tensor has another shape.
    """
    # Releases of transformers differ in whether a lone tower keeps its parts under "vision_model".
    parameters = {name.removeprefix("vision_model."): value for name, value in module.named_parameters()}

    def rename(stored: str) -> str | None:
        prefix = next((prefix for prefix in prefixes if stored.startswith(prefix)), None)
        name = None if prefix is None else stored.removeprefix(prefix).removeprefix("vision_model.")
        return name if name in parameters else None

    files = [path] if path.is_file() else [file for file in sorted(path.glob("*.safetensors")) if file.is_file()]
    if not files or (path / "model.safetensors.index.json").is_file():
        files = weight_files(path)
    missing = set(parameters)
    for _, name, tensor in read_tensors(files, rename):
        if parameters[name].shape != tensor.shape:
            raise ConfigurationError(
                f"tensor {name} has shape {list(tensor.shape)}, the model needs {list(parameters[name].shape)}"
            )
        parameters[name].copy_(tensor)
        missing.discard(name)
    if missing:
        raise ModelNotFound(f"the checkpoint lacks {counted(len(missing), 'tensor')}, such as {min(missing)}")
