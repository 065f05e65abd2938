"""Measures the topics named on stdin in the nanovllm that this process imports; a JSON line of rows for each."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from importlib import import_module


def main() -> None:
    """Answer until stdin ends; what libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    is_tiny = "--tiny" in sys.argv
    for line in sys.stdin:
        topic = import_module(f"benchmarks.growth.{line.strip()}")
        print(json.dumps([asdict(row) for row in topic.measure(is_tiny)]), file=replies)


if __name__ == "__main__":
    main()
