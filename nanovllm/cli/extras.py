"""Extras of the installation that commands need."""

from __future__ import annotations

import importlib.util

from nanovllm.errors import ConfigurationError


def require(extra: str, *modules: str) -> None:
    """Raise ConfigurationError, which names ``extra``, where one of ``modules`` is not installed."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigurationError(f"this command needs {', '.join(missing)}: pip install '.[{extra}]' in a clone")
