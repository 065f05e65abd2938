"""Compile the kernels for every kind of CPU into the cache: for an image that will run without a compiler."""

from __future__ import annotations

import argparse

from nanovllm.engine.kernels import FLAGS, compile_for, kept

BUILD_TIMEOUT_S = 3600.0
"""The builds of images share their machine with others, and no start waits for them."""

argparse.ArgumentParser(prog="python -m nanovllm.engine.kernels", description=__doc__).parse_args()
for capability in FLAGS:
    library = kept(capability)
    library.parent.mkdir(parents=True, exist_ok=True)
    compile_for(capability, library, BUILD_TIMEOUT_S)
    print(f"{capability}: {library}")
