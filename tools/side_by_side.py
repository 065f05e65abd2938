"""The tests in two processes at once: half of their time is waiting for brokers, stores and processes.

``python tools/side_by_side.py -m "not proof"`` passes its arguments to both, and ends with the worse exit code. The
first one's output comes as it is made, the other's when it has ended; the last line counts what was skipped, and why.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

WORKER = ("tests/pipeline", "tests/chaos", "tests/sinks", "tests/helm")
NO_TESTS = 5
"""Exit code of pytest where none was chosen."""


def main(options: Sequence[str]) -> int:
    pytest = [sys.executable, "-m", "pytest", *options]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryDirectory() as folder:
        skips = [Path(folder) / name for name in ("worker.json", "others.json")]
        environments = [{**os.environ, "NANOVLLM_TEST_SKIPS": str(file)} for file in skips]
        others = subprocess.Popen(
            [*pytest, "tests", *(f"--ignore={room}" for room in WORKER)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environments[1],
        )
        codes = [subprocess.run([*pytest, *WORKER], check=False, env=environments[0]).returncode, others.wait()]
        output.seek(0)
        print(output.read(), flush=True)
        reasons: Counter[str] = Counter()
        for file in skips:
            reasons.update(json.loads(file.read_text()) if file.exists() else {})
        print(skip_line(reasons), flush=True)
    return NO_TESTS if set(codes) == {NO_TESTS} else max(0 if code == NO_TESTS else code for code in codes)


def skip_line(reasons: Mapping[str, int]) -> str:
    """The line that counts the skipped tests by their reason, the most frequent first."""
    if not reasons:
        return "skipped: none"
    parts = [f"{count} ({reason})" for reason, count in sorted(reasons.items(), key=lambda one: (-one[1], one[0]))]
    return f"skipped: {sum(reasons.values())} tests: {'; '.join(parts)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
