from __future__ import annotations

import io
import json
import re
from collections import Counter
from datetime import UTC, datetime
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image

from nanovllm.demo.jobs import BROKEN_JOB_ID, demo_set
from nanovllm.demo.outcome import Outcome, percentile, stage_times
from nanovllm.demo.report import render_report
from nanovllm.errors import ConfigurationError
from nanovllm.messages.base import Source
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.result import InputUse, ModelUse, Result, StageTimings, TokenUsage
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


def outcome(demo, results, letters=None, worker_exit=0) -> Outcome:
    if letters is None:
        letters = [dead("invalid_image", job_id=BROKEN_JOB_ID), dead("invalid_job")]
    return Outcome(demo, {result.job_id: result for result in results}, letters, 12.345, worker_exit)


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


def test_the_files_hold_what_the_run_gave(demo, tmp_path):
    run = outcome(demo, perfect(demo))
    run.write(tmp_path)
    names = "jobs answered exact images distinct_images encoder_runs cache_hits dead_letters seconds"
    assert list(json.loads((tmp_path / "summary.json").read_text())) == names.split()
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
