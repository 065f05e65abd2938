"""Text layer of a page: its words with boxes, and the measures that decide whether it can stand for the page.

Every decision errs towards `scanned` and `garbled`: the model reads such a page, which costs time. A page that is
called `clean` wrongly costs an answer.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import groupby, pairwise
from typing import Any, Self

import numpy as np

# Least shares of a clean text layer. docs/text-layer.md has what pages of real documents reach.
MIN_MAPPED = 0.98
MIN_UNSPACED = 0.9
MIN_PLAUSIBLE = 0.8
MIN_LETTERS = 0.75
MIN_INKED = 0.98
MIN_VISIBLE = 0.98
MIN_COVERAGE = 0.8
MAX_PICTURED = 0.1
MAX_BLANK_INK = 0.00005  # of the area: 24 of the 484,704 pixels of a letter page at 72 dpi

EDGE_LEVELS = 40  # of 255, between neighbouring pixels: text of any colour has many, a shaded area has few
INK_LEVELS = 32  # of 255, from the level that most pixels of the page have
RULE_PX = 24  # a straight edge as long is a line; no letter of running text has one
_MARGIN_PX = 1  # smoothed glyphs reach beyond their boxes

LETTERS_OF_INTEREST = 40  # fewer say nothing about frequencies
# In percent, about the mean of English, German, French, Spanish, Italian and Polish without their accents.
_FREQUENCIES = (
    {"a": 8.5, "b": 1.5, "c": 3.3, "d": 4.2, "e": 13.5, "f": 1.4, "g": 2.0, "h": 3.0, "i": 7.5}
    | {"j": 0.5, "k": 1.3, "l": 4.5, "m": 2.8, "n": 7.5, "o": 6.5, "p": 2.6, "q": 0.5, "r": 6.5}
    | {"s": 6.5, "t": 7.0, "u": 4.2, "v": 1.3, "w": 1.3, "x": 0.3, "y": 1.2, "z": 1.2}
)
_LATIN = re.compile(r"[a-z\u0300-\u036f]+")  # with the accents that NFD takes apart
_CID = re.compile(r"\(cid:\d+\)")
_VOWEL = re.compile(r"[aeiouyàáâãäåæèéêëìíîïòóôõöøœùúûüýÿ]")
_PUNCTUATION = frozenset(".,;:()[]'\"’‘“”")
_LETTER_RUN = 4  # single letters in a row that are a spaced word; "a b c" are items of a list
_VOWELLESS = 4  # letters from which on a Latin word has a vowel


class PageKind(StrEnum):
    """What the text layer says about a page."""

    BLANK = "blank"  # neither ink nor words
    CLEAN = "clean"  # the words are the page's text
    GARBLED = "garbled"  # there are words, and they are not what the page shows
    SCANNED = "scanned"  # ink that no word explains: a scan, a picture of text, a filled form, text drawn as paths


@dataclass(frozen=True)
class Word:
    """A word and its box, in points from the top left of the page as it is shown; ``start`` is its offset in the text.

    ``is_shown`` is false for words without ink in their box, and for text that is drawn invisibly.
    """

    text: str
    start: int
    left: float
    top: float
    right: float
    bottom: float
    is_shown: bool = True


@dataclass(frozen=True)
class TextLayer:
    """Text layer of one page.

    Attributes:
        text: in the order of the page's content; lines end with a line feed.
        words: of the text, in its order.
        mapped: share of glyphs that have a character.
        unspaced: share of letters outside of words that are split into single letters ("T o t a l").
        plausible: share of words that can be words, numbers or signs of some language.
        letters: likeness of the frequencies of Latin letters to those of European languages, 1 where there are few:
            character maps that exchange letters for others make words that pass one by one.
        inked: share of words whose box has ink.
        visible: share of words that are not drawn invisibly, as the text of an optical recognition is.
        coverage: share of the page's edges of ink that lie in boxes of words.
        pictured: share of the page's edges of ink that lie in images and in no word's box.
        ink: share of the page's area that has not the level of its background.
        has_annotations: form fields, stamps or notes are drawn on the page, which no text layer holds.
    """

    text: str = ""
    words: tuple[Word, ...] = ()
    mapped: float = 1.0
    unspaced: float = 1.0
    plausible: float = 1.0
    letters: float = 1.0
    inked: float = 1.0
    visible: float = 1.0
    coverage: float = 0.0
    pictured: float = 0.0
    ink: float = 0.0
    has_annotations: bool = False

    @property
    def score(self) -> float:
        """Cleanliness, 0 to 1: the product of what can be wrong with the words themselves."""
        letters = min(1.0, self.letters / MIN_LETTERS)
        return self.mapped * self.unspaced * self.plausible * letters * self.inked * self.visible

    @property
    def is_blank(self) -> bool:
        """Whether the page shows nothing, and has no text either."""
        return not self.words and self.ink <= MAX_BLANK_INK

    @property
    def kind(self) -> PageKind:
        """Decision about the page."""
        if self.is_blank:
            return PageKind.BLANK
        if not self.words or self.visible < MIN_VISIBLE:
            return PageKind.SCANNED
        is_readable = (
            self.mapped >= MIN_MAPPED
            and self.unspaced >= MIN_UNSPACED
            and self.plausible >= MIN_PLAUSIBLE
            and self.letters >= MIN_LETTERS
            and self.inked >= MIN_INKED
        )
        if not is_readable:
            return PageKind.GARBLED
        if self.coverage < MIN_COVERAGE or self.pictured > MAX_PICTURED or self.has_annotations:
            return PageKind.SCANNED
        return PageKind.CLEAN

    def to_json(self) -> str:
        """The inverse of `from_json`."""
        fields = asdict(self) | {"words": [list(asdict(word).values()) for word in self.words]}
        return json.dumps(fields)

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Text layer of what a decoder process answered.

        Raises:
            ValueError, TypeError, KeyError: it is none.
        """
        fields: dict[str, Any] = json.loads(data)
        words = tuple(_checked_word(*values) for values in fields.pop("words"))
        text, has_annotations = fields.pop("text"), fields.pop("has_annotations")
        shares = {name: float(value) for name, value in fields.items()}
        if type(text) is not str or type(has_annotations) is not bool:
            raise TypeError("a text layer has a text")
        if not all(0.0 <= share <= 1.0 for share in shares.values()):
            raise ValueError("shares are within 0 and 1")
        if any(text[word.start : word.start + len(word.text)] != word.text for word in words):
            raise ValueError("words stand in the text")
        return cls(text=text, words=words, has_annotations=has_annotations, **shares)


def _checked_word(text: str, start: int, left: float, top: float, right: float, bottom: float, is_shown: bool) -> Word:
    word = Word(text, start, float(left), float(top), float(right), float(bottom), bool(is_shown))
    is_finite = all(math.isfinite(side) for side in (word.left, word.top, word.right, word.bottom))
    if type(text) is not str or type(start) is not int or start < 0 or not is_finite:
        raise ValueError("a word has a text, an offset and a box")
    return word


@dataclass(frozen=True)
class Glyph:
    """A character of a page: its box on the page as shown, and whether it has a Unicode mapping and is drawn."""

    character: str
    box: tuple[float, float, float, float]
    is_mapped: bool = True
    is_visible: bool = True


def text_layer(
    glyphs: Iterable[Glyph],
    grey: np.ndarray,
    scale: float,
    images: Sequence[tuple[float, float, float, float]] = (),
    *,
    has_annotations: bool = False,
) -> TextLayer:
    """Text layer of ``glyphs`` beside the page in ``grey``, uint8 ``[H, W]`` of ``scale`` pixels a point."""
    ink, edges = ink_share(grey), edge_mask(grey)
    characters: list[str] = []
    runs: list[tuple[int, list[Glyph]]] = []
    length = 0
    for is_space, run in groupby(glyphs, lambda glyph: glyph.character.isspace()):
        group = list(run)
        if not is_space:
            runs.append((length, group))
        part = _whitespace(group) if is_space else "".join(glyph.character for glyph in group)
        characters.append(part)
        length += len(part)
    text = "".join(characters)
    covered = np.zeros_like(edges)
    words, n_inked, n_visible = [], 0, 0
    for start, group in runs:
        word = "".join(glyph.character for glyph in group)
        boxes = [glyph.box for glyph in group]
        left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
        right, bottom = max(box[2] for box in boxes), max(box[3] for box in boxes)
        window = _window((left, top, right, bottom), scale)
        covered[window] = True
        has_ink = bool(edges[window].any())
        is_visible = all(glyph.is_visible for glyph in group)
        n_inked += has_ink
        n_visible += is_visible
        words.append(Word(word, start, left, top, right, bottom, has_ink and is_visible))
    n_edges = max(1, int(edges.sum()))
    pictured = np.zeros_like(edges)
    for box in images:
        pictured[_window(box, scale)] = True
    n_words = max(1, len(words))
    return TextLayer(
        text=text,
        words=tuple(words),
        mapped=_mapped_share([glyph for _, group in runs for glyph in group]),
        unspaced=_unspaced_share([word.text for word in words]),
        plausible=1 - sum(not is_plausible(word.text) for word in words) / n_words,
        letters=_letter_likeness(text),
        inked=n_inked / n_words if words else 1.0,
        visible=n_visible / n_words if words else 1.0,
        coverage=int((edges & covered).sum()) / n_edges,
        pictured=int((edges & pictured & ~covered).sum()) / n_edges,
        ink=ink,
        has_annotations=has_annotations,
    )


def ink_share(grey: np.ndarray) -> float:
    """Share of pixels whose level is not the background's, which is the most frequent one."""
    levels = np.bincount(grey.ravel(), minlength=256)
    background = int(levels.argmax())
    near = slice(max(0, background - INK_LEVELS), background + INK_LEVELS + 1)
    return 1 - int(levels[near].sum()) / grey.size


def edge_mask(grey: np.ndarray) -> np.ndarray:
    """Pixels that differ from their right or lower neighbour, without long straight lines."""
    levels = grey.astype(np.int16)
    edges = np.zeros(grey.shape, bool)
    edges[:, :-1] |= np.abs(np.diff(levels, axis=1)) > EDGE_LEVELS
    edges[:-1] |= np.abs(np.diff(levels, axis=0)) > EDGE_LEVELS
    return edges & ~_long_runs(edges) & ~_long_runs(edges.T).T


def _long_runs(mask: np.ndarray) -> np.ndarray:
    """Those of the mask that lie in a row of at least ``RULE_PX``: rules and borders."""
    if mask.shape[1] < RULE_PX:
        return np.zeros_like(mask)
    sums = np.cumsum(np.pad(mask, ((0, 0), (1, 0))), axis=1, dtype=np.int32)
    is_start = sums[:, RULE_PX:] - sums[:, :-RULE_PX] == RULE_PX
    steps = np.zeros((mask.shape[0], mask.shape[1] + 1), np.int32)
    steps[:, : is_start.shape[1]] += is_start
    steps[:, RULE_PX:] -= is_start
    return np.cumsum(steps, axis=1, dtype=np.int32)[:, :-1] > 0


def is_plausible(word: str) -> bool:
    """Whether ``word`` can be a word, number or sign; what wrong character maps make of words mostly cannot.

    Scripts other than Latin are taken as they are.
    """
    letters = [character for character in word if character.isalpha()]
    if not letters:
        return len({character for character in word if not character.isdigit()} - _PUNCTUATION) < 3
    if any(ord(character) > 0x24F for character in letters):
        return True
    inner = word.strip("".join(set(word) - set(letters)))
    if sum(unicodedata.category(character)[0] not in "LNPS" for character in inner):
        return False
    if any(character in "@/_.:-" for character in inner):  # addresses, paths, identifiers
        return True
    rises = sum(first.islower() and second.isupper() for first, second in pairwise(inner))
    if rises > 1 or any(character in '!"#$%*+;<=>?[]^{|}~\\' for character in inner):
        return False
    if any(character.isdigit() for character in inner):
        return True
    return len(letters) < _VOWELLESS or len(set(letters)) == 1 or _VOWEL.search("".join(letters).lower()) is not None


def _mapped_share(glyphs: Sequence[Glyph]) -> float:
    if not glyphs:
        return 1.0
    by_cid = sum(len(match) for match in _CID.findall("".join(glyph.character for glyph in glyphs)))
    unmapped = sum(not glyph.is_mapped or _is_no_character(glyph.character) for glyph in glyphs)
    return max(0.0, 1 - (by_cid + unmapped) / len(glyphs))


def _is_no_character(character: str) -> bool:
    return character == "\ufffd" or unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs")


def _unspaced_share(words: Sequence[str]) -> float:
    """Share of letters that are not in a row of single letters: letter spacing that was taken for spaces."""
    n_letters = sum(character.isalpha() for word in words for character in word)
    spaced = 0
    for is_single, run in groupby(words, lambda word: len(word) == 1 and word.isalpha() and ord(word) < 0x2E80):
        length = len(list(run))
        spaced += length if is_single and length >= _LETTER_RUN else 0
    return 1 - spaced / max(1, n_letters)


def _letter_likeness(text: str) -> float:
    """Cosine between the letter frequencies of the words of ``text``, each once, and those of European languages."""
    # Of a list of links, or a form that repeats itself, the words that it repeats would be most letters.
    words = set(_LATIN.findall(unicodedata.normalize("NFD", text.lower())))
    letters = Counter(letter for word in words for letter in word if letter in _FREQUENCIES)
    if letters.total() < LETTERS_OF_INTEREST:
        return 1.0
    product = sum(count * _FREQUENCIES[letter] for letter, count in letters.items())
    return min(1.0, product / (math.hypot(*letters.values()) * math.hypot(*_FREQUENCIES.values())))


def _whitespace(group: Sequence[Glyph]) -> str:
    return "\n" if any(glyph.character in "\r\n" for glyph in group) else " "


def _window(box: tuple[float, float, float, float], scale: float) -> tuple[slice, slice]:
    left, top, right, bottom = (side * scale for side in box)
    rows = slice(max(0, int(top) - _MARGIN_PX), max(0, int(bottom) + 1 + _MARGIN_PX))
    return rows, slice(max(0, int(left) - _MARGIN_PX), max(0, int(right) + 1 + _MARGIN_PX))
