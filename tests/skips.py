"""Hooks of pytest around skipped tests: their count by reason, and failures in their place where parts are required.

``REQUIRE_PARTS=kafka,s3,k8s`` turns each skip for a missing part into a failure. A test needs the parts that its
markers name, and those whose program its reason for skipping names.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = {
    "kafka": "KAFKA_NODE",
    "s3": "S3_NODE",
    "k8s": "K8S_CLUSTER",
    "minio": "MINIO",
    "toxiproxy": "TOXIPROXY",
    "llamacpp": "LLAMA_SERVER",
    "vllm": "NANOVLLM_VLLM_PYTHON",
    "documents": "DOCUMENTS",
}
"""The parts, as the markers of pyproject.toml call them, and the variable that names where each one is."""

SKIPS_FILE = "NANOVLLM_TEST_SKIPS"
"""Variable of the file into which a session writes its skips: the number of each reason, as JSON."""


def required_parts() -> set[str]:
    """The parts that ``REQUIRE_PARTS`` names. Raises UsageError for a name that is none."""
    named = {name.strip() for name in os.environ.get("REQUIRE_PARTS", "").split(",")} - {""}
    if unknown := named - set(PROGRAMS):
        raise pytest.UsageError(f"REQUIRE_PARTS: {sorted(unknown)} are no parts; there are {', '.join(PROGRAMS)}")
    return named


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test was skipped."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def pytest_configure() -> None:
    """Refuse a session that requires what is no part."""
    required_parts()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A report that fails where a required part is missing."""
    report = yield
    if not report.skipped or hasattr(report, "wasxfail"):
        return report
    reason = skip_reason(report)
    for part in sorted(required_parts()):
        if item.get_closest_marker(part) or PROGRAMS[part] in reason:
            report.outcome = "failed"
            report.longrepr = f"REQUIRE_PARTS has {part!r}, and this test would be skipped: {reason}"
            break
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Write the session's skips, where a file for them is named."""
    if file := os.environ.get(SKIPS_FILE):
        reasons = Counter(skip_reason(report) for report in terminalreporter.stats.get("skipped", ()))
        Path(file).write_text(json.dumps(reasons))
