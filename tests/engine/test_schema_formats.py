"""Formats of a schema: each is enforced, refused, or an annotation that the documentation names."""

from __future__ import annotations

import calendar
import ipaddress
import json
import random
import re
import uuid
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import (
    UUID4,
    UUID7,
    Base64Bytes,
    Base64UrlBytes,
    BaseModel,
    FilePath,
    IPvAnyNetwork,
    PostgresDsn,
    SecretStr,
    TypeAdapter,
)

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.sampling.json_schema import enforceable
from nanovllm.engine.sampling.schema_formats import _UNASSERTED, REFUSED, _patterns
from nanovllm.errors import UnsupportedConstraint
from nanovllm.sampling_params import SamplingParams

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"


def is_taken(name: str, text: str) -> bool:
    pattern = enforceable({"format": name})["pattern"]
    return re.search(pattern, text) is not None


def is_read(parser: Callable[[str], Any], text: str) -> bool:
    try:
        parser(text)
    except ValueError:
        return False
    return True


def test_the_dates_are_those_that_python_reads() -> None:
    years = [1, 4, 10, 100, 400, 1900, 2000, 2023, 2024, 9999]
    days = [f"{year:04}-{month:02}-{day:02}" for year in [0, *years] for month in range(14) for day in range(33)]
    assert [day for day in days if is_taken("date", day) != is_read(date.fromisoformat, day)] == []
    leap_days = [f"{year:04}-02-29" for year in range(1, 10_000)]
    assert [day for day in leap_days if is_taken("date", day) != calendar.isleap(int(day[:4]))] == []


@pytest.mark.parametrize(
    ("name", "taken", "refused"),
    [
        ("date-time", "2024-02-29T23:59:59.5+01:00", "2024-02-29T23:59:60Z"),  # pydantic reads no leap second
        ("date-time", "2024-12-31t00:00:00z", "2023-02-29T00:00:00Z"),
        ("time", "00:00:59Z", "00:00:60Z"),
        ("time", "23:59:59-23:59", "24:00:00Z"),
        ("duration", "P1Y2M3DT4H5M6S", "P1Y3D"),
        ("duration", "P2W", "PT"),
        ("duration", "PT999999999S", "P99999999999999D"),  # timedelta does not hold it
        ("uuid4", "12345678-1234-4234-9234-123456789abc", "12345678-1234-1234-9234-123456789abc"),
        ("uuid7", "12345678-1234-7234-B234-123456789ABC", "12345678-1234-7234-7234-123456789abc"),
        ("uuid", "12345678-1234-0234-0234-123456789abc", "1234567812341234123412345678abcd"),
        ("ipv4network", "10.0.0.0/8", "10.1.0.0/8"),
        ("ipv4network", "10.1.2.3", "10.1.2.3/31"),
        ("ipv6network", "2001:db8::/32", "2001:db8::1/32"),
        ("ipv6interface", "2001:db8::1/32", "2001:db8::1/129"),
        ("ipvanyinterface", "10.1.2.3/9", "10.1.2.256/9"),
        ("ipvanynetwork", "::/0", "::1/0"),
        ("ipvanyaddress", "::1", "1::2::3"),
        ("host-name", None, None),
        ("ip-address", "1.2.3.4", "1.2.3"),
        ("base64", "+/8=", "-_8="),
        ("base64url", "-_8=", "-_8"),
        ("json-pointer", "/a~1b/~0", "/a~2"),
        ("relative-json-pointer", "1/a", "01/a"),
    ],
)
def test_a_known_format_is_enforced(name: str, taken: str | None, refused: str | None) -> None:
    if taken is None or refused is None:
        assert enforceable({"format": name}) == {"format": name.replace("-", "")}
    else:
        assert is_taken(name, taken)
        assert not is_taken(name, refused)


def test_networks_have_no_bits_behind_their_prefix() -> None:
    chance = random.Random(0)
    for _ in range(2_000):
        bits = ~((1 << chance.randint(0, 32)) - 1)
        text = f"{ipaddress.IPv4Address(chance.getrandbits(32) & bits)}/{chance.randint(0, 33)}"
        assert is_taken("ipv4network", text) == is_read(ipaddress.IPv4Network, text), text
        bits = ~((1 << chance.randint(0, 128)) - 1)
        text = f"{ipaddress.IPv6Address(chance.getrandbits(128) & bits)}/{chance.randint(0, 128)}"
        assert is_read(ipaddress.IPv6Network, text) or not is_taken("ipv6network", text), text


PARSED: dict[str, Any] = {
    "date-time": datetime,
    "time": time,
    "duration": timedelta,
    "uuid": uuid.UUID,
    "uuid4": UUID4,
    "uuid7": UUID7,
    "ipv4network": ipaddress.IPv4Network,
    "ipv6network": ipaddress.IPv6Network,
    "ipv6interface": ipaddress.IPv6Interface,
    "ipvanynetwork": IPvAnyNetwork,
    "base64": Base64Bytes,
    "base64url": Base64UrlBytes,
}


@pytest.mark.parametrize("name", PARSED)
def test_pydantic_reads_what_is_written(engine: LLMEngine, name: str) -> None:
    reader = TypeAdapter(PARSED[name])
    schema = reader.json_schema()
    assert schema["format"] == name
    for seed in range(2):
        sampling = SamplingParams(json_schema=schema, temperature=2.0, seed=seed, max_tokens=150)
        output = engine.generate("JSON:", sampling, use_tqdm=False)[0]
        if output.finish_reason == "stop":
            reader.validate_json(output.text)


def test_a_format_beside_a_pattern_and_of_names_holds() -> None:
    both = enforceable({"format": "date", "pattern": "^2024"})
    assert both["pattern"] == "^2024"
    assert re.search(both["allOf"][0]["pattern"], "2024-01-31")
    names = enforceable({"type": "object", "propertyNames": {"format": "uuid4"}, "additionalProperties": {}})
    assert names.keys() == {"type", "patternProperties", "additionalProperties"}
    assert enforceable({"enum": [{"format": "datetime"}]}) == {"enum": [{"format": "datetime"}]}


@pytest.mark.parametrize(
    ("name", "meant"),
    [("datetime", "date-time"), ("date_time", "date-time"), ("emial", "email"), ("uuidv4", "uuid4"), ("url", "uri"),
     ("ip4", "ipv4"), ("Date", "date")],
)  # fmt: skip
def test_a_misspelt_format_is_refused(engine: LLMEngine, name: str, meant: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": name}}}
    with pytest.raises(UnsupportedConstraint, match=f'format "{name}" at #/properties/a is none: did you mean {meant}'):
        engine.add_request("JSON:", SamplingParams(json_schema=schema))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_format_of_a_draft_that_is_not_enforced_is_refused(engine: LLMEngine, name: str) -> None:
    with pytest.raises(UnsupportedConstraint, match=f'format "{name}" at # cannot be enforced: write pattern'):
        engine.add_request("JSON:", SamplingParams(json_schema={"type": "string", "format": name}))


class Unasserted(BaseModel):
    path: Path
    file: FilePath
    secret: SecretStr
    dsn: PostgresDsn
    raw: bytes


def test_other_formats_are_annotations_and_the_guide_names_those_of_pydantic() -> None:
    schema = Unasserted.model_json_schema()
    assert "format" in json.dumps(schema)
    assert "format" not in json.dumps(enforceable(schema))
    assert enforceable({"type": "string", "format": "topic"}) == {"type": "string"}
    guide = GUIDE.read_text()
    assert [name for name in sorted(_UNASSERTED | REFUSED | _patterns().keys()) if f"`{name}`" not in guide] == []
