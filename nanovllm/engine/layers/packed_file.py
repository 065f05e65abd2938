"""File of packed weights: safetensors with every tensor at a page boundary and a checksum of each.

It is written tensor by tensor and mapped when it is read: all processes that read it share its pages, and what one
writes to its tensors is its own copy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanovllm.engine.layers import huge_pages

_HEADER_BYTES = 2 << 20  # a huge page, so that what follows begins with one
_PAGE_BYTES = 4096
_WORD_BYTES = 8
_PADDING = "padding."
_DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8", torch.int32: "I32",
    torch.int64: "I64", torch.bool: "BOOL", torch.uint8: "U8", torch.float64: "F64",
}  # fmt: skip


class DamagedFile(Exception):
    """The file is not what was written."""


@dataclass
class PackedTensors:
    """Tensors by name, and what was noted of them."""

    path: Path
    tensors: dict[str, Tensor]
    notes: dict[str, str]


@dataclass
class PackedFileWriter:
    """Writes tensors to ``file`` one behind the other, then the header in front of them."""

    file: IO[bytes]
    _entries: dict[str, object] = field(default_factory=dict)
    _checksums: dict[str, str] = field(default_factory=dict)
    _offset: int = 0

    def __post_init__(self) -> None:
        self.file.seek(_HEADER_BYTES)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor of a CPU."""
        tensor = tensor.detach().contiguous()
        self._append(name, _DTYPES[tensor.dtype], list(tensor.shape), _bytes_of(tensor).numpy().data)
        self._checksums[name] = checksum(tensor)
        if rest := -self._offset % _PAGE_BYTES:
            self._append(f"{_PADDING}{name}", "U8", [rest], memoryview(bytes(rest)))

    def finish(self, notes: Mapping[str, str]) -> None:
        """Write the header, with ``notes`` in it; OSError where it is too long."""
        checked = json.dumps({"notes": dict(notes), "checksums": self._checksums}, sort_keys=True)
        metadata = {"checked": checked, "checksum": hashlib.sha256(checked.encode()).hexdigest()}
        header = json.dumps({"__metadata__": metadata, **self._entries}).encode()
        room = _HEADER_BYTES - _WORD_BYTES
        if len(header) > room:
            raise OSError(f"the header of {len(self._entries)} tensors is longer than {room} bytes")
        self.file.seek(0)
        self.file.write(room.to_bytes(_WORD_BYTES, "little") + header.ljust(room))
        self.file.flush()

    def _append(self, name: str, dtype: str, shape: list[int], data: memoryview) -> None:
        self.file.write(data)
        begin, self._offset = self._offset, self._offset + data.nbytes
        self._entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, self._offset]}


def read_packed(path: Path) -> PackedTensors:
    """The tensors of a file as views of it, on huge pages where the file system has them; all is read once.

    Raises:
        DamagedFile: the file is cut, or something in it has changed.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = [name for name in file.keys() if not name.startswith(_PADDING)]  # noqa: SIM118 (not a mapping)
            found = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise DamagedFile(str(error)) from error
    checked = metadata.get("checked", "")
    if hashlib.sha256(checked.encode()).hexdigest() != metadata.get("checksum"):
        raise DamagedFile("its header has changed")
    fields = json.loads(checked)
    huge_pages.ask_for(found.values())
    if fields["checksums"] != {name: checksum(tensor) for name, tensor in found.items()}:
        raise DamagedFile("its tensors have changed")
    return PackedTensors(path, found, fields["notes"])


def checksum(tensor: Tensor) -> str:
    """Hash (hex) of type, shape, and the sums of pages as words: as fast as memory is read, whatever the threads."""
    data = _bytes_of(tensor)
    whole = len(data) - len(data) % _PAGE_BYTES
    sums = data[:whole].view(torch.int64).view(-1, _PAGE_BYTES // _WORD_BYTES).sum(1)
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(sums.numpy().data)
    digest.update(data[whole:].numpy().data)
    return digest.hexdigest()[:32]


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
