"""The demo as a person runs it: its own process, its own broker, object store and worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from generic_parts import needs_release
from parts import eventually

from nanovllm.demo.child_process import LocalProcess
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.document_record import DocumentRecord
from nanovllm.messages.result import Result
from nanovllm.terminal import LINE_S

COMMAND = [sys.executable, "-m", "nanovllm.cli.main"]
FILES = {
    "report.html",
    "results.jsonl",
    "records.jsonl",
    "dead-letters.jsonl",
    "summary.json",
    "worker.log",
    "routes.yaml",
}
TINY_MODEL = Path(__file__).resolve().parents[2] / "nanovllm" / "checkpoints" / "assets" / "tiny-receipts"
needs_the_model = pytest.mark.skipif(
    not (TINY_MODEL / "model.safetensors").exists(), reason="the tiny checkpoint is not in this tree"
)


def environment(**settings: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("NANOVLLM_")} | settings


# Of a command, with a line of progress every 20 ms in place of 5 s.
TALKATIVE = "import sys; from nanovllm import terminal; terminal.LINE_S = 0.02; from nanovllm.cli.main import main; "
STEPS = (
    "Starting the embedded broker and object store",
    "Uploading",
    "The worker loads its model and answers",
    "Ending the worker, writing the report",
)


def run_demo(
    output: Path, *options: str, command: Sequence[str] = COMMAND, **settings: str
) -> subprocess.CompletedProcess[str]:
    return run([*command, "demo", "--output", str(output), *options], **settings)


def run(command: list[str], **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment(**settings), capture_output=True, text=True, timeout=280)


def summary_of(output: Path) -> dict[str, float]:
    return json.loads((output / "summary.json").read_text())


@needs_the_model
@needs_release
def test_the_demo_is_as_right_through_transformers_layers(tmp_path):
    ended = run_demo(tmp_path, "--jobs", "24", NANOVLLM_ENGINE__BACKEND="generic")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert summary_of(tmp_path)["exact"] >= 0.9 * 24
    assert "transformers' layers, measured over" in (tmp_path / "worker.log").read_text()


@needs_the_model
def test_the_demo_is_right(tmp_path):
    ended = run_demo(tmp_path)
    summary = summary_of(tmp_path)
    assert summary["exact"] >= 0.9 * summary["jobs"]
    assert ended.returncode == 0, ended.stdout + ended.stderr


@needs_the_model
def test_the_demo_answers_every_job_and_says_how_many_texts_are_right(tmp_path):
    ended = run_demo(tmp_path)
    summary = summary_of(tmp_path)
    assert summary["answered"] == summary["jobs"] >= 24, ended.stdout + ended.stderr
    assert ended.returncode == (0 if summary["exact"] >= 0.9 * summary["jobs"] else 1)
    assert summary["exact"] >= 0.5 * summary["jobs"]
    assert summary["encoder_runs"] == summary["distinct_images"]
    assert summary["cache_hits"] == summary["images"] - summary["encoder_runs"] > 0
    assert {path.name for path in tmp_path.iterdir()} == FILES
    results = [Result.model_validate_json(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len({result.job_id for result in results}) == summary["jobs"]
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    records = [DocumentRecord.model_validate_json(line) for line in lines]
    assert [record.status for record in records] == ["complete"] * 3
    assert (summary["documents"], summary["records"], summary["pages"]) == (3, 3, 7)
    assert (summary["pages_reused"], summary["pages_from_text"]) == (1, 1)
    assert (summary["events"], summary["events_skipped"]) == (4, 1)
    assert summary["values_exact"] >= 0.75 * summary["values"]
    with_evidence = {meta.text for record in records for meta in record.fields.values() if meta.evidence == "exact"}
    assert with_evidence, "values stand in the text that the scanner recognised"
    lines = (tmp_path / "dead-letters.jsonl").read_text().splitlines()
    letters = {letter.code: letter for letter in map(DeadLetter.model_validate_json, lines)}
    assert letters.keys() == {"invalid_image", "invalid_job"}
    assert letters["invalid_image"].job_id == "demo-broken-image"
    for text in ("✓", "p95", "Dead letters: 2", "Exactly right", "Documents: 3", "reused: 1", "skipped as known: 1"):
        assert text in ended.stdout
    last = ended.stdout.splitlines()[-30:]
    assert all(len(line) <= 80 for line in last if str(tmp_path) not in line)
    said = [line.split(",")[0] for line in last]
    assert said.index("What happened") < said.index("Report") < said.index("Next:")


def test_no_step_is_silent_for_longer_than_ten_seconds():
    assert 0 < LINE_S <= 10, "each step prints a line so often: see the next test, and test_house.py for the set-up"


def test_a_demo_whose_texts_are_wrong_fails_and_never_touches_the_callers_own_brokers_and_buckets(tmp_path):
    ended = run_demo(
        tmp_path,
        "--jobs",
        "24",
        command=[sys.executable, "-c", f"{TALKATIVE} sys.exit(main())"],
        NANOVLLM_ENGINE__BACKEND="echo",
        NANOVLLM_KAFKA__BOOTSTRAP_SERVERS="192.0.2.1:9092",
        NANOVLLM_KAFKA__SECURITY_PROTOCOL="SSL",
        NANOVLLM_TOPICS__JOBS="production",
        NANOVLLM_S3__ENDPOINT_URL="http://192.0.2.1:9000",
        AWS_ENDPOINT_URL="http://192.0.2.1:9000",
        AWS_PROFILE="production",
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    for step in STEPS:
        assert re.search(rf"^{step}.*: \d+ s", ended.stderr, re.MULTILINE), f"{step} shows that it goes on"
    assert "only 0 of 24 texts are exactly right" in ended.stdout
    assert summary_of(tmp_path)["answered"] == 24
    report = (tmp_path / "report.html").read_text()
    assert "only 0 of 24 texts" in report
    assert "Why the engine waited" in report


def test_a_worker_that_cannot_start_ends_the_demo_with_its_words(tmp_path):
    ended = run_demo(tmp_path, "--jobs", "24", NANOVLLM_ENGINE__MODEL="no-such-model")
    assert ended.returncode == 1
    assert "worker ended with exit code 2" in ended.stderr
    assert "no-such-model" in ended.stderr


def test_too_few_jobs_are_a_misuse(tmp_path):
    ended = run_demo(tmp_path, "--jobs", "3")
    assert ended.returncode == 2
    assert "at least 24 jobs" in ended.stderr


async def test_a_demo_that_is_kept_takes_more_jobs_until_it_is_interrupted(tmp_path):
    log, output = tmp_path / "demo.log", tmp_path / "out"
    command = [*COMMAND, "demo", "--keep", "--jobs", "24", "--output", str(output)]
    demo = LocalProcess("demo", command, log, env=environment(NANOVLLM_ENGINE__BACKEND="echo"))
    demo.start()
    try:
        await eventually(lambda: "Ctrl-C ends it" in log.read_text() or not demo.is_running, within_s=200)
        assert demo.is_running, demo.tail(40)
        commands = re.findall(r"^(?:export|\S+nanovllm) .*$", log.read_text(), re.MULTILINE)
        export = next(line for line in commands if line.startswith("export "))
        submit = next(line for line in commands if "s3://" in line and " submit " in line)
        settings = dict(word.split("=", 1) for word in shlex.split(export)[1:])
        answered = await asyncio.to_thread(run, [*shlex.split(submit), "--json"], **settings)
        assert answered.returncode == 0, answered.stdout + answered.stderr
        assert "What is the total?" in answered.stdout
        children = children_of(demo.pid)
        assert len(children) == 3
        assert demo.pid is not None
        os.kill(demo.pid, signal.SIGINT)
        await eventually(lambda: not demo.is_running, within_s=60)
    finally:
        demo.kill()
    # The echo backend is never right; a right run that was kept ends with 0.
    assert demo.exit_code == 1
    assert not [child for child in children if is_alive(child)]


def children_of(parent: int | None) -> list[int]:
    found = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if int(line.split()[1]) == parent]


def is_alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False
