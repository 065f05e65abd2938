"""Steps that are launched before the tokens of the step before are read: the same answers, and nothing waits early.

``asynchronous`` makes a CPU pass for a device that computes behind the host: in lock step, so that every order of
launches and reads is the one that the engine chose.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tape
import torch
from engine_parts import drain, greedy, random_prompt, step
from torch import Tensor

from nanovllm.engine import kernels, llm_engine
from nanovllm.engine.backends.base import Request
from nanovllm.engine.backends.native import AsyncEngine
from nanovllm.engine.execution import launched_step, model_runner
from nanovllm.engine.execution.launched_step import LaunchedStep
from nanovllm.engine.layers.device_copy import HostCopy, is_asynchronous
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.outputs import RequestOutput
from nanovllm.engine.scheduling.batch import ScheduledBatch
from nanovllm.engine.scheduling.scheduler import Scheduler
from nanovllm.errors import EngineDead
from nanovllm.sampling_params import SamplingParams

CPU = torch.device("cpu")
BLOCK_BYTES = 16384


@dataclass
class Trace:
    """What the host did: ``launch`` and ``read`` in their order, and the tokens that each launch computed."""

    events: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    num_overlapped: int = 0  # steps that were launched behind another one whose tokens were not known


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Trace:
    found = Trace()
    sample, read, schedule_behind = launched_step.sample, LaunchedStep.read, Scheduler.schedule_behind

    def launched(inputs: Any, *args: Any) -> LaunchedStep:
        found.events.append("launch")
        found.tokens.append(sum(row.num_tokens for row in inputs.rows))
        return sample(inputs, *args)

    def reads(self: LaunchedStep, *args: Any) -> Any:
        found.events.append("read")
        return read(self, *args)

    def scheduled(self: Scheduler, rows: Any) -> ScheduledBatch:
        batch = schedule_behind(self, rows)
        found.num_overlapped += bool(batch.rows)
        return batch

    monkeypatch.setattr(launched_step, "sample", launched)
    monkeypatch.setattr(Scheduler, "schedule_behind", scheduled)
    monkeypatch.setattr(LaunchedStep, "read", reads)
    return found


@pytest.fixture
def asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_engine, "is_asynchronous", lambda _: True)


def answer(directory: Path, *requests: tuple[Any, SamplingParams], **options: Any) -> list[RequestOutput]:
    """The outputs of requests that were added together, in their order; every step is audited."""
    with LLMEngine(str(directory), **{"kv_cache_bytes": 4 << 20, **options}) as engine:
        for number, (prompt, params) in enumerate(requests):
            engine.add_request(prompt, params, request_id=str(number))
        outputs = drain(engine)
        return [outputs[str(number)] for number in range(len(requests))]


def waits_for_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on engines read the tokens of a step before they launch the next one."""
    monkeypatch.setattr(llm_engine, "is_asynchronous", lambda _: False)


def seen(outputs: list[RequestOutput]) -> Any:
    """All of them but times."""
    return [(one.usage, one.outputs, one.prompt_logprobs) for one in outputs]


MIXED = [
    ("hello world", greedy(20, logprobs=2)),
    (random_prompt(1, 30), SamplingParams(temperature=0.9, top_p=0.9, seed=3, n=3, max_tokens=24, ignore_eos=True)),
    (random_prompt(2, 9), SamplingParams(temperature=2.0, seed=9, max_tokens=40, min_tokens=7, stop=["e"])),
    ("hello world", SamplingParams(temperature=1.0, top_k=5, min_p=0.01, seed=5, max_tokens=30, logprobs=1)),
    (random_prompt(3, 14), greedy(1)),
    (random_prompt(4, 3), greedy(16, logit_bias={67: 20.0}, bad_words=["a"], loop_tokens=8)),
]
"""Requests whose steps may all be overlapped: chunks of prompts beside decoding rows, ends of every kind."""


def test_only_a_device_that_computes_behind_the_host_is_overlapped(text: Path, trace: Trace) -> None:
    assert not is_asynchronous(CPU)
    assert is_asynchronous(torch.device("cuda", 1))
    answer(text, *MIXED)
    assert trace.num_overlapped == 0


@pytest.mark.parametrize("drafts", [0, 8])
@pytest.mark.parametrize("recorded", [False, True])
def test_overlapped_steps_answer_as_others_do(
    text: Path, drafts: int, recorded: bool, asynchronous: None, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    if recorded:
        monkeypatch.setattr(model_runner, "choose_recorder", lambda _: tape.record)
        monkeypatch.setattr(kernels, "missing", lambda: "a GPU has none")
    options = {"num_speculative_tokens": drafts, "max_num_batched_tokens": 13, "max_num_seqs": 8}
    overlapped = answer(text, *MIXED, **options)
    assert trace.num_overlapped > len(trace.tokens) // 2
    assert trace.events[:5] == ["launch", "launch", "read", "launch", "read"]
    waits_for_tokens(monkeypatch)
    assert seen(overlapped) == seen(answer(text, *MIXED, **options))


def test_no_row_is_computed_behind_a_length_that_was_known_before(
    text: Path, asynchronous: None, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [(random_prompt(number, 5), greedy(3 + 4 * number)) for number in range(4)]
    options = {"num_speculative_tokens": 0, "max_model_len": 40}
    overlapped = answer(text, *requests, ("hello", greedy(1000)), **options)
    assert overlapped[-1].finish_reason == "length"
    assert sum(overlapped[-1].usage[name] for name in ("input_tokens", "output_tokens")) == 40
    computed = sum(trace.tokens)
    assert trace.num_overlapped > 0
    waits_for_tokens(monkeypatch)
    trace.tokens.clear()
    answer(text, *requests, ("hello", greedy(1000)), **options)
    assert computed == sum(trace.tokens)


def test_an_end_that_the_host_could_not_know_costs_one_token_that_is_thrown_away(
    text: Path, asynchronous: None, trace: Trace
) -> None:
    with LLMEngine(str(text), kv_cache_bytes=4 << 20, num_speculative_tokens=0) as engine:
        whole = engine.generate("hello", greedy(32), use_tqdm=False)[0]
        token = whole.token_ids[9]
        end = whole.token_ids.index(token) + 1
        before, steps = sum(trace.tokens), engine.stats().steps
        output = engine.generate("hello", greedy(32, stop_token_ids=(token,)), use_tqdm=False)[0]
        assert (output.token_ids, output.finish_reason) == (whole.token_ids[:end], "stop")
        assert output.usage.output_tokens == end
        assert sum(trace.tokens) - before == output.usage.input_tokens + end  # the last one's is thrown away
        stats = engine.stats()
        assert (stats.steps - steps, stats.generation_tokens, stats.kv_cache_usage) == (end, 32 + end, 0.0)
        assert not engine.has_unfinished()
        assert engine.step() == []
        # What the thrown away row wrote is in no block that can be found.
        assert engine.generate("hello", greedy(32), use_tqdm=False)[0].token_ids == whole.token_ids
        engine.audit()


@pytest.mark.parametrize(
    "options",
    [
        {"regex": "[a-z ]+"},
        {"repetition_penalty": 1.2},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"bad_words": ["hello world"]},
        {"prompt_logprobs": 1, "max_tokens": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_needs_the_tokens_on_the_host_waits_for_them(
    text: Path, options: dict[str, Any], asynchronous: None, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = SamplingParams(**{"temperature": 0.0, "max_tokens": 9, "ignore_eos": True, **options})
    engine_options = {"max_num_batched_tokens": 16, "num_speculative_tokens": 0, "forced_tokens": False}
    overlapped = answer(text, (random_prompt(1, 20), own), **engine_options)
    # Chunks of the prompt before its last one have no token that anything could need.
    chunks = -(-overlapped[0].usage.input_tokens // 16)
    assert chunks > 1
    assert trace.num_overlapped == (0 if "prompt_logprobs" in options else chunks - 1)
    waits_for_tokens(monkeypatch)
    assert seen(overlapped) == seen(answer(text, (random_prompt(1, 20), own), **engine_options))


def test_drafts_behind_a_token_that_is_not_known_are_accepted(
    text: Path, asynchronous: None, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ([7] * 36, greedy(64, logit_bias={7: 60.0}))  # the model repeats itself
    with LLMEngine(str(text), kv_cache_bytes=4 << 20) as engine:
        overlapped = engine.generate(*request, use_tqdm=False)[0]
        stats = engine.stats()
        assert stats.spec_decode_accepted_tokens > 40
        assert stats.steps < 20
    assert trace.num_overlapped > 0
    waits_for_tokens(monkeypatch)
    assert overlapped.token_ids == answer(text, request)[0].token_ids


def test_nothing_is_preempted_while_an_end_may_free_what_is_missing(
    text: Path, asynchronous: None, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [(random_prompt(number, 12), greedy(40)) for number in range(6)]
    with LLMEngine(str(text), kv_cache_bytes=14 * BLOCK_BYTES, deterministic=True) as engine:
        schedule_behind = engine.scheduler.schedule_behind

        def watched(rows: Any) -> Any:
            preemptions = engine.scheduler.num_preemptions
            scheduled = schedule_behind(rows)
            assert engine.scheduler.num_preemptions == preemptions
            return scheduled

        monkeypatch.setattr(engine.scheduler, "schedule_behind", watched)
        for number, (prompt, params) in enumerate(requests):
            engine.add_request(prompt, params, request_id=str(number))
        outputs = drain(engine)
        assert engine.scheduler.num_preemptions > 0
    assert trace.num_overlapped > 0
    waits_for_tokens(monkeypatch)
    expected = answer(text, *requests, deterministic=True)
    assert [outputs[str(number)].token_ids for number in range(6)] == [output.token_ids for output in expected]


def test_an_abort_between_launch_and_commit_keeps_what_was_read(text: Path, asynchronous: None) -> None:
    with LLMEngine(str(text), kv_cache_bytes=4 << 20, num_speculative_tokens=0) as engine:
        whole = engine.generate(["hello", "world"], greedy(20), use_tqdm=False)
        for name in ("hello", "world"):
            engine.add_request(name, greedy(20), request_id=name)
        outputs: dict[str, RequestOutput] = {}
        for _ in range(4):
            step(engine, outputs)
        engine.abort("hello")
        engine.add_request("world", greedy(20), request_id="hello")  # in the blocks that the aborted one had
        again: dict[str, RequestOutput] = {}
        for one in engine.step():
            if one.finished is not None:
                again[one.request_id] = one.finished
        assert again["hello"].token_ids == whole[0].token_ids[:4]
        assert again["hello"].finish_reason == "abort"
        outputs = drain(engine)
        assert {output.token_ids for output in outputs.values()} == {whole[1].token_ids}


def test_a_step_over_which_all_requests_are_aborted_is_forgotten(text: Path, asynchronous: None) -> None:
    with LLMEngine(str(text), kv_cache_bytes=4 << 20) as engine:
        engine.add_request("hello", greedy(20), request_id="a")
        engine.step()
        engine.abort("a")
        assert engine.has_unfinished()
        (output,) = engine.step()
        assert output.finished is not None
        assert len(output.finished.token_ids) == 1
        assert not engine.has_unfinished()
        assert engine.stats().steps == 1
        engine.audit()


def test_an_interrupted_read_loses_no_token_of_other_requests(
    text: Path, asynchronous: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = answer(text, ("hello", greedy(12)))
    with LLMEngine(str(text), kv_cache_bytes=4 << 20) as engine:
        engine.add_request("hello", greedy(12), request_id="mine")
        engine.step()
        wait = HostCopy.wait

        def interrupted(_: HostCopy) -> list[Tensor]:
            monkeypatch.setattr(HostCopy, "wait", wait)
            raise KeyboardInterrupt

        monkeypatch.setattr(HostCopy, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate("world", greedy(5), use_tqdm=False)
        assert drain(engine)["mine"].token_ids == expected.token_ids


@pytest.mark.parametrize("where", ["launch", "read"])
async def test_a_failing_step_with_another_one_in_flight_ends_the_engine(
    text: Path, where: str, asynchronous: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = AsyncEngine(LLMEngine(str(text), kv_cache_bytes=4 << 20))
    async with engine:
        running = engine.submit(Request("r", prompt="hello", sampling=greedy(1000)))
        await anext(aiter(running))

        def break_off(*_: Any) -> Any:
            raise RuntimeError("planted")

        if where == "launch":
            monkeypatch.setattr(engine._engine.model_runner, "forward", break_off)
        else:
            monkeypatch.setattr(HostCopy, "wait", break_off)
        with pytest.raises(EngineDead):
            await asyncio.wait_for(running, 60)
        with pytest.raises(EngineDead):
            await engine.submit(Request("later", prompt="hello", sampling=greedy(1)))
    assert not engine._engine._in_flight


def test_a_closed_engine_forgets_its_step_in_flight(text: Path, asynchronous: None) -> None:
    engine = LLMEngine(str(text), kv_cache_bytes=4 << 20)
    engine.add_request("hello", greedy(9))
    engine.step()
    assert engine._in_flight
    engine.close()
    assert not engine._in_flight
    assert not engine.has_unfinished()


@pytest.fixture
def looks_only_where_it_reads(monkeypatch: pytest.MonkeyPatch) -> tape.Tape:
    """A tape that refuses to show values, but for those that a step's tokens are read from."""

    def wait(copies: HostCopy) -> list[Tensor]:
        with torch.utils._python_dispatch._disable_current_modes():
            return [torch.tensor(values.tolist()) for values in copies._tensors]

    monkeypatch.setattr(HostCopy, "wait", wait)
    return tape.Tape()


def test_a_launch_looks_at_no_token(
    text: Path, asynchronous: None, trace: Trace, looks_only_where_it_reads: tape.Tape
) -> None:
    with LLMEngine(str(text), kv_cache_bytes=4 << 20, num_speculative_tokens=0) as engine:
        for prompt, params in MIXED:
            engine.add_request(prompt, params)
        with looks_only_where_it_reads:
            while engine.has_unfinished():
                engine.step()
    assert trace.num_overlapped > 0
