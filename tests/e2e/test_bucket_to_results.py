"""From a bucket to results: thousands of objects, one command that is interrupted and repeated, and a worker."""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from parts import S3Part, eventually, png
from world import World

from nanovllm.demo.child_process import LocalProcess

PROGRAM = Path(__file__).with_name("submit_program.py")
OBJECTS, INTERRUPTED_AT = 2_000, 700
READ_S = 120.0


@pytest.mark.s3
@pytest.mark.slow
async def test_every_object_below_a_prefix_has_one_result_though_the_command_was_interrupted(
    embedded_broker: str, versity_s3: S3Part, tmp_path: Path
) -> None:
    world = World(embedded_broker, versity_s3, tmp_path, {"NANOVLLM_ENGINE__BACKEND": "echo"})
    await world.create_topics()
    with ThreadPoolExecutor(8) as uploads:
        # Each its own picture: a colour of its own.
        pictures = ((n, png((n % 256, n // 256, 7), (8, 8))) for n in range(OBJECTS))
        uris = set(
            uploads.map(lambda one: versity_s3.put(world.bucket, f"in/{one[0] % 10}/{one[0]}.png", one[1]), pictures)
        )
    journal = tmp_path / "sent.jsonl"

    async def submit(interrupt_at: int) -> tuple[int | None, str]:
        command = ["submit", f"s3://{world.bucket}/in/", "-p", "Total?", "--journal", str(journal)]
        process = LocalProcess(
            "submit",
            [sys.executable, str(PROGRAM), str(interrupt_at), *command],
            tmp_path / "submit.log",
            env=environment,
        )
        process.start()
        await eventually(lambda: not process.is_running, within_s=120, why="submit goes on")
        return process.exit_code, process.tail(OBJECTS + 5)

    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NANOVLLM_", "AWS_"))}
    environment |= versity_s3.environment | {
        "NANOVLLM_KAFKA__BOOTSTRAP_SERVERS": embedded_broker,
        "NANOVLLM_TOPICS__JOBS": world.topics.jobs,
        "NANOVLLM_S3__ENDPOINT_URL": versity_s3.endpoint_url,
        "NANOVLLM_S3__ADDRESSING_STYLE": "path",
    }
    code, said = await submit(INTERRUPTED_AT)
    assert code == 1, said
    assert "interrupted" in said
    sent = len(journal.read_text().splitlines())
    assert INTERRUPTED_AT <= sent < OBJECTS
    code, said = await submit(0)
    assert code == 0, said
    assert f"{OBJECTS - sent:,} jobs sent to {world.topics.jobs}, {sent:,} were sent before" in said
    job_ids = {json.loads(line)["job_id"] for line in journal.read_text().splitlines()}
    assert len(job_ids) == OBJECTS

    await world.drain("worker")
    deadline = time.monotonic() + READ_S
    async with world.reader() as reader:
        while len(world.results) + len(world.dead_letters) < OBJECTS:
            await world.read(reader)
            assert time.monotonic() < deadline, f"only {len(world.results)}, dead {len(world.dead_letters)}"
    assert not world.dead_letters
    results = [result for (result,) in world.results.values()]
    assert {result.job_id for result in results} == job_ids
    assert len({result.result_id for result in results}) == OBJECTS
    assert {result.inputs[0].uri for result in results} == uris
