"""The infer stage: the engine's output for a request. What is optional wraps it: response cache, crash guard.

The wrappers from the outside: ``TimeStage``, ``MeterTokens``, ``ReuseResponses``, ``WaitForSlot``, ``GuardCrashes``,
``AwaitServers``, ``CallEngine``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import count

from nanovllm.engine.backends.base import EngineBackend, Request
from nanovllm.engine.outputs import ModelInfo, RequestOutput, RequestTimings
from nanovllm.errors import CredentialsRefused, EndpointsUnavailable
from nanovllm.messages.job import Job
from nanovllm.metrics import Metrics
from nanovllm.pipeline.admission.engine_queue import EngineQueue
from nanovllm.pipeline.admission.tenant_shares import TokenRates
from nanovllm.pipeline.consuming.crash_guard import CrashGuard
from nanovllm.pipeline.stages.admit import AdmittedJob
from nanovllm.pipeline.stages.caches import SingleFlightCache
from nanovllm.pipeline.stages.context import Inference
from nanovllm.pipeline.stages.retry import Retry
from nanovllm.value_object import changed
from nanovllm.vision.images.preprocess import PreparedImage

Infer = Callable[[Request, AdmittedJob], Awaitable[Inference]]

_BYTES_A_TOKEN = 64  # its number, its text, and what Python puts around them
_BYTES_AN_ANSWER = 2_048


def request_of(job: Job, images: tuple[PreparedImage, ...], admitted: AdmittedJob) -> Request:
    """The request of a job."""
    return Request(
        request_id=job.job_id or "",
        prompt=job.prompt,
        messages=job.message_dicts(),
        images=images,
        sampling=admitted.sampling,
        priority=admitted.queued.engine_priority,
        cache_salt=admitted.context.salt,
        chat_template_kwargs=job.chat_template_kwargs,
    )


class CallEngine:
    """Submits requests to the engine; a call that is cancelled aborts its request."""

    def __init__(self, engine: EngineBackend) -> None:
        self._engine = engine
        self._numbers = count(1)

    async def __call__(self, request: Request, admitted: AdmittedJob) -> Inference:
        """The engine's output."""
        # One job may be at work twice, delivered again or sent again: the number keeps the two apart.
        own_id = f"{request.request_id}#{next(self._numbers)}"
        generation = self._engine.submit(changed(request, request_id=own_id))
        try:
            return Inference(await generation)
        finally:
            generation.abort()


ENGINE_ENDPOINTS = "engine endpoints"
"""The part whose fault it is that no server of the engine takes requests."""


class AwaitServers:
    """Holds requests while no server of the engine takes any, and the worker takes no work meanwhile."""

    def __init__(self, infer: Infer, retry: Retry) -> None:
        self._infer = infer
        self._retry = retry

    async def __call__(self, request: Request, admitted: AdmittedJob) -> Inference:
        """As ``infer``, which is called again for as long as it raises EndpointsUnavailable or CredentialsRefused."""

        failures = 0

        async def attempt() -> Inference | Exception:
            nonlocal failures
            try:
                return await self._infer(replace(request, failures=failures), admitted)
            except EndpointsUnavailable as error:
                failures = error.request_failures
                raise
            except CredentialsRefused:
                raise
            except Exception as error:
                return error  # of the request, or of the engine for good: not to be tried again

        outcome = await self._retry(attempt, ENGINE_ENDPOINTS, admitted.context.progress)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


class GuardCrashes:
    """Records each job in ``topics.in_flight`` before the engine starts it; suspects of a crash run alone.

    ``is_whole`` False: the requests are parts of jobs, such as pages of documents.
    """

    def __init__(self, infer: Infer, guard: CrashGuard, retry: Retry, *, is_whole: bool = True) -> None:
        self._infer = infer
        self._guard = guard
        self._retry = retry
        self._is_whole = is_whole

    async def __call__(self, request: Request, admitted: AdmittedJob) -> Inference:
        """As ``infer``. Raises CrashedWorker where the job has ended as many workers as are allowed."""
        record = admitted.context.record
        async with self._guard.enter(record, is_whole=self._is_whole):
            await self._retry(lambda: self._guard.recorded(record), "kafka producer", admitted.context.progress)
            return await self._infer(request, admitted)


class WaitForSlot:
    """Holds one of the engine queue's slots, in the queue's order, while the engine has the job."""

    def __init__(self, infer: Infer, queue: EngineQueue) -> None:
        self._infer = infer
        self._queue = queue

    async def __call__(self, request: Request, admitted: AdmittedJob) -> Inference:
        """As ``infer``."""
        async with self._queue.slot(admitted.queued):
            return await self._infer(request, admitted)


class ReuseResponses:
    """Answers equal greedy jobs of one model from a cache, where the job or ``reuse.level`` allows it."""

    def __init__(self, infer: Infer, model: ModelInfo, metrics: Metrics, *, max_bytes: int) -> None:
        self._infer = infer
        self._model = model
        self._metrics = metrics
        self._cache = SingleFlightCache(max_bytes)

    async def __call__(self, request: Request, admitted: AdmittedJob) -> Inference:
        """As ``infer``, or an equal job's output, which has no timings of its own."""
        if not (admitted.reuses_responses and request.sampling.is_greedy):
            return await self._infer(request, admitted)

        async def make() -> tuple[RequestOutput, int]:
            output = (await self._infer(request, admitted)).output
            tokens = sum(len(one.token_ids) for one in output.outputs)
            return output, _BYTES_AN_ANSWER + _BYTES_A_TOKEN * tokens

        sampling = request.sampling.model_dump(mode="json", exclude={"seed"})
        digests = [image.digest.hex() for image in request.images]
        asked = json.dumps([request.prompt, request.messages, request.chat_template_kwargs, sampling, digests])
        # A digest: a job's schema alone may have 256 K characters.
        key = (self._model, admitted.context.salt, hashlib.sha256(asked.encode()).digest())
        output, reuse = await self._cache.get(key, make)
        self._metrics.reuse.labels("answer", reuse).inc()
        if reuse == "miss":
            return Inference(output)
        uses = tuple(replace(use, outcome="hit") for use in output.images)
        return Inference(replace(output, timings=RequestTimings(), images=uses), reuse)


class MeterTokens:
    """Charges the tenant for the tokens that were computed in place of admission's estimate."""

    def __init__(self, infer: Infer, queue: EngineQueue, rates: TokenRates) -> None:
        self._infer = infer
        self._queue = queue
        self._rates = rates

    async def __call__(self, request: Request, admitted: AdmittedJob) -> Inference:
        """As ``infer``."""
        inference = await self._infer(request, admitted)
        queued, used = admitted.queued, 0
        if inference.reused is None:
            used = inference.output.usage.input_tokens + inference.output.usage.output_tokens
            self._queue.settle(queued, used)
        self._rates.charge(queued.tenant, used - queued.tokens)
        return inference


class TimeStage:
    """Times the stage of a job; the pages of a document run together, and the document has its own time."""

    def __init__(self, infer: Infer) -> None:
        self._infer = infer

    async def __call__(self, request: Request, admitted: AdmittedJob) -> Inference:
        """As ``infer``."""
        with admitted.context.progress.stage("infer"):
            return await self._infer(request, admitted)
