"""A step's own threads: the same bits for any number of them, awake in a step only, safe beside others and forks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanovllm.engine import kernels
from nanovllm.engine.kernels import step_threads
from nanovllm.engine.layers import token_ops
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(kernels.missing() is not None, reason=str(kernels.missing()))

WIDTH = 96


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """OpenMP sleeps by its variables, and torch has as many threads as the test asks for, which may be no cores."""
    before = torch.get_num_threads()
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")
    torch.set_num_threads(2)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def rows_of(count: int) -> Tensor:
    return torch.randn(count, 2 * WIDTH, generator=torch.Generator().manual_seed(count))


def computed(x: Tensor) -> list[Tensor]:
    return [token_ops.gated_silu(x), token_ops.argmax(x), *token_ops.scale_rows(x)]


def cpu_seconds_of_threads() -> float:
    """What the team's threads have used, by the scheduler; they are the process's only ones of that name."""
    spent = 0
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == "nanovllm-step":
            spent += int((task / "schedstat").read_text().split()[0])
    return spent / 1e9


def settled() -> float:
    """`cpu_seconds_of_threads` once it has stopped growing: a thread that others keep from its core sleeps later."""
    spent = cpu_seconds_of_threads()
    for _ in range(200):
        time.sleep(0.05)
        before, spent = spent, cpu_seconds_of_threads()
        if spent == before:
            return spent
    pytest.fail("the threads do not come to rest")


def test_results_have_the_same_bits_for_any_number_of_threads(threads: Callable[[int], None]) -> None:
    for count in (1, 7, 300):
        x = rows_of(count)
        alone = computed(x)
        for number in (1, 2, 3, 4):
            threads(number)
            before = step_threads.counts().kernels
            with step_threads.awake():
                together = computed(x)
            assert all(map(torch.equal, together, alone))
            assert step_threads.counts().kernels > before or number == 1 or count < 300


def test_an_engine_s_step_has_them_and_its_tokens_are_the_same(text: Path, threads: Callable[[int], None]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    prompts = [[7 + index, 8, 9] * 40 for index in range(8)]
    answers, shared = [], []
    for number in (1, 2, 4):
        threads(number)
        before = step_threads.counts().kernels
        with LLMEngine(str(text), kv_cache_bytes=4 << 20) as engine:
            answers.append([output.token_ids for output in engine.generate(prompts, params, use_tqdm=False)])
        shared.append(step_threads.counts().kernels > before)
    assert answers[0] == answers[1] == answers[2]
    assert shared == [False, True, True]


def test_between_steps_the_threads_use_no_time(threads: Callable[[int], None]) -> None:
    x = rows_of(300)
    for _ in range(50):
        with step_threads.awake():
            computed(x)
    before, counted = settled(), step_threads.counts()
    time.sleep(0.3)
    assert cpu_seconds_of_threads() - before < 0.001
    assert step_threads.counts() == counted


def test_a_long_pause_inside_a_step_ends_in_sleep(threads: Callable[[int], None]) -> None:
    with step_threads.awake():
        computed(rows_of(300))
        before, counted = settled(), step_threads.counts()
        time.sleep(0.3)
        assert cpu_seconds_of_threads() - before < 0.001
        assert step_threads.counts() == counted
        computed(rows_of(300))


def test_more_threads_than_cores_do_not_spin(threads: Callable[[int], None]) -> None:
    threads(len(os.sched_getaffinity(0)) + 1)
    with step_threads.awake():
        before = step_threads.counts()
        for _ in range(20):
            computed(rows_of(300))
    after = step_threads.counts()
    assert after.pauses == before.pauses
    assert after.kernels > before.kernels


def test_the_second_of_two_concurrent_steps_has_openmp_s_threads(threads: Callable[[int], None]) -> None:
    x, begun, done = rows_of(300), threading.Event(), threading.Event()
    expected = computed(x)
    found: list[Tensor] = []

    def other() -> None:
        with step_threads.awake():
            before = step_threads.counts().kernels
            found.extend(computed(x))
            assert step_threads.counts().kernels == before
            begun.set()
            done.wait(10)

    with step_threads.awake():
        thread = threading.Thread(target=other)
        thread.start()
        assert begun.wait(10)
        assert all(map(torch.equal, computed(x), expected))
    with step_threads.awake():  # the other one's step is still open, and has nothing that this one would wait for
        before = step_threads.counts().kernels
        assert all(map(torch.equal, computed(x), expected))
        assert step_threads.counts().kernels > before
    done.set()
    thread.join()
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def test_many_threads_with_steps_at_once_all_get_their_results(threads: Callable[[int], None]) -> None:
    wrong: list[int] = []

    def steps(seed: int) -> None:
        x = rows_of(100 + seed)
        expected = computed(x)
        for _ in range(100):
            with step_threads.awake():
                if not all(map(torch.equal, computed(x), expected)):
                    wrong.append(seed)

    callers = [threading.Thread(target=steps, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_step_inside_a_step_ends_with_the_outer_one(threads: Callable[[int], None]) -> None:
    with step_threads.awake():
        with step_threads.awake():
            computed(rows_of(300))
        before = step_threads.counts().kernels
        computed(rows_of(300))
        assert step_threads.counts().kernels > before


def test_a_step_ends_where_an_error_ends_it(threads: Callable[[int], None]) -> None:
    with pytest.raises(RuntimeError, match="of the step"), step_threads.awake():
        raise RuntimeError("of the step")
    with step_threads.awake():
        before = step_threads.counts().kernels
        computed(rows_of(300))
        assert step_threads.counts().kernels > before


@pytest.mark.parametrize(
    ("variables", "spins"),
    [
        ({}, True),
        ({"GOMP_SPINCOUNT": "0"}, False),
        ({"OMP_WAIT_POLICY": "passive"}, False),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, True),
        ({"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}, True),
    ],
)
def test_where_openmp_s_threads_spin_a_step_has_no_others(
    variables: dict[str, str], spins: bool, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert step_threads.openmp_spins() is spins
    with step_threads.awake():
        before = step_threads.counts().kernels
        computed(rows_of(300))
        assert (step_threads.counts().kernels > before) is not spins


@pytest.mark.parametrize(
    ("text", "quota"),
    [("max 100000\n", float("inf")), ("150000 100000\n", 1.5), ("nonsense\n", float("inf")), (None, float("inf"))],
)
def test_threads_beyond_a_container_s_quota_are_openmp_s(
    text: str | None, quota: float, tmp_path: Path, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    assert step_threads.cpu_quota(tmp_path) == quota
    monkeypatch.setattr(step_threads, "cpu_quota", lambda: quota)
    assert (step_threads.why_not() is None) is (quota >= 2)


SCRIPT = """
import os, signal, sys, threading, torch
from nanovllm.engine import kernels
from nanovllm.engine.kernels import step_threads
from nanovllm.engine.layers import token_ops
kernels.missing()
torch.set_num_threads(2)
x = torch.randn(300, 192)
def step():
    with step_threads.awake():
        return token_ops.gated_silu(x)
expected = step()
"""
CASES = {
    "after a fork the child has threads of its own": """
for _ in range(5):
    child = os.fork()
    if child == 0:
        kernels_before = step_threads.counts().kernels
        same = torch.equal(step(), expected) and step_threads.counts().kernels > kernels_before
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(step(), expected)
""",
    "a fork inside a step leaves the child outside of it": """
with step_threads.awake():
    child = os.fork()
    if child == 0:
        same = torch.equal(step(), expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(token_ops.gated_silu(x), expected)
""",
    "the process ends inside a step": """
assert torch.ops.nanovllm.begin_step()
assert torch.equal(token_ops.gated_silu(x), expected)
""",
    "an interrupt reaches the main thread": """
import time
def interrupted(*_):
    assert threading.current_thread() is threading.main_thread()
    raise KeyboardInterrupt
signal.signal(signal.SIGINT, interrupted)
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    while True:
        step()
        time.sleep(0.001)
except KeyboardInterrupt:
    pass
assert torch.equal(step(), expected)
""",
}


@pytest.mark.parametrize("case", CASES)
def test_the_process_around_the_threads(case: str) -> None:
    environment = os.environ | {"GOMP_SPINCOUNT": "0", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-c", SCRIPT + CASES[case]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
