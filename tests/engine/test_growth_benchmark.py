"""What grows with what: the topics run on this tree, and their table says what was measured."""

from __future__ import annotations

from importlib import import_module

import pytest

from benchmarks.growth.__main__ import TOPICS, table
from benchmarks.growth.tree import Row, find, rows_of

ALONE = {"starting"}  # processes of its own, by the checkpoints that the parent names


@pytest.mark.parametrize("topic", [name for name in TOPICS if name not in ALONE])
def test_a_topic_finds_the_names_of_this_tree_and_measures(topic: str) -> None:
    rows: list[Row] = import_module(f"benchmarks.growth.{topic}").measure(True)
    assert rows
    for row in rows:
        assert row.values, row.what
        assert min(row.values.values()) > 0, row.what
        if row.unit == "runs":
            assert set(row.values.values()) == {1.0}, row.what  # every distinct picture is encoded once


def test_costs_at_all_sizes_are_rows_by_what_they_are() -> None:
    rows = rows_of(lambda size: {("a step", "ms"): 2.0 * size, ("memory", "MiB"): 1.0}, "rows", (1, 8))
    assert rows == [
        Row("a step", "ms", "rows", {1: 2.0, 8: 16.0}),
        Row("memory", "MiB", "rows", {1: 1.0, 8: 1.0}),
    ]


def test_a_name_that_no_tree_has_is_an_error() -> None:
    with pytest.raises(LookupError, match=r"engine\.nowhere:Nothing"):
        find("engine.nowhere:Nothing")


def test_the_table_has_both_trees_beside_each_other() -> None:
    def row(**values: float) -> dict[str, object]:
        sizes = {size.removeprefix("n"): value for size, value in values.items()}
        return {"what": "a step", "unit": "ms", "grows_with": "rows", "values": sizes}

    report = {"topics": {"steps": {"before": [row(n1=0.5, n1000000=1234.5)], "after": [row(n1=0.25, n1000000=3.0)]}}}
    assert table(report).splitlines()[-1] == "| a step, ms | rows: 1, 1M | 0.5 / 1,234 | 0.25 / 3 |"
