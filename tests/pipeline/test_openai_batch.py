"""Requests of OpenAI's batch files as jobs, and the lines that answer them."""

from __future__ import annotations

from typing import Any

import pytest
from sample_messages import result

from nanovllm.errors import InvalidJob
from nanovllm.messages.openai_batch import answer_line, is_request, job_of_request
from nanovllm.messages.result import Output, TokenLogprob

MESSAGES = [{"role": "user", "content": "What?"}]
SCHEMA = {"type": "object", "properties": {"total": {"type": "number"}}}


def request(**body: Any) -> dict[str, Any]:
    return {"custom_id": "r-1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": MESSAGES} | body}


@pytest.mark.parametrize(
    ("body", "sampling"),
    [
        ({}, {}),
        ({"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 1}, None),
        ({"max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"stop": "\n"}, {"stop": ("\n",)}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"stop": None, "max_tokens": None, "tools": None}, {}),
        ({"logprobs": True, "top_logprobs": 2}, {"logprobs": 2}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": False}, {}),
        ({"logit_bias": {"5": 1}}, {"logit_bias": {5: 1.0}}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"json_schema": {"type": "object"}}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
                }
            },
            {"json_schema": SCHEMA},
        ),
        ({"guided_choice": ["yes", "no"]}, {"choice": ("yes", "no")}),
        ({"structured_outputs": {"regex": "[0-9]+"}}, {"regex": "[0-9]+"}),
        ({"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True}, None),
        ({"model": "m", "user": "u", "store": True, "stream": False, "tools": [], "tool_choice": "auto"}, {}),
    ],
)
def test_a_request_asks_for_what_its_job_asks_for(body: dict[str, Any], sampling: dict[str, Any] | None) -> None:
    job = job_of_request(request(**body))
    assert (job.job_id, job.sampling) == ("r-1", body if sampling is None else sampling)
    assert job.message_dicts() == ({"role": "user", "content": "What?"},)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (request(tools=[{"type": "function"}]), "body.tools"),
        (request(stream=True), "body.stream"),
        (request(audio={}), "body.audio"),
        (request(max_tokens="5"), "max_tokens"),
        (request(response_format={"type": "xml"}), "response_format"),
        (request(messages="What?"), "messages"),
        (request(messages=[{"role": "tool", "content": "x"}]), "role"),
        (request() | {"url": "/v1/embeddings"}, "url"),
        (request() | {"method": "GET"}, "url"),
        (request() | {"body": None}, "body"),
        ({"custom_id": "r-1"}, "body"),
    ],
)
def test_what_there_is_not_is_refused_by_its_name_and_the_requests(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidJob, match=said) as caught:
        job_of_request(fields)
    assert caught.value.job_id == "r-1"


def parts(**image_url: Any) -> list[dict[str, Any]]:
    text = {"type": "text", "text": "Total?"}
    return [{"role": "user", "content": [text, {"type": "image_url", "image_url": image_url}]}]


@pytest.mark.parametrize("detail", ["auto", "low", "high"])
def test_the_detail_that_openai_knows_is_taken(detail: str) -> None:
    assert len(job_of_request(request(messages=parts(url="s3://receipts/k.png", detail=detail))).image_refs()) == 1


@pytest.mark.parametrize(
    ("image_url", "said"),
    [
        ({"url": "s3://receipts/k.png", "detail": "best"}, r"^messages\.0\.content\.1\.image_url\.detail: "),
        ({"url": 5}, r"^messages\.0\.content\.1\.image_url\.url: "),
        ({}, r"^messages\.0\.content\.1\.image_url\.url: "),
    ],
)
def test_a_fault_is_named_by_its_place_in_the_senders_own_json(image_url: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidJob, match=said):
        job_of_request(request(messages=parts(**image_url)))


@pytest.mark.parametrize("custom_id", ["", 3, None, "a\nb", "x" * 513])
def test_an_id_that_no_job_may_have_is_refused(custom_id: Any) -> None:
    with pytest.raises(InvalidJob) as caught:
        job_of_request(request() | {"custom_id": custom_id})
    assert caught.value.job_id is None


def test_a_job_with_a_field_of_that_name_is_a_job() -> None:
    assert is_request(request())
    assert not is_request({"custom_id": "r-1", "prompt": "a"})


def test_outputs_and_log_probabilities_stand_where_openai_has_them() -> None:
    place = tuple(TokenLogprob(token_id=n, logprob=-float(n), rank=n + 1, text=text) for n, text in enumerate("é?"))
    outputs = (
        Output(text="é", finish_reason="stop", logprobs=(place,)),
        Output(text="!", finish_reason="loop"),
    )
    answer = answer_line(result(job_id="r-1", text="é", outputs=outputs))
    first, second = answer["response"]["body"]["choices"]
    assert [first["finish_reason"], second["finish_reason"]] == ["stop", "length"]
    (token,) = first["logprobs"]["content"]
    assert (token["token"], token["bytes"], token["logprob"]) == ("é", [0xC3, 0xA9], 0.0)
    assert [one["token"] for one in token["top_logprobs"]] == ["?"]
    assert (answer["custom_id"], second["logprobs"]) == ("r-1", None)
