"""One of the outputs of an answer, as its pieces come: servers' forms of a delta, read alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nanovllm.engine.backends.foreign_errors import shown
from nanovllm.engine.backends.openai.faults import EndpointFault, not_of_the_protocol, withheld
from nanovllm.engine.backends.openai.token_logprobs import logprob_entries, position, text_ends, token_ids
from nanovllm.engine.outputs import Completion, FinishReason, TokenChunk
from nanovllm.errors import AnswerFailed

_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_calls": "stop",
    "function_call": "stop",
    "length": "length",
    "max_tokens": "length",
    "repetition": "loop",
}
_WITHHELD = ("content_filter", "safety")
_MAX_REFUSAL_CHARS = 2_000


@dataclass
class Choice:
    """The output so far; ``entries`` are the server's log probabilities, a position each, ``logprobs`` how many."""

    index: int
    logprobs: int | None
    secrets: tuple[str, ...] = ()
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    entries: list[tuple[dict[str, Any], int | None]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    _half: str = ""
    _refusal: str = ""
    _calls_tools: bool = False

    def add(self, one: dict[str, Any]) -> TokenChunk | None:
        """Take the choice ``one`` of an event; returns what is new.

        Raises:
            EndpointFault: it is none of the protocol, or says that the server gave up.
            AnswerWithheld: a filter of the server stopped the answer, or the model refuses one.
            AnswerFailed: it is a call of a tool, and nothing else.
        """
        delta = one.get("delta") or one.get("message")
        delta = delta if isinstance(delta, dict) else {}
        # A delta of a chat, or the text of a completion.
        text = self._whole(_text(delta.get("content", one.get("text"))))
        ids = token_ids(one.get("token_ids"))
        if self.logprobs is not None and one.get("logprobs"):
            entries = logprob_entries(one["logprobs"])
            named: list[int | None] = [*ids] if len(ids) == len(entries) else [None] * len(entries)
            self.entries += zip(entries, named, strict=True)
        refusal = delta.get("refusal")
        if isinstance(refusal, str):
            self._refusal = (self._refusal + refusal)[:_MAX_REFUSAL_CHARS]
        self._calls_tools |= bool(delta.get("tool_calls") or delta.get("function_call"))
        if text:
            self.texts.append(text)
        self.token_ids += ids
        reason = one.get("finish_reason")
        if reason not in (None, ""):
            self._end(reason)
        return TokenChunk(text, tuple(ids), None, self.index) if text or ids else None

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.texts)

    def completion(self) -> Completion:
        """The finished output."""
        assert self.finish_reason is not None
        text, logprobs, ends = self.text, None, None
        if self.logprobs is not None:
            logprobs = tuple(position(entry, token_id, self.logprobs) for entry, token_id in self.entries)
            ends = text_ends([entry for entry, _ in self.entries], text)
        return Completion(self.index, text, tuple(self.token_ids), self.finish_reason, logprobs, ends)

    def _whole(self, text: str) -> str:
        """``text`` with the halves of surrogate pairs joined; half a pair at its end waits for the other one."""
        if text.isascii() and not self._half:
            return text
        text, self._half = self._half + text, ""
        if text and "\ud800" <= text[-1] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        try:
            return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError:
            raise not_of_the_protocol("half a surrogate pair") from None

    def _end(self, reason: Any) -> None:
        if not isinstance(reason, str):
            raise not_of_the_protocol("finish_reason")
        if reason.lower() in _WITHHELD:
            raise withheld(reason.lower())
        if reason.lower() not in _REASONS:
            # `abort` and `error` among them: the server gave the request up.
            raise EndpointFault("error", f"ends the answer with {shown(reason[:32], self.secrets)!r}")
        if self._half:
            raise not_of_the_protocol("half a surrogate pair")
        if self._refusal and not self.texts:
            raise withheld(f"the model refuses: {shown(self._refusal, self.secrets)}")
        if self._calls_tools and not self.texts:
            raise AnswerFailed("the model calls a tool in place of an answer, and the request has no tools")
        self.finish_reason = _REASONS[reason.lower()]


def _text(content: Any) -> str:
    """The text of a content: a string, null, or a list of parts."""
    if isinstance(content, list):
        return "".join(_text(part.get("text")) for part in content if isinstance(part, dict))
    if content is not None and not isinstance(content, str):
        raise not_of_the_protocol("content")
    return content or ""
