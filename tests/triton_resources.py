"""Compiles our Triton kernel for sm_80 and sm_90 with every tile of the table, and prints what each takes, as JSON.

No GPU is needed: ``python tests/triton_resources.py``.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanovllm.engine.kernels.paged_triton import Tile, _attention_kernel, choose_tile

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {"float32": ("*fp32", 4), "bfloat16": ("*bf16", 2)}


def compiled(capability: int, element: str, tile: Tile, group: int, dim: int) -> dict[str, int]:
    """Registers, bytes of stack and of shared memory; pages of 16, pointers and strides aligned as those of a model."""
    names = _attention_kernel.arg_names
    constants = {
        "page_size": 16, "group": group, "dim": dim, "padded_dim": max(16, triton.next_power_of_2(dim)),
        "lines": tile.queries, "keys": tile.keys,
    }  # fmt: skip
    kinds = dict.fromkeys(("query", "cache", "output"), element)
    kinds |= dict.fromkeys(("part_output", "part_max", "part_sum"), "*fp32")
    kinds |= dict.fromkeys(("starts", "contexts", "tables"), "*i32") | {"scale": "fp32"}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
    aligned = [name for name in names if name in kinds or (name.startswith("stride") and name != "stride_table")]
    aligned.remove("scale")
    kernel = triton.compile(
        ASTSource(
            _attention_kernel,
            signature,
            {(names.index(name),): value for name, value in constants.items()},
            {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", told).group(1)) for name in ("REG", "STACK"))
    return {"registers": registers, "stack_bytes": stack, "shared_bytes": kernel.metadata.shared}


if __name__ == "__main__":
    shapes = ((7, 64), (1, 80), (2, 128), (2, 256))
    for capability, (name, (element, size)), (group, dim), longest in product(
        (80, 90), TYPES.items(), shapes, (1, 100)
    ):
        tile = choose_tile(longest, group, dim, size, divmod(capability, 10))
        found = compiled(capability, element, tile, group, dim)
        step = "decode" if longest == 1 else "prompt"
        print(json.dumps({"capability": capability, "dtype": name, "head_dim": dim, "step": step, **found}), flush=True)
