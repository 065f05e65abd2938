"""The tests in two processes at once: half of their time is waiting for brokers, stores and processes.

``python tools/side_by_side.py -m "not proof"`` passes its arguments to both, and ends with the worse exit code. The
first one's output comes as it is made, the other's when it has ended.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence

WORKER = ("tests/pipeline", "tests/chaos", "tests/sinks", "tests/helm")
NO_TESTS = 5
"""Exit code of pytest where none was chosen."""


def main(options: Sequence[str]) -> int:
    pytest = [sys.executable, "-m", "pytest", *options]
    with tempfile.TemporaryFile("w+") as output:
        others = subprocess.Popen(
            [*pytest, "tests", *(f"--ignore={room}" for room in WORKER)], stdout=output, stderr=subprocess.STDOUT
        )
        codes = [subprocess.run([*pytest, *WORKER], check=False).returncode, others.wait()]
        output.seek(0)
        print(output.read(), flush=True)
    return NO_TESTS if set(codes) == {NO_TESTS} else max(0 if code == NO_TESTS else code for code in codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
