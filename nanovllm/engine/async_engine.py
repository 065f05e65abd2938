"""The guide's path to the engine of one process; the code is in `nanovllm.engine.backends.native`."""

from nanovllm.engine.backends.native import AsyncEngine

__all__ = ["AsyncEngine"]
