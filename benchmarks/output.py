"""The option that says where a benchmark writes its figures."""

from __future__ import annotations

import argparse
from pathlib import Path

DIRECTORY = Path("build/benchmarks")
"""From the working directory. Git ignores it: a run changes no published figure."""


def add_output(parser: argparse.ArgumentParser, name: str) -> None:
    """Add ``--output``, by default ``build/benchmarks/NAME``; a name with braces is completed by the caller."""
    parser.add_argument(
        "--output",
        type=Path,
        default=DIRECTORY / name,
        help=f"default: {DIRECTORY / name}; benchmarks/results/… publishes the figures",
    )


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, in a folder that need not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
