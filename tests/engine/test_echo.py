from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from nanovllm.engine.backends.base import EngineBackend, Request
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import EngineDead, InvalidImage, PlaceholderMismatch
from nanovllm.sampling_params import SamplingParams
from nanovllm.vision.images.preprocess import PreparedImage, prepare_image


def ask(request_id: str, prompt: str, max_tokens: int = 64, **others: Any) -> Request:
    return Request(request_id, prompt=prompt, sampling=SamplingParams(max_tokens=max_tokens), **others)


def picture(engine: EchoEngine) -> PreparedImage:
    return prepare_image(np.zeros((8, 9, 3), np.uint8), engine.image_transform)


async def test_it_answers_with_the_prompt_and_the_digests_of_the_images() -> None:
    backend: EngineBackend = EchoEngine()
    async with EchoEngine() as engine:
        image = picture(engine)
        first = await engine.submit(ask("a", "Describe <|image|> ", images=(image,)))
        again = await engine.submit(ask("b", "Describe <|image|>", images=(image,)))
    assert first.text == f"Describe <|image|>  {image.digest.hex()}"
    assert [first.images[0].outcome, again.images[0].outcome] == ["miss", "hit"]
    assert (first.images[0].width, first.images[0].height) == (9, 8)
    assert backend.max_num_seqs == 64


async def test_it_streams_words_and_stops_at_max_tokens() -> None:
    async with EchoEngine() as engine:
        generation = engine.submit(ask("a", "one two three", max_tokens=2))
        assert "".join([chunk.text async for chunk in generation]) == "one two"
        assert [(chunk.text, chunk.finish_reason) for chunk in generation.chunks] == [("one", None), (" two", "length")]
        assert (await generation).text == "one two"


async def test_it_takes_messages_and_counts_placeholders() -> None:
    async with EchoEngine() as engine:
        parts = [{"type": "text", "text": "Hi"}, {"type": "image"}]
        request = Request("a", messages=({"role": "user", "content": parts},))
        with pytest.raises(PlaceholderMismatch):
            await engine.submit(request)


async def test_faults_and_deaths_and_aborts_can_be_played() -> None:
    async with EchoEngine(fault=lambda request: InvalidImage("no") if request.request_id == "bad" else None) as engine:
        with pytest.raises(InvalidImage):
            await engine.submit(ask("bad", "x"))
        assert (await engine.submit(ask("good", "x"))).text == "x"
    slow = EchoEngine(delay_s=60, max_num_seqs=1)
    aborted, running, waiting = (slow.submit(ask(name, "x")) for name in "arw")
    await asyncio.sleep(0)
    assert (slow.stats().num_requests_running, slow.stats().num_requests_waiting) == (1, 2)
    aborted.abort()
    assert (await aborted).finish_reason == "abort"
    slow.kill("out of memory")
    for generation in (running, waiting, slow.submit(ask("later", "x"))):
        with pytest.raises(EngineDead, match="out of memory"):
            await generation
    assert slow.dead.is_set()


def test_it_needs_no_torch() -> None:
    script = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import asyncio\n"
        "from nanovllm.engine.backends.base import Request\n"
        "from nanovllm.engine.backends.echo import EchoEngine\n"
        "async def main(): return await EchoEngine().submit(Request('a', prompt='hello'))\n"
        "assert asyncio.run(main()).text == 'hello'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
