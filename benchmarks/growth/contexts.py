"""What long contexts cost the host in a step: tables and slots, drafts and their memory, positions of images."""

from __future__ import annotations

import random
import tracemalloc
from typing import Any

import torch

from benchmarks.growth.tree import Row, best, find, make_sequence, method, once, rows_of

BLOCK_SIZE = 16
ROWS = 64


def measure(is_tiny: bool) -> list[Row]:
    """Of 64 decoding rows, of one sequence's drafts, and of a prompt with many images."""
    torch.set_num_threads(1)
    contexts = (64, 256) if is_tiny else (1_024, 8_192, 32_768)
    images = (1, 4) if is_tiny else (1, 16, 256)
    return [
        *rows_of(_metadata, "tokens of context", contexts),
        *rows_of(_drafts, "tokens of context", contexts),
        *rows_of(_positions, "images", images),
    ]


def _metadata(context: int) -> dict[tuple[str, str], float]:
    AttentionBatch = find("engine.attention.base:AttentionBatch", "engine.attention:AttentionBatch")
    backend = find("engine.attention.cpu_paged:PagedCpuAttention", "engine.attention:PagedCpuAttention")(BLOCK_SIZE)
    width = context // BLOCK_SIZE + 1
    lists = [list(range(width)) for _ in range(ROWS)]
    plan = method(backend, "metadata", "plan")
    try:
        kept = find("engine.scheduling.block_tables:BlockTables")(ROWS, width)
    except LookupError:
        return {_METADATA: 1e3 * best(lambda: plan(AttentionBatch([1] * ROWS, [context] * ROWS, lists)))}
    for table in lists:
        kept.extend(kept.take_seat(), table)
    seats, rows = list(range(ROWS)), ([1] * ROWS, [context] * ROWS)
    return {_METADATA: 1e3 * best(lambda: plan(AttentionBatch(*rows, kept.rows, seats)))}


_METADATA = ("attention metadata of 64 decoding rows", "ms")


def _drafts(context: int) -> dict[tuple[str, str], float]:
    Recurrences = find("engine.scheduling.prompt_lookup:Recurrences", "engine.speculation:Recurrences")
    draw = random.Random(0)
    tokens = [draw.randrange(50_000) for _ in range(context)]
    run = tuple(tokens[-3:])
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    index = Recurrences(tokens)
    index.continuation(run, 8)
    memory = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    sequence = make_sequence("0", tokens, context, 10)
    return {
        ("first draft of a sequence", "ms"): 1e3 * once(lambda: Recurrences(tokens).continuation(run, 8)),
        ("later draft", "µs"): 1e6 * best(lambda: index.continuation(run, 8)),
        ("drafts' index of a sequence", "MiB"): memory / 2**20,
        ("views of 8 drafts for the sampler", "µs"): 1e6
        * best(lambda: [sequence.ahead((1,) * drafts) for drafts in range(9)]),
    }


def _positions(images: int) -> dict[tuple[str, str], float]:
    positions = find("engine.models.qwen_vl:positions")
    ImageSpan = find("engine.scheduling.sequence:ImageSpan", "engine.sequence:ImageSpan")
    spans: Any = tuple(ImageSpan(None, b"", 10 + number * 300, 256, (16, 16)) for number in range(images))
    end = 20 + images * 300
    return {("positions of a decoded token behind images", "µs"): 1e6 * best(lambda: positions(spans, end, end + 1))}
