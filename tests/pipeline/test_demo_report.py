from __future__ import annotations

import io
import json
import re
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image

from nanovllm.demo.document_outcome import DocumentOutcome
from nanovllm.demo.documents import demo_documents, write_routes
from nanovllm.demo.jobs import BROKEN_JOB_ID, BUCKET, demo_set
from nanovllm.demo.outcome import Outcome, percentile, stage_times
from nanovllm.demo.report import render_report
from nanovllm.errors import ConfigurationError
from nanovllm.messages.base import Source
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.document_record import DocumentRecord, DocumentUse, FieldMeta, PageError, PageUse, RouteUse
from nanovllm.messages.result import InputUse, ModelUse, Result, StageTimings, TokenUsage
from nanovllm.pipeline.route_checks import check_routes
from nanovllm.pipeline.routing.routes import load_routes
from nanovllm.settings.s3 import S3Settings
from nanovllm.settings.worker import Settings
from nanovllm.training.synthetic import DEMO_SEED, generator, receipt
from nanovllm.vision.documents.pages import DocumentLimits
from nanovllm.vision.documents.pdf import PdfDocument
from nanovllm.vision.documents.text_layer import PageKind
from nanovllm.vision.images.digest import pixel_digest


def answer(job, *, text=None, cache="miss") -> Result:
    return Result(
        job_id=job.job_id,
        result_id="r",
        status="ok",
        text=job.truth if text is None else text,
        finish_reason="stop",
        usage=TokenUsage(input_tokens=60, output_tokens=9),
        model=ModelUse(id="tiny", revision="r1", parameter_digest="d1"),
        inputs=tuple(InputUse(uri=uri, sha256="0" * 64, width=224, height=224, cache=cache) for uri in job.uris),
        timings_ms=StageTimings(fetch=3, queue=10, encode=5, time_to_first_token=40, generation=20, total=63),
        source=Source(topic="nanovllm.jobs", partition=0, offset=1),
        worker="worker-1",
    )


def dead(code, *, job_id=None, message="why") -> DeadLetter:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    return DeadLetter(
        job_id=job_id,
        code=code,
        error_class="invalid",
        stage="prepare",
        message=message,
        source=Source(topic="nanovllm.jobs", partition=0, offset=2),
        worker="worker-1",
        received_at=now,
        failed_at=now,
    )


def record(document, **changed) -> DocumentRecord:
    values = [dict(truth) for truth in document.truths]
    is_letter = document.route == "letters"
    return DocumentRecord(
        job_id=document.key,
        result_id="r",
        status="complete",
        document=DocumentUse(uri=document.uri, sha256="0", size=1, media_type="application/pdf", pages=len(values)),
        route=RouteUse(name=document.route, digest="d"),
        value=None if is_letter else values,
        fields={
            f"/{at}/{name}": FieldMeta(source="model", evidence="exact", page=at + 1, text=text, span=(0, 4))
            for at, value in enumerate(values)
            for name, text in value.items()
        },
        pages=tuple(
            PageUse(
                number=number,
                status="ok",
                source="text_layer" if is_letter else "model",
                tokens=None if is_letter else TokenUsage(input_tokens=60, output_tokens=9),
                reused=document.key.endswith("tuesday.pdf") and number == 1,
            )
            for number in range(1, len(values) + 1)
        ),
        text="Dear customer" if is_letter else None,
        constrained=not is_letter,
        model=ModelUse(id="tiny", revision="r1", parameter_digest="d1"),
        usage=TokenUsage(input_tokens=60, output_tokens=9),
        worker="worker-1",
    ).model_copy(update=changed)


def extracted(records=None, sidecars=None, ended=None) -> DocumentOutcome:
    demo = demo_documents()
    records = {one.key: record(one) for one in demo.documents} | (records or {})
    return DocumentOutcome(
        demo,
        {one.document.uri: one for one in records.values() if one is not None},
        records | (sidecars or {}),
        Counter(result=3, same=1) if ended is None else ended,
        1.5,
    )


def outcome(demo, results, letters=None, worker_exit=0, documents=None) -> Outcome:
    if letters is None:
        letters = [dead("invalid_image", job_id=BROKEN_JOB_ID), dead("invalid_job")]
    return Outcome(demo, {result.job_id: result for result in results}, letters, 12.345, worker_exit, documents)


@pytest.fixture(scope="module")
def demo():
    return demo_set(24)


def perfect(demo) -> list[Result]:
    return [answer(job, cache="hit" if index else "miss") for index, job in enumerate(demo.jobs)]


@pytest.mark.parametrize("count", [24, 25, 48])
def test_every_kind_of_question_comes_three_times_and_half_of_the_jobs_are_receipts(count):
    jobs = demo_set(count).jobs
    kinds = Counter(job.kind for job in jobs)
    assert len({job.job_id for job in jobs}) == len(jobs) == count
    assert len(kinds) == 8
    assert min(kinds.values()) >= 3
    assert sum(job.keys[0].startswith(("receipts/", "copies/")) for job in jobs) >= count / 2


def test_the_demo_is_the_same_every_time(demo):
    again = demo_set(24)
    assert again.jobs == demo.jobs
    assert again.objects == demo.objects


def test_too_few_jobs_are_refused():
    with pytest.raises(ConfigurationError, match="at least 24"):
        demo_set(23)


def test_equal_picture_numbers_are_equal_pixels_in_different_files(demo):
    digests = {}
    for key, picture in demo.pictures.items():
        with Image.open(io.BytesIO(demo.objects[key])) as image:
            digests.setdefault(picture, set()).add(pixel_digest(image.convert("RGB")))
    assert all(len(found) == 1 for found in digests.values())
    assert len(set.union(*digests.values())) == len(digests) < len(demo.pictures)
    assert len({demo.objects[key] for key in demo.pictures}) == len(demo.pictures)


def test_the_broken_image_breaks(demo):
    with pytest.raises(OSError, match="truncated"), Image.open(io.BytesIO(demo.objects["broken.png"])) as image:
        image.load()


def test_a_run_without_fault_has_no_complaint(demo):
    run = outcome(demo, perfect(demo))
    assert run.complaints == ()
    assert (run.summary.jobs, run.summary.answered, run.summary.exact) == (24, 24, 24)
    assert run.summary.encoder_runs + run.summary.cache_hits == run.summary.images == 27
    assert run.summary.dead_letters == 2


def test_each_fault_is_a_complaint(demo):
    good = perfect(demo)
    assert "no result" in outcome(demo, good[1:]).complaints[0]
    wrong = [answer(job, text="?", cache="hit") for job in demo.jobs[:3]]
    assert "exactly right" in outcome(demo, wrong + good[3:]).complaints[0]
    assert "cache" in outcome(demo, [answer(job) for job in demo.jobs]).complaints[0]
    assert "broken image" in outcome(demo, good, [dead("invalid_job")]).complaints[0]
    assert "malformed" in outcome(demo, good, [dead("invalid_image", job_id=BROKEN_JOB_ID)]).complaints[0]
    assert "exit code 1" in outcome(demo, good, worker_exit=1).complaints[0]


def test_stages_add_up_to_what_the_worker_measured(demo):
    spent = stage_times(answer(demo.jobs[0]))
    assert spent["prefill"] == 25
    assert sum(spent.values()) == 63


def test_percentiles_are_values_that_were_seen():
    assert percentile([5.0, 1.0, 3.0], 50) == 3.0
    assert percentile([5.0, 1.0, 3.0], 95) == 5.0
    assert percentile([7.0], 50) == 7.0


def test_two_of_the_documents_share_a_page_and_no_page_shows_what_a_job_asks_about():
    documents = demo_documents()
    shown = {}
    for document in documents.documents:
        pdf = PdfDocument(document.data, DocumentLimits())
        for number in range(1, len(document.truths) + 1):
            page = pdf.render(number, dpi=72, rotation=0, max_pixels=10**6)
            shown[document.key, number] = pixel_digest(page)
        pdf.close()
    assert len(shown) == documents.pages == len(set(shown.values())) + documents.shared_pages
    assert shown["documents/scans/monday.pdf", 4] == shown["documents/scans/tuesday.pdf", 1]
    drawn = receipt(generator(700, seed=DEMO_SEED, split="heldout"), "heldout")
    assert shown["documents/scans/monday.pdf", 1] == pixel_digest(drawn.image)
    of_jobs = demo_set(48)
    for key in of_jobs.pictures:
        with Image.open(io.BytesIO(of_jobs.objects[key])) as image:
            assert pixel_digest(image.convert("RGB")) not in shown.values()


def test_the_documents_text_is_none_what_a_scanner_recognised_or_what_a_program_wrote():
    scan, recognised, letter = (PdfDocument(one.data, DocumentLimits()) for one in demo_documents().documents)
    assert [scan.text(number).text for number in range(1, 5)] == [""] * 4
    page = recognised.text(2)
    assert page.kind is PageKind.SCANNED
    assert all(value in page.text for value in demo_documents().documents[1].truths[1].values())
    assert letter.text(1).kind is PageKind.CLEAN
    assert "EUR 118.40" in letter.text(1).text


def test_the_routes_of_the_demo_pass_the_checks_of_the_shipped_model(tmp_path):
    file = tmp_path / "routes.yaml"
    write_routes(file)
    found = load_routes(file)
    check_routes(found, Settings(s3=S3Settings(allow=(f"s3://{BUCKET}/",))))
    for document in demo_documents().documents:
        route = found.route_of(BUCKET, document.key, None, None)
        assert route is not None
        assert route.name == document.route


def test_documents_without_fault_have_no_complaint_and_their_figures_stand_beside_those_of_jobs(demo, tmp_path):
    run = outcome(demo, perfect(demo), documents=extracted())
    assert run.complaints == ()
    run.write(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["documents"], summary["records"], summary["pages"]) == (3, 3, 7)
    assert (summary["pages_reused"], summary["pages_from_text"]) == (1, 1)
    assert summary["values_exact"] == summary["values"] == 24
    assert (summary["events"], summary["events_skipped"]) == (4, 1)
    assert summary["jobs"] == summary["answered"] == 24
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert [DocumentRecord.model_validate_json(line) for line in lines] == list(run.documents.records.values())


def test_each_fault_of_documents_is_a_complaint(demo):
    scan, second, letter = demo_documents().documents

    def complaint(**changed):
        return " ".join(outcome(demo, perfect(demo), documents=extracted(**changed)).complaints)

    assert "1 of 3 documents have no record" in complaint(records={letter.key: None})
    assert "only 8 of 24 values" in complaint(records={scan.key: record(scan, value=[{}] * 4)})
    assert "not the one beside" in complaint(sidecars={scan.key: None})
    unused = tuple(page.model_copy(update={"reused": False}) for page in record(second).pages)
    assert "0 pages were reused" in complaint(records={second.key: record(second, pages=unused)})
    asked = (PageUse(number=1, status="ok", source="model", tokens=TokenUsage(input_tokens=1, output_tokens=1)),)
    assert "its own text" in complaint(records={letter.key: record(letter, pages=asked)})
    assert "'result': 4" in complaint(ended=Counter(result=4))


def test_the_files_hold_what_the_run_gave(demo, tmp_path):
    run = outcome(demo, perfect(demo))
    run.write(tmp_path)
    names = "jobs answered exact images distinct_images encoder_runs cache_hits dead_letters seconds"
    documents = "documents records pages pages_reused pages_from_text values values_exact events events_skipped"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == [*names.split(), *documents.split()]
    assert not any(summary[name] for name in documents.split()), "no documents in this run"
    results = [Result.model_validate_json(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    letters = [
        DeadLetter.model_validate_json(line) for line in (tmp_path / "dead-letters.jsonl").read_text().splitlines()
    ]
    assert results == list(run.results.values())
    assert letters == list(run.dead_letters)


class Tags(HTMLParser):
    void = frozenset({"meta", "img"})

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.sources = [], Counter(), []

    def handle_starttag(self, tag, attrs):
        self.seen[tag] += 1
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_file_that_refers_to_nothing_outside(demo):
    page = render_report(outcome(demo, perfect(demo)))
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.seen["img"] == 27
    assert all(source.startswith("data:image/jpeg;base64,") for source in tags.sources)
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(drawing)
    assert tags.seen["svg"] == 2
    assert tags.seen["script"] == tags.seen["link"] == 0
    assert not re.search(r"url\(|@import|https?://", page)


def test_model_text_and_reasons_cannot_break_out_of_the_report(demo):
    attack = '</pre><script>alert("x")</script>'
    results = [answer(demo.jobs[0], text=attack), *perfect(demo)[1:]]
    letters = [dead("invalid_image", job_id=attack, message=attack)]
    page = render_report(outcome(demo, results, letters))
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 3


def test_the_report_shows_each_page_its_values_where_they_came_from_and_their_evidence(demo):
    page = render_report(outcome(demo, perfect(demo), documents=extracted()))
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.seen["img"] == 27 + 7
    assert all(source.startswith("data:image/jpeg;base64,") for source in tags.sources)
    documents = page.partition("<h2>Documents")[2].partition("<h2>")[0]
    for document in demo_documents().documents:
        assert document.uri in documents
        assert all(value in documents for truth in document.truths for value in truth.values())
    assert documents.count('<span class="yes">') == 24
    assert documents.count("characters 0 to 4 (exact)") == 24
    assert documents.count("no model was asked") == 2
    assert documents.count("the model, 9 tokens") == 5
    assert "Dear customer" in documents


def test_values_and_texts_of_documents_cannot_break_out_of_the_report(demo):
    scan, second, letter = demo_documents().documents
    attack = '</pre><script>alert("x")</script>'
    values = [dict.fromkeys(truth, attack) for truth in scan.truths]
    evidence = {path: meta.model_copy(update={"text": attack}) for path, meta in record(scan).fields.items()}
    error = PageError(code="invalid_page", message=attack, retryable=False)
    failed = (PageUse(number=1, status="failed", error=error), *record(second).pages[1:])
    changed = {
        scan.key: record(scan, value=values, fields=evidence),
        second.key: record(second, value=None, fields={}, pages=failed),
        letter.key: record(letter, text=attack),
    }
    page = render_report(outcome(demo, perfect(demo), documents=extracted(changed)))
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 2 * 16
    assert "no record" in render_report(outcome(demo, [], [], documents=extracted({letter.key: None})))


def test_a_run_without_any_answer_still_has_a_report(demo):
    page = render_report(outcome(demo, [], []))
    assert "24 of 24 jobs have no result" in page


def test_tables_of_many_columns_become_cards_at_phone_width(demo):
    page = render_report(outcome(demo, perfect(demo)))
    tables = re.findall(r"<table(.*?)>(.*?)</table>", page, re.DOTALL)
    many = [attributes for attributes, body in tables if body.count("<th>") > 3]
    assert many == [' class="wide"'] * 2
    (phone,) = re.findall(r"@media \(max-width: 640px\) \{(.*?\}) \}", page, re.DOTALL)
    assert re.search(r"table\.wide td \{ display: block", phone)
    assert "table.wide thead { display: none }" in phone, "each cell that needs it names itself"
    assert page.count('data-name="code"') == len(outcome(demo, perfect(demo)).dead_letters)


def test_the_report_says_what_the_engine_waited_for(demo):
    waited = replace(outcome(demo, perfect(demo)), idle_s={"fetch": 0.25, "empty": 12.5})
    page = render_report(waited)
    assert page.index("Why the engine waited") < page.index("<td>empty</td>") < page.index("<td>fetch</td>")
    assert "Why the engine waited" not in render_report(outcome(demo, perfect(demo)))
