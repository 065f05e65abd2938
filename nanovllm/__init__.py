"""nanovllm: image and prompt jobs in, text out.

The names below are imported when they are first used: producing jobs and reading results needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nanovllm.start_phases import START, Phase

if TYPE_CHECKING:
    from nanovllm.client.producer import JobProducer
    from nanovllm.client.results import ResultReader
    from nanovllm.engine.llm_engine import LLMEngine as LLM  # noqa: N814
    from nanovllm.engine.multimodal_llm_engine import MultiModalLLM
    from nanovllm.messages.dead_letter import DeadLetter
    from nanovllm.messages.job import Job
    from nanovllm.messages.result import Result
    from nanovllm.sampling_params import SamplingParams

__all__ = ["LLM", "DeadLetter", "Job", "JobProducer", "MultiModalLLM", "Result", "ResultReader", "SamplingParams"]

_HOMES = {
    "LLM": ("nanovllm.engine.llm_engine", "LLMEngine"),
    "MultiModalLLM": ("nanovllm.engine.multimodal_llm_engine", "MultiModalLLM"),
    "SamplingParams": ("nanovllm.sampling_params", "SamplingParams"),
    "JobProducer": ("nanovllm.client.producer", "JobProducer"),
    "ResultReader": ("nanovllm.client.results", "ResultReader"),
    "Job": ("nanovllm.messages.job", "Job"),
    "Result": ("nanovllm.messages.result", "Result"),
    "DeadLetter": ("nanovllm.messages.dead_letter", "DeadLetter"),
}


def __getattr__(name: str) -> Any:
    """Import the public name ``name`` from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'nanovllm' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    with START.timed(Phase.IMPORTS):
        value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The module's names, the lazy ones among them."""
    return sorted({*globals(), *__all__})
