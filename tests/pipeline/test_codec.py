from __future__ import annotations

import json
from typing import Any, Literal

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import jobs, json_values

from nanovllm.errors import InvalidJob
from nanovllm.messages.codec import decode_job, encode_job, message_format
from nanovllm.messages.input_names import input_names
from nanovllm.messages.job import Job


def outcome(value: bytes) -> str:
    """``job``, or why it is none; whatever else ``value`` raises is a failure."""
    try:
        decode_job(value)
    except InvalidJob as error:
        return str(error)
    return "job"


@given(jobs)
def test_a_job_survives_both_formats(job: Job) -> None:
    for fmt in ("json", "msgpack"):
        value = encode_job(job, fmt)
        assert message_format(value) == fmt
        assert decode_job(value) == job


@pytest.mark.parametrize("pack", [json.dumps, msgpack.packb])
def test_another_major_version_is_told_apart_from_a_wrong_one(pack: Any) -> None:
    def refusal(version: Any) -> InvalidJob:
        value = pack({"version": version, "prompt": "p", "new_meaning": True})
        with pytest.raises(InvalidJob) as caught:
            decode_job(value.encode() if isinstance(value, str) else value)
        return caught.value

    assert refusal(2).code == refusal(0).code == "unsupported_version"
    assert refusal("1").code == refusal(True).code == refusal(1.0).code == "invalid_job"


def test_a_message_above_the_limit_is_refused_unread() -> None:
    value = b'{"prompt": "' + b"p" * 100
    with pytest.raises(InvalidJob, match="112 bytes, above the limit of 50"):
        decode_job(value, max_bytes=50)


@given(st.binary(max_size=400))
@example(b"")
@example(b"\xdf\xff\xff\xff\xff")
@example(b"\xde\xff\xff" + b"\x91" * 300)
@example(b"\x81" * 400)
@example(b'{"a":' * 200_000)
@example(b'{"prompt": ' + b"[" * 500_000)
@example(b'{"prompt": 1' + b"0" * 1_000_000 + b"}")
@example(b'{"prompt":"\\ud800"}')
@example(b'\xef\xbb\xbf{"prompt":"a"}')
def test_arbitrary_bytes_are_a_job_or_invalid(value: bytes) -> None:
    assert len(outcome(value)) < 2_000


@given(st.dictionaries(st.sampled_from([*Job.model_fields, "x"]), json_values, max_size=6), st.booleans())
def test_arbitrary_fields_are_a_job_or_invalid(fields: dict[str, Any], packed: bool) -> None:
    value = msgpack.packb(fields) if packed else json.dumps(fields).encode()
    assert len(outcome(value)) < 2_000


@given(jobs, st.data())
def test_a_damaged_message_is_a_job_or_invalid(job: Job, data: st.DataObject) -> None:
    fmt: Literal["json", "msgpack"] = data.draw(st.sampled_from(["json", "msgpack"]))
    value = bytearray(encode_job(job, fmt))
    for _ in range(data.draw(st.integers(1, 3))):
        value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
    assert outcome(bytes(value))


def wrapped(value: bytes) -> bytes:
    """A msgpack map {"prompt": "a", "x": value}."""
    return b"\x82" + msgpack.packb("prompt") + msgpack.packb("a") + msgpack.packb("x") + value


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b'{"prompt":"a","prompt":"b"}', "twice"),
        (b'{"prompt":"a","x":{"y":1,"y":1}}', "twice"),
        (b'{"prompt":"a","x":NaN}', "NaN"),
        (b'{"prompt":"a","x":-Infinity}', "Infinity"),
        (b'{"prompt":"a","x":1e999}', "double"),
        (b'{"prompt":"a","x":9007199254740993}', "2\\^53"),
        (b'{"prompt":"a","x":-99999999999999999999999}', "2\\^53"),
        (b'{"prompt":"a\xff"}', "UTF-8"),
        (b'{"prompt":"a"', "JSON"),
        (b'{"prompt":"a"} x', "JSON"),
        (b'{"prompt":"a","x":' + b"[" * 40 + b"]" * 40 + b"}", "nesting"),
        (b'["prompt"]', "neither"),
        (b'"prompt"', "neither"),
        (b"  ", "neither"),
        (wrapped(msgpack.packb(float("nan"))), "NaN"),
        (wrapped(msgpack.packb(2**60)), "2\\^53"),
        (wrapped(msgpack.packb(b"bytes")), "bytes"),
        (wrapped(msgpack.packb(msgpack.ExtType(5, b"x"))), "extension"),
        (wrapped(msgpack.packb(msgpack.Timestamp(0))), "Timestamp"),
        (wrapped(b"\xa1\xff"), "UTF-8"),
        (wrapped(b"\x82\xa1a\x01\xa1a\x01"), "twice"),
        (wrapped(b"\x81\x01\x01"), "string keys"),
        (wrapped(b"\x81\xc4\x01a\x01"), "string"),
        (wrapped(b"\xdd\xff\xff\xff\xff"), "complete"),
        (wrapped(b"\x01") + b"\x01", "complete"),
        (wrapped(b""), "complete"),
    ],
)
def test_what_the_json_model_cannot_say_is_refused_in_both(value: bytes, reason: str) -> None:
    with pytest.raises(InvalidJob, match=reason):
        decode_job(value)


def test_bytes_stand_only_in_the_data_of_an_image() -> None:
    image = {"prompt": "<|image|>", "images": [{"data": b"\x00png"}]}
    assert decode_job(msgpack.packb(image)).images[0].data == b"\x00png"
    for fields in ({"prompt": b"a"}, {"prompt": "a", "metadata": {"data": b"x"}}, {"prompt": "a", "metadata": b"x"}):
        with pytest.raises(InvalidJob):
            decode_job(msgpack.packb(fields))


def test_msgpack_carries_images_without_base64() -> None:
    job = Job.model_validate({"prompt": "<|image|>", "images": [{"data": bytes(range(256)) * 40}]})
    assert len(encode_job(job, "msgpack")) < 0.8 * len(encode_job(job, "json"))


def test_errors_name_the_field_and_never_its_value() -> None:
    secret = "hunter2" * 100
    for fields in (
        {"prompt": {"password": secret}},
        {"prompt": "a", "images": [secret]},
        {"prompt": "a", "sampling": {secret: 1}},
        {"prompt": "a", "deadline": secret},
        {"messages": [{"role": secret, "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": secret}]}]},
    ):
        with pytest.raises(InvalidJob) as caught:
            decode_job(json.dumps(fields).encode())
        assert secret not in str(caught.value)
        assert len(str(caught.value)) < 400


def _too_many_nested() -> bytes:
    inner = b"\xdd" + (90_000).to_bytes(4, "big") + b"\x90" * 80_000
    return b"\x82\xa6prompt\xa1a\xa6images" + inner * 4


# Each of them once held the event loop for seconds to minutes, or took gigabytes.
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (json.dumps({"messages": [{"role": "user", "content": ""}] * 30_000}).encode(), "at most 4096 items"),
        (
            json.dumps({"messages": [{"role": "user", "content": []}] * 4_096}).encode(),
            r"^messages.0.content.parts: .* at least 1",
        ),
        (b'{"prompt":"a","images":[' + b"0," * 4_190_000 + b"0]}", "more than 100000 values"),
        (b'{"prompt":"a","images":[' + b"0," * 90_000 + b"0]}", r"^images.0: [^;]*$"),
        (b'{"prompt":"a","images":["s3://bb/1"' + b',"s3://bb/1"' * 700_000 + b"]}", "more than 100000 values"),
        (json.dumps({"prompt": "a", "images": ["s3://bb/1"] * 4_097}).encode(), "images: .* at most 4096 items"),
        (
            json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 4_097}]}).encode(),
            "at most 4096 items",
        ),
        (b'{"prompt":' + b'{"a":' * 90_000, "nested too deeply"),
        (b'{"prompt":' + b'{"a":' * 200_000, "more than 100000 values"),
        (
            json.dumps({"prompt": "a", "sampling": {f"x{i}": 0 for i in range(90_000)}}).encode(),
            "90000 names, at most 64",
        ),
        (msgpack.packb({"prompt": "a", "images": [0] * 4_000_000}), "not one complete msgpack map"),
        (msgpack.packb({"prompt": "a", "x": [[0] * 300] * 400}), "more than 100000 values"),
        (_too_many_nested(), "more than 100000 values"),
    ],
)
def test_what_would_cost_too_much_to_read_is_refused_before_it_does(value: bytes, reason: str) -> None:
    with pytest.raises(InvalidJob, match=reason) as refused:
        decode_job(value)
    assert len(str(refused.value)) < 1_000


def test_commas_in_texts_are_no_values() -> None:
    prompt = 'say "1,2", then \\ ' + "3," * 200_000
    assert decode_job(json.dumps({"prompt": prompt}).encode()).prompt == prompt


@pytest.mark.parametrize("wrong", [{"sampling": {"max_token": 3}}, {"version": 2}, {"version": "1"}, {"images": [0]}])
@pytest.mark.parametrize("pack", [lambda fields: json.dumps(fields).encode(), msgpack.packb])
def test_an_invalid_job_keeps_the_id_that_its_sender_gave_it(wrong: dict[str, Any], pack: Any) -> None:
    fields = {"job_id": "mine", "prompt": "p", **wrong}
    for job_id, kept in (("mine", "mine"), ("", None), (7, None), ("x" * 513, None), ("a\nb", None)):
        with pytest.raises(InvalidJob) as refused:
            decode_job(pack({**fields, "job_id": job_id}))
        assert refused.value.job_id == kept


@pytest.mark.parametrize(
    "value",
    [
        b'{"job_id": "mine", "prompt": "cut of',
        b'{"prompt": "a", "job_id" : "mine",}',
        b'{"job_id":"mine","prompt":NaN}',
        b'{"job_id":"mine","prompt":"a","prompt":"b"}',
        b'{"job_id":"mine","prompt":"a","priority":12345678901234567890}',
        b'{"metadata":{"job_id":"inner","l":[{"job_id":"in a list"}]},"job_id":"mine","x":1e999}',
        b'{"prompt":"say \\"job_id\\": \\"quoted\\"","job_id":"mine","x":-Infinity}',
        b'{"a":"job_id","b":":","job_id":"m\\u0069ne",}',
        b' \n{"job_id":"mine","prompt":"\xff"}',
        b'{"prompt":"a","images":[' + b"[" * 100 + b'],"job_id":"inner"]',
        b'{"job_id":"mine","prompt":' + b'{"a":' * 200_000,
        msgpack.packb({"prompt": float("nan"), "job_id": "mine"}),
        msgpack.packb({"x": {"job_id": "inner"}, "y": [["job_id", "listed"]], "job_id": "mine", "z": 2**60}),
        msgpack.packb({"job_id": "mine", "images": [b"x" * 100]})[:-50],
        msgpack.packb({"job_id": "mine", "prompt": "p"}) + b"more",
        msgpack.packb({7: "number", "job_id": "mine"}),
        b"\x82\xa6prompt\xa1\xff\xa6job_id\xa4mine",
        b"\x82\xa6job_id\xa4mine\xa1x\xdd\xff\xff\xff\xff",
    ],
)
def test_a_message_that_cannot_be_read_keeps_the_id_that_its_sender_gave_it(value: bytes) -> None:
    with pytest.raises(InvalidJob) as refused:
        decode_job(value)
    assert refused.value.job_id == (None if b"[[[[" in value else "mine")
    with pytest.raises(InvalidJob, match="above the limit") as refused:
        decode_job(value, max_bytes=3)
    assert refused.value.job_id == (None if b"[[[[" in value else "mine")


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"{no job",
        b'{"job_id": 7, "prompt": "a"',
        b'{"job_id": "", "prompt": NaN}',
        b'{"job_id": "' + b"x" * 513 + b'",}',
        b'{"job_id": "a\\nb",}',
        b'{"job_id": "\\ud800",}',
        b'{"job_id": ["mine"],}',
        b'["job_id", ":", "mine"]',
        b'"job_id": "mine"',
        b'{"prompt": "\\' + b'\\"' * 2_000_000,
        b'{"x":' + b"[" * 4_000_000,
        msgpack.packb({"job_id": 7, "x": float("nan")}),
        msgpack.packb({"job_id": ["mine"], "x": float("nan")}),
        msgpack.packb(["job_id", "mine"]),
        b"\xdf\xff\xff\xff\xff" + b"\xc0" * 10,
        b"\x81\xc6\xff\xff\xff\xff",
    ],
    ids=lambda value: repr(value[:24]),
)
def test_an_unreadable_message_without_a_valid_id_has_none(value: bytes) -> None:
    with pytest.raises(InvalidJob) as refused:
        decode_job(value, max_bytes=None if value.startswith(b'{"x"') else 0)
    assert refused.value.job_id is None


@pytest.mark.parametrize("pack", [lambda fields: json.dumps(fields).encode(), msgpack.packb])
def test_the_images_of_a_message_have_names_whether_it_is_a_job_or_not(pack: Any) -> None:
    images = ["s3://bucket/a.png", {"uri": "s3://bucket/b.png"}, {"data": "!", "name": "c.png"}, {"data": "QQ=="}, 7]
    assert input_names(pack({"images": images})) == ("s3://bucket/a.png", "s3://bucket/b.png", "c.png")
    urls = [{"type": "image_url", "image_url": {"url": url}} for url in ("s3://bucket/d.png", "data:image/png;,", 7)]
    messages = [{"role": "user", "content": [*urls, {"type": "image_url", "image_url": 7}, 7]}, 7, {"content": 7}]
    assert input_names(pack({"messages": messages})) == ("s3://bucket/d.png",)
    for nothing in ({}, {"images": 7, "messages": {}}, {"images": [{"name": ["x"], "uri": 7}, "", "x" * 2_049]}):
        assert input_names(pack(nothing)) == ()
    for value in (None, b"", b"{no job", pack({"images": images})[:-9]):
        assert input_names(value) == ()


def test_objects_of_an_event_are_its_inputs() -> None:
    s3 = {"bucket": {"name": "inbox"}, "object": {"key": "a.pdf"}}
    assert input_names(json.dumps({"Records": [{"s3": s3}, {"s3": None}, 7]}).encode()) == ("s3://inbox/a.pdf",)
    assert input_names(json.dumps({"detail-type": "Object Created", "detail": s3}).encode()) == ("s3://inbox/a.pdf",)


@pytest.mark.parametrize("pack", [lambda fields: json.dumps(fields).encode(), msgpack.packb])
def test_a_misspelt_field_is_named_with_the_one_that_is_meant(pack: Any) -> None:
    with pytest.raises(InvalidJob, match=r"^job: unknown name samplng: did you mean sampling\?$"):
        decode_job(pack({"prompt": "p", "samplng": {"max_tokens": 3}}))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (b'{"prompt":"a', "Unterminated string starting at character 10"),
        (b'{"prompt":"\x01"}', "Invalid control character at character 11"),
        (b'{"prompt":}', "Expecting value at character 10"),
    ],
)
def test_a_fault_in_json_is_named_with_its_place_in_one_sentence(value: bytes, says: str) -> None:
    assert outcome(value) == f"the message is not valid JSON: {says}"


@pytest.mark.parametrize(("name", "known"), [("guided_regex", "regex"), ("max_completion_tokens", "max_tokens")])
def test_a_sampling_parameter_under_another_programs_name_is_told_its_own(name: str, known: str) -> None:
    job = json.dumps({"job_id": "a", "prompt": "p", "sampling": {name: "x"}}).encode()
    with pytest.raises(InvalidJob, match=rf"unknown name {name}: did you mean {known}\?$"):
        decode_job(job)
