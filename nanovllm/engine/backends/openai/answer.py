"""One answer as its events come: texts, tokens, log probabilities, usage; then the finished outputs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from nanovllm.engine.backends.foreign_errors import shown
from nanovllm.engine.backends.openai.answer_choice import Choice
from nanovllm.engine.backends.openai.event_stream import MAX_ANSWER_BYTES, MAX_EVENT_BYTES
from nanovllm.engine.backends.openai.faults import EndpointFault, fault_in_answer, not_of_the_protocol
from nanovllm.engine.outputs import Completion, TokenChunk, Usage
from nanovllm.sampling_params import SamplingParams

_NO_MORE_THAN = 2**31
_MANY_TOKENS = 2**17
"""Of an answer without a limit, from a server that does not say its context."""
_FEW_PIECES, _PIECES_A_TOKEN = 1_024, 8
"""Servers cut texts into tokens, proxies sometimes into characters."""
_BYTES_A_TOKEN, _BYTES_A_LOGPROB = 2_048, 512


class Answer:
    """Collects the events of one answer to a request with ``sampling``; ``secrets`` never show in an error.

    ``context`` of the model is in tokens. ``models`` are the names that the answer may come under; None: any.
    ``max_bytes`` is the most that it may have on the wire.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        *,
        context: int | None = None,
        secrets: tuple[str, ...] = (),
        models: Collection[str] | None = None,
    ) -> None:
        self._choices = [Choice(index, sampling.logprobs, secrets) for index in range(sampling.n)]
        self._secrets = secrets
        self._models = models
        tokens = sampling.n * (sampling.max_tokens or context or _MANY_TOKENS)
        entries = 0 if sampling.logprobs is None else 2 + sampling.logprobs
        wanted = MAX_EVENT_BYTES + tokens * (_BYTES_A_TOKEN + entries * _BYTES_A_LOGPROB)
        self.max_bytes = min(MAX_ANSWER_BYTES, wanted)
        self._max_pieces = _FEW_PIECES + _PIECES_A_TOKEN * tokens
        self._usage: dict[str, Any] = {}
        self._pieces = 0

    @property
    def is_finished(self) -> bool:
        """Whether every output has its end."""
        return all(choice.finish_reason is not None for choice in self._choices)

    @property
    def first_text(self) -> str:
        """Text of the first output so far."""
        return self._choices[0].text

    def add(self, event: dict[str, Any]) -> Iterator[TokenChunk]:
        """Take one event; yields what is new of each output.

        Raises:
            EndpointFault: the event is none of the protocol, or says that the server failed.
            NanoVLLMError: as `fault_in_answer` and `Choice.add`.
        """
        if event.get("error") or event.get("errors") or event.get("object") == "error":
            raise fault_in_answer(event, self._secrets)
        model = event.get("model")
        if self._models is not None and isinstance(model, str) and model not in self._models:
            raise EndpointFault("garbage", f"answers as another model: {shown(model, self._secrets)}")
        self._count(event)
        choices = event.get("choices") or []
        if not isinstance(choices, list) or len(choices) > _FEW_PIECES:
            raise not_of_the_protocol("choices")
        for one in choices:
            chunk = self._choice(one).add(one)
            if chunk is None:
                continue
            self._pieces += 1
            if self._pieces > self._max_pieces:
                raise EndpointFault("garbage", "answers more than it was asked for")
            yield chunk

    def completions(self) -> tuple[Completion, ...]:
        """The finished outputs."""
        return tuple(choice.completion() for choice in self._choices)

    def usage(self) -> Usage:
        """Tokens as the server counts them; where it does not, pieces of text count as output tokens."""
        details = self._usage.get("prompt_tokens_details")
        details = details if isinstance(details, dict) else {}
        kinds = details.get("multimodal_tokens")  # vLLM's
        image_tokens = kinds.get("image") if isinstance(kinds, dict) else details.get("image_tokens")
        return Usage(
            input_tokens=_number(self._usage.get("prompt_tokens")) or 0,
            output_tokens=self._output_tokens(),
            image_tokens=_number(image_tokens) or 0,
            cached_tokens=_number(details.get("cached_tokens")) or 0,
        )

    def _output_tokens(self) -> int:
        counted = _number(self._usage.get("completion_tokens"))
        return counted if counted is not None else sum(len(c.token_ids) for c in self._choices) or self._pieces

    def _count(self, holder: dict[str, Any]) -> None:
        if isinstance(holder.get("usage"), dict):
            self._usage = holder["usage"]

    def _choice(self, one: Any) -> Choice:
        index = (one.get("index") or 0) if isinstance(one, dict) else -1
        if type(index) is not int or not 0 <= index < len(self._choices):
            raise not_of_the_protocol("index of a choice")
        self._count(one)
        return self._choices[index]


def _number(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < _NO_MORE_THAN else None
