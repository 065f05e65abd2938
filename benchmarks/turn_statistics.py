"""What turns say: ratios with an interval, and how many answers of two engines are equal. No torch."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Any

RESAMPLES = 10_000


def median_interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float]:
    """The bootstrap interval of the median of ``values``: percentiles over seeded resamples; of one value, itself."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    outside = (1 - confidence) / 2
    return medians[int(RESAMPLES * outside)], medians[int(RESAMPLES * (1 - outside)) - 1]


def agreement(ours: Sequence[Any], theirs: Sequence[Any]) -> dict[str, Any]:
    """Equal answers over all turns, and the share of tokens before the first difference; ``{}`` where none are told.

    Each side is a list of turns, a turn a list of token ids a request, or None.
    """
    pairs = [
        pair
        for mine, other in zip(ours, theirs, strict=True)
        if mine is not None and other is not None
        for pair in zip(mine, other, strict=True)
    ]
    if not pairs:
        return {}
    equal = sum(mine == other for mine, other in pairs)
    shared = sum(
        next((i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), min(map(len, pair))) for pair in pairs
    )
    return {
        "answers_equal": equal,
        "answers": len(pairs),
        "tokens_before_difference": round(shared / max(1, sum(len(mine) for mine, _ in pairs)), 4),
    }
