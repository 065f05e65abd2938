"""The consume-transform-produce loop as aiokafka documents it, as a process: what ours is compared with.

python naive_worker.py BROKERS GROUP JOBS RESULTS NAME
"""

from __future__ import annotations

import asyncio
import json
import sys

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

WORK_S = 0.02


async def work(brokers: str, group: str, jobs: str, results: str, name: str) -> None:
    consumer = AIOKafkaConsumer(
        jobs,
        bootstrap_servers=brokers,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        session_timeout_ms=1_000,
        heartbeat_interval_ms=200,
    )
    producer = AIOKafkaProducer(bootstrap_servers=brokers, transactional_id=f"{group}-{name}")
    async with consumer, producer:
        while True:
            batches = await consumer.getmany(timeout_ms=500, max_records=40)
            if not batches:
                continue
            async with producer.transaction():
                offsets = {}
                for partition, records in batches.items():
                    for record in records:
                        await asyncio.sleep(WORK_S)
                        job_id = json.loads(record.value)["job_id"]
                        await producer.send(results, job_id.encode(), key=job_id.encode())
                    offsets[partition] = records[-1].offset + 1
                await producer.send_offsets_to_transaction(offsets, group)


if __name__ == "__main__":
    asyncio.run(work(*sys.argv[1:]))
