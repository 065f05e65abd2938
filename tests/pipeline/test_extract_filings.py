"""Public filings through ``nanovllm extract``: a model with random weights, and nothing but guidance and evidence.

What such a model writes means nothing, so that whatever holds of its records comes from guidance, merging, validation
and the pages' own text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from checkpoints import make_llava
from filings import FILINGS, FOLDER, answers, folded, letters_and_digits, needs_filings, shown

from nanovllm.cli.main import main
from nanovllm.messages.document_record import DocumentRecord, FieldMeta
from nanovllm.pipeline.documents.json_spans import leaves, parse_output
from nanovllm.pipeline.documents.page_answers import MAX_LEAVES
from nanovllm.pipeline.documents.schema_parts import split_schema

pytestmark = [pytest.mark.documents, pytest.mark.slow, needs_filings]

PAGES = 3

Extract = Callable[..., dict[str, DocumentRecord]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights and a tokenizer that any text survives."""
    return make_llava(tmp_path_factory.mktemp("models") / "random", max_position_embeddings=16_384)


@pytest.fixture
def extract(tmp_path: Path, model: Path) -> Extract:
    """``extract(filings, field=value, …)`` → their records by a route with these fields, by name."""

    def run(filings: Sequence[Path], **fields: Any) -> dict[str, DocumentRecord]:
        output = tmp_path / "records.jsonl"
        output.unlink(missing_ok=True)
        assert main(command(write_route(tmp_path, **fields), model, output, *filings)) == 0
        records = [DocumentRecord.model_validate_json(line) for line in output.read_bytes().splitlines()]
        return {Path(record.document.uri).stem: record for record in records}

    return run


def command(routes: Path, model: Path, output: Path, *filings: Path) -> list[str]:
    options = ["-r", str(routes), "--route", "filings", "--model", str(model), "-o", str(output)]
    return ["extract", *map(str, filings), *options]


def write_route(directory: Path, **fields: Any) -> Path:
    route = {
        "name": "filings",
        "match": {"bucket": "inbox", "key": "**"},
        "prompt": "Extract the fields as JSON.",
        "pages": {"range": f"1-{PAGES}"},
        "text": "only_if_clean",
    }
    file = directory / "routes.yaml"
    file.write_text(json.dumps({"routes": [route | fields]}))
    return file


@pytest.mark.parametrize(("kind", "num_parts"), [("credit_agreement", 1), ("10kq", 5)])
def test_every_answer_under_guidance_is_valid_or_its_page_incomplete_whole_and_split(
    kind: str, num_parts: int, extract: Extract
) -> None:
    filings = [path for path in FILINGS if path.parent.name == kind]
    schema = json.loads((FOLDER / kind / "schema.json").read_text())
    parts = split_schema(schema, MAX_LEAVES)
    assert len(parts) == num_parts
    statuses = set()
    for seed in range(2):
        sampling = {"temperature": 0.5 + seed, "seed": seed, "max_tokens": 60}
        records = extract(filings, response_schema=schema, merge="per_page", sampling=sampling)
        assert set(records) == {path.stem for path in filings}
        for record in records.values():
            check_record(record, schema, parts)
            statuses |= {page.status for page in record.pages}
    assert statuses == {"ok", "incomplete"}


def check_record(record: DocumentRecord, schema: dict[str, Any], parts: list[dict[str, Any]]) -> None:
    """Pages, value, validation and raw text of a record whose values are one a page."""
    assert record.constrained
    assert [page.number for page in record.pages] == list(range(1, PAGES + 1))
    for page in record.pages:
        assert page.tokens is not None
        assert page.tokens.image_tokens == 0, "its text layer is clean, and stands in place of the picture"
        assert (page.source, page.status) == ("model", "ok" if page.stop == "stop" else "incomplete")
    num_ok = sum(page.status == "ok" for page in record.pages)
    assert record.validation is not None
    if num_ok:
        assert record.status == ("complete" if num_ok == PAGES else "partial")
        assert (record.validation.ok, record.validation.errors) == (True, ())
        assert len(record.value) == num_ok
        whole = jsonschema.Draft202012Validator(schema)
        assert all(whole.is_valid(value) for value in record.value)
        assert dict(leaves(record.value)).keys() <= record.fields.keys()
    else:
        assert (record.status, record.value) == ("invalid", None)
        assert [(error.path, error.keyword) for error in record.validation.errors] == [("", "json")]
    cut = [] if record.text is None else record.text.split("\f")
    assert len(cut) == PAGES - num_ok
    for text in cut:
        check_parts(text.split("\n"), parts)


def check_parts(texts: list[str], parts: list[dict[str, Any]]) -> None:
    """The answer of an incomplete page: what ended is valid under its part, and something was cut."""
    assert len(texts) == len(parts)
    num_cut = 0
    for text, part in zip(texts, parts, strict=True):
        try:
            value = parse_output(text).value
        except ValueError:
            num_cut += 1
            continue
        assert jsonschema.Draft202012Validator(part).is_valid(value)
    assert num_cut > 0


@pytest.mark.parametrize("filing", FILINGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_answers_that_stand_on_the_pages_have_page_and_span_and_others_none(filing: Path, extract: Extract) -> None:
    """The schema leaves the model no choice: a person's answers to this filing, and to another of its kind."""
    other = next(path for path in FILINGS if path.parent == filing.parent and path != filing)
    own, foreign = {shown(one): one for one in answers(filing, 6)}, {shown(one): one for one in answers(other, 12)}
    pages = {"range": ",".join(map(str, pages_of_most(filing, own.keys())))}
    texts = texts_of_pages(extract, filing, pages)
    document = folded(" ".join(texts.values()))
    standing = [leaf for text, leaf in own.items() if re.search(rf"\b{re.escape(folded(text))}\b", document)]
    absent = [leaf for text, leaf in foreign.items() if letters_and_digits(text) not in letters_and_digits(document)]
    chosen = [*standing[:15], *absent[:10]]
    names = [f"leaf {number}" for number in range(len(chosen))]
    schema = {
        "type": "object",
        "properties": {name: {"const": leaf} for name, leaf in zip(names, chosen, strict=True)},
        "required": names,
        "additionalProperties": False,
    }
    sampling = {"temperature": 0, "max_tokens": 4_000}
    (record,) = extract([filing], pages=pages, response_schema=schema, sampling=sampling).values()
    assert (record.status, record.conflicts, list(record.value.values())) == ("complete", (), chosen)
    metas = list(record.fields.values())
    assert len(metas) == len(chosen)
    assert min(len(standing), len(absent)) > 2
    assert "none" not in {meta.evidence for meta in metas[: len(standing[:15])]}
    assert {meta.evidence for meta in metas[len(standing[:15]) :]} == {"none"}
    for meta in metas:
        check_span(meta, texts)


def pages_of_most(filing: Path, known: Collection[str]) -> list[int]:
    """Numbers of the pages on which most of ``known`` stand."""
    pdfium = pytest.importorskip("pypdfium2", reason="the extra documents: pypdfium2")
    with pdfium.PdfDocument(filing) as document:
        texts = [folded(document[index].get_textpage().get_text_range()) for index in range(len(document))]
    counts = {number: sum(one in text for one in known) for number, text in enumerate(texts, start=1)}
    return sorted(sorted(counts, key=lambda number: -counts[number])[:PAGES])


def texts_of_pages(extract: Extract, filing: Path, pages: dict[str, Any]) -> dict[int, str]:
    """The text layers of these pages, which are the record of a route without a schema."""
    (record,) = extract([filing], pages=pages).values()
    assert {(page.source, page.attempts) for page in record.pages} == {("text_layer", 0)}
    assert record.usage.output_tokens == 0
    assert record.text is not None
    return dict(zip((page.number for page in record.pages), record.text.split("\f"), strict=True))


def check_span(meta: FieldMeta, texts: Mapping[int, str]) -> None:
    """Evidence is the text of its page at its span."""
    if meta.evidence != "none":
        assert meta.page is not None
        assert meta.span is not None
        assert texts[meta.page][slice(*meta.span)] == meta.text


def test_a_schema_that_is_none_is_refused_by_keyword_before_a_document_is_read(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    routes = write_route(tmp_path, response_schema_file=str(FOLDER / "resume-schema.json"))
    output = tmp_path / "records.jsonl"
    assert main(command(routes, model, output, FILINGS[0])) == 2
    refusal, *more = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nanovllm: ")]
    assert "route filings: json_schema: 'name' at # is no keyword of JSON Schema" in refusal
    assert more == []
    assert output.read_text() == ""
