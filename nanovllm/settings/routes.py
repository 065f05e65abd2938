"""Routes: which objects are extracted, how, and where their records go; one YAML file of several."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator, model_validator

from nanovllm.errors import counted
from nanovllm.image_placeholder import IMAGE_PLACEHOLDER
from nanovllm.messages.encoding import check_json_value
from nanovllm.messages.s3_uri import split_prefix_uri, split_s3_uri
from nanovllm.messages.validation import describe_errors
from nanovllm.sampling_params import CONSTRAINTS, SamplingParams
from nanovllm.settings.base import Bytes, Seconds, SettingsModel, TopicName

TextPolicy = Literal["ignore", "hint", "only_if_clean"]
MergeRule = Literal["per_document", "per_page", "per_row"]
OnBadOutput = Literal["accept", "review", "retry"]
Task = Literal["text", "markdown", "tables", "schema"]
SidecarFormat = Literal["json", "jsonl", "markdown"]

DIGEST_VERSION = 1
"""Incremented when equal routes make other records."""
MAX_ROUTES = 256
CONTENT_TYPES: dict[SidecarFormat, str] = {
    "json": "application/json",
    "jsonl": "application/x-ndjson",
    "markdown": "text/markdown; charset=utf-8",
}
_SUFFIXES: dict[SidecarFormat, str] = {"json": ".json", "jsonl": ".jsonl", "markdown": ".md"}
# What says where a record goes and when, not what stands in it.
_NOT_DIGESTED = {"match", "result_topic", "review_topic", "priority", "deadline_s", "on_missing"}
_PAGES = re.compile(r" *(-?[1-9][0-9]{0,8})(-(-?[1-9][0-9]{0,8})?)? *")
_CONTENT_TYPE = re.compile(r"(\*|[a-z0-9!#$&^_.+-]+)/(\*|[a-z0-9!#$&^_.+-]+)")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9.\-_]{1,62}")
_FIELD = re.compile(r"\{[^{}]*\}")


def _listed(value: Any) -> Any:
    """One text as a list of one."""
    return (value,) if isinstance(value, str) else value


def _check_bucket(bucket: str) -> str:
    if not _BUCKET.fullmatch(bucket):
        raise ValueError("is no name of a bucket; buckets are named one by one, without wildcards")
    return bucket


def _check_key_glob(glob: str) -> str:
    if glob.startswith("s3://"):
        raise ValueError("is a URI: the bucket has a name of its own here, and the key begins behind it")
    if "{" in glob and "[{]" not in glob:
        raise ValueError("has braces, which stand for themselves: write a list of globs (or [{] for a brace)")
    if glob.endswith("/"):
        raise ValueError("ends with a slash, as no object's key does: ** behind it takes all that lies below")
    return glob


def _check_content_type(pattern: str) -> str:
    pattern = pattern.lower()
    if not _CONTENT_TYPE.fullmatch(pattern):
        raise ValueError("is no content type such as application/pdf or image/*")
    return pattern


KeyGlob = Annotated[str, Field(min_length=1, max_length=1_024), AfterValidator(_check_key_glob)]
KeyGlobs = Annotated[tuple[KeyGlob, ...], BeforeValidator(_listed)]
Buckets = Annotated[tuple[Annotated[str, AfterValidator(_check_bucket)], ...], BeforeValidator(_listed)]
ContentTypes = Annotated[tuple[Annotated[str, AfterValidator(_check_content_type)], ...], BeforeValidator(_listed)]


class Match(SettingsModel):
    """The objects that a route takes: all of these conditions hold."""

    bucket: Annotated[Buckets, Field(min_length=1)] = Field(description="Names of buckets.")
    key: Annotated[KeyGlobs, Field(min_length=1)] = Field(
        description="Globs of keys, one of which matches: `*` within a level, `**` any number of levels."
    )
    exclude: KeyGlobs = Field((), description="Globs of keys that it does not take.")
    content_type: ContentTypes = Field((), description="Content types, such as `application/pdf` and `image/*`.")
    min_bytes: int = Field(0, ge=0, description="Least size of the object.")
    max_bytes: Bytes | None = Field(None, description="Largest size of the object.")

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.max_bytes is not None and self.max_bytes < self.min_bytes:
            raise ValueError(f"max_bytes ({self.max_bytes}) is below min_bytes ({self.min_bytes})")
        return self


class PagePolicy(SettingsModel):
    """Which pages of a document are read, and at which resolution."""

    range: str | None = Field(None, description="Pages, such as `1-3,7,-1`; -1 is the last one; unset or `all`: all.")
    dpi: int = Field(150, ge=18, le=1_200, description="Resolution in which a page is rendered.")
    max_pixels: int | None = Field(
        None, ge=1, description="Largest area of a rendered page, to which larger ones are scaled down."
    )
    max_pages: int = Field(2_000, ge=1, description="Documents of more pages are refused.")
    request: Literal["page", "document"] = Field(
        "page",
        description="`page`: one prompt a page; `document`: as many pages in a prompt as the model takes, which have "
        "one value together.",
    )

    @field_validator("range")
    @classmethod
    def _check_range(cls, pages: str | None) -> str | None:
        for part in (pages or "all").split(","):
            found = _PAGES.fullmatch(part)
            if found is None and pages not in (None, "all"):
                raise ValueError("is no list of pages such as 1-3,7,-1")
            if found is not None and found[3]:
                first, last = int(found[1]), int(found[3])
                if last < first and (first < 0) == (last < 0):
                    raise ValueError("has a range that ends before it begins")
        return pages


class LadderStep(SettingsModel):
    """What is done otherwise when a page is tried again."""

    dpi: int | None = Field(None, ge=18, le=1_200, description="Another resolution.")
    max_pixels: int | None = Field(None, ge=1, description="Another largest area.")
    rotation: Literal[0, 90, 180, 270] = Field(0, description="Degrees by which the page is turned, clockwise.")
    temperature: float | None = Field(None, ge=0.0, le=100.0, description="Another temperature.")


class Sidecar(SettingsModel):
    """The object that a record is written to."""

    format: SidecarFormat = Field("json", description="Its form.")
    place: str | None = Field(
        None,
        description="`s3://…` with the source's `{key}` and, where needed, `{bucket}`; unset: beside the source, with "
        "the format's suffix behind its key.",
    )

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        if split_s3_uri(self.template.replace("{bucket}", "bucket")) is None:
            raise ValueError("place is no s3://bucket/… URI")
        bucket, _, key = self.template.removeprefix("s3://").partition("/")
        if key.count("{key}") != 1 or "{key}" in bucket:
            raise ValueError("place has {key} once, behind the bucket: each object has a record of its own")
        if unknown := set(_FIELD.findall(self.template)) - {"{bucket}", "{key}"}:
            raise ValueError(f"place has {min(unknown)}; only {{bucket}} and {{key}} are known")
        if key.endswith("/"):
            raise ValueError("place ends with a slash, as no object's key does")
        return self

    @property
    def template(self) -> str:
        """The place, written out."""
        return self.place or f"s3://{{bucket}}/{{key}}{_SUFFIXES[self.format]}"

    @property
    def content_type(self) -> str:
        """The content type of what is written."""
        return CONTENT_TYPES[self.format]

    def around_key(self, bucket: str) -> tuple[str, str, str]:
        """Bucket, and what stands before and behind the source's key, for an object of ``bucket``."""
        before, _, behind = self.template.removeprefix("s3://").partition("{key}")
        target, _, prefix = before.replace("{bucket}", bucket).partition("/")
        return target, prefix, behind.replace("{bucket}", bucket)


class Route(SettingsModel):
    """One kind of document: its objects, the question, and what becomes of the answer."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Name, which records carry.")
    match: Match = Field(description="The objects that it takes.")
    prompt: str | None = Field(
        None,
        min_length=1,
        description=f"The question; `{IMAGE_PLACEHOLDER}` marks the place of the page, unset: its end. A route with "
        "`task` may leave it to the model's profile.",
    )
    task: Task | None = Field(
        None, description="What the model is asked for, in the way of its profile; unset: what `prompt` says."
    )
    profile: str | None = Field(None, description="Profile in place of the one of `engine.profile`; `none`: none.")
    sampling: dict[str, Any] = Field(
        default_factory=dict, description="As a job's; what is unset takes the worker's NANOVLLM_SAMPLING__* values."
    )
    response_schema: dict[str, Any] | None = Field(None, description="JSON schema of the answer.")
    pages: PagePolicy = Field(PagePolicy(), description="Pages and resolution.")
    text: TextPolicy = Field(
        "ignore",
        description="Use of a page's text layer: `hint` puts it into the prompt, `only_if_clean` takes it in place of "
        "the picture where it is clean.",
    )
    hint_tokens: int = Field(
        1_024,
        ge=1,
        description="Most tokens of a text layer beside its picture; in front of servers four characters count as one.",
    )
    merge: MergeRule = Field("per_document", description="How arrays over pages become one.")
    result_topic: TopicName | None = Field(None, description="Topic of the records; unset: `topics.results`.")
    review_topic: TopicName | None = Field(None, description="Topic of the records that someone must see.")
    sidecar: Sidecar | None = Field(None, description="Object of the record; unset: none.")
    priority: int = Field(0, ge=-(2**31), lt=2**31, description="Lower goes first.")
    deadline_s: Seconds | None = Field(None, description="Seconds from the event to the last moment of an answer.")
    on_invalid: OnBadOutput = Field("accept", description="What becomes of an answer that breaks the schema.")
    on_incomplete: OnBadOutput = Field("accept", description="What becomes of an answer that was cut off.")
    on_missing: Literal["drop", "dead_letter", "retry"] = Field(
        "dead_letter", description="What becomes of an event whose object is gone."
    )
    max_failed_pages: float = Field(
        0.0, ge=0.0, le=1.0, description="Error budget: the share of a document's pages that may fail."
    )
    ladder: tuple[LadderStep, ...] = Field((), max_length=8, description="What is done otherwise at each retry.")

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str | None) -> str | None:
        if prompt is not None and (places := prompt.count(IMAGE_PLACEHOLDER)) > 1:
            raise ValueError(f"has {counted(places, 'image placeholder')}, and one page")
        return prompt

    @field_validator("sampling")
    @classmethod
    def _check_sampling(cls, sampling: dict[str, Any]) -> dict[str, Any]:
        if "json_schema" in sampling:
            raise ValueError("json_schema: a route has response_schema for it")
        try:
            params = SamplingParams.model_validate_json(json.dumps(sampling), strict=True)
        except ValidationError as error:
            raise ValueError(describe_errors(error, "sampling")) from None
        if params.n > 1:
            raise ValueError(f"n: {params.n} outputs, but a page has one answer")
        return {name: getattr(params, name) for name in SamplingParams.model_fields if name in sampling}

    @field_validator("response_schema")
    @classmethod
    def _check_schema(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema is not None:
            check_json_value(schema)
        return schema

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.prompt is None and self.task is None:
            raise ValueError("has neither prompt nor task: write a prompt, or a task of the model's profile")
        if self.task is not None and (self.task == "schema") != (self.response_schema is not None):
            raise ValueError(f"task {self.task} and response_schema: the task schema has one, and no other does")
        constraint = next((name for name in CONSTRAINTS if self.sampling.get(name) is not None), None)
        if self.response_schema is not None and constraint:
            raise ValueError(f"response_schema and sampling.{constraint} exclude each other")
        if self.review_topic is None and "review" in (self.on_invalid, self.on_incomplete):
            raise ValueError("review_topic is unset, and on_invalid or on_incomplete sends records there")
        if self.merge == "per_page" and self.pages.request == "document":
            raise ValueError(
                "merge per_page has one value a page, and pages.request document asks for one value of several pages: "
                "write per_document or per_row, or pages.request page"
            )
        if not self.ladder and "retry" in (self.on_invalid, self.on_incomplete):
            raise ValueError("ladder is empty, and on_invalid or on_incomplete retries: a greedy answer comes again")
        return self

    @property
    def job_sampling(self) -> dict[str, Any]:
        """The ``sampling`` of a job of this route."""
        return self.sampling | ({} if self.response_schema is None else {"json_schema": self.response_schema})

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of everything that decides its records; a default written out changes nothing."""
        decides = self.model_dump(mode="json", exclude=_NOT_DIGESTED, exclude_defaults=True)
        if self.sidecar is not None:
            decides["sidecar"] = self.sidecar.format
        # Unsorted: the order of a schema's properties is that of the answer.
        text = json.dumps([DIGEST_VERSION, decides], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class RoutesFile(SettingsModel):
    """A file of routes, its defaults already in each of them."""

    version: Literal[1] = Field(1, description="Version of this form.")
    page_store: str | None = Field(
        None, description="`s3://bucket/prefix` where finished pages are kept; unset: they are not."
    )
    routes: Annotated[tuple[Route, ...], Field(min_length=1, max_length=MAX_ROUTES)] = Field(description="The routes.")

    @field_validator("page_store")
    @classmethod
    def _check_page_store(cls, uri: str | None) -> str | None:
        if uri is not None and split_prefix_uri(uri) is None:
            raise ValueError("has the form s3://bucket/prefix")
        return uri
