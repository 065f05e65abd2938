"""What each of the engine's features is worth: decoding without one of them at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from gpu_parts.bench import Bench, Finding, guarded
from gpu_parts.speed import decode_options, decode_rate
from nanovllm import LLM
from nanovllm.engine.sampling.kernel_selection import SamplingKernels


@dataclass(frozen=True)
class Switch:
    """Options of the engine, or a name of its code with what stands in for it; and how tokens are sampled."""

    options: dict[str, Any] = field(default_factory=dict)
    replaced: tuple[str, Any] | None = None
    sampling: dict[str, float] = field(default_factory=dict)


ENGINE = "nanovllm.engine"
DRAWN = {"temperature": 0.8, "top_p": 0.9}
SWITCHES = {
    "with all": Switch(),
    "without graphs": Switch({"enforce_eager": True}),
    "without overlap": Switch(replaced=(f"{ENGINE}.llm_engine.is_asynchronous", lambda _: False)),
    "without fused layers": Switch(replaced=(f"{ENGINE}.layers.fused.serves", lambda _: False)),
    "on copied pages": Switch(replaced=(f"{ENGINE}.attention.selection.CANDIDATES", {})),
    "drawn": Switch(sampling=DRAWN),
    "drawn by torch": Switch(
        replaced=(f"{ENGINE}.execution.model_runner.choose_kernels", lambda *_: SamplingKernels(reason="switched off")),
        sampling=DRAWN,
    ),
}


def measure(bench: Bench) -> Iterator[Finding]:
    """Tokens a second at the smallest and the largest batch."""
    batches = (bench.scale.batches[0], bench.scale.batches[-1])
    for name, switch in SWITCHES.items():

        def ask(engine: LLM, switch: Switch = switch) -> dict[str, float]:
            return {str(batch): decode_rate(bench, engine, batch, **switch.sampling) for batch in batches}

        def rates(ask: Any = ask, name: str = name, switch: Switch = switch) -> Finding:
            with ExitStack() as stack:
                if switch.replaced is not None:
                    stack.enter_context(patch(*switch.replaced))
                return {name: bench.ask(ask, **{**decode_options(bench), **switch.options})}

        found = guarded(f"decode {name}", rates)
        if name in found:
            print(f"decode {name}: " + ", ".join(f"{rate:,.0f}/s at {batch}" for batch, rate in found[name].items()))
        yield found
