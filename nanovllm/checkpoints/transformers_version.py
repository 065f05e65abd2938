"""Releases of transformers that the model families are tested with."""

from __future__ import annotations

import logging
from functools import cache

import transformers

logger = logging.getLogger(__name__)

OLDEST, NEWEST = "5.17", "5.24"
"""Both ends run the parity tests; pyproject.toml has the first as its bound."""


def untested_version(version: str = transformers.__version__) -> str:
    """What an operator should know about an installed ``version`` outside the tested ones; empty within them."""
    release = tuple(int(part) for part in version.split(".")[:2])
    oldest, newest = (tuple(map(int, bound.split("."))) for bound in (OLDEST, NEWEST))
    if oldest <= release <= newest:
        return ""
    return (
        f"transformers {version} is {'older' if release < oldest else 'newer'} than the releases that this engine is "
        f"tested with ({OLDEST} to {NEWEST}): texts may differ; pip install 'transformers>={OLDEST},<6'"
    )


@cache  # once a process
def warn_untested_version() -> None:
    """Log what ``untested_version`` says of the installed release."""
    if note := untested_version():
        logger.warning(note)
