"""Recorded steps: right by the same measure as others, with nothing but their inputs to tell one step from the next."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flash_attn_reference
import pytest
import tape
import torch
from checkpoints import make_llava, make_qwen3, make_qwen_vl
from engine_parts import (
    Case,
    RecordingSampler,
    Reference,
    assert_all_same,
    drain,
    draw_cases,
    greedy,
    recording_engine,
    step,
)
from torch import Tensor

from nanovllm.engine import kernels
from nanovllm.engine.attention.base import AttentionBackend, GraphAttention
from nanovllm.engine.attention.sdpa import SdpaAttention
from nanovllm.engine.attention.varlen import PagedVarlenAttention, flash_attn_kernels
from nanovllm.engine.diagnostics import describe
from nanovllm.engine.execution import model_runner
from nanovllm.engine.execution.cuda_graphs import DecodeGraphs, graph_shapes, graph_sizes
from nanovllm.engine.layers.device_copy import HostCopy
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.sampling import sampler
from nanovllm.engine.scheduling.sequence import Sequence
from nanovllm.errors import ConfigurationError
from nanovllm.sampling_params import SamplingParams
from nanovllm.vision.encoders.clip import VisionEncoder

CPU = torch.device("cpu")
WORLDS: dict[str, Callable[[Path], Path]] = {
    "text": make_qwen3,
    "llava": partial(make_llava, tower="siglip", patch=16, size=64),
    "qwen-vl": partial(make_qwen_vl, family="qwen3_vl"),
}


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, most: int, longest: int, table: Tensor
) -> Tensor:
    return flash_attn_reference.flash_attn_varlen_func(
        q, k, v, starts, ends, most, longest, causal=True, block_table=table
    )


# The reference looks at values, which kernels do on the device: for whoever records, each call is one operator.
_varlen_op = torch.library.custom_op(
    "nanovllm_tests::varlen",
    _varlen,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor ends, int most, int longest, Tensor table) -> Tensor",
)
decode_calls: list[int] = []


def varlen(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, most: int, longest: int, *, causal: bool,
    block_table: Tensor,
) -> Tensor:  # fmt: skip
    assert causal
    if most == 1:
        decode_calls.append(len(q))
    output: Tensor = _varlen_op(q, k, v, starts, ends, most, longest, block_table)
    return output


def use_graphs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make engines record their steps, and attend as on a GPU with flash-attn or without."""
    monkeypatch.setattr(model_runner, "choose_recorder", lambda _: tape.record)
    monkeypatch.setattr(kernels, "missing", lambda: "a GPU has none")
    if backend == "flash-attn":
        monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=varlen))
        attention = PagedVarlenAttention(CPU, flash_attn_kernels())
        monkeypatch.setattr(model_runner, "choose_backend", lambda *_: attention)


def graphs_of(engine: LLMEngine) -> DecodeGraphs:
    graphs = engine.model_runner.graphs
    assert graphs is not None
    return graphs


@pytest.fixture(scope="module", params=list(WORLDS))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Case]]:
    """A checkpoint and 8 cases of it; with images 0, 1 and 3 a prompt."""
    directory = WORLDS[request.param](tmp_path_factory.mktemp(request.param))
    sees = request.param != "text"
    cases = draw_cases(Reference(directory, sees=sees), [0, 1, 3, 1] * 2 if sees else [0] * 8, max_tokens=32)
    return directory, {f"case-{number}": case for number, case in enumerate(cases)}


def ask_all(engine: LLMEngine, cases: dict[str, Case], *, apart: int = 0) -> None:
    """All cases, each ``apart`` steps after the last, against transformers."""
    outputs: dict[str, Any] = {}
    for name, case in cases.items():
        engine.add_request(case.prompt, greedy(32), images=case.images, request_id=name)
        for _ in range(apart):
            step(engine, outputs)
    assert_all_same(engine, cases, drain(engine, outputs))


@pytest.mark.parametrize("backend", ["flash-attn", "torch"])
def test_recorded_steps_equal_transformers(
    world: tuple[Path, dict[str, Case]], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, cases = world
    use_graphs(backend, monkeypatch)
    engine = recording_engine(directory, max_num_seqs=8)
    ask_all(engine, cases, apart=3)
    replays = graphs_of(engine).num_replays
    assert replays > engine.stats().steps // 2
    encoder = engine.model_runner.encoder
    assert not isinstance(encoder, VisionEncoder) or encoder.num_replays > 0
    assert isinstance(engine.sampler, RecordingSampler)
    engine.sampler.logits.clear()
    ask_all(engine, cases)  # with a warm prefix cache
    assert graphs_of(engine).num_replays > replays


@pytest.mark.parametrize("backend", ["flash-attn", "torch"])
def test_recorded_steps_between_chunks_and_preemptions_equal_transformers(
    world: tuple[Path, dict[str, Case]], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, cases = world
    use_graphs(backend, monkeypatch)
    size = 256 if backend == "flash-attn" else 16
    blocks = 4 if backend == "flash-attn" else 24
    engine = recording_engine(
        directory, max_num_batched_tokens=23, kv_cache_bytes=(blocks + 1) * size * 2 * 2 * 32 * 2 * 4
    )
    assert engine.scheduler.blocks.num_blocks == blocks
    ask_all(engine, cases)
    assert graphs_of(engine).num_replays > 0
    assert engine.stats().num_preemptions > 0 or backend == "flash-attn"


def test_flash_attn_decodes_in_graphs_and_out_of_them_by_the_call_that_waits_for_nothing(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for eager in (False, True):
        use_graphs("flash-attn", monkeypatch)
        decode_calls.clear()
        with LLMEngine(str(text), kv_cache_bytes=4 << 20, enforce_eager=eager) as engine:
            recorded = len(decode_calls)
            engine.generate(["hello", "world"], greedy(4), use_tqdm=False)
            # A replay calls nothing; without graphs, each step calls once a layer.
            assert len(decode_calls) - recorded == (6 if eager else 0)
            assert (engine.model_runner.graphs is None) is eager


def test_sizes_are_fine_where_a_token_more_costs_much() -> None:
    assert graph_sizes(64) == [1, 2, 4, 8, 16, 32, 48, 64]
    assert graph_sizes(1) == [1]
    assert graph_sizes(5) == [1, 2, 4, 5]
    assert graph_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert graph_sizes(4096)[-1] == 512


def test_graphs_are_few_and_the_largest_is_recorded_first() -> None:
    flash_attn = PagedVarlenAttention(CPU, lambda query, *_: query)
    shapes = graph_shapes(flash_attn, max_tokens=256, max_context=40_960)
    assert shapes[:2] == [(256, 40_960), (240, 40_960)]
    # Shares of a table as wide as the longest context would leave most of a GPU idle, where there are few rows.
    assert [context for size, context in reversed(shapes) if size == 8] == [1024, 4096, 16_384, 40_960]
    assert [context for size, context in shapes if size == 32] == [40_960]
    assert graph_shapes(flash_attn, max_tokens=1, max_context=900) == [(1, 900)]
    for attention in (flash_attn, SdpaAttention(CPU, torch.float32)):
        assert len(graph_shapes(attention, max_tokens=8192, max_context=1 << 20)) <= 72


def test_rows_left_over_write_to_the_block_that_nobody_owns(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_graphs("torch", monkeypatch)
    with LLMEngine(str(text), kv_cache_bytes=4 << 20, enable_prefix_caching=False) as engine:
        for word in ("hello", "world", "fox"):
            engine.add_request(word, greedy(9))
        engine.step()
        owned = {block for sequence in engine.scheduler.running for block in sequence.block_table}
        before = [cache.clone() for cache in engine.model_runner.kv_caches]
        engine.step()  # three rows in a graph of four
        assert graphs_of(engine).num_replays == 2
        for old, new in zip(before, engine.model_runner.kv_caches, strict=True):
            changed = {int(block) for block in (old != new).flatten(1).any(1).nonzero()}
            assert changed <= owned | {engine.scheduler.blocks.num_blocks}
            assert len(changed & owned) == 3


def test_the_device_s_block_tables_follow_starts_ends_preemptions_and_rejected_drafts(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_graphs("torch", monkeypatch)
    sent: list[int] = []
    with LLMEngine(str(text), kv_cache_bytes=14 * 16 * 2 * 2 * 32 * 2 * 4, max_num_seqs=4) as engine:
        graphs, tables = graphs_of(engine), engine.scheduler.tables
        for number in range(9):
            prompt = [7 + number, 8, 9, 10] * (3 + number)
            engine.add_request(prompt, SamplingParams(temperature=0.9, seed=number, max_tokens=24, ignore_eos=True))
        while engine.has_unfinished():
            engine.step()
            engine.audit()
            sent.append(len(tables.changed))
            with torch.inference_mode():
                graphs._send_changes(tables)
            assert graphs._tables[:-1].tolist() == tables.rows[:, : graphs._tables.shape[1]].tolist()
            assert set(graphs._tables[-1].tolist()) == {engine.scheduler.blocks.num_blocks}
        stats = engine.stats()
        assert stats.num_preemptions > 0
        assert stats.spec_decode_draft_tokens > stats.spec_decode_accepted_tokens
        assert sent.count(0) > len(sent) // 2


def test_drafts_and_forced_tokens_are_rows_of_their_own(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_graphs("torch", monkeypatch)
    pattern = SamplingParams(temperature=0.0, max_tokens=24, regex="(the total |hello world )+")
    answers = []
    for eager in (True, False):
        with LLMEngine(str(text), kv_cache_bytes=4 << 20, enforce_eager=eager) as engine:
            answers.append(engine.generate([[7, 8, 9, 10] * 9], pattern, use_tqdm=False)[0].token_ids)
            if not eager:
                stats = engine.stats()
                assert stats.spec_decode_draft_tokens + stats.generation_tokens > stats.steps
                assert graphs_of(engine).num_replays == stats.steps - 1  # all but the prompt's
    assert answers[0] == answers[1]


def test_what_no_graph_holds_is_computed_without(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_graphs("torch", monkeypatch)
    with LLMEngine(str(text), kv_cache_bytes=8 << 20, max_num_seqs=4, num_speculative_tokens=0) as engine:
        graphs = graphs_of(engine)
        assert graphs.sizes == [1, 2, 4]

        def replays(prompt: list[int], **options: Any) -> int:
            before = graphs.num_replays
            engine.generate([prompt], SamplingParams(temperature=0.0, max_tokens=1, **options), use_tqdm=False)
            return graphs.num_replays - before

        assert replays([7, 8, 9]) == 1
        assert replays([7, 8, 9, 10, 11]) == 0
        assert replays([7, 8, 9], prompt_logprobs=1) == 0
        graphs.contexts = dict.fromkeys(graphs.sizes, (16,))
        assert replays([7] * 40 + [8, 9, 10]) == 0  # after a prefix hit three tokens, but at the end of a long context
        assert replays([7] * 40 + [8, 9, 10]) == 0


def test_a_closed_engine_holds_no_cache(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_graphs("torch", monkeypatch)
    engine = LLMEngine(str(text), kv_cache_bytes=1 << 20)
    engine.close()
    assert engine.model_runner.graphs is None
    assert not engine.model_runner.kv_caches


def test_the_doctor_tells_of_graphs_and_why_there_are_none(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(**options: Any) -> str:
        with LLMEngine(str(text), kv_cache_bytes=1 << 20, max_num_seqs=8, **options) as engine:
            return next(f"{one.value} {one.note}" for one in describe(engine) if one.subject == "CUDA graphs")

    assert "they are for CUDA" in told()
    use_graphs("torch", monkeypatch)
    assert "1, 2, 4, 8, 16 tokens" in told()
    assert "enforce_eager=True" in told(enforce_eager=True)


@pytest.mark.parametrize("backend", ["flash-attn", "torch"])
def test_plans_made_on_the_device_are_those_of_the_host(backend: str) -> None:
    attention: AttentionBackend = (
        PagedVarlenAttention(CPU, lambda query, *_: query)
        if backend == "flash-attn"
        else SdpaAttention(CPU, torch.float32)
    )
    assert isinstance(attention, GraphAttention)
    size = attention.block_size
    tables = torch.tensor([[4, 0, 9], [2, 7, 1], [3, 5, 9]])
    contexts = torch.tensor([1, 3 * size, size + 1])
    metadata = attention.decode_metadata(contexts, tables)
    assert metadata.slots.tolist() == [4 * size, 2 * size - 1, 5 * size]


def test_a_step_waits_for_the_device_only_to_read_its_tokens(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_graphs("torch", monkeypatch)
    waits = 0

    def wait(copies: HostCopy) -> list[Tensor]:
        nonlocal waits
        waits += 1
        with torch.utils._python_dispatch._disable_current_modes():
            return [torch.tensor(values.tolist()) for values in copies._tensors]

    monkeypatch.setattr(HostCopy, "wait", wait)
    options: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True}
    everything = SamplingParams(
        temperature=0.8, top_p=0.9, top_k=40, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.1,
        frequency_penalty=0.1, logit_bias={7: 2.0}, bad_words=["the"], min_tokens=2, stop_token_ids=(9,), seed=3,
        **options,
    )  # fmt: skip
    guided = SamplingParams(temperature=0.0, regex="[a-z]{4,}", **options)
    with LLMEngine(str(text), kv_cache_bytes=4 << 20, enforce_eager=True) as engine:
        for params in (everything, SamplingParams(temperature=0.0, **options), SamplingParams(**options), guided):
            engine.add_request([7, 8, 9], params)
        with tape.Tape():
            while engine.has_unfinished():
                engine.step()
        assert waits == engine.stats().steps


def test_greedy_rows_are_an_argmax_and_nothing_else() -> None:
    calls = tape.Tape()
    rows = [Sequence("", [0], 1, SamplingParams(temperature=0.0), 16) for _ in range(3)]
    logits = torch.eye(3, 5)
    with calls:
        tokens = sampler.Sampler(CPU).sample(logits, rows)
    assert tokens.tolist() == [0, 1, 2]
    called = [function._schema.name.split("::")[1] for function, *_ in calls.calls]
    assert called == ["argmax"]  # our kernel's or torch's


def test_the_tape_refuses_what_a_graph_cannot_hold() -> None:
    values = torch.arange(4.0)
    for compute in (values.max().item, lambda: values[values > 1], lambda: values + torch.tensor([1.0])):
        with pytest.raises(RuntimeError, match="looks at values, or takes them from the host"):
            tape.record(compute)
    doubled = torch.empty(4)
    replay = tape.record(lambda: doubled.copy_(values.view(2, 2).mul(2).flatten()))
    values.fill_(3.0)
    replay()
    assert doubled.tolist() == [6.0] * 4


def test_recorded_images_that_do_not_fit_are_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(compute: Callable[[], Any]) -> Callable[[], Any]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model_runner, "choose_recorder", lambda _: full)
    directory = make_llava(tmp_path, patch=32, size=64)
    with pytest.raises(ConfigurationError, match=r"a batch of 32 images does not fit the GPU.*enforce_eager=True"):
        LLMEngine(str(directory), kv_cache_bytes=2 << 20)
    LLMEngine(str(directory), kv_cache_bytes=2 << 20, enforce_eager=True).close()
