"""Engines that several modules of this folder ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm.engine.llm_engine import LLMEngine
from tests.checkpoints import make_qwen3


@pytest.fixture(scope="package")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen3."""
    return make_qwen3(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def engine(text: Path) -> Iterator[LLMEngine]:
    """An engine of that."""
    with LLMEngine(str(text), kv_cache_bytes=4 << 20) as engine:
        yield engine
