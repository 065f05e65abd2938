"""One answer as its events come: texts, tokens, log probabilities, usage; then the finished output."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanovllm.engine.backends.foreign_errors import shown
from nanovllm.engine.backends.openai.event_stream import MAX_ANSWER_BYTES, MAX_EVENT_BYTES
from nanovllm.engine.backends.openai.faults import (
    EndpointFault,
    fault_in_words,
    fault_of_answer,
    message_in,
    request_fault,
)
from nanovllm.engine.outputs import Completion, FinishReason, Logprob, TokenChunk, TokenLogprobs, Usage
from nanovllm.errors import AnswerWithheld
from nanovllm.sampling_params import SamplingParams

_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "repetition": "loop"}
_NO_MORE_THAN = 2**31
_MANY_TOKENS = 2**17
"""Of an answer without a limit, from a server that does not say its context."""
_FEW_PIECES, _PIECES_A_TOKEN = 1_024, 8
"""Servers cut texts into tokens, proxies sometimes into characters."""
_BYTES_A_TOKEN, _BYTES_A_LOGPROB = 2_048, 512
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass
class _Choice:
    """One of the ``n`` outputs so far; ``entries`` are the server's log probabilities, a position each."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    entries: list[tuple[dict[str, Any], int | None]] = field(default_factory=list)
    finish_reason: FinishReason | None = None


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
        self._choices = [_Choice() for _ in range(sampling.n)]
        self._logprobs = sampling.logprobs
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
        return "".join(self._choices[0].texts)

    def add(self, event: dict[str, Any]) -> Iterator[TokenChunk]:
        """Take one event; yields what is new of each output.

        Raises:
            EndpointFault: the event is none of the protocol, or says that the server failed.
            InvalidInput: it says that the server refuses the request.
            AnswerWithheld: a filter of the server stopped the answer.
            AnswerFailed: the server cannot read what its model wrote.
        """
        if event.get("error") or event.get("object") == "error":
            raise self._error(event)
        model = event.get("model")
        if self._models is not None and isinstance(model, str) and model not in self._models:
            raise EndpointFault("garbage", f"answers as another model: {shown(model, self._secrets)}")
        if isinstance(event.get("usage"), dict):
            self._usage = event["usage"]
        choices = event.get("choices", [])
        if not isinstance(choices, list):
            raise _garbage("choices")
        for one in choices:
            chunk = self._add(one)
            if chunk is not None:
                yield chunk

    def completions(self) -> tuple[Completion, ...]:
        """The finished outputs."""
        return tuple(self._completion(index, choice) for index, choice in enumerate(self._choices))

    def usage(self) -> Usage:
        """Tokens as the server counts them; where it does not, pieces of text count as output tokens."""
        details = self._usage.get("prompt_tokens_details")
        details = details if isinstance(details, dict) else {}
        kinds = details.get("multimodal_tokens")  # vLLM's
        image_tokens = kinds.get("image") if isinstance(kinds, dict) else details.get("image_tokens")
        return Usage(
            input_tokens=_count(self._usage.get("prompt_tokens")) or 0,
            output_tokens=self._output_tokens(),
            image_tokens=_count(image_tokens) or 0,
            cached_tokens=_count(details.get("cached_tokens")) or 0,
        )

    def _output_tokens(self) -> int:
        counted = _count(self._usage.get("completion_tokens"))
        return counted if counted is not None else sum(len(c.token_ids) for c in self._choices) or self._pieces

    def _error(self, event: dict[str, Any]) -> Exception:
        error = event.get("error")
        code = error.get("code") if isinstance(error, dict) else event.get("code")
        said = message_in(event, self._secrets) or "no message"
        if (found := fault_in_words(said)) is not None:
            return found
        if code in (400, 422):
            return request_fault(said)
        if isinstance(code, int) and 400 <= code < 600:
            fault = fault_of_answer(code, {}, b"", self._secrets)
            if isinstance(fault, EndpointFault):
                return EndpointFault(fault.kind, f"fails in mid-answer: {said}")
        return EndpointFault("error", f"fails in mid-answer: {said}")

    def _add(self, one: Any) -> TokenChunk | None:
        index = one.get("index", 0) if isinstance(one, dict) else -1
        if type(index) is not int or not 0 <= index < len(self._choices):
            raise _garbage("index of a choice")
        choice, delta = self._choices[index], one.get("delta")
        # A delta of a chat, or the text of a completion.
        text = (delta.get("content") if isinstance(delta, dict) else one.get("text")) or ""
        token_ids = one.get("token_ids") or []
        if not isinstance(text, str):
            raise _garbage("content")
        if not isinstance(token_ids, list) or not all(type(token) is int for token in token_ids):
            raise _garbage("token_ids")
        if self._logprobs is not None and one.get("logprobs"):
            entries = _entries(one["logprobs"])
            ids: list[int | None] = [*token_ids] if len(token_ids) == len(entries) else [None] * len(entries)
            choice.entries += zip(entries, ids, strict=True)
        if text or token_ids:
            self._pieces += 1
            if self._pieces > self._max_pieces:
                raise EndpointFault("garbage", "answers more than it was asked for")
        if text:
            choice.texts.append(text)
        choice.token_ids += token_ids
        reason = one.get("finish_reason")
        if reason is not None:
            choice.finish_reason = self._reason(reason)
        return TokenChunk(text, tuple(token_ids), None, index) if text or token_ids else None

    def _reason(self, reason: Any) -> FinishReason:
        if reason == "content_filter":
            raise AnswerWithheld("the server withheld the answer: content_filter")
        if reason not in _REASONS:
            # `abort` and `error` among them: the server gave the request up.
            raise EndpointFault("error", f"ends the answer with {str(reason)[:32]!r}")
        return _REASONS[reason]

    def _completion(self, index: int, choice: _Choice) -> Completion:
        assert choice.finish_reason is not None
        text, logprobs, ends = "".join(choice.texts), None, None
        if self._logprobs is not None:
            logprobs = tuple(_position(entry, token_id, self._logprobs) for entry, token_id in choice.entries)
            ends = _text_ends([entry for entry, _ in choice.entries], text)
        return Completion(index, text, tuple(choice.token_ids), choice.finish_reason, logprobs, ends)


def _garbage(what: str) -> EndpointFault:
    return EndpointFault("garbage", f"answers what is not of the protocol: {what}")


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < _NO_MORE_THAN else None


def _entries(logprobs: Any) -> list[dict[str, Any]]:
    """The checked entries of ``logprobs.content``, which may be null."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else logprobs
    content = [] if content is None else content
    if not isinstance(content, list) or not all(map(_is_entry, content)):
        raise _garbage("logprobs")
    for entry in content:
        top = entry.get("top_logprobs") or []
        if not isinstance(top, list) or not all(map(_is_entry, top)):
            raise _garbage("top_logprobs")
    return content


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("token"), str):
        return False
    raw = entry.get("bytes")
    is_raw = raw is None or (isinstance(raw, list) and all(type(byte) is int and 0 <= byte < 256 for byte in raw))
    return is_raw and type(entry.get("logprob")) in (int, float)


def _position(entry: dict[str, Any], token_id: int | None, most: int) -> TokenLogprobs:
    """Log probabilities at one position: of the token taken and of the ``most`` best.

    The rank of a token that is not among those that the server lists is the next number. The key of one whose id the
    server does not say is minus its rank.
    """
    best = sorted(entry.get("top_logprobs") or [], key=lambda one: -one["logprob"])
    # Tokens that are parts of one character may have equal texts.
    equal = [number for number, one in enumerate(best, 1) if _token(one) == _token(entry)]
    rank = min(equal, key=lambda number: abs(best[number - 1]["logprob"] - entry["logprob"]), default=len(best) + 1)
    named = entry.get("id", token_id)
    position = {_key(named, rank): Logprob(float(entry["logprob"]), rank, entry["token"])}
    for number, one in enumerate(best[:most], 1):
        if number != rank:
            position.setdefault(_key(one.get("id"), number), Logprob(float(one["logprob"]), number, one["token"]))
    return position


def _token(entry: dict[str, Any]) -> tuple[str, bytes]:
    return entry["token"], bytes(entry.get("bytes") or b"")


def _key(token_id: Any, rank: int) -> int:
    return token_id if type(token_id) is int and token_id >= 0 else -rank


def _text_ends(entries: Sequence[dict[str, Any]], text: str) -> tuple[int, ...] | None:
    """As ``Completion.text_ends``; None where the tokens are not the text's.

    Servers write U+FFFD for a part of a character, also in ``bytes`` (vLLM): such tokens end where the next whole one
    begins. Tokens behind the text, such as the end of a sequence, end with it.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    ends: list[int] = []
    at, parts = 0, 0  # how many characters are known, and at most how many the tokens since then stand for
    for entry in entries:
        raw = entry.get("bytes")
        piece = decoder.decode(bytes(raw) if raw is not None else entry["token"].encode(errors="replace"))
        if parts and piece and REPLACEMENT not in piece:
            found = text.find(piece, at, at + parts + len(piece))
            if found < 0:
                return None
            at, parts, ends[-1] = found, 0, found
        if text.startswith(piece, at) and not parts:
            at += len(piece)
        elif piece.startswith(text[at:]) and not parts:
            at = len(text)
        elif REPLACEMENT in piece:
            parts += len(piece)
        elif piece:
            return None
        ends.append(at)
    if parts:
        ends[-1] = at = len(text)
    return tuple(ends) if at == len(text) else None
