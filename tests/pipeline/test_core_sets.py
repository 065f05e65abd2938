"""Cores are divided by NUMA node and physical core, and each belongs to one replica."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.errors import ConfigurationError
from nanovllm.pipeline.operations.core_sets import core_sets, cores_by_node, divide


def make_system(directory: Path, nodes: list[str], siblings: dict[int, str]) -> Path:
    for number, cores in enumerate(nodes):
        node = directory / "node" / f"node{number}"
        node.mkdir(parents=True)
        (node / "cpulist").write_text(f"{cores}\n")
    for core, threads in siblings.items():
        topology = directory / "cpu" / f"cpu{core}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{threads}\n")
    return directory


def test_threads_of_one_physical_core_stay_together_and_nodes_apart(tmp_path: Path) -> None:
    siblings = {core: f"{core % 4},{core % 4 + 4}" for core in range(8)}
    system = make_system(tmp_path, ["0-1,4-5", "2-3,6-7"], siblings)
    nodes = cores_by_node(set(range(8)), system)
    assert nodes == [[0, 4, 1, 5], [2, 6, 3, 7]]
    assert divide(nodes, 2) == [(0, 4, 1, 5), (2, 6, 3, 7)]
    assert divide(nodes, 4) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert divide(nodes, 1) == [(0, 4, 1, 5, 2, 6, 3, 7)]


def test_cores_that_this_process_may_not_use_are_left_out(tmp_path: Path) -> None:
    system = make_system(tmp_path, ["0-3", "4-7"], {})
    assert cores_by_node({1, 2, 6}, system) == [[1, 2], [6]]
    assert cores_by_node({1, 9}, system) == [[1], [9]], "a core of no node that is shown"
    assert cores_by_node({3, 1}, tmp_path / "none") == [[1, 3]]


@given(sizes=st.lists(st.integers(1, 24), min_size=1, max_size=4), data=st.data())
def test_every_core_belongs_to_one_replica_and_no_replica_straddles_nodes(
    sizes: list[int], data: st.DataObject
) -> None:
    nodes, first = [], 0
    for size in sizes:
        nodes.append(list(range(first, first + size)))
        first += size
    replicas = data.draw(st.integers(1, first))
    sets = divide(nodes, replicas)
    assert len(sets) == replicas
    assert sorted(core for cores in sets for core in cores) == list(range(first))
    assert all(sets)
    for cores in sets:
        touched = [node for node in nodes if set(node) & set(cores)]
        assert len(touched) == 1 or all(set(node) <= set(cores) for node in touched)


def test_more_replicas_than_cores_are_refused() -> None:
    cores = len(os.sched_getaffinity(0))
    told = rf"replicas={cores + 1}, and this process may use {cores} cores?: set {cores} at most"
    with pytest.raises(ConfigurationError, match=told):
        core_sets(cores + 1)
