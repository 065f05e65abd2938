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
import tempfile
from pathlib import Path

import torch

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
    library = kept(capability)
    try:
        for path in (library.parent, library):
            check_ownership(path)
        if library.exists():
            torch.ops.load_library(str(library))
            return None
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder, library.name)
            compile_for(capability, built)
            torch.ops.load_library(str(_keep(built, library)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return str(error)
    return None


def kept(capability: str) -> Path:
    """Where the kernels for a kind of CPU are kept: under ``nanovllm`` in XDG_CACHE_HOME or ~/.cache."""
    texts = [path.read_text() for path in sorted(_FOLDER.glob("*.[ch]*"))]
    parts = "\0".join((*texts, torch.__version__, capability, *FLAGS[capability]))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanovllm"
    return folder / f"cpu-{hashlib.sha256(parts.encode()).hexdigest()[:24]}.so"


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


def compile_for(capability: str, library: Path) -> None:
    """Compile for a CPU of ``capability``, a key of FLAGS and not necessarily this one, into ``library``.

    Raises:
        RuntimeError: there is no compiler, or it failed.
        subprocess.TimeoutExpired: it took five minutes.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise RuntimeError("there is no C++ compiler; install g++, or name one in CXX")
    from torch.utils.cpp_extension import include_paths, library_paths

    logger.info("compiling the CPU kernels with %s, once for this machine (half a minute)", compiler)
    (libraries,) = library_paths("cpu")
    # torch's own OpenMP: a second one would bring its own threads, and the two would spin against each other.
    openmp = sorted(str(path) for path in Path(libraries).glob("libgomp*.so*"))
    command = [
        *(compiler, "-shared", "-fPIC", "-std=c++20", "-O3", "-fopenmp", "-ffp-contract=off"),
        *FLAGS[capability],
        *(
            "-DAT_PARALLEL_OPENMP=1",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        ),
        *(part for folder in include_paths("cpu") for part in ("-isystem", folder)),
        *(*_SOURCES, "-o", str(library), f"-L{libraries}", "-ltorch_cpu", "-lc10", *openmp),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{compiler} could not compile the CPU kernels: {done.stderr[-2000:]}")


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
