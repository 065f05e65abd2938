"""Memory of engines that share packed weights, what a start from a file takes, and how fast a step reads it.

Engines are processes of their own. ``first`` is one that packs the weights and writes the file, ``again`` one that maps
it, ``packed in memory`` one without a file (the system may join its weights and its KV cache to one mapping, all of
which is then left out: mind that figure). Memory is the sum of proportional set sizes (``smaps_rollup``: a page that
n processes map counts 1/n in each) of engines that have answered, without what their KV caches have touched.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from output import add_output, write_text

_PROGRAM = Path(__file__).resolve()
_KV_BYTES = 64 << 20
_DECODE_ROWS, _DECODE_TOKENS, _WARM_TOKENS, _TURNS = 1, 40, 8, 5


def main() -> None:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm", help="smollm, or a shape of benchmarks/checkpoints.py, as 0.6b")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantization", choices=["int8"])
    parser.add_argument("--without-decoding", action="store_true", help="starts and memory alone")
    parser.add_argument("--checkpoints", type=Path, default=Path("build/checkpoints"))
    parser.add_argument("--engine", help=argparse.SUPPRESS)  # of the engine's own process
    add_output(parser, "replicas.json")
    arguments = parser.parse_args()
    if arguments.engine:
        serve(json.loads(arguments.engine))
        return
    from checkpoints import checkpoint  # not in an engine's process, whose memory and imports are measured
    from machine import describe_machine

    machine = describe_machine(" ".join(["python", *map(os.path.relpath, sys.argv[:1]), *sys.argv[1:]]))
    options = {"dtype": arguments.dtype, "quantization": arguments.quantization, "kv_cache_bytes": _KV_BYTES}
    model = str(checkpoint(arguments.model, arguments.checkpoints))
    with tempfile.TemporaryDirectory() as cache:
        figures = measure(model, options, Path(cache))
        if not arguments.without_decoding:
            figures["decode"] = decode(model, options, Path(cache))
    result = {"machine": machine, "model": arguments.model, "options": options, **figures}
    write_text(arguments.output, json.dumps(result, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def measure(model: str, options: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Starts and memory, each by engines in processes of their own."""
    with Engine(model, options | {"packed_weights_bytes": 0}, cache) as alone:
        in_memory, in_memory_pss = alone.loaded, alone.pss()
    with Engine(model, options, cache) as first:
        packing, first_pss = first.loaded, first.pss()
    with Engine(model, options, cache) as one:
        again, single = one.loaded, one.pss()
        with Engine(model, options, cache) as two:
            both = one.pss() + two.pss()
    memory = {
        "packed in memory, one": in_memory_pss,
        "first, one": first_pss,
        "again, one": single,
        "again, two together": both,
        "two / one": round(both / single, 3),
    }
    return {
        "start": {"packed in memory": in_memory, "first": packing, "again": again},
        "proportional_set_bytes": memory,
    }


def decode(model: str, options: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Tokens a second of one row, by turns: packed in memory, the file on huge pages, and on small ones."""
    kinds = {
        "packed in memory, huge pages": options | {"packed_weights_bytes": 0},
        "file, as the system maps it": options,
        "file, small pages": options | {"small_pages": True},
    }
    engines = {name: Engine(model, given, cache) for name, given in kinds.items()}
    rates: dict[str, list[float]] = {name: [] for name in engines}
    try:
        for _ in range(_TURNS):
            for name, engine in engines.items():
                rates[name].append(engine.ask("decode"))
        huge = {name: engine.ask("huge") for name, engine in engines.items()}
    finally:
        for engine in engines.values():
            engine.close()
    return {
        name: {"tokens_per_s": round(median(rates[name]), 2), "all": rates[name], "huge_page_bytes": huge[name]}
        for name in kinds
    }


class Engine:
    """An engine in a process of its own, loaded and warm."""

    def __init__(self, model: str, options: dict[str, Any], cache: Path) -> None:
        kernels = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanovllm"
        folder = cache / "nanovllm"
        folder.mkdir(mode=0o755, exist_ok=True)
        for library in kernels.glob("cpu-*.so"):
            if not (folder / library.name).exists():
                (folder / library.name).symlink_to(library)
        self._process = subprocess.Popen(
            [sys.executable, str(_PROGRAM), "--engine", json.dumps({"model": model, **options})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        )
        self.loaded = self._read()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, what: str) -> Any:
        """The answer to one word."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self._read()

    def pss(self) -> int:
        """Proportional set size in bytes, without the KV cache."""
        return int(self.ask("pss"))

    def _read(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("= "):
                return json.loads(line[2:])
        raise RuntimeError("the engine has ended")


def serve(options: dict[str, Any]) -> None:
    """The engine's process: load, tell the seconds and the peak, then answer words from standard input."""
    import mmap
    import resource

    started = time.perf_counter()
    from nanovllm.engine.layers import huge_pages
    from nanovllm.engine.llm_engine import LLMEngine
    from nanovllm.sampling_params import SamplingParams

    imported = time.perf_counter()
    if options.pop("small_pages", False):
        huge_pages._HUGEPAGE = mmap.MADV_NOHUGEPAGE
    engine = LLMEngine(options.pop("model"), **options)
    loaded = time.perf_counter()

    def rate(tokens: int) -> float:
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        began = time.perf_counter()
        engine.generate(["A list of words:"] * _DECODE_ROWS, sampling, use_tqdm=False)
        return round(_DECODE_ROWS * tokens / (time.perf_counter() - began), 2)

    rate(_WARM_TOKENS)
    answered = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answer(
        {
            "imports_s": round(imported - started, 2),
            "load_s": round(loaded - imported, 2),
            "first_answer_s": round(answered - loaded, 2),
            "peak_resident_bytes": peak,
        }
    )
    words = {"decode": lambda: rate(_DECODE_TOKENS), "pss": lambda: pss(engine), "huge": huge_bytes}
    for line in sys.stdin:
        answer(words[line.strip()]())


def answer(value: object) -> None:
    """Write a line that the parent reads."""
    print(f"= {json.dumps(value)}", flush=True)


def pss(engine: Any) -> int:
    """Bytes of this process, a shared page counted in parts, without its KV cache."""
    caches = {cache.data_ptr() for cache in engine.model_runner.kv_caches}
    total = kv = 0
    is_cache = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        field, *values = line.split()
        if "-" in field and not field.endswith(":"):
            begin, end = (int(address, 16) for address in field.split("-"))
            is_cache = any(begin <= cache < end for cache in caches)
        elif field == "Pss:":
            total += int(values[0]) * 1024
            kv += int(values[0]) * 1024 * is_cache
    return total - kv


def huge_bytes() -> int:
    """Bytes of this process on huge pages."""
    fields = ("AnonHugePages:", "FilePmdMapped:", "ShmemPmdMapped:")
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(fields))


if __name__ == "__main__":
    main()
