"""``nanovllm demo``: broker, store, worker and jobs on one machine, with generated data.

It starts the embedded broker and object store, uploads generated pictures, produces jobs, runs the real worker as a
process of its own, stores documents and publishes their events, and compares what comes out with the generator's truth.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from aiokafka import AIOKafkaProducer
from rich.console import Console
from rich.text import Text

from nanovllm.client.producer import JobProducer
from nanovllm.client.results import ResultReader, client_settings
from nanovllm.demo.broker import EmbeddedBroker
from nanovllm.demo.child_process import HOST, LocalProcess, free_port, read_loopback
from nanovllm.demo.document_outcome import DocumentOutcome, DocumentSummary
from nanovllm.demo.documents import LETTERS, PREFIX, SCANS, DemoDocuments, demo_documents, write_routes
from nanovllm.demo.extract import DocumentsAtWork
from nanovllm.demo.jobs import BUCKET, DEFAULT_JOBS, MALFORMED_MESSAGE, DemoJob, DemoSet, demo_set
from nanovllm.demo.object_store import CREDENTIALS, EmbeddedObjectStore
from nanovllm.demo.outcome import Outcome
from nanovllm.demo.report import render_report
from nanovllm.errors import SystemicError
from nanovllm.kafka.admin import create_topics
from nanovllm.kafka.client import producer_kwargs
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.result import Result
from nanovllm.settings.kafka import KafkaSettings
from nanovllm.settings.topics import TopicSettings
from nanovllm.settings.worker import ENV_PREFIX
from nanovllm.terminal import long_work, plain

TOPICS = TopicSettings()
ROUTES = "routes.yaml"
FILES = ("report.html", "results.jsonl", "records.jsonl", "dead-letters.jsonl", "summary.json", "worker.log", ROUTES)
EXPECTED_DEAD_LETTERS = 2
STALL_S = 180.0
"""Without any answer for so long, the run is given up: loading the model takes seconds."""
EXAMPLES = ("json", "total", "text", "describe", "compare")

NEXT = (
    ("README.md, Run it on your own", "your brokers, buckets and model"),
    ("docs/documents.md", "from the bucket's event to the record"),
    ("docs/guide.md", "the engine in Python"),
)

# Of the caller's own settings only these reach the worker: the demo never touches other brokers or buckets.
_KEPT_SETTINGS = ("NANOVLLM_ENGINE__", "NANOVLLM_IMAGES__", "NANOVLLM_LOG_LEVEL")
_COMMAND = [sys.executable, "-m", "nanovllm.cli.main"]


def run_demo(*, keep: bool = False, output: Path = Path("build/demo"), jobs: int = DEFAULT_JOBS) -> int:
    """Run the demo; returns its exit code, 0 only when everything came out as it should.

    Args:
        keep: leave everything running afterwards, until Ctrl-C.
        output: directory of the report and the other files.
        jobs: how many jobs to send, at least ``MIN_JOBS``.

    Raises:
        ConfigurationError: too few jobs, or the extra ``demo`` is not installed.
        SystemicError: a part did not start or ended early.
    """
    demo = demo_set(jobs)
    output.mkdir(parents=True, exist_ok=True)
    # What an earlier run left must not pass for this one's.
    for name in FILES:
        (output / name).unlink(missing_ok=True)
    console = Console(highlight=False)
    return asyncio.run(_run(demo, keep, output, console))


async def _run(demo: DemoSet, keep: bool, output: Path, console: Console) -> int:
    task = asyncio.current_task()
    assert task is not None
    # Ctrl-C, SIGTERM and a closed terminal cancel the task, so that every part is ended in order.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        with ExitStack() as parts:
            return await _demo(demo, keep, output, console, parts)
    except asyncio.CancelledError:
        console.print("Interrupted; everything that was started has been ended.")
        return 1


async def _demo(demo: DemoSet, keep: bool, output: Path, console: Console, parts: ExitStack) -> int:
    started = time.monotonic()
    if kept := sorted(name for name in os.environ if name.startswith(_KEPT_SETTINGS)):
        console.print(f"[yellow]The worker takes {', '.join(kept)} from the environment; unset: the demo's own.[/]")
    broker, store = EmbeddedBroker(), EmbeddedObjectStore()
    parts.callback(broker.stop)
    parts.callback(store.stop)
    with _step(console, "Starting the embedded broker and object store") as done:
        await asyncio.gather(broker.start(), store.start())
        kafka = KafkaSettings(bootstrap_servers=broker.bootstrap_servers, client_id="nanovllm-demo")
        await create_topics(kafka, [TOPICS.jobs, TOPICS.results, TOPICS.metrics, TOPICS.dead_letters, TOPICS.events])
        done(f"Kafka on {broker.bootstrap_servers}, S3 on {store.endpoint_url}")

    settings = {
        "NANOVLLM_KAFKA__BOOTSTRAP_SERVERS": broker.bootstrap_servers,
        "NANOVLLM_KAFKA__GROUP_ID": "nanovllm-demo",
        "NANOVLLM_S3__ENDPOINT_URL": store.endpoint_url,
        "NANOVLLM_S3__ADDRESSING_STYLE": "path",
        "NANOVLLM_S3__ALLOW": f"s3://{BUCKET}/",
        **CREDENTIALS,
    }
    documents, port = _documents(), free_port()
    if documents is not None:
        write_routes(output / ROUTES)
        settings["NANOVLLM_DOCUMENTS__ROUTES"] = str((output / ROUTES).resolve())
    environment = _worker_environment(settings, port)
    worker = LocalProcess("worker", [*_COMMAND, "worker"], output / "worker.log", env=environment)
    worker.start()
    parts.callback(worker.stop, grace_s=30.0)
    with _step(console, f"Uploading {len(demo.objects)} images, producing {len(demo.jobs) + 2} messages") as done:
        await asyncio.to_thread(_upload, demo, store)
        await _produce(demo, kafka)
        done(f"{demo.distinct_images} different pictures, one image broken, one message malformed")

    results, dead_letters = await _collect(demo, kafka, worker)
    answered, extracted = time.monotonic(), None
    if documents is not None:
        extracted = await _extract(documents, DocumentsAtWork(store, kafka, TOPICS, worker, port), console)
        if not worker.is_running:
            raise _ended_early(worker)
    idle_s = await asyncio.to_thread(_idle_seconds, port)
    with _step(console, "Writing the report" if keep else "Ending the worker, writing the report"):
        worker_exit = None if keep else await asyncio.to_thread(worker.stop, 30.0)
        outcome = Outcome(demo, results, dead_letters, answered - started, worker_exit, extracted, idle_s)
        outcome.write(output)
        (output / "report.html").write_text(render_report(outcome), encoding="utf-8")
    _show(outcome, output, console)
    if not keep:
        console.print("\n[bold]Next[/]:")
        for command, what in ((f"{_program()} demo --keep", "all of it stays, for images of yours"), *NEXT):
            _print_line(f"  {command:<32} {what}", console)
    if keep:
        await _wait_for_the_end(settings, worker, console)
    return 1 if outcome.complaints else 0


@contextmanager
def _step(console: Console, title: str) -> Iterator[Callable[[str], None]]:
    started = time.monotonic()
    details: list[str] = []
    if not console.is_terminal:
        console.print(f"  {title} …")
    with long_work(title):
        yield details.append
    console.print(f"[green]✓[/] {title} [dim]{time.monotonic() - started:5.1f} s[/]")
    for detail in details:
        console.print(f"  [dim]{detail}[/]")


def _documents() -> DemoDocuments | None:
    """The demo's documents; None for the backend that reads no pages."""
    return None if os.environ.get("NANOVLLM_ENGINE__BACKEND") == "echo" else demo_documents()


async def _extract(documents: DemoDocuments, extract: DocumentsAtWork, console: Console) -> DocumentOutcome:
    events = documents.events
    with _step(console, f"Storing {len(documents.documents)} PDFs, publishing {len(events)} events") as done:
        outcome = await extract(documents)
        done(f"{documents.pages} pages; {documents.repeated.key} was told of twice")
    return outcome


def _worker_environment(settings: Mapping[str, str], port: int) -> dict[str, str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith((ENV_PREFIX, "AWS_")) or name.startswith(_KEPT_SETTINGS)
    }
    # Threads that spin while they wait take the cores from one another on a small machine.
    quiet = {"GOMP_SPINCOUNT": "0", "OMP_WAIT_POLICY": "PASSIVE"}
    own = {
        "NANOVLLM_WORKER_ID": "demo-worker",
        "NANOVLLM_HTTP__HOST": HOST,
        "NANOVLLM_HTTP__PORT": str(port),
        "PYTHONUNBUFFERED": "1",
    }
    return quiet | inherited | own | dict(settings)


def _idle_seconds(port: int) -> dict[str, float]:
    """What the worker's engine waited for, in seconds; nothing where the worker tells nothing."""
    try:
        return dict(json.loads(read_loopback(f"http://{HOST}:{port}/stats"))["idle"]["seconds"])
    except (OSError, ValueError, KeyError):
        return {}


def _upload(demo: DemoSet, store: EmbeddedObjectStore) -> None:
    store.create_bucket(BUCKET)
    for key, data in demo.objects.items():
        store.put(BUCKET, key, data)


async def _produce(demo: DemoSet, kafka: KafkaSettings) -> None:
    """All jobs at once; the two that must fail go in between, so that they meet a busy worker."""
    middle = len(demo.jobs) // 2
    async with JobProducer(kafka) as producer:
        for job in (*demo.jobs[:middle], demo.broken, *demo.jobs[middle:]):
            await producer.send(job_id=job.job_id, prompt=job.prompt, images=job.uris)
    async with AIOKafkaProducer(**producer_kwargs(kafka)) as plain:
        await plain.send_and_wait(TOPICS.jobs, MALFORMED_MESSAGE)


async def _collect(
    demo: DemoSet, kafka: KafkaSettings, worker: LocalProcess
) -> tuple[dict[str, Result], list[DeadLetter]]:
    """Follow the topics until every message has ended in one of them, or nothing has come for ``STALL_S``.

    Raises:
        SystemicError: the worker ended by itself.
    """
    results: dict[str, Result] = {}
    dead_letters: list[DeadLetter] = []
    # Constructed without a look at the environment, which may name other brokers.
    settings = client_settings(kafka, TOPICS)
    last_answer = time.monotonic()
    with long_work("The worker loads its model and answers", len(demo.jobs) + EXPECTED_DEAD_LETTERS) as show:
        async with ResultReader(settings, from_beginning=True, dead_letters=True) as reader:
            while len(results) < len(demo.jobs) or len(dead_letters) < EXPECTED_DEAD_LETTERS:
                answers = await reader.read()
                for answer in answers:
                    if isinstance(answer, Result):
                        results[answer.job_id] = answer
                    elif isinstance(answer, DeadLetter):
                        dead_letters.append(answer)
                show(len(results) + len(dead_letters))
                if answers:
                    last_answer = time.monotonic()
                elif not worker.is_running:
                    raise _ended_early(worker)
                elif time.monotonic() - last_answer > STALL_S:
                    break
    return results, dead_letters


def _ended_early(worker: LocalProcess) -> SystemicError:
    return SystemicError(f"the worker ended with exit code {worker.exit_code}:\n{worker.tail(15)}")


def _show(outcome: Outcome, output: Path, console: Console) -> None:
    """What happened, where the report is, what to do next: in few lines, and at most 80 columns."""
    console.print("\n[bold]Some of the answers[/]")
    for job in _examples(outcome):
        mark, style = ("✓", "green") if outcome.is_exact(job) else ("✗", "bold red")
        line = Text(f"{mark} ", style=style).append(Text(job.prompt, style="default"))
        _print_line(line, console)
        _print_line(Text("    ").append(_answer(job, outcome)), console)
    summary, latencies = outcome.summary, {latency.stage: latency for latency in outcome.latencies}
    console.print("\n[bold]What happened[/]")
    _print_line(f"  Answered {summary.answered} of {summary.jobs} jobs in {summary.seconds:.1f} s", console)
    _print_line(f"  Exactly right: {summary.exact} ({summary.exact / summary.jobs:.0%})", console)
    _print_line(
        f"  Images: {summary.images}, {summary.distinct_images} different; the encoder ran {summary.encoder_runs} "
        f"times, caches gave {summary.cache_hits}",
        console,
    )
    if total := latencies.get("total"):
        _print_line(f"  A job took {total.p50_ms:,.0f} ms (p50), {total.p95_ms:,.0f} ms (p95)", console)
    _print_line(f"  Dead letters: {summary.dead_letters}", console)
    for letter in outcome.dead_letters:
        _print_line(plain(f"    {letter.job_id or '–'}: {letter.code}"), console)
    if outcome.documents is not None:
        _show_documents(outcome.documents.summary, console)
    for complaint in outcome.complaints:
        _print_line(Text(f"✗ {complaint}", style="bold red"), console)
    console.print("\n[bold]Report[/], with every image, page, answer and dead letter:")
    console.print(Text(f"  {output / 'report.html'}"), soft_wrap=True)


def _show_documents(summary: DocumentSummary, console: Console) -> None:
    asked = summary.pages - summary.pages_reused - summary.pages_from_text
    right = f"{summary.values_exact} of {summary.values}"
    _print_line(
        f"  Documents: {summary.documents}, with records: {summary.records}; values exactly right: {right}", console
    )
    _print_line(
        f"  Pages: {summary.pages} (the model read {asked}, reused: {summary.pages_reused}, "
        f"from their own text: {summary.pages_from_text})",
        console,
    )
    _print_line(f"  Events: {summary.events}, skipped as known: {summary.events_skipped}", console)


def _document_lines(settings: Mapping[str, str], command: str) -> list[str]:
    if "NANOVLLM_DOCUMENTS__ROUTES" not in settings:
        return []
    routes = shlex.quote(settings["NANOVLLM_DOCUMENTS__ROUTES"])
    objects = f"s3://{BUCKET}/{PREFIX}/{SCANS}/"
    return [
        f"{command} routes check {routes}",
        f"{command} reconcile {objects} --route {SCANS} --check",
        f"{command} extract YOUR.pdf --routes {routes} --route {LETTERS} -o records.jsonl",
    ]


def _program() -> str:
    """The command line program as it is called from here."""
    program = os.path.relpath(Path(sys.executable).with_name("nanovllm"))
    return "nanovllm" if program.startswith("..") or not os.path.exists(program) else program


def _examples(outcome: Outcome) -> list[DemoJob]:
    """One job of each kind, and the first one that is wrong in its place."""
    jobs = sorted(outcome.demo.jobs, key=lambda job: (outcome.is_exact(job), job.job_id))
    first = {job.kind: job for job in reversed(jobs)}
    return [first[kind] for kind in EXAMPLES if kind in first]


def _print_line(line: str | Text, console: Console) -> None:
    """``line`` cut to the width, and to 80 columns where there is more or no terminal."""
    text = Text(line) if isinstance(line, str) else line
    text.truncate(min(console.width, 80), overflow="ellipsis")
    console.print(text, no_wrap=True)


def _answer(job: DemoJob, outcome: Outcome) -> Text:
    result = outcome.results.get(job.job_id)
    return Text("no result", style="red") if result is None else plain(result.text)


async def _wait_for_the_end(settings: Mapping[str, str], worker: LocalProcess, console: Console) -> None:
    """Say how to use what is running, and wait for Ctrl-C or the worker's end."""
    program = Path(sys.executable).with_name("nanovllm")
    command = shlex.quote(str(program)) if program.exists() else shlex.join(_COMMAND)
    exported = " ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items())
    console.print("\n[bold]All of it is still running.[/] In another terminal:\n")
    for line in (
        f"export {exported}",
        f"{command} submit --wait --prompt 'What is the total? <|image|>' s3://{BUCKET}/receipts/000.png",
        f"{command} submit --wait --prompt 'Describe this image: <|image|>' YOUR-IMAGE.png",
        f"{command} results --from-beginning",
        *_document_lines(settings, command),
    ):
        console.print(Text(line), soft_wrap=True)
    console.print("\nCtrl-C ends it.")
    try:
        while worker.is_running:  # noqa: ASYNC110 - a process that may end is no event
            await asyncio.sleep(0.5)
    except asyncio.CancelledError:
        console.print("Ending.")
        return
    raise _ended_early(worker)
