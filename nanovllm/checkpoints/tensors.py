"""Tensors of safetensors files, read one at a time and copied into a model's parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nanovllm.checkpoints.resolve import checkpoint_name, weight_files, why_unreadable
from nanovllm.errors import ConfigurationError, ModelNotFound, UnsupportedModel, counted

_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_NAMED_TENSORS = 5  # in a message

# What transformers ignores too, because it follows from the configuration: stored by its releases before 4.32.
_COMPUTED = "rotary_emb.inv_freq"


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """A safetensors file, opened for reading.

    Raises:
        ModelNotFound: the file is cut, damaged, or only a Git LFS pointer to one.
    """
    try:
        tensors = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        why = why_unreadable(file)
        raise ModelNotFound(f"{file.name} of checkpoint {checkpoint_name(file.parent)!r} {why}") from error
    with tensors:
        yield tensors


def names_in(files: Iterable[Path]) -> frozenset[str]:
    """Names of the tensors that files store."""
    names: set[str] = set()
    for file in files:
        with open_tensors(file) as tensors:
            names.update(tensors.keys())
    return frozenset(names)


def stored_bytes_a_value(files: Iterable[Path]) -> float:
    """Bytes that files store for each number of their tensors: 2 in bfloat16."""
    values = stored = 0
    for file in files:
        with open_tensors(file) as tensors:
            values += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        stored += file.stat().st_size
    return stored / values if values else 0.0


class StoredTensors:
    """The tensors of safetensors files, by the names that a model has for them; read where they are copied to.

    ``rename`` gives a stored name the model's, or None where the model has no use for the tensor. ``places`` are the
    model's tensors, on any device, meta included.

    Raises:
        UnsupportedModel: a tensor is missing, is unknown, or has another shape or type.
    """

    def __init__(
        self, files: Iterable[Path], places: Mapping[str, Sequence[Tensor]], rename: Callable[[str], str | None]
    ) -> None:
        self._copies: dict[str, list[tuple[Path, str]]] = {}
        for file in files:
            for stored, name, tensor in _named_tensors(file, rename):
                if name.endswith(_COMPUTED):
                    continue
                if name not in places:
                    raise UnsupportedModel(f"checkpoint tensor {stored!r} has no place in this model")
                for place in places[name]:
                    if place.shape != tensor.shape:
                        raise UnsupportedModel(
                            f"checkpoint tensor {stored!r} is {list(tensor.shape)}, expected {list(place.shape)}"
                        )
                self._copies.setdefault(name, []).append((file, stored))
        _check_complete(places, self._copies, UnsupportedModel)

    @torch.no_grad()
    def copy_to(self, places: Mapping[str, Sequence[Tensor]]) -> None:
        """Fill ``places``, some of the model's.

        Raises:
            UnsupportedModel: a tensor is there twice with different values.
        """
        by_file: dict[Path, list[tuple[str, str]]] = {}
        for name in places:
            for file, stored in self._copies[name]:
                by_file.setdefault(file, []).append((stored, name))
        loaded: dict[str, str] = {}
        for file, wanted in by_file.items():
            with open_tensors(file) as tensors:
                for stored, name in wanted:
                    tensor = tensors.get_tensor(stored)
                    for place in places[name]:
                        _copy_once(place, tensor, stored, loaded.get(name))
                    loaded[name] = stored


def _named_tensors(file: Path, rename: Callable[[str], str | None]) -> Iterator[tuple[str, str, Tensor]]:
    """Stored name, new name and tensor, on the CPU in the stored type, where ``rename`` gives a name.

    The tensors are views of the mapped file: none is read until its values are.
    Raises UnsupportedModel for a tensor of a type that no weight has: it is quantised, or not what its name says.
    """
    with open_tensors(file) as tensors:
        for stored in tensors.keys():  # noqa: SIM118 (not a mapping)
            name = rename(stored)
            if name is None:
                continue
            tensor = tensors.get_tensor(stored)
            if tensor.dtype not in _WEIGHT_DTYPES:
                kind, known = _plain(tensor.dtype), ", ".join(map(_plain, _WEIGHT_DTYPES))
                raise UnsupportedModel(f"checkpoint tensor {stored!r} is of type {kind}; weights are {known}")
            yield stored, name, tensor


@torch.no_grad()
def load_module(module: nn.Module, path: Path, prefixes: tuple[str, ...], left_out: Collection[str] = ()) -> None:
    """Copy the tensors under the first of ``prefixes`` that fits into all parameters of a tower or projector.

    ``path`` is a safetensors file or the directory of a checkpoint, whose other tensors are not read. The prefix ``""``
    counts where no tensor has another one. ``left_out`` are names that the module does not need.

    Raises:
        ModelNotFound: a file or tensor is missing.
        ConfigurationError: a tensor has another shape.
        UnsupportedModel: a tensor has another type, has no place under its prefix, or is there twice with different
            values.
    """
    # Releases of transformers differ in whether a lone tower keeps its parts under "vision_model".
    parameters = {name.removeprefix("vision_model."): value for name, value in module.named_parameters()}
    # Releases of transformers before 4.31 stored position_ids, which follow from the configuration.
    ignored = {name.removeprefix("vision_model.") for name, _ in module.named_buffers()}.union(left_out)
    files = module_files(path)
    named = tuple(filter(None, prefixes))
    if any(name.startswith(named) for name in names_in(files)):
        prefixes = named

    def rename(stored: str) -> str | None:
        prefix = next((prefix for prefix in prefixes if stored.startswith(prefix)), None)
        name = None if prefix is None else stored.removeprefix(prefix).removeprefix("vision_model.")
        return None if name in ignored else name

    loaded: dict[str, str] = {}
    for stored, name, tensor in (found for file in files for found in _named_tensors(file, rename)):
        if name not in parameters:
            raise UnsupportedModel(f"checkpoint tensor {stored!r} has no place in this {type(module).__name__}")
        if parameters[name].shape != tensor.shape:
            raise ConfigurationError(
                f"tensor {stored} has shape {list(tensor.shape)}, the model needs {list(parameters[name].shape)}"
            )
        _copy_once(parameters[name], tensor, stored, loaded.get(name))
        loaded[name] = stored
    # The checkpoint's own; of a part that is missing altogether the shortest, which most checkpoints have.
    prefix = next((stored.removesuffix(name) for name, stored in loaded.items()), min(prefixes, key=len))
    _check_complete((prefix + name for name in parameters), (prefix + name for name in loaded), ModelNotFound)


def module_files(path: Path) -> list[Path]:
    """The weight files of a checkpoint's directory, or all safetensors of one that is named otherwise."""
    if path.is_file():
        return [path]
    others = [file for file in sorted(path.glob("*.safetensors")) if file.is_file()]
    is_named_so = (path / "model.safetensors").is_file() or (path / "model.safetensors.index.json").is_file()
    return weight_files(path) if is_named_so or not others else others


def _copy_once(place: Tensor, tensor: Tensor, stored: str, earlier: str | None) -> None:
    """Copy a tensor; a second one for the same place (in another shard, or under an older name) must be equal.

    Nothing is read for a place on the meta device.
    """
    if place.is_meta:
        return
    if earlier is None:
        place.copy_(tensor)
    elif not torch.equal(place, tensor.to(place)):
        also = "in another file" if earlier == stored else f"as {earlier!r}"
        raise UnsupportedModel(f"checkpoint tensor {stored!r} is stored {also} too, with other values")


def _check_complete(wanted: Iterable[str], loaded: Iterable[str], error: type[ConfigurationError]) -> None:
    missing = sorted(set(wanted).difference(loaded))
    if missing:
        more = ", …" if len(missing) > _NAMED_TENSORS else ""
        names = ", ".join(missing[:_NAMED_TENSORS]) + more
        raise error(f"the checkpoint lacks {counted(len(missing), 'tensor')}, such as {names}")


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
