"""Which step of the engine writes what: schedule to queues and block tables, forward to no sequence at all."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Set
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_llava
from engine_parts import drain, greedy, noise_image

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.sampling.structured_output import Matcher
from nanovllm.engine.scheduling.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

SCHEDULED = {"block_table", "seat", "status", "num_computed_tokens", "num_cached_tokens", "_block_hashes", "images"}
"""The fields of a sequence that ``Scheduler.schedule`` documents; of ``images`` a preemption drops the embeddings."""

PLAIN = (int, float, str, bytes, type(None), Enum)


def snapshot(value: Any, seen: frozenset[int] = frozenset()) -> Any:
    """All that can be reached from ``value``, copied; what repeats inside itself, by its identity."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Matcher):
        return id(value)  # its time account falls while masks are computed in another thread
    if id(value) in seen:
        return id(value)
    seen |= {id(value)}
    if isinstance(value, torch.Tensor | np.ndarray):
        return id(value), value.tolist()
    if isinstance(value, Mapping):
        pairs = [(snapshot(key, seen), snapshot(part, seen)) for key, part in value.items()]
        return pairs if isinstance(value, OrderedDict) else sorted(pairs, key=repr)
    if isinstance(value, Set):
        return sorted((snapshot(part, seen) for part in value), key=repr)
    if isinstance(value, list | tuple):
        return [snapshot(part, seen) for part in value]
    if type(value).__module__.startswith("nanovllm"):
        return id(value), {name: snapshot(part, seen) for name, part in vars(value).items()}
    return id(value)


def fields(engine: LLMEngine) -> dict[int, dict[str, Any]]:
    """A snapshot of every field of every sequence."""
    queued: list[Sequence] = [*engine.scheduler.running, *engine.scheduler.waiting]
    return {id(one): {name: snapshot(part) for name, part in vars(one).items()} for one in queued}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"), patch=32, size=64)


@pytest.fixture
def busy(llava: Path) -> LLMEngine:
    """An engine with requests of every kind, and fewer blocks than they need at once."""
    engine = LLMEngine(
        str(llava), kv_cache_bytes=48 << 10, max_num_batched_tokens=12, max_num_seqs=4, embedding_cache_bytes=1 << 20
    )
    every = "the total the total the total"
    engine.add_request(every, greedy(24))
    engine.add_request(every, greedy(8, prompt_logprobs=1, logprobs=2))
    engine.add_request(f"{every} <|image|> and <|image|>", greedy(12), images=[noise_image(1), noise_image(2)])
    engine.add_request(every, SamplingParams(temperature=0.9, seed=3, n=2, max_tokens=16, ignore_eos=True))
    engine.add_request(every, SamplingParams(regex="(ab )*", temperature=0.0, max_tokens=10))
    return engine


def test_forward_changes_no_sequence_no_block_and_no_queue(busy: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, kinds = busy.model_runner.forward, set()

    def watched(inputs: Any) -> Any:
        before = snapshot(busy.scheduler)
        result = forward(inputs)
        assert snapshot(busy.scheduler) == before
        kinds.add((bool(result.prompt_logprobs), any(row.drafts for row in inputs.rows)))
        return result

    monkeypatch.setattr(busy.model_runner, "forward", watched)
    drain(busy)

    assert {kind[0] for kind in kinds} == {kind[1] for kind in kinds} == {True, False}


def test_schedule_changes_queues_block_tables_and_where_computing_begins(
    busy: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule, changed = busy.scheduler.schedule, set()

    def watched() -> Any:
        before = fields(busy)
        scheduled = schedule()
        after = fields(busy)
        assert set(before) == set(after), "a sequence came or went"
        chosen = {id(row.sequence) for row in scheduled.rows}
        for one, names in before.items():
            differing = {name for name, value in names.items() if after[one][name] != value}
            assert differing <= SCHEDULED
            is_preempted = after[one]["status"] is not names["status"] and one not in chosen
            assert one in chosen or is_preempted or differing <= {"_block_hashes"}
            assert "images" not in differing or is_preempted
            changed.update(differing)
        return scheduled

    monkeypatch.setattr(busy.scheduler, "schedule", watched)
    drain(busy)

    assert busy.scheduler.num_preemptions > 0
    assert {"block_table", "status", "num_computed_tokens", "num_cached_tokens"} <= changed
