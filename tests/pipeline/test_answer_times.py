"""Times in the answers of object stores, which botocore's parser of all forms reads slowly."""

from __future__ import annotations

import pytest
from botocore.utils import parse_timestamp

from nanovllm.objects.s3_client import _time_of


@pytest.mark.parametrize(
    "value",
    [
        *("Mon, 30 Nov 2026 18:00:01 GMT", "Thu, 29 Feb 2024 23:59:59 GMT", "Tue, 01 Jan 2036 00:00:00 GMT"),
        *("Sunday, 06-Nov-94 08:49:37 GMT", "2026-11-30T18:00:01.123Z", "1796061601", 1796061601),
    ],
)
def test_times_of_answers_are_read_as_botocore_reads_them(value: str | int) -> None:
    assert _time_of(value) == parse_timestamp(value)


def test_a_time_of_no_known_form_is_refused_as_botocore_refuses_it() -> None:
    with pytest.raises(ValueError, match="Invalid timestamp"):
        _time_of("yesterday GMT")
