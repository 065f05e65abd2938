"""Sends one job for each S3 URI on the command line, and prints the result of each as it is asked for.

BROKERS=localhost:9092 python examples/producer.py 'What is the total? <|image|>' s3://receipts/0001.png
"""

from __future__ import annotations

import asyncio
import os
import sys

from nanovllm import JobProducer, Result


async def main(prompt: str, uris: list[str]) -> int:
    """Send all jobs, then wait for their results; returns the exit code."""
    failed = 0
    async with JobProducer(bootstrap_servers=os.environ.get("BROKERS", "localhost:9092"), results=True) as producer:
        job_ids = [await producer.send(prompt, images=[uri], sampling={"max_tokens": 64}) for uri in uris]
        for uri, job_id in zip(uris, job_ids, strict=True):
            outcome = await producer.result(job_id, timeout_s=300)
            if isinstance(outcome, Result):
                print(uri, outcome.text)
            else:
                failed += 1
                print(uri, outcome.code, outcome.message, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(f"usage: {sys.argv[0]} PROMPT S3-URI...")
    sys.exit(asyncio.run(main(sys.argv[1], sys.argv[2:])))
