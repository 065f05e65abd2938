"""Statistics of vLLM's engine, as its own loggers of statistics get them."""

from __future__ import annotations

from typing import Any

from nanovllm.statistics import EngineStats


class Tally:
    """A logger of vLLM's statistics (its ``StatLoggerBase``): the last snapshot, and counts since the start."""

    def __init__(self) -> None:
        self.running = self.waiting = self.preemptions = self.steps = 0
        self.kv_cache_usage = 0.0
        self.queries = self.hits = 0
        self.prompt_tokens = self.generation_tokens = 0

    def factory(self, config: object, index: int = 0) -> Tally:
        """This object, for vLLM."""
        return self

    def record(
        self,
        scheduler_stats: Any | None,
        iteration_stats: Any | None,
        mm_cache_stats: Any | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Take the statistics of one step; any may be missing."""
        if scheduler_stats is not None:
            self.running, self.waiting = scheduler_stats.num_running_reqs, scheduler_stats.num_waiting_reqs
            self.kv_cache_usage = scheduler_stats.kv_cache_usage
            self.queries += scheduler_stats.prefix_cache_stats.queries
            self.hits += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            self.steps += 1
            self.prompt_tokens += iteration_stats.num_prompt_tokens
            self.generation_tokens += iteration_stats.num_generation_tokens
            self.preemptions += iteration_stats.num_preempted_reqs

    def snapshot(self, unfinished: int) -> EngineStats:
        """The statistics; of ``unfinished`` requests those that vLLM does not run are waiting."""
        running = min(self.running, unfinished)
        return EngineStats(
            num_requests_running=running,
            num_requests_waiting=unfinished - running,
            kv_cache_usage=self.kv_cache_usage,
            num_preemptions=self.preemptions,
            steps=self.steps,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            prefix_cache_queries=self.queries,
            prefix_cache_hits=self.hits,
        )

    def log_engine_initialized(self) -> None:
        """Nothing to say."""

    def log(self) -> None:
        """Nothing to say: the worker's metrics tell it."""

    def record_sleep_state(self, *_: Any, **__: Any) -> None:
        """It never sleeps."""
