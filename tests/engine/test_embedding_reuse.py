"""Images that the engine has seen: not decoded again, not encoded again, and encoded together where they are new."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_llava
from engine_parts import drain, greedy, noise_image
from PIL import Image

from nanovllm.engine.backends.base import Request
from nanovllm.engine.backends.native import AsyncEngine
from nanovllm.engine.execution import image_embeddings
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.outputs import RequestOutput
from nanovllm.vision import processor as processor_module
from nanovllm.vision.images.preprocess import PreparedImage, prepare_image

PROMPT = "<|image|> and"
ONE_IMAGE = 4 * 64 * 4  # tokens, width, bytes


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"), patch=32, size=64)


def make_engine(directory: Path, **options: Any) -> LLMEngine:
    return LLMEngine(str(directory), **{"kv_cache_bytes": 2 << 20, "enable_prefix_caching": False, **options})


def file_of(seed: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    noise_image(seed).save(buffer, kind)
    return buffer.getvalue()


def ask(engine: LLMEngine, *images: bytes | Image.Image | PreparedImage, salt: bytes = b"") -> RequestOutput:
    engine.add_request(" and ".join([PROMPT] * len(images)), greedy(4), images=images, request_id="r", cache_salt=salt)
    return drain(engine)["r"]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many images went through a tower together, batch by batch."""
    from nanovllm.vision.encoders.clip import VisionEncoder

    seen: list[int] = []
    original = VisionEncoder._embed
    monkeypatch.setattr(
        VisionEncoder, "_embed", lambda self, images: seen.append(len(images)) or original(self, images)
    )
    return seen


def test_a_file_seen_before_is_neither_decoded_nor_encoded(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(llava)
    first = ask(engine, file_of(1))
    monkeypatch.setattr(processor_module, "prepare_image", lambda *_: pytest.fail("it was decoded again"))
    again = ask(engine, file_of(1))
    assert again.token_ids == first.token_ids
    assert (first.images[0].outcome, again.images[0].outcome) == ("miss", "hit")
    assert (again.images[0].digest, again.images[0].width) == (first.images[0].digest, first.images[0].width)
    stats = engine.stats()
    assert stats.embedding_cache is not None
    assert (stats.encoder_images, stats.embedding_cache.hits_by_file) == (1, 1)
    assert stats.embedding_cache.seconds_saved > 0


def test_equal_pixels_in_another_format_share_the_entry_and_then_each_file_finds_it(llava: Path) -> None:
    engine = make_engine(llava)
    outputs = [ask(engine, file_of(1, kind)) for kind in ("PNG", "BMP", "TIFF", "PNG", "BMP", "TIFF")]
    assert len({output.token_ids for output in outputs}) == 1
    stats = engine.stats()
    assert stats.embedding_cache is not None
    cache = stats.embedding_cache
    assert (stats.encoder_images, cache.entries, cache.hits, cache.hits_by_file) == (1, 1, 5, 3)


def test_another_tenant_finds_nothing_by_the_file(llava: Path) -> None:
    engine = make_engine(llava)
    ask(engine, file_of(1), salt=b"one")
    assert ask(engine, file_of(1), salt=b"other").images[0].outcome == "miss"
    assert ask(engine, file_of(1), salt=b"other").images[0].outcome == "hit"
    assert engine.stats().encoder_images == 2


def test_what_was_found_before_the_engine_outlives_its_eviction(llava: Path) -> None:
    engine = make_engine(llava, embedding_cache_bytes=ONE_IMAGE)
    expected = ask(engine, noise_image(1))
    processor = engine.processor
    assert processor is not None
    prepared = processor.prepare(file_of(1))
    assert prepared.embedding is None  # the picture came without a file, so that no file finds it
    ask(engine, file_of(1))
    held = processor.prepare(file_of(1))
    assert held.pixels is None
    assert held.nbytes == ONE_IMAGE
    ask(engine, file_of(2))
    assert processor.prepare(file_of(1)).embedding is None
    encoded = engine.stats().encoder_images
    assert ask(engine, held).token_ids == expected.token_ids
    assert engine.stats().encoder_images == encoded


def test_embeddings_are_the_same_bits_from_every_tier(llava: Path) -> None:
    engine = make_engine(llava, embedding_cache_bytes=ONE_IMAGE, embedding_cache_host_bytes=2 * ONE_IMAGE)
    processor = engine.processor
    assert processor is not None
    images = [processor.prepare(noise_image(seed)) for seed in range(3)]
    fresh = [processor.encoder.embed([image])[0] for image in images]
    for _ in range(3):
        for image, expected in zip(images, fresh, strict=True):
            ((found, _),) = processor.embed([image])
            assert torch.equal(found, expected)
    assert [tier.entries for tier in processor.cache.stats().tiers] == [1, 2]
    assert [tier.hits for tier in processor.cache.stats().tiers] == [0, 6]
    stats = engine.model_runner.get_vision_stats()
    assert stats["vision_cache_hits_by_tier"] == {"device": 0, "host": 6}


def test_one_at_a_time_they_are_the_same_bits_alone_and_among_others_with_and_without_the_cache(llava: Path) -> None:
    engine = make_engine(llava, embedding_cache_bytes=2 * ONE_IMAGE, embedding_cache_host_bytes=8 * ONE_IMAGE)
    processor = engine.processor
    assert processor is not None
    processor.encoder.batch_size = 1  # as deterministic=True sets it
    images = [processor.prepare(noise_image(seed)) for seed in range(5)]
    alone = [processor.encoder.embed([image])[0] for image in images]
    for order in (images, images[::-1], images[2:] + images):
        for image, (found, _) in zip(order, processor.embed(order), strict=True):
            assert torch.equal(found, alone[images.index(image)])


def test_images_of_waiting_requests_fill_the_encoders_batch(llava: Path, batches: list[int]) -> None:
    engine = make_engine(llava, max_num_seqs=1)
    for seed in (1, 2, 1, 3):
        engine.add_request(PROMPT, greedy(4), images=[noise_image(seed)], request_id=f"{seed}-{len(engine._requests)}")
    engine.step()
    engine.audit()
    assert batches == [3]
    outcomes = [output.images[0].outcome for output in drain(engine).values()]
    assert sorted(outcomes) == ["hit", "miss", "miss", "miss"]
    assert batches == [3]


@pytest.mark.parametrize(
    "options",
    [
        {"encoder_batch_pixels": 64 * 64},
        {"embedding_cache_bytes": ONE_IMAGE},
    ],
    ids=["no area left", "no memory for them"],
)
def test_no_more_is_encoded_ahead_than_there_is_room_for(llava: Path, batches: list[int], options: Any) -> None:
    engine = make_engine(llava, max_num_seqs=1, **options)
    for seed in (1, 2, 3):
        engine.add_request(PROMPT, greedy(2), images=[noise_image(seed)], request_id=str(seed))
    drain(engine)
    assert batches == [1, 1, 1]


def encoder_runs(directory: Path, requests: list[list[int]], **options: Any) -> int:
    """How many images an engine encodes for requests of these pictures, all queued at once."""
    engine = make_engine(directory, **options)
    pictures = {seed: noise_image(seed) for seeds in requests for seed in seeds}
    for number, seeds in enumerate(requests):
        engine.add_request(
            " and ".join([PROMPT] * len(seeds)),
            greedy(3),
            images=[pictures[seed] for seed in seeds],
            request_id=str(number),
        )
    outputs = drain(engine)
    assert [len(outputs[str(number)].images) for number in range(len(requests))] == [len(seeds) for seeds in requests]
    return engine.stats().encoder_images


QUEUES: dict[str, list[list[int]]] = {
    "an image each": [[seed] for seed in range(24)],
    "several images each": [list(range(4 * number, 4 * number + 4)) for number in range(6)],
    "one or many": [[0], [1, 2, 3, 4], [5], [6, 7], [8, 9, 10], [11], [12, 13, 14, 15], [16]],
    "each image twice in a row": [[seed // 2] for seed in range(24)],
    "each request has its neighbour's image": [[seed, seed + 1] for seed in range(16)],
}


@pytest.mark.parametrize("seats", [1, 2])
@pytest.mark.parametrize("held", [8, 10, 13, 100])
@pytest.mark.parametrize("requests", list(QUEUES.values()), ids=list(QUEUES))
def test_every_picture_of_a_queue_is_encoded_once_where_the_cache_holds_what_runs(
    llava: Path, requests: list[list[int]], held: int, seats: int
) -> None:
    distinct = len({seed for seeds in requests for seed in seeds})
    for host in (0, 1, 5):
        sizes = {"embedding_cache_bytes": held * ONE_IMAGE, "embedding_cache_host_bytes": host * ONE_IMAGE}
        assert encoder_runs(llava, requests, max_num_seqs=seats, **sizes) == distinct


@pytest.mark.parametrize("held", [0, 1, 2, 3])
@pytest.mark.parametrize("tokens", [5, 8, 512])
def test_a_cache_smaller_than_the_pictures_of_a_request_encodes_none_of_them_twice(
    llava: Path, held: int, tokens: int
) -> None:
    requests = [list(range(5 * number, 5 * number + 5)) for number in range(4)]
    options = {"max_num_seqs": 1, "max_num_batched_tokens": tokens, "embedding_cache_bytes": held * ONE_IMAGE}
    assert encoder_runs(llava, requests, **options) == 20


def test_pictures_whose_prompts_the_prefix_cache_holds_are_not_encoded_ahead(llava: Path) -> None:
    requests = [[0], [1], *([seed] for seed in range(2, 10)), [0], [1]]
    options = {"embedding_cache_bytes": 4 * ONE_IMAGE, "max_num_seqs": 1, "block_size": 4}
    assert encoder_runs(llava, requests, enable_prefix_caching=True, **options) == 10


def test_what_was_encoded_ahead_and_evicted_is_encoded_again(llava: Path, batches: list[int]) -> None:
    engine = make_engine(llava, max_num_seqs=1, embedding_cache_bytes=2 * ONE_IMAGE)
    for seed in (1, 2, 3):
        engine.add_request(PROMPT, greedy(2), images=[noise_image(seed)], request_id=str(seed))
    engine.step()
    assert batches == [2]
    cache = engine.processor.cache if engine.processor else None
    assert cache is not None
    cache.get_or_compute([bytes([n]) * 32 for n in range(2)], lambda indices: [torch.zeros(4, 64) for _ in indices])
    assert set(drain(engine)) == {"1", "2", "3"}
    assert engine.stats().encoder_images > 3


async def test_an_idle_engine_waits_a_moment_for_more_images(llava: Path, batches: list[int]) -> None:
    llm = make_engine(llava, encoder_linger_s=3.0)
    async with AsyncEngine(llm) as engine:
        transform = engine.image_transform
        assert transform is not None
        images = [prepare_image(noise_image(seed), transform) for seed in range(3)]
        running = []
        for number, image in enumerate(images):
            running.append(engine.submit(Request(str(number), prompt=PROMPT, images=(image,), sampling=greedy(2))))
            await asyncio.sleep(0.02)
        await asyncio.gather(*running)
    assert batches == [3]


async def test_text_waits_for_nobody(llava: Path) -> None:
    llm = make_engine(llava, encoder_linger_s=600.0)
    async with AsyncEngine(llm) as engine, asyncio.timeout(60):
        await engine.submit(Request("t", prompt="hello", sampling=greedy(2)))


async def test_the_backend_finds_an_image_by_its_file(llava: Path) -> None:
    async with AsyncEngine(make_engine(llava)) as engine:
        transform = engine.image_transform
        assert transform is not None
        digest = b"\7" * 32
        assert engine.find_image(digest, b"t") is None
        image = replace(prepare_image(noise_image(1), transform), file_digest=digest)
        first = await engine.submit(Request("a", prompt=PROMPT, images=(image,), sampling=greedy(2), cache_salt=b"t"))
        found = engine.find_image(digest, b"t")
        assert found is not None
        assert found.pixels is None
        assert (found.width, found.height) == (image.width, image.height)
        assert engine.find_image(digest, b"u") is None
        second = await engine.submit(Request("b", prompt=PROMPT, images=(found,), sampling=greedy(2), cache_salt=b"t"))
        assert second.token_ids == first.token_ids
        assert engine.stats().encoder_images == 1


def test_the_time_of_encoding_is_asked_for_when_the_request_has_ended(
    llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, a device may not have done it yet."""
    engine = make_engine(llava)
    asked_at: list[int] = []

    class OfDevice:
        def end(self) -> None:
            pass

        @property
        def seconds(self) -> float:
            asked_at.append(engine.stats().generation_tokens)
            return 0.5

    monkeypatch.setattr(image_embeddings, "begin", lambda _: OfDevice())
    assert ask(engine, noise_image(1)).timings.encode_ms == 500.0
    assert asked_at == [4]
