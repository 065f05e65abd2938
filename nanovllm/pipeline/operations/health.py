"""The worker's probes and ``/metrics``, in threads of their own: they answer when the event loop does not."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from nanovllm.metrics import Metrics

logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("status_page.html")

# Heartbeats to Kafka share the event loop; one that stood still for longer has lost its partitions long ago.
MAX_SILENCE_S = 30.0
ANSWER_LAPSE_S = 60.0
"""What is held back from one tenant makes the worker unready once nothing was answered for so long."""


@cache
def page_policy() -> str:
    """The status page's policy: its own script and style, by their digests, and requests to this server alone."""

    def digests(element: str) -> str:
        (text,) = re.findall(rf"<{element}>(.*?)</{element}>", PAGE.read_text(encoding="utf-8"), re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    own = f"script-src {digests('script')}; style-src {digests('style')}; connect-src 'self'; img-src data:"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class Health:
    """What the worker says about itself. Each attribute is written by the worker and read by the server's threads.

    ``brokers``: the host:port of each as configured; unset without Kafka.
    """

    def __init__(self, brokers: str = "") -> None:
        self._not_joined = "the consumer group is not joined" + (f" at the brokers {brokers}" if brokers else "")
        self.is_model_loaded = False
        self.is_engine_alive = True
        self.has_joined = False
        self.is_draining = False
        self.systemic: str | None = None
        self.held_buckets: tuple[str, ...] = ()
        self.held_tenants: tuple[str, ...] = ()
        self._last_answer = -math.inf
        self._waits_for: str | None = None
        self._last_tick = time.monotonic()

    def tick(self) -> None:
        """The event loop is alive."""
        self._last_tick = time.monotonic()

    def wait_for(self, what: str | None) -> None:
        """The start waits for ``what``; None: it is over."""
        self._waits_for = what

    def answer(self) -> None:
        """A job was answered."""
        self._last_answer = time.monotonic()

    def set_held_buckets(self, from_all: tuple[str, ...], from_tenants: tuple[str, ...]) -> None:
        """What is held back of the object store and why: from all jobs, and from those of single tenants."""
        self.held_buckets, self.held_tenants = from_all, from_tenants

    @property
    def troubles(self) -> tuple[str, ...]:
        """Why the process should be restarted; nothing when it is well."""
        troubles = []
        # While a model loads, imports hold the loop for a while: that is no reason to start again.
        if self.is_model_loaded and (silence_s := time.monotonic() - self._last_tick) > MAX_SILENCE_S:
            troubles.append(f"the event loop has stood still for {silence_s:.0f} s")
        if not self.is_engine_alive:
            troubles.append("the engine is dead")
        return tuple(troubles)

    @property
    def unready(self) -> tuple[str, ...]:
        """Why the worker takes no work now; nothing when it does."""
        reasons = (
            *self.troubles,
            None if self.is_model_loaded else "the model is not loaded",
            None if self.has_joined else self._not_joined,
            f"waiting for {self._waits_for}" if self._waits_for else None,
            "draining" if self.is_draining else None,
            self.systemic,
            *self.held_buckets,
            *(() if self._others_are_answered else self.held_tenants),
        )
        return tuple(reason for reason in reasons if reason)

    @property
    def unstarted(self) -> tuple[str, ...]:
        """Why the start has not ended. Brokers are no part of it: a pod that waits for them would be ended again."""
        return () if self.is_model_loaded else ("the model is not loaded",)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is wrong for single tenants, while others are answered."""
        return self.held_tenants if self._others_are_answered else ()

    @property
    def _others_are_answered(self) -> bool:
        return time.monotonic() - self._last_answer < ANSWER_LAPSE_S


class HealthServer(ThreadingHTTPServer):
    """The HTTP server over a worker's health and metrics. Port 0 takes a free one; ``port`` tells which."""

    def __init__(self, health: Health, metrics: Metrics, *, host: str, port: int) -> None:
        super().__init__((host, port), _Handler)
        self.health = health
        self.metrics = metrics
        self.status: Callable[[], Mapping[str, Any]] | None = None
        """What ``/stats`` answers, once there is a worker; called in the server's threads."""
        self.port = int(self.server_address[1])
        self._serving = threading.Thread(target=self.serve_forever, name="nanovllm-http", daemon=True)

    def start(self) -> None:
        """Answer from now on."""
        self._serving.start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what a request failed of. A probe that has given up is no fault: its connection is gone."""
        if isinstance(sys.exception(), ConnectionError | TimeoutError):
            logger.debug("http: a client went away before its answer")
        else:
            logger.exception("a request to the worker's endpoints failed")

    def close(self) -> None:
        """Stop answering."""
        if self._serving.is_alive():
            self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: HealthServer
    timeout = 10.0  # a client that says nothing must not keep a thread
    server_version = "nanovllm"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/healthz":
            self._report(self.server.health.troubles)
        elif path == "/readyz":
            self._report(self.server.health.unready, self.server.health.notes)
        elif path == "/startupz":
            self._report(self.server.health.unstarted)
        elif path == "/stats":
            self._stats()
        elif path == "/":
            self._answer(200, PAGE.read_bytes(), "text/html; charset=utf-8", {"Content-Security-Policy": page_policy()})
        elif path == "/metrics":
            self._answer(200, self.server.metrics.exposition(), "text/plain; version=0.0.4; charset=utf-8")
        else:
            self._answer(404, b'{"status": "not found"}\n', "application/json")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _stats(self) -> None:
        status = self.server.status
        said = {"worker": {"state": "starting", "reasons": self.server.health.unready}} if status is None else status()
        self._answer(200, json.dumps(said).encode(), "application/json", {"Cache-Control": "no-store"})

    def _report(self, reasons: tuple[str, ...], notes: tuple[str, ...] = ()) -> None:
        said = {"status": "unavailable" if reasons else "ok", "reasons": reasons} | ({"notes": notes} if notes else {})
        self._answer(503 if reasons else 200, (json.dumps(said) + "\n").encode(), "application/json")

    def _answer(self, status: int, body: bytes, content_type: str, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": content_type,
            "X-Content-Type-Options": "nosniff",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        logger.debug("http: " + format, *args)
