"""From token ids to text as they come: never half a character, never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

REPLACEMENT = "\ufffd"


class Detokenizer:
    """The text of one request's output.

    Text is held back while it may still become a stop string, and while the last character lacks bytes. What was handed
    out is never taken back, and the chunks joined are the final text.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        """``tokenizer`` is a fast Hugging Face tokenizer; ``stop`` counts after ``min_tokens`` tokens."""
        self._backend = tokenizer.backend_tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._token_ids: list[int] = []
        self._decoded = 0  # characters that the stream has given
        self._held = ""
        self.text = ""
        self.is_stopped = False

    def append(self, token_id: int) -> str:
        """Add a token and return the text that may be shown now; sets ``is_stopped`` at a stop string."""
        self._token_ids.append(token_id)
        fresh = self._stream.step(self._backend, token_id) or ""
        self._decoded += len(fresh)
        return self._release(fresh)

    def finish(self) -> str:
        """The rest of the text at the end of the output; bytes of an unfinished character are left out."""
        if self.is_stopped:
            return ""
        whole: str = self._backend.decode(self._token_ids, skip_special_tokens=self._skip_special_tokens)
        return self._release(whole[self._decoded :].rstrip(REPLACEMENT), final=True)

    def _release(self, fresh: str, *, final: bool = False) -> str:
        if not self._stop:
            self.text += fresh
            return fresh
        pending = self._held + fresh
        if len(self._token_ids) > self._min_tokens:
            found = min(((pending.find(stop), stop) for stop in self._stop if stop in pending), default=None)
            if found is not None:
                end = found[0] + (len(found[1]) if self._include_stop else 0)
                self.is_stopped = True
                self._held = ""
                self.text += pending[:end]
                return pending[:end]
        keep = 0 if final else self._beginning_of_stop(pending)
        shown = pending[: len(pending) - keep]
        self._held = pending[len(pending) - keep :]
        self.text += shown
        return shown

    def _beginning_of_stop(self, text: str) -> int:
        """The length of the longest end of ``text`` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
