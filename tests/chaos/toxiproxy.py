"""Toxiproxy as a `NetworkLine`: faults of TCP by an implementation that is not ours."""

from __future__ import annotations

import asyncio
import json
import os
import time
import urllib.request
from pathlib import Path
from typing import Any

from chaos.proxies import LineFault
from containers import ContainerProcess, require_docker
from parts import LocalPart, PartProcess

from nanovllm.demo.child_process import free_port

_NAME = "line"
TOXICS: dict[LineFault, list[dict[str, Any]]] = {
    "slow": [
        {"type": "latency", "attributes": {"latency": 30, "jitter": 20}},
        {"type": "slicer", "attributes": {"average_size": 100, "size_variation": 60, "delay": 200}},
    ],
    # 0: the connections stay open until the toxic is removed, which closes them.
    "silent": [{"type": "timeout", "attributes": {"timeout": 0}}],
    "cut": [{"type": "reset_peer", "attributes": {"timeout": 0}}],
}
"""By fault; times in ms, the slicer's delay in µs, sizes in bytes."""
CUT_S = 0.2


class ToxiproxyLine:
    """A Toxiproxy server with one proxy: ``port`` leads to ``upstream_port`` on loopback.

    It is the program that ``TOXIPROXY`` names, else a container; without both, its start skips the test.
    """

    def __init__(self, port: int, upstream_port: int, directory: Path) -> None:
        self.port, self.upstream_port = port, upstream_port
        self._api = free_port()
        self._directory = directory
        self._process: PartProcess | None = None

    def made(self) -> PartProcess:
        """The server, not started."""
        command = ["-host", "127.0.0.1", "-port", str(self._api)]
        if program := os.environ.get("TOXIPROXY"):
            return LocalPart("toxiproxy", [program, *command], self._directory / "toxiproxy.log")
        require_docker("Toxiproxy", "no TOXIPROXY")
        return ContainerProcess("toxiproxy", command)

    async def start(self) -> None:
        self._process = self.made()
        self._process.start()
        deadline = time.monotonic() + 60
        while True:
            try:
                await self._ask("GET", "/version")
                break
            except OSError:
                assert self._process.is_running, self._process.tail(20)
                assert time.monotonic() < deadline, self._process.tail(20)
                await asyncio.sleep(0.1)
        ends = {"listen": f"127.0.0.1:{self.port}", "upstream": f"127.0.0.1:{self.upstream_port}"}
        await self._ask("POST", "/proxies", {"name": _NAME, "enabled": True, **ends})

    async def spoil(self, fault: LineFault) -> None:
        for toxic in TOXICS[fault]:
            for stream in ("upstream", "downstream"):
                named = toxic | {"name": f"{toxic['type']}_{stream}", "stream": stream}
                await self._ask("POST", f"/proxies/{_NAME}/toxics", named)
        if fault == "cut":
            await asyncio.sleep(CUT_S)  # it resets what sends meanwhile
            await self.heal()

    async def heal(self) -> None:
        await self._ask("POST", "/reset")

    async def stop(self) -> None:
        if self._process is not None:
            self._process.stop()

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> None:
        """Raises OSError where it does not answer, or not with success."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._api}{path}",
            method=method,
            data=json.dumps(body).encode() if body is not None else None,
            headers={"Content-Type": "application/json"},
        )

        def ask() -> None:
            urllib.request.urlopen(request, timeout=5).close()

        await asyncio.to_thread(ask)
