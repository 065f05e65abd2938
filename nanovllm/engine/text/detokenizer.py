"""Incremental detokenization: whole characters only, and no part of a stop string."""

from __future__ import annotations

import codecs
import json
import re
from functools import cache, lru_cache, partial
from itertools import takewhile
from operator import itemgetter
from typing import Any

from nanovllm.sampling_params import SamplingParams

REPLACEMENT = "\ufffd"

MAX_UNREAD_TOKENS = 16
"""Tokens without a whole character at their end, from which on those that no later one can change are text."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_CHARACTER_BYTES = 4  # the most of UTF-8, so that as many tokens decide a character


@lru_cache(8)
def _special_tokens(backend: Any) -> frozenset[int]:
    return frozenset(index for index, token in backend.get_added_tokens_decoder().items() if token.special)


@lru_cache(8)
def _context(backend: Any) -> tuple[int, ...]:
    """A token whose text is letters: the sentencepiece decoders take a space away from the first token of all."""
    added = backend.get_added_tokens_decoder()
    for token, index in sorted(backend.get_vocab(with_added_tokens=False).items(), key=itemgetter(1)):
        # Neighbouring byte tokens are decoded together, so that none may stand here.
        if index not in added and not _BYTE_TOKEN.fullmatch(token) and backend.decode([index]).strip().isalpha():
            return (index,)
    return ()


@cache
def _byte_level() -> dict[str, int]:
    """The byte that each character stands for in byte-level tokens: GPT-2's table."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


@lru_cache(8)
def _joins_whole_tokens(backend: Any) -> bool:
    """Whether a token that is whole characters has the same text behind all others; False where that is not known."""
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    parts = decoder.get("decoders", [decoder])
    kinds = [part.get("type") for part in parts]
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"]:  # as Llama 2 and Gemma have it
        return all(part["type"] == "Strip" and part["stop"] == 0 for part in parts[3:])
    return kinds in (["ByteLevel"], ["Metaspace"], ["Fuse"])


class _WholeTokens(dict[int, str]):
    """The text of each token that is whole characters; empty where it depends on its neighbours."""

    def __init__(self, backend: Any, skip_special_tokens: bool) -> None:
        self._decode = partial(backend.decode, skip_special_tokens=skip_special_tokens)
        self._name = backend.id_to_token
        self._context = _context(backend) if _joins_whole_tokens(backend) else ()

    def __missing__(self, token: int) -> str:
        text = ""
        if self._context and not _BYTE_TOKEN.fullmatch(self._name(token) or ""):
            text = self._decode([*self._context, token])[len(self._decode(self._context)) :]
        self[token] = "" if REPLACEMENT in text else text
        return self[token]


_whole_tokens = lru_cache(16)(_WholeTokens)


def _num_unfinished(tokens: bytes) -> int:
    """How many bytes at the end are the beginning of a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(tokens)
    return len(decoder.getstate()[0])


class Detokenizer:
    """The text of one output, as it continues a text: that of the tokenizer's own ``decode``, but for two cases.

    Text is held back while it may still become a stop string, and while its last character lacks bytes. Returned text
    is final: the chunks joined are the text of the output. The bytes of a character that was cut off at the end are no
    text. And where a byte-fallback tokenizer writes bytes behind whole characters that are none, these characters stay:
    ``decode`` replaces all bytes of such a run, which may be text that was returned long before.

    ``tokenizers.decoders.DecodeStream`` (0.23.3) would be faster, but raises "Invalid prefix encountered" for
    byte-fallback tokenizers after bytes that are no character, and cannot return the text it holds back at the end.
    """

    def __init__(self, tokenizer: Any, sampling: SamplingParams) -> None:
        """``tokenizer`` is a fast Hugging Face tokenizer."""
        self._backend = tokenizer.backend_tokenizer
        self._skip_special_tokens = sampling.skip_special_tokens
        self._whole = _whole_tokens(self._backend, sampling.skip_special_tokens)
        self._skipped = _special_tokens(self._backend) if sampling.skip_special_tokens else frozenset[int]()
        self._stop = sampling.stop
        self._stop_characters = {character for stop in self._stop for character in stop[:-1]}
        self._include_stop = sampling.include_stop_str_in_output
        self._min_tokens = sampling.min_tokens
        self._num_tokens = 0
        self._window = list(_context(self._backend))  # tokens before, as context for decoding, then newer ones
        self._num_read = len(self._window)  # tokens of the window that are not, or already, in the text
        self._read = self._decode(self._window)  # their text
        self._held = ""
        self._chunks: list[str] = []
        self.is_stopped = False
        self.is_cut = False

    @property
    def text(self) -> str:
        """All text that may be shown."""
        if len(self._chunks) > 1:
            self._chunks = ["".join(self._chunks)]
        return self._chunks[0] if self._chunks else ""

    def append(self, token_id: int) -> str:
        """Add a token and return the text that may be shown now.

        Sets ``is_stopped`` at a stop string, and ``is_cut`` where text before the end of its tokens is then left out.
        """
        self._num_tokens += 1
        if self._num_read == len(self._window) and (whole := self._whole[token_id]):
            return self._release(whole)  # the window stays: any context will do
        if token_id in self._skipped:
            return self._release("")
        self._window.append(token_id)
        fresh = self._unread()
        # An unfinished character is decoded to U+FFFD: wait for its other bytes.
        if fresh and not fresh.endswith(REPLACEMENT):
            return self._release(self._advance(len(self._window)))
        decided = self._num_decided() if len(self._window) - self._num_read > MAX_UNREAD_TOKENS else self._num_read
        return self._release(self._advance(decided) if decided > self._num_read else "")

    def finish(self) -> str:
        """The rest of the text at the end of the output; bytes of an unfinished character are left out."""
        if self.is_stopped:
            return ""
        text = self._unread()
        if text.endswith(REPLACEMENT):
            text = text[: len(text) - self._num_replaced()]
        return self._release(text, final=True)

    def _num_replaced(self) -> int:
        """How many U+FFFD at the end of the unread text stand for a character that lacks bytes."""
        names = [self._backend.id_to_token(token) or "" for token in self._window[self._num_read :]]
        last = names[-1] if names else ""
        if _BYTE_TOKEN.fullmatch(last):
            run = [int(name[3:5], 16) for name in takewhile(_BYTE_TOKEN.fullmatch, reversed(names))]
            return _num_unfinished(bytes(reversed(run)))  # one for each byte
        table = _byte_level()
        return min(1, _num_unfinished(bytes(table[char] for name in names for char in name if char in table)))

    def _advance(self, end: int) -> str:
        """The text of the window's tokens up to ``end``, which are context from then on."""
        fresh = self._decode(self._window[:end])[len(self._read) :]
        context = self._window[self._num_read : end]
        # Neighbouring byte tokens are decoded together: characters among the context would change with what follows.
        if not fresh.endswith(REPLACEMENT) and _BYTE_TOKEN.fullmatch(self._backend.id_to_token(context[-1]) or ""):
            context = list(_context(self._backend))
        self._window = [*context, *self._window[end:]]
        self._num_read = len(context)
        self._read = self._decode(self._window[: self._num_read])
        return fresh

    def _num_decided(self) -> int:
        """How many tokens of the window have a text that no later token can change."""
        text, decided = self._decode(self._window), len(self._window) - _CHARACTER_BYTES
        for end in range(decided, decided - _CHARACTER_BYTES, -1):
            if text.startswith(self._decode(self._window[:end])):
                return end
        return self._num_read

    def _unread(self) -> str:
        return self._decode(self._window)[len(self._read) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._backend.decode(tokens, skip_special_tokens=self._skip_special_tokens)

    def _release(self, fresh: str, *, final: bool = False) -> str:
        if not self._stop:
            self._chunks.append(fresh)
            return fresh
        if not fresh and not self._held:
            return ""  # before `min_tokens` what is held back may have a stop string in it
        pending, found = self._held + fresh if self._held else fresh, None
        if self._num_tokens > self._min_tokens:
            for stop in self._stop:
                if stop in pending:
                    found = min(found or (len(pending), ""), (pending.find(stop), stop))
        if found is not None:
            end = found[0] + (len(found[1]) if self._include_stop else 0)
            self.is_stopped, self.is_cut, self._held = True, end < len(pending), ""
        else:
            end = len(pending) - (0 if final else self._beginning_of_stop(pending))
            self._held = pending[end:]
        self._chunks.append(pending[:end])
        return pending[:end]

    def _beginning_of_stop(self, text: str) -> int:
        """The length of the longest end of ``text`` that begins a stop string."""
        if text[-1:] not in self._stop_characters:
            return 0
        start = len(text)
        for stop in self._stop:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1), start)
            while at >= 0 and not stop.startswith(text[at:]):
                at = text.find(stop[0], at + 1, start)
            start = at if at >= 0 else start
        return len(text) - start
