"""Sampling parameters of jobs: what equal jobs ask for is validated once."""

from __future__ import annotations

from typing import Any

from nanovllm.messages.job import Job
from nanovllm.sampling_params import SamplingParams

_MOST_KNOWN = 256
_SCALARS = (str, int, float, bool, type(None))


class JobSampling:
    """Resolves jobs' sampling over ``defaults``; ``max_tokens`` is the largest number that a job may ask for."""

    def __init__(self, defaults: SamplingParams, max_tokens: int) -> None:
        self.defaults = defaults
        self._max_tokens = max_tokens
        self._known: dict[tuple[Any, ...], SamplingParams] = {}

    def of(self, job: Job) -> SamplingParams:
        """As ``job.sampling_params``, and raises what it raises."""
        # With types: True and 1.0 equal 1, and are not valid wherever it is.
        asked = tuple((name, type(value), value) for name, value in job.sampling.items())
        if any(kind not in _SCALARS for _, kind, _ in asked):
            return job.sampling_params(self.defaults, self._max_tokens)
        known = self._known.get(asked)
        if known is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            known = self._known[asked] = job.sampling_params(self.defaults, self._max_tokens)
        if job.sampling.get("seed", self.defaults.seed) is None:
            return known.with_seed(job.seed)
        return known
