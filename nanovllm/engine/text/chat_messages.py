"""Chat messages on their way through a chat template: checked, with stand-ins for their texts, and put back."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.errors import InvalidInput
from nanovllm.image_placeholder import IMAGE_PLACEHOLDER

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

Piece = str | None  # untrusted text, or None for an image


class Untrusted(str):
    """Untrusted text in a rendered prompt, whose other strings are the template's own."""

    __slots__ = ()


Part = str | Untrusted | None


@dataclass(frozen=True)
class Turn:
    """One message; ``is_parts`` tells whether its content came as a list of parts."""

    role: str
    pieces: tuple[Piece, ...]
    is_parts: bool


class StandIns:
    """Stand-ins for untrusted pieces in one rendering of a template."""

    def __init__(self) -> None:
        # Letters and digits only: nothing that a template escapes or looks for.
        self._nonce = f"x{secrets.token_hex(12)}x"
        self._pieces: list[tuple[Piece, ...]] = []

    @property
    def mark(self) -> str:
        """What must not be rendered: in a part beside its text, it tells a list that a template printed."""
        return f"{self._nonce}x"

    def put(self, *pieces: Piece) -> str:
        """A stand-in for ``pieces``, with the white space around them, which some templates trim."""
        first, last = (piece or "" for piece in (pieces[0], pieces[-1]))
        before = first[: len(first) - len(first.lstrip())]
        behind = last[len(last.rstrip()) :] if last.strip() or len(pieces) > 1 else ""
        inner = list(pieces)
        if inner[0] is not None:
            inner[0] = inner[0][len(before) :]
        if inner[-1] is not None and behind:
            inner[-1] = inner[-1][: -len(behind)]
        self._pieces.append(tuple(inner))
        return f"{before}{self._nonce}{len(self._pieces) - 1}x{behind}"

    def restore(self, rendered: str) -> list[Part] | None:
        """The rendered text with the stand-ins replaced by the pieces; None when one is missing or was rewritten."""
        restored: list[Part] = []
        seen: set[int] = set()
        for number, part in enumerate(re.split(rf"{self._nonce}(\d+)x", rendered)):
            if number % 2:
                seen.add(int(part))
                restored += [None if piece is None else Untrusted(piece) for piece in self._pieces[int(part)]]
            elif self._nonce in part.lower():
                return None
            else:
                restored.append(part)
        return restored if seen == set(range(len(self._pieces))) else None


class OwnTexts:
    """The texts themselves, in the places of stand-ins; ``around`` stands on both sides of whatever ``found`` finds."""

    mark = None

    def __init__(self, image_text: str, found: re.Pattern[str] | None = None, around: str = "") -> None:
        self._image_text = image_text
        self._found = found
        self._around = around

    def put(self, *pieces: Piece) -> str:
        """``pieces`` as one text."""
        return "".join(self._image_text if piece is None else self._marked(piece) for piece in pieces)

    def _marked(self, text: str) -> str:
        around = self._around
        return text if self._found is None else self._found.sub(lambda one: f"{around}{one[0]}{around}", text)


def split_images(prompt: str) -> tuple[Piece, ...]:
    """The texts between placeholders, with None for each placeholder."""
    return tuple(piece for text in prompt.split(IMAGE_PLACEHOLDER) for piece in (None, text))[1:]


def to_template(turn: Turn, texts: StandIns | OwnTexts, as_parts: bool | None) -> dict[str, Any]:
    """The message as the template gets it; ``as_parts`` None keeps the form in which it came."""
    if not (turn.is_parts if as_parts is None else as_parts):
        return {"role": turn.role, "content": texts.put(*turn.pieces) if turn.pieces != ("",) else ""}
    parts = []
    beside = {} if texts.mark is None else {"mark": texts.mark}
    for piece in turn.pieces:
        if piece is None:
            parts.append({"type": "image", **beside})
        elif piece or turn.is_parts or len(turn.pieces) == 1:
            parts.append({"type": "text", "text": texts.put(piece) if piece else "", **beside})
    return {"role": turn.role, "content": parts}


def read_turn(number: int, message: Mapping[str, Any]) -> Turn:
    """Check message ``number`` and read it; InvalidInput names what is wrong, never its text."""
    if not isinstance(message, Mapping):
        raise InvalidInput(f"messages[{number}] is not an object")
    unknown = sorted(str(key) for key, value in message.items() if key not in ("role", "content") and value is not None)
    if unknown:
        raise InvalidInput(f"messages[{number}] has fields that are not supported: {', '.join(unknown)[:200]}")
    role = message.get("role")
    # The template writes the role as it is: only known ones may reach it.
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidInput(f"messages[{number}].role is none of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        return Turn(ROLES[role], (content,), is_parts=False)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise InvalidInput(f"messages[{number}].content is neither a string nor a list of parts")
    pieces = tuple(_read_part(f"messages[{number}].content[{index}]", part) for index, part in enumerate(content))
    return Turn(ROLES[role], pieces, is_parts=True)


def _read_part(name: str, part: Any) -> Piece:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("image", "image_url"):
        return None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise InvalidInput(f"{name} is neither a text part nor an image part")
