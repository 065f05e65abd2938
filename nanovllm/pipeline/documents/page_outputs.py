"""Outputs of requests for pages, and those that are kept: what the page store has asks no engine."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nanovllm.engine.outputs import ModelInfo, RequestOutput
from nanovllm.messages.base import FinishReason
from nanovllm.messages.result import TokenUsage
from nanovllm.pipeline.documents.fields import pieces_of
from nanovllm.pipeline.documents.page_store import PageKey, PageStore
from nanovllm.sampling_params import SamplingParams
from nanovllm.vision.images.preprocess import PreparedImage

NO_TOKENS = TokenUsage(input_tokens=0, output_tokens=0)


@dataclass(frozen=True)
class PageRequest:
    """One request for a page; ``images`` are empty where its text layer stands in place of its picture.

    ``chat_template_kwargs`` are variables of the chat template, whose values are trusted.
    """

    prompt: str
    images: tuple[PreparedImage, ...]
    sampling: SamplingParams
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PageOutput:
    """What a page needs of a request's output; ``pieces`` and ``logprobs`` of each token, where they are known.

    ``milliseconds`` are by stage, as in `DocumentTimings`; ``token_ms`` is the mean time between two tokens;
    ``is_constrained`` as in `RequestOutput`.
    """

    text: str
    finish_reason: FinishReason
    usage: TokenUsage
    pieces: tuple[str, ...] = ()
    logprobs: tuple[float | None, ...] = ()
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    token_ms: float = 0.0
    is_constrained: bool = False
    is_reused: bool = False

    @property
    def engine_ms(self) -> float:
        """Milliseconds in the engine behind its queue; 0 for a reused output."""
        return self.milliseconds.get("generation", 0.0) - self.milliseconds.get("queue", 0.0)

    def unspent_ms(self, sampling: SamplingParams) -> float:
        """Milliseconds that the rest of a repetition would have taken, up to ``max_tokens``; 0 without both."""
        if self.finish_reason != "loop" or sampling.max_tokens is None:
            return 0.0
        return (sampling.max_tokens - self.usage.output_tokens) * self.token_ms

    @classmethod
    def of(cls, output: RequestOutput) -> PageOutput:
        """The output of an engine."""
        pieces: list[str] = []
        logprobs: list[float | None] = []
        first = output.outputs[0] if output.outputs else None
        if first is not None and first.text_ends is not None and first.logprobs is not None:
            pieces = pieces_of(first.text, first.text_ends)
            # The token taken is the first of each position; servers do not say every token's id.
            logprobs = [next(iter(place.values())).logprob if place else None for place in first.logprobs]
        times, usage = output.timings, TokenUsage(**output.usage)
        return cls(
            output.text,
            output.finish_reason,
            usage,
            tuple(pieces),
            tuple(logprobs[: len(pieces)]),
            {"queue": times.queue_ms, "encode": times.encode_ms, "generation": times.e2e_ms},
            times.mean_itl_ms,
            output.is_constrained,
        )

    def to_json(self) -> bytes:
        """What is kept of it; of its times the engine's alone, which is what a reuse saves."""
        names = ("text", "pieces", "logprobs", "engine_ms", "is_constrained")
        return json.dumps({name: getattr(self, name) for name in names}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> PageOutput:
        """The kept output: its tokens and its time were spent before, and none for this request."""
        fields = json.loads(data)
        pieces, logprobs = tuple(fields["pieces"]), tuple(fields["logprobs"])
        saved, is_constrained = {"saved": fields["engine_ms"]}, fields["is_constrained"]
        return cls(
            fields["text"],
            "stop",
            NO_TOKENS,
            pieces,
            logprobs,
            saved,
            is_constrained=is_constrained,
            is_reused=True,
        )


Ask = Callable[[PageRequest], Awaitable[PageOutput]]


class KeepOutputs:
    """Asks for what the page store does not have, and keeps outputs that ended by themselves.

    What decides an output is its key: the picture's digest, the prompt with whatever text it holds, variables of the
    chat template, all sampling parameters, the schema, the model and the engine's options. A seed is one of them: an
    output that was drawn once stays.
    """

    def __init__(
        self, ask: Ask, store: PageStore, model: ModelInfo, options: Mapping[str, Any], *, tenant: str = ""
    ) -> None:
        """``options``: the engine's ``output_options``."""
        self._ask = ask
        self._store = store
        self._model = {**asdict(model), "options": options}
        self._tenant = tenant

    async def __call__(self, request: PageRequest) -> PageOutput:
        """The output, or an equal request's: of several that ask at once, the first that is kept.

        Raises:
            NanoVLLMError: as ``ask`` and `PageStore`.
        """
        key = self._key(request)
        async with self._store.turn(key):
            kept = await self._store.get(key)
            if kept is not None:
                return PageOutput.from_json(kept)
            output = await self._ask(request)
            if output.finish_reason != "stop":
                return output
            first = PageOutput.from_json(await self._store.put(key, output.to_json()))
        return replace(output, text=first.text, pieces=first.pieces, logprobs=first.logprobs)

    def _key(self, request: PageRequest) -> PageKey:
        sampling = request.sampling.model_dump(mode="json")
        schema = sampling.pop("json_schema")
        if request.chat_template_kwargs:
            sampling["chat_template_kwargs"] = dict(request.chat_template_kwargs)
        return PageKey(
            page_digest="".join(image.digest.hex() for image in request.images),
            model=self._model,
            prompt=request.prompt,
            sampling=sampling,
            response_schema=schema,
            text_policy="",  # the prompt and the picture say what became of it
            ladder_step={},
            tenant=self._tenant,
        )


def added(one: TokenUsage, other: TokenUsage) -> TokenUsage:
    """The sum of both."""
    return TokenUsage(**{name: getattr(one, name) + getattr(other, name) for name in TokenUsage.model_fields})
