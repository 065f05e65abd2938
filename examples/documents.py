"""Stores a PDF, publishes its event as the bucket's notification would, and prints the record that comes of it.

With examples/compose.yaml, whose worker reads what lies below s3://receipts/documents/:

export NANOVLLM_S3__ENDPOINT_URL=http://127.0.0.1:9000
export AWS_ACCESS_KEY_ID=receipts AWS_SECRET_ACCESS_KEY=for-this-machine-only
BROKERS=localhost:9092 python examples/documents.py monday.pdf s3://receipts/documents/monday.pdf
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote_plus

from aiokafka import AIOKafkaProducer

from nanovllm import DeadLetter, ResultReader
from nanovllm.objects.s3_client import make_client
from nanovllm.settings.loading import load_settings

WAIT_S = 120


def store(path: str, bucket: str, key: str) -> dict[str, object]:
    """Store the file; its event in AWS's form. A bucket with notifications to Kafka sends one by itself."""
    data = Path(path).read_bytes()
    tag = make_client(load_settings().s3).put_object(Bucket=bucket, Key=key, Body=data)["ETag"].strip('"')
    entry = {"key": quote_plus(key, safe="/"), "eTag": tag, "size": len(data)}
    return {
        "eventVersion": "2.1",
        "eventSource": "aws:s3",
        "eventTime": datetime.now(UTC).isoformat(),
        "eventName": "ObjectCreated:Put",
        "s3": {"bucket": {"name": bucket}, "object": entry},
    }


async def main(path: str, uri: str) -> int:
    """Wait for what comes of the event; returns the exit code."""
    brokers = os.environ.get("BROKERS", "localhost:9092")
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    event = await asyncio.to_thread(store, path, bucket, key)
    async with (
        AIOKafkaProducer(bootstrap_servers=brokers) as producer,
        ResultReader(bootstrap_servers=brokers, documents=True, dead_letters=True) as reader,
    ):
        value = json.dumps({"Records": [event]}).encode()
        sent = await producer.send_and_wait("nanovllm.events", value, key=f"{bucket}/{key}".encode())
        try:
            async with asyncio.timeout(WAIT_S):
                async for outcome in reader:
                    source = outcome.source
                    if source is None or (source.topic, source.offset) != (sent.topic, sent.offset):
                        continue
                    if source.partition == sent.partition:
                        break
        except TimeoutError:
            print(f"no record in {WAIT_S} s: it is there already, or no route takes {uri}", file=sys.stderr)
            return 1
    if isinstance(outcome, DeadLetter):
        print(uri, outcome.code, outcome.message, file=sys.stderr)
        return 1
    print(outcome.model_dump_json(indent=2, exclude_none=True))
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} FILE S3-URI")
    sys.exit(asyncio.run(main(sys.argv[1], sys.argv[2])))
