"""Encoder runs a distinct picture when more requests wait than the embedding cache holds: counts, no times."""

from __future__ import annotations

import numpy as np
from PIL import Image

from benchmarks.growth.tree import Row, find, rows_of

SEATS = 4


def measure(is_tiny: bool) -> list[Row]:
    """With a cache for half of them and for all."""
    return rows_of(_runs, "pictures", (12,) if is_tiny else (24, 96))


def _runs(pictures: int) -> dict[tuple[str, str], float]:
    return {
        ("encoder runs a picture, cache for twice as many", "runs"): _count(pictures, 2.0),
        ("encoder runs a picture, cache for half", "runs"): _count(pictures, 0.5),
    }


def _count(pictures: int, share: float) -> float:
    from nanovllm import SamplingParams

    MultiModalLLM = find("engine.multimodal_llm_engine:MultiModalLLM")
    with MultiModalLLM("tiny-receipts", enable_multimodal=True, kv_cache_bytes=1 << 26) as probe:
        encoder = probe.processor.encoder
        width = getattr(encoder, "width", None) or encoder.hidden_size
        entry = encoder.num_vision_tokens * width * encoder.dtype.itemsize
    cache = int(entry * pictures * share) + 1
    with MultiModalLLM(
        "tiny-receipts",
        enable_multimodal=True,
        kv_cache_bytes=1 << 26,
        max_num_seqs=SEATS,
        embedding_cache_bytes=cache,
    ) as llm:
        llm.generate(
            ["<|image|>\n"] * pictures,
            SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True),
            images=[[_picture(seed)] for seed in range(pictures)],
            use_tqdm=False,
        )
        runs: int = llm.get_multimodal_stats()["images_encoded"]
    return runs / pictures


def _picture(seed: int) -> Image.Image:
    tiles = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(tiles).resize((160, 160), Image.Resampling.NEAREST)
