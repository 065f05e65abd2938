"""C++ kernels for CPUs: compiled once by the machine's own compiler, kept in the user's cache, used as torch operators.

They are an acceleration: where there is no compiler, the engine runs on torch's own operators and says so.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from nanovllm.start_phases import START, Phase

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_SOURCES = sorted(str(path) for path in _FOLDER.glob("*.cpp"))
_COMPILE_TIMEOUT_S = 300.0
_IS_ARM = platform.machine() == "aarch64"
FLAGS = (
    {"NEON": ("-march=armv8-a", "-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT")}
    if _IS_ARM
    else {
        "AVX512": (
            *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
            *("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
        ),
        "AVX2": ("-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"),
    }
)
"""What a compiler is told for each kind of CPU of this architecture. 64-bit ARM is one: all have NEON."""


def kind() -> str:
    """The kind of this CPU: NEON, or what torch calls it (AVX512, AVX2, DEFAULT)."""
    return "NEON" if _IS_ARM else torch.backends.cpu.get_cpu_capability()


@functools.cache
def missing() -> str | None:
    """Load the kernels, compiling them first where that was not done yet; returns the reason if they cannot be had."""
    capability = kind()
    if capability not in FLAGS:
        return f"there are none for a CPU of the kind {capability}, only for AVX512, AVX2 and 64-bit ARM"
    try:
        library = kept(capability)
        with START.timed(Phase.KERNELS):
            if not _load_kept(library):
                with _one_process(library):
                    if not _load_kept(library):
                        _compile_and_load(capability, library)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return str(error)
    return None


def _load_kept(library: Path) -> bool:
    """Load a library that was compiled before, for the user or for all; whether there is one.

    Raises: as `check_ownership`.
    """
    for place in (library, installed_folder() / library.name):
        for path in (place.parent, place):
            check_ownership(path)
        if place.exists():
            torch.ops.load_library(str(place))
            return True
    return False


@contextmanager
def _one_process(library: Path) -> Iterator[None]:
    """Wait for other processes that compile ``library``; where its folder cannot be written, each compiles its own."""
    with ExitStack() as stack:
        try:
            import fcntl

            library.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            lock = stack.enter_context(library.with_suffix(".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however that ends
        except (ImportError, OSError) as error:
            logger.debug("the CPU kernels are compiled without a lock: %s", error)
        yield


def _compile_and_load(capability: str, library: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, library.name)
        compile_for(capability, built)
        torch.ops.load_library(str(_keep(built, library)))


def kept(capability: str) -> Path:
    """Where the kernels for a kind of CPU are kept: under ``nanovllm`` in XDG_CACHE_HOME or ~/.cache."""
    texts = [path.read_text() for path in sorted(_FOLDER.glob("*.[ch]*"))]
    parts = "\0".join((*texts, torch.__version__, capability, *FLAGS[capability]))
    return cache_folder() / f"cpu-{hashlib.sha256(parts.encode()).hexdigest()[:24]}.so"


def cache_folder() -> Path:
    """The user's cache of this project. RuntimeError where the system knows no home of a user without HOME."""
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder, "nanovllm")
    try:
        return Path.home() / ".cache" / "nanovllm"
    except RuntimeError as error:
        raise RuntimeError(f"there is no folder for them (set HOME or XDG_CACHE_HOME): {error}") from error


def installed_folder() -> Path:
    """Kernels that came with the Python environment, as in an image; they need not be in the user's cache."""
    return Path(sys.prefix, "cache", "nanovllm")


def check_ownership(path: Path) -> None:
    """Refuse a folder or a library that another user could have written: loading it runs its code.

    Raises PermissionError, which names the remedy. What does not exist passes.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return
    if found.st_uid not in (os.geteuid(), 0):
        raise PermissionError(
            f"{path} belongs to user {found.st_uid}: remove it, or set XDG_CACHE_HOME to another folder"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} is writable by other users: chmod go-w {path}")


def compile_for(capability: str, library: Path, timeout_s: float = _COMPILE_TIMEOUT_S) -> None:
    """Compile for a CPU of ``capability``, a key of FLAGS and not necessarily this one, into ``library``.

    Raises:
        RuntimeError: there is no compiler, or it failed.
        subprocess.TimeoutExpired: it took longer than ``timeout_s`` seconds.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise RuntimeError("there is no C++ compiler; install g++, or name one in CXX")
    from torch.utils.cpp_extension import include_paths, library_paths

    logger.info("compiling the CPU kernels with %s, once for this machine (half a minute)", compiler)
    (libraries,) = library_paths("cpu")
    # torch's own OpenMP: a second one would bring its own threads, and the two would spin against each other.
    # Its wheels for ARM keep it beside the package.
    folders = (Path(libraries), Path(libraries).parents[1] / "torch.libs")
    openmp = sorted(str(path) for folder in folders for path in folder.glob("libgomp*.so*")) or ["-fopenmp"]
    compile_source = [
        *(compiler, "-c", "-fPIC", "-std=c++20", "-O3", "-fopenmp", "-ffp-contract=off"),
        *FLAGS[capability],
        *(
            "-DAT_PARALLEL_OPENMP=1",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        ),
        *(part for folder in include_paths("cpu") for part in ("-isystem", folder)),
    ]
    deadline = time.monotonic() + timeout_s

    def run(command: list[str]) -> None:
        left_s = max(0.0, deadline - time.monotonic())
        done = subprocess.run(command, capture_output=True, text=True, timeout=left_s, check=False)
        if done.returncode:
            raise RuntimeError(f"{compiler} could not compile the CPU kernels: {done.stderr[-2000:]}")

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as side_by_side:
        objects = [os.path.join(folder, f"{Path(source).stem}.o") for source in _SOURCES]
        compiling = [
            side_by_side.submit(run, [*compile_source, source, "-o", built])
            for source, built in zip(_SOURCES, objects, strict=True)
        ]
        try:
            for one in compiling:
                one.result()
        except BaseException:
            side_by_side.shutdown(wait=False, cancel_futures=True)
            raise
        link = [compiler, "-shared", "-pthread", *objects, "-o", str(library)]
        run([*link, f"-L{libraries}", "-ltorch_cpu", "-lc10", *openmp])


def _keep(built: Path, library: Path) -> Path:
    """Move a library to its place in one go, as another process may be looking for it; returns where it is."""
    try:
        library.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=library.parent, delete=False) as file:
            file.write(built.read_bytes())
        os.replace(file.name, library)
    except OSError as error:
        logger.warning("the compiled CPU kernels cannot be kept in %s: %s", library.parent, error)
        return built
    return library
