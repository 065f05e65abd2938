from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_messages import result
from strategies import json_values, messages

from nanovllm.messages.base import Message
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.encoding import check_json_value, encode
from nanovllm.messages.job_metrics import JobMetrics
from nanovllm.messages.result import Result, result_id_for
from nanovllm.sinks.jsonl import JsonLinesSink
from nanovllm.sinks.kept_headers import rfc3339, rfc3339_now


def test_a_result_id_depends_on_the_job_id_alone_and_never_changes() -> None:
    assert result_id_for("r-0001") == "6de7f676-3bf8-5881-91dd-e3eb52cdbd90"
    assert result_id_for("r-0001") != result_id_for("r-0002")


@given(st.text(max_size=40))
def test_a_result_id_is_a_name_based_uuid(job_id: str) -> None:
    assert result_id_for(job_id) == str(uuid.uuid5(uuid.UUID("6d1f3d0e-5b0a-5e0c-9d7e-0f6b6e616e6f"), job_id))


def test_the_time_of_an_event_is_written_as_other_times_are() -> None:
    before, now, after = rfc3339(datetime.now(UTC)), rfc3339_now(), rfc3339(datetime.now(UTC))
    assert before <= now <= after


def test_a_reader_of_today_takes_the_messages_of_tomorrow() -> None:
    fields = json.loads(encode(result(), "json")) | {"of_the_future": 1}
    assert Result.model_validate(fields) == result()


def test_fields_that_are_unset_are_not_sent() -> None:
    sent = json.loads(encode(result(), "json"))
    assert "version_id" not in sent["inputs"][0]


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 2**53 + 1, {1: 2}, "\ud800", {"\udfff": 1}, b"x", {1, 2}, object()]
)
def test_what_json_cannot_say_exactly_is_refused(value: object) -> None:
    with pytest.raises(ValueError):
        check_json_value({"x": [value]})


def test_nesting_is_bounded_without_recursion() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="nesting"):
        check_json_value(deep)


@given(json_values)
def test_plain_values_pass(value: object) -> None:
    check_json_value(value)


@pytest.mark.parametrize("model", [Result, JobMetrics, DeadLetter])
@given(data=st.data())
def test_a_message_survives_both_formats(model: type[Message], data: st.DataObject) -> None:
    message = data.draw(messages(model))
    assert model.model_validate_json(encode(message, "json")) == message
    assert model.model_validate(msgpack.unpackb(encode(message, "msgpack"))) == message


def test_json_lines_are_appended_one_message_a_line(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    for number in range(2):
        with JsonLinesSink(path) as sink:
            sink.write(result(job_id=f"r-{number}", text="two\nlines \u2028 here"))
    lines = path.read_bytes().split(b"\n")
    assert [Result.model_validate_json(line).job_id for line in lines if line] == ["r-0", "r-1"]


def test_a_sink_that_is_not_open_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="context manager"):
        JsonLinesSink(tmp_path / "x").write(result())
