"""How much memory the engine believes to have: the least of the machine's and its control groups'."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from nanovllm import LLM
from nanovllm.engine.config import LEAST_KV_BYTES
from nanovllm.engine.execution import kv_cache_size
from nanovllm.engine.execution.host_memory import memory_limit, resident_bytes

GIB = 1 << 30
MACHINE = memory_limit(Path("/nowhere"), Path("/nowhere"))


def lay_out(folder: Path, cgroup: str, limits: dict[str, str]) -> tuple[Path, Path]:
    """A process's ``cgroup`` file, and the limits of control groups by path."""
    proc, groups = folder / "proc", folder / "groups"
    proc.mkdir()
    (proc / "cgroup").write_text(cgroup)
    for path, text in limits.items():
        (groups / path).parent.mkdir(parents=True, exist_ok=True)
        (groups / path).write_text(text + "\n")
    return proc, groups


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected"),
    [
        ("0::/\n", {"memory.max": "1048576"}, 1 << 20),  # in a container
        ("0::/\n", {"memory.max": "max"}, MACHINE),
        ("0::/kube/pod/worker\n", {"kube/pod/memory.max": "2097152", "kube/pod/worker/memory.max": "max"}, 2 << 20),
        ("0::/kube/pod\n", {"kube/memory.max": "4096", "kube/pod/memory.max": "1048576"}, 4096),
        ("5:cpu,memory:/pod\n0::/\n", {"memory/pod/memory.limit_in_bytes": "3145728"}, 3 << 20),  # version 1
        ("5:memory:/pod\n", {"memory/pod/memory.limit_in_bytes": str(2**63 - 4096)}, MACHINE),
        ("0::/../elsewhere\n", {}, MACHINE),
        ("0::/pod\n", {"pod/memory.max": "4194304", "pod/memory.high": "2097152"}, 2 << 20),
        ("\nnonsense\n5:memory\n0::/\n", {"memory.max": "1048576"}, 1 << 20),
    ],
)
def test_the_least_limit_of_all_control_groups_counts(
    tmp_path: Path, cgroup: str, limits: dict[str, str], expected: int
) -> None:
    assert memory_limit(*lay_out(tmp_path, cgroup, limits)) == expected


def test_the_machine_counts_where_there_are_no_control_groups(tmp_path: Path) -> None:
    assert memory_limit(tmp_path, tmp_path) == MACHINE > 0
    assert resident_bytes(tmp_path) == 0 < resident_bytes()


def test_a_limit_of_the_address_space_counts_less_what_is_mapped_already(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (64 << 20), hard))
    try:
        room = memory_limit(groups=tmp_path) - resident_bytes()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert 0 < room <= 96 << 20


@pytest.mark.parametrize(
    ("memory", "share", "reserved", "expected"),
    [
        (100 * GIB, 0.4, 0, 39 * GIB),
        (100 * GIB, 0.2, 3 * GIB, 16 * GIB),
        (2 * GIB, 0.4, 0, LEAST_KV_BYTES),
    ],
)
def test_the_kv_cache_has_what_the_share_of_memory_leaves(
    monkeypatch: pytest.MonkeyPatch, memory: int, share: float, reserved: int, expected: int, text: Path
) -> None:
    monkeypatch.setattr(kv_cache_size, "memory_limit", lambda: memory)
    monkeypatch.setattr(kv_cache_size, "resident_bytes", lambda: GIB)
    with LLM(str(text), cpu_memory_utilization=share, embedding_cache_bytes=reserved) as engine:
        runner = engine.model_runner
        assert (
            kv_cache_size.kv_cache_bytes(
                engine.config,
                runner.limits,
                runner.device,
                runner.model,
                runner.attention,
                runner.sampling,
                has_graphs=False,
                reserved=reserved,
            )
            == expected
        )


def test_the_kv_cache_grows_with_the_memory_up_to_twice_what_all_seats_need(
    monkeypatch: pytest.MonkeyPatch, text: Path
) -> None:
    def blocks(memory: int, seats: int) -> int:
        monkeypatch.setattr(kv_cache_size, "memory_limit", lambda: memory)
        with LLM(str(text), max_num_seqs=seats, max_model_len=64, block_size=16) as engine:
            return engine.model_runner.num_blocks

    assert blocks(4 * GIB, 1) == blocks(400 * GIB, 1)  # a small context: the least cache is more than twice the seats
    least = blocks(GIB, 4096)
    assert least < blocks(64 * GIB, 1 << 16) <= 2 * 4 * (1 << 16)
