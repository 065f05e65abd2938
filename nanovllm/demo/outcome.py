"""Outcome of a demo run: the answers against the truth, the caches, the latencies, the verdict."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from nanovllm.demo.document_outcome import MIN_EXACT_SHARE, DocumentOutcome, DocumentSummary
from nanovllm.demo.jobs import BROKEN_JOB_ID, DemoJob, DemoSet
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.result import Result
from nanovllm.sinks.jsonl import JsonLinesSink

STAGES = ("admit", "fetch", "prepare", "queue", "encode", "prefill", "generate")
"""The stages of one job in the order of time. ``prefill`` is what is left of the time to the first token."""


@dataclass(frozen=True)
class Summary:
    """The jobs' part of ``summary.json``: jobs that have an answer, images named by those, wall-clock seconds."""

    jobs: int
    answered: int
    exact: int
    images: int
    distinct_images: int
    encoder_runs: int
    cache_hits: int
    dead_letters: int
    seconds: float


@dataclass(frozen=True)
class StageLatency:
    """Median and 95th percentile over the answered jobs, in milliseconds."""

    stage: str
    p50_ms: float
    p95_ms: float


@dataclass(frozen=True)
class Outcome:
    """One run.

    ``results`` by job_id; ``dead_letters`` are those of jobs; ``worker_exit`` is None while the worker is left
    running, ``documents`` in a run without them. ``idle_s``: seconds in which the engine computed no text, by reason.
    """

    demo: DemoSet
    results: Mapping[str, Result]
    dead_letters: Sequence[DeadLetter]
    seconds: float
    worker_exit: int | None
    documents: DocumentOutcome | None = None
    idle_s: Mapping[str, float] = field(default_factory=dict)

    def is_exact(self, job: DemoJob) -> bool:
        """Whether the job's text is the truth, character by character."""
        return job.job_id in self.results and self.results[job.job_id].text == job.truth

    @cached_property
    def cache_outcomes(self) -> Counter[str]:
        """How many images of the answered jobs were a ``miss``, a ``hit``, ``joined`` to another job, or ``prefix``."""
        return Counter(use.cache for result in self.results.values() for use in result.inputs)

    @cached_property
    def summary(self) -> Summary:
        """The figures in short."""
        outcomes = self.cache_outcomes
        return Summary(
            jobs=len(self.demo.jobs),
            answered=sum(job.job_id in self.results for job in self.demo.jobs),
            exact=sum(self.is_exact(job) for job in self.demo.jobs),
            images=outcomes.total(),
            distinct_images=self.demo.distinct_images,
            encoder_runs=outcomes["miss"],
            cache_hits=outcomes.total() - outcomes["miss"],
            dead_letters=len(self.dead_letters),
            seconds=round(self.seconds, 2),
        )

    @cached_property
    def latencies(self) -> tuple[StageLatency, ...]:
        """Each stage, then ``total``."""
        spent = [stage_times(result) | {"total": result.timings_ms.total} for result in self.results.values()]
        return tuple(
            StageLatency(stage, percentile(times, 50), percentile(times, 95))
            for stage in (*STAGES, "total")
            if (times := [job[stage] for job in spent])
        )

    @cached_property
    def complaints(self) -> tuple[str, ...]:
        """What keeps this run from being a success, in sentences; empty for a success."""
        summary = self.summary
        found = []
        if summary.answered < summary.jobs:
            found.append(f"{summary.jobs - summary.answered} of {summary.jobs} jobs have no result")
        if summary.exact < MIN_EXACT_SHARE * summary.jobs:
            found.append(f"only {summary.exact} of {summary.jobs} texts are exactly right; 90% are expected")
        if summary.cache_hits == 0:
            found.append("no repeated image was answered from the embedding cache")
        broken = [letter for letter in self.dead_letters if letter.job_id == BROKEN_JOB_ID]
        if [letter.code for letter in broken] != ["invalid_image"]:
            found.append("the broken image is not in the dead letters as invalid_image")
        if [letter.code for letter in self.dead_letters if letter not in broken] != ["invalid_job"]:
            found.append("the malformed message is not the one other dead letter, as invalid_job")
        if self.worker_exit not in (0, None):
            found.append(f"the worker ended with exit code {self.worker_exit}")
        if self.documents is not None:
            found += self.documents.complaints
        return tuple(found)

    def write(self, directory: Path) -> None:
        """Write ``summary.json``, ``results.jsonl``, ``dead-letters.jsonl`` and, with documents, ``records.jsonl``."""
        documents = DocumentSummary() if self.documents is None else self.documents.summary
        (directory / "summary.json").write_text(json.dumps(asdict(self.summary) | asdict(documents), indent=2) + "\n")
        with JsonLinesSink(directory / "results.jsonl") as results:
            for result in self.results.values():
                results.write(result)
        with JsonLinesSink(directory / "dead-letters.jsonl") as dead_letters:
            for letter in self.dead_letters:
                dead_letters.write(letter)
        if self.documents is not None:
            with JsonLinesSink(directory / "records.jsonl") as records:
                for record in self.documents.records.values():
                    records.write(record)


def stage_times(result: Result) -> dict[str, float]:
    """Milliseconds of one job in each of ``STAGES``."""
    spent = result.timings_ms
    return {
        "admit": spent.admit,
        "fetch": spent.fetch,
        "prepare": spent.prepare,
        "queue": spent.queue,
        "encode": spent.encode,
        "prefill": max(0.0, spent.time_to_first_token - spent.queue - spent.encode),
        "generate": spent.generation,
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of the (non-empty) ``values`` do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
