"""The engine beside an event loop: one thread steps, the loop awaits.

The thread owns the ``LLMEngine`` from ``start`` to ``close``; the loop owns the generations. They exchange commands
through one queue and outputs through ``call_soon_threadsafe``, one call a step, and share nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nanovllm.engine.backends.base import EngineBackend, Generation, Request
from nanovllm.engine.backends.capabilities import ENGINE_FEATURES, Capabilities
from nanovllm.engine.backends.prompt_tokens import prompt_tokens
from nanovllm.engine.config import HAND_WRITTEN_ALONE, WITHOUT_STATES_ALONE
from nanovllm.engine.outputs import StepOutput
from nanovllm.errors import EngineDead, InvalidInput
from nanovllm.sampling_params import Constraint
from nanovllm.statistics import EngineStats

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine
    from nanovllm.vision.images.preprocess import PreparedImage

logger = logging.getLogger(__name__)

MAX_COMMANDS_BETWEEN_STEPS = 256

GENERIC = Capabilities(deterministic=False, settings=ENGINE_FEATURES - frozenset(HAND_WRITTEN_ALONE))
"""Of a model that runs through transformers' own layers."""
GENERIC_WITH_STATES = replace(GENERIC, settings=GENERIC.settings - frozenset(WITHOUT_STATES_ALONE))


@dataclass(frozen=True)
class _FitCheck:
    """A request that is measured, not run."""

    request: Request
    answer: asyncio.Future[bool]


class AsyncEngine(EngineBackend):
    """Many requests at once on one ``LLMEngine``, which no other code may call until ``close``.

    An error of one request ends its generation only. An exception in a step, or a step that lasts longer than
    ``step_timeout_s`` (None: no bound), kills the engine: every generation, running or later, raises EngineDead, and
    ``dead`` is set. A dead engine never recovers: its process should end.
    """

    name = "native"

    def __init__(self, engine: LLMEngine, *, step_timeout_s: float | None = 300.0) -> None:
        transform = engine.processor.encoder.transform if engine.processor is not None else None
        super().__init__(engine.model_info, transform, engine.scheduler.max_num_seqs)
        self.generation_defaults = engine.generation_defaults
        able = self.capabilities
        if engine.model_runner.trial is not None:
            self.name = "generic"
            able = GENERIC_WITH_STATES if engine.model_runner.model.has_states else GENERIC
        self.capabilities = replace(able, images=transform is not None, context=engine.max_model_len)
        self._engine = engine
        self._step_timeout_s = step_timeout_s
        # A request to add or to measure, the id of one to abort, or None, which ends the thread.
        self._commands: queue.SimpleQueue[Request | _FitCheck | str | None] = queue.SimpleQueue()
        self._fit_checks: set[asyncio.Future[bool]] = set()
        self._compiling: dict[str, bool] = {}  # what is compiled or preprocessed -> aborted meanwhile
        self._prepared_s = 0.0  # in which every request was compiled or preprocessed
        self._preparing_since: float | None = None
        self._preprocessing = ThreadPoolExecutor(1, thread_name_prefix="nanovllm-images")
        self._stats = engine.stats()
        self._step_started: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._watchdog: asyncio.Task[None] | None = None

    def find_image(self, file_digest: bytes, cache_salt: bytes) -> PreparedImage | None:
        """The image that came in a file of this SHA-256, embedded already; None where it is not at hand."""
        processor = self._engine.processor
        return processor.find(file_digest, cache_salt) if processor is not None else None

    async def start(self) -> None:
        """Start the engine thread. Once only."""
        if self._thread is not None:
            raise RuntimeError("the engine was started before")
        self._loop = asyncio.get_running_loop()
        # A daemon: a step that never ends must not keep a process alive that wants to exit.
        self._thread = threading.Thread(target=self._run, args=(self._loop,), name="nanovllm-engine", daemon=True)
        self._thread.start()
        if self._step_timeout_s is not None:
            self._watchdog = self._loop.create_task(self._watch(self._step_timeout_s), name="nanovllm-watchdog")

    async def compile(self, constraint: Constraint) -> None:
        """Compile ``constraint``; requests with it then find it compiled. Raises UnsupportedConstraint."""
        await asyncio.wrap_future(self._engine.input_processor.grammars.compile(constraint))

    async def fits(self, request: Request) -> bool:
        """Whether ``request`` is taken as it is, with room for its whole answer; told between two steps.

        Context, KV cache and ``max_images_per_request`` count. Raises EngineDead.
        """
        if self.death is not None:
            raise self.death
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._fit_checks.add(answer)
        self._commands.put(_FitCheck(request, answer))
        try:
            return await answer
        finally:
            self._fit_checks.discard(answer)

    @property
    def output_options(self) -> Mapping[str, Any]:
        """Vision tower and transform, formats of numbers, and variables of the chat template."""
        processor, config = self._engine.processor, self._engine.config
        images = None if processor is None else processor.encoder.revision
        names = ("dtype", "quantization", "kv_cache_dtype", "num_vision_tokens", "chat_template_kwargs")
        return {"images": images, **{name: getattr(config, name) for name in names}}

    def beginning(self, text: str, max_tokens: int) -> str:
        """The beginning of ``text`` with at most so many tokens. Raises InvalidInput: no tokenizer takes the text."""
        return self._engine.input_processor.prompts.beginning(text, max_tokens)

    def submit(self, request: Request) -> Generation:
        """Queue ``request``; whatever is wrong with it ends its generation. Its text is untrusted."""
        if self._thread is None:
            raise RuntimeError("start() the engine before the first submit()")
        return super().submit(request)

    def _begin(self, request: Request, generation: Generation) -> None:
        """Compile a constraint and preprocess images first, beside steps and loop."""
        constraint, processor = request.sampling.constraint, self._engine.processor
        waits: list[asyncio.Future[Any]] = []
        if constraint is not None:
            waits.append(asyncio.wrap_future(self._engine.input_processor.grammars.compile(constraint)))
        if request.images and processor is not None and processor.encoder.preprocesses:
            work = self._preprocessing.submit(processor.preprocess, request.images, request.cache_salt)
            waits.append(asyncio.wrap_future(work))
        if not waits:
            self._commands.put(request)
            return
        self._compiling[request.request_id] = False
        self._note_preparation()
        compiling: asyncio.Future[Any] = waits[0] if len(waits) == 1 else asyncio.gather(*waits)

        def queue_request(done: asyncio.Future[object]) -> None:
            aborted = self._compiling.pop(request.request_id)
            self._note_preparation()
            if done.cancelled():  # the engine was closed, which ended the generation
                return
            error = done.exception()
            if error is not None:
                self._refuse(request.request_id, error)
                return
            self._commands.put(request)
            if aborted:
                self._commands.put(request.request_id)

        compiling.add_done_callback(queue_request)

    def abort(self, request_id: str) -> None:
        """End a request early, at the next step; its generation ends with ``finish_reason == "abort"``."""
        if request_id in self._compiling:
            self._compiling[request_id] = True
        elif request_id in self._generations:
            self._commands.put(request_id)

    def stats(self) -> EngineStats:
        """The engine's figures after its last step; requests that it has not seen yet count as waiting."""
        stats = self._stats
        unseen = max(0, len(self._generations) - stats.num_requests_running - stats.num_requests_waiting)
        self._note_preparation()
        return replace(
            stats,
            num_requests_waiting=stats.num_requests_waiting + unseen,
            image_seconds=stats.image_seconds + self._prepared_s,
        )

    def _note_preparation(self) -> None:
        now = time.monotonic()
        if self._preparing_since is not None:
            self._prepared_s += now - self._preparing_since
        has_others = len(self._generations) > len(self._compiling)
        self._preparing_since = now if self._compiling and not has_others else None

    async def close(self) -> None:
        """End the thread after its current step and close the engine; unfinished generations end with EngineDead."""
        self._die(EngineDead("the engine was closed"))
        if self._watchdog is not None:
            self._watchdog.cancel()
        if self._thread is not None:
            self._commands.put(None)
            self._preprocessing.shutdown(wait=False, cancel_futures=True)
            await asyncio.to_thread(self._thread.join, self._step_timeout_s)

    async def _watch(self, step_timeout_s: float) -> None:
        while self.death is None:
            await asyncio.sleep(min(1.0, step_timeout_s / 4))
            started = self._step_started
            if started is not None and time.monotonic() - started > step_timeout_s:
                logger.critical("a step has not ended after %.1f s", step_timeout_s)
                self._die(EngineDead(f"a step has not ended after {step_timeout_s:g} s"))

    def _deliver(self, outputs: list[StepOutput]) -> None:
        """In the loop: hand the outputs of one step to their generations."""
        for output in outputs:
            generation = self._generations.get(output.request_id)
            if generation is None:
                continue
            if output.finished is not None or output.failure is not None:
                del self._generations[output.request_id]
                if self._compiling:
                    self._note_preparation()
            if output.failure is not None:
                generation.fail(output.failure)
            else:
                generation.deliver(output.chunk, output.finished)

    def _die(self, death: EngineDead) -> None:
        super()._die(death)
        for answer in self._fit_checks:
            _tell(answer, death)

    def _refuse(self, request_id: str, error: BaseException) -> None:
        """In the loop: a request could not be added."""
        generation = self._generations.pop(request_id, None)
        if generation is not None:
            generation.fail(error)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        """The engine thread: commands, step, outputs, until closed or dead."""
        try:
            self._engine.model_runner.use_in_this_thread()
            while self._run_commands(loop):
                if not self._engine.has_unfinished():
                    continue
                self._step_started = time.monotonic()
                outputs = self._engine.step()
                self._step_started = None
                self._stats = self._engine.stats()
                if outputs:
                    loop.call_soon_threadsafe(self._deliver, outputs)
        except BaseException as error:
            logger.critical("the engine died", exc_info=error)
            death = EngineDead(f"the engine stopped on {type(error).__name__}")
            death.__cause__ = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._die, death)
        finally:
            self._step_started = None
            self._engine.close()

    def _run_commands(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Run the queued commands, waiting for one when there is nothing to compute; False after ``close``.

        An idle engine that gets a request with images waits ``encoder_linger_s`` for more, to encode them in one batch.
        """
        was_idle, linger_until = not self._engine.has_unfinished(), 0.0
        # Bounded: who measures again at every answer would keep the queue full, and no step would come.
        for _ in range(MAX_COMMANDS_BETWEEN_STEPS):
            timeout_s = max(0.0, linger_until - time.monotonic()) if self._engine.has_unfinished() else None
            try:
                command = self._commands.get(timeout=timeout_s)
            except queue.Empty:
                return True
            if command is None:
                return False
            if isinstance(command, str):
                self._engine.abort(command)
            elif isinstance(command, _FitCheck):
                try:
                    fits: bool | Exception = self._fits(command.request)
                except Exception as error:
                    fits = error
                loop.call_soon_threadsafe(_tell, command.answer, fits)
            else:
                try:
                    self._add(command)
                except Exception as error:
                    loop.call_soon_threadsafe(self._refuse, command.request_id, error)
                if was_idle and not linger_until and any(image.embedding is None for image in command.images):
                    linger_until = time.monotonic() + self._engine.config.encoder_linger_s
            self._stats = self._engine.stats()
        return True

    def _add(self, request: Request) -> None:
        self._engine.add_request(
            prompt_tokens(self._engine.input_processor.prompts, request),
            request.sampling,
            images=request.images,
            request_id=request.request_id,
            priority=request.priority,
            cache_salt=request.cache_salt,
        )

    def _fits(self, request: Request) -> bool:
        try:
            tokens = prompt_tokens(self._engine.input_processor.prompts, request)
        except InvalidInput:
            return False
        return self._engine.input_processor.fits(tokens, request.sampling, request.images)


def _tell(answer: asyncio.Future[bool], fits: bool | Exception) -> None:
    if answer.done():
        return
    if isinstance(fits, Exception):
        answer.set_exception(fits)
    else:
        answer.set_result(fits)
