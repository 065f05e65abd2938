"""Two workers with one ``group_instance_id``; a worker that cannot commit."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError, RequestTimedOutError
from bench import Bench, eventually

from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import GroupInstanceFenced


@pytest.mark.kafka
@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
async def test_of_two_workers_with_one_instance_id_the_fenced_one_ends_and_says_so(
    kafka_bench: Bench, delivery: str
) -> None:
    bench = kafka_bench
    kafka = bench.settings.kafka.model_copy(update={"group_instance_id": "same", "heartbeat_interval_ms": 500})
    async with bench.working(EchoEngine(), kafka=kafka, delivery=delivery) as (_, first):
        await bench.send({"job_id": "before", "prompt": "p"})
        await bench.results(1)
        async with bench.working(EchoEngine(), kafka=kafka, delivery=delivery) as (_, second):
            ended, _ = await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED, timeout=90)
            (fenced,) = ended
            with pytest.raises(GroupInstanceFenced, match="has group_instance_id 'same'"):
                fenced.result()
            await bench.send({"job_id": "behind", "prompt": "p"})
            # "before" comes again where the second one joined before its offset was committed.
            for count in range(2, 8):
                seen = set(await bench.results(count))
                if "behind" in seen:
                    break
            assert seen == {"before", "behind"}


async def test_a_worker_whose_commits_fail_for_longer_than_its_session_is_not_ready(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    kafka = bench.settings.kafka.model_copy(update={"session_timeout_ms": 6_000, "heartbeat_interval_ms": 500})
    works = AIOKafkaConsumer.commit

    async def failing(*_: object) -> None:
        raise RequestTimedOutError

    async with bench.working(EchoEngine(), kafka=kafka):
        await bench.send({"job_id": "a", "prompt": "p"})
        await bench.results(1)
        await eventually(lambda: bench.health.systemic is None)
        monkeypatch.setattr(AIOKafkaConsumer, "commit", failing)
        await bench.send({"job_id": "b", "prompt": "p"})
        await eventually(lambda: "offset commits: no offset was committed for" in str(bench.health.systemic))
        monkeypatch.setattr(AIOKafkaConsumer, "commit", works)
        await eventually(lambda: bench.health.systemic is None)


def test_the_coordinators_error_is_known_by_its_text() -> None:
    from nanovllm.kafka.errors import FencedInstanceIdError, is_fenced_instance

    assert is_fenced_instance(FencedInstanceIdError())
    assert is_fenced_instance(KafkaError(repr(FencedInstanceIdError())))
    assert not is_fenced_instance(RequestTimedOutError())
    assert not is_fenced_instance(KafkaError("UnknownError()"))
