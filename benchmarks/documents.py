"""What documents cost: receipts of 1 to 12 pages, 40% of the pages repeats of earlier ones, by what a page is spared.

    python benchmarks/documents.py [--documents 30] [--repeats 3] [--measure]

The extraction of `nanovllm extract` with the shipped tiny model. **text layer**: the documents have one, and the route
reads it. **page reuse**: they have none, and finished pages are kept on a real S3 server (moto where there is none),
empty at first; **page reuse, again** finds them there. **neither**: the engine's own caches alone, which all have. The
question is the text of a page; fields under a JSON schema are asked beside it. Policies take turns, after a run that is
not counted. Pages a second are from the first byte read to the last record; engine seconds are those in its steps.

Then what ``nanovllm routes check --measure`` says pages take, beside the extractions of other documents by the same
route that go before and follow, in turns (``--measure``: this alone). Seconds of CPU of the engine's thread stand
beside both: other work on the machine changes them less. It writes a JSON file (``--output``) and a plot, and fails
when a page was not spared, or when the cost is off by more than 25%.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from nanovllm.pipeline.app import prepare_threads

prepare_threads()

from document_files import SCHEMA, native_receipts_pdf, receipts_pdf
from parts import S3Part, VersityNode, has_s3_node

from benchmarks.machine import busy_seconds, describe_machine
from benchmarks.output import add_output, write_text
from benchmarks.plot import draw_groups
from nanovllm.cli.main import main as nanovllm
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.outputs import StepOutput
from nanovllm.errors import NanoVLLMError
from nanovllm.messages.document_record import DocumentRecord
from nanovllm.pipeline.documents.extraction import DocumentSource
from nanovllm.pipeline.extract import FoundDocument, extract_documents
from nanovllm.pipeline.routing.routes import load_routes
from nanovllm.settings.routes import Route
from nanovllm.settings.worker import Settings
from nanovllm.training.synthetic import PROMPTS, generator, receipt

MOST_PAGES = 12
SHARED = 0.4
TOLERANCE = 0.25
"""Of the cost, either way."""
USUAL = ("--page", "224x224", "--document-pages", str(MOST_PAGES // 2))
ROUTES: Mapping[str, dict[str, Any]] = {
    "text": {"prompt": PROMPTS["text"], "text": "only_if_clean"},
    "fields": {"prompt": PROMPTS["json"], "response_schema": SCHEMA, "merge": "per_page"},
}
CASES = (
    ("text", "text layer"),
    ("text", "page reuse"),
    ("text", "page reuse, again"),
    ("text", "neither"),
    ("fields", "page reuse"),
    ("fields", "page reuse, again"),
    ("fields", "neither"),
)
Pages = Sequence[int]
"""The receipts of a document, by their numbers."""


def main() -> int:
    """Measure, write and print; 1 when a page was not spared, or a cost was far off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help="only the cost of `routes check --measure`")
    add_output(parser, "documents.json")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # torch was imported with its threads set up
    report: dict[str, Any] = {
        "machine": describe_machine(" ".join(["python benchmarks/documents.py", *sys.argv[1:]])),
        "documents": args.documents,
        "repeats": args.repeats,
    }
    others, began = seconds_of_others(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nanovllm-documents-") as temporary:
        if not args.measure:
            with s3_server(Path(temporary)) as s3:
                report |= measure_policies(s3, Path(temporary), args.documents, args.repeats)
        report["cost"] = measure_cost(Path(temporary), args.documents, args.repeats)
    capacity = (os.cpu_count() or 1) * (time.monotonic() - began)
    report["cpu_share_of_others"] = round((seconds_of_others() - others) / capacity, 2)
    write_text(args.output, json.dumps(report, indent=1) + "\n")
    if "results" in report:
        draw(report, args.output.with_suffix(".svg"))
    print(f"written to {args.output}")
    return 0 if report.get("is_spared", True) and report["cost"]["is_within_tolerance"] else 1


def seconds_of_others() -> float:
    """CPU time that this process and its children, as far as they have ended, have not used."""
    return busy_seconds() - sum(os.times()[:4])


def measure_policies(s3: S3Part, directory: Path, count: int, repeats: int) -> dict[str, Any]:
    """Every case in turns: medians, and ratios of pages a second to the question's ``neither``."""
    os.environ |= s3.environment
    settings = Settings.model_validate({"s3": {"endpoint_url": s3.endpoint_url, "addressing_style": "path"}})
    bucket = s3.make_bucket()
    chosen = choose_pages(count, SHARED, seed=1)
    pages, distinct = sum(map(len, chosen)), len({number for one in chosen for number in one})
    scanned, native = ([draw_document(one, seed=1, is_native=kind) for one in chosen] for kind in (False, True))
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {case: [] for case in CASES}
    extract(settings, load_route("text", directory)[0], scanned[:4], None)
    for repeat in range(repeats):
        for question, policy in CASES:
            store = f"s3://{bucket}/{question}-{repeat}" if policy.startswith("page reuse") else None
            documents = native if policy == "text layer" else scanned
            run = extract(settings, load_route(question, directory)[0], documents, store)
            runs[question, policy].append(run)
            print(json.dumps({"question": question, "policy": policy, **rounded(run)}), flush=True)
    medians = {case: median_of(found) for case, found in runs.items()}
    results = [
        {
            "question": question,
            "policy": policy,
            **found,
            "faster_by": round(found["pages_per_second"] / medians[question, "neither"]["pages_per_second"], 2),
        }
        for (question, policy), found in medians.items()
    ]
    return {
        "pages": pages,
        "distinct_pages": distinct,
        "results": results,
        "is_spared": all(
            run["engine_requests"] == 0 if policy == "text layer" else run["encoder_runs"] <= distinct
            for (_, policy), found in runs.items()
            for run in found
        ),
    }


def measure_cost(directory: Path, count: int, repeats: int) -> dict[str, Any]:
    """What ``routes check --measure`` says beside the extractions before and after it, in turns."""
    route, file = load_route("fields", directory)

    def run(seed: int) -> dict[str, Any]:
        documents = [draw_document(one, seed=seed, is_native=False) for one in choose_pages(count, 0.0, seed=seed)]
        return extract(Settings(), route, documents, None)

    turns = []
    before = run(seed=2)
    for repeat in range(repeats):
        said = io.StringIO()
        with counted_steps() as steps, contextlib.redirect_stdout(said):
            code = nanovllm(["routes", "check", str(file), "--measure", "--json", *USUAL])
        if code:
            raise RuntimeError(f"nanovllm routes check ended with {code}")
        rows = {row["what"]: row["is"] for row in json.loads(said.getvalue())}
        after = run(seed=3 + repeat)
        said_s = float(rows["seconds of 1,000 pages"]) / 1_000
        took_s = 1 / statistics.mean([before["pages_per_second"], after["pages_per_second"]])
        cpu_s = statistics.mean([before["engine_cpu_seconds_per_page"], after["engine_cpu_seconds_per_page"]])
        turn = {"said_seconds_per_page": said_s, "seconds_per_page": took_s, "ratio": said_s / took_s}
        turns.append(rounded({**turn, "ratio_of_engine_cpu": steps.cpu_seconds / steps.answers / cpu_s}))
        print(json.dumps(turns[-1]), flush=True)
        before = after
    ratio = statistics.median(turn["ratio"] for turn in turns)
    return {"turns": turns, "ratio": ratio, "is_within_tolerance": abs(ratio - 1) <= TOLERANCE}


def median_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The medians of the runs' figures."""
    return rounded({name: statistics.median(run[name] for run in runs) for name in runs[0]})


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures with four significant digits."""
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in figures.items()}


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars of the pages a second, a group for each question."""
    groups: dict[str, dict[str, float]] = {}
    for result in report["results"]:
        title = f"{result['question']} of a page: pages a second"
        groups.setdefault(title, {})[result["policy"]] = result["pages_per_second"]
    machine = report["machine"]
    load = f"load at start {machine['load_average_at_start'][0]}"
    pages = f"{report['pages']} pages, {report['distinct_pages']} distinct"
    draw_groups(groups, f"{pages}; {machine['cpu']}, {machine['cpus']} CPUs, {load}", path)


@contextlib.contextmanager
def s3_server(directory: Path) -> Iterator[S3Part]:
    """A real S3 server; moto's where there is none."""
    if has_s3_node():
        node = VersityNode(directory / "s3")
        try:
            yield node.start()
        finally:
            node.stop()
        return
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        yield S3Part("http://{}:{}".format(*server.get_host_and_port()), "test", "testsecret")
    finally:
        server.stop()


@dataclass
class Steps:
    """What engines did in their steps: seconds, those of CPU in their thread, answers, pictures encoded."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    answers: int = 0
    encoder_runs: int = 0


@contextlib.contextmanager
def counted_steps() -> Iterator[Steps]:
    """Counts the steps of every engine of this process meanwhile."""
    steps, original = Steps(), LLMEngine.step

    def step(engine: LLMEngine) -> list[StepOutput]:
        began, cpu_began = time.perf_counter(), time.thread_time()
        outputs = original(engine)
        steps.seconds += time.perf_counter() - began
        steps.cpu_seconds += time.thread_time() - cpu_began
        steps.answers += sum(output.finished is not None for output in outputs)
        steps.encoder_runs = engine.stats().encoder_images
        return outputs

    LLMEngine.step = step  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        LLMEngine.step = original  # type: ignore[method-assign]


def choose_pages(documents: int, shared: float, seed: int) -> list[Pages]:
    """Documents of 1 to ``MOST_PAGES`` pages; of all pages a share of ``shared`` are pages of earlier documents."""
    draw, fresh = random.Random(seed), itertools.count()
    sizes = [draw.randint(1, MOST_PAGES) for _ in range(documents)]
    repeats = set(draw.sample(range(sizes[0], sum(sizes)), round(shared * sum(sizes))))
    chosen: list[Pages] = []
    earlier: list[int] = []
    for size in sizes:
        places = range(len(earlier), len(earlier) + size)
        chosen.append([draw.choice(earlier) if place in repeats else next(fresh) for place in places])
        earlier += chosen[-1]
    return chosen


def draw_document(pages: Pages, *, seed: int, is_native: bool) -> bytes:
    """A PDF of these receipts, with a text layer or without."""
    drawn = [receipt(generator(number, seed=seed, split="heldout"), "heldout") for number in pages]
    if is_native:
        return native_receipts_pdf([one.lines for one in drawn])
    return receipts_pdf([one.image for one in drawn])


def load_route(question: str, directory: Path) -> tuple[Route, Path]:
    """The route of a question, and its file."""
    file = directory / f"{question}.yaml"
    sampling = {"temperature": 0, "max_tokens": 96}
    match = {"bucket": "inbox", "key": "**/*.pdf"}
    route = {"name": question, "match": match, "pages": {"dpi": 72}, "sampling": sampling, **ROUTES[question]}
    file.write_text(json.dumps({"version": 1, "routes": [route]}))
    return load_routes(file).entries[0].route, file


def extract(settings: Settings, route: Route, documents: Sequence[bytes], page_store: str | None) -> dict[str, Any]:
    """Extract the documents, and say what it took."""
    read_at: list[float] = []
    ended_at: list[float] = []
    records: list[DocumentRecord] = []

    def read(data: bytes) -> bytes:
        read_at.append(time.perf_counter())
        return data

    def on_record(record: DocumentRecord) -> None:
        ended_at.append(time.perf_counter())
        records.append(record)

    def on_failure(found: FoundDocument, error: NanoVLLMError) -> None:
        raise RuntimeError(f"{found.source.uri} failed") from error

    found = [
        FoundDocument(DocumentSource(f"{number}.pdf", etag="1"), route, lambda data=data: read(data))  # type: ignore[misc]
        for number, data in enumerate(documents)
    ]
    with counted_steps() as steps:
        extract_documents(settings, found, on_record, on_failure, lambda _: None, page_store=page_store)
    pages = sum(len(record.pages) for record in records)
    return {
        "pages_per_second": pages / (ended_at[-1] - read_at[0]),
        "engine_seconds_per_page": steps.seconds / pages,
        "engine_cpu_seconds_per_page": steps.cpu_seconds / pages,
        "seconds_in_engine_per_page": sum(record.timings_ms.generation for record in records) / 1_000 / pages,
        "engine_requests": steps.answers,
        "encoder_runs": steps.encoder_runs,
        "pages_whole": sum(page.status == "ok" for record in records for page in record.pages),
    }


if __name__ == "__main__":
    sys.exit(main())
