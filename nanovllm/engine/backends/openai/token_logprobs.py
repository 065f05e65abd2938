"""Log probabilities of tokens as servers list them, checked; then by position, and where tokens end in the text."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from typing import Any

from nanovllm.engine.backends.openai.faults import not_of_the_protocol
from nanovllm.engine.outputs import Logprob, TokenLogprobs

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_TOKEN_IDS = range(2**31)


def token_ids(value: Any) -> list[int]:
    """The checked ``token_ids`` of a choice, which may be null. Raises EndpointFault."""
    ids = [] if value is None else value
    if not isinstance(ids, list) or not all(type(token) is int and token in _TOKEN_IDS for token in ids):
        raise not_of_the_protocol("token_ids")
    return ids


def logprob_entries(logprobs: Any) -> list[dict[str, Any]]:
    """The checked entries of ``logprobs.content``, which may be null.

    Those of tokens that cannot come (null or minus infinity) are left out of ``top_logprobs``. Raises EndpointFault.
    """
    content = logprobs.get("content") if isinstance(logprobs, dict) else logprobs
    content = [] if content is None else content
    if not isinstance(content, list):
        raise not_of_the_protocol("logprobs")
    return [_entry(one) for one in content]


def position(entry: dict[str, Any], token_id: int | None, most: int) -> TokenLogprobs:
    """Log probabilities at one position: of the token taken and of the ``most`` best.

    The rank of a token that is not among those that the server lists is the next number. The key of one whose id the
    server does not say is minus its rank.
    """
    best = sorted(entry["top_logprobs"], key=lambda one: -one["logprob"])
    # Tokens that are parts of one character may have equal texts.
    equal = [number for number, one in enumerate(best, 1) if _token(one) == _token(entry)]
    rank = min(equal, key=lambda number: abs(best[number - 1]["logprob"] - entry["logprob"]), default=len(best) + 1)
    named = entry.get("id", token_id)
    found = {_key(named, rank): Logprob(entry["logprob"], rank, entry["token"])}
    for number, one in enumerate(best[:most], 1):
        if number != rank:
            found.setdefault(_key(one.get("id"), number), Logprob(one["logprob"], number, one["token"]))
    return found


def _entry(value: Any) -> dict[str, Any]:
    top = value.get("top_logprobs") if isinstance(value, dict) else None
    top = [] if top is None else top
    if not isinstance(top, list):
        raise not_of_the_protocol("top_logprobs")
    return _token_entry(value) | {"top_logprobs": [_token_entry(one) for one in top if not _is_impossible(one)]}


def _token_entry(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("token"), str):
        raise not_of_the_protocol("logprobs")
    raw, token_id = value.get("bytes"), value.get("id")
    if raw is not None and not (isinstance(raw, list) and all(type(byte) is int and 0 <= byte < 256 for byte in raw)):
        raise not_of_the_protocol("bytes of a token")
    if type(token_id) is int and token_id not in _TOKEN_IDS:
        raise not_of_the_protocol("id of a token")
    # Half a surrogate pair is a part of a character, for which servers write U+FFFD as a rule.
    token = value["token"].encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return value | {"token": token, "logprob": _finite(value.get("logprob"))}


def _is_impossible(value: Any) -> bool:
    return isinstance(value, dict) and value.get("logprob", 0.0) in (None, -math.inf)


def _finite(value: Any) -> float:
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        number = math.nan
    if not math.isfinite(number):
        raise not_of_the_protocol("logprob")
    return number


def _token(entry: dict[str, Any]) -> tuple[str, bytes]:
    return entry["token"], bytes(entry.get("bytes") or b"")


def _key(token_id: Any, rank: int) -> int:
    return token_id if type(token_id) is int else -rank


def text_ends(entries: Sequence[dict[str, Any]], text: str) -> tuple[int, ...] | None:
    """As ``Completion.text_ends``; None where the tokens are not the text's.

    Servers write U+FFFD for a part of a character, also in ``bytes`` (vLLM): such tokens end where the next whole one
    begins. Tokens behind the text, such as the end of a sequence, end with it.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    ends: list[int] = []
    at, parts = 0, 0  # how many characters are known, and at most how many the tokens since then stand for
    for entry in entries:
        raw = entry.get("bytes")
        piece = decoder.decode(bytes(raw) if raw is not None else entry["token"].encode())
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
