"""Changes to a checkpoint's files, as they come by download, by conversion and by other people's tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"


def edit_json(file: Path, **changes: Any) -> None:
    """Set fields of a JSON object; None removes one."""
    fields = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Write what ``change`` makes of the tensors of model.safetensors; the directory."""
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return directory


def as_shards(directory: Path, *shards: dict[str, Tensor]) -> Path:
    """Replace model.safetensors by ``shards`` and their index, in which the last one of a name counts."""
    (directory / "model.safetensors").unlink()
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    weight_map: dict[str, str] = {}
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def as_lfs_pointer(file: Path) -> None:
    """What ``git clone`` leaves where Git LFS is not installed."""
    file.write_text(LFS_POINTER)


def cut(file: Path) -> None:
    """What a download leaves that broke off halfway."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def empty(file: Path) -> None:
    """What a full disk leaves."""
    file.write_bytes(b"")
