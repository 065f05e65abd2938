"""Strategies of the property tests, drawn from the limits that the product declares, and how many examples they get.

Messages are drawn from their own JSON schemas: a new field or another limit needs no change here.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import hypothesis
from hypothesis import strategies as st

from nanovllm.messages.base import Message
from nanovllm.messages.encoding import MAX_INTEGER
from nanovllm.messages.job import _BARE_TAG, MAX_METADATA_BYTES, ImageRef, Job
from nanovllm.messages.s3_uri import _FORMS, split_object_uri
from nanovllm.sampling_params import SamplingParams

Schema = dict[str, Any]
Values = st.SearchStrategy[Any]


def examples(count: int, **options: Any) -> hypothesis.settings:
    """``count`` examples; in the profile `thorough` that profile's number."""
    of_profile = hypothesis.settings.default.max_examples
    return hypothesis.settings(max_examples=of_profile if of_profile > 100 else count, **options)


json_values: Values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-MAX_INTEGER, MAX_INTEGER)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
json_objects: Values = st.dictionaries(st.text(), json_values, max_size=4)
times: Values = st.datetimes(
    timezones=st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
).map(datetime.isoformat)


def values_of(schema: Schema, own: Mapping[str, Values]) -> Values:
    """Values that ``schema`` admits, as far as our own schemas use the language.

    Args:
        own: values of the properties whose limits the schema does not state, by name.
    """
    definitions = schema.get("$defs", {})

    def of(part: Schema) -> Values:
        match part:
            case {"$ref": str(path)}:
                return of(definitions[path.rpartition("/")[2]])
            case {"const": constant}:
                return st.just(constant)
            case {"enum": list(constants)}:
                return st.sampled_from(constants)
            case {"allOf": list(options)} | {"anyOf": list(options)} | {"oneOf": list(options)}:
                return st.one_of([of(option) for option in options])
            case {"type": "null"}:
                return st.none()
            case {"type": "boolean"}:
                return st.booleans()
            case {"type": "integer"}:
                # A message holds no integer that JSON readers round, whatever the field admits.
                low = part.get("minimum", part.get("exclusiveMinimum", -MAX_INTEGER - 1) + 1)
                high = part.get("maximum", part.get("exclusiveMaximum", MAX_INTEGER + 1) - 1)
                return st.integers(max(low, -MAX_INTEGER), min(high, MAX_INTEGER))
            case {"type": "number"}:
                return st.floats(
                    part.get("minimum", part.get("exclusiveMinimum")),
                    part.get("maximum", part.get("exclusiveMaximum")),
                    exclude_min="exclusiveMinimum" in part,
                    exclude_max="exclusiveMaximum" in part,
                    allow_nan=False,
                    allow_infinity=False,
                )
            case {"type": "string", "format": "date-time"}:
                return times
            case {"type": "string", "contentEncoding": "base64"}:
                return st.binary(min_size=part["minLength"]).map(lambda data: base64.b64encode(data).decode())
            case {"type": "string", "pattern": str(pattern)}:
                shortest, longest = part.get("minLength", 0), part.get("maxLength", MAX_INTEGER)
                return st.from_regex(pattern, fullmatch=True).filter(lambda text: shortest <= len(text) <= longest)
            case {"type": "string"}:
                return st.text(min_size=part.get("minLength", 0), max_size=part.get("maxLength"))
            case {"type": "array", "items": dict(items)}:
                # Where no limit is stated, four are as telling as many and drawn five times as fast.
                return st.lists(of(items), min_size=part.get("minItems", 0), max_size=part.get("maxItems", 4))
            case {"type": "object", "properties": dict(properties)}:
                fields = {name: own[name] if name in own else of(each) for name, each in properties.items()}
                required = {name: fields.pop(name) for name in part.get("required", ())}
                return st.fixed_dictionaries(required, optional=fields)
            case {"type": "object", "additionalProperties": True}:
                return json_objects
            case {"type": "object", "additionalProperties": dict(values)}:
                return st.dictionaries(st.text(), of(values), max_size=min(4, part.get("maxProperties", 4)))
        raise NotImplementedError(f"no strategy for {part}")

    return of(schema)


def _consistent(sampling: dict[str, Any]) -> dict[str, Any]:
    """``sampling`` without what its other fields exclude."""
    constraints = [name for name in ("json_schema", "regex", "choice", "grammar") if sampling.get(name) is not None]
    excluded = constraints[1:]
    if sampling.get("temperature") == 0:
        excluded.append("n")
    if sampling.get("min_tokens", 0) > (sampling.get("max_tokens") or MAX_INTEGER):
        excluded.append("min_tokens")
    return {name: value for name, value in sampling.items() if name not in excluded}


_BASE64 = st.binary(min_size=1).map(lambda data: base64.b64encode(data).decode())
_TAGS = st.from_regex(_BARE_TAG, fullmatch=True).filter(lambda tag: tag != "*" and len(tag) <= 1022)
_URIS = st.from_regex(_FORMS["s3"], fullmatch=True).filter(
    lambda uri: len(uri) <= 2048 and split_object_uri(uri) is not None
)
_HTTP_URIS = st.from_regex(
    r"https?://[a-z0-9]{1,20}\.example(:[1-9][0-9]{0,3})?/[!$&-;=?-Z_a-z~]{0,20}", fullmatch=True
)
# What the schemas leave to code: the form of a URI and of a tag, a version's bytes, token ids as keys, metadata's size.
_OWN: dict[str, Values] = {
    "uri": _URIS,
    "url": _URIS | _HTTP_URIS | _BASE64.map("data:image/png;base64,{}".format),
    "version_id": st.text(min_size=1, max_size=256),
    "etag": _TAGS | _TAGS.map('"{}"'.format),
    "logit_bias": st.dictionaries(
        st.integers(0, MAX_INTEGER).map(str), st.floats(-100, 100, allow_nan=False), max_size=8
    ),
    "metadata": json_objects.filter(
        lambda metadata: len(json.dumps(metadata, ensure_ascii=False).encode()) <= MAX_METADATA_BYTES
    ),
}

samplings: Values = values_of(SamplingParams.model_json_schema(), _OWN).map(_consistent)

_IMAGE = ImageRef.model_json_schema()["properties"]
_image = {name: _OWN[name] if name in _OWN else values_of(schema, _OWN) for name, schema in _IMAGE.items()}
images: Values = st.one_of(
    _URIS,
    st.fixed_dictionaries({"uri": _URIS}, optional={name: _image[name] for name in ("version_id", "etag", "sha256")}),
    st.fixed_dictionaries({"data": st.binary(min_size=1) | _BASE64}, optional={"sha256": _image["sha256"]}),
)

_JOB = Job.model_json_schema()
_job = {name: values_of({"$defs": _JOB["$defs"], **schema}, _OWN) for name, schema in _JOB["properties"].items()} | {
    "images": st.lists(images, max_size=3),
    "sampling": samplings,
    "metadata": _OWN["metadata"],
}
_text = {name: _job.pop(name) for name in ("prompt", "messages")}
job_ids: Values = _job["job_id"].filter(lambda job_id: job_id is not None)
jobs: Values = st.one_of(
    [
        st.fixed_dictionaries({name: values.filter(lambda value: value is not None)}, optional=_job)
        for name, values in _text.items()
    ]
).map(Job.model_validate)
"""Jobs that a worker takes."""


def messages(model: type[Message]) -> Values:
    """Outgoing messages of one kind."""
    return values_of(model.model_json_schema(), _OWN).map(model.model_validate)
