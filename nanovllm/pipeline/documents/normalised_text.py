"""Normalised text for searching, with the way back to the characters it came from.

Normalisation: compatibility decomposition (NFKD, which makes equal what NFKC does: ligatures, full width, superscripts;
an accented letter is a letter and its accent) and case folding; a hyphen or dash between two letters goes, with a line
break behind it, every other one is ``-``; quotation marks are ``'`` or ``"``; invisible characters (soft hyphens,
zero-width spaces, fillers, variation selectors, controls) go; white space is one space.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache

from nanovllm.messages.document_record import Span

_HYPHENS = "\\-\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"
_LETTER = r"[^\W\d_]"
# Other than a word's own hyphen, the one that broke it at the end of a line cannot be told: both go.
_INNER_HYPHEN = rf"(?<={_LETTER})[{_HYPHENS}\u00ad](?:[^\S\n]*+\n\s*+)?(?={_LETTER})"
# PDFium gives U+0002 or U+FFFE for the hyphen of a word that goes on in the next line.
_BROKEN_WORD = r"[\u0002\ufffe]\s*"
# Shown as nothing though their category is not Cf (Unicode 16, Default_Ignorable_Code_Point), and control characters.
_INVISIBLE = (
    r"[\x00-\x08\x0e-\x1b\x7f\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\ufe00-\ufe0f\uffa0"
    r"\U000e0000-\U000e0fff]"
)
_SPECIAL = re.compile(rf"(?P<dropped>{_INNER_HYPHEN}|{_BROKEN_WORD}|{_INVISIBLE})|\s+|[^\x00-\x7f]|`")

_FOLDED = {
    **dict.fromkeys(_HYPHENS[1:], "-"),
    **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u02bc`\u00b4", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"'),
}


class NormalisedText:
    """A text, its normalised form, and the mapping between the positions of both."""

    def __init__(self, original: str) -> None:
        self.original = original
        # Runs of the normalised text: where each begins, and its original. A run of plain ASCII has as many characters
        # in both; any other is the image of one character, or of one stretch of white space.
        self._starts: list[int] = []
        self._originals: list[Span] = []
        self.text = ""
        parts: list[str] = []
        length, at = 0, 0
        for start, end, image in _specials(original):
            for run, span in ((original[at:start].lower(), (at, start)), (image, (start, end))):
                if not run or (run == " " and parts and parts[-1] == " "):  # two spaces around what is invisible
                    continue
                parts.append(run)
                self._starts.append(length)
                self._originals.append(span)
                length += len(run)
            at = end
        self.text = "".join(parts)

    def original_span(self, start: int, end: int) -> Span:
        """The span in the original that became ``[start, end)`` of ``text``; it must not be empty."""
        return self._original(start)[0], self._original(end - 1)[1]

    def _original(self, position: int) -> Span:
        """The characters of the original that became the character at ``position``."""
        run = bisect_right(self._starts, position) - 1
        start, end = self._originals[run]
        following = self._starts[run + 1] if run + 1 < len(self._starts) else len(self.text)
        if following - self._starts[run] != end - start:
            return start, end
        place = start + position - self._starts[run]
        return place, place + 1


def normalised(text: str) -> str:
    """``text`` as it is searched, without white space at its ends."""
    return NormalisedText(text).text.strip()


def _specials(text: str) -> Iterator[tuple[int, int, str]]:
    """What is not copied: start, end, and what it becomes; the end of the text last."""
    for match in _SPECIAL.finditer(text):
        yield match.start(), match.end(), "" if match["dropped"] else _image(match[0])
    yield len(text), len(text), ""


@lru_cache(4096)
def _image(special: str) -> str:
    if special.isspace():
        return " "
    if special in _FOLDED:
        return _FOLDED[special]
    decomposed = unicodedata.normalize("NFKD", special).casefold()
    return "".join(
        _FOLDED.get(one, " " if one.isspace() else one)
        for one in unicodedata.normalize("NFKD", decomposed)
        if unicodedata.category(one) != "Cf"
    )
