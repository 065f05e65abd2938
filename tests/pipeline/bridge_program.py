"""``nanovllm bridge`` that is killed (SIGKILL) at a step of its first batch: ``bridge_program.py STEP ARGUMENTS``."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, NoReturn

from nanovllm.cli.main import main
from nanovllm.pipeline.routing.bridge import Bridge
from nanovllm.pipeline.routing.sqs import SqsQueue
from nanovllm.sinks.kafka import KafkaSink


async def _die(*_: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def _kill_in_mid_publish() -> None:
    publish_each = KafkaSink.publish_each

    async def half(self: KafkaSink, records: Any) -> NoReturn:
        await publish_each(self, records[: len(records) // 2])
        await _die()

    KafkaSink.publish_each = half  # type: ignore[method-assign]


def _kill_in_mid_delete() -> None:
    delete = SqsQueue.delete

    async def half(self: SqsQueue, messages: Any) -> NoReturn:
        await delete(self, messages[: len(messages) // 2])
        await _die()

    SqsQueue.delete = half  # type: ignore[method-assign]


def _kill_when_received() -> None:
    Bridge._move = _die  # type: ignore[assignment,method-assign]


STEPS = {"received": _kill_when_received, "publish": _kill_in_mid_publish, "delete": _kill_in_mid_delete}

if __name__ == "__main__":
    STEPS[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
