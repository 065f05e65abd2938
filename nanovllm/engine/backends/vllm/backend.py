"""The backend: requests to vLLM's engine in this process, its outputs back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.exceptions import VLLMClientError, VLLMError
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.sampling_params import SamplingParams as VllmSamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from nanovllm.engine.backends.base import EngineBackend, Generation, Request
from nanovllm.engine.backends.foreign_errors import refusal, shown
from nanovllm.engine.backends.prompt_tokens import prompt_tokens
from nanovllm.engine.backends.vllm.answer import Answer
from nanovllm.engine.backends.vllm.loading import LoadedVllm
from nanovllm.engine.backends.vllm.options import VllmOptions
from nanovllm.engine.backends.vllm.prompt import image_runs, vllm_prompt
from nanovllm.engine.backends.vllm.sampling import CAPABILITIES, constraint_fields, sampling_fields
from nanovllm.engine.outputs import TokenChunk
from nanovllm.errors import (
    AnswerFailed,
    EngineDead,
    InvalidImage,
    InvalidInput,
    PlaceholderMismatch,
    PromptTooLong,
    UnsupportedModel,
    counted,
)
from nanovllm.image_placeholder import IMAGE_PLACEHOLDER
from nanovllm.sampling_params import Constraint, SamplingParams
from nanovllm.statistics import EngineStats
from nanovllm.vision.images.preprocess import AS_DECODED, PreparedImage, prepare_image

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Of a request that vLLM gives up: its two caches of images may have drifted apart, which sending it again mends."""
_MAX_SIZES = 4096  # of images whose tokens are known
_TRIAL_SIDE = 224  # pixels
_TRIAL_TEXT = "see <|image|> and <|im_end|> </s> [INST] <|image|>"
"""Texts of special tokens that are text: they must still be text behind vLLM's processor."""


class VllmEngine(EngineBackend):
    """vLLM's engine, as one engine of this project.

    Prompts are tokenised here, so that their texts never become special tokens; images go to it decoded. An error of
    one request ends its generation only. When vLLM's engine dies, or gives no output for ``step_timeout_s`` while
    requests are at work, this one is ``dead``.
    """

    name = "vllm"

    capabilities = CAPABILITIES

    def __init__(self, loaded: LoadedVllm, options: VllmOptions) -> None:
        super().__init__(loaded.model_info, AS_DECODED if loaded.has_images else None, options.max_num_seqs)
        self.generation_defaults = loaded.generation_defaults
        self.capabilities = replace(CAPABILITIES, images=loaded.has_images, context=loaded.max_model_len)
        self._loaded = loaded
        self._engine = loaded.engine
        self._options = options
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._answers: dict[str, Answer] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nanovllm-prompts")
        self._tokens_by_size: dict[tuple[int, ...], int] = {}
        self._last_progress = 0.0
        self._watchdog: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Try an image prompt. Raises UnsupportedModel: vLLM rewrites what stands around images."""
        if self._loaded.has_images:
            await self._try_images()
        self._watchdog = asyncio.create_task(self._watch(), name="nanovllm-watchdog")

    def find_image(self, file_digest: bytes, cache_salt: bytes) -> PreparedImage | None:
        """Never: vLLM finds an image by the digest of its pixels, which are decoded first."""
        return None

    async def compile(self, constraint: Constraint) -> None:
        """Compile ``constraint`` within bounds, as the native engine does. Raises UnsupportedConstraint."""
        await asyncio.wrap_future(self._loaded.grammars.compile(constraint))

    async def fits(self, request: Request) -> bool:
        """Whether prompt, images and the whole answer are within the context, and ``max_images``.

        vLLM starts with a KV cache of at least one context, so that it has room as well. Raises EngineDead.
        """
        if not await super().fits(request) or len(request.images) > self._options.max_images:
            return False
        loop = asyncio.get_running_loop()
        try:
            token_ids = await loop.run_in_executor(self._thread, prompt_tokens, self._loaded.prompts, request)
            self._check(request, token_ids)
            images = [await self._image_tokens(image) for image in request.images]
        except InvalidInput:
            return False
        total = len(token_ids) + sum(images) - len(images) + (request.sampling.max_tokens or 1)
        return total <= self._loaded.max_model_len

    async def _image_tokens(self, image: PreparedImage) -> int:
        """The tokens that vLLM's processor makes of an image, which its size decides."""
        assert image.pixels is not None
        size = image.pixels.shape[:2]
        if size not in self._tokens_by_size:
            blank = prepare_image(_grey(*size), AS_DECODED)
            token_ids = self._loaded.prompts.untrusted(IMAGE_PLACEHOLDER)
            # Past the cache of processed images: what is in it is taken to be with vLLM's engine.
            rendered = await self._rendered(token_ids, (blank,), b"", is_trial=True)
            if len(self._tokens_by_size) >= _MAX_SIZES:
                self._tokens_by_size.clear()
            (run,) = image_runs(token_ids, self._loaded.prompts.image_token_id, rendered)
            self._tokens_by_size[size] = run.length
        return self._tokens_by_size[size]

    @property
    def output_options(self) -> Mapping[str, Any]:
        """The backend's name, format of numbers, variables of the chat template, and arguments of vLLM's engine."""
        names = ("dtype", "chat_template_kwargs", "extra_args")
        return {**super().output_options, "backend": "vllm", **{name: getattr(self._options, name) for name in names}}

    def beginning(self, text: str, max_tokens: int) -> str:
        """The beginning of ``text`` with at most so many tokens. Raises InvalidInput: no tokenizer takes the text."""
        return self._loaded.prompts.beginning(text, max_tokens)

    def _begin(self, request: Request, generation: Generation) -> None:
        if len(self._generations) == 1:
            self._last_progress = time.monotonic()
        begun = time.perf_counter()
        self._answers[request.request_id] = Answer(request, begun)
        task = asyncio.create_task(self._run(request, generation, begun), name="nanovllm-request")
        self._tasks[request.request_id] = task
        task.add_done_callback(lambda done: self._forget(request.request_id, done))

    def _forget(self, request_id: str, done: asyncio.Task[None]) -> None:
        if self._tasks.get(request_id) is done:  # an aborted request's id may be in use again
            del self._tasks[request_id]

    def abort(self, request_id: str) -> None:
        """End a request early, with the text so far; vLLM is told."""
        generation = self._generations.pop(request_id, None)
        if generation is None:
            return
        self._tasks[request_id].cancel()
        answer = self._answers.pop(request_id)
        generation.deliver(TokenChunk("", (), "abort"), answer.output())

    def stats(self) -> EngineStats:
        """vLLM's own figures after its last step."""
        return self._loaded.tally.snapshot(len(self._generations))

    async def close(self) -> None:
        """Stop vLLM's engine; unfinished generations end with EngineDead."""
        self._die(EngineDead("the engine was closed"))
        tasks = [*self._tasks.values(), *([self._watchdog] if self._watchdog is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._loaded.grammars.close()
        self._thread.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._engine.shutdown)

    async def _run(self, request: Request, generation: Generation, begun: float) -> None:
        try:
            output = (await self._answer(request, generation, begun)).output()
        except EngineDeadError as error:
            self._die_of(error)
            return
        except Exception as error:
            self._generations.pop(request.request_id, None)
            generation.fail(_fault(error))
            return
        finally:
            if self._generations.get(request.request_id) in (None, generation):  # its id may be in use again
                self._answers.pop(request.request_id, None)
        self._generations.pop(request.request_id, None)
        *others, last = output.outputs
        for one in others:
            generation.deliver(TokenChunk("", (), one.finish_reason, one.index))
        generation.deliver(TokenChunk("", (), last.finish_reason, last.index), output)

    async def _answer(self, request: Request, generation: Generation, begun: float) -> Answer:
        """All that vLLM answers, after as many attempts as it takes."""
        prompts, constraint = self._loaded.prompts, request.sampling.constraint
        loop = asyncio.get_running_loop()
        token_ids = await loop.run_in_executor(self._thread, prompt_tokens, prompts, request)
        self._check(request, token_ids)
        if constraint is not None:
            await self.compile(constraint)
        for _ in range(ATTEMPTS):
            rendered = await self._rendered(token_ids, request.images, request.cache_salt)
            runs = image_runs(token_ids, prompts.image_token_id, rendered)
            answer = self._answers[request.request_id] = Answer(request, begun, runs)
            room = self._room(len(rendered["prompt_token_ids"]))
            parameters = await loop.run_in_executor(self._thread, _parameters, request.sampling, constraint, room)
            outputs = self._engine.generate(rendered, parameters, request.request_id, priority=request.priority)
            async with aclosing(outputs):
                async for output in outputs:
                    self._last_progress = time.monotonic()
                    for chunk in answer.add(output):
                        generation.deliver(chunk)
            if not answer.failed:
                return answer
            logger.warning("vLLM gave request %s up: it is sent again", request.request_id)
            generation.restart()
        raise AnswerFailed(f"vLLM's engine gave the request up {ATTEMPTS} times")

    def _check(self, request: Request, token_ids: list[int]) -> None:
        image_token_id = self._loaded.prompts.image_token_id
        places = 0 if image_token_id is None else token_ids.count(image_token_id)
        if not token_ids:
            raise InvalidInput("the prompt is empty")
        self._room(len(token_ids))
        if request.images and image_token_id is None:
            raise InvalidInput(f"{counted(len(request.images), 'image')}, but the model takes none")
        if places != len(request.images):
            raise PlaceholderMismatch(
                f"the prompt has {counted(places, 'image placeholder')} for {counted(len(request.images), 'image')}"
            )
        if len(request.images) > self._options.max_images:
            raise InvalidInput(
                f"{counted(len(request.images), 'image')}, at most {self._options.max_images} are allowed"
            )
        if any(image.pixels is None for image in request.images):
            raise InvalidInput(
                "an image was not prepared for this engine: prepare_image(source, engine.image_transform)"
            )

    def _room(self, num_tokens: int) -> int:
        """The tokens that a prompt of so many leaves. Raises PromptTooLong: none."""
        if num_tokens >= self._loaded.max_model_len:
            raise PromptTooLong(
                f"the prompt has {num_tokens} tokens; with one token of output at most {self._loaded.max_model_len} fit"
            )
        return self._loaded.max_model_len - num_tokens

    async def _rendered(
        self, token_ids: list[int], images: tuple[PreparedImage, ...], salt: bytes, *, is_trial: bool = False
    ) -> dict[str, Any]:
        """The prompt as vLLM's processor leaves it; in vLLM's own threads."""
        try:
            (rendered,) = await self._engine.renderer.render_cmpl_async(
                [vllm_prompt(token_ids, images, salt)], skip_mm_cache=is_trial
            )
        except (ValueError, RuntimeError, TypeError, AssertionError) as error:  # a processor raises whatever it likes
            if not images:
                raise
            raise InvalidImage(f"the model's processor refuses an image: {shown(str(error))}") from error
        return dict(rendered)

    async def _try_images(self) -> None:
        picture = prepare_image(_grey(_TRIAL_SIDE, _TRIAL_SIDE), AS_DECODED)
        prompts = self._loaded.prompts
        count = min(2, self._options.max_images)
        token_ids = prompts.untrusted(_TRIAL_TEXT.replace("<|image|>", "", 2 - count))
        try:
            rendered = await self._rendered(token_ids, (picture,) * count, b"", is_trial=True)
            image_runs(token_ids, prompts.image_token_id, rendered)
        except InvalidImage as error:
            raise UnsupportedModel(f"images cannot be given to {self.model_info.id!r}: {error}") from error

    async def _watch(self) -> None:
        """Find the death of vLLM's engine while nothing is asked of it, and its standing still."""
        limit_s = self._options.step_timeout_s
        while self.death is None:
            await asyncio.sleep(1.0)
            if self._engine.errored:
                self._die_of(self._engine.dead_error)
            elif limit_s is not None and self._generations and time.monotonic() - self._last_progress > limit_s:
                logger.critical("vLLM has given no output for %.1f s", limit_s)
                self._die(EngineDead(f"vLLM's engine has given no output for {limit_s:g} s"))

    def _die_of(self, error: BaseException) -> None:
        if self.death is None:
            logger.critical("vLLM's engine died", exc_info=error)
        death = EngineDead("vLLM's engine has died: its own log says of what")
        death.__cause__ = error
        self._die(death)


def _parameters(sampling: SamplingParams, constraint: Constraint | None, room: int) -> VllmSamplingParams:
    return VllmSamplingParams(
        **sampling_fields(sampling, room),
        structured_outputs=None if constraint is None else StructuredOutputsParams(**constraint_fields(constraint)),
        output_kind=RequestOutputKind.DELTA,
    )


def _fault(error: Exception) -> Exception:
    """What a request failed with: a refusal of vLLM is its own fault, any other error of vLLM may pass."""
    if isinstance(error, VLLMClientError):
        return refusal(shown(str(error)), "vLLM")
    if isinstance(error, VLLMError):
        return AnswerFailed(f"vLLM's engine fails with the request: {shown(str(error.__cause__ or error))}")
    return error


def _grey(height: int, width: int) -> Image.Image:
    from PIL import Image

    return Image.fromarray(np.full((height, width, 3), 127, np.uint8))
