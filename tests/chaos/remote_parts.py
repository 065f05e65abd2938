"""Parts of the remote drill: servers that count what they are asked, and workers that are told apart and watched."""

from __future__ import annotations

import asyncio
import contextlib
import re
import urllib.request
from collections import Counter
from http.client import HTTPException
from pathlib import Path
from random import Random

from chaos.endpoint_proxy import EndpointProxy
from chaos.fleet import Fleet
from openai_server import OpenAIServer
from parts import worker_process
from world import World

from nanovllm.demo.child_process import LocalProcess, free_port
from nanovllm.engine.backends.base import Request
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.engine.outputs import RequestOutput
from nanovllm.errors import InvalidInput
from nanovllm.vision.images.preprocess import PreparedImage

WORKERS = 2
SECRET = "sk-chaos"
REFUSED = "not this, please"
WORK_S = 0.04


class GuidedEcho(EchoEngine):
    """Echoes; what a constraint asks for where there is one; and refuses prompts with ``REFUSED`` in them."""

    def __init__(self) -> None:
        super().__init__(delay_s=WORK_S, fault=_refusal)

    def _echo(self, request: Request, start: float, admitted: float) -> RequestOutput:
        sampling = request.sampling
        if sampling.choice is not None:
            request = Request(request.request_id, prompt=sampling.choice[-1])
        elif sampling.json_schema is not None:
            (number,) = re.findall(r"\d+", str(request.messages))
            request = Request(request.request_id, prompt=f'{{"number":{number}}}')
        return super()._echo(request, start, admitted)


def _refusal(request: Request) -> InvalidInput | None:
    return InvalidInput("this server refuses it") if REFUSED in str(request.messages) else None


class Server(OpenAIServer):
    """Counts, for each image, the requests with it; ``fetched``: objects that it read by a presigned URL itself."""

    def __init__(self) -> None:
        super().__init__(GuidedEcho(), tells_token_ids=True)
        self.fetched = 0
        self.images: Counter[bytes] = Counter()

    async def start_again(self) -> None:
        """Die, and come back with an empty cache."""
        await self.kill()
        await self.engine.close()
        self.engine = GuidedEcho()
        await self.start()

    def _image(self, url: str) -> PreparedImage:
        image = super()._image(url)
        self.fetched += url.startswith("http")
        self.images[image.digest] += 1
        return image


class RemoteFleet(Fleet):
    """Each start has an API key and a port of its own, so that servers tell processes apart."""

    def __init__(self, world: World, endpoints: list[EndpointProxy], random: Random) -> None:
        self._endpoints = ",".join(endpoint.url for endpoint in endpoints)
        self._ports: dict[str, int] = {}
        self.counters: dict[int, Counter[str]] = {}
        self.most_bytes = 0
        self.leaks: list[str] = []
        self.starts = 0
        super().__init__(world, WORKERS, random)

    def _make(self, name: str) -> LocalProcess:
        self._ports[name] = free_port()
        own = {
            "NANOVLLM_HTTP__PORT": str(self._ports[name]),
            "NANOVLLM_REMOTE__ENDPOINTS": self._endpoints,
            "NANOVLLM_REMOTE__API_KEYS": f"{SECRET}-{name}-{self.starts}",
        }
        return worker_process(self._world.directory, settings=self._world.environment | own, name=name)

    async def look(self) -> None:
        """Read metrics and memory of each worker that is there."""
        for name, worker in list(self._workers.items()):
            with contextlib.suppress(OSError, HTTPException):  # it may be killed meanwhile
                status = await asyncio.to_thread(Path(f"/proc/{worker.pid}/status").read_text)
                for peak in re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE):
                    self.most_bytes = max(self.most_bytes, int(peak) * 1024)
                port = self._ports[name]
                text = await asyncio.to_thread(_get, f"http://127.0.0.1:{port}/metrics")
                if SECRET in text:
                    self.leaks.append(f"metrics of {name}")
                kinds = re.findall(r'^nanovllm_endpoint_faults_total\{.*kind="(\w+)".*\} (\S+)', text, re.MULTILINE)
                counted: Counter[str] = Counter()
                for kind, number in kinds:
                    counted[kind] += int(float(number))
                self.counters[port] = counted

    def faults(self) -> Counter[str]:
        """Faults that all processes have counted, by kind, as far as they were read."""
        return sum(self.counters.values(), Counter())


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        text: str = answer.read().decode()
    return text
