from __future__ import annotations

import shutil
import signal
import subprocess
import sys

import pytest
from parts import eventually

from nanovllm.demo.child_process import LocalProcess, free_port

SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
]


async def started(process: LocalProcess) -> LocalProcess:
    process.start()
    await eventually(lambda: "up" in process.tail())
    return process


async def test_stop_ends_a_process_politely(tmp_path):
    process = await started(LocalProcess("sleeper", SLEEPER, tmp_path / "log"))
    assert process.is_running
    assert process.stop() == -signal.SIGTERM
    assert not process.is_running


async def test_stop_ends_a_process_that_does_not_listen(tmp_path):
    process = await started(LocalProcess("stubborn", STUBBORN, tmp_path / "log"))
    assert process.stop(grace_s=0.2) == -signal.SIGKILL


async def test_its_exit_code_and_last_words_are_kept(tmp_path):
    process = LocalProcess(
        "talker", [sys.executable, "-c", "print(1); print(2); raise SystemExit(7)"], tmp_path / "log"
    )
    assert process.exit_code is None
    process.start()
    await eventually(lambda: not process.is_running)
    assert process.exit_code == 7
    assert process.tail(1) == "2"
    assert process.stop() == 7


def test_a_process_that_never_started_has_nothing_to_stop(tmp_path):
    process = LocalProcess("sleeper", SLEEPER, tmp_path / "log")
    process.kill()
    assert process.stop() is None
    assert process.tail() == ""


PARENT = """
import sys, time
from pathlib import Path
from nanovllm.demo.child_process import LocalProcess, free_port
child = LocalProcess("child", [sys.executable, "-c", "import time; time.sleep(600)"], Path(sys.argv[1]))
child.start()
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv (util-linux) is not on this machine")
async def test_a_killed_parent_takes_it_along(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "log")], stdout=subprocess.PIPE)  # noqa: ASYNC220
    assert parent.stdout is not None
    with parent.stdout:
        child = int(parent.stdout.readline())
    assert is_alive(child)
    parent.kill()
    parent.wait()
    await eventually(lambda: not is_alive(child))


def is_alive(pid: int) -> bool:
    """A zombie is not: whoever adopted it may reap it late."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(state) and not state.startswith("Z")


def test_no_port_is_given_twice_and_none_that_a_client_may_be_given() -> None:
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50
    assert max(ports) < 32_768
