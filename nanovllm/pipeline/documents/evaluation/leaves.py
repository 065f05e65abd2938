"""Equality of two leaves: exact, or normalised.

Normalised: equal after normalisation of case, white space, compatibility characters, hyphens and quotes
(``normalised_text``), or one number or one date in two spellings (``numbers_and_dates``). A spelling with two meanings,
such as ``03/04/2024`` or ``1,250``, is equal to either. Numbers in different units are not equal; digits behind a
leading zero are an identifier, no number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from functools import lru_cache
from typing import Any

from nanovllm.pipeline.documents.evidence import shown_text
from nanovllm.pipeline.documents.normalised_text import normalised
from nanovllm.pipeline.documents.numbers_and_dates import dates_of, numbers_of

_IDENTIFIER = re.compile(r"0\d")
_UNIT = re.compile(r"[A-Z]{3}|[%$\u20ac\u00a3\u00a5]")
_CURRENCIES = {"$": "USD", "\u20ac": "EUR", "\u00a3": "GBP", "\u00a5": "JPY"}


@dataclass(frozen=True)
class Meanings:
    """What a leaf may mean; ``unit`` is a currency's code or ``%``, empty where none is written."""

    text: str
    numbers: frozenset[Decimal]
    unit: str
    dates: frozenset[date]


def is_absent(value: Any) -> bool:
    """Whether a leaf says that there is nothing: null, an empty list or object, a string without characters."""
    return value is None or value in ([], {}) or (isinstance(value, str) and not value.strip())


def is_exact(truth: Any, value: Any) -> bool:
    """Whether two leaves are the same JSON value: 1 and 1.0 are, 1 and true or "1" are not."""
    return isinstance(truth, bool) == isinstance(value, bool) and bool(truth == value)


def is_equal(truth: Any, value: Any) -> bool:
    """Whether two leaves are equal after normalisation."""
    return is_exact(truth, value) or have_one_meaning(meanings(truth), meanings(value))


def have_one_meaning(one: Meanings, other: Meanings) -> bool:
    """Whether some meaning is common to both."""
    if one.text == other.text or one.dates & other.dates:
        return True
    return bool(one.numbers & other.numbers) and (not one.unit or not other.unit or one.unit == other.unit)


def meanings(value: Any) -> Meanings:
    """What a scalar may mean."""
    return _meanings(value, isinstance(value, bool))


@lru_cache(1 << 16)
def _meanings(value: Any, is_bool: bool) -> Meanings:
    """``is_bool`` is a part of the key: True and 1 are equal, and so are their hashes."""
    value = bool(value) if is_bool else value
    shown = shown_text(value) or ""
    is_identifier = isinstance(value, str) and _IDENTIFIER.match(shown) is not None
    numbers = frozenset() if is_identifier else frozenset(numbers_of(value))
    unit = _UNIT.search(shown) if numbers and isinstance(value, str) else None
    return Meanings(
        text=normalised(shown),
        numbers=numbers,
        unit=_CURRENCIES.get(unit[0], unit[0]) if unit else "",
        dates=frozenset(dates_of(value)),
    )
