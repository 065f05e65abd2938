"""Public filings for the tests, read where they lie; none of them is in the repository."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(os.environ.get("DOCUMENTS") or Path(__file__).resolve().parents[2] / "shared" / "documents")


def filings() -> list[Any]:
    """Every filing as a parameter; without them one that is skipped, with the reason."""
    found = sorted((FOLDER / "extract-bench").glob("*/*.pdf"))
    missing = pytest.mark.skip(reason="no filings: neither DOCUMENTS nor ../shared/documents is there")
    return found or [pytest.param(Path("missing"), marks=missing)]
