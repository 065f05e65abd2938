"""What a hostile message costs: errors are counted, because each costs more than a valid value."""

from __future__ import annotations

import json
from typing import Any

import msgpack
import pytest
from pydantic import ValidationError

from nanovllm.errors import InvalidJob
from nanovllm.messages import codec, job
from nanovllm.messages.codec import decode_job
from nanovllm.messages.validation import describe_errors
from nanovllm.sampling_params import MAX_BIASES

MANY = 5_000
MAX_ERRORS = 2 * MAX_BIASES + 1  # a wrong name and a wrong number for each, and the field that holds them
WRONG: tuple[Any, ...] = (0, "", None, [], {})
NAMES = {f"k{i}": 0 for i in range(MANY)}
FEW_NAMES = {f"k{i}": 0 for i in range(12)}
URL = {"type": "image_url", "image_url": {"url": "s3://bucket/key"}}


def chat(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}]}


def sampling(**values: Any) -> dict[str, Any]:
    return {"prompt": "p", "sampling": values}


REFUSED: dict[str, dict[str, Any]] = {
    "sampling: names": sampling(**NAMES),
    "sampling: objects under unknown names": sampling(**dict.fromkeys(FEW_NAMES, NAMES)),
    "sampling: wrong in every field": sampling(**{name: [0] * 900 for name in job.SamplingParams.model_fields}),
    "sampling is a list": {"prompt": "p", "sampling": [0] * MANY},
    "logit_bias: wrong names and numbers": sampling(logit_bias=dict.fromkeys(NAMES, "x")),
    "logit_bias: as many as allowed, all wrong": sampling(logit_bias={f"k{i}": "x" for i in range(MAX_BIASES)}),
    "logit_bias: right": sampling(logit_bias={str(i): 1 for i in range(MANY)}),
    "logit_bias: list": sampling(logit_bias=[0] * MANY),
    **{
        f"{name}: {wrong!r}": sampling(**{name: [wrong] * MANY})
        for name in ("choice", "stop", "bad_words", "stop_token_ids")
        for wrong in WRONG
    },
    **{f"{name}: object": sampling(**{name: NAMES}) for name in ("choice", "stop", "bad_words", "n", "seed", "regex")},
    "json_schema: list": sampling(json_schema=[[]] * MANY),
    "json_schema: too long": sampling(json_schema={f"name{i:060}": i for i in range(MANY)}),
    "chat_template_kwargs: wrong values": {"prompt": "p", "chat_template_kwargs": dict.fromkeys(NAMES, "x")},
    "metadata: too long": {"prompt": "p", "metadata": dict.fromkeys(NAMES, "too long")},
    "images: names in one": {"prompt": "p", "images": [NAMES]},
    "images: names in each": {"prompt": "p", "images": [FEW_NAMES] * 400},
    "images: wrong in every field": {
        "prompt": "p",
        "images": [{"uri": 1, "data": 2, "etag": 3, "sha256": 4, "version_id": 5, "name": 6}] * 1_000,
    },
    **{f"images: {wrong!r}": {"prompt": "p", "images": [wrong] * MANY} for wrong in WRONG},
    "images: object": {"prompt": "p", "images": NAMES},
    "images: wrong after right ones": {"prompt": "p", "images": ["s3://bb/k"] * 4_000 + [0] * MANY},
    "messages: names in one": {"messages": [NAMES]},
    "messages: names in each": {"messages": [FEW_NAMES] * 400},
    **{f"messages: {wrong!r}": {"messages": [wrong] * MANY} for wrong in WRONG},
    "messages: object": {"messages": NAMES},
    "messages: contents without parts": {"messages": chat()["messages"] * 4_096},
    "messages: a wrong part in each": {"messages": chat({"type": "x"})["messages"] * 4_096},
    "content: object": {"messages": [{"role": "user", "content": NAMES}]},
    **{f"parts: {wrong!r}": chat(*[wrong] * MANY) for wrong in (*WRONG, {"type": "x"}, {"type": "text"})},
    "parts: names in one": chat({"type": "text", "text": "a"} | NAMES),
    "parts: names in each": chat(*[{"type": "text", "text": "a"} | FEW_NAMES] * 400),
    "parts: names in a URL": chat({"type": "image_url", "image_url": NAMES}),
    "parts: wrong URLs": chat(*[{"type": "image_url", "image_url": {"url": 1, "detail": 2}}] * 4_000),
    "unknown fields, one of them misspelt": {"prmpt": "p", "metadata": 1} | NAMES,
    **{
        f"{name}: {kind}": {"prompt": "p", name: value}
        for name in ("prompt", "job_id", "deadline", "priority", "version", "reuse", "reply_to", "metadata")
        for kind, value in (("list", [[]] * MANY), ("object", NAMES))
        if (name, kind) != ("metadata", "object")
    },
}


@pytest.mark.parametrize("fields", REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("pack", [lambda fields: json.dumps(fields).encode(), msgpack.packb], ids=["json", "msgpack"])
def test_no_shape_of_a_message_makes_many_errors(pack: Any, fields: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def counting(error: ValidationError, root: str, data: Any = None) -> str:
        counts.append(error.error_count())
        return describe_errors(error, root, data)

    monkeypatch.setattr(codec, "describe_errors", counting)
    monkeypatch.setattr(job, "describe_errors", counting)
    with pytest.raises(InvalidJob) as refused:
        decode_job(pack(fields))
    assert sum(counts) <= MAX_ERRORS
    assert len(str(refused.value)) < 1_000


@pytest.mark.parametrize(
    "parts", [[URL] * 3, [{"type": "text", "text": "a"}, URL, URL], [{"type": "image"}] * 3], ids=["urls", "mixed", "i"]
)
@pytest.mark.parametrize("pack", [lambda fields: json.dumps(fields).encode(), msgpack.packb], ids=["json", "msgpack"])
def test_valid_parts_are_bounded_over_all_messages(pack: Any, parts: Any) -> None:
    messages = chat(*parts)["messages"] * 3_000
    with pytest.raises(InvalidJob, match=r"^messages: have 9000 parts, at most 8192 are allowed in all messages$"):
        decode_job(pack({"messages": messages}))
    assert len(decode_job(pack({"messages": messages[:2_000]})).messages or ()) == 2_000


@pytest.mark.parametrize("tower", ["[" * 20 + "]" * 20, '{"a":' * 20 + "1" + "}" * 20, "[{}]", '{"a":[1]}'])
def test_values_are_counted_wherever_they_stand(tower: str) -> None:
    towers = ",".join([tower] * (150_000 // tower.count("{") if "{" in tower else 6_000))
    with pytest.raises(InvalidJob, match="more than 100000 values"):
        decode_job(f'{{"prompt":"p","x":[{towers}]}}'.encode())
    text = json.dumps({"prompt": towers})
    assert decode_job(text.encode()).prompt == towers


def test_a_job_has_as_much_as_is_allowed() -> None:
    biases = {str(i): 1 for i in range(MAX_BIASES)}
    everything = sampling(logit_bias=biases, stop=["s"] * 16, bad_words=["b"] * 64, choice=["c"] * 1_024)
    everything |= {"images": ["s3://bb/k"] * 4_096} | NAMES
    assert len(decode_job(json.dumps(everything).encode()).sampling["choice"]) == 1_024
