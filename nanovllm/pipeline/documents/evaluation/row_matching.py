"""Matching of the rows of two lists.

The similarity of two rows is the share of their leaves that are equal after normalisation. Rows whose leaves all have
the same normalised text are paired first, in order; the others so that the sum of similarities is greatest (Hungarian
algorithm), with the nearer row where several are alike. Where that would compare more than ``MAX_COMPARISONS`` rows,
each row of the truth in turn takes the most similar row that is free (greedy), the first of several. Pairs that agree
in less than half of their leaves are no pairs.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.pipeline.documents.evaluation.leaves import Meanings, have_one_meaning, is_absent, meanings
from nanovllm.pipeline.documents.json_spans import leaves

LEAST_SIMILARITY = 0.5
MAX_COMPARISONS = 40_000
_NEARER = 1e-6  # too little to outweigh a leaf

Row = Mapping[str, Meanings]
Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class MatchedRows:
    """Rows of a truth and of a result, and which are paired: indexes of both, in the order of the truth.

    ``duplicates``: rows of the result that repeat another one, beyond the times that the truth has it. ``is_cut``: the
    rows without a partner are the truth's last ones.
    """

    truth_rows: int
    result_rows: int
    pairs: tuple[tuple[int, int], ...]
    duplicates: int

    @property
    def missing(self) -> list[int]:
        """Rows of the truth without a partner."""
        return sorted(set(range(self.truth_rows)) - {truth for truth, _ in self.pairs})

    @property
    def invented(self) -> list[int]:
        """Rows of the result without a partner."""
        return sorted(set(range(self.result_rows)) - {result for _, result in self.pairs})

    @property
    def is_cut(self) -> bool:
        """Whether the result ends before the truth, and has the rows before."""
        missing = self.missing
        return bool(missing) and not self.invented and missing[0] == self.truth_rows - len(missing)

    @property
    def inversions(self) -> int:
        """Pairs of pairs whose order differs between truth and result."""
        seen: list[int] = []
        count = 0
        for _, result in self.pairs:
            count += len(seen) - bisect_right(seen, result)
            insort(seen, result)
        return count


def match_rows(truth: Sequence[Any], result: Sequence[Any]) -> MatchedRows:
    """Pair the rows of two lists."""
    truth_rows, result_rows = [_row(one) for one in truth], [_row(one) for one in result]
    truth_keys, result_keys = [_key(one) for one in truth_rows], [_key(one) for one in result_rows]
    pairs = _equal_pairs(truth_keys, result_keys)
    truth_left = sorted(set(range(len(truth))) - {one for one, _ in pairs})
    result_left = sorted(set(range(len(result))) - {other for _, other in pairs})
    match = _best_pairs if len(truth_left) * len(result_left) <= MAX_COMPARISONS else _greedy_pairs
    for one, other in match([truth_rows[one] for one in truth_left], [result_rows[one] for one in result_left]):
        pairs.append((truth_left[one], result_left[other]))
    known = Counter(truth_keys)
    duplicates = sum(max(0, times - max(1, known[key])) for key, times in Counter(result_keys).items())
    return MatchedRows(len(truth), len(result), tuple(sorted(pairs)), duplicates)


def _row(value: Any) -> Row:
    return {pointer: meanings(leaf) for pointer, leaf in leaves(value) if not is_absent(leaf)}


def _key(row: Row) -> frozenset[tuple[str, str]]:
    return frozenset((pointer, one.text) for pointer, one in row.items())


def _similarity(one: Row, other: Row) -> float:
    common = one.keys() & other.keys()
    total = len(one) + len(other) - len(common)
    return sum(have_one_meaning(one[key], other[key]) for key in common) / total if total else 1.0


def _equal_pairs(truth: Sequence[Any], result: Sequence[Any]) -> Pairs:
    places: dict[Any, deque[int]] = defaultdict(deque)
    for index, key in enumerate(result):
        places[key].append(index)
    return [(index, places[key].popleft()) for index, key in enumerate(truth) if places[key]]


def _greedy_pairs(truth: Sequence[Row], result: Sequence[Row]) -> Pairs:
    free = dict(enumerate(result))
    pairs = []
    for index, row in enumerate(truth):
        best = max(free, key=lambda other: _similarity(row, free[other]), default=None)
        if best is not None and _similarity(row, free[best]) >= LEAST_SIMILARITY:
            pairs.append((index, best))
            del free[best]
    return pairs


def _best_pairs(truth: Sequence[Row], result: Sequence[Row]) -> Pairs:
    if len(truth) > len(result):
        return [(one, other) for other, one in _best_pairs(result, truth)]
    similarity = [[_similarity(one, other) for other in result] for one in truth]
    costs = [
        [_NEARER * abs(i - j) / len(result) - each for j, each in enumerate(row)] for i, row in enumerate(similarity)
    ]
    return [(one, other) for one, other in assign(costs) if similarity[one][other] >= LEAST_SIMILARITY]


def assign(costs: Sequence[Sequence[float]]) -> Pairs:
    """The assignment of each row to a column of its own whose sum of costs is least; at most as many rows as columns.

    Hungarian algorithm by shortest augmenting paths, with potentials of rows and columns; column 0 is the path's start.
    """
    columns = len(costs[0]) if costs else 0
    row_potential, column_potential = [0.0] * (len(costs) + 1), [0.0] * (columns + 1)
    row_of = [0] * (columns + 1)
    for row in range(1, len(costs) + 1):
        row_of[0], column = row, 0
        least, previous = [float("inf")] * (columns + 1), [0] * (columns + 1)
        free = set(range(1, columns + 1))
        while row_of[column]:
            free.discard(column)
            at = row_of[column]
            for one in free:
                reduced = costs[at - 1][one - 1] - row_potential[at] - column_potential[one]
                if reduced < least[one]:
                    least[one], previous[one] = reduced, column
            following = min(free, key=least.__getitem__)
            step = least[following]
            for one in range(columns + 1):
                if one in free:
                    least[one] -= step
                else:
                    row_potential[row_of[one]] += step
                    column_potential[one] -= step
            column = following
        while column:
            row_of[column] = row_of[previous[column]]
            column = previous[column]
    return sorted((row_of[one] - 1, one - 1) for one in range(1, columns + 1) if row_of[one])
