"""Public filings for the tests, with a person's answers and their schemas, read where they lie; none is in here."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm.pipeline.documents.json_spans import leaves

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "documents"
FOLDER = Path(os.environ.get("DOCUMENTS") or _SHARED) / "extract-bench"
FILINGS = sorted(FOLDER.glob("*/*.pdf"))
needs_filings = pytest.mark.skipif(not FILINGS, reason="public filings: no DOCUMENTS and no ../shared/documents")


def answers(filing: Path, min_chars: int) -> Iterator[Any]:
    """A person's leaves of ``min_chars`` and more characters."""
    for _, leaf in leaves(json.loads(filing.with_suffix(".gold.json").read_text())):
        if not isinstance(leaf, bool) and leaf not in (None, [], {}) and len(shown(leaf)) >= min_chars:
            yield leaf


def shown(leaf: Any) -> str:
    """A leaf as it would stand on a page."""
    return leaf if isinstance(leaf, str) else json.dumps(leaf)


def folded(text: str) -> str:
    """``text`` with white space folded."""
    return " ".join(text.split())


def letters_and_digits(text: str) -> str:
    """Finds more than any reasonable search: whatever it misses stands nowhere."""
    return re.sub(r"[\W_]+", "", text.casefold())
