"""The engine's outputs: finished requests, chunks of running ones, and statistics. No torch."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, dataclass_transform

if TYPE_CHECKING:
    from nanovllm.errors import NanoVLLMError

FinishReason = Literal["stop", "length", "loop", "abort"]
ImageOutcome = Literal["hit", "joined", "miss", "prefix"]


T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def _record(cls: type[T]) -> type[T]:
    """A frozen dataclass of `Record`, whose ``__init__`` fills the instance's two dictionaries.

    The generated one calls ``object.__setattr__`` for each field: a request's records, and a log probability of each
    token, took four times as long to make.
    """
    made = dataclass(frozen=True)(cls)
    names = [one.name for one in fields(made)]  # type: ignore[arg-type]
    defaults = {one.name: one.default for one in fields(made) if one.default is not MISSING}  # type: ignore[arg-type]
    parameters = [f"{name}=defaults['{name}']" if name in defaults else name for name in names]
    values = ", ".join(f"'{name}': {name}" for name in names)
    lines = [f"def __init__(self, {', '.join(parameters)}):", f" values = {{{values}}}"]
    lines += [" self.__dict__.update(values)", " dict.update(self, values)"]
    namespace: dict[str, Any] = {"defaults": defaults}
    exec("\n".join(lines), namespace)  # noqa: S102  # as dataclasses makes it
    made.__init__ = namespace["__init__"]  # type: ignore[method-assign]
    return made


class Record(dict[str, Any]):
    """Base of frozen dataclasses that are dictionaries of their fields too, so that ``json.dumps`` takes them.

    ``json`` writes no other mapping than a ``dict``. Changing one raises TypeError.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made by the constructor: a ``dict`` would be filled item by item."""
        return type(self), tuple(self.values())

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"{type(self).__name__} cannot be changed")

    __setitem__ = __delitem__ = __ior__ = _refuse
    update = setdefault = pop = popitem = clear = _refuse


@_record
class Usage(Record):
    """Token counts of one request. ``cached_tokens``: prompt tokens whose KV came from the prefix cache."""

    input_tokens: int
    output_tokens: int
    image_tokens: int
    cached_tokens: int


@_record
class RequestTimings(Record):
    """Where the time of one request went, in milliseconds.

    ``encode_ms`` is the time of the encoder calls that the request waited for; ``generation_ms`` runs from the first
    token to the last; ``mean_itl_ms`` is the mean time between two tokens (0 for fewer than two).
    """

    queue_ms: float = 0.0
    encode_ms: float = 0.0
    time_to_first_token_ms: float = 0.0
    generation_ms: float = 0.0
    mean_itl_ms: float = 0.0
    e2e_ms: float = 0.0


@_record
class ImageUse(Record):
    """One image of a request and where its embedding came from; ``prefix``: all its KV came from the prefix cache."""

    digest: str
    outcome: ImageOutcome
    tokens: int
    width: int
    height: int


@_record
class Logprob(Record):
    """A token's natural log probability at one position, its rank (1 is the most probable), and its text."""

    logprob: float
    rank: int
    text: str


TokenLogprobs = dict[int, Logprob]
"""By token id, at one position: the token itself, then the most probable ones. Empty where none is known."""


@_record
class Completion(Record):
    """One of the ``n`` outputs of a request.

    ``text_ends`` has, beside ``logprobs``, for each token the number of characters of ``text`` up to its end. Tokens
    that are parts of one character have the end of what was before, and the last of them the character's.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None = None
    text_ends: tuple[int, ...] | None = None


@_record
class RequestOutput(Record):
    """The finished request. ``output["text"]`` and ``output.text`` are the same, and so with the records within.

    ``outputs`` holds all ``n`` outputs; ``text``, ``token_ids``, ``finish_reason`` and ``logprobs`` are those of the
    first. ``prompt_logprobs`` has an entry for each prompt token; the first one's is empty, and so are images'.
    ``is_constrained``: every token was confined to the constraint of the sampling parameters.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: RequestTimings
    images: tuple[ImageUse, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    outputs: tuple[Completion, ...] = ()
    is_constrained: bool = False


@dataclass(slots=True)
class TokenChunk:
    """New tokens of a running request; ``text`` is what may be shown now and never ends inside a character.

    It is not changed once it is made; a frozen dataclass takes several times as long to make.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    index: int = 0  # of the output, among the request's ``n``


@dataclass(slots=True)
class StepOutput:
    """What one engine step did for one request; on its last step ``finished`` is set, or ``failure``.

    It is not changed once it is made.
    """

    request_id: str
    chunk: TokenChunk
    finished: RequestOutput | None = None
    failure: NanoVLLMError | None = None


@dataclass(frozen=True)
class ModelInfo:
    """Which model answered: the name that was asked for, its revision, and the sha256 of its stored parameters."""

    id: str
    revision: str
    parameter_digest: str
