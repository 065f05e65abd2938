"""A tower's or projector's tensors: from safetensors files into the parameters of a module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nanovllm.checkpoints.resolve import checkpoint_name, weight_files
from nanovllm.errors import ConfigurationError, ModelNotFound

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


def named_tensors(path: Path, prefixes: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a safetensors file, or of all files of a checkpoint, that carry one of ``prefixes``, without it.

    Raises ModelNotFound where files are missing.
    """
    files = [path] if path.is_file() else [file for file in sorted(path.glob("*.safetensors")) if file.is_file()]
    if not files or (path / "model.safetensors.index.json").is_file():
        files = weight_files(path)
    for file in files:
        with open_tensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
                if prefix is not None:
                    yield name.removeprefix(prefix).removeprefix("vision_model."), tensors.get_tensor(name)


def load_into(module: nn.Module, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Copy tensors into all parameters of ``module``; a tensor without a parameter there is passed over."""
    # Releases of transformers differ in whether a lone tower keeps its parts under "vision_model".
    parameters = {name.removeprefix("vision_model."): value for name, value in module.named_parameters()}
    missing = set(parameters)
    with torch.no_grad():
        for name, tensor in tensors:
            if name not in parameters:
                continue
            if parameters[name].shape != tensor.shape:
                raise ConfigurationError(
                    f"tensor {name} has shape {list(tensor.shape)}, the model needs {list(parameters[name].shape)}"
                )
            parameters[name].copy_(tensor)
            missing.discard(name)
    if missing:
        raise ModelNotFound(f"the checkpoint lacks {len(missing)} tensors, such as {min(missing)}")
