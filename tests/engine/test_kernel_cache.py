"""The folder of compiled kernels: what another user could have written is not loaded, and processes compile once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanovllm.engine import kernels
from tests.parts import REPOSITORY


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


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in kernels.FLAGS, reason="no kernels for this CPU")
def test_kernels_that_came_with_the_environment_are_taken_where_the_cache_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image brings its kernels read-only, and XDG_CACHE_HOME is a volume of the pod's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "volume"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "environment"))
    monkeypatch.setattr(kernels, "compile_for", lambda *_: pytest.fail("the kernels were compiled"))
    loaded: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    installed = kernels.installed_folder() / kernels.kept(kernels.kind()).name
    installed.parent.mkdir(mode=0o755, parents=True)
    installed.write_bytes(b"")
    installed.chmod(0o444)
    assert kernels.missing.__wrapped__() is None
    assert loaded == [str(installed)]
    own = kernels.kept(kernels.kind())
    own.parent.mkdir(mode=0o755, parents=True)
    own.write_bytes(b"")
    assert kernels.missing.__wrapped__() is None
    assert loaded == [str(installed), str(own)]


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in kernels.FLAGS, reason="no kernels for this CPU")
def test_an_installed_library_that_others_may_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "volume"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    installed = kernels.installed_folder() / kernels.kept(kernels.kind()).name
    installed.parent.mkdir(mode=0o755, parents=True)
    installed.write_bytes(b"")
    installed.chmod(0o666)
    assert "is writable by other users" in (kernels.missing.__wrapped__() or "")


def test_without_a_home_the_reason_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert "set HOME or XDG_CACHE_HOME" in (kernels.missing.__wrapped__() or "")


COMPILER = """#!/bin/sh
echo "$*" >> {log}
for last; do
    case "$previous$last" in
        *paged_attention.cpp) {first} ;;
        *rows.cpp) {second} ;;
        -o*) echo made > "$last"; output="$last" ;;
    esac
    previous="$last"
done
case "$1" in -shared) echo | c++ -shared -fPIC -x c++ - -o "$output" ;; esac
"""


def make_compiler(folder: Path, first: str = ":", second: str = ":") -> Path:
    """A compiler of empty libraries that logs its calls, and does ``first`` and ``second`` with two of the sources."""
    program = folder / "compiler"
    program.write_text(COMPILER.format(log=folder / "calls", first=first, second=second))
    program.chmod(0o755)
    return program


LOAD = "from nanovllm.engine import kernels; print(kernels.missing())"


def loading(folder: Path, compiler: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder), "CXX": str(compiler), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen([sys.executable, "-c", LOAD], env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no compiler")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one CPU compiles one source at a time")
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in kernels.FLAGS, reason="no kernels for this CPU")
def test_sources_are_compiled_side_by_side_and_once_however_many_processes_start(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    os.mkfifo(one)
    os.mkfifo(other)
    # Each of two sources waits until the other one's compiler runs.
    program = make_compiler(tmp_path, first=f"echo > {one}; read x < {other}", second=f"read x < {one}; echo > {other}")
    processes = [loading(tmp_path, program) for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in processes] == ["None\n", "None\n"]
    calls = (tmp_path / "calls").read_text().splitlines()
    sources = list(Path(kernels.__file__).parent.glob("*.cpp"))
    assert sum(call.startswith("-c ") for call in calls) == len(sources)
    assert sum(call.startswith("-shared ") for call in calls) == 1
    assert len(list((tmp_path / "nanovllm").glob("*.so"))) == 1


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in kernels.FLAGS, reason="no kernels for this CPU")
def test_a_source_that_does_not_compile_is_told_and_nothing_is_kept(tmp_path: Path) -> None:
    program = make_compiler(tmp_path, first="echo 'no such instruction' >&2; exit 1")
    told = loading(tmp_path, program).communicate(timeout=120)[0]
    assert told == f"{program} could not compile the CPU kernels: no such instruction\n\n"
    assert list((tmp_path / "nanovllm").glob("*.so")) == []
