"""JSON Schema formats: which are enforced, as patterns where llguidance's own form takes what parsers refuse.

Formats of a draft are enforced or refused. Of those that pydantic writes, the regular ones are enforced; any other
format is an annotation, as JSON Schema has it, unless it is a misspelt one.
"""

from __future__ import annotations

from functools import cache
from typing import Any

# llguidance 1.9 enforces these; its dates take a 29 February of any year, and its times a second 60.
_BUILT_IN = frozenset({"email", "hostname", "uri"})
_ALIASES = {"host-name": "hostname", "ip-address": "ipv4"}  # draft 3
REFUSED = frozenset(
    {"color", "idn-email", "idn-hostname", "iri", "iri-reference", "phone", "regex", "style", "uri-reference",
     "uri-template", "utc-millisec"}
)  # fmt: skip
"""Formats of a draft that are no regular language, or whose one is not here."""
_UNASSERTED = frozenset(
    {"binary", "byte", "decimal", "directory-path", "double", "file-path", "float", "fraction", "int32", "int64",
     "json-string", "multi-host-uri", "name-email", "password", "path", "zoneinfo"}
)  # fmt: skip
"""Formats of pydantic and OpenAPI that take any text, or no regular language."""

_MONTHS = r"(0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8])"
_LEAP = r"(\d\d(0[48]|[2468][048]|[13579][26])|([02468][48]|[13579][26]|[2468]0)00)"
_YEAR = r"(\d\d\d[1-9]|\d\d[1-9]0|\d[1-9]00|[1-9]000)"  # Python's dates have no year 0
_DATE = rf"({_YEAR}-({_MONTHS})|{_LEAP}-02-29)"
# RFC 3339 has leap seconds (:60), which no clock type of Python takes.
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,9})?([zZ]|[+-]([01]\d|2[0-3]):[0-5]\d)"
# Lengths that Python's timedelta holds; in the appendix of RFC 3339 no unit is left out between two others.
_CLOCK = r"T(\d{1,6}H(\d{1,7}M(\d{1,9}S)?)?|\d{1,7}M(\d{1,9}S)?|\d{1,9}S)"
_CALENDAR = r"(\d{1,6}Y(\d{1,7}M(\d{1,8}D)?)?|\d{1,7}M(\d{1,8}D)?|\d{1,8}D)"
_DURATION = rf"P({_CALENDAR}({_CLOCK})?|{_CLOCK}|\d{{1,7}}W)"
_POINTER = r"(/([^/~]|~[01])*)*"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_IPV4 = rf"{_BYTE}(\.{_BYTE}){{3}}"
_GROUP = r"[0-9a-fA-F]{1,4}"
_HEX = r"[0-9a-fA-F]"


@cache
def _patterns() -> dict[str, str]:
    """The whole text of each format, without anchors."""
    sizes4, sizes6 = r"(/(3[0-2]|[12]?\d))?", r"(/(12[0-8]|1[01]\d|[1-9]?\d))?"
    ipv6, networks4, networks6 = _ipv6(), _networks4(), _networks6()
    return {
        "base64": r"([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?",
        "base64url": r"([A-Za-z0-9_-]{4})*([A-Za-z0-9_-]{2}==|[A-Za-z0-9_-]{3}=)?",
        "date": _DATE,
        "date-time": rf"{_DATE}[tT]{_TIME}",
        "duration": _DURATION,
        "ipv4": _IPV4,
        "ipv4interface": _IPV4 + sizes4,
        "ipv4network": networks4,
        "ipv6": ipv6,
        "ipv6interface": f"({ipv6}){sizes6}",
        "ipv6network": networks6,
        "ipvanyaddress": f"{_IPV4}|{ipv6}",
        "ipvanyinterface": f"{_IPV4}{sizes4}|({ipv6}){sizes6}",
        "ipvanynetwork": f"{networks4}|{networks6}",
        "json-pointer": _POINTER,
        "relative-json-pointer": rf"(0|[1-9]\d*)(#|{_POINTER})",
        "time": _TIME,
        "uuid": f"{_HEX}{{8}}(-{_HEX}{{4}}){{3}}-{_HEX}{{12}}",
        **{
            f"uuid{version}": f"{_HEX}{{8}}-{_HEX}{{4}}-{version}{_HEX}{{3}}-[89abAB]{_HEX}{{3}}-{_HEX}{{12}}"
            for version in range(1, 9)
        },
    }


def _ipv6() -> str:
    """Addresses in groups; ``::`` stands for one group or more."""
    forms = [f"({_GROUP}:){{7}}{_GROUP}"]
    for left in range(8):
        head = f"{_GROUP}(:{_GROUP}){{{left - 1}}}" if left else ""
        forms.append(f"{head}::" + (f"({_GROUP}(:{_GROUP}){{0,{6 - left}}})?" if left < 7 else ""))
    return "|".join(forms)


def _networks4() -> str:
    """Networks whose bits behind the prefix are zero, as Python's ``IPv4Network`` wants them."""
    forms = [rf"{_IPV4}(/32)?", r"0\.0\.0\.0/0"]
    for whole in range(4):
        for bits in range(1, 9 if whole < 3 else 8):
            bytes_ = [_BYTE] * whole + ["(" + "|".join(map(str, range(0, 256, 1 << 8 - bits))) + ")"]
            forms.append(r"\.".join([*bytes_, *["0"] * (3 - whole)]) + f"/{8 * whole + bits}")
    return "|".join(forms)


def _networks6() -> str:
    """The same of IPv6, where the zeros at the end are ``::``, or one group of ``0``."""
    digits = ("[08]", "[048cC]", "[02468aAcCeE]", _HEX)
    forms = [rf"({_ipv6()})(/128)?", "::/0"]
    for size in range(1, 128):
        groups, bits = divmod(size, 16)
        forms.append((f"({_GROUP}(:{_GROUP}){{0,{min(groups, 7) - 1}}})?" if groups else "") + f"::/{size}")
        if bits:
            whole, rest = divmod(bits - 1, 4)
            last = f"({_HEX}{{0,{whole}}}{digits[rest]}{'0' * (3 - whole)}|0)"
            zeros = {6: "(:0|::)", 7: ""}.get(groups, "::")
            forms.append(f"({_GROUP}:){{{groups}}}{last}{zeros}/{size}")
    return "|".join(forms)


def with_enforced_format(schema: dict[str, Any]) -> dict[str, Any]:
    """``schema`` with a format that llguidance enforces, a pattern for it, or none where it asserts nothing."""
    name = schema.get("format")
    if not isinstance(name, str):
        return schema
    rest = {key: value for key, value in schema.items() if key != "format"}
    name = _ALIASES.get(name, name)
    if name in _BUILT_IN:
        return {**rest, "format": name}
    if name in _patterns():
        pattern = f"^({_patterns()[name]})$"
        if "pattern" not in rest:
            return {**rest, "pattern": pattern}
        own = rest.get("allOf", [])
        return {**rest, "allOf": [*own, {"pattern": pattern}]} if isinstance(own, list) else schema
    # A misspelt one stays, and is refused.
    return schema if name in REFUSED or meant(name) is not None else rest


def keyword_of(part: dict[str, Any]) -> str:
    """`format` where the pattern of ``part`` came from one, else `pattern`."""
    pattern = part.get("pattern")
    return "format" if any(pattern == f"^({known})$" for known in _patterns().values()) else "pattern"


def meant(name: str) -> str | None:
    """The known format that ``name`` misspells by one edit, or by its case and hyphens; None for any other name."""
    known = sorted(_BUILT_IN | _ALIASES.keys() | REFUSED | _patterns().keys())
    if name in known or name in _UNASSERTED:
        return None
    plain = name.lower().replace("-", "").replace("_", "")
    return next((one for one in known if one.replace("-", "") == plain or _is_one_edit(name, one)), None)


def _is_one_edit(left: str, right: str) -> bool:
    """Whether one letter is left out, put in or another, or two neighbours are exchanged."""
    start = 0
    while left[: start + 1] == right[: start + 1] and start < len(left):
        start += 1
    left, right = left[start:], right[start:]
    return left[1:] in (right, right[1:]) or left == right[1:] or (left[:2] == right[1::-1] and left[2:] == right[2:])
