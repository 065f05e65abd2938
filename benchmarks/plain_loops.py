"""What the pipeline is compared with: take a job, check it, produce two records; by aiokafka alone and by FastStream.

    python plain_loops.py aiokafka|faststream BROKERS GROUP JOBS RESULTS METRICS

Both read JSON, send a result and a metrics record for each job, and commit what they have done: at least once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any


def answer(value: bytes) -> tuple[bytes, bytes]:
    job = json.loads(value)
    job_id, prompt = job["job_id"], job["prompt"]
    result = {"version": 1, "job_id": job_id, "status": "ok", "text": prompt, "usage": {"input_tokens": 2}}
    return job_id.encode(), json.dumps(result).encode()


async def plain_aiokafka(brokers: str, group: str, jobs: str, results: str, metrics: str) -> None:
    from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

    consumer = AIOKafkaConsumer(
        jobs, bootstrap_servers=brokers, group_id=group, enable_auto_commit=False, auto_offset_reset="earliest"
    )
    producer = AIOKafkaProducer(bootstrap_servers=brokers, acks="all", enable_idempotence=True, linger_ms=5)
    async with consumer, producer:
        while True:
            batches = await consumer.getmany(timeout_ms=250, max_records=500)
            sent = []
            for records in batches.values():
                for record in records:
                    key, value = answer(record.value)
                    sent.append(await producer.send(results, value, key=key))
                    sent.append(await producer.send(metrics, value, key=key))
            await asyncio.gather(*sent)
            if sent:
                await consumer.commit()


async def faststream(brokers: str, group: str, jobs: str, results: str, metrics: str) -> None:
    from faststream import AckPolicy, FastStream
    from faststream.kafka import KafkaBroker

    broker = KafkaBroker(brokers, enable_idempotence=True, acks="all", linger_ms=5, logger=None)

    @broker.subscriber(
        jobs, group_id=group, batch=True, max_records=500, auto_offset_reset="earliest", ack_policy=AckPolicy.ACK,
        decoder=lambda message: message.body,
    )  # fmt: skip
    async def handle(batch: list[Any]) -> None:
        answers = [answer(value) for value in batch]
        sends = [(topic, key, value) for key, value in answers for topic in (results, metrics)]
        await asyncio.gather(*(broker.publish(value, topic, key=key) for topic, key, value in sends))

    await FastStream(broker, logger=None).run()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loop", choices=["aiokafka", "faststream"])
    for name in ("brokers", "group", "jobs", "results", "metrics"):
        parser.add_argument(name)
    options = vars(parser.parse_args())
    asyncio.run({"aiokafka": plain_aiokafka, "faststream": faststream}[options.pop("loop")](**options))
