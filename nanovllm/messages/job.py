"""The job message: what a producer asks for, validated as untrusted input."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Collection, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    StringConstraints,
    Tag,
    ValidationError,
    WithJsonSchema,
    field_serializer,
    field_validator,
    model_validator,
)

from nanovllm.errors import InvalidJob, PlaceholderMismatch, counted
from nanovllm.image_placeholder import IMAGE_PLACEHOLDER
from nanovllm.messages.encoding import check_json_value
from nanovllm.messages.http_uri import MAX_HTTP_URI_CHARS, digested, is_http_uri, parse_http_uri
from nanovllm.messages.s3_uri import MAX_KEY_BYTES, ObjectAddress, is_object_uri, split_object
from nanovllm.messages.validation import describe_errors, is_one_edit, printable
from nanovllm.sampling_params import CONSTRAINTS, MAX_SCHEMA_CHARS, SamplingParams, at_most

MAX_METADATA_BYTES = 65_536
MAX_ITEMS = 4_096
"""Most images, messages, or parts of a message; every item costs validation in Python."""
MAX_PARTS = 2 * MAX_ITEMS
"""Most parts of all messages: text and image in each."""
MAX_NAMES = 64
"""Most names in ``sampling``, an image, a message or a part; each unknown one is an error."""
MAX_TEMPLATE_KWARGS = 16

MAX_UNKNOWN_NAMES = 64
"""Most unknown fields that are compared with the known ones: each comparison holds the event loop."""
MAX_NAME_CHARS = 1_024
MAX_URI_CHARS = 2_048
MAX_VERSION_ID_BYTES = 1_024

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,64};base64,", re.IGNORECASE)
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,32})?([Zz]|[+-]\d\d:\d\d)")
_BARE_TAG = re.compile(r"[!#-~]+")
TOPIC_PATTERN = r"^[A-Za-z0-9._-]{1,249}$"
_PRINTABLE = r"^[^\x00-\x1f\x7f]+$"
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")


def _bytes_from_base64(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("is not valid base64") from None


def _bytes_to_base64(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def _check_image_uri(value: Any) -> Any:
    # It runs before pydantic has looked at the type, which refuses what is no text.
    if isinstance(value, str) and is_http_uri(value):
        parse_http_uri(value)
    elif isinstance(value, str) and len(value) > MAX_URI_CHARS:
        raise ValueError(f"has more than {MAX_URI_CHARS} characters")
    elif isinstance(value, str) and split_object(value) is None:
        scheme = value.partition("://")[0] if is_object_uri(value) else "s3"
        raise ValueError(f"is no {scheme}://bucket/key URI with a key of at most {MAX_KEY_BYTES} bytes in UTF-8")
    return value


def _datetime_from_text(value: Any) -> Any:
    # pydantic alone would take a number for seconds or for milliseconds, by its size.
    if isinstance(value, str) and _RFC3339.fullmatch(value):
        return datetime.fromisoformat(value.upper())
    if isinstance(value, datetime) and value.tzinfo is not None:
        return value
    raise ValueError("is not an RFC 3339 time with an offset, such as 2030-01-31T12:00:00Z")


def image_name(text: str) -> str | None:
    """``text`` as the name of an image: its end where it is long, without what cannot be printed or encoded."""
    printable = _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text.encode(errors="replace").decode())
    return printable[-MAX_NAME_CHARS:] or None


ImageBytes = Annotated[
    bytes,
    BeforeValidator(_bytes_from_base64),
    Field(min_length=1),
    PlainSerializer(_bytes_to_base64, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "contentEncoding": "base64", "minLength": 1}),
]
ImageUri = Annotated[str, StringConstraints(max_length=MAX_HTTP_URI_CHARS), BeforeValidator(_check_image_uri)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Reuse = Literal["none", "images", "answers"]
ImageName = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME_CHARS, pattern=_PRINTABLE)]
JobId = Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=_PRINTABLE)]
Deadline = Annotated[
    datetime, BeforeValidator(_datetime_from_text), WithJsonSchema({"type": "string", "format": "date-time"})
]


class _Strict(BaseModel):
    # Strict: "64" is no number and 1 is no true; a sender learns of the mistake instead of getting a guess.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, fields: Any) -> Any:
        check_names(fields)
        return fields


def check_names(fields: Any) -> None:
    """Raise ValueError for an object of more than ``MAX_NAMES`` names."""
    if isinstance(fields, dict) and len(fields) > MAX_NAMES:
        raise ValueError(f"has {len(fields)} names, at most {MAX_NAMES} are allowed")


def _bare_tag(value: str) -> str:
    tag = value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value
    # If-Match: * is met by every object, and so by none in particular.
    if tag == "*" or not _BARE_TAG.fullmatch(tag):
        raise ValueError("is not an entity tag")
    return tag


EntityTag = Annotated[str, Field(min_length=1, max_length=1024, pattern='^"?[!#-~]+"?$'), AfterValidator(_bare_tag)]


def _check_version_id(value: str) -> str:
    if len(value.encode("utf-8", "surrogatepass")) > MAX_VERSION_ID_BYTES:
        raise ValueError(f"has more than {MAX_VERSION_ID_BYTES} bytes in UTF-8")
    return value


VersionId = Annotated[str, Field(min_length=1, max_length=MAX_VERSION_ID_BYTES), AfterValidator(_check_version_id)]


class ImageRef(_Strict):
    """One image: an object in a store, what a host serves over HTTP, or its bytes."""

    uri: ImageUri | None = Field(
        None,
        description="`s3://bucket/key`; `gs://bucket/key`, `az://container/key` and `https://host/path` where the "
        "worker reads those.",
    )
    version_id: VersionId | None = Field(None, description="Version of the object.")
    etag: EntityTag | None = Field(None, description="Entity tag that the object must have, with or without quotes.")
    sha256: Sha256 | None = Field(None, description="Digest that the bytes must have, in lower-case hexadecimal.")
    data: ImageBytes | None = Field(None, description="The encoded image: base64 in JSON, bytes in msgpack.")
    name: ImageName | None = Field(
        None, description="What the sender calls the image, such as its path; comes back in the result."
    )

    @model_validator(mode="after")
    def _check_one_source(self) -> ImageRef:
        if (self.uri is None) == (self.data is None):
            raise ValueError("an image has either uri or data")
        if self.uri is None and (self.version_id is not None or self.etag is not None):
            raise ValueError("version_id and etag belong to a uri")
        if self.is_http and self.version_id is not None:
            raise ValueError("version_id belongs to an object in a store, and not to an https:// URI")
        return self

    @property
    def is_http(self) -> bool:
        """Whether a host serves it over HTTP: it is no object in a store then."""
        return self.uri is not None and is_http_uri(self.uri)

    @property
    def address(self) -> ObjectAddress:
        """Where the object is; its key is taken literally, as the stores do.

        Raises:
            ValueError: the image is given by its bytes.
        """
        address = split_object(self.uri or "")
        if address is None:
            raise ValueError("this image has no uri")
        return address

    @property
    def bucket_and_key(self) -> tuple[str, str]:
        """Bucket and key of the object. Raises as ``address``."""
        return self.address[1:]

    @property
    def identity(self) -> str:
        """The same for images that are provably the same before anything is downloaded; without the query of a URI."""
        if self.sha256:
            return f"sha256:{self.sha256}"
        if self.data is not None:
            return f"sha256:{hashlib.sha256(self.data).hexdigest()}"
        uri, version = digested(str(self.uri)), self.version_id or self.etag
        return f"{uri}#{version}" if version else uri


def _image_from_uri(value: Any) -> Any:
    return {"uri": value} if isinstance(value, str) else value


Image = Annotated[ImageRef, BeforeValidator(_image_from_uri, json_schema_input_type=ImageUri | ImageRef)]


class TextPart(_Strict):
    """Text of a message; ``<|image|>`` in it is plain text."""

    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    """The place of the next one of the job's ``images``."""

    type: Literal["image"]


class ImageUrl(_Strict):
    """Where an image of a message is."""

    url: str = Field(description="A URI, as `uri` of an image, or a data: URL with base64.")
    detail: Literal["auto"] = Field("auto", description="Only `auto`: the checkpoint decides the resolution.")

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        if _DATA_URL.match(url):
            return url
        if not is_object_uri(url) and not is_http_uri(url):
            raise ValueError("is neither an s3:// or https:// URI nor a data:image/…;base64 URL")
        return str(_check_image_uri(url))


class ImageUrlPart(_Strict):
    """An image given in the message itself."""

    type: Literal["image_url"]
    image_url: ImageUrl

    def image(self) -> ImageRef:
        """The image that the URL names or holds."""
        url = self.image_url.url
        if header := _DATA_URL.match(url):
            return ImageRef(data=_bytes_from_base64(url[header.end() :]))
        return ImageRef(uri=url)

    @model_validator(mode="after")
    def _check_image(self) -> ImageUrlPart:
        self.image()
        return self


def _content_kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "parts"


Part = Annotated[TextPart | ImagePart | ImageUrlPart, Field(discriminator="type")]
# Lists arrive as lists, and strict mode would take nothing but a tuple for a tuple.
# They fail at the first wrong item: a job may have thousands, and an error costs more than a valid item.
Parts = Annotated[tuple[Part, ...], Field(strict=False, min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
Content = Annotated[Annotated[str, Tag("text")] | Annotated[Parts, Tag("parts")], Discriminator(_content_kind)]


class ChatMessage(_Strict):
    """One message of a chat, in the OpenAI form."""

    role: Literal["system", "user", "assistant"]
    content: Content


def _check_parts(messages: Any) -> Any:
    if isinstance(messages, (list, tuple)):
        contents = [message.get("content") for message in messages[:MAX_ITEMS] if isinstance(message, dict)]
        parts = sum(len(content) for content in contents if isinstance(content, (list, tuple)))
        if parts > MAX_PARTS:
            raise ValueError(f"have {parts} parts, at most {MAX_PARTS} are allowed in all messages")
    return messages


_Messages = Annotated[tuple[ChatMessage, ...], Field(strict=False, min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
Messages = Annotated[_Messages, BeforeValidator(_check_parts, json_schema_input_type=_Messages)]
Images = Annotated[tuple[Image, ...], Field(strict=False, max_length=MAX_ITEMS, fail_fast=True)]


class Job(_Strict):
    """What a producer asks for: one prompt or chat, its images, and how to answer.

    Unknown top-level fields are tolerated (a newer producer may send them), unless they are one letter from a known one
    that is absent; unknown names in ``sampling`` or in an image are refused, because an ignored constraint would be a
    lie.
    """

    model_config = ConfigDict(
        extra="ignore", json_schema_extra={"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]}
    )
    schema_name: ClassVar[str] = "job.v1"

    version: Literal[1] = 1
    job_id: JobId | None = Field(None, description="Unset: derived from topic, partition and offset.")
    prompt: str | None = Field(None, min_length=1, description="Text with one `<|image|>` for each of `images`.")
    messages: Messages | None = Field(None, description="A chat in place of `prompt`.")
    images: Images = Field((), description="In the order of their places.")
    sampling: Annotated[
        dict[str, Any], WithJsonSchema({"allOf": [SamplingParams.model_json_schema()], "type": "object"})
    ] = Field(default_factory=dict, description="What is unset takes the worker's NANOVLLM_SAMPLING__* values.")
    chat_template_kwargs: Annotated[dict[str, bool | int | float | None], at_most(MAX_TEMPLATE_KWARGS)] = Field(
        default_factory=dict,
        max_length=MAX_TEMPLATE_KWARGS,
        description="Variables of the chat template, where the worker allows them (`engine.job_chat_template_kwargs`).",
    )
    deadline: Deadline | None = Field(None, description="RFC 3339; a job that is not done by then is a dead letter.")
    priority: int = Field(0, ge=-(2**31), lt=2**31, description="Lower goes first.")
    reuse: Reuse | None = Field(
        None, description="Which work of other jobs may serve this one; unset: as the worker is set (`reuse.level`)."
    )
    metadata: dict[str, Any] = Field(default_factory=dict, description="Comes back in the result, untouched.")
    reply_to: str | None = Field(
        None, pattern=TOPIC_PATTERN, description="Topic of the result, where the worker allows it."
    )

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, fields: Any) -> Any:
        # In place of the limit that other objects have: unknown names cost nothing here.
        known_names = cls.__pydantic_fields__
        if isinstance(fields, dict) and fields.keys() <= known_names.keys():
            return fields
        names = fields if isinstance(fields, Mapping) else {}
        unknown = [name for name in names if isinstance(name, str) and name not in known_names]
        absent = [name for name in known_names if name not in names] if unknown else []
        for name in unknown[:MAX_UNKNOWN_NAMES]:
            for known in absent:
                if is_one_edit(name, known):
                    raise ValueError(f"unknown name {printable(name)}: did you mean {known}?")
        return fields

    @field_validator("sampling")
    @classmethod
    def _check_sampling(cls, sampling: dict[str, Any]) -> dict[str, Any]:
        check_names(sampling)
        check_json_value(sampling)
        schema = sampling.get("json_schema")
        # SamplingParams refuses it too, after it was made from JSON twice.
        if isinstance(schema, dict) and len(_json_bytes(schema)) > MAX_SCHEMA_CHARS:
            raise ValueError(f"json_schema is longer than {MAX_SCHEMA_CHARS} characters")
        written = _json_bytes(sampling)
        try:
            return dict(_read_again(written) if len(written) <= _KNOWN_SAMPLING_BYTES else _read_sampling(written))
        except ValidationError as error:
            raise ValueError(describe_errors(error, "sampling")) from None

    @field_serializer("sampling")
    def _sampling_with_text_keys(self, sampling: dict[str, Any]) -> dict[str, Any]:
        # JSON has no other keys, and msgpack maps of jobs are read with string keys alone: token ids become text.
        biases = sampling.get("logit_bias")
        return {**sampling, "logit_bias": {str(token): bias for token, bias in biases.items()}} if biases else sampling

    @field_validator("metadata")
    @classmethod
    def _check_metadata(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        check_json_value(metadata)
        if len(_json_bytes(metadata)) > MAX_METADATA_BYTES:
            raise ValueError(f"is larger than {MAX_METADATA_BYTES} bytes")
        return metadata

    @model_validator(mode="after")
    def _check_text(self) -> Job:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("a job has either prompt or messages")
        return self

    @property
    def _parts(self) -> list[TextPart | ImagePart | ImageUrlPart]:
        if self.messages is None:
            return []
        contents = [message.content for message in self.messages]
        return [part for content in contents if not isinstance(content, str) for part in content]

    def image_refs(self) -> tuple[ImageRef, ...]:
        """All images of the job in the order of their places in the text.

        Raises:
            PlaceholderMismatch: the places in the text are more or fewer than the images.
        """
        parts = self._parts
        places = (self.prompt or "").count(IMAGE_PLACEHOLDER) + sum(isinstance(part, ImagePart) for part in parts)
        if places != len(self.images):
            raise PlaceholderMismatch(
                f"the text has {counted(places, 'image placeholder')}, the job has {counted(len(self.images), 'image')}"
            )
        if self.messages is None:
            return self.images
        waiting = iter(self.images)
        return tuple(
            part.image() if isinstance(part, ImageUrlPart) else next(waiting)
            for part in parts
            if not isinstance(part, TextPart)
        )

    @property
    def text_chars(self) -> int:
        """Characters of the prompt or of the messages' text."""
        if self.messages is None:
            return len(self.prompt or "")
        texts = [*(part.text for part in self._parts if isinstance(part, TextPart))]
        texts += [message.content for message in self.messages if isinstance(message.content, str)]
        return sum(map(len, texts))

    def image_key(self) -> str | None:
        """The record's key, or None without an image: the first one's identity, so that equal images meet one cache."""
        images = self.image_refs()
        return images[0].identity if images else None

    def message_dicts(self) -> tuple[dict[str, Any], ...] | None:
        """The chat in the OpenAI form as plain data; images are ``{"type": "image"}`` parts (see ``image_refs``)."""
        if self.messages is None:
            return None
        return tuple(
            {
                "role": message.role,
                "content": message.content
                if isinstance(message.content, str)
                else [
                    {"type": "image"} if isinstance(part, ImageUrlPart) else part.model_dump()
                    for part in message.content
                ],
            }
            for message in self.messages
        )

    def check_template_kwargs(self, allowed: Collection[str]) -> None:
        """Raise InvalidJob for a variable of the chat template that is not ``allowed``."""
        if refused := self.chat_template_kwargs and sorted(self.chat_template_kwargs.keys() - set(allowed)):
            raise InvalidJob(
                f"chat_template_kwargs: {refused[0][:64]!r} is not among the names that this worker lets jobs set "
                "(engine.job_chat_template_kwargs)"
            )

    @property
    def asks_for_constraint(self) -> bool:
        """Whether its sampling confines the output."""
        return any(self.sampling.get(name) is not None for name in CONSTRAINTS)

    @property
    def seed(self) -> int | None:
        """The seed of a job that asks for none, which depends on ``job_id`` alone; None without one."""
        return (
            None
            if self.job_id is None
            else int.from_bytes(hashlib.sha256(self.job_id.encode()).digest()[:8], "big") >> 1
        )

    def sampling_params(self, defaults: SamplingParams, max_tokens: int | None = None) -> SamplingParams:
        """The job's own sampling over the worker's ``defaults``; without a seed, one that depends on ``job_id`` alone.

        Args:
            max_tokens: the largest number that the job may ask for, and gets where it asks for no limit.

        Raises:
            InvalidJob: the job asks for more tokens than allowed, or for more at least than at most.
        """
        values = {name: getattr(defaults, name) for name in SamplingParams.model_fields} | self.sampling
        if values["seed"] is None:
            values["seed"] = self.seed
        if values["max_tokens"] is None:
            values["max_tokens"] = max_tokens
        try:
            params = SamplingParams(**values)
        except ValidationError as error:
            raise InvalidJob(describe_errors(error, "sampling")) from None
        if max_tokens is not None and params.max_tokens is not None and params.max_tokens > max_tokens:
            raise InvalidJob(f"sampling.max_tokens: {params.max_tokens} is above this worker's limit of {max_tokens}")
        return params


def derive_job_id(topic: str, partition: int, offset: int) -> str:
    """The identity of a job that came without one; the same at every delivery. A topic's name never holds a colon."""
    return f"{topic}:{partition}:{offset}"


def _read_sampling(written: bytes) -> dict[str, Any]:
    """The sampling parameters that a JSON object names, validated. Raises ValidationError."""
    # From JSON, because strict Python input would refuse a list for a tuple.
    params = SamplingParams.model_validate_json(written, strict=True)
    return {name: getattr(params, name) for name in SamplingParams.model_fields if name in params.model_fields_set}


# Most jobs of a service ask for the same.
_read_again = lru_cache(256)(_read_sampling)
_KNOWN_SAMPLING_BYTES = 4_096


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
