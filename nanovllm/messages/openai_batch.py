"""Lines of OpenAI's batch files as jobs, and the lines that answer them (the Batch API, ``/v1/chat/completions``)."""

from __future__ import annotations

import time
from typing import Any

from pydantic import ValidationError

from nanovllm.errors import InvalidJob
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.job import Job
from nanovllm.messages.result import Output, Result, TokenLogprobs
from nanovllm.messages.validation import describe_errors, printable
from nanovllm.sampling_params import OTHER_NAMES, SamplingParams

CHAT_URL = "/v1/chat/completions"
MAX_ID_CHARS = 512

_STRUCTURED = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}
# They say who asks, or how the answer is to be kept or billed, and never what it is. `model`: the one that answers is
# the worker's, and the answer names it.
_WITHOUT_EFFECT = frozenset({"model", "user", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
# What has an effect, and only as it is here.
_ONLY: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}


_DETAILS = ("auto", "low", "high")


def is_request(fields: dict[str, Any]) -> bool:
    """Whether the fields of a line are those of a request, and not of a job."""
    return "custom_id" in fields and not fields.keys() & {"prompt", "messages"}


def request_id_in(fields: dict[str, Any]) -> str | None:
    """The id of a request, which is its job's; None where it is none."""
    found = fields.get("custom_id")
    return found if isinstance(found, str) and 0 < len(found) <= MAX_ID_CHARS and found.isprintable() else None


def job_of_request(fields: dict[str, Any]) -> Job:
    """The job that a request is.

    Raises:
        InvalidJob: it asks for what there is not, or is not of its form; named in the message.
    """
    request_id, job = request_id_in(fields), {}
    try:
        if request_id is None:
            raise InvalidJob(f"custom_id: is not a text of 1 to {MAX_ID_CHARS} printable characters")
        job = _job_fields(fields) | {"job_id": request_id}
        return Job.model_validate(job)
    except ValidationError as error:
        invalid = InvalidJob(describe_errors(error, "body", job))
    except InvalidJob as error:
        invalid = error
    invalid.job_id = request_id
    raise invalid


def answer_line(result: Result) -> dict[str, Any]:
    """The line of a batch's output file that answers a request."""
    outputs = result.outputs or (
        Output(text=result.text, finish_reason=result.finish_reason, logprobs=result.logprobs),
    )
    usage = result.usage
    body = {
        "id": f"chatcmpl-{result.result_id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": result.model.id,
        "choices": [_choice(index, output) for index, output in enumerate(outputs)],
        "usage": {
            "prompt_tokens": usage.input_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.input_tokens + usage.output_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        },
    }
    return {
        "id": f"batch_req_{result.result_id}",
        "custom_id": result.job_id,
        "response": {"status_code": 200, "request_id": result.result_id, "body": body},
        "error": None,
    }


def error_line(letter: DeadLetter, request: dict[str, Any]) -> dict[str, Any]:
    """The line of a batch's output file for a request without an answer, whose ``custom_id`` may be anything."""
    error = {"code": letter.code, "message": letter.message}
    return {
        "id": f"batch_req_{letter.job_id}",
        "custom_id": request.get("custom_id"),
        "response": None,
        "error": error,
    }


def _job_fields(fields: dict[str, Any]) -> dict[str, Any]:
    if fields.get("method", "POST") != "POST" or fields.get("url", CHAT_URL) != CHAT_URL:
        raise InvalidJob(f"url: only POST {CHAT_URL} is answered")
    body = fields.get("body")
    if not isinstance(body, dict):
        raise InvalidJob("body: is not an object")
    sampling: dict[str, Any] = {}
    job: dict[str, Any] = {"sampling": sampling}
    # OpenAI takes null for what is unset.
    for name, value in {name: value for name, value in body.items() if value is not None}.items():
        if name in ("messages", "metadata"):
            job[name] = value
        elif name == "stop":
            sampling["stop"] = [value] if isinstance(value, str) else value
        elif name == "response_format":
            sampling |= _response_format(value)
        elif name == "structured_outputs" and isinstance(value, dict) and value.keys() <= _STRUCTURED.keys():
            sampling |= {_STRUCTURED[kind]: constraint for kind, constraint in value.items() if constraint is not None}
        elif name in ("logprobs", "top_logprobs"):
            if body.get("logprobs") is True:
                sampling["logprobs"] = body.get("top_logprobs") or 0
        elif name in OTHER_NAMES or name in SamplingParams.model_fields:
            sampling[OTHER_NAMES.get(name, name)] = value
        elif name not in _WITHOUT_EFFECT and value not in _ONLY.get(name, ()):
            raise InvalidJob(f"body.{printable(name)} is not supported")
    if isinstance(job.get("messages"), list):
        job["messages"] = [_message(message) for message in job["messages"]]
    return job


def _message(message: Any) -> Any:
    """``message`` as a job has it: the role of instructions by its older name, images without ``detail``.

    The checkpoint and the settings decide the resolution, whatever ``detail`` is, as in vLLM.
    """
    if not isinstance(message, dict):
        return message
    if message.get("role") == "developer":
        message = message | {"role": "system"}
    if isinstance(message.get("content"), list):
        message = message | {"content": [_part(part) for part in message["content"]]}
    return message


def _part(part: Any) -> Any:
    image = part.get("image_url") if isinstance(part, dict) else None
    if isinstance(image, dict) and image.get("detail") in _DETAILS:
        return part | {"image_url": {name: value for name, value in image.items() if name != "detail"}}
    return part


def _response_format(value: Any) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    wrapped = value.get("json_schema") if kind == "json_schema" else None
    if isinstance(wrapped, dict) and isinstance(wrapped.get("schema"), dict):
        return {"json_schema": wrapped["schema"]}
    raise InvalidJob("body.response_format: its type is text, json_object, or json_schema with a schema")


def _choice(index: int, output: Output) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": output.text},
        "logprobs": None if output.logprobs is None else {"content": [_logprob(one) for one in output.logprobs if one]},
        # OpenAI knows no other way in which an answer is cut.
        "finish_reason": "stop" if output.finish_reason == "stop" else "length",
    }


def _logprob(place: TokenLogprobs) -> dict[str, Any]:
    taken, *best = [{"token": one.text, "logprob": one.logprob, "bytes": list(one.text.encode())} for one in place]
    return taken | {"top_logprobs": best}
