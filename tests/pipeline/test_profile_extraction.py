"""Documents by the profile of a model: what is asked, how pages are rendered, and what becomes of the answers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
from pdf_files import text_pdf

from nanovllm.engine.outputs import ModelInfo
from nanovllm.messages.result import TokenUsage
from nanovllm.pipeline.documents.extraction import DocumentSource, Extraction
from nanovllm.pipeline.documents.page_outputs import KeepOutputs, PageOutput, PageRequest
from nanovllm.pipeline.documents.page_task import page_task
from nanovllm.sampling_params import SamplingParams
from nanovllm.settings.routes import Route
from nanovllm.vision.images.pool import DecoderPool
from nanovllm.vision.images.preprocess import ImageTransform
from tests.pipeline.test_profiles import SCHEMA, of, route

pytest.importorskip("pypdfium2")
MODEL = ModelInfo("m", "r", "d")
SOURCE = DocumentSource("file:///a.pdf")
USAGE = TokenUsage(input_tokens=1, output_tokens=1)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def decoders() -> AsyncIterator[DecoderPool]:
    pool = DecoderPool(
        ImageTransform(resize=None, crop=None, rescale_factor=None, mean=None, std=None), workers=1, timeout_s=60.0
    )
    await pool.start()
    yield pool
    await pool.close()


pytestmark = pytest.mark.asyncio(loop_scope="module")


class Model:
    """Answers every page with ``text``, and keeps what it was asked."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.requests: list[PageRequest] = []

    async def __call__(self, request: PageRequest) -> PageOutput:
        self.requests.append(request)
        return PageOutput(self.text, "stop", USAGE)


async def extracted(decoders: DecoderPool, asked: Route, profile: str, model: Model) -> Any:
    task = page_task(asked, of(profile))
    run = Extraction(asked, decoders, MODEL, SamplingParams(), worker="w", task=task)
    return await run(text_pdf("one page"), SOURCE, model)


async def test_a_page_is_asked_and_read_as_the_profile_says(decoders: DecoderPool) -> None:
    model = Model("<doctag><title>Invoice</title><otsl><fcel>1<nl></otsl>")
    record = await extracted(decoders, route(task="markdown"), "granite-docling", model)
    assert record.text == "# Invoice\n\n<table><tr><td>1</td></tr></table>"
    assert not record.pages[0].unparsed
    assert model.requests[0].prompt == "<|image|>Convert this page to docling."
    record = await extracted(decoders, route(task="tables"), "granite-docling", model)
    assert record.text == "<table><tr><td>1</td></tr></table>"


async def test_an_answer_of_another_form_is_in_the_record_and_marked(decoders: DecoderPool) -> None:
    record = await extracted(decoders, route(task="markdown"), "chandra-ocr-2", Model("I see a page."))
    assert (record.text, record.pages[0].unparsed, record.status) == ("I see a page.", True, "complete")


async def test_a_schema_is_a_variable_of_the_template_for_each_request(decoders: DecoderPool) -> None:
    model = Model('{"vendor": "x"}')
    record = await extracted(decoders, route(task="schema", response_schema=SCHEMA), "nuextract3", model)
    assert record.value == {"vendor": "x"}
    (request,) = model.requests
    assert request.chat_template_kwargs["enable_thinking"] is False
    assert json.loads(request.chat_template_kwargs["template"])["total"] == "number"
    assert request.sampling.json_schema is not None


async def test_a_page_has_the_size_that_the_profile_says(decoders: DecoderPool) -> None:
    model = Model("---\nprimary_language: en\n---\ntext")
    record = await extracted(decoders, route(task="markdown"), "olmocr-2", model)
    assert record.text == "text"
    (image,) = model.requests[0].images
    assert max(image.width, image.height) in (1_288, 1_289)
    await extracted(decoders, route(task="markdown", pages={"dpi": 36}), "olmocr-2", model)
    assert max(model.requests[1].images[0].width, model.requests[1].images[0].height) < 500


async def test_variables_of_the_template_are_part_of_what_a_finished_page_is_found_by() -> None:
    keep = KeepOutputs(Model(""), store=None, model=MODEL, options={})  # type: ignore[arg-type]  # no page is asked for
    plain = PageRequest("p", (), SamplingParams())
    keys = [keep._key(replace(plain, chat_template_kwargs=kwargs)).digest for kwargs in ({}, {"a": 1}, {"a": 2})]
    assert len(set(keys)) == 3
