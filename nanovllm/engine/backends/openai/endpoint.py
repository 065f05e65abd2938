"""One server: its connections, its list of models, and one request's answer from it."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import ssl
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from nanovllm.engine.backends.openai.answer import Answer
from nanovllm.engine.backends.openai.endpoint_breaker import Breaker
from nanovllm.engine.backends.openai.faults import NOT_FOUND, EndpointFault, fault_of_answer
from nanovllm.engine.backends.openai.options import EndpointOptions, OpenAIOptions
from nanovllm.engine.backends.openai.request_body import CHAT
from nanovllm.engine.backends.openai.transport import Transport
from nanovllm.errors import AnswerFailed, AnswerWithheld, InvalidInput, PromptTooLong
from nanovllm.sampling_params import SamplingParams
from nanovllm.statistics import EndpointStats

logger = logging.getLogger(__name__)

MAX_LIST_BYTES = 4 * 2**20
MAX_NAME_CHARS = 256
LIST_TIMEOUT_S, PROBE_TIMEOUT_S = 10.0, 30.0
PROBE_SAMPLING = SamplingParams(temperature=1.0, max_tokens=16)
"""Of the worker's own requests: models that reason refuse another temperature, and a shorter answer."""
BUSY_WAIT_S, BUSY_MAX_WAIT_S = 0.5, 30.0
_API_KEY = re.compile("api[ _-]?key", re.IGNORECASE)


class Endpoint:
    """A server with its state: requests at it, pauses that it asked for, and its circuit breaker."""

    def __init__(self, endpoint: EndpointOptions, options: OpenAIOptions, context: ssl.SSLContext) -> None:
        self.url = endpoint.url
        self.limit = options.max_concurrency
        self.outstanding = 0
        self.paused_until = 0.0
        self.last_fault: EndpointFault | None = None
        self.checking = asyncio.Lock()
        self.checked_at = 0.0
        self.heard_at = 0.0
        self.breaker = Breaker(
            threshold=options.breaker_requests,
            first_wait_s=options.breaker_wait_s,
            longest_wait_s=options.breaker_max_wait_s,
        )
        self._transport = Transport(endpoint, options, context)
        self._checks_model = options.dialect.names_listed_model
        self._listed: frozenset[str] = frozenset()
        self._busy_answers = 0
        self._answers_probes = False
        self._refusal: InvalidInput | None = None
        self._requests = 0
        self._faults: Counter[str] = Counter()
        self._timeout_s = options.request_timeout_s

    @property
    def secrets(self) -> tuple[str, ...]:
        """What no message may show."""
        return self._transport.secrets

    @property
    def is_paused(self) -> bool:
        """Whether the server wants no requests for now."""
        return time.monotonic() < self.paused_until

    def is_idle(self, seconds: float) -> bool:
        """Whether no request is at work there, and it has answered nothing for ``seconds``."""
        return not self.outstanding and time.monotonic() - self.heard_at >= seconds

    @property
    def is_doubtful(self) -> bool:
        """Whether a request of our own is to find out if it answers at all: several failed there, or found nothing."""
        is_missing = self.last_fault is not None and self.last_fault.kind == "missing"
        return self.breaker.is_suspect or (is_missing and not self.breaker.is_open)

    def stats(self) -> EndpointStats:
        """Counts since the start, and the state now."""
        return EndpointStats(
            url=self.url,
            is_up=not self.breaker.is_open,
            running=self.outstanding,
            requests=self._requests,
            faults=tuple(sorted(self._faults.items())),
        )

    async def models(self) -> dict[str, int | None] | None:
        """The models that the server lists, with their contexts where it says them; None where it has no list.

        Raises:
            EndpointFault: the server does not answer, or not with a list.
        """
        response, body = await self._transport.get("/models", MAX_LIST_BYTES, LIST_TIMEOUT_S)
        self.heard_at = time.monotonic()
        if response.status_code in NOT_FOUND:
            return None
        if response.status_code != 200:
            raise _as_fault(fault_of_answer(response.status_code, response.headers, body, self.secrets))
        try:
            models = {one["id"]: _context(one) for one in json.loads(body)["data"] or () if _is_named(one)}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise EndpointFault("garbage", "answers /models with what is no list of models") from None
        self._listed = frozenset(models)
        return models

    async def listing(self, model: str, probe: bytes) -> dict[str, int | None] | None:
        """As `models`; where there is no list an answer to ``probe`` shows that there is a server at the address.

        Raises:
            EndpointFault: it answers neither.
        """
        listed = await self.models()
        if listed is None:
            await self._ask(model, probe, None)
        return listed

    def names_of(self, model: str) -> frozenset[str] | None:
        """The names under which an answer of ``model`` may come from here; None: any."""
        return self._listed | {model} if self._checks_model else None

    @property
    def refuses_all(self) -> bool:
        """Whether its circuit opened because it refuses each request: the next one finds out whether it still does."""
        return self._refusal is not None

    async def check(self, model: str, probe: bytes, refusal: InvalidInput | None = None) -> None:
        """Open or close the circuit by what the server answers to ``probe``, a short request of our own for ``model``.

        ``refusal``: what it has said to another request. If it refuses ``probe`` in the same words, or has answered one
        before, then it is not the request that it refuses. A server that is busy is left its time (`is_paused`), and
        its circuit is closed.

        Raises:
            EndpointFault: it does not answer, refuses all, or does not list the model; the circuit is open.
        """
        self.checked_at = time.monotonic()
        try:
            await self._still_lists(model)
            if self.is_paused:
                return  # since just now, by what another request was told
            await self._ask(model, probe, refusal)
        except EndpointFault as fault:
            self.note(fault)
            if fault.kind != "overloaded":
                self.breaker.open()
                raise
        self._close_circuit()

    async def look(self, model: str) -> None:
        """Ask an idle server for its models; its circuit opens where it has a fault, or lists ``model`` no more.

        Raises:
            EndpointFault: that fault; of a busy one, which is left its time, too.
        """
        try:
            await self._still_lists(model)
        except EndpointFault as fault:
            self.note(fault)
            if fault.kind != "overloaded" and not self.breaker.is_open:
                self.breaker.open()
            raise

    async def _still_lists(self, model: str) -> None:
        listed = await self.models()
        if listed is not None and model not in listed:
            raise EndpointFault("error", "does not list the model any more")

    async def _ask(self, model: str, probe: bytes, refusal: InvalidInput | None) -> None:
        self._refusal = None
        answer = Answer(PROBE_SAMPLING, secrets=self.secrets, models=self.names_of(model))
        try:
            async with aclosing(self.answer(CHAT, probe, answer.max_bytes, PROBE_TIMEOUT_S)) as events:
                async for event in events:
                    deque(answer.add(event), maxlen=0)
        except (AnswerWithheld, AnswerFailed, PromptTooLong):
            return  # it answers
        except InvalidInput as error:
            if not self._answers_probes and (refusal is None or _gist(refusal) != _gist(error)):
                return  # the model may take no text alone
            self._refusal = error
            raise _as_fault(error) from None
        if not answer.is_finished:
            raise EndpointFault("reset", "ends the answer before its end")
        self._answers_probes = True

    def answer(
        self, path: str, body: bytes, max_bytes: int, timeout_s: float | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The events that answer a request, as `Transport.events` has them; ``timeout_s`` None: that of requests."""
        self._requests += 1
        return self._transport.events(path, body, max_bytes, timeout_s or self._timeout_s)

    def note(self, fault: EndpointFault) -> None:
        """Count a fault, and leave a busy server the time that it wants."""
        self._faults[fault.kind] += 1
        self.last_fault = fault
        if fault.kind == "overloaded":
            self._busy_answers += 1
            wait_s = fault.retry_after_s
            if wait_s is None:
                wait_s = min(BUSY_MAX_WAIT_S, BUSY_WAIT_S * 2.0 ** min(self._busy_answers - 1, 16))
                wait_s *= random.uniform(0.5, 1.0)
            self.paused_until = max(self.paused_until, time.monotonic() + wait_s)

    def failed(self, fault: EndpointFault, request_id: str) -> None:
        """`note` a fault met by a request; where the server is not just busy it is a failure for the breaker."""
        self.note(fault)
        if fault.kind == "overloaded":
            return
        if fault.kind == "connect":
            request_id = f"{request_id} {self._faults['connect']}"  # no request makes a connection fail
        self.breaker.fail(request_id)
        is_certain = fault.kind == "refused" or (fault.kind == "connect" and self.breaker.is_suspect)
        if self.breaker.has_waited or (is_certain and not self.breaker.is_open):
            self.breaker.open()

    def answered(self) -> None:
        """A request was answered to its end."""
        self._refusal = None
        self.succeeded()

    def succeeded(self) -> None:
        """A request was answered, or refused for what it is."""
        self._busy_answers = 0
        self.heard_at = time.monotonic()
        self._close_circuit()

    def _close_circuit(self) -> None:
        if self.breaker.is_open:
            logger.info("%s takes requests again, after %.0f s", self.url, self.breaker.open_for_s)
        self.breaker.succeed()

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()


def _as_fault(error: Exception) -> EndpointFault:
    """What an answer to a question of the worker's own means, in which no request can be at fault."""
    if isinstance(error, EndpointFault):
        return error
    if _API_KEY.search(str(error)):
        return EndpointFault("refused", "answers 400: it refuses the API key, or its lack")
    return EndpointFault("error", f"says to a request of the worker's own: {error}")


def _gist(refusal: InvalidInput) -> str:
    """Its words without numbers, among them identifiers of requests."""
    return re.sub(r"\S*\d\S*", "", str(refusal))


def _is_named(model: Any) -> bool:
    """Whether a listed model has a name that a setting can have."""
    name = model.get("id") if isinstance(model, dict) else None
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARS and name.isprintable()


def _context(model: dict[str, Any]) -> int | None:
    """Context of a listed model as vLLM and SGLang say it, or as llama.cpp does of one slot."""
    meta = model.get("meta")
    context = model.get("max_model_len", meta.get("n_ctx") if isinstance(meta, dict) else None)
    return context if type(context) is int and context > 0 else None
