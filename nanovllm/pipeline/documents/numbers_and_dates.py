"""Numbers and dates in running text, by what they may mean.

Numbers: digits with or without groups of three (``1,250,000``, ``1.250.000``, ``1'250'000``, ``1 250 000`` with no-
break or thin spaces), with a decimal point or comma; a currency sign or unit beside them does not matter. ``1,250``
may be 1250 or 1.25, and so may ``1.250``. In parentheses a number may be negative too, and behind a minus it is. With
thousand, million, billion or trillion behind it, it may be that many as well.

Dates: ``2024-12-31`` and ``2024/12/31``; ``31.12.2024``, ``31/12/2024`` and ``12/31/2024`` (where both numbers are 12
or less, either may be the month); ``December 31, 2024``, ``Dec. 31st, 2024``, ``31 December 2024``, ``31st day of
December, 2024``. Names of months are English; years have four digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date
from decimal import Decimal

from nanovllm.messages.document_record import Span

_GROUPING = ".,'\u2019\u00a0\u202f\u2009"
_DIGITS = re.compile(rf"(?<!\w)(?<!\d[.,])\d++(?:[{_GROUPING}]\d++){{0,12}}+(?!\w)", re.ASCII)
_MAX_DIGITS = 40  # a longer run is no amount, and Decimal would round it
_OPENING = re.compile(r"\(\s?[$\u20ac\u00a3\u00a5]?\s?$")
_MINUS = re.compile(r"(?<!\w)[-\u2212\u2013]\s?[$\u20ac\u00a3\u00a5]?\s?$")
_SCALE = re.compile(r"\s(thousand|million|billion|trillion)\b", re.IGNORECASE)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# A string that is one number: a sign or currency before it, a percent sign or currency behind it.
_WHOLE_NUMBER = re.compile(
    r"(?P<open>\()?(?:[A-Z]{3}\s?)?(?P<minus>[-\u2212])?[$\u20ac\u00a3\u00a5]?\s?(?P<digits>\d[^\sA-Za-z%)]*)"
    r"\s?(?:%|[$\u20ac\u00a3\u00a5]|[A-Z]{3})?\)?"
)

_MONTHS = {
    name: number
    for number, names in enumerate(
        ("january jan", "february feb", "march mar", "april apr", "may", "june jun", "july jul", "august aug",
         "september sept sep", "october oct", "november nov", "december dec"), 1
    )
    for name in names.split()
}  # fmt: skip
_MONTH = rf"(?P<month>{'|'.join(_MONTHS)})\b\.?"
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"(?P<year>\d{4})\b"
_DATES = tuple(
    re.compile(rf"\b(?:{form})", re.IGNORECASE | re.ASCII)
    for form in (
        rf"{_YEAR}(?P<separator>[-/])(?P<month>\d{{1,2}})(?P=separator)(?P<day>\d{{1,2}})\b",
        rf"(?P<day>\d{{1,2}})(?P<separator>[./-])(?P<month>\d{{1,2}})(?P=separator){_YEAR}",
        rf"{_MONTH}\s{{1,3}}{_DAY}\s?,?\s{{1,3}}{_YEAR}",
        rf"{_DAY}\s{{1,3}}(?:day\s{{1,3}})?(?:of\s{{1,3}})?{_MONTH}\s?,?\s{{1,3}}{_YEAR}",
    )
)


def numbers_in(text: str) -> Iterator[tuple[Decimal, Span]]:
    """Every number that may stand in ``text``, once for each of its meanings, and the span of its digits."""
    for match in _DIGITS.finditer(text):
        start, end = match.span()
        before = text[max(0, start - 4) : start]
        scale = _SCALE.match(text, end)
        for amount in _readings(match[0]):
            is_negative = _MINUS.search(before) is not None
            yield (-amount if is_negative else amount), (start, end)
            if not is_negative and text[end : end + 1] == ")" and _OPENING.search(before):
                yield -amount, (start, end)
            if scale:
                yield (-amount if is_negative else amount) * _SCALES[scale[1].lower()], (start, scale.end())


def dates_in(text: str) -> Iterator[tuple[date, Span]]:
    """Every date that may stand in ``text``, once for each of its meanings, and its span."""
    for form in _DATES:
        for match in form.finditer(text):
            year, day, month = int(match["year"]), int(match["day"]), match["month"].lower()
            months = [_MONTHS[month]] if month in _MONTHS else [int(month)]
            pairs = [(months[0], day)]
            if form is _DATES[1] and months[0] != day:
                pairs.append((day, months[0]))
            for month_number, day_number in pairs:
                try:
                    yield date(year, month_number, day_number), match.span()
                except ValueError:
                    continue


def numbers_of(value: object) -> set[Decimal]:
    """The numbers that a value may mean: itself, or a string that is one number."""
    if isinstance(value, bool):
        return set()
    if isinstance(value, (int, float)):
        return {Decimal(repr(value))}
    match = _WHOLE_NUMBER.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return set()
    is_negative = bool(match["minus"] or match["open"])
    return {-amount if is_negative else amount for amount in _readings(match["digits"])}


def dates_of(value: object) -> set[date]:
    """The dates that a string may mean; none where it says more than a date."""
    if not isinstance(value, str):
        return set()
    stripped = value.strip()
    return {found for found, span in dates_in(stripped) if span == (0, len(stripped))}


def _readings(run: str) -> set[Decimal]:
    """What digits with separators between them may mean."""
    digits = re.split(rf"[{_GROUPING}]", run)
    separators = [one for one in run if not one.isdecimal()]
    if len(run) > _MAX_DIGITS or not all(part.isascii() and part.isdecimal() for part in digits):
        return set()
    found = set()
    if _is_grouped(digits, separators):
        found.add(Decimal("".join(digits)))
    *groups, last = separators or [""]
    if last in tuple(".,") and last not in groups and _is_grouped(digits[:-1], groups):
        found.add(Decimal(f"{''.join(digits[:-1])}.{digits[-1]}"))
    return found


def _is_grouped(digits: list[str], separators: list[str]) -> bool:
    if not separators:
        return True
    return len(set(separators)) == 1 and len(digits[0]) <= 3 and all(len(part) == 3 for part in digits[1:])
