"""``nanovllm status``: the consumer group of the workers in a terminal."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

import typer

from nanovllm.cli.jobs import BrokersOption, ConfigOption, JsonOption, client_settings
from nanovllm.client.group_status import GroupRates, GroupStatus, read_group
from nanovllm.errors import counted
from nanovllm.pipeline.consuming.retry_topics import RetryTopics
from nanovllm.settings.worker import Settings
from nanovllm.terminal import print_json, print_table

DAY_S = 24 * 3600


def status(
    interval: Annotated[
        float, typer.Option(min=0.1, help="Seconds between the two readings that rates are taken from.")
    ] = 3.0,
    watch: Annotated[bool, typer.Option("--watch", help="Read again and again, until Ctrl-C.")] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    bootstrap_servers: BrokersOption = None,
) -> None:
    """Show the group of the workers: lag by partition, workers, rates, and when the lag is worked off."""
    settings = client_settings(config, bootstrap_servers)
    asyncio.run(_show(settings, interval, watch=watch, as_json=as_json))


async def _show(settings: Settings, interval_s: float, *, watch: bool, as_json: bool) -> None:
    topics = list(RetryTopics.of(settings).lanes)
    before = await read_group(settings.kafka, topics)
    while True:
        await asyncio.sleep(interval_s)
        after = await read_group(settings.kafka, topics)
        rates = GroupRates.between(before, after)
        if as_json:
            print_json(as_object(after, rates))
        else:
            print_status(after, rates)
        if not watch:
            return
        before = after


def print_status(group: GroupStatus, rates: GroupRates) -> None:
    """Print ``group`` for people."""
    left_s = rates.seconds_left(group.lag)
    print(
        f"group {group.group_id}: {group.state or 'unknown'}, {counted(len(group.members), 'worker')}, "
        f"{counted(group.lag, 'record')} not finished, {rates.written:.1f} written and {rates.finished:.1f} finished "
        f"a second, {_when(left_s)}"
    )
    print_table(
        ("worker", "host", "partitions"),
        [(one.client_id, one.host, one.partitions) for one in group.members],
        as_json=False,
    )
    print_table(
        ("topic", "partition", "finished", "end", "lag", "worker"),
        [
            (one.topic, one.partition, one.finished, one.end, one.lag, one.client_id or "none")
            for one in group.partitions
        ],
        as_json=False,
    )


def as_object(group: GroupStatus, rates: GroupRates) -> dict[str, Any]:
    """``group`` for programs; ``seconds_left`` is null where the lag does not shrink."""
    return {
        "group": group.group_id,
        "state": group.state,
        "lag": group.lag,
        "written_per_s": rates.written,
        "finished_per_s": rates.finished,
        "seconds_left": rates.seconds_left(group.lag),
        "workers": [asdict(one) for one in group.members],
        "partitions": [{**asdict(one), "lag": one.lag} for one in group.partitions],
    }


def _when(left_s: float | None) -> str:
    if left_s is None or left_s > DAY_S * 365:
        return "the lag does not shrink"
    if left_s == 0:
        return "nothing is left"
    if left_s < 90:
        return f"done in {left_s:.0f} s"
    return f"done in {left_s / 60:.0f} min" if left_s < 5400 else f"done in {left_s / 3600:.1f} h"
