"""The interface of engine backends: requests in, awaitable generations out. No torch.

``AsyncEngine`` is the backend that computes; ``OpenAIEngine`` asks servers of OpenAI's protocol; ``EchoEngine`` answers
at once and is for tests of the pipeline.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from dataclasses import field
from itertools import chain
from typing import TYPE_CHECKING, Any, Self

from nanovllm.engine.backends.capabilities import Capabilities
from nanovllm.engine.outputs import ModelInfo, RequestOutput, TokenChunk
from nanovllm.errors import EngineDead, InvalidInput, SystemicError, TransientError
from nanovllm.sampling_params import Constraint, SamplingParams
from nanovllm.statistics import EngineStats
from nanovllm.value_object import value_object

USUAL_CHARS_PER_TOKEN = 4

if TYPE_CHECKING:
    from nanovllm.vision.images.preprocess import ImageTransform, PreparedImage


@value_object
class Request:
    """One untrusted request: its text can never become special tokens.

    Exactly one of ``prompt`` (``<|image|>`` marks each image's position) and ``messages`` (OpenAI chat form, images as
    parts) is set. ``images`` are in the order of their positions. A lower ``priority`` runs earlier. Requests with
    different ``cache_salt`` share neither prefix blocks nor image embeddings. ``raw_prompt`` leaves the chat template
    out; ``chat_template_kwargs`` are variables of the template, whose texts it writes as its own: a job gives none.
    ``failures``: how often servers have failed with it before.
    Raises InvalidInput unless exactly one of the two is set, and for images that are not prepared.
    """

    request_id: str
    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    images: tuple[PreparedImage, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    cache_salt: bytes = b""
    raw_prompt: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None
    failures: int = 0

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidInput("a request has either a prompt or messages")
        # Not by type: this module imports no numpy.
        if not isinstance(self.images, (tuple, list)) or not all(hasattr(image, "digest") for image in self.images):
            raise InvalidInput(
                "the images of a request are a tuple of what prepare_image returns: "
                "images=(prepare_image(source, engine.image_transform),)"
            )


class Generation:
    """A running request: await it for the whole output, or iterate over its chunks as they come.

    Both may be done, in any order and more than once; every iteration starts at the beginning of the text and ends with
    a chunk that has a ``finish_reason``. What came while its consumer was busy is one chunk, for each of ``n`` outputs.
    Both raise what the request failed with. An aborted request is no failure: it ends with
    ``finish_reason == "abort"`` and the text so far. Belongs to one event loop; cancelling a task that waits does not
    abort the request. A request that began anew elsewhere (`restart`) ends iterations that have had chunks of it with a
    TransientError; awaiting and later iterations see the new beginning alone.
    """

    def __init__(self, request_id: str, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._abort = abort
        self._chunks: list[TokenChunk] = []
        self._output: RequestOutput | None = None
        self._error: BaseException | None = None
        self._iterating: list[asyncio.Future[None]] = []
        self._awaiting: list[asyncio.Future[None]] = []
        self._restarts = 0

    @property
    def is_finished(self) -> bool:
        """Whether the output, or the failure, is there."""
        return self._output is not None or self._error is not None

    @property
    def chunks(self) -> tuple[TokenChunk, ...]:
        """The chunks so far."""
        return tuple(self._chunks)

    def abort(self) -> None:
        """End the request early; without effect on one that is finished."""
        if not self.is_finished:
            self._abort(self.request_id)

    def deliver(self, chunk: TokenChunk, output: RequestOutput | None = None) -> None:
        """For backends, in the event loop: add a chunk and, with the last one, the whole output."""
        if self._output is not None or self._error is not None:
            return
        if chunk.token_ids or chunk.text or chunk.finish_reason:
            self._chunks.append(chunk)
        self._output = output
        if self._iterating or output is not None:
            self._announce()

    def restart(self) -> None:
        """For backends, in the event loop: the chunks so far are void; the request begins anew."""
        if not self.is_finished and self._chunks:
            self._chunks.clear()
            self._restarts += 1
            self._announce()

    def fail(self, error: BaseException) -> None:
        """For backends, in the event loop: end the request with ``error``."""
        if not self.is_finished:
            self._error = error
            self._announce()

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self._wait().__await__()

    async def __aiter__(self) -> AsyncIterator[TokenChunk]:
        position, restarts = 0, self._restarts
        while True:
            if restarts != self._restarts:
                if position:
                    raise TransientError(f"request {self.request_id} began anew: its server failed in mid-answer")
                restarts = self._restarts
            if position < len(self._chunks):
                pending = self._chunks[position:]
                position = len(self._chunks)
                for chunk in _joined(pending):
                    yield chunk
            elif self._error is not None:
                raise self._error
            elif self._output is not None:
                return
            else:
                await _waiter_in(self._iterating)

    async def _wait(self) -> RequestOutput:
        if not self.is_finished:
            await _waiter_in(self._awaiting)
        if self._error is not None:
            raise self._error
        assert self._output is not None
        return self._output

    def _announce(self) -> None:
        """Wake the iterations that wait now, and at the end those that wait for the output."""
        _wake(self._iterating)
        if self.is_finished:
            _wake(self._awaiting)


def _waiter_in(waiting: list[asyncio.Future[None]]) -> asyncio.Future[None]:
    waiter = asyncio.get_running_loop().create_future()
    waiting.append(waiter)
    return waiter


def _wake(waiting: list[asyncio.Future[None]]) -> None:
    # Not an asyncio.Event: most chunks come while nothing waits for them.
    for waiter in waiting:
        if not waiter.done():
            waiter.set_result(None)
    waiting.clear()


def _joined(chunks: list[TokenChunk]) -> list[TokenChunk]:
    """``chunks`` in their order, those of one output as one."""
    if len(chunks) == 1:
        return chunks
    of_output: dict[int, list[TokenChunk]] = {}
    for chunk in chunks:
        of_output.setdefault(chunk.index, []).append(chunk)
    return [
        TokenChunk(
            "".join(chunk.text for chunk in parts),
            tuple(chain.from_iterable(chunk.token_ids for chunk in parts)),
            parts[-1].finish_reason,
            index,
        )
        for index, parts in of_output.items()
    ]


class EngineBackend(ABC):
    """An engine as the worker sees it. All methods are called in one event loop.

    ``image_transform`` says how images must be prepared for it; None when it takes no images. About twice as many
    requests as ``max_num_seqs``, which run at once, are worth submitting. ``dead`` is set once the engine can answer
    nothing any more, and ``death`` says why: watch it and exit. ``capabilities`` are known once it is started.
    ``name`` is what computes, in the words of ``engine.backend``, whose ``auto`` is no engine.
    """

    name: str
    capabilities = Capabilities()

    def __init__(self, model_info: ModelInfo, image_transform: ImageTransform | None, max_num_seqs: int) -> None:
        self.model_info = model_info
        self.image_transform = image_transform
        self.max_num_seqs = max_num_seqs
        self.generation_defaults: Mapping[str, Any] = {}  # sampling parameters of the checkpoint, where they count
        self.dead = asyncio.Event()
        self.death: EngineDead | None = None
        self._generations: dict[str, Generation] = {}  # the unfinished ones

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @abstractmethod
    async def start(self) -> None:
        """Make ready for ``submit``."""

    @abstractmethod
    def find_image(self, file_digest: bytes, cache_salt: bytes) -> PreparedImage | None:
        """The image that came in a file of this SHA-256, embedded already; None where it is not at hand."""

    async def compile(self, constraint: Constraint) -> None:  # noqa: B027
        """Compile ``constraint`` before a request has it; raises UnsupportedConstraint where it cannot be enforced.

        A backend that computes nothing compiles nothing.
        """

    async def fits(self, request: Request) -> bool:
        """Whether ``request`` is taken as it is, with room for its whole answer of ``max_tokens``.

        True for a backend that cannot tell. Raises EngineDead.
        """
        if self.death is not None:
            raise self.death
        return True

    @property
    def outage(self) -> SystemicError | None:
        """Why no request would be answered now, though the engine lives; None for one that computes here."""
        return None

    @property
    def output_options(self) -> Mapping[str, Any]:
        """What decides an output beside model and request, as JSON: what is kept of outputs is kept under it."""
        return {} if self.image_transform is None else {"images": self.image_transform.fingerprint()}

    def beginning(self, text: str, max_tokens: int) -> str:
        """The beginning of ``text`` with at most so many tokens; for a backend that cannot count, about so many.

        May be called in any thread. Raises InvalidInput: no tokenizer takes the text.
        """
        return beginning_by_chars(text, max_tokens)

    def submit(self, request: Request) -> Generation:
        """Queue ``request`` without waiting. Never raises for what is wrong with it: that ends its generation."""
        generation = Generation(request.request_id, self.abort)
        if self.death is not None:
            generation.fail(self.death)
        elif request.request_id in self._generations:
            generation.fail(InvalidInput(f"request {request.request_id} is already running"))
        else:
            self._generations[request.request_id] = generation
            self._begin(request, generation)
        return generation

    @abstractmethod
    def _begin(self, request: Request, generation: Generation) -> None:
        """Start a submitted request, whose generation is registered."""

    @abstractmethod
    def abort(self, request_id: str) -> None:
        """End a request early; unknown and finished ones are ignored."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """A recent snapshot."""

    @abstractmethod
    async def close(self) -> None:
        """Stop; unfinished generations end with EngineDead."""

    def _die(self, death: EngineDead) -> None:
        """Fail every unfinished generation, and every later one; once."""
        if self.death is not None:
            return
        self.death = death
        for generation in self._generations.values():
            generation.fail(death)
        self._generations.clear()
        self.dead.set()


def beginning_by_chars(text: str, max_tokens: int) -> str:
    """The beginning of ``text`` with about so many tokens."""
    return text[: USUAL_CHARS_PER_TOKEN * max_tokens]
