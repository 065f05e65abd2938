"""The document record: what was extracted from one version of one document, with the evidence for each leaf."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from nanovllm.messages.base import FinishReason, Message, Source
from nanovllm.messages.encoding import check_json_value
from nanovllm.messages.result import ModelUse, StoredResult, TokenUsage

FieldSource = Literal["model", "text_layer", "absent"]
EvidenceMatch = Literal["exact", "normalised", "none"]
PageStatus = Literal["ok", "incomplete", "blank", "failed"]
PageSource = Literal["model", "text_layer"]
SuspiciousRule = Literal["override", "role_marker", "addressed", "dictated_answer", "concealment"]

Span = tuple[int, int]
"""Half-open range of characters (Unicode code points) in a page's text."""


class DocumentUse(Message):
    """The document as it was read."""

    uri: str = Field(description="`s3://bucket/key`, or the path of a local file.")
    version_id: str | None = None
    etag: str | None = None
    sequencer: str | None = Field(None, description="Of the event that named it; compares within one key only.")
    sha256: str = Field(description="Digest of the bytes.")
    size: int = Field(ge=0, description="Bytes.")
    media_type: str
    pages: int = Field(ge=0, description="Pages that the document has, extracted or not.")


class RouteUse(Message):
    """The route that decided how the document was read."""

    name: str
    digest: str = Field(description="SHA-256 of everything in the route that decides its records.")


class FieldMeta(Message):
    """What is known about one leaf of `value`."""

    source: FieldSource = Field(
        description="`model`: generated; `text_layer`: generated without a model from the page's own text; `absent`: "
        "null, an empty list or object, or a property of the schema that the value does not have."
    )
    logprob_min: float | None = Field(
        None,
        le=0,
        description="Lowest log probability among the value's own tokens, before the constraint: what the schema "
        "imposed on the model has a low one. Unset where none is known.",
    )
    logprob_mean: float | None = Field(None, le=0, description="Mean of the same. Neither is a calibrated confidence.")
    evidence: EvidenceMatch = Field(
        "none",
        description="Whether the value stands in a page's text layer or transcript: letter by letter, or after "
        "normalisation of case, white space, compatibility characters, hyphens, quotes, numbers and dates. Values of "
        "fewer than 3 characters have none.",
    )
    page: int | None = Field(
        None, ge=1, description="Page of the evidence; without evidence the page whose request gave the value."
    )
    text: str | None = Field(None, description="The page's own text at the evidence.")
    span: Span | None = Field(None, description="Where that text stands in the page's text.")
    occurrences: int = Field(0, ge=0, description="Places where the value stands, counted up to 100.")
    ambiguous: bool = Field(
        False, description="The value stands in several places; page, text and span are those of the first."
    )
    suspicious_text: bool = Field(
        False,
        description="The value stands in text that addresses a model, and there is no evidence for it elsewhere: "
        "a reader must confirm it.",
    )


class SuspiciousSpan(Message):
    """Text of a page that addresses a model."""

    rule: SuspiciousRule = Field(
        description="`override`: ignore earlier instructions; `role_marker`: markers of chat templates; `addressed`: "
        "spoken to a model; `dictated_answer`: says what to report; `concealment`: says what not to report."
    )
    span: Span
    text: str


class PageError(Message):
    """Why a page has no answer."""

    code: str = Field(description="As in dead letters.")
    message: str
    retryable: bool = Field(description="Whether the same page can succeed once the remedy was applied.")


class PageUse(Message):
    """One page and how its answer came about."""

    number: int = Field(ge=1)
    status: PageStatus = Field(
        description="`incomplete`: cut by max_tokens, the context's length or a loop; `blank`: nothing to read, no "
        "request was made; `failed`: `error` says why."
    )
    source: PageSource | None = Field(None, description="Unset where the page has no answer.")
    error: PageError | None = None
    attempts: int = Field(0, ge=0, description="Requests made for the page; 0 where none was needed.")
    asked_with: int | None = Field(
        None,
        ge=1,
        description="The first page of the request that asked for this page too: value and text are that page's.",
    )
    rotation: Literal[0, 90, 180, 270] = Field(0, description="Degrees clockwise that the answered attempt turned it.")
    tokens: TokenUsage | None = Field(
        None, description="Of all attempts; of a request for several pages an equal share, so that sums stay right."
    )
    stop: FinishReason | None = Field(None, description="Why the last attempt's text ended.")
    reused: bool = Field(False, description="The answer is an earlier one of an equal page.")
    unparsed: bool = Field(
        False,
        description="The answer is not of the form that the model's profile says: its text is as the model wrote it.",
    )
    suspicious_text: tuple[SuspiciousSpan, ...] = ()

    @model_validator(mode="after")
    def _check_error(self) -> Self:
        if (self.status == "failed") != (self.error is not None):
            raise ValueError(f"page {self.number}: an error belongs to status 'failed' and to no other")
        return self


class SchemaError(Message):
    """One place where the value does not follow the schema."""

    path: str = Field(description="JSON pointer into `value`.")
    keyword: str = Field(description="Keyword of the schema that refuses it; `json` where the output is no JSON.")
    message: str


class ValidationOutcome(Message):
    """The whole value against the whole schema, after parts and pages were merged."""

    schema_sha256: str = Field(description="Digest of the schema as canonical JSON.")
    ok: bool
    errors: tuple[SchemaError, ...] = Field((), description="The first 20.")


class Conflict(Message):
    """A leaf for which pages gave different values; `value` has the first page's."""

    path: str = Field(description="JSON pointer into `value`.")
    pages: tuple[int, ...] = Field(description="Pages whose value differs.")


class DocumentTimings(Message):
    """Milliseconds that the document spent in each stage; of requests that ran together each counts its own."""

    fetch: float = Field(0.0, ge=0)
    render: float = Field(0.0, ge=0, description="Pages to pixels.")
    text: float = Field(0.0, ge=0, description="Reading and scoring the text layer.")
    queue: float = Field(0.0, ge=0)
    encode: float = Field(0.0, ge=0)
    generation: float = Field(0.0, ge=0, description="From the engine's receipt to the last token.")
    saved: float = Field(
        0.0,
        ge=0,
        description="Engine milliseconds that were not spent: of reused pages what they took before, of repetitions "
        "that were stopped the rest up to max_tokens, of blank pages and those read from their text layer the mean of "
        "the route's asked pages so far.",
    )
    merge: float = Field(0.0, ge=0, description="Merging, validation and evidence.")
    total: float = Field(0.0, ge=0)


class DocumentRecord(Message):
    """What was extracted from one version of one document. Schema `document_record.v1`."""

    schema_name: ClassVar[str] = "document_record.v1"

    version: Literal[1] = 1
    job_id: str = Field(description="Depends on bucket, key, version and route.")
    result_id: str = Field(description="Depends on job_id alone: the same when a document is extracted again.")
    status: Literal["complete", "partial", "invalid", "failed"] = Field(
        description="`partial`: some page failed or was cut; `invalid`: the output is no JSON, or its value does not "
        "follow the schema; `failed`: no page has an answer."
    )
    document: DocumentUse
    route: RouteUse
    value: Any = Field(None, description="Follows the route's schema and nothing else stands in it.")
    fields: dict[str, FieldMeta] = Field(
        default_factory=dict, description="By JSON pointer into `value`, one for each leaf."
    )
    pages: tuple[PageUse, ...] = Field((), description="In page order; pages outside the route's range are left out.")
    conflicts: tuple[Conflict, ...] = ()
    text: str | None = Field(None, description="The raw output, where it is invalid or cut, or asks for no schema.")
    validation: ValidationOutcome | None = Field(
        None, description="Unset for a route without a schema, and where every page is blank."
    )
    constrained: bool = Field(description="Whether every generated token was confined to the schema.")
    suspicious_text: bool = Field(False, description="Some page has text that addresses a model.")
    model: ModelUse
    usage: TokenUsage
    timings_ms: DocumentTimings = DocumentTimings()
    source: Source | None = Field(None, description="Unset where no Kafka record asked for it.")
    worker: str
    metadata: dict[str, Any] = Field(default_factory=dict, description="The job's own metadata.")
    stored: StoredResult | None = Field(
        None,
        description="The whole record is in S3, because it is too large for a message: `value`, `fields`, `pages`, "
        "`conflicts`, `text` and `metadata` are empty here.",
    )

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        check_json_value(self.value)
        if any(path and not path.startswith("/") for path in self.fields):
            raise ValueError("a key of fields is no JSON pointer: write '' for the whole value, or '/name'")
        return self

    def referring_to(self, stored: StoredResult) -> DocumentRecord:
        """This record without whatever may be large, and with the place where all of it is."""
        large: dict[str, Any] = {"value": None, "fields": {}, "pages": (), "conflicts": (), "text": None}
        return self.model_copy(update={**large, "metadata": {}, "stored": stored})
