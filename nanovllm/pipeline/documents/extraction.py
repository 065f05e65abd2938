"""Extraction of one document: its pages answered, merged, validated and held against their own text."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import reduce
from typing import Any

from nanovllm.engine.backends.base import beginning_by_chars
from nanovllm.engine.outputs import ModelInfo
from nanovllm.errors import ConfigurationError, PagesFailed, TooManyPages, counted
from nanovllm.messages.base import Source
from nanovllm.messages.document_record import (
    DocumentRecord,
    DocumentTimings,
    DocumentUse,
    FieldMeta,
    PageUse,
    RouteUse,
    SuspiciousSpan,
    ValidationOutcome,
)
from nanovllm.messages.result import ModelUse, TokenUsage, result_id_for
from nanovllm.pipeline.documents.evidence import PageTexts, with_evidence
from nanovllm.pipeline.documents.group_answers import Fits, GroupReader
from nanovllm.pipeline.documents.merging import MergedPages, merge_pages, merged_fields, merged_schema
from nanovllm.pipeline.documents.model_profile import NO_MODEL_PROFILE
from nanovllm.pipeline.documents.page_answers import Beginning, PageAnswer, PageReader
from nanovllm.pipeline.documents.page_outputs import NO_TOKENS, Ask, added
from nanovllm.pipeline.documents.page_task import PageTask, page_task
from nanovllm.pipeline.documents.suspicious import suspicious_spans
from nanovllm.pipeline.documents.validation import SchemaValidator
from nanovllm.sampling_params import SamplingParams
from nanovllm.settings.routes import Route
from nanovllm.vision.documents.pages import DocumentInfo, parse_page_range
from nanovllm.vision.images.pool import DecoderPool


@dataclass(frozen=True)
class DocumentSource:
    """Where a document's bytes came from, as in `DocumentUse`; ``event_time`` and ``dialect`` as in `SourceVersion`."""

    uri: str
    version_id: str | None = None
    etag: str | None = None
    sequencer: str | None = None
    event_time: datetime | None = None
    dialect: str | None = None

    def job_id(self, route: Route) -> str:
        """The id of the job that extracts this version by ``route``, equal for every delivery of its event."""
        version = self.version_id or self.etag or self.sequencer or ""
        digest = hashlib.sha256("\0".join((self.uri, version, route.name)).encode()).hexdigest()
        return f"{route.name}-{digest[:32]}"


class Extraction:
    """Extracts documents of one route, of every tenant.

    Args:
        defaults: sampling parameters where the route has none.
        worker: id that the records carry.
        task: what the route asks for; None: of a model without a profile.
        pages_at_once: most requests for pages of one document at once.
        fits: the engine's; needed for ``pages.request: document`` alone.
        logprobs: whether the engine gives log probabilities, of which fields have theirs.
        beginning: the engine's, of a text with so many tokens.

    Raises:
        UnsupportedConstraint: the route's schema cannot be validated against.
        ConfigurationError: the extra ``documents`` is not installed, or the route asks for what is not implemented.
    """

    def __init__(
        self,
        route: Route,
        decoders: DecoderPool,
        model: ModelInfo,
        defaults: SamplingParams,
        *,
        worker: str,
        task: PageTask | None = None,
        pages_at_once: int = 4,
        fits: Fits | None = None,
        logprobs: bool = True,
        beginning: Beginning = beginning_by_chars,
    ) -> None:
        self._route = route
        self._decoders = decoders
        task = page_task(route, NO_MODEL_PROFILE) if task is None else task
        if route.pages.request == "page":
            self._reader = PageReader(route, decoders, defaults, task, logprobs=logprobs, beginning=beginning)
        elif fits is not None:
            self._reader = GroupReader(route, decoders, defaults, task, fits, logprobs=logprobs, beginning=beginning)
        else:
            raise ConfigurationError(f"route {route.name}: pages.request document: what the engine takes is not known")
        self._model = ModelUse(**asdict(model))
        self._worker = worker
        self._pages_at_once = pages_at_once
        schema = route.response_schema
        self._schema = None if schema is None else merged_schema(schema, route.merge)
        self._validator = None if self._schema is None else SchemaValidator(self._schema)

    async def __call__(
        self,
        data: bytes,
        source: DocumentSource,
        ask: Ask,
        *,
        tenant: str = "",
        record: Source | None = None,
        fetched_s: float = 0.0,
    ) -> DocumentRecord:
        """The record of a document whose bytes are ``data`` and whose pages ``ask`` is asked for.

        ``record`` is the Kafka record that asked for it, ``fetched_s`` the seconds in which its bytes were read.

        Raises:
            InvalidDocument, DocumentEncrypted, DocumentTooLarge, TooManyPages: no page can be read.
            PagesFailed: more pages failed than the route's error budget allows.
            SystemicError, TransientError, DeadlineExceeded: of the surroundings.
        """
        began = time.monotonic()
        info = await self._decoders.open_document(data, tenant)
        numbers = self._pages_of(info)
        answers = await self._answer(data, info, numbers, ask, tenant)
        self._check_budget(answers)
        merging = time.monotonic()
        # What a model wrote is a page's text where it was asked for that: no value may stand in its own answer.
        texts = {one.number: one.layer or ("" if self._schema else one.text) for one in answers}
        suspicious = {number: suspicious_spans(text) for number, text in texts.items()}
        value, fields, conflicts, validation = await asyncio.to_thread(self._merge, answers, texts, suspicious)
        job_id = source.job_id(self._route)
        ended = time.monotonic()
        return DocumentRecord(
            job_id=job_id,
            result_id=result_id_for(job_id),
            status=_status(answers, validation),
            document=DocumentUse(
                uri=source.uri,
                version_id=source.version_id,
                etag=source.etag,
                sequencer=source.sequencer,
                sha256=info.digest.hex(),
                size=len(data),
                media_type=info.media_type,
                pages=len(info.pages),
            ),
            route=RouteUse(name=self._route.name, digest=self._route.digest),
            value=value,
            fields=fields,
            pages=tuple(_page_use(one, suspicious[one.number]) for one in answers),
            conflicts=conflicts,
            text=self._raw_text(answers),
            validation=validation,
            constrained=self._schema is not None
            and all(one.is_constrained for one in answers if one.source is not None),
            suspicious_text=any(suspicious.values()),
            model=self._model,
            usage=_usage(answers),
            timings_ms=DocumentTimings(
                **_spent(answers),
                fetch=1_000 * fetched_s,
                merge=1_000 * (ended - merging),
                total=1_000 * (ended - began),
            ),
            source=record,
            worker=self._worker,
        )

    def _pages_of(self, info: DocumentInfo) -> list[int]:
        policy = self._route.pages
        if len(info.pages) > policy.max_pages:
            raise TooManyPages(f"the document has {len(info.pages)} pages; the route allows {policy.max_pages}")
        return sorted(parse_page_range(policy.range or "all", len(info.pages)))

    async def _answer(
        self, data: bytes, info: DocumentInfo, numbers: Sequence[int], ask: Ask, tenant: str
    ) -> list[PageAnswer]:
        slots = asyncio.Semaphore(self._pages_at_once)

        async def answer(number: int) -> PageAnswer:
            async with slots:
                return await self._reader.answer(data, info, number, ask, tenant=tenant)

        try:
            if isinstance(self._reader, GroupReader):
                return await self._reader.answers(data, info, numbers, ask, tenant=tenant, at_once=self._pages_at_once)
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(answer(number)) for number in numbers]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    def _check_budget(self, answers: Sequence[PageAnswer]) -> None:
        failed = [one for one in answers if one.error is not None]
        if failed and (len(failed) / len(answers) > self._route.max_failed_pages or len(failed) == len(answers)):
            codes = Counter(one.error.code for one in failed if one.error is not None)
            raise PagesFailed(
                f"{counted(len(failed), 'page')} of {len(answers)} failed "
                f"({', '.join(f'{code}: {number}' for code, number in codes.most_common(3))}; "
                f"page {failed[0].number}: {failed[0].error.message if failed[0].error else ''}); "
                f"the route's budget is {self._route.max_failed_pages:.0%}"
            )

    def _merge(
        self, answers: Sequence[PageAnswer], texts: dict[int, str], suspicious: dict[int, tuple[SuspiciousSpan, ...]]
    ) -> tuple[Any, dict[str, FieldMeta], tuple[Any, ...], ValidationOutcome | None]:
        if self._schema is None or self._validator is None:
            return None, {}, (), None
        answered = {one.number: one for one in answers if one.has_value}
        if all(one.status == "blank" for one in answers):
            return None, {}, (), None
        if not answered:
            return None, {}, (), self._validator.refused("no page has a whole answer")
        merged: MergedPages = merge_pages({number: one.value for number, one in answered.items()}, self._route.merge)
        fields = merged_fields(merged, {number: one.fields for number, one in answered.items()}, self._schema)
        fields = with_evidence(fields, merged.value, PageTexts(texts, suspicious))
        return merged.value, fields, merged.conflicts, self._validator.validate(merged.value)

    def _raw_text(self, answers: Sequence[PageAnswer]) -> str | None:
        """The text of pages without a value; of a route without a schema that of all pages, a form feed between two.

        One request for several pages has one text.
        """
        if self._schema is None:
            return "\f".join(one.text for one in answers if one.asked_with is None)
        return "\f".join(one.text for one in answers if not one.has_value and one.text) or None


def _status(answers: Sequence[PageAnswer], validation: ValidationOutcome | None) -> Any:
    if validation is not None and not validation.ok:
        return "invalid"
    return "complete" if all(one.is_whole for one in answers) else "partial"


def _page_use(answer: PageAnswer, suspicious: tuple[SuspiciousSpan, ...]) -> PageUse:
    return PageUse(
        number=answer.number,
        status=answer.status,
        source=answer.source,
        error=answer.error,
        attempts=answer.attempts,
        asked_with=answer.asked_with,
        rotation=answer.rotation,
        tokens=answer.tokens,
        stop=answer.stop,
        reused=answer.is_reused,
        unparsed=answer.is_unparsed,
        suspicious_text=suspicious,
    )


def _usage(answers: Sequence[PageAnswer]) -> TokenUsage:
    return reduce(added, (one.tokens for one in answers if one.tokens is not None), NO_TOKENS)


def _spent(answers: Sequence[PageAnswer]) -> dict[str, float]:
    spent: Counter[str] = Counter()
    for one in answers:
        spent.update(one.milliseconds)
    return dict(spent)
