"""What sameness saves: 1,000 jobs about receipts, their pictures drawn by Zipf's law, through one worker.

    python benchmarks/dedup.py [--jobs 1000] [--exponents 0.6 0.9 1.2 1.6]

Apache Kafka, a real S3 server, the shipped tiny model. The more a picture repeats, the more jobs a second. Beside it
the same jobs with every memory off: none for objects, pixels, embeddings and prefixes. Objects have no version, so that
each job asks the store whether its picture is still the same. The script fails when the encoder has not run once
for each distinct picture, or an object was downloaded more than once. It writes a JSON file (``--output``) and a plot.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import random
import re
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from parts import KafkaNode, VersityNode, create_topic
from world import World

from benchmarks.machine import describe_machine
from benchmarks.output import add_output, write_text
from benchmarks.plot import draw_curves
from nanovllm.training.synthetic import PROMPTS, generator, receipt

# One question about a picture, or four: an equal prompt about an equal picture is answered from the prefix cache alone.
KINDS = ("total", "date", "number", "vendor")
OFF = {
    "NANOVLLM_REUSE__LEVEL": "none",
    "NANOVLLM_ENGINE__EMBEDDING_CACHE_BYTES": "0",
    "NANOVLLM_ENGINE__ENABLE_PREFIX_CACHING": "false",
}
COUNTED = ("fetched_objects", "fetched_bytes", "encoder_images", "embedding_cache_misses", "embedding_cache_evictions")


def main() -> int:
    """Measure every share of repeats with and without, write and print; 1 when sameness was paid twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--exponents", type=float, nargs="+", default=[0.6, 0.9, 1.2, 1.6])
    add_output(parser, "dedup.json")
    args = parser.parse_args()
    report: dict[str, Any] = {
        "machine": describe_machine(" ".join(["python benchmarks/dedup.py", *sys.argv[1:]])),
        "jobs": args.jobs,
        "runs": asyncio.run(measure(args.jobs, args.exponents)),
    }
    write_text(args.output, json.dumps(report, indent=1) + "\n")
    curves = {
        name: [(run["share_of_repeats"], run[name]["jobs_per_second"]) for run in report["runs"]]
        for name in ("with reuse", "without")
    }
    title = f"Jobs a second over the share of jobs whose picture came before ({args.jobs} jobs, {os.cpu_count()} CPUs)"
    draw_curves(curves, title, args.output.with_suffix(".svg"))
    print(f"written to {args.output} and {args.output.with_suffix('.svg')}")
    return 0 if all(run["is_paid_once"] for run in report["runs"]) else 1


async def measure(jobs: int, exponents: list[float]) -> list[dict[str, Any]]:
    """One run with and one without for every distribution, the first without repeats."""
    runs = []
    with tempfile.TemporaryDirectory(prefix="nanovllm-dedup-") as temporary:
        directory = Path(temporary)
        store = VersityNode(directory / "s3")
        s3 = store.start()
        try:
            async with KafkaNode(directory / "kafka") as node:
                bucket = s3.make_bucket()
                pictures = {number: draw(number) for number in range(jobs)}
                for number, body in pictures.items():
                    await asyncio.to_thread(s3.put, bucket, f"{number}.png", body)
                for exponent in (0.0, *exponents):
                    chosen = choose(jobs, exponent)
                    distinct = len(set(chosen))
                    run: dict[str, Any] = {
                        "zipf_exponent": exponent,
                        "distinct_pictures": distinct,
                        "share_of_repeats": 1 - distinct / jobs,
                    }
                    for name, settings in (("with reuse", {}), ("without", OFF)):
                        world = World(node.bootstrap_servers, s3, directory, settings, bucket=bucket)
                        run[name] = await work_off(world, chosen)
                    reuse = run["with reuse"]
                    run["is_paid_once"] = reuse["fetched_objects"] == distinct == reuse["encoder_images"]
                    run["faster_by"] = round(reuse["jobs_per_second"] / run["without"]["jobs_per_second"], 2)
                    runs.append(run)
                    print(json.dumps(run), flush=True)
        finally:
            store.stop()
    return runs


def draw(number: int) -> bytes:
    """A receipt as PNG; equal numbers give equal bytes."""
    buffer = io.BytesIO()
    receipt(generator(number, seed=20_261, split="heldout"), "heldout").image.save(buffer, "PNG")
    return buffer.getvalue()


def choose(jobs: int, exponent: float) -> list[int]:
    """The picture of every job: each its own, or by Zipf's law over as many pictures as jobs."""
    if exponent == 0:
        return list(range(jobs))
    weights = [1 / (rank + 1) ** exponent for rank in range(jobs)]
    return random.Random(f"{jobs}-{exponent}").choices(range(jobs), weights, k=jobs)


async def work_off(world: World, chosen: list[int]) -> dict[str, float]:
    """Let one worker answer a job for every picture of ``chosen``; its rate and what it counted."""
    await world.create_topics()
    await create_topic(world.bootstrap_servers, world.topics.in_flight, settings={"cleanup.policy": "compact"})
    async with world.producer() as producer:
        for number, picture in enumerate(chosen):
            prompt = PROMPTS[KINDS[number % len(KINDS)]]
            uri = f"s3://{world.bucket}/{picture}.png"
            await producer.send(prompt, images=[uri], job_id=f"{number}", sampling={"max_tokens": 24})
    worker = world.worker("dedup")
    async with world.reader() as reader:
        worker.start()
        try:
            began, answered, before = 0.0, 0, 0
            while answered < len(chosen):
                outcomes = await reader.read(timeout_ms=50)
                answered += len(outcomes)
                if not worker.is_running:
                    raise RuntimeError(f"the worker ended: {worker.tail(20)}")
                if outcomes and not began:
                    began, before = time.monotonic(), answered
            took_s = time.monotonic() - began
            await asyncio.sleep(1.0)  # the engine's figures are taken a few times a second
            counted = counters(worker.tail(10_000))
        finally:
            worker.kill()
            worker.log.unlink()
    return {"jobs_per_second": round((answered - before) / took_s, 2), **counted}


def counters(log: str) -> dict[str, float]:
    """What the worker's own endpoint tells."""
    port = re.findall(r"health and metrics on port (\d+)", log)[-1]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = {name: re.search(rf"^nanovllm_{name}_total ([\d.e+]+)$", text, re.MULTILINE) for name in COUNTED}
    return {name: float(match[1]) for name, match in found.items() if match}


if __name__ == "__main__":
    sys.exit(main())
