"""A cache of the tests' own: hundreds of packed models would push those of the user out of the user's."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

NAME = "nanovllm-tests"
KEPT_S = 3_600.0


def use() -> None:
    """Give this process, and those that it starts, a cache that sessions share: kernels are compiled once.

    What the user has cached is linked, packed weights aside; those that no session used for an hour are removed.
    """
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if user.name == NAME:
        return
    own = user / NAME
    (own / "nanovllm").mkdir(mode=0o755, parents=True, exist_ok=True)
    _link([entry for entry in user.iterdir() if entry.name not in ("nanovllm", NAME)], own)
    _link((user / "nanovllm").glob("cpu-*.so"), own / "nanovllm")
    for weights in own.glob("nanovllm/weights-*.safetensors"):
        with suppress(FileNotFoundError):
            if time.time() - weights.stat().st_mtime > KEPT_S:
                weights.unlink()
    os.environ["XDG_CACHE_HOME"] = str(own)


def _link(entries: Iterable[Path], folder: Path) -> None:
    for entry in entries:
        with suppress(FileExistsError):
            (folder / entry.name).symlink_to(entry)
