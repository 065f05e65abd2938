"""Packed weights of a module as named tensors, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from nanovllm.engine.layers.linear import Linear, Panels, give_panels
from nanovllm.engine.layers.packed_file import DamagedFile

_PANELS = "panels"  # the name of a layer's panels, and of the tensor in them


def state_of(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and buffers that have values here, and further names of those that are shared."""
    names: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, _, _, tensor in _with_values(module):
        first = names.setdefault(id(tensor), name)
        if first == name:
            tensors[name] = tensor
        else:
            aliases[name] = first
    return tensors, aliases


def release(module: nn.Module) -> None:
    """Free what `state_of` tells: the parameters and buffers go to the meta device, panels are removed."""
    for _, owner, attribute, tensor in list(_with_values(module)):
        if attribute in owner._parameters:
            owner._parameters[attribute] = nn.Parameter(tensor.to("meta"), requires_grad=tensor.requires_grad)
        else:
            owner._buffers[attribute] = tensor.to("meta")
    for child in module.modules():
        if isinstance(child, Linear) and child.panels is not None:
            child.give_up_panels()


def restore(
    module: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str], *, deterministic: bool
) -> None:
    """Give a module on the meta device the state of one of its kind; ``deterministic``: see `Panels.product`.

    Raises DamagedFile where parts of it are missing, or are of another module.
    """
    panels: dict[str, dict[str, Tensor]] = {}
    try:
        for name, tensor in tensors.items():
            path, _, attribute = name.rpartition(".")
            layer, _, last = path.rpartition(".")
            if last == _PANELS:
                panels.setdefault(layer, {})[attribute] = tensor
            else:
                _set(module.get_submodule(path), attribute, tensor)
        for name, parts in panels.items():
            _give(module.get_submodule(name), parts, deterministic=deterministic)
        for name, first in aliases.items():
            owner, _, attribute = name.rpartition(".")
            found, _, other = first.rpartition(".")
            shared = module.get_submodule(found)._parameters[other]
            module.get_submodule(owner)._parameters[attribute] = shared
    except (AttributeError, KeyError) as error:
        raise DamagedFile(f"it is of another model: {error}") from error
    for name, value in chain(module.named_parameters(), module.named_buffers()):
        if value.is_meta:
            raise DamagedFile(f"it lacks {name}")


def _with_values(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    for path, owner in module.named_modules():
        for attribute, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and not tensor.is_meta and tensor.numel():
                yield f"{path}.{attribute}" if path else attribute, owner, attribute, tensor


def _set(owner: nn.Module, attribute: str, tensor: Tensor) -> None:
    before = owner._parameters.get(attribute)
    if before is not None:
        owner._parameters[attribute] = nn.Parameter(tensor, requires_grad=before.requires_grad)
    elif attribute in owner._buffers:
        owner._buffers[attribute] = tensor
    else:
        raise KeyError(attribute)


def _give(layer: nn.Module, parts: Mapping[str, Tensor], *, deterministic: bool) -> None:
    if not isinstance(layer, Linear | nn.Linear):
        raise KeyError(f"panels of a {type(layer).__name__}")
    dtype = torch.int8 if parts["panels"].dtype == torch.int8 else layer.weight.dtype
    panels = Panels(layer.out_features, dtype, parts)
    if isinstance(layer, Linear):
        layer.take_panels(panels, deterministic=deterministic)
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    else:
        give_panels(layer, panels, deterministic=deterministic)
