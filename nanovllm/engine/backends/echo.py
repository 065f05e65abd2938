"""The echo backend: answers with the prompt, for tests of the pipeline, without torch."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nanovllm.engine.backends.base import EngineBackend, Generation, Request
from nanovllm.engine.backends.capabilities import Capabilities
from nanovllm.engine.outputs import (
    Completion,
    ImageOutcome,
    ImageUse,
    ModelInfo,
    RequestOutput,
    RequestTimings,
    TokenChunk,
    Usage,
)
from nanovllm.errors import EngineDead, PlaceholderMismatch, counted
from nanovllm.image_placeholder import IMAGE_PLACEHOLDER
from nanovllm.statistics import EngineStats

if TYPE_CHECKING:
    from nanovllm.vision.images.preprocess import ImageTransform, PreparedImage

_WORD = re.compile(r"\s*\S+|\s+$")


class EchoEngine(EngineBackend):
    """Echoes the text of a request, then the digest of each image in hex, a word a token, up to ``max_tokens`` words.

    ``delay_s`` is spent on each request while it holds one of ``max_num_seqs`` seats. ``fault`` may return an error
    for a request, which then fails with it. ``kill`` makes the engine die. An image is a ``miss`` when its digest is
    new to this engine and a ``hit`` afterwards.
    """

    name = "echo"

    capabilities = Capabilities(
        guided=frozenset(), logprobs=None, prompt_logprobs=False, n=False, sampling=frozenset(), settings=frozenset()
    )

    def __init__(
        self,
        *,
        delay_s: float = 0.0,
        max_num_seqs: int = 64,
        image_tokens: int = 49,
        image_transform: ImageTransform | None = None,
        fault: Callable[[Request], BaseException | None] | None = None,
    ) -> None:
        """``image_transform`` None means CLIP's own, at 224 pixels."""
        if image_transform is None:
            from nanovllm.vision.images.preprocess import ImageTransform

            image_transform = ImageTransform.for_clip(224)
        super().__init__(ModelInfo(id="echo", revision="1", parameter_digest="0" * 64), image_transform, max_num_seqs)
        self._delay_s = delay_s
        self._image_tokens = image_tokens
        self._fault = fault
        self._seats = asyncio.Semaphore(max_num_seqs)
        self._begun: dict[str, asyncio.Task[None] | asyncio.Handle] = {}
        self._digests: set[bytes] = set()
        self._prompt_tokens = 0
        self._generation_tokens = 0

    async def start(self) -> None:
        """Nothing to load."""

    def find_image(self, file_digest: bytes, cache_salt: bytes) -> PreparedImage | None:
        """Never: nothing is embedded here."""
        return None

    def _begin(self, request: Request, generation: Generation) -> None:
        loop = asyncio.get_running_loop()
        if self._delay_s:
            self._begun[request.request_id] = loop.create_task(self._answer_later(request, generation))
        else:
            now = time.perf_counter()
            self._begun[request.request_id] = loop.call_soon(self._answer, request, generation, now, now)

    def abort(self, request_id: str) -> None:
        """End a request early, with no text."""
        if request_id in self._generations:
            self._begun.pop(request_id).cancel()
            usage = Usage(input_tokens=0, output_tokens=0, image_tokens=0, cached_tokens=0)
            output = RequestOutput(request_id, "", (), "abort", usage, RequestTimings())
            self._generations.pop(request_id).deliver(TokenChunk("", (), "abort"), output)

    def stats(self) -> EngineStats:
        """Running and waiting requests, and token counters."""
        running = min(len(self._generations), self.max_num_seqs)
        return EngineStats(
            num_requests_running=running,
            num_requests_waiting=len(self._generations) - running,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            encoder_images=len(self._digests),
        )

    async def close(self) -> None:
        """Stop; unfinished generations end with EngineDead."""
        self.kill("the engine was closed")

    def kill(self, reason: str = "killed") -> None:
        """Die now: every unfinished generation, and every later one, fails with EngineDead."""
        self._die(EngineDead(reason))
        for begun in self._begun.values():
            begun.cancel()
        self._begun.clear()

    async def _answer_later(self, request: Request, generation: Generation) -> None:
        start = time.perf_counter()
        async with self._seats:
            admitted = time.perf_counter()
            await asyncio.sleep(self._delay_s)
        self._answer(request, generation, start, admitted)

    def _answer(self, request: Request, generation: Generation, start: float, admitted: float) -> None:
        del self._begun[request.request_id], self._generations[request.request_id]
        if self._fault is not None and (error := self._fault(request)) is not None:
            generation.fail(error)
            return
        try:
            output, words = self._echo(request, start, admitted)
        except Exception as failure:
            generation.fail(failure)
            return
        for word, token in zip(words[:-1], output.token_ids, strict=False):
            generation.deliver(TokenChunk(word, (token,)))
        generation.deliver(TokenChunk(words[-1] if words else "", output.token_ids[-1:], output.finish_reason), output)

    def _echo(self, request: Request, start: float, admitted: float) -> tuple[RequestOutput, list[str]]:
        """The output, and the words of its text, each a token."""
        text, num_placeholders = _text_and_num_placeholders(request)
        if num_placeholders != len(request.images):
            raise PlaceholderMismatch(
                f"the prompt has {counted(num_placeholders, 'image placeholder')} "
                f"for {counted(len(request.images), 'image')}"
            )
        of_text = _WORD.findall(text)
        words = of_text
        if request.images:
            words = _WORD.findall(" ".join([text, *(image.digest.hex() for image in request.images)]))
        kept = words[: request.sampling.max_tokens]
        answer = Completion(0, "".join(kept), tuple(range(len(kept))), "stop" if len(kept) == len(words) else "length")
        image_tokens = self._image_tokens * len(request.images)
        uses = []
        for image in request.images:
            outcome: ImageOutcome = "hit" if image.digest in self._digests else "miss"
            self._digests.add(image.digest)
            uses.append(ImageUse(image.digest.hex(), outcome, self._image_tokens, image.width, image.height))
        usage = Usage(len(of_text) + image_tokens, len(kept), image_tokens, cached_tokens=0)
        self._prompt_tokens += usage.input_tokens
        self._generation_tokens += usage.output_tokens
        e2e_ms = (time.perf_counter() - start) * 1000
        output = RequestOutput(
            request_id=request.request_id,
            text=answer.text,
            token_ids=answer.token_ids,
            finish_reason=answer.finish_reason,
            usage=usage,
            timings=RequestTimings((admitted - start) * 1000, time_to_first_token_ms=e2e_ms, e2e_ms=e2e_ms),
            images=tuple(uses),
            outputs=(answer,),
        )
        return output, kept


def _text_and_num_placeholders(request: Request) -> tuple[str, int]:
    if request.prompt is not None:
        return request.prompt, request.prompt.count(IMAGE_PLACEHOLDER)
    texts: list[str] = []
    num_placeholders = 0
    for message in request.messages or ():
        content: Any = message.get("content") or ""
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if isinstance(part, Mapping) and part.get("type") == "text":
                texts.append(str(part.get("text", "")))
            else:
                num_placeholders += 1
    return "\n".join(texts), num_placeholders
