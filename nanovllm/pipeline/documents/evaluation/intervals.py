"""Ratios with 95% intervals, and McNemar's test of two runs."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb, erfc, sqrt
from typing import Literal

_Z = 1.959964  # of a normal distribution's middle 95%
RESAMPLES = 1_000
MAX_UNITS = 1_000
MAX_EXACT = 1_000
"""Differences up to which McNemar's test is exact; beyond, chi-squared with continuity correction."""


@dataclass(frozen=True)
class Ratio:
    """``count`` of ``total``; without any total it has no value, and without ends no interval is known."""

    count: int
    total: int
    low: float | None
    high: float | None
    interval: Literal["wilson", "bootstrap"]

    @property
    def value(self) -> float | None:
        """The ratio itself."""
        return self.count / self.total if self.total else None


def wilson(count: int, total: int) -> Ratio:
    """The ratio of things that do not depend on one another, with Wilson's score interval."""
    if not total:
        return Ratio(count, total, None, None, "wilson")
    share, z2 = count / total, _Z * _Z
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z * sqrt(share * (1 - share) / total + z2 / (4 * total * total)) / (1 + z2 / total)
    return Ratio(count, total, max(0.0, middle - half), min(1.0, middle + half), "wilson")


def bootstrap(parts: Sequence[tuple[int, int]]) -> Ratio:
    """The ratio of two sums over documents, with a percentile interval over resampled documents.

    Leaves of one document are right or wrong together; documents are what was sampled. More than ``MAX_UNITS`` of
    them are resampled in groups of every so many-th, which costs no width and bounds the work. The seed is fixed: the
    same documents have the same interval.
    """
    groups = [parts[start::MAX_UNITS] for start in range(min(MAX_UNITS, len(parts)))]
    counts = [sum(one for one, _ in group) for group in groups]
    totals = [sum(one for _, one in group) for group in groups]
    count, total = sum(counts), sum(totals)
    ratios = []
    for drawn in _draws(len(groups)) if total else ():
        below = sum(map(totals.__getitem__, drawn))
        if below:
            ratios.append(sum(map(counts.__getitem__, drawn)) / below)
    ratios.sort()
    if not ratios or ratios[0] == ratios[-1]:  # no document differs, or one counts alone: nothing says how sure that is
        return Ratio(count, total, None, None, "bootstrap")
    last = len(ratios) - 1
    return Ratio(count, total, ratios[round(0.025 * last)], ratios[round(0.975 * last)], "bootstrap")


@lru_cache(1)
def _draws(units: int) -> list[array[int]]:
    """The units of each resample, the same for all ratios of a run."""
    draws = random.Random(0)
    return [array("H", draws.choices(range(units), k=units)) for _ in range(RESAMPLES)]


@dataclass(frozen=True)
class McNemar:
    """Things that both runs have: how many only one of them has right, and how likely that is by chance."""

    compared: int
    only_baseline: int
    only_now: int

    @property
    def p_value(self) -> float:
        """Two-sided: of a difference at least so great, were both runs equally good."""
        count, fewer = self.only_baseline + self.only_now, min(self.only_baseline, self.only_now)
        if count > MAX_EXACT:
            distance = max(0, abs(self.only_baseline - self.only_now) - 1)
            return erfc(distance / sqrt(2 * count))
        return min(1.0, 2 * sum(comb(count, one) for one in range(fewer + 1)) / 2**count)
