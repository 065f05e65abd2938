"""Tiles of the attention kernel, timed one after another in CUDA graphs: whether the fixed table has the fastest."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch

from gpu_parts.bench import Bench, Finding, free_memory
from gpu_parts.roofline import Bound
from nanovllm.engine.attention.selection import Heads

HEADS = Heads(16, 8, 128)
PAGE = 16
CACHED_BYTES = 256 << 20  # read between two reads of the same page: no GPU keeps as much near its cores
LAUNCHES = 20  # in a graph, so that what the host does is nothing beside them


@dataclass(frozen=True)
class Case:
    """Rows of one length, the queries of each, and the lines and sizes of tiles that are tried."""

    name: str
    rows: int
    queries: int
    context: int
    lines: tuple[int, ...]
    keys: tuple[int, ...]


CASES = (
    Case("decode, 8 rows of 8,192", 8, 1, 8192, (16,), (32, 64, 128)),
    Case("decode, 256 rows of 840", 256, 1, 840, (16,), (32, 64, 128)),
    Case("prompt, 8 rows of 1,024", 8, 1024, 1024, (64, 128), (32, 64, 128)),
)
WARPS = (4, 8)
STAGES = (2, 3)


def measure(bench: Bench) -> Iterator[Finding]:
    """Microseconds of a launch of each tile; one that does not compile or fit is told as such."""
    try:
        from nanovllm.engine.kernels import paged_triton
    except ModuleNotFoundError:
        yield {"sweep": "left out: Triton is not installed"}
        return
    if not bench.is_cuda:
        yield {"sweep": "left out: for a GPU alone"}
        return
    properties = torch.cuda.get_device_properties(0)
    capability, cores = (properties.major, properties.minor), properties.multi_processor_count
    group = HEADS.num // HEADS.num_kv
    for case in CASES:
        launch = _launcher(case, cores, paged_triton)
        ours = paged_triton.choose_tile(case.queries, group, HEADS.dim, 2, capability)
        tiles = [paged_triton.Tile(*one) for one in product(case.lines, case.keys, WARPS, STAGES)]
        found = []
        for tile in dict.fromkeys([ours, *tiles]):
            try:
                microseconds = graph_microseconds(launch(tile))
            except Exception as error:
                found.append({**asdict(tile), "error": f"{type(error).__name__}: {str(error)[:120]}"})
            else:
                found.append({**asdict(tile), "microseconds": round(microseconds, 2)})
        yield {case.name: _judged(found, case, bench)}
        free_memory()


def _judged(found: Sequence[dict[str, Any]], case: Case, bench: Bench) -> dict[str, Any]:
    timed = sorted((one for one in found if "microseconds" in one), key=lambda one: one["microseconds"])
    table = found[0].get("microseconds")
    best = timed[0] if timed else None
    behind = round(table / best["microseconds"], 3) if table and best else None
    read = 2 * case.rows * case.context * HEADS.num_kv * HEADS.dim * 2
    copied = bench.report.figures("roofline").get("copied_gb_per_second") if Bound(bench).known else None
    told = {
        "table": found[0],
        "table_against_the_best": behind,
        "table_of_copied_bandwidth": round(read / table / 1e3 / copied, 3) if table and copied else None,
        "best": timed[:5],
        "failed": [one for one in found if "error" in one],
        "tiles": len(found),
    }
    print(f"tiles, {case.name}: the table's takes {behind} times the best's {best}")
    return told


def _launcher(case: Case, cores: int, paged_triton: Any) -> Callable[[Any], Callable[[], None]]:
    """Takes a tile; what it returns launches the kernel :data:`LAUNCHES` times, each on the next layer's pages."""
    blocks = -(-case.context // PAGE)
    layer_bytes = case.rows * blocks * PAGE * 2 * HEADS.num_kv * HEADS.dim * 2
    layers = max(2, -(-CACHED_BYTES // layer_bytes))
    shape = (case.rows * blocks, PAGE, 2, HEADS.num_kv, HEADS.dim)
    caches = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(layers)]
    query = torch.randn(case.rows * case.queries, HEADS.num, HEADS.dim, dtype=torch.bfloat16, device="cuda")
    starts = torch.arange(case.rows + 1, dtype=torch.int32, device="cuda") * case.queries
    contexts = torch.full((case.rows,), case.context, dtype=torch.int32, device="cuda")
    tables = torch.randperm(case.rows * blocks, device="cuda").int().view(case.rows, blocks)
    group = HEADS.num // HEADS.num_kv

    def launcher(tile: Any) -> Callable[[], None]:
        splits = paged_triton.choose_splits(
            case.rows, len(query), case.context, kv_heads=HEADS.num_kv, tile=tile, group=group, cores=cores
        )

        def launch() -> None:
            for number in range(LAUNCHES):
                cache = caches[number % layers]
                paged_triton.paged_attention(query, cache, starts, contexts, tables, tile, splits)

        return launch

    return launcher


def graph_microseconds(launch: Callable[[], None], times: int = 7) -> float:
    """Of one of the :data:`LAUNCHES` launches, by the median of ``times`` replays of a graph of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        launch()
    found = []
    for _ in range(times):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        found.append(1e3 * first.elapsed_time(last) / LAUNCHES)
    return statistics.median(found)
