"""Skipped tests: counted by their reason, and failed where their part is required."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.side_by_side import skip_line

ROOT = Path(__file__).resolve().parent.parent

INNER = """
import pytest

@pytest.mark.kafka
def test_by_its_marker():
    pytest.skip("no broker")

@pytest.mark.skipif(True, reason="a real S3 server: no S3_NODE")
def test_by_its_reason():
    pass

@pytest.mark.skip(reason="the wrong moon")
def test_of_no_part():
    pass

@pytest.mark.kafka
@pytest.mark.xfail(reason="known")
def test_that_is_expected_to_fail():
    raise AssertionError
"""


def session(folder: Path, *, required: str = "") -> tuple[str, dict[str, int]]:
    """The output of a pytest session over INNER, and the skips that it wrote."""
    (folder / "test_inner.py").write_text(INNER)
    (folder / "conftest.py").write_text(
        "from skips import pytest_configure, pytest_runtest_makereport, pytest_terminal_summary  # noqa\n"
    )
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    kafka: Apache Kafka\n")
    inherited = {name: value for name, value in os.environ.items() if name != "REQUIRE_PARTS"}
    environment = inherited | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}", "NANOVLLM_TEST_SKIPS": str(folder / "skips")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    ended = subprocess.run(
        command, cwd=folder, env=environment | {"REQUIRE_PARTS": required}, capture_output=True, text=True, check=False
    )
    skips = folder / "skips"
    return ended.stdout + ended.stderr, json.loads(skips.read_text()) if skips.exists() else {}


def test_what_a_machine_lacks_is_skipped_and_counted_by_its_reason(tmp_path: Path) -> None:
    output, skips = session(tmp_path)
    assert "3 skipped, 1 xfailed" in output
    assert skips == {"no broker": 1, "a real S3 server: no S3_NODE": 1, "the wrong moon": 1}


@pytest.mark.parametrize(
    ("required", "failed", "said"),
    [
        ("kafka", 1, "REQUIRE_PARTS has 'kafka', and this test would be skipped: no broker"),
        ("s3", 1, "REQUIRE_PARTS has 's3', and this test would be skipped: a real S3 server: no S3_NODE"),
        ("kafka, s3,k8s", 2, "REQUIRE_PARTS has 'kafka'"),
    ],
)
def test_a_required_part_that_is_missing_fails_its_tests(tmp_path: Path, required: str, failed: int, said: str) -> None:
    output, skips = session(tmp_path, required=required)
    assert sum(int(count) for count in re.findall(r"(\d+) (?:failed|error)", output)) == failed
    assert said in output
    assert sum(skips.values()) == 3 - failed


def test_a_required_part_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    output, _ = session(tmp_path, required="kafak")
    assert "'kafak'" in output
    assert "there are kafka, s3" in output


def test_the_last_line_counts_the_skips_of_both_processes() -> None:
    assert skip_line({}) == "skipped: none"
    assert skip_line({"no GPU": 1, "no broker": 3}) == "skipped: 4 tests: 3 (no broker); 1 (no GPU)"
