"""deterministic=True: every way to compute a request gives the same bits, and each way is shown to have been taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_parts import RecordingSampler, drain, greedy, noise_image, random_prompt, recording_engine, step
from torch import Tensor

from nanovllm.engine import kernels
from nanovllm.engine.layers import linear
from nanovllm.engine.layers.linear import Linear
from nanovllm.engine.layers.product_choice import Choice
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import ConfigurationError
from tests import amx
from tests.checkpoints import make_llava, make_qwen3, make_qwen_vl

pytestmark = pytest.mark.skipif(kernels.missing() is not None, reason=str(kernels.missing()))

COUNT = 12
WORLDS: dict[str, Callable[[Path], Path]] = {
    "text": make_qwen3,
    "packed": partial(make_qwen3, hidden_size=768, num_heads=8, head_dim=64, num_layers=2),
    "llava": make_llava,
    "qwen3-vl": partial(make_qwen_vl, family="qwen3_vl"),
}
SEE = ("llava", "qwen3-vl")
MODES: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"quantization": "int8"},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.fixture(scope="module", params=list(WORLDS))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, WORLDS[request.param](tmp_path_factory.mktemp(request.param))


class Run:
    """Engines of one checkpoint and mode, and the logits that each request got: [tokens, vocab]."""

    def __init__(self, world: tuple[str, Path], mode: str) -> None:
        name, self.directory = world
        self.options = {"deterministic": True, **MODES[mode]}
        self.requests: dict[str, tuple[str, list[Any]]] = {}
        drawn = set()
        for number in range(COUNT):
            wanted = (0, 1, 3)[number % 3] if name in SEE else 0
            seeds = [10 * (number % 5) + n for n in range(wanted)]
            drawn |= set(seeds)
            images = [noise_image(seed) for seed in seeds]
            prompt = random_prompt(number, 1 + 7 * (number % 5)) + " <|image|> and" * wanted
            self.requests[str(number)] = (prompt, images)
        self.num_distinct_images = len(drawn)
        self.num_images = sum(len(images) for _, images in self.requests.values())

    def engine(self, **options: Any) -> LLMEngine:
        return recording_engine(self.directory, **self.options, **options)

    def add(self, engine: LLMEngine, name: str) -> None:
        prompt, images = self.requests[name]
        engine.add_request(prompt, greedy(20), images=images, request_id=name)

    def all_at_once(self, engine: LLMEngine, names: list[str] | None = None) -> dict[str, Tensor]:
        for name in names or list(self.requests):
            self.add(engine, name)
        drain(engine)
        return taken(engine)


def taken(engine: LLMEngine) -> dict[str, Tensor]:
    """The recorded logits, which are forgotten."""
    assert isinstance(engine.sampler, RecordingSampler)
    logits = {
        name: torch.stack([rows[place] for place in sorted(rows)]) for name, rows in engine.sampler.logits.items()
    }
    engine.sampler.logits.clear()
    return logits


def assert_same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.mark.parametrize("mode", list(MODES))
def test_every_way_to_compute_a_request_gives_the_same_bits(world: tuple[str, Path], mode: str) -> None:
    check_every_way(world, mode)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Layers of any size multiply by tiles; int8 mixes instructions, as it may, but bfloat16 must not."""
    if (reason := amx.missing()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(linear, "_MIN_PACKED_ELEMENTS", 0)
    with amx.granted(monkeypatch, Choice(tiles_from=5)) as emulator:
        before = emulator.executed()
        yield
        assert emulator.executed() != before or torch.ops.nanovllm.request_tiles() == ""
        assert emulator.configured_threads() == 0


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("mode", ["int8", "bfloat16"])
def test_requests_alone_and_together_have_the_same_bits_by_panels_and_tiles(mode: str, tmp_path: Path) -> None:
    run = Run(("text", make_qwen3(tmp_path)), mode)
    engine = run.engine(enable_prefix_caching=False, num_speculative_tokens=0)
    names = list(run.requests)[:4]
    alone: dict[str, Tensor] = {}
    for name in names:
        alone |= run.all_at_once(engine, [name])
    assert_same_bits(run.all_at_once(engine, names), alone)


@pytest.mark.proof
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("name", "mode"), [("text", "bfloat16"), ("text", "int8"), ("llava", "bfloat16")])
def test_every_way_gives_the_same_bits_by_panels_and_tiles(name: str, mode: str, tmp_path: Path) -> None:
    check_every_way((name, WORLDS[name](tmp_path)), mode)


def check_every_way(world: tuple[str, Path], mode: str) -> None:
    run = Run(world, mode)
    engine = run.engine(enable_prefix_caching=False, embedding_cache_bytes=0, num_speculative_tokens=0)
    alone: dict[str, Tensor] = {}
    for name in run.requests:
        alone |= run.all_at_once(engine, [name])
    stats = engine.stats()
    assert stats.prefix_cache_hits == stats.num_preemptions == stats.spec_decode_draft_tokens == 0
    assert stats.encoder_images == run.num_images  # each one a miss, the repeated ones too

    engine = run.engine(enable_prefix_caching=False)
    assert_same_bits(run.all_at_once(engine), alone)
    steps = engine.stats().steps
    assert_same_bits(run.all_at_once(engine, list(reversed(run.requests))), alone)
    if engine.processor is not None:
        assert engine.processor.cache.stats().hits > 0
        assert engine.stats().encoder_images == run.num_distinct_images

    engine = run.engine(enable_prefix_caching=False, max_num_batched_tokens=19)
    assert_same_bits(run.all_at_once(engine), alone)
    assert engine.stats().steps > steps

    engine = run.engine()
    assert_same_bits(run.all_at_once(engine), alone)
    cold = engine.stats().prefix_cache_hits
    assert_same_bits(run.all_at_once(engine), alone)
    assert engine.stats().prefix_cache_hits > cold

    longest = max(len(engine.tokenizer.encode(prompt)) + 49 * len(images) for prompt, images in run.requests.values())
    blocks = 4 + (longest + 20) // 16
    block_bytes = engine.model_runner.kv_caches[0][0].nbytes * len(engine.model_runner.kv_caches)
    engine = run.engine(kv_cache_bytes=blocks * block_bytes)
    assert_same_bits(run.all_at_once(engine), alone)
    assert engine.stats().num_preemptions > 0

    engine = run.engine()
    outputs: dict[str, Any] = {}
    for name in run.requests:
        run.add(engine, name)
        step(engine, outputs)
    assert len(engine.scheduler.running) > COUNT // 2
    drain(engine, outputs)
    assert_same_bits(taken(engine), alone)

    for name in run.requests:  # each answer is known, and drafted
        assert_same_bits(run.all_at_once(engine, [name]), {name: alone[name]})
    assert engine.stats().spec_decode_accepted_tokens > 5 * COUNT


def test_the_same_run_without_the_mode_differs_in_some_bits(
    world: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if world[0] != "packed":
        pytest.skip("small products happen to be the same for any number of rows")
    x, product = torch.randn(32, 768), linear.packed_multiply(torch.randn(768, 768), None)
    if all(torch.equal(product(x[:rows]), product(x)[:rows]) for rows in range(1, 32)):
        pytest.skip("oneDNN's products are the same for any number of rows on this CPU")
    # Our kernel sums a row by itself, in whatever batch: oneDNN is what needs the mode.
    monkeypatch.setattr(linear, "has_panels", lambda *_: False)
    run = Run(world, "float32")
    run.options = {"packed_weights_bytes": 0}  # a file would have panels
    alone: dict[str, Tensor] = {}
    engine = run.engine(enable_prefix_caching=False)
    for request in run.requests:
        alone |= run.all_at_once(engine, [request])
    together = run.all_at_once(engine)
    assert any(not torch.equal(alone[request], together[request]) for request in alone)


def test_a_machine_that_breaks_the_promise_is_found_out(
    world: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    product = Linear._product

    def by_height(self: Linear, x: Tensor) -> Tensor:
        return product(self, x) * (1 + 1e-6 * torch.arange(len(x)).to(x).unsqueeze(1))

    monkeypatch.setattr(Linear, "_product", by_height)
    with pytest.raises(ConfigurationError, match=r"deterministic=True is not possible.*differ by up to"):
        LLMEngine(str(world[1]), deterministic=True, kv_cache_bytes=1 << 20)


def test_without_the_kernels_the_mode_is_refused(world: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "missing", lambda: "no compiler here")
    with pytest.raises(ConfigurationError, match=r"deterministic=True needs.*no compiler here"):
        LLMEngine(str(world[1]), deterministic=True, kv_cache_bytes=1 << 20)
