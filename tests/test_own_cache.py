"""The tests' own cache."""

from __future__ import annotations

import os
from pathlib import Path

import own_cache
import pytest


def test_this_session_and_its_processes_have_a_cache_of_their_own() -> None:
    from nanovllm.engine import kernels

    assert kernels.cache_folder().parent.name == own_cache.NAME


def test_packed_weights_go_after_an_hour_and_what_others_cached_is_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    weights = tmp_path / "nanovllm" / "weights-of-the-user.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"of the user")
    (weights.parent / "cpu-1.so").write_bytes(b"kernels")
    (tmp_path / "others").mkdir()
    own_cache.use()
    own = Path(os.environ["XDG_CACHE_HOME"])
    assert own == tmp_path / own_cache.NAME
    assert (own / "others").readlink() == tmp_path / "others"
    assert [path.name for path in (own / "nanovllm").iterdir()] == ["cpu-1.so"]
    own_cache.use()
    assert os.environ["XDG_CACHE_HOME"] == str(own), "once is enough"

    kept, old, kernel = (own / "nanovllm" / name for name in ("weights-1.safetensors", "weights-2.safetensors", "a.so"))
    for file in (kept, old, kernel):
        file.write_bytes(b"")
    for file in (old, kernel, weights):
        os.utime(file, (1, 1))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own_cache.use()
    assert (kept.exists(), old.exists(), kernel.exists(), weights.exists()) == (True, False, True, True)
