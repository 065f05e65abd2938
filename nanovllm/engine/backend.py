"""The guide's path to the interface of engines; the code is in `nanovllm.engine.backends.base`."""

from nanovllm.engine.backends.base import EngineBackend, Generation, Request

__all__ = ["EngineBackend", "Generation", "Request"]
