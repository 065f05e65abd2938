"""Evidence search: where a leaf of a value stands in the pages' texts.

A leaf is searched as text, normalised as ``normalised_text`` says (case, white space, compatibility characters,
hyphens, quotes), and not inside a longer word or number. A number, and a string that is one number or one date, is
searched by its meaning too, in the forms that ``numbers_and_dates`` lists. ``exact`` is a place with the leaf's own
characters, a number's as JSON writes it; every other place is ``normalised``.

Leaves of fewer than ``MIN_CHARS`` characters, truth values and null would stand everywhere, and have no evidence.
What stands in several places is marked ambiguous: which of them was read is not known, and the first is named.
"""

from __future__ import annotations

import json
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from functools import cached_property
from operator import itemgetter
from typing import Any, TypeVar

from nanovllm.messages.document_record import EvidenceMatch, FieldMeta, Span, SuspiciousSpan
from nanovllm.pipeline.documents.json_spans import leaves
from nanovllm.pipeline.documents.normalised_text import NormalisedText, normalised
from nanovllm.pipeline.documents.numbers_and_dates import dates_in, dates_of, numbers_in, numbers_of

T = TypeVar("T")

MIN_CHARS = 3
MAX_OCCURRENCES = 100


@dataclass(frozen=True)
class Evidence:
    """Where a leaf stands: the first of ``occurrences`` places, an exact one before normalised ones."""

    page: int
    span: Span
    text: str
    match: EvidenceMatch
    occurrences: int


class PageTexts:
    """The texts of a document's pages, by page number, prepared for many searches.

    Args:
        suspicious: by page, the spans that address a model; a place that touches one is no evidence.
    """

    def __init__(
        self, texts: Mapping[int, str], suspicious: Mapping[int, Sequence[SuspiciousSpan]] | None = None
    ) -> None:
        self._index = _Index(texts)
        self._suspicious = {number: [one.span for one in spans] for number, spans in (suspicious or {}).items()}
        # Apart, because the number of places in the whole is bounded.
        self._suspicious_index = _Index(dict(enumerate(one.text for _, spans in _sorted(suspicious) for one in spans)))

    def find_evidence(self, value: Any) -> Evidence | None:
        """Where ``value`` stands outside suspicious text; None where it does not, and for leaves that have none."""
        if not has_evidence(value):
            return None
        places = [place for place in self._index.places(value) if not self._is_suspicious(*place)]
        if not places:
            return None
        shown = shown_text(value)
        exact = [place for place in places if self._index.slice(*place) == shown]
        page, span = (exact or places)[0]
        match: EvidenceMatch = "exact" if exact else "normalised"
        return Evidence(page, span, self._index.slice(page, span), match, min(len(places), MAX_OCCURRENCES))

    def is_only_suspicious(self, value: Any) -> bool:
        """Whether ``value`` stands in suspicious text and has no evidence elsewhere.

        Short leaves never have evidence, so that for them the suspicious place decides.
        """
        return bool(self._suspicious_index.places(value)) and self.find_evidence(value) is None

    def _is_suspicious(self, page: int, span: Span) -> bool:
        return any(start < span[1] and span[0] < end for start, end in self._suspicious.get(page, ()))


class _Index:
    """Texts by number, and where in them a leaf stands, whatever its length."""

    def __init__(self, texts: Mapping[int, str]) -> None:
        self._texts = dict(_sorted(texts))

    def places(self, value: Any) -> list[tuple[int, Span]]:
        """Number and span of each place, in order, the first ``MAX_OCCURRENCES`` of each way to write it."""
        shown = shown_text(value)
        if not shown:
            return []
        places = set(self._text_places(shown))
        for meaning in numbers_of(value) | dates_of(value):
            places.update(self._meanings.get(meaning, ()))
        return sorted(places)

    def slice(self, number: int, span: Span) -> str:
        """The characters at a place."""
        return self._texts[number][span[0] : span[1]]

    def _text_places(self, shown: str) -> Iterator[tuple[int, Span]]:
        needle, found = normalised(shown), 0
        if not needle:
            return
        for number, page in self._normalised.items():
            at = page.text.find(needle)
            while at >= 0 and found < MAX_OCCURRENCES:
                span = page.original_span(at, at + len(needle))
                if stands_alone(page.original, span):
                    yield number, span
                    found += 1
                at = page.text.find(needle, at + len(needle))

    @cached_property
    def _normalised(self) -> dict[int, NormalisedText]:
        return {number: NormalisedText(text) for number, text in self._texts.items()}

    @cached_property
    def _meanings(self) -> dict[Decimal | date, list[tuple[int, Span]]]:
        """Places of numbers and dates, by what they may mean."""
        found: defaultdict[Decimal | date, list[tuple[int, Span]]] = defaultdict(list)
        for number, text in self._texts.items():
            meanings: list[tuple[Decimal | date, Span]] = [*numbers_in(text), *dates_in(text)]
            for meaning, span in meanings:
                if len(found[meaning]) < MAX_OCCURRENCES:
                    found[meaning].append((number, span))
        return dict(found)


def _sorted(by_number: Mapping[int, T] | None) -> list[tuple[int, T]]:
    return sorted((by_number or {}).items(), key=itemgetter(0))


def find_evidence(value: Any, texts: Mapping[int, str]) -> Evidence | None:
    """Where one value stands in the texts by page. Of many values: ``PageTexts``, which prepares the texts once."""
    return PageTexts(texts).find_evidence(value)


def with_evidence(fields: Mapping[str, FieldMeta], value: Any, texts: PageTexts) -> dict[str, FieldMeta]:
    """``fields`` of ``value`` with what the search for its leaves found; fields without a leaf stay as they are."""
    found = dict(fields)
    for pointer, leaf in leaves(value):
        field = fields.get(pointer)
        if field is None:
            raise ValueError(f"the value has a leaf at {pointer!r} and fields have none: make them of this value")
        evidence = texts.find_evidence(leaf)
        update: dict[str, Any] = {"suspicious_text": texts.is_only_suspicious(leaf)}
        if evidence is not None:
            update |= {
                "evidence": evidence.match,
                "page": evidence.page,
                "text": evidence.text,
                "span": evidence.span,
                "occurrences": evidence.occurrences,
                "ambiguous": evidence.occurrences > 1,
            }
        found[pointer] = field.model_copy(update=update)
    return found


def shown_text(value: Any) -> str | None:
    """The characters of a leaf: of a string itself, of a number or truth value as JSON writes it; None for others."""
    if isinstance(value, str):
        return value.strip()
    return json.dumps(value) if isinstance(value, (bool, int, float)) else None


def has_evidence(value: Any) -> bool:
    """Whether a leaf is searched for at all."""
    shown = None if isinstance(value, bool) else shown_text(value)
    return shown is not None and len(shown) >= MIN_CHARS


def stands_alone(text: str, span: Span) -> bool:
    """Whether what stands at ``span`` is not a part of a longer word or number.

    Letters of scripts without cases (category Lo) bound themselves: Chinese, Japanese and Thai write no spaces.
    """
    start, end = span
    before, after = text[max(0, start - 2) : start], text[end : end + 2]
    if (text[start].isdigit() and before[-1:] in ".," and before[:1].isdigit()) or (
        text[end - 1].isdigit() and after[:1] in ".," and after[1:].isdigit()
    ):
        return False  # 50 in 12.50
    if after and unicodedata.combining(after[0]):
        return False
    return not (_joins(before[-1:], text[start]) or _joins(text[end - 1], after[:1]))


def _joins(left: str, right: str) -> bool:
    return all(one and unicodedata.category(one) in _WORD for one in (left, right))


_WORD = frozenset({"Lu", "Ll", "Lt", "Lm", "Nd"})
