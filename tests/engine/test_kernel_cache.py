"""The folder of compiled kernels: what another user could have written is not loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from nanovllm.engine import kernels


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail(f"{path} was loaded"))
    library = kernels.kept("AVX2")
    library.parent.mkdir(mode=0o755)
    library.write_bytes(b"")
    library.chmod(0o644)
    return library


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o777])
@pytest.mark.parametrize("which", ["folder", "file"])
def test_what_others_may_write_is_refused_with_the_remedy(
    library: Path, monkeypatch: pytest.MonkeyPatch, mode: int, which: str
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    path = library if which == "file" else library.parent
    path.chmod(mode | 0o111)
    assert kernels.missing.__wrapped__() == f"{path} is writable by other users: chmod go-w {path}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("which", ["folder", "file"])
def test_what_belongs_to_another_user_is_refused(library: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    path = library if which == "file" else library.parent
    os.chown(path, 12_345, -1)
    assert f"{path} belongs to user 12345" in (kernels.missing.__wrapped__() or "")


def test_a_folder_of_ones_own_passes(library: Path) -> None:
    kernels.check_ownership(library.parent)
    kernels.check_ownership(library)
    kernels.check_ownership(library.with_name("not-there"))
