"""Follows the results and dead letters of all jobs, and prints one JSON line for each; Ctrl-C ends it.

BROKERS=localhost:9092 python examples/reader.py
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable

from nanovllm import ResultReader


async def main(show: Callable[[str], object] = print) -> None:
    """Show each outcome as it comes, without end."""
    brokers = os.environ.get("BROKERS", "localhost:9092")
    async with ResultReader(bootstrap_servers=brokers, dead_letters=True) as reader:
        async for outcome in reader:
            show(outcome.model_dump_json(exclude_none=True))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
