"""``nanovllm topics``: creation and checks of the topics that the settings imply."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated

import typer

from nanovllm.cli.flags import Application
from nanovllm.cli.jobs import BrokersOption, ConfigOption, JsonOption, client_settings
from nanovllm.errors import InvalidInput, counted
from nanovllm.kafka.admin import create_topics, topic_states
from nanovllm.pipeline.topic_checks import findings, implied_acls, more_partitions, topic_needs
from nanovllm.settings.worker import Settings
from nanovllm.terminal import print_table

DEFAULT_PARTITIONS = 4

topics_app = Application(no_args_is_help=True, help="Create and check the topics that the settings imply.")


@topics_app.command("create")
def topics_create(
    partitions: Annotated[
        int | None, typer.Option(min=1, help="Partitions of each new topic, the most workers at once; unset: 4.")
    ] = None,
    replication: Annotated[int, typer.Option(min=1, help="Copies of each new topic; 3 in production.")] = 1,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    bootstrap_servers: BrokersOption = None,
) -> None:
    """Create the topics that are missing, with sizes and retention that fit the settings; others stay as they are."""
    settings = client_settings(config, bootstrap_servers)
    # Topics of reply_to belong to those who wait there.
    needs = [need for need in topic_needs(settings) if need.purpose != "reply"]
    safe = {"min.insync.replicas": "2"} if replication > 2 else {}
    configs = {need.name: {**need.configs, **safe} for need in needs}
    created = asyncio.run(_create(settings, configs, partitions, replication))
    rows = [(name, "created" if name in created else "exists") for name in configs]
    print_table(("topic", "state"), rows, as_json=as_json)


async def _create(
    settings: Settings, configs: Mapping[str, Mapping[str, str]], partitions: int | None, replication: int
) -> list[str]:
    if partitions is not None:
        states = await topic_states(settings.kafka, list(configs))
        # That of the marks is made by the first replay, with one partition.
        for name in sorted(states.keys() - {settings.topics.replayed}):
            if (has := states[name].partitions) != partitions:
                way = more_partitions(name, partitions) if has < partitions else "Kafka takes none away: make it anew"
                raise InvalidInput(f"topic {name} has {counted(has, 'partition')}, not {partitions}; {way}")
    return await create_topics(
        settings.kafka,
        list(configs),
        partitions=DEFAULT_PARTITIONS if partitions is None else partitions,
        replication=replication,
        configs=configs,
    )


@topics_app.command("check")
def topics_check(
    workers: Annotated[int | None, typer.Option(min=1, help="How many workers shall work at once.")] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    bootstrap_servers: BrokersOption = None,
) -> None:
    """Say what about the topics would lose jobs or stop a worker; exit code 1 when something would."""
    settings = client_settings(config, bootstrap_servers)
    names = [need.name for need in topic_needs(settings)]
    found = list(findings(settings, asyncio.run(topic_states(settings.kafka, names)), workers=workers))
    print_table(("topic", "level", "finding"), [(one.topic, one.level, one.what) for one in found], as_json=as_json)
    raise typer.Exit(1 if any(one.level == "error" for one in found) else 0)


@topics_app.command("acls")
def topics_acls(
    as_json: JsonOption = False, config: ConfigOption = None, bootstrap_servers: BrokersOption = None
) -> None:
    """List the rights that a worker with these settings needs, and no others; no broker is asked."""
    rows = implied_acls(client_settings(config, bootstrap_servers))
    print_table(("resource", "name", "pattern", "operation"), rows, as_json=as_json)
