"""``nanovllm bridge``: notifications of queues to the events topic."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from nanovllm.cli.jobs import BrokersOption, ConfigOption, client_settings
from nanovllm.errors import counted
from nanovllm.terminal import print_json

# SQS's own limit, 12 hours.
MAX_VISIBILITY_S = 43_200

bridge_app = typer.Typer(no_args_is_help=True, help="Move event notifications from a queue to the events topic.")


@bridge_app.callback()
def _commands() -> None:
    """Without a callback, Typer would make the only command the group itself."""


@bridge_app.command("sqs")
def bridge_sqs(
    queue_url: Annotated[
        str, typer.Argument(help="The queue: https://sqs.eu-central-1.amazonaws.com/123456789012/receipts")
    ],
    topic: Annotated[str | None, typer.Option(help="Over topics.events.")] = None,
    visibility: Annotated[
        int,
        typer.Option(
            min=1,
            max=MAX_VISIBILITY_S,
            help="Seconds after which what a killed bridge held is delivered again; a living one prolongs them.",
        ),
    ] = 60,
    receivers: Annotated[int, typer.Option(min=1, max=64, help="Batches of ten messages that are moved at once.")] = 4,
    exit_when_drained: Annotated[
        bool, typer.Option("--exit-when-drained", help="Leave when the queue gives no more messages.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="At the end, what was moved as JSON.")] = False,
    config: ConfigOption = None,
    bootstrap_servers: BrokersOption = None,
) -> None:
    """Move S3's notifications from an SQS queue to the events topic, at least once, until told to stop.

    A message is deleted when the brokers have all of its events. One that holds no event becomes a dead letter. SIGTERM
    moves what is held, and gives back what cannot be moved in time. Credentials come from the AWS SDK's own chain.
    """
    settings = client_settings(config, bootstrap_servers, topics={"events": topic} if topic else {})
    from nanovllm.pipeline.operations.log import log_to_stderr
    from nanovllm.pipeline.operations.stop_signals import StopSignals
    from nanovllm.pipeline.routing.bridge import run_bridge
    from nanovllm.pipeline.routing.sqs import SqsQueue

    signals = StopSignals()
    log_to_stderr(settings.log_level, settings.log_format)
    queue = SqsQueue(queue_url, visibility_s=visibility, threads=2 * receivers)
    try:
        moved = asyncio.run(run_bridge(settings, queue, signals, receivers=receivers, until_empty=exit_when_drained))
    finally:
        queue.close()
    if as_json:
        print_json(asdict(moved))
        return
    print(
        f"{counted(moved.messages, 'message')}: {counted(moved.events, 'event')} sent to {settings.topics.events}, "
        f"{counted(moved.test_events, 'test event')}, {counted(moved.dead_letters, 'dead letter')}",
        file=sys.stderr,
    )
