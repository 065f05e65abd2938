"""Records without a value in a topic of jobs: counted and passed over, or dead letters where the settings say so."""

from __future__ import annotations

import pytest
from bench import Bench, eventually, reached

from nanovllm.engine.backends.echo import EchoEngine


async def send_tombstones(bench: Bench, count: int) -> None:
    for number in range(count):
        await bench.producer.send_and_wait(bench.settings.topics.jobs, None, key=b"k%d" % number, partition=0)


@pytest.mark.kafka
@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
async def test_a_tombstone_is_counted_and_passed_over(kafka_bench: Bench, delivery: str) -> None:
    bench = kafka_bench
    await send_tombstones(bench, 3)
    await bench.send({"job_id": "between", "prompt": "p"})
    await send_tombstones(bench, 2)
    async with bench.working(EchoEngine(), delivery=delivery):
        assert set(await bench.results(1)) == {"between"}
        # The committed offset passes those at the end, too: no lag stays.
        end = await bench.ends()
        await eventually(lambda: reached(bench, end))
    topic = bench.settings.topics.jobs
    assert f'nanovllm_tombstones_total{{topic="{topic}"}} 5.0' in bench.metrics.exposition().decode()
    assert "nanovllm_dead_letters_total{" not in bench.metrics.exposition().decode()


async def test_a_tombstone_is_a_dead_letter_where_the_settings_say_so(bench: Bench) -> None:
    await send_tombstones(bench, 1)
    settings = bench.settings.dead_letters.model_copy(update={"tombstones": True})
    async with bench.working(EchoEngine(), dead_letters=settings):
        ((headers, _),) = await bench.dead_letters(1)
    assert headers["nanovllm_code"] == "invalid_job"
