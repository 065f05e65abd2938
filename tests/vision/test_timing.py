"""Measured times: of CPUs at once, of devices when their work is done, without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.vision import embedding_cache
from nanovllm.vision.embedding_cache import EmbeddingCache, embedding_key
from nanovllm.vision.timing import EventInterval, Interval, Share, TotalTime, begin


@dataclass
class Stream:
    """A device's queue: events are reached in their order, each at a time of the device, when ``work`` says so."""

    queue: list[Event] = field(default_factory=list)

    def work(self, milliseconds: float) -> None:
        self.queue.pop(0).reached = milliseconds


@dataclass(eq=False)
class Event:
    reached: float | None = None

    def record(self, stream: Stream) -> None:
        stream.queue.append(self)

    def query(self) -> bool:
        return self.reached is not None

    def elapsed_time(self, end_event: Event) -> float:
        assert self.reached is not None
        assert end_event.reached is not None, "asked before it was reached: CUDA would raise"
        return end_event.reached - self.reached


def test_an_interval_of_a_device_is_known_when_its_end_is_reached() -> None:
    stream = Stream()
    interval = EventInterval(Event(), Event(), stream)
    stream.work(1000.0)
    assert interval.seconds is None
    interval.end()
    assert interval.seconds is None
    stream.work(1250.0)
    assert interval.seconds == 0.25


def test_an_event_that_was_never_recorded_counts_as_reached_and_ends_nothing() -> None:
    stream = Stream()
    interval = EventInterval(Event(), Event(reached=5.0), stream)
    stream.work(1.0)
    assert interval.seconds is None


def test_a_total_counts_each_time_once_and_when_it_has_passed() -> None:
    stream, total = Stream(), TotalTime()
    intervals = [EventInterval(Event(), Event(), stream) for _ in range(2)]
    for interval in intervals:
        interval.end()
    total.add(intervals[0])
    total.add(Share(intervals[1], 4))
    clock = begin("cpu")
    clock.end()
    total.add(clock)
    assert total.seconds == clock.seconds
    for moment in (0.0, 0.0, 500.0, 1000.0):
        stream.work(moment)
    assert total.seconds == pytest.approx(0.5 + 0.25, abs=1e-3)
    assert total.seconds == total.seconds


def test_the_clock_of_a_cpu_ends_at_once() -> None:
    interval = begin(torch.device("cpu"))
    assert interval.seconds is None
    interval.end()
    assert interval.seconds is not None
    assert interval.seconds >= 0


def test_what_hits_save_is_counted_when_the_device_has_computed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()

    def begin_on_stream(_: Any) -> Interval:
        return EventInterval(Event(), Event(), stream)

    monkeypatch.setattr(embedding_cache, "begin", begin_on_stream)
    cache = EmbeddingCache[None](1 << 20)
    keys = [embedding_key(bytes([number]), "encoder") for number in range(2)]

    def compute(indices: list[int]) -> list[Tensor]:
        return [torch.ones(4) for _ in indices]

    cache.get_or_compute(keys, compute)
    cache.get_or_compute([keys[0], *keys], compute)
    assert cache.stats().seconds_saved == 0
    stream.work(0.0)
    stream.work(400.0)
    assert cache.stats().seconds_saved == pytest.approx(3 * 0.2)
    cache.get_or_compute(keys[:1], compute)
    assert cache.stats().seconds_saved == pytest.approx(4 * 0.2)
