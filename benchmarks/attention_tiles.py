"""What attention by AMX tiles would cost a prompt, on a CPU that has none: counted, and measured as far as it goes.

One chunk of a prompt attends to contexts of several lengths, in the shape of Qwen3-0.6B, by one thread. Its kernel of
vectors is measured as it is; the one of tiles twice: its tile instructions are counted by the tests' emulator, and the
rest of it is measured, compiled without them. The sum with what Intel's optimisation manual gives for each instruction,
without any overlap, is an estimate and is called so. Writes a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from benchmarks.output import add_output, write_text
from nanovllm.engine import kernels
from nanovllm.engine.attention.base import AttentionBatch
from nanovllm.engine.attention.cpu_paged import PagedCpuAttention

HEADS, KV_HEADS, DIM, LAYERS = 16, 8, 128, 28
CHUNK = 512
CONTEXTS = (512, 4096, 32_768)
CYCLES = {"bfloat16": 16, "load": 8, "store": 16, "zero": 1}
"""Of an instruction, where inputs lie in the innermost cache: Intel's optimisation reference manual, chapter on AMX."""
GIGAHERTZ = 2.3  # of the estimate


def chunk_of(context: int, tiles_from: int | None, *, heads: int = HEADS, kv_heads: int = KV_HEADS) -> Any:
    """A call that attends with the last ``CHUNK`` tokens of a context."""
    backend = PagedCpuAttention(16, tiles_from=tiles_from)
    blocks = -(-context // 16)
    cache = backend.allocate(blocks, kv_heads, DIM, torch.bfloat16)
    cache.normal_()
    query, key, value = (torch.randn(CHUNK, count, DIM).bfloat16() for count in (heads, kv_heads, kv_heads))
    metadata = backend.metadata(AttentionBatch([CHUNK], [context], [list(range(blocks))]))
    return lambda: backend.attend(query, key, value, cache, metadata)


def milliseconds(context: int, tiles_from: int | None) -> float:
    """The median of five calls after one."""
    call, found = chunk_of(context, tiles_from), []
    for _ in range(6):
        began = time.perf_counter()
        call()
        found.append((time.perf_counter() - began) * 1e3)
    return statistics.median(found[1:])


def without_tiles(contexts: tuple[int, ...]) -> dict[str, float]:
    """Milliseconds of the kernel of tiles by context, in another process, compiled without its tile instructions."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "kernels")
        shutil.copytree(Path(kernels.__file__).parent, folder)
        header = folder / "tiles.h"
        header.write_text(re.sub(r"asm volatile\([^;]*;", "", header.read_text()))
        program = (
            "import json, sys, torch\nfrom pathlib import Path\nfrom nanovllm.engine import kernels\n"
            "kernels._FOLDER = Path(sys.argv[1])\n"
            "kernels._SOURCES = [str(kernels._FOLDER / 'paged_attention.cpp')]\n"
            "assert kernels.missing() is None, kernels.missing()\ntorch.set_num_threads(1)\n"
            "from benchmarks.attention_tiles import milliseconds\n"
            "print(json.dumps({context: milliseconds(int(context), 1) for context in sys.argv[2:]}))\n"
        )
        command = [sys.executable, "-c", program, str(folder), *map(str, contexts)]
        environment = {**os.environ, "XDG_CACHE_HOME": scratch}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def counted(context: int) -> dict[str, int]:
    """Tile instructions of a chunk, of one layer: those of one key head, which all have as many."""
    from tests import amx

    with amx.emulated() as emulator:
        before = emulator.executed()
        chunk_of(context, 1, heads=HEADS // KV_HEADS, kv_heads=1)()
        return {kind: KV_HEADS * (count - before[kind]) for kind, count in emulator.executed().items()}


def main() -> None:
    """Count, measure, print a table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output(parser, "attention-tiles.json")
    arguments = parser.parse_args()
    assert kernels.missing() is None, kernels.missing()
    torch.set_num_threads(1)
    rest = without_tiles(CONTEXTS)
    rows: dict[str, Any] = {}
    for context in CONTEXTS:
        # The emulator takes microseconds an instruction; their number grows in a straight line with the context.
        if context <= 4096:
            counts = counted(context)
        else:
            low, high = counted(2048), counted(4096)
            counts = {kind: high[kind] + (high[kind] - low[kind]) * (context - 4096) // 2048 for kind in high}
        today = milliseconds(context, None)
        tiles_ms = sum(counts[kind] * cycles for kind, cycles in CYCLES.items()) / GIGAHERTZ / 1e6
        rows[str(context)] = {
            "today_ms": round(today, 2),
            "rest_of_tiles_ms": round(rest[str(context)], 2),
            "instructions": {kind: count for kind, count in counts.items() if kind in CYCLES},
            "estimated_tile_ms": round(tiles_ms, 2),
            "estimated_gain": round(today / (rest[str(context)] + tiles_ms), 2),
        }
        print(context, rows[str(context)], flush=True)
    command = "python -m benchmarks.attention_tiles"
    figures = {**describe_machine(command), "chunk": CHUNK, "gigahertz": GIGAHERTZ, "contexts": rows}
    write_text(arguments.output, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
