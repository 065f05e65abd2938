"""Phases of a start: what counts for which, and the digest that a thread computes beside them."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nanovllm.checkpoints import digest
from nanovllm.start_phases import START, Phase, StartPhases


def test_a_phase_inside_another_counts_for_itself_alone() -> None:
    phases = StartPhases(time.monotonic())
    with phases.timed(Phase.PACKING):
        with phases.timed(Phase.KERNELS):
            time.sleep(0.05)
        with phases.timed(Phase.HUGE_PAGES):
            time.sleep(0.03)
    found = phases.seconds()
    assert list(found) == [Phase.KERNELS, Phase.PACKING, Phase.HUGE_PAGES]
    assert found[Phase.PACKING] < found[Phase.HUGE_PAGES] < found[Phase.KERNELS]
    assert re.fullmatch(r"kernels 0\.\d\d s, packing 0\.\d\d s, huge pages 0\.\d\d s", str(phases))


def test_phases_of_other_threads_and_of_blocks_that_raise_count_too() -> None:
    phases = StartPhases(time.monotonic())

    def other() -> None:
        with phases.timed(Phase.DIGEST):
            time.sleep(0.02)

    thread = threading.Thread(target=other)

    @phases.timed(Phase.WEIGHTS)
    def load() -> None:
        thread.start()
        thread.join()
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        load()
    found = phases.seconds()
    assert found[Phase.WEIGHTS] >= found[Phase.DIGEST] > 0
    phases.add(Phase.WEIGHTS, 1.0)
    assert phases.seconds()[Phase.WEIGHTS] > found[Phase.WEIGHTS]


@pytest.mark.skipif(sys.platform != "linux", reason="where /proc tells when a process began")
def test_the_clock_begins_with_the_process_not_with_the_import() -> None:
    script = "import time; time.sleep(0.5)\nfrom nanovllm.start_phases import START\nprint(START.age_s())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0.45 <= float(done.stdout) < 60
    assert START.age_s() > 0


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for file in files:
        file.write_bytes(os.urandom(300_000))
    return files


def test_the_digest_is_the_same_whether_a_thread_began_it_or_not(files: list[Path]) -> None:
    whole = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    assert digest.digest_of(files) == whole
    digest.begin_digest(files)
    digest.begin_digest(files)
    assert digest.digest_of(files) == whole
    files[1].write_bytes(b"other weights")
    assert digest.digest_of(files) != whole  # nothing is kept: files may be others by then


def test_a_file_that_cannot_be_read_is_told_where_its_digest_is_needed(files: list[Path]) -> None:
    files[1].unlink()
    digest.begin_digest(files)
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors"):
        digest.digest_of(files)
