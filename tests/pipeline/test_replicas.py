"""What the process that starts replicas does with what they leave behind: output that is held, or that nobody reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two replicas need two cores")

PARENT = """
import sys
from nanovllm.pipeline.operations.replicas import Replicas
from nanovllm.settings.worker import Settings

sys.exit(Replicas(Settings(replicas=2), [sys.executable, "-c", sys.argv[1]]).run(until_all_end=True))
"""

DIES_BESIDE_A_CHILD = """
import os, pathlib, signal, subprocess, sys

if sys.argv[-1] == "0":
    sys.exit()
second_time = pathlib.Path("second-time")
if second_time.exists():
    second_time.write_text("started again")
    sys.exit()
second_time.touch()
held = subprocess.Popen(["sleep", "60"])  # has the output
pathlib.Path("child").write_text(str(held.pid))
os.kill(os.getpid(), signal.SIGKILL)
"""

SAYS_MUCH = """
import pathlib, sys

for _ in range(20_000):
    print("x" * 100)
pathlib.Path(f"done-{sys.argv[-1]}").touch()
"""


def test_a_replica_whose_child_holds_its_output_is_started_again(tmp_path: Path) -> None:
    try:
        subprocess.run([sys.executable, "-c", PARENT, DIES_BESIDE_A_CHILD], cwd=tmp_path, check=True, timeout=40)
    finally:
        os.kill(int((tmp_path / "child").read_text()), 9)
    assert (tmp_path / "second-time").read_text() == "started again"


def test_replicas_go_on_where_nobody_reads_what_they_say(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, SAYS_MUCH], cwd=tmp_path, stderr=subprocess.PIPE)
    assert parent.stderr is not None
    parent.stderr.close()
    try:
        assert parent.wait(40) == 0
    finally:
        parent.kill()
    assert {path.name for path in tmp_path.iterdir()} == {"done-0", "done-1"}


def test_a_replica_whose_parent_ended_before_it_could_ask_for_its_signal_ends() -> None:
    script = "from nanovllm.pipeline.operations.replicas import end_with_parent; end_with_parent(); print('goes on')"
    for parent, code, output in ((os.getpid(), 0, b"goes on\n"), (1 << 30, 1, b"")):
        environment = {**os.environ, "_NANOVLLM_PARENT": str(parent)}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
        assert (done.returncode, done.stdout) == (code, output)
