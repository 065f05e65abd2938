"""The host's part of a decode step of the engine against its rows: everything but the forward pass."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.growth.tree import Row, find, once, rows_of


def measure(is_tiny: bool) -> list[Row]:
    """Of the shipped checkpoint, greedy, with drafts and without."""
    return rows_of(lambda rows: _step(rows, 2 if is_tiny else 30), "rows", (1, 4) if is_tiny else (1, 8, 64, 256))


def _step(rows: int, steps: int) -> dict[tuple[str, str], float]:
    from nanovllm import SamplingParams

    LLMEngine = find("engine.llm_engine:LLMEngine")
    found = {}
    for title, drafts in (("a step without its forward pass", 0), ("the same with drafts", 8)):
        with LLMEngine(
            "tiny-receipts",
            enable_multimodal=False,
            max_num_seqs=rows,
            num_speculative_tokens=drafts,
            kv_cache_bytes=1 << 28,
        ) as engine:
            for row in range(rows):
                params = SamplingParams(temperature=0.0, max_tokens=steps + 40, ignore_eos=True)
                engine.add_request([5 + (row + place) % 50 for place in range(24)], params)
            while engine.scheduler.waiting:  # the engine itself computes the prompts
                engine.step()
            replay(engine, torch.randn(rows * 17, engine.model_runner.model.config.vocab_size))
            engine.step()
            found[title, "ms"] = 1e3 * once(lambda own=engine: [own.step() for _ in range(steps)]) / steps  # type: ignore[misc]
    return found


def replay(engine: Any, logits: torch.Tensor) -> None:
    """Let the forward pass return rows of ready ``logits``."""
    try:
        StepResult = find("engine.execution.step_inputs:StepResult")
    except LookupError:
        engine.model_runner.forward = lambda inputs: logits[: len(inputs.sampling)].clone()
        return
    engine.model_runner.forward = lambda inputs: StepResult(logits[: len(inputs.sampled_sequences)].clone(), ())
