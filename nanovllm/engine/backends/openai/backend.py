"""The backend: requests to the endpoints, faults of servers away from requests, outputs back."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import ssl
import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nanovllm.engine.backends.base import EngineBackend, Generation, Request
from nanovllm.engine.backends.openai.answer import Answer
from nanovllm.engine.backends.openai.endpoint import PROBE_SAMPLING, Endpoint
from nanovllm.engine.backends.openai.estimates import request_tokens
from nanovllm.engine.backends.openai.faults import EndpointFault
from nanovllm.engine.backends.openai.listings import Listing, ask_each, lacks_model, model_in, smallest_context
from nanovllm.engine.backends.openai.options import OpenAIOptions
from nanovllm.engine.backends.openai.pool import Pool
from nanovllm.engine.backends.openai.request_body import RequestBody, request_body
from nanovllm.engine.backends.openai.watch import Watch
from nanovllm.engine.outputs import ImageUse, ModelInfo, RequestOutput, RequestTimings, TokenChunk, Usage
from nanovllm.errors import (
    AnswerFailed,
    AnswerWithheld,
    ApiKeyRefused,
    ConfigurationError,
    EndpointsUnavailable,
    EngineDead,
    InvalidInput,
    ModelNotFound,
    PromptTooLong,
    SystemicError,
    UnsupportedConstraint,
)
from nanovllm.sampling_params import Constraint
from nanovllm.statistics import EngineStats
from nanovllm.vision.images.preprocess import ImageTransform

if TYPE_CHECKING:
    from nanovllm.vision.images.preprocess import PreparedImage

logger = logging.getLogger(__name__)

UNKNOWN = "unknown"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 10.0
"""Between the attempts of a request that has no other endpoint, and between looks at servers that are not up yet."""
TOLD_FAILURES = (10, 100)
"""Of one request: after so many the log names it."""


@dataclass
class _Times:
    """Moments of a request, of ``time.perf_counter``, and its failures; ``sent`` and later ones of its last attempt."""

    begun: float
    failures: int
    sent: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


class OpenAIEngine(EngineBackend):
    """Servers of OpenAI's protocol that serve one model, as one engine.

    A server that does not connect, hangs, breaks off, is busy, or answers garbage is never its request's fault: the
    request goes to another endpoint, or waits; what it has streamed is void then (`Generation.restart`). Where no
    endpoint takes requests it ends with a SystemicError, which another try may not. A request that a server refuses
    (400, 413, 422) ends with InvalidInput.
    """

    name = "openai"

    def __init__(self, options: OpenAIOptions) -> None:
        """Raises ConfigurationError: ``ca_file`` cannot be read."""
        transform = ImageTransform.for_files(options.image_format) if options.images else None
        super().__init__(
            ModelInfo(options.model or UNKNOWN, options.revision, UNKNOWN), transform, options.max_num_seqs
        )
        self._options = options
        self.capabilities = options.capabilities
        context = _ssl_context(options)
        self._endpoints = [Endpoint(one, options, context) for one in options.endpoints]
        self._pool = Pool(self._endpoints, max_outstanding=options.max_num_seqs, slack=options.affinity_slack)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._answers: dict[str, Answer] = {}
        self._usage = (0, 0)
        self._watch: Watch | None = None

    async def start(self) -> None:
        """Learn the model from the servers; waits until one of them is up.

        Raises:
            ModelNotFound: no server lists the model.
            ConfigurationError: it must be named, an address is wrong, or every server refuses its API key.
        """
        pause_s = FIRST_PAUSE_S
        while not await self._look():
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        urls = ", ".join(endpoint.url for endpoint in self._endpoints)
        context = self.capabilities.context or "that no server tells"
        self._watch = Watch(
            self._endpoints,
            self._check,
            model=self.model_info.id,
            tick_s=self._options.breaker_wait_s,
            idle_s=self._options.breaker_max_wait_s,
        )
        model, dialect = self.model_info.id, self._options.dialect.name
        logger.info("model %s of %s: dialect %s, context %s", model, urls, dialect, context)

    async def listings(self, timeout_s: float | None = None) -> dict[str, Listing | EndpointFault | None]:
        """What each endpoint answers when it is asked for its models, once: their contexts, None for no list.

        ``timeout_s`` as in `ask_each`. Raises ConfigurationError: none of the addresses is one of a server.
        """
        answers = await ask_each(self._endpoints, self.model_info.id, self._probe, timeout_s)
        return {endpoint.url: answer for endpoint, answer in answers.items()}

    async def _look(self) -> bool:
        """Whether an endpoint is up that has the model, which is known then; the others are left out until they do."""
        answers = await ask_each(self._endpoints, self.model_info.id, self._probe)
        listings = {one: found for one, found in answers.items() if not isinstance(found, EndpointFault)}
        faults = {one: found for one, found in answers.items() if isinstance(found, EndpointFault)}
        model = model_in(listings.values(), self._options.model) if listings else ""
        missing = {one: fault for one, found in listings.items() if (fault := lacks_model(found, model)) is not None}
        if len(missing) == len(self._endpoints):
            endpoint, fault = next(iter(missing.items()))
            raise ModelNotFound(f"{endpoint.url} {fault}: `NANOVLLM_ENGINE__MODEL` names one of these")
        for endpoint, fault in (faults | missing).items():
            endpoint.note(fault)
            endpoint.breaker.open()
            logger.warning("%s %s", endpoint.url, fault)
        if listings.keys() > missing.keys():
            having = [found for one, found in listings.items() if one not in missing]
            context = smallest_context(having, model, self._options.default_max_tokens)
            self.model_info = replace(self.model_info, id=model)
            self.capabilities = replace(self.capabilities, context=context)
            for endpoint in listings.keys() - missing.keys():
                endpoint.succeeded()
            return True
        error = self._pool.unavailable()
        if isinstance(error, ApiKeyRefused):
            raise ConfigurationError(error.in_one_line)
        logger.warning("waiting for the engine: %s", error.in_one_line)
        return False

    def find_image(self, file_digest: bytes, cache_salt: bytes) -> PreparedImage | None:
        """Never: the servers keep embeddings, if anything."""
        return None

    async def compile(self, constraint: Constraint) -> None:
        """The servers compile it. Raises UnsupportedConstraint where they would not, or would not enforce it."""
        dialect = self._options.dialect
        if constraint.kind not in self.capabilities.guided:
            raise UnsupportedConstraint(f"{dialect.title} has no {constraint.kind}")
        if constraint.kind == "json_schema":
            dialect.check_schema(json.loads(constraint.text))

    async def fits(self, request: Request) -> bool:
        """Whether ``request`` has no more images than is allowed, and by estimate no more tokens than the context.

        A context that no server tells has room. Raises EngineDead.
        """
        if not await super().fits(request) or len(request.images) > self._options.max_images_per_request:
            return False
        context = self.capabilities.context
        return context is None or request_tokens(request) <= context

    @property
    def output_options(self) -> Mapping[str, Any]:
        """Dialect, format of images, and variables of the chat template."""
        own = {"dialect": self._options.dialect.name, "chat_template_kwargs": self._options.chat_template_kwargs}
        return {**super().output_options, **own}

    def _begin(self, request: Request, generation: Generation) -> None:
        task = asyncio.create_task(self._run(request, generation), name="nanovllm-request")
        self._tasks[request.request_id] = task
        task.add_done_callback(lambda done: self._forget(request.request_id, done))

    def _forget(self, request_id: str, done: asyncio.Task[None]) -> None:
        if self._tasks.get(request_id) is done:  # an aborted request's id may be in use again
            del self._tasks[request_id]

    def abort(self, request_id: str) -> None:
        """End a request early, with the text so far; its connection closes, by which the server learns of it."""
        generation = self._generations.pop(request_id, None)
        if generation is None:
            return
        self._tasks[request_id].cancel()
        answer = self._answers.pop(request_id, None)
        text = answer.first_text if answer is not None else ""
        usage = answer.usage() if answer is not None else Usage(0, 0, 0, 0)
        output = RequestOutput(request_id, text, (), "abort", usage, RequestTimings())
        generation.deliver(TokenChunk("", (), "abort"), output)

    @property
    def outage(self) -> SystemicError | None:
        """What each endpoint did last, where no request would be answered now."""
        may_answer = any(not one.breaker.is_open or one.refuses_all for one in self._endpoints)
        return None if may_answer else self._pool.unavailable()

    def stats(self) -> EngineStats:
        """Requests at the endpoints and those that wait, tokens as the servers count them, and each endpoint's."""
        running = self._pool.outstanding
        return EngineStats(
            num_requests_running=running,
            num_requests_waiting=max(0, len(self._generations) - running),
            prompt_tokens=self._usage[0],
            generation_tokens=self._usage[1],
            endpoints=tuple(endpoint.stats() for endpoint in self._endpoints),
        )

    async def close(self) -> None:
        """Stop; unfinished generations end with EngineDead."""
        self._die(EngineDead("the engine was closed"))
        if self._watch is not None:
            await self._watch.close()
        tasks = tuple(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._pool.close()
        await asyncio.gather(*(endpoint.close() for endpoint in self._endpoints))

    async def _run(self, request: Request, generation: Generation) -> None:
        times = _Times(begun=time.perf_counter(), failures=request.failures)
        try:
            body = request_body(request, self.model_info.id, self._options)
            answer = await self._answer(request, body, generation, times)
            output = self._output(request, answer, times)
        except Exception as error:
            self._generations.pop(request.request_id, None)
            if isinstance(error, EndpointsUnavailable):
                error.request_failures = times.failures
            generation.fail(error)
            return
        finally:
            self._answers.pop(request.request_id, None)
        self._generations.pop(request.request_id, None)
        usage = output.usage
        self._usage = self._usage[0] + usage.input_tokens, self._usage[1] + usage.output_tokens
        *others, last = output.outputs
        for one in others:
            generation.deliver(TokenChunk("", (), one.finish_reason, one.index))
        generation.deliver(TokenChunk("", (), last.finish_reason, last.index), output)

    async def _answer(self, request: Request, body: RequestBody, generation: Generation, times: _Times) -> Answer:
        """The whole answer of one endpoint, after as many faults of endpoints as there are."""
        pause_s, options = FIRST_PAUSE_S, self._options
        failed: set[Endpoint] = set()
        while True:
            async with self._pool.lease(request.priority, body.affinity, failed) as lease:
                endpoint = lease.endpoint
                try:
                    if lease.is_trial and not endpoint.refuses_all and not await self._check(endpoint):
                        failed.add(endpoint)
                    else:
                        return await self._attempt(endpoint, request, body, options, generation, times)
                except (InvalidInput, AnswerWithheld, AnswerFailed) as refusal:
                    if isinstance(refusal, InvalidInput) and body.has_urls(options):
                        logger.warning("%s %s; its images are sent inside it now", endpoint.url, refusal)
                        options = replace(options, sign_url=None)
                    elif await self._is_its_own(refusal, endpoint):
                        endpoint.succeeded()
                        raise
                    else:
                        failed.add(endpoint)
                    generation.restart()
                except EndpointFault as fault:
                    endpoint.failed(fault, request.request_id)
                    generation.restart()
                    logger.warning("%s %s", endpoint.url, fault)
                    if fault.kind == "error":
                        options = replace(options, sign_url=None)  # it may not reach the object store
                    if fault.kind != "overloaded":
                        times.failures += 1
                        failed.add(endpoint)
                    if self._options.max_attempts is not None and times.failures >= self._options.max_attempts:
                        raise AnswerFailed(f"{times.failures} failures; in the last one the server {fault}") from None
                    if times.failures in TOLD_FAILURES and fault.kind != "overloaded":
                        logger.warning(
                            "request %s has failed %d times, the last time at %s, which %s: remote.max_attempts, or a "
                            "deadline of its job, would end it",
                            request.request_id,
                            times.failures,
                            endpoint.url,
                            fault,
                        )
                    if endpoint.is_doubtful and not endpoint.checking.locked():
                        await self._check(endpoint)
            if self._pool.is_down:
                raise self._pool.unavailable()
            if failed and not self._pool.has_others(failed):
                failed.clear()
                await asyncio.sleep(random.uniform(0.5, 1.0) * pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _is_its_own(self, refusal: Exception, endpoint: Endpoint) -> bool:
        """Whether what ``endpoint`` said to a request is about that request: it answers one of our own."""
        if not isinstance(refusal, InvalidInput) or isinstance(refusal, PromptTooLong):
            return True
        return await self._check(endpoint, refusal)

    async def _check(self, endpoint: Endpoint, refusal: InvalidInput | None = None) -> bool:
        """Whether ``endpoint`` takes requests now, by what it answers to one of our own.

        Several others failed there, its circuit is open, or it has refused one. Requests that ask at the same time
        share an answer.
        """
        now = time.monotonic()
        async with endpoint.checking:
            if endpoint.checked_at > now:
                return not endpoint.breaker.is_open and not endpoint.is_paused
            if endpoint.is_paused or (refusal is not None and endpoint.breaker.is_left_out):
                return False
            try:
                await endpoint.check(self.model_info.id, self._probe, refusal)
            except EndpointFault as fault:
                logger.warning("%s %s: no requests go there", endpoint.url, fault)
                return False
        self._pool.serve()
        return not endpoint.is_paused

    @property
    def _probe(self) -> bytes:
        """The shortest request there is."""
        request = Request("probe", prompt="ok", sampling=PROBE_SAMPLING)
        options = replace(self._options, chat_template_kwargs={})
        return request_body(request, self.model_info.id, options).encode(options)

    async def _attempt(
        self,
        endpoint: Endpoint,
        request: Request,
        body: RequestBody,
        options: OpenAIOptions,
        generation: Generation,
        times: _Times,
    ) -> Answer:
        # In a thread: signing may ask for credentials, and an image takes a while to encode.
        encoded = await asyncio.to_thread(body.encode, options) if body.images else body.encode(options)
        answer = Answer(
            request.sampling,
            context=self.capabilities.context,
            secrets=endpoint.secrets,
            models=endpoint.names_of(self.model_info.id),
        )
        self._answers[request.request_id] = answer
        times.sent, times.first_token = time.perf_counter(), 0.0
        async with aclosing(endpoint.answer(body.path, encoded, answer.max_bytes)) as events:
            async for event in events:
                for chunk in answer.add(event):
                    times.last_token = time.perf_counter()
                    if not times.first_token:
                        times.first_token = times.last_token
                    generation.deliver(chunk)
        if not answer.is_finished:
            raise EndpointFault("reset", "ends the answer before its end")
        endpoint.answered()
        return answer

    def _output(self, request: Request, answer: Answer, times: _Times) -> RequestOutput:
        outputs, usage = answer.completions(), answer.usage()
        first, ended = outputs[0], time.perf_counter()
        generation_ms = (times.last_token - times.first_token) * 1000 if times.first_token else 0.0
        tokens = max(0, usage.output_tokens // len(outputs) - 1)
        timings = RequestTimings(
            queue_ms=(times.sent - times.begun) * 1000,
            time_to_first_token_ms=((times.first_token or ended) - times.begun) * 1000,
            generation_ms=generation_ms,
            mean_itl_ms=generation_ms / tokens if tokens else 0.0,
            e2e_ms=(ended - times.begun) * 1000,
        )
        return RequestOutput(
            request_id=request.request_id,
            text=first.text,
            token_ids=first.token_ids,
            finish_reason=first.finish_reason,
            usage=usage,
            timings=timings,
            images=tuple(ImageUse(one.digest.hex(), "miss", 0, one.width, one.height) for one in request.images),
            logprobs=first.logprobs,
            outputs=outputs,
            is_constrained=request.sampling.constraint is not None,  # the server has taken it
        )


def _ssl_context(options: OpenAIOptions) -> ssl.SSLContext:
    if not any(endpoint.url.startswith("https:") for endpoint in options.endpoints):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody; the system's certificates take 30 ms to read
    try:
        return ssl.create_default_context(cafile=None if options.ca_file is None else str(options.ca_file))
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"remote.ca_file {options.ca_file} cannot be read: {error.strerror}") from error
