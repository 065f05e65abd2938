"""The scheduler of an engine: its blocks, tables and limits are those of the model runner."""

from __future__ import annotations

from dataclasses import asdict

from nanovllm.engine.config import EngineConfig
from nanovllm.engine.execution.model_runner import ModelRunner
from nanovllm.engine.scheduling.block_manager import BlockManager
from nanovllm.engine.scheduling.block_tables import BlockTables
from nanovllm.engine.scheduling.scheduler import Scheduler


def make_scheduler(config: EngineConfig, runner: ModelRunner) -> Scheduler:
    """A scheduler of ``runner``'s blocks, with tables as wide as its longest sequence."""
    block_size, has_states = runner.attention.block_size, runner.model.has_states
    return Scheduler(
        BlockManager(
            runner.num_blocks, block_size, enable_prefix_caching=config.enable_prefix_caching and not has_states
        ),
        tables=BlockTables(
            runner.limits.max_num_seqs,
            -(-runner.max_model_len // block_size),
            unused=runner.num_blocks if runner.graphs is not None else 0,  # the graphs' spare block
        ),
        **asdict(runner.limits),
        num_speculative_tokens=0 if has_states else config.num_speculative_tokens,
    )
